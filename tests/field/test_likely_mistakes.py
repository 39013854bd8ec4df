"""What newcomers type: words of other programs, prompts without quotation marks, sizes and words that the model never met."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from ldm.__main__ import main
from ldm.cli.command import FETCHES
from ldm.cli.models import model_for
from ldm.config import files, synonyms
from ldm.config.manual import fields_of
from ldm.sampling import doubts

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


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--steps", "0"], "--steps: got 0; it should be greater than or equal to 1 ("),
        (["--seed=-1"], "--seed: got -1; it should be greater than or equal to 0; for another picture"),
        (["--guidance", "x"], "--guidance: got x; it should be a valid number ("),
        (["--sampler", "DPM++ 2M Karras"], "sampler: got 'DPM++ 2M Karras'; here that is --sampler dpmpp_2m --spacing karras\n"),
        (["--sampler", "Euler a"], "sampler: got 'Euler a'; here that is --sampler euler_a\n"),
        (["--sampler", "eulr"], "sampler: got 'eulr'; choose one of ddpm, ddim"),
        (["--spacing", "SGM Uniform"], "spacing: got 'SGM Uniform'; here that is --spacing trailing\n"),
    ],
)
def test_a_value_that_cannot_be_is_told_with_what_can(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert said in fails(capsys, "sample", "a green ring", *words)


def test_an_option_that_is_missing_says_what_it_may_be(capsys: pytest.CaptureFixture[str]) -> None:
    said = fails(capsys, "export", "runs/x", "--out", "y")
    assert "Missing option '--to': diffusers onnx openvino published: a folder; single-file: .safetensors" in said


def test_every_option_that_is_told_is_one(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["sample", "--help"]) == main(["demo", "--help"]) == 0
    said = capsys.readouterr().out
    assert [meant for meant in synonyms.OPTIONS.values() if meant.startswith("--") and f"{meant.split()[0]} " not in said] == []
    # A verb without the option keeps its own list of what is possible.
    assert "here that is" not in fails(capsys, "info", "x.png", "--width", "7")


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("data={kind:folder}", "data: kind:folder is one name to YAML; put a blank after the colon, as in {kind: folder}"),
        ("models.diffusion.process={target:eps}", "models.diffusion.process: target:eps is one name to YAML; put a blank after the colon"),
        ("batch=4", "batch: unknown field; that is stages.NAME.batch"),
        ("batch_size=4", "batch_size: unknown field; that is stages.NAME.batch"),
        ("epochs=10", "epochs: unknown field; that is stages.NAME.images, which counts pictures seen"),
        ("stages.text.epochs=10", "stages.text.epochs: unknown field; that is images, which counts pictures seen"),
        ("learning_rate=1e-4", "learning_rate: unknown field; that is stages.NAME.optim.lr"),
        ("output_dir=x", "output_dir: unknown field; that is out"),
        ("device=cuda", "device: unknown field; nothing needs to be said: a GPU is used where there is one"),
        ("--epochs", "--epochs: no such option; fields are words without dashes, such as stages.NAME.images=..., which counts"),
        ("--batch_size=4", "--batch_size: no such option; fields are words without dashes, such as stages.NAME.batch=4"),
        ("--output_dir=x", "--output_dir: no such option; fields are words without dashes, such as out=x"),
        ("--seed=1", "--seed: no such option; fields are words without dashes, such as seed=1"),
        ("--report_to=wandb", "--report_to: no such option; fields are words without dashes, such as tracker=wandb"),
        ("--resume", "--resume: no such option; nothing needs to be said: the same command goes on from the last checkpoint"),
        ("--resume_from_checkpoint=latest", "nothing needs to be said: the same command goes on from the last checkpoint"),
        ("--gpus=2", "--gpus: no such option; nothing needs to be said: a GPU is used where there is one"),
        ("resume=true", "resume: unknown field; nothing needs to be said: the same command goes on"),
        ("data.path=pictures", "data.path: unknown field of kind scenes; "),
        ("data.path=pictures", "; folder or shards or datasets or unpaired has it"),
        ("data=pictures", "data: got 'pictures'; it should be a mapping of fields, such as \"data={kind: folder, path: pictures}\""),
        ("models.diffusion.adapt={kind: lora, lora_alpha: 4}", "adapt.lora_alpha: unknown field; that is alpha"),
        ("models.diffusion.adapt={kind: lora, use_dora: true}", "adapt.use_dora: unknown field; that is method: lora, dora, loha or lokr"),
        ("tracker=wanb", "tracker: got 'wanb'; did you mean wandb? (allowed are wandb, tensorboard)"),
        ("prior=1", "prior: unknown field; did you mean prior_preservation?"),
    ],
)
def test_a_field_of_another_program_is_told_by_its_name_here(word: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert said in fails(capsys, "train", QUICKSTART, word)


def test_every_field_that_is_told_is_one() -> None:
    from ldm.runs.run import Run

    paths = [path for path, *_ in fields_of(Run)]
    assert [meant for meant in synonyms.FIELDS.values() if not synonyms.field_meant(meant, paths)] == []


def test_arguments_that_the_page_of_fine_tuning_names_are_told_as_it_tells_them(capsys: pytest.CaptureFixture[str]) -> None:
    from ldm.runs.run import Run

    page = (ROOT / "docs" / "finetune.md").read_text(encoding="utf-8").split("## The arguments that you know")[1].split("\n## ")[0]
    rows = [line.strip("| ").split(" | ") for line in page.splitlines() if line.startswith("| `") or line.startswith("| a ")]
    paths = {path for path, *_ in fields_of(Run)}
    assert len(rows) > 25
    for *others, here in rows:
        told = [
            word.replace("stages.lora", "stages.NAME").replace("models.diffusion", "models.NAME")
            for word in re.findall("`([^`=:]+)`", here)
        ]
        fields = [word for word in told if word not in ("encode", "latents", "batch", "10_sks dog")]
        assert [word for word in fields if word not in paths] == []
        for name in re.findall("`--([a-z_]+)`", " ".join(others)):
            meant = synonyms.FIELDS.get(name, "")
            field = synonyms.place_of(name, paths) if meant or name in paths else ""
            assert field in fields or (not fields and name in synonyms.NEEDLESS) or f".{name}" in str(fields), (name, meant, field, fields)
    assert "unet_lr: unknown field; that is stages.NAME.optim.lr" in fails(capsys, "train", QUICKSTART, "unet_lr=1e-4")
    assert "such as stages.NAME.optim.kind=AdamW8bit" in fails(capsys, "train", QUICKSTART, "--optimizer_type=AdamW8bit")


def test_a_word_of_data_that_is_nearly_one_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert fails(capsys, "data", "chek", "x").endswith("chek: no such word; did you mean check?\n")
    assert "there are check, index" in fails(capsys, "data", "photographs", "x")


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


def test_a_word_that_the_shell_has_split_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    said = fails(capsys, "train", QUICKSTART, "data={kind:", "folder,", "path:", "pictures}")
    assert 'data={kind:: put the whole word into quotation marks, as the shell splits it at spaces: "data={kind: ..."' in said


def test_a_path_that_leads_nowhere_gets_the_nearest(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("runs/quickstart/model", "runs/mine/lora"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "runs/quickstart/model/model_index.json").write_text("{}")
    (tmp_path / "runs/mine/lora/kohya.safetensors").touch()
    (tmp_path / "words.txt").write_text("a green ring")
    for name, near in {
        "runs/quickstrat": "runs/quickstart",
        "runs/quikstart/model": "runs/quickstart/model",
        str(tmp_path / "runs/quickstrat"): str(tmp_path / "runs/quickstart"),
    }.items():
        assert f"{name}: no such folder or file; " in (said := fails(capsys, "sample", "a green ring", "--model", name))
        assert said.endswith(f"; did you mean {near}?\n")
    assert model_for("quickstart") == "runs/quickstart"  # as the page says it
    assert fails(capsys, "sample", "--prompts", "word.txt").endswith("word.txt: No such file or directory; did you mean words.txt?\n")
    assert "did you mean" not in fails(capsys, "sample", "a green ring", "--model", "/nowhere/at/all")
    assert files.meant("lora: runs/mine/lora/koya.safetensors: no such file; give it") == "; did you mean runs/mine/lora/kohya.safetensors?"
    assert files.meant("data.path: run does not exist; correct it") == "; did you mean runs?"
    assert files.meant("a.yaml: No such file or directory; did you mean b.yaml?") == files.meant("seed: got x") == ""


def test_the_hub_stands_in_the_help_of_what_takes_it_and_known_names_in_that_of_sample(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    for verb in FETCHES - {"demo"}:
        assert main([*verb.split(), "--help"]) == 0
        assert "--hub" in capsys.readouterr().out, verb
    assert "o such option: --hub" in fails(capsys, "report", "--hub", "runs/x")
    for verb, known in {
        "sample": [
            "Denoising strength",
            "Hires fix",
            "Hires fix",
            "DPM++ 2M Karras is --sampler dpmpp_2m --spacing karras",
            "(CFG scale)",
            "Negative prompt",
        ],
        "grid": ["Denoising strength", "Hires fix", "(CFG scale)", "Clip skip"],
        "animate": ["Denoising strength", "(CFG scale)", "dpmpp_2m_sde (DPM++ 2M SDE)"],
    }.items():
        assert main([verb, "--help"]) == 0
        said = capsys.readouterr().out
        assert [name for name in known if name not in said] == []
        assert "<int range>" not in said and "[x>=" not in said


def drawn(model: Path, out: Path, capsys: pytest.CaptureFixture[str], *words: str) -> list[str]:
    assert main(["sample", *words, "--model", str(model), "--steps", "1", "--out", str(out)]) == 0
    return [line for line in capsys.readouterr().err.splitlines() if not line.startswith(("1 picture", "2 picture", "3 picture"))]


def test_what_is_likely_a_mistake_is_told(kl_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = "\n".join(drawn(kl_model, tmp_path, capsys, "a", "red", "circle"))
    assert '3 prompts of a word each; one prompt of several words needs quotation marks: "a red circle"' in told
    assert "an empty prompt" in "\n".join(drawn(kl_model, tmp_path, capsys, ""))
    assert "wyxq: no text that the text encoder learned from had such a word" in "\n".join(
        drawn(kl_model, tmp_path, capsys, "a large wyxq")
    )
    assert "circl: the text encoder has no such word and reads it in pieces; did you mean circle?" in "\n".join(
        drawn(kl_model, tmp_path, capsys, "a large circl")
    )
    assert "96x96 px is far from the 32x32 px that the model was trained at; draw near that size, and enlarge with --hires 3" in "\n".join(
        drawn(kl_model, tmp_path, capsys, "a large ring", "--size", "96x96")
    )
    assert not drawn(kl_model, tmp_path, capsys, "a large red circle", "--size", "64x32")
    assert "BREAK: " not in "\n".join(drawn(kl_model, tmp_path, capsys, "a large ring BREAK a circle"))


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


def test_blanks_around_the_sign_of_a_field_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["data.path", "=", "pictures"], ["data.path", "=pictures"]):
        said = fails(capsys, "train", "configs/folder.yaml", *words)
        assert said.count("\n") == 1 and said.endswith("without blanks: data.path=pictures\n")


def test_a_tab_and_a_base_elsewhere_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "tab.yaml").write_text("data:\n\tkind: folder\n")
    (tmp_path / "mine.yaml").write_text("base: quickstart.yaml\nseed: 1\n")
    assert "tab.yaml, line 2: begins with a tab; YAML is indented with blanks" in fails(capsys, "train", str(tmp_path / "tab.yaml"))
    said = fails(capsys, "train", str(tmp_path / "mine.yaml"))
    assert "mine.yaml: base: " in said and re.search(r"did you mean \S+/configs/quickstart\.yaml\?\n$", said) and "tab.yaml" not in said


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("resume", "that is ldm train, with the words of before: it goes on from the last checkpoint"),
        ("lora", "that is ldm train"),
        ("txt2img|a ring", "that is ldm sample"),
        ("webui", "that is ldm demo"),
        ("check|pictures", "that is ldm data check"),
        (
            "train|resume|runs/quickstart",
            "got resume runs/quickstart; nothing needs to be said: the same command goes on from the last checkpoint",
        ),
        ("train|a.yaml|b.yaml", "one CONFIG file is needed, got a.yaml b.yaml; fields are words with =, such as seed=1"),
        ("sample|a ring|-n|4", "No such option: -n; here that is --n"),
        ("sample|a ring|-o|x", "No such option: -o; here that is --out"),
        ("demo|--listen", "No such option: --listen; here that is --host 0.0.0.0 --token"),
        (
            "sample|--prompts|a pink ring",
            "a pink ring: No such file or directory; --prompts names a file, a prompt itself stands without an option",
        ),
        ("sample|a ring|--init|.", "init: .: a folder; give one picture"),
        (
            "sample|a ring|--seed|-1",
            "--seed: got -1; it should be greater than or equal to 0; for another picture each time: --seed $RANDOM",
        ),
        ("watch|nowhere", "nowhere: no such folder; a run folder is needed"),
        ("report|tiny", "tiny: no such folder; a run folder is needed, such as runs/quickstart; did you mean runs/tiny?"),
        ("data|pictures", "pictures: no such word; did you mean check pictures?"),
        ("info|pictures", "pictures: a folder of pictures, and no model; name the pictures, such as pictures/*.png"),
    ],
)
def test_words_that_beginners_try(
    words: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.png").touch()
    (tmp_path / "runs" / "tiny").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert said in fails(capsys, *words.split("|"))


def test_a_list_in_brackets_and_a_file_as_a_prompt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lora = str(ROOT / "configs" / "finetune-lora.yaml")
    assert "it should be a list, such as [to_q]" in fails(capsys, "train", lora, "models.diffusion.adapt.targets=to_q")
    (tmp_path / "prompts.txt").write_text("a ring")
    monkeypatch.chdir(tmp_path)
    assert list(doubts.files_named(["a ring", "prompts.txt", "other.txt"])) == [
        "prompts.txt is a file here, and its name is drawn; --prompts prompts.txt reads the prompts in it"
    ]
