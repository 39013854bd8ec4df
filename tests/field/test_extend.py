"""More images, another batch or learning rate go on from the state at the end when asked, and the record keeps both settings."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ldm.config.errors import UserError
from ldm.config.schema import build
from ldm.runs.execution import carry_out
from ldm.runs.extension import history
from ldm.runs.plan import make
from ldm.runs.run import Run
from ldm.runs.run_folder import sweep
from ldm.runs.run_record import read_story
from ldm.training.checkpoint import left_in, step_after
from ldm.training.log import read
from ldm.training.loop import Trainer

pytestmark = pytest.mark.slow
STAGE = {"kind": "train", "model": "autoencoder", "images": 32, "batch": 8, "resolution": 16, "samples": 0, "log_every_steps": 1}
NETWORK = {"channels": [8, 8], "layers": 1, "norm_groups": 4}


def run(seed: int = 0, width: int = 8, **fields: Any) -> Run:
    model = {"kind": "kl", "network": {**NETWORK, "channels": [8, width]}, "adversarial": {"weight": 0}}
    data = {"kind": "scenes", "images": 24, "val": 2}
    return build(
        {"seed": seed, "data": data, "workers": 0, "models": {"autoencoder": model}, "stages": {"tune": {**STAGE, **fields}}}, Run, "test"
    )


def do(out: Path, extend: bool = False, **fields: Any) -> list[str]:
    """One start of the run; what it noted."""
    before = len(notes(out))
    assert carry_out(run(**fields), out, extend=extend) == 0
    return notes(out)[before:]


def notes(out: Path) -> list[str]:
    return [line["note"] for line in read(out / "log.jsonl") if "note" in line]


def weights(out: Path) -> dict[str, torch.Tensor]:
    (file,) = (out / "stages/tune/model/vae").glob("*.safetensors")
    return load_file(file)


def same(a: Path, b: Path) -> bool:
    one, other = weights(a), weights(b)
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


def images(out: Path) -> list[int]:
    return [line["images"] for line in read(out / "log.jsonl") if "step" in line]


def stop_at(patched: pytest.MonkeyPatch, step: int) -> None:
    """As if the process were killed before that step's update."""
    real = Trainer._update

    def update(self: Trainer, *words: Any) -> Any:
        if self.step >= step:
            raise KeyboardInterrupt
        return real(self, *words)

    patched.setattr(Trainer, "_update", update)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("finished") / "r"
    do(out)
    return out


def copied(finished: Path, to: Path) -> Path:
    shutil.copytree(finished, to / "r")
    return to / "r"


def test_more_images_are_the_longer_run_to_the_bit(finished: Path, tmp_path: Path) -> None:
    out = copied(finished, tmp_path)
    said = do(out, extend=True, images=64)
    assert any("tune: goes on from 32 images, with settings.images: 32 -> 64; the former result is kept in" in line for line in said)
    do(tmp_path / "whole", images=64)
    assert same(out, tmp_path / "whole") and not same(out, finished)
    assert images(out) == images(tmp_path / "whole") == list(range(8, 72, 8))
    done = json.loads((out / "stages/tune/done.json").read_text())
    (change,) = done["history"]
    assert change["images"] == 32 and change["identity"]["settings"]["images"] == 32 and done["identity"]["settings"]["images"] == 64
    assert (out / "stages/tune.replaced-1/model").is_dir()  # what was trained before is still there
    assert any("done already" in line for line in do(out, images=64)) and any(
        "done already" in line for line in do(out, extend=True, images=64)
    )
    (stage,) = read_story(out).stages
    assert stage.changes == ["after 32 images: settings.images: 32 -> 64"]


def test_without_the_word_it_runs_anew_and_names_it_and_the_word_still_helps(finished: Path, tmp_path: Path) -> None:
    out = copied(finished, tmp_path)
    assert "--extend" in make(run(images=40), out).stages[0].why
    with pytest.MonkeyPatch.context() as patched:
        stop_at(patched, 0)
        with pytest.raises(KeyboardInterrupt):
            carry_out(run(images=40), out)
    (said,) = [line for line in notes(out) if "runs anew" in line]
    assert "since settings.images: 32 -> 40 (--extend goes on from its state instead)" in said
    assert "goes on from 32 images" in make(run(images=40), out, extend=True).stages[0].why
    do(out, extend=True, images=40)
    do(tmp_path / "whole", images=40)
    assert same(out, tmp_path / "whole")


def test_another_batch_and_rate_go_on_with_both_settings_in_the_record(finished: Path, tmp_path: Path) -> None:
    out = copied(finished, tmp_path)
    optim = {"lr": 5e-5, "schedule": "cosine"}
    said = do(out, extend=True, images=96, batch=12, optim=optim)
    assert any("goes on from 32 of 96 images (tune.replaced-1); its batches of 12 begin at 36" in line for line in said)
    assert images(out) == [8, 16, 24, 32, 48, 60, 72, 84, 96] and not any("learning rate jump" in line for line in said)
    (change,) = history(out / "stages/tune")
    assert sorted(change.changed) == [
        "settings.batch: 8 -> 12",
        "settings.images: 32 -> 96",
        "settings.optim.lr: 0.0001 -> 5e-05",
        "settings.optim.schedule: constant -> cosine",
    ]
    moments = left_in(out / "stages/tune")
    assert moments[1].images == 96 and moments[1].ema_updates == 9
    state = load_file(moments[0] / "optimizer.safetensors")
    assert {float(value) for name, value in state.items() if name.endswith(".step")} == {9.0}
    # And once more: the record keeps all three.
    do(out, extend=True, images=120, batch=12, optim={"kind": "muon"})
    assert [one.images for one in history(out / "stages/tune")] == [32, 96]
    assert any("the optimiser is another one and begins anew" in line for line in notes(out))


def test_killed_before_its_first_checkpoint_it_goes_on_without_the_word(finished: Path, tmp_path: Path) -> None:
    out = copied(finished, tmp_path)
    with pytest.MonkeyPatch.context() as patched:
        stop_at(patched, 5)
        with pytest.raises(KeyboardInterrupt):
            carry_out(run(images=64), out, extend=True)
    do(out, images=64)
    do(tmp_path / "whole", images=64)
    assert same(out, tmp_path / "whole") and images(out) == list(range(8, 72, 8))


def test_an_interrupted_stage_goes_on_with_another_rate(tmp_path: Path) -> None:
    out = tmp_path / "r"
    fields = {"images": 64, "save_every_images": 16, "save_beside": False}
    with pytest.MonkeyPatch.context() as patched:
        stop_at(patched, 5)
        with pytest.raises(KeyboardInterrupt):
            carry_out(run(**fields), out)
    said = do(out, extend=True, **fields, optim={"lr": 1e-3})
    assert any("goes on from 32 of 64 images" in line for line in said)
    assert images(out) == list(range(8, 72, 8))


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"images": 24}, r"stages\.tune\.images: 24, but 32 are done; give more to go on from"),
        ({"batch": 16}, r"stages\.tune\.images: 32, but 32 are done"),
        ({"images": 64, "seed": 1}, r"stages\.tune: cannot go on from .*, since seed: 0 -> 1; leave --extend out"),
        ({"images": 64, "width": 16}, r"cannot go on from .*, since model\.network\.channels"),
        ({"images": 64, "resolution": 32}, r"cannot go on from .*, since settings\.resolution: 16 -> 32"),
        ({"images": 64, "ema": 0}, r"stages\.tune\.ema: 0\.999 -> 0.*: an EMA begins and ends with its stage"),
    ],
)
def test_what_cannot_be_gone_on_from_is_refused_before_any_work(fields: dict[str, Any], said: str, finished: Path) -> None:
    with pytest.raises(UserError, match=said) as told:
        carry_out(run(**fields), finished, extend=True)
    assert "\n" not in str(told.value) and (finished / "stages/tune/done.json").is_file()
    with pytest.raises(UserError, match=said):
        make(run(**fields), finished, extend=True)


def test_a_stage_that_keeps_no_state_says_so(tmp_path: Path) -> None:
    do(tmp_path / "r", keep_state=False)
    assert not (tmp_path / "r/stages/tune/carried").exists()
    with pytest.raises(UserError, match=r"tune holds no state to go on from \(keep_state: false.*without --extend"):
        carry_out(run(images=64), tmp_path / "r", extend=True)
    assert "--extend" not in make(run(images=64), tmp_path / "r").stages[0].why


def test_the_first_step_of_another_batch() -> None:
    assert [step_after(32, batch) for batch in (8, 12, 16, 64, 1)] == [4, 3, 2, 1, 32]


# What a start that was killed leaves behind


def everything(out: Path) -> list[str]:
    return sorted(path.relative_to(out).as_posix() for path in out.rglob("*"))


@pytest.mark.parametrize("point", ["state", "report"])
def test_a_finished_run_that_was_killed_leaves_nothing_behind(point: str, finished: Path, tmp_path: Path) -> None:
    """Killed after done.json was written and before the state was removed, or while the report was being written."""
    removed = shutil.rmtree

    def killed(path: Any, *words: Any, **more: Any) -> None:
        if Path(path).name == "state":
            raise KeyboardInterrupt
        removed(path, *words, **more)

    out = tmp_path / "r"
    with pytest.MonkeyPatch.context() as patched:
        if point == "state":
            patched.setattr(shutil, "rmtree", killed)
        else:
            patched.setattr(Path, "replace", lambda self, target: _interrupt() if "report" in self.name else self.rename(target))
        with pytest.raises(KeyboardInterrupt):
            carry_out(run(save_every_images=8, save_beside=False), out)
    assert (out / "stages/tune/done.json").is_file() and everything(out) != everything(finished)
    do(out)
    assert everything(out) == everything(finished)


def _interrupt() -> None:
    raise KeyboardInterrupt


def test_what_was_being_written_is_removed_and_what_was_being_replaced_is_put_back(finished: Path, tmp_path: Path) -> None:
    out = copied(finished, tmp_path)
    before = everything(out)
    stage = out / "stages" / "tune"
    (stage / "model").rename(stage / ".model.old")  # between the two renames of a commit
    for name in (
        ".model.partial/x",
        "state/.images-000000000008.partial/x",
        "state/images-000000000008/x",
        "assembled/x",
        "../.tune.partial/x",
    ):
        (stage / name).parent.mkdir(parents=True)
        (stage / name).touch()
    for name in (".log.jsonl.cut", ".report.html.partial", ".metrics.json.partial", "stages/tune/.done.json.partial"):
        (out / name).touch()
    (out / ".mine").touch()
    aside = out / "stages" / "tune.replaced-1" / "state"
    aside.mkdir(parents=True)
    sweep(out)
    assert everything(out) == sorted([*before, ".mine", "stages/tune.replaced-1", "stages/tune.replaced-1/state"])
    assert any("done already" in line for line in do(out))
