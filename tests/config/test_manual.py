"""Help of a configuration: parts, the configuration's own values, and what is asked for and not there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from ldm.__main__ import main
from ldm.cli.train import _help
from ldm.config.errors import UserError
from ldm.config.manual import describe, paths_of
from ldm.config.schema import read, resolved
from ldm.runs.run import Run

ROOT = Path(__file__).parents[2]
QUICKSTART = ROOT / "configs" / "quickstart.yaml"
LORA = ROOT / "configs" / "finetune-lora.yaml"


def paths(text: str) -> set[str]:
    """The fields that a help text describes."""
    return {line.split()[0] for line in text.splitlines() if re.match(r"  \S", line)}


def given(file: Path, *words: str) -> object:
    return resolved(read(file, words), Run)


def test_without_a_configuration_every_field_of_every_kind_is_described_under_its_part() -> None:
    text = describe(Run)
    assert paths(text) == set(paths_of(Run))
    heads = [line for line in text.splitlines() if line and not line.startswith(" ")]
    assert heads[:5] == ["the run", "data", "data (kind scenes)", "data (kind folder)", "data (kind shards)"]
    assert "models.NAME (kind latent_diffusion)" in heads and "stages.NAME (kind evaluate)" in heads


def test_a_configuration_is_described_by_its_own_parts_and_values() -> None:
    text = describe(Run, given(QUICKSTART, "stages.diffusion-low.optim.lr=3e-4"))
    heads = [line for line in text.splitlines() if line and not line.startswith(" ")]
    run = read(QUICKSTART, ())
    assert {f"stages.{name}" for name in run["stages"]} | {f"models.{name}" for name in run["models"]} <= set(heads)
    assert "data (kind folder)" not in heads and not any("NAME" in head for head in heads)
    lines: dict[str, str] = {}
    for line in text.splitlines():
        if re.match(r"  \S", line):
            lines.setdefault(line.split()[0], " ".join(line.split()[1:]))  # the kind that is chosen stands first
    assert lines["stages.diffusion-low.optim.lr"] == "number 0.0003 (default 0.004)"
    assert lines["stages.diffusion-low.images"] == f"integer {run['stages']['diffusion-low']['images']} (required)"
    assert lines["stages.diffusion-low.buckets.step"] == "integer 0" and "models.diffusion.adapt.rank" in lines  # blocks that are not there


def test_what_a_configuration_has_not_chosen_stands_in_the_help_of_a_part_alone() -> None:
    text = describe(Run, given(LORA, "stages.lora.optim.kind=adamw"))
    assert {"models.diffusion.adapt.rank", "stages.lora.optim.betas", "models.diffusion.inpaint.full"} <= paths(text)
    other = {"models.diffusion.adapt.token", "stages.lora.optim.momentum", "models.diffusion.network.head_width"}
    assert not other & paths(text) and "stages.lora.optim.momentum" in paths(describe(Run, given(LORA), "stages.lora.optim"))
    assert "stages.lora.optim.momentum" in paths(describe(Run, given(LORA, "stages.lora.optim.kind=muon")))
    assert "models.diffusion.adapt.token" in paths(describe(Run, given(QUICKSTART)))  # there is none: of every kind


def test_a_part_is_described_alone_with_every_kind_of_it() -> None:
    text = describe(Run, given(LORA), "models.diffusion.adapt")
    assert {path.rpartition(".")[0] for path in paths(text)} == {"models.diffusion.adapt"}
    assert {"models.diffusion.adapt.rank", "models.diffusion.adapt.token"} <= paths(text)
    assert "models.diffusion.adapt (kind textual_inversion)" in text
    assert paths(describe(Run, given(QUICKSTART), "data")) == {path for path in paths_of(Run) if path.startswith("data.")}
    # Where nothing says which names there are, any is taken.
    assert paths(describe(Run, part="stages.diffusion-low.buckets")) == {path for path in paths_of(Run) if ".buckets" in path}
    assert paths(describe(Run, given(LORA), "models.diffusion.adapt.rank")) == {"models.diffusion.adapt.rank"}


@pytest.mark.parametrize(
    ("part", "meant"),
    [
        ("stages.difusion-low", "did you mean stages.diffusion-low"),
        ("models.autoencodr", "did you mean models.autoencoder"),
        ("rank", "did you mean models.diffusion.adapt.rank"),
        ("models.diffusion.adapt.rnk", "did you mean models.diffusion.adapt.rank"),
        ("batch_size", "did you mean stages.text.batch"),
        ("zzz", "parts are name, out, seed, data"),
    ],
)
def test_a_part_that_is_not_there_gets_the_nearest(part: str, meant: str) -> None:
    with pytest.raises(UserError, match=re.escape(f"--help {part}: no such part; {meant}")):
        describe(Run, given(QUICKSTART), part)


def test_the_word_after_help_is_a_part_unless_it_is_the_configuration() -> None:
    assert _help(["c.yaml", "--help", "data"]) == (["c.yaml"], "data")
    assert _help(["--help", "c.yaml", "seed=1"]) == (["c.yaml", "seed=1"], "")
    assert _help(["c.yaml", "--help=stages.text"]) == (["c.yaml"], "stages.text")
    assert _help(["c.yaml", "--help", "seed=1"]) == (["c.yaml", "seed=1"], "")
    assert _help(["c.yaml"]) == (["c.yaml"], None)


def test_a_configuration_with_a_mistake_still_has_its_help(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "c.yaml").write_text(f"base: {QUICKSTART}\nstages: {{text: {{btch: 3}}}}\n")
    assert main(["train", str(tmp_path / "c.yaml"), "--help", "stages.text.batch"]) == 0
    assert "stages.text.batch" in capsys.readouterr().out
