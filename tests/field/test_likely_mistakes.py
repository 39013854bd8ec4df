"""What newcomers type: words of other programs, prompts without quotation marks, sizes and words that the model never met."""

from __future__ import annotations

from pathlib import Path

import pytest

from ldm.__main__ import main
from ldm.config import synonyms
from ldm.config.messages import fields_of

ROOT = Path(__file__).parents[2]
QUICKSTART = str(ROOT / "configs" / "quickstart.yaml")


def fails(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(list(words)) == 2
    said = capsys.readouterr()
    assert not said.out and len(said.err.splitlines()) == 1
    return said.err


@pytest.mark.parametrize(
    ("option", "meant"),
    [
        ("--width", "--size WIDTHxHEIGHT"),
        ("--cfg", "--guidance"),
        ("--cfg-scale", "--guidance"),
        ("--negative_prompt", "--negative"),
        ("--denoising-strength", "--strength"),
        ("--num_inference_steps", "--steps"),
        ("--ckpt", "--model"),
    ],
)
def test_an_option_of_another_program_is_told_by_its_name_here(option: str, meant: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert f"{option}; here that is {meant} (`ldm sample --help`" in fails(capsys, "sample", "a green ring", option, "7")


def test_every_option_that_is_told_is_one(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["sample", "--help"]) == 0
    said = capsys.readouterr().out
    assert [meant for meant in synonyms.OPTIONS.values() if meant.startswith("--") and f"{meant.split()[0]} " not in said] == []
    # A verb without the option keeps its own list of what is possible.
    assert "here that is" not in fails(capsys, "info", "x.png", "--width", "7")


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("batch=4", "batch: unknown field; that is stages.NAME.batch"),
        ("batch_size=4", "batch_size: unknown field; that is stages.NAME.batch"),
        ("epochs=10", "epochs: unknown field; that is stages.NAME.images, which counts pictures seen"),
        ("stages.text.epochs=10", "stages.text.epochs: unknown field; that is images, which counts pictures seen"),
        ("learning_rate=1e-4", "learning_rate: unknown field; that is stages.NAME.optim.lr"),
        ("output_dir=x", "output_dir: unknown field; that is out"),
        ("device=cuda", "device: unknown field; there is no such field: a GPU is used where there is one"),
        ("--epochs", "--epochs: no such option; fields are words without dashes, such as stages.NAME.images=..., which counts"),
        ("--batch_size=4", "--batch_size: no such option; fields are words without dashes, such as stages.NAME.batch=4"),
    ],
)
def test_a_field_of_another_program_is_told_by_its_name_here(word: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert said in fails(capsys, "train", QUICKSTART, word)


def test_every_field_that_is_told_is_one() -> None:
    from ldm.runs.run import Run

    paths = [path for path, *_ in fields_of(Run)]
    assert [meant for meant in synonyms.FIELDS.values() if not synonyms.field_meant(meant, paths)] == []


def test_configurations_and_folders_are_told_apart(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    said = fails(capsys, "sample", "a green ring", "--model", QUICKSTART)
    assert "quickstart.yaml: a configuration, and no model; train it, and give its run folder, such as runs/quickstart" in said
    assert "a folder, and no run; name a YAML file, such as configs/quickstart.yaml" in fails(capsys, "train", str(tmp_path))
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text("base: nowhere.yaml\n")
    assert f"{run / 'nowhere.yaml'}: No such file or directory" in fails(capsys, "train", str(run))


def drawn(model: Path, out: Path, capsys: pytest.CaptureFixture[str], *words: str) -> list[str]:
    assert main(["sample", *words, "--model", str(model), "--steps", "1", "--out", str(out)]) == 0
    return [line for line in capsys.readouterr().err.splitlines() if not line.startswith(("1 picture", "2 picture", "3 picture"))]


def test_what_is_likely_a_mistake_is_told(kl_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = "\n".join(drawn(kl_model, tmp_path, capsys, "a", "red", "circle"))
    assert '3 prompts of a word each; one prompt of several words needs quotation marks: "a red circle"' in told
    assert "an empty prompt" in "\n".join(drawn(kl_model, tmp_path, capsys, ""))
    assert "wyxq: no caption that this model learned from had such a word" in "\n".join(drawn(kl_model, tmp_path, capsys, "a large wyxq"))
    assert "96x96 px is far from the 32x32 px that the model was trained at; draw near that size, and enlarge with --hires 3" in "\n".join(
        drawn(kl_model, tmp_path, capsys, "a large ring", "--size", "96x96")
    )
    assert not drawn(kl_model, tmp_path, capsys, "a large red circle", "--size", "64x32")


def test_few_pictures_from_nothing_are_told_by_the_plan_and_the_run() -> None:
    from ldm.config.schema import load
    from ldm.runs.launch_checks import by_heart
    from ldm.runs.run import Run

    run = load(Path(QUICKSTART), [], Run)
    assert not list(by_heart(run, 16000)) and not list(by_heart(run, 0))
    [said] = by_heart(run, 23)
    assert (
        "stages.diffusion-low goes 2,174 times through 23 pictures" in said and "configs/presets/lora-8gb.yaml data.path=DIR --hub" in said
    )
    tuned = load(ROOT / "configs" / "finetune-lora.yaml", [], Run)
    assert not list(by_heart(tuned, 20))


def test_a_run_ends_with_a_prompt_that_shows_what_was_learned() -> None:
    from ldm.config.schema import load
    from ldm.runs.run import Run

    word, lora = (load(ROOT / "configs" / f"finetune-{name}.yaml", [], Run) for name in ("textual-inversion", "lora"))
    assert word.models["diffusion"].example_of("a purple triangle") == "a picture of <thing>"
    assert word.models["diffusion"].example_of("a <thing>") == "a <thing>"
    assert lora.models["diffusion"].example_of("a cyan cross") == "a cyan cross"


def test_no_grid_is_written_over_another_file(kl_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        "sample",
        "a large ring",
        "--model",
        str(kl_model),
        "--steps",
        "1",
        "--out",
        str(tmp_path / "o"),
        "--grid",
        str(tmp_path / "g.png"),
    ]
    assert main(words) == 0
    before = (tmp_path / "g.png").read_bytes()
    capsys.readouterr()
    assert f"grid: {tmp_path / 'g.png'} is there already; choose another name" in fails(capsys, *words)
    assert (tmp_path / "g.png").read_bytes() == before and len(list((tmp_path / "o").glob("*.png"))) == 1
