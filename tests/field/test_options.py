"""No option is accepted and ignored: each changes something, or is refused or told. A new option needs an entry here."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from PIL import Image

from ldm.__main__ import VERBS, main
from ldm.cli.command import expanded

FUNCTIONS = {
    "sample": "ldm.cli.sample:sample",
    "grid": "ldm.cli.grid:grid",
    "animate": "ldm.cli.animate:animate",
    "demo": "ldm.demo.server:demo",
    "evaluate": "ldm.cli.evaluate:evaluate",
    "info": "ldm.cli.info:info",
    "data check": "ldm.cli.data:check",
    "data index": "ldm.cli.data:index",
    "data curate": "ldm.cli.data:curate",
    "data fetch": "ldm.cli.data:fetch",
    "data hash": "ldm.cli.data:hash_pictures",
    "data encode": "ldm.cli.encode:encode",
    "classifier": "ldm.cli.classifier:classifier",
    "ema": "ldm.cli.ema:ema",
    "report": "ldm.cli.report:_verb",
    "watch": "ldm.cli.watch:watch",
    "bench": "ldm.cli.bench:bench",
    "export": "ldm.cli.export:export",
    "doctor": "ldm.cli.doctor:doctor",
    "caption": "ldm.cli.caption:caption",
    "plan": "ldm.cli.plan:plan",
}

# Words that make another picture than without the last option: "before | option".
PICTURES = {
    "--seed": "| --seed 4",
    "--negative": "--guidance 3 | --negative green",
    "--size": "| --size 32x64",
    "--literal": "(red:1.9) | --literal",
    "--n": "| --n 2",
    "--seeds": "| --seeds 3",
    "--variations": "| --variations 1",
    "--variation-strength": "--variations 1 | --variation-strength 0.9",
    "--steps": "| --steps 3",
    "--guidance": "| --guidance 9",
    "--guidance-interval": "--steps 4 --guidance 9 | --guidance-interval 0.3,0.7",
    "--guidance-curve": "--guidance 9 | --guidance-curve linear",
    "--rescale": "--guidance 9 | --rescale 0.9",
    "--sampler": "| --sampler euler_a",
    "--spacing": "| --spacing leading",
    "--clip-skip": "| --clip-skip 2",
    "--eta": "--sampler ddim | --eta 1",
    "--precision": "| --precision bf16",
    "--init": "| --init INIT",
    "--strength": "--steps 4 --init INIT | --strength 0.3",
    "--outpaint": "--init INIT | --outpaint 8",
    "--invert": "--sampler ddim | --invert INIT",
    "--source": "--sampler ddim --invert INIT | --source ring",
    "--cross-replace": "--source ring | --cross-replace 0.1",
    "--self-replace": "--source ring | --self-replace 1",
    "--hires": "--size 64x64 | --hires 2",
    "--hires-strength": "--steps 4 --size 64x64 --hires 2 | --hires-strength 1",
    "--watermark": "--size 64x64 | --watermark me",
    "--save-steps": "| --save-steps",
    "--grid": "| --grid GRID",
    "--prompts": "| --prompts LIST",
    "--from": "| --from INIT",
}
# Options of sampling whose effect other tests show.
SAMPLING = {
    **dict.fromkeys(("--original-size", "--crop", "--target-size"), "tests/field/test_xl.py"),
    "--truncation": "tests/families/test_text_gan.py",
    **dict.fromkeys(("--temperature", "--top-k", "--top-p"), "tests/families/tokens/test_tokens.py"),
    **dict.fromkeys(("--link-steps", "--stop-after"), "tests/families/test_chain.py"),
    "--threshold": "tests/families/test_pixels.py",
    "--given": "tests/field/test_given.py",
    "--model": "tests/cli/test_sample.py",
    "--vae": "tests/field/test_vae.py",
    "--strict": "tests/field/test_recipes_of_others.py",
    "--best": "tests/cli/test_sample_editing.py",
    "--judge": "tests/cli/test_sample_editing.py",
    "--mask": "tests/cli/test_sample_editing.py",
    "--classifier": "tests/cli/test_classifier.py",
    "--classifier-scale": "tests/cli/test_classifier.py",
    "--lora": "tests/sampling/test_adapters.py",
    "--embedding": "tests/sampling/test_adapters.py",
    "--lora-dir": "tests/field/test_lora_tags.py",
    "--safety": "tests/cli/test_sample_editing.py",
    "--out": "tests/cli/test_sample.py",
    "--resume": "tests/cli/test_sampling_options.py",
    "--json": "tests/cli/test_sample.py",
    "--backend": "tests/families/latent_diffusion/test_openvino.py",
    "--attention": "tests/families/latent_diffusion/test_runtime.py",
    "--compile": "tests/families/latent_diffusion/test_runtime.py",
    "--low-memory": "tests/families/latent_diffusion/test_runtime.py",
    "--tile": "tests/families/latent_diffusion/test_runtime.py",
    **dict.fromkeys(PICTURES, "tests/field/test_options.py"),
}
# Those that `ldm evaluate` hands to the same calls.
DRAWN = {
    "--rescale", "--guidance-curve", "--clip-skip", "--threshold", "--precision", "--link-steps", "--stop-after", "--original-size",
    "--crop", "--target-size", "--temperature", "--top-k", "--top-p", "--truncation",
}  # fmt: skip
# Options of time and memory alone.
TIME = {"--threads", "--workers", "--device", "--batch"}
CURATE = "tests/data/curation/test_curate.py"
# Of the other verbs: options, and the file of the test that shows what they change.
OTHERS: dict[str, dict[str, str]] = {
    "grid": dict.fromkeys(("--x", "--y", "--z", "--out", "--pictures"), "tests/cli/test_grid.py"),
    "animate": {
        **dict.fromkeys(("--to", "--to-seed", "--frames", "--clip", "--cells", "--out", "--pictures"), "tests/cli/test_animate.py"),
        **dict.fromkeys(("--loop", "--rate"), "tests/field/test_options.py"),
    },
    "demo": {
        **dict.fromkeys(("--host", "--port", "--token", "--precision", "--max-size", "--low-memory"), "tests/demo/test_server.py"),
        **dict.fromkeys(("--lora", "--embedding"), "tests/sampling/test_adapters.py"),
        "--vae": "tests/field/test_vae.py",
        **dict.fromkeys(("--models", "--lora-dir", "--vae-dir", "--keep", "--gallery", "--no-gallery"), "tests/demo/test_api.py"),
    },
    "evaluate": dict.fromkeys(
        (
            "--on",
            "--tier",
            "--n",
            "--seed",
            "--guidance",
            "--steps",
            "--sampler",
            "--images",
            "--json",
            "--pictures",
            "--device",
            "--abilities",
            "--features",
            "--clip",
            "--split",
            "--plot",
            "--neighbours",
        ),
        "tests/cli/test_evaluate.py",
    )
    | {
        **dict.fromkeys(("--eta", "--spacing", "--guidance-interval"), "tests/cli/test_evaluate.py"),
        **{name: file for name, file in SAMPLING.items() if name in DRAWN},
        **dict.fromkeys(DRAWN - set(SAMPLING), "tests/field/test_options.py"),
        "--told": "tests/metrics/test_told.py",
        "--diversity": "tests/metrics/test_diversity.py",
        "--completion": "tests/cli/test_evaluate.py",
    },
    "info": dict.fromkeys(("--model", "--json"), "tests/cli/test_info.py"),
    "data check": {
        **dict.fromkeys(("--captions", "--html", "--json"), "tests/cli/test_data.py"),
        **dict.fromkeys(("--resolution", "--decode"), "tests/cli/test_data.py"),
        **{"--outside": "tests/field/test_data_leads_nowhere.py", "--model": "tests/field/test_foreign_data_sets.py"},
    },
    "data index": {
        **dict.fromkeys(("--out", "--verify", "--json", "--workers"), "tests/cli/test_data.py"),
        "--upload": "tests/data/test_stores.py",
    },
    "data curate": {
        **dict.fromkeys(("--min-side", "--max-aspect", "--min-aesthetic", "--max-watermark", "--max-unsafe", "--min-similarity"), CURATE),
        **dict.fromkeys(("--min-caption", "--max-caption", "--match", "--remove", "--val-share", "--seed", "--min-pixels"), CURATE),
        **dict.fromkeys(("--language", "--reject", "--unique", "--subset", "--out", "--json"), "tests/cli/test_data.py"),
        "--near": "tests/data/curation/test_hashes.py",
        "--memory-mb": "tests/data/test_tables.py",
        "--ray": "tests/data/curation/test_curate.py",
    },
    "data fetch": {
        **dict.fromkeys(("--out", "--shard", "--timeout", "--distributor", "--img2dataset", "--json"), "tests/data/curation/test_fetch.py"),
        **dict.fromkeys(("--size", "--processes", "--retries"), "tests/field/test_options.py"),
        **dict.fromkeys(("--seconds", "--max-mb", "--allow-private"), "tests/field/test_data_leads_nowhere.py"),
    },
    "data hash": {"--out": "tests/data/curation/test_hashes.py"},
    "data encode": dict.fromkeys(
        (
            "--model",
            "--out",
            "--resolution",
            "--flip",
            "--text",
            "--buckets",
            "--bucket-step",
            "--max-aspect",
            "--images",
            "--shard",
            "--part",
            "--json",
        ),
        "tests/cli/test_encode.py",
    )
    | {"--seed": "tests/field/test_options.py", "--codes": "tests/data/test_cache_codes.py", "--views": "tests/field/test_folder_views.py"},
    "classifier": dict.fromkeys(("--model", "--words", "--out", "--images", "--rate"), "tests/cli/test_classifier.py")
    | {"--seed": "tests/cli/test_classifier.py"},
    "caption": dict.fromkeys(
        ("--model", "--count", "--overwrite", "--dry-run", "--seed", "--prefix", "--suffix", "--temperature", "--top-k", "--top-p"),
        "tests/cli/test_caption.py",
    ),
    "ema": dict.fromkeys(("--stage", "--length", "--out", "--sweep", "--n"), "tests/training/test_post_hoc_ema.py"),
    "report": {},
    "watch": {"--once": "tests/cli/test_watch.py", "--every": "tests/field/test_options.py"},
    "bench": dict.fromkeys(("--against", "--json", "--list", "--rounds", "--threads", "--size", "--device"), "tests/cli/test_bench.py"),
    "export": dict.fromkeys(("--to", "--out", "--dtype", "--variant", "--max-shard", "--overwrite", "--json"), "tests/cli/test_export.py"),
    "doctor": dict.fromkeys(("--out", "--json"), "tests/cli/test_doctor.py"),
    "plan": dict.fromkeys(
        ("--processes", "--device", "--nodes", "--gpus", "--samples", "--tflops", "--peak", "--mfu", "--price", "--disk", "--json"),
        "tests/cli/test_plan.py",
    )
    | {"--extend": "tests/field/test_extend.py"},
}
# What changes nothing is refused, before any model is opened: the words, and what is said.
REFUSED = [
    ("sample x --judge scenes", "judge: got scenes, but there is nothing to choose from"),
    ("sample x --best 1 --judge own", "judge: got own, but there is nothing to choose from"),
    ("sample x --variation-strength 0.1", "variation_strength"),
    ("sample x --hires-strength 0.5", "hires_strength"),
    ("sample x --classifier-scale 2", "classifier_scale"),
    ("sample x --strength 0.5", "strength"),
    ("sample x --truncation 0.5", "truncation: got 0.5: this model of kind latent_diffusion is no GAN"),
    ("sample x --temperature 0.5", "temperature: got 0.5: this model of kind latent_diffusion draws no codes"),
    ("sample x --top-k 5", "top_k: got 5: this model of kind latent_diffusion draws no codes"),
    ("sample x --mask INIT", "mask"),
    ("sample x --cross-replace 0.5", "cross_replace: got 0.5, but nothing to take attention from"),
    ("sample x --source y --cross-replace 0 --self-replace 0", "source: no step takes anything of it"),
    ("sample x --outpaint 8", "outpaint"),
    ("sample x --invert INIT --n 2", "invert: starts from the noise that its picture comes from"),
    ("sample x --invert INIT --variations 2", "invert: starts from the noise"),
    ("sample x --seeds 1,2,1", "seeds: 1 stands there 2 times"),
    ("sample x --variations 2 --variation-strength 0", "variation_strength: 0 draws the same picture again"),
    ("sample --prompts LIST --seeds 1,2", "seeds: the prompt 'a red circle' has a seed of its own"),
    ("grid x --x strength=0.1,0.2", "strength: changes nothing"),
    ("grid x --x hires_strength=0.1,0.2", "hires_strength: changes nothing"),
    ("grid x --x cross_replace=0.1,0.2", "cross_replace: changes nothing"),
    ("grid x --x seed=1,2 --invert INIT", "seed: changes nothing with --invert"),
    ("animate x --clip INIT --source y --cells 1 --seed 2", "seed: changes nothing with --source"),
    ("animate x --to y --cells 1", "cells: changes nothing without --clip"),
    ("animate x --to y --strength 0.5", "strength: changes nothing without --clip"),
    ("animate x --clip INIT --frames 4", "clip: not together with --frames or --loop"),
    ("animate x --clip INIT --loop", "clip: not together with --frames or --loop"),
    ("evaluate MODEL --on DATA --tier T0", "tier: is of the prompts of scenes, and changes nothing with --on"),
    ("evaluate MODEL --on DATA --n 200", "n: is of"),
    ("evaluate MODEL --on DATA --abilities 2", "abilities: is of"),
    ("ema OUT --length 0.1 --sweep 0.1,0.2", "length: give either --length 0.1"),
    ("ema OUT --sweep 0.1 --out OUT", "out: changes nothing without --length"),
    ("ema OUT --length 0.1 --n 4", "n: changes nothing without --sweep"),
    ("data check SHARDS --captions kohya", "--captions: is of a folder of images"),
    ("data encode DATA --model MODEL --out OUT --bucket-step 8", "bucket_step: changes nothing without --buckets"),
    ("data encode DATA --model MODEL --out OUT --max-aspect 3", "max_aspect: changes nothing without --buckets"),
    ("data curate LIST --out OUT --seed 3", "seed: changes nothing without --val-share"),
    ("watch OUT --once --every 3", "every: changes nothing with --once"),
    ("plan configs/quickstart.yaml --mfu 0.5", "mfu: is a share of --peak"),
    ("train configs/quickstart.yaml --tflops 3", "--tflops: only together with --plan"),
    ("export MODEL --to single-file --out OUT.safetensors --variant fp16", "--variant"),
]
# What changes nothing in a picture is told.
TOLD = [
    ("--guidance 0", "guidance: 0 leaves the prompt out; 1 is no guidance"),
    ("--guidance 0.5", "guidance: 0.5 weakens the prompt"),
    ("--sampler euler --eta 0.5", "eta: euler does not read it; ddim does"),
    ("--guidance 1 --negative green", "negative: is not read without guidance"),
    ("--guidance 1 --rescale 0.5", "rescale: is not read without guidance"),
    ("--guidance 1 --guidance-interval 0.1,0.5", "guidance_interval: is not read"),
    ("--guidance 1 --guidance-curve linear", "guidance_curve: is not read"),
    ("--sampler ddim --invert INIT --seed 3", "seed: --invert starts from the noise"),
    ("--embedding WORD", "embedding: EasyNeg is in no prompt"),
    ("--embedding PART", "embedding: e is in no prompt"),
    ("--init INIT --strength 0.3", "strength: 0.3 of 2 steps is none"),
    ("--hires 2 --size 64x64 --hires-strength 0.1", "hires_strength: 0.1 of 2 steps is none"),
    ("--guidance 3 --guidance-interval 0.3,0.4", "guidance_interval: none of the 2 steps lies in 0.3 to 0.4"),
]


def options_of(verb: str) -> Iterator[str]:
    """The names of a verb's options."""
    module, _, name = FUNCTIONS[verb].partition(":")
    for field, parameter in inspect.signature(expanded(getattr(importlib.import_module(module), name))).parameters.items():
        info = next(one for one in parameter.annotation.__metadata__ if isinstance(one, typer.models.ParameterInfo))
        if not isinstance(info, typer.models.ArgumentInfo):
            names = [word for word in (info.default, *(info.param_decls or ())) if str(word).startswith("--")]
            yield names[0] if names else f"--{field.replace('_', '-')}"


def entries(verb: str) -> dict[str, str]:
    """Where each option of a verb is shown to change something."""
    more = SAMPLING if verb in ("sample", "grid", "animate") else {}
    return {**more, **OTHERS.get(verb, {})}


def test_every_option_of_every_verb_has_an_entry() -> None:
    assert {verb.split()[0] for verb in FUNCTIONS} == VERBS.keys() - {"train"}
    root = Path(__file__).parents[2]
    for verb in FUNCTIONS:
        known = entries(verb)
        for option in set(options_of(verb)) - TIME:
            assert option in known, f"ldm {verb} {option}: say in this table which test shows what it changes, or that it is refused"
            text = (root / known[option]).read_text()
            names = option, option[2:].replace("-", "_")
            assert any(name in text for name in names), f"ldm {verb} {option}: {known[option]} does not mention it"


@pytest.fixture(scope="module")
def files(kl_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What the words in capitals stand for."""
    import torch
    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp("files")
    for name in ("data", "shards"):
        (folder / name).mkdir()
    Image.new("RGB", (32, 32), "red").save(folder / "data" / "a.png")
    (folder / "shards" / "a.tar").write_bytes(bytes(10240))
    (folder / "list.txt").write_text("a red circle --d 3\n")
    assert (
        main(["sample", "a green ring", "--model", str(kl_model), "--out", str(folder / "init"), "--steps", "1", "--sampler", "ddim"]) == 0
    )
    save_file({"EasyNeg": torch.ones(2, 32)}, folder / "EasyNeg.safetensors")
    save_file({"e": torch.ones(2, 32)}, folder / "e.safetensors")  # stands alone nowhere, but within many words
    names = {"INIT": "init/00000_seed0.png", "DATA": "data", "SHARDS": "shards", "LIST": "list.txt", "WORD": "EasyNeg.safetensors"}
    names |= {"PART": "e.safetensors"}
    return {"MODEL": str(kl_model), "OUT": str(folder / "out")} | {word: str(folder / name) for word, name in names.items()}


def spelt(words: str, files: dict[str, str]) -> list[str]:
    return [files.get(word, word) for word in words.split()]


def drawn(files: dict[str, str], out: Path, words: list[str], *prompts: str) -> dict[str, bytes]:
    """The pictures' pixels by their names, the grid's too."""
    assert main(["sample", *prompts, "--model", files["MODEL"], "--steps", "2", *words, "--out", str(out)]) == 0
    return {path.name: np.asarray(Image.open(path)).tobytes() for path in [*out.glob("*.png"), *out.parent.glob("grid.png")]}


@pytest.mark.slow
@pytest.mark.parametrize("option", PICTURES)
def test_an_option_of_sampling_changes_what_is_drawn(files: dict[str, str], tmp_path: Path, option: str) -> None:
    before, _, after = (spelt(part, files | {"GRID": str(tmp_path / "grid.png")}) for part in PICTURES[option].partition("|"))
    assert option in after
    prompts = ["a (red:1.9) circle" if option == "--literal" else "a red circle"]
    others = [] if option in ("--prompts", "--from") else prompts
    without = drawn(files, tmp_path / "a", before, *prompts)
    assert drawn(files, tmp_path / "b", [*before, *after], *others) != without


@pytest.mark.parametrize(("words", "said"), REFUSED)
def test_an_option_that_changes_nothing_is_refused(
    files: dict[str, str], words: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = ["--model", files["MODEL"]] if words.split()[0] in ("sample", "grid", "animate") else []
    assert main([*spelt(words, files), *model]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(("words", "said"), TOLD)
def test_a_setting_that_changes_nothing_is_told_once(
    files: dict[str, str], words: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    drawn(files, tmp_path, spelt(words, files), "a red circle")
    assert capsys.readouterr().err.count(f"note: {said}") == 1


def test_a_setting_that_an_axis_replaces_is_told(files: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = spelt("grid x --x guidance=1,2 --y seed=1,2 --seed 3 --guidance 4 --steps 1 --model MODEL", files)
    assert main([*words, "--out", str(tmp_path / "grid.png")]) == 0
    said = capsys.readouterr().err
    assert [said.count(f"{name}: an axis goes through its values") for name in ("seed", "guidance", "steps")] == [1, 1, 0]


def test_nothing_is_told_of_what_counts(files: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    drawn(files, tmp_path, spelt("--guidance 3 --negative green --sampler ddim --eta 1 --rescale 0.3", files), "a red circle")
    assert "note" not in capsys.readouterr().err


def test_a_word_is_found_in_any_case(files: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    same = [
        drawn(files, tmp_path / f"{i}", ["--embedding", files["WORD"]], f"a {word} circle") for i, word in enumerate(("EasyNeg", "easyneg"))
    ]
    assert "note" not in capsys.readouterr().err
    assert same[0] == same[1] != drawn(files, tmp_path / "plain", [], "a easyneg circle")
    [found] = drawn(
        files, tmp_path / "negative", ["--embedding", files["WORD"], "--negative", "EASYNEG", "--guidance", "4"], "a ring"
    ).values()
    assert [found] != [*drawn(files, tmp_path / "none", ["--negative", "EASYNEG", "--guidance", "4"], "a ring").values()]


def test_words_within_words_and_words_that_differ_in_case_alone(kl_model: Path) -> None:
    import torch

    from ldm.text.encoder import TextEncoder
    from ldm.text.textual_inversion import add_word

    encoder = TextEncoder.load(kl_model)
    for word in ("Neg", "EasyNeg", "Foo", "foo"):
        add_word(encoder, word, torch.ones(1, encoder.width))
    vocabulary = encoder.tokenizer.get_vocab()
    for text, word in (("easyneg", "EasyNeg"), ("NEG", "Neg"), ("Foo", "Foo"), ("foo", "foo")):
        assert encoder.words(text) == [vocabulary[word]]
    assert encoder.words("FOO")[0] in (vocabulary["Foo"], vocabulary["foo"])
    assert encoder.says("a (easyneg:1.2) ring", "EasyNeg") and not encoder.says("a ring", "EasyNeg")


@pytest.mark.slow
@pytest.mark.parametrize("option", ["--loop", "--rate 30"])
def test_options_of_films(files: dict[str, str], tmp_path: Path, option: str) -> None:
    films: list[Any] = []
    for name, words in (("a", []), ("b", option.split())):
        out = tmp_path / f"{name}.png"
        said = ["animate", "a ring", "--to", "a circle", "--frames", "3", "--steps", "1", "--model", files["MODEL"], "--out", str(out)]
        assert main([*said, *words]) == 0
        films.append(out.read_bytes())
    assert films[0] != films[1]


def test_watch_looks_every_so_often(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from ldm.cli import watch

    waits: list[float] = []

    class Story:
        finished = False

    def look(seconds: float) -> None:
        waits.append(seconds)
        Story.finished = len(waits) == 2

    monkeypatch.setattr(watch.StoryReader, "read", lambda reader: Story)
    monkeypatch.setattr(watch, "report", lambda run, story: tmp_path)
    monkeypatch.setattr(watch, "lines", lambda *rest: ())
    monkeypatch.setattr(watch.time, "sleep", look)
    assert watch.main([str(tmp_path), "--every", "3"]) == 0 and waits == [3, 3]


def test_every_option_of_fetching_reaches_the_program(tmp_path: Path) -> None:
    from dataclasses import fields, replace

    from ldm.data.curation.fetch import Columns, DownloadOptions, words_of

    def words(options: DownloadOptions) -> list[str]:
        return words_of(tmp_path, tmp_path, Columns(url="u", caption=None, kept=(), hash=None), options)

    usual = DownloadOptions()
    for field in fields(usual):
        if field.name in ("seconds", "max_mb", "allow_private"):
            continue  # kept here, not by the program
        value = getattr(usual, field.name)
        other = "ray" if isinstance(value, str) else value + 1
        assert words(replace(usual, **{field.name: other})) != words(usual), field.name


def test_the_seed_of_encoding_moves_the_crops(files: dict[str, str], tmp_path: Path) -> None:
    for i in range(2):
        Image.effect_noise((96, 48), 90).convert("RGB").save(tmp_path / f"{i}.png")
        (tmp_path / f"{i}.txt").write_text("noise")
    found = []
    for seed in ("0", "1", "0"):
        out = tmp_path.with_name(f"{tmp_path.name}-{len(found)}")
        said = ["data", "encode", str(tmp_path), "--model", files["MODEL"], "--out", str(out), "--resolution", "32", "--seed", seed]
        assert main(said) == 0
        found.append([path.read_bytes() for path in sorted(out.rglob("*.safetensors"))])
    assert found[0] == found[2] != found[1] and found[0]
