"""The verb that draws, end to end on a tiny model with random weights."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from finished_model import CAPTIONS, SIDE
from PIL import Image

import ldm
from ldm.__main__ import main
from ldm.families.draws import Wanted
from ldm.sampling.recipe import read_recipe


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


def draw(out: Path, *words: str) -> list[np.ndarray]:
    """The pictures of a successful call, in the order of their numbers."""
    assert main(["sample", *words, "--out", str(out)]) == 0
    return [pixels(path) for path in sorted(out.glob("0*.png"))]


@pytest.fixture(scope="module")
def model(kl_model: Path) -> list[str]:
    return ["--model", str(kl_model)]


def test_files_are_in_the_order_of_the_prompts(model: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = draw(tmp_path, *model, "a red circle", "a blue ring", "--n", "2", "--seed", "5", "--json")
    names = ["00000_seed5.png", "00001_seed6.png", "00002_seed5.png", "00003_seed6.png"]
    assert sorted(p.name for p in tmp_path.iterdir()) == names
    said = capsys.readouterr()
    told = [json.loads(line) for line in said.out.splitlines()]
    assert [Path(t["file"]).name for t in told] == names
    assert [(t["prompt"], t["seed"]) for t in told] == [("a red circle", 5), ("a red circle", 6), ("a blue ring", 5), ("a blue ring", 6)]
    assert "4 pictures of" in said.err and said.err.endswith(f"{tmp_path}/00000_seed5.png to 00003_seed6.png\n")
    assert all(image.shape == (SIDE, SIDE, 3) for image in found) and len({image.tobytes() for image in found}) == 4


def test_a_picture_does_not_depend_on_batch_or_neighbours(model: list[str], kl_model: Path, tmp_path: Path) -> None:
    prompts = list(CAPTIONS[:5])
    alone = {p: draw(tmp_path / f"alone{i}", *model, p, "--seed", "3")[0] for i, p in enumerate(prompts)}
    for batch in ("1", "3", "100"):
        together = draw(tmp_path / f"batch{batch}", *model, *prompts[::-1], "--seed", "3", "--batch", batch)
        assert all(np.array_equal(alone[p], image) for p, image in zip(prompts[::-1], together, strict=True))
    several = draw(tmp_path / "n", *model, prompts[0], prompts[1], "--n", "3", "--seed", "1")
    assert np.array_equal(several[2], alone[prompts[0]]) and np.array_equal(several[5], alone[prompts[1]])
    family = ldm.load(kl_model)
    called = family.sample(prompts[:3], [3, 3, 3]).numpy()
    assert all(np.array_equal(alone[p], image) for p, image in zip(prompts, called, strict=False))


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "euler_a", "heun", "dpmpp_2m_sde", "unipc", "plms"])
def test_no_sampler_looks_at_neighbours(model: list[str], tmp_path: Path, sampler: str) -> None:
    words = [*model, "--sampler", sampler, "--steps", "3", "--eta", "1"]
    alone = draw(tmp_path / "alone", *words, CAPTIONS[1], "--seed", "4")[0]
    together = draw(tmp_path / "together", *words, CAPTIONS[0], CAPTIONS[1], CAPTIONS[2], "--n", "2", "--seed", "3")
    assert np.array_equal(together[3], alone)


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_a_folder_that_diffusers_wrote_draws_the_same_here(kl_model: Path, tmp_path: Path, variant: str | None) -> None:
    from diffusers import AutoencoderKL, DDIMScheduler, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    torch.manual_seed(0)
    tokenizer = CLIPTokenizer.from_pretrained(kl_model / "tokenizer")
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
        bos_token_id=0,
        eos_token_id=2,
    )
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        layers_per_block=1,
        norm_num_groups=8,
        cross_attention_dim=32,
        attention_head_dim=2,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
    )
    scheduler = PNDMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", skip_prk_steps=True, steps_offset=1)
    theirs = StableDiffusionPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(text),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
    )
    theirs.save_pretrained(tmp_path / "theirs", variant=variant)
    theirs.set_progress_bar_config(disable=True)
    theirs.scheduler = DDIMScheduler.from_config(scheduler.config, timestep_spacing="trailing", clip_sample=False)
    latents, prompts = torch.randn(2, 4, 8, 8), list(CAPTIONS[:2])
    drawn = theirs(prompts, latents=latents, num_inference_steps=8, guidance_scale=4.0, output_type="np").images
    family = ldm.load(tmp_path / "theirs")
    ours = family.sample(prompts, [0, 0], Wanted(steps=8, guidance=4.0, sampler="ddim"), latents=latents).numpy()
    assert family.defaults["size"] == (32, 32) and ours.std() > 1
    assert np.abs((drawn * 255).round() - ours).max() <= 1


def test_files_are_never_replaced(model: list[str], tmp_path: Path) -> None:
    first = draw(tmp_path, *model, "a red circle")[0]
    (tmp_path / "00007_seed1.png").write_bytes(b"mine")
    (tmp_path / "notes.png").write_bytes(b"mine")
    assert main(["sample", *model, "a red circle", "--out", str(tmp_path)]) == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["00000_seed0.png", "00007_seed1.png", "00008_seed0.png", "notes.png"]
    assert (tmp_path / "00007_seed1.png").read_bytes() == b"mine" and np.array_equal(first, pixels(tmp_path / "00008_seed0.png"))


def test_a_number_taken_meanwhile_is_passed_over(tmp_path: Path) -> None:
    from ldm.sampling.picture_files import save

    (tmp_path / "00000_seed1.png").touch()
    (tmp_path / "00004_seed9.png").touch()

    def write(path: Path) -> None:
        path.open("xb").close()

    assert save(tmp_path, 0, 1, write) == (6, tmp_path / "00005_seed1.png")


def test_every_option_is_in_the_recipe_and_changes_the_picture(model: list[str], tmp_path: Path) -> None:
    base = [*model, "a small red circle", "--steps", "4", "--sampler", "ddim"]
    plain = draw(tmp_path / "plain", *base)[0]
    for name, value in {
        "steps": 5,
        "guidance": 9.0,
        "rescale": 0.7,
        "sampler": "euler",
        "spacing": "leading",
        "eta": 1.0,
        "negative": "a ring",
        "seed": 8,
        "precision": "bf16",
    }.items():
        words = [word for word in base if not (name == "sampler" and word in ("--sampler", "ddim"))]
        changed = draw(tmp_path / name, *words, f"--{name}", str(value))[0]
        assert not np.array_equal(changed, plain), name
        recipe = read_recipe(next((tmp_path / name).glob("*.png")))
        assert getattr(recipe, name) == value
    wide = draw(tmp_path / "wide", *base, "--size", "48x32")[0]
    assert wide.shape == (32, 48, 3)


def test_a_picture_is_drawn_again_from_its_recipe(model: list[str], tmp_path: Path) -> None:
    words = ["a small red circle", "--steps", "3", "--guidance", "2.5", "--rescale", "0.3", "--sampler", "ddim", "--spacing", "leading"]
    first = draw(tmp_path / "a", *model, *words, "--eta", "0.5", "--negative", "a ring", "--seed", "6", "--size", "40x32")[0]
    picture = tmp_path / "a" / "00000_seed6.png"
    again = draw(tmp_path / "b", *model, "--from", str(picture))[0]
    assert np.array_equal(first, again)
    assert read_recipe(tmp_path / "b" / "00000_seed6.png") == read_recipe(picture)
    other = draw(tmp_path / "c", *model, "--from", str(picture), "--seed", "7", "a large blue ring")[0]
    recipe: Any = read_recipe(tmp_path / "c" / "00000_seed7.png")
    assert recipe.prompt == "a large blue ring" and recipe.guidance == 2.5 and not np.array_equal(first, other)
    draw(tmp_path / "d", *model, "--from", str(picture), "--sampler", "heun")
    recipe = read_recipe(tmp_path / "d" / "00000_seed6.png")
    assert (recipe.sampler, recipe.spacing) == ("heun", "karras")  # the sampler's own spacing, not the old one's


@pytest.fixture
def init_image(tmp_path: Path) -> tuple[Path, Path]:
    """A picture and a mask whose left half is white."""
    values = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
    mask = np.zeros((SIDE, SIDE), np.uint8)
    mask[:, : SIDE // 2] = 255
    Image.fromarray(values).save(tmp_path / "init.png")
    Image.fromarray(mask).save(tmp_path / "mask.png")
    return tmp_path / "init.png", tmp_path / "mask.png"


def test_a_picture_is_drawn_out_of_another(
    model: list[str], kl_model: Path, init_image: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    init, mask = init_image
    first = draw(tmp_path / "a", *model, "a red circle", "--init", str(init), "--strength", "0.6", "--n", "3")[0]
    family, image = ldm.load(kl_model), torch.tensor(pixels(init))[None]
    assert np.array_equal(first, family.sample(["a red circle"], [0], edits=family.edits(image, strength=0.6))[0])
    file = tmp_path / "a" / "00000_seed0.png"
    recipe: Any = read_recipe(file)
    assert (recipe.init, recipe.strength, recipe.mask) == (hashlib.sha256(init.read_bytes()).hexdigest(), 0.6, "")
    with Image.open(file) as said:
        assert "Denoising strength: 0.6" in said.text["parameters"]  # type: ignore[attr-defined]
    filled = draw(tmp_path / "b", *model, "a red circle", "--init", str(init), "--mask", str(mask))[0]
    half = SIDE // 2
    assert np.array_equal(filled[:, half:], pixels(init)[:, half:]) and not np.array_equal(filled[:, :half], pixels(init)[:, :half])
    recipe = read_recipe(tmp_path / "b" / "00000_seed0.png")
    assert recipe.strength == 1 and recipe.mask == hashlib.sha256(mask.read_bytes()).hexdigest()
    assert "note:" not in capsys.readouterr().err
    wide = draw(tmp_path / "c", *model, "a red circle", "--init", str(init), "--size", "48x32")[0]
    assert wide.shape == (32, 48, 3) and "init.png: 32x32 px, resized and cropped to 48x32" in capsys.readouterr().err
    assert read_recipe(tmp_path / "c" / "00000_seed0.png").strength == 0.75  # type: ignore[union-attr]


def test_an_edit_is_done_again_from_its_recipe(
    model: list[str], init_image: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = ["--init", str(init_image[0]), "--mask", str(init_image[1])]
    first = draw(tmp_path / "a", *model, "a red circle", *files, "--strength", "0.8", "--seed", "4")[0]
    picture = str(tmp_path / "a" / "00000_seed4.png")
    assert np.array_equal(first, draw(tmp_path / "b", *model, "--from", picture, *files)[0])
    assert "note:" not in capsys.readouterr().err
    assert main(["sample", *model, "--from", picture]) == 2
    assert "drawn out of another one; give that one by --init" in capsys.readouterr().err
    draw(tmp_path / "c", *model, "--from", picture, "--init", str(init_image[1]))
    said = capsys.readouterr().err
    assert "mask.png is not the file that the recipe was made with" in said and "mask: nothing is not the file" in said


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--init", "none.png"], "init: none.png: No such file"),
        (["--init", "init.png", "--mask", "none.png"], "mask: none.png: No such file"),
        (["--init", "init.png", "--strength", "1.5"], "strength: got 1.5; a number from 0"),
        (["--init", "init.png", "--strength", "nan"], "strength: got nan"),
        (["--mask", "mask.png"], "mask: got mask.png, but no picture to start from; give it by --init"),
        (["--strength", "0.5"], "strength: got 0.5, but no picture to start from"),
        (["--init", "init.png", "--mask", "small.png"], "mask: small.png is 8x8 px, but init.png is 32x32"),
    ],
)
def test_mistakes_of_editing_are_one_line(
    model: list[str],
    init_image: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    expected: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Image.new("L", (8, 8), 255).save("small.png")
    own = (*(() if "--model" in words else model), *(() if "--out" in words else ("--out", "pictures")))
    assert main(["sample", "a red circle", *own, *words]) == 2
    said = capsys.readouterr().err.strip()
    assert expected in said and "\n" not in said and not list((tmp_path / "pictures").glob("*.png"))


def test_an_overflow_is_told_once(kl_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from safetensors.torch import load_file, save_file

    shutil.copytree(kl_model, tmp_path / "model")
    file = next((tmp_path / "model" / "vae").glob("*.safetensors"))
    state = load_file(file)
    save_file({**state, "decoder.conv_in.weight": state["decoder.conv_in.weight"] * 1e6}, file, {"format": "pt"})
    for name in ("ldm.json", "manifest.json"):
        (tmp_path / "model" / name).unlink()
    words = ["--model", str(tmp_path / "model"), "a", "b", "--precision", "fp16", "--steps", "2", "--batch", "1", "--size", "32"]
    draw(tmp_path / "o", *words)
    assert capsys.readouterr().err.count("note: the decoder overflowed in fp16; it was run again in float32") == 1


def test_another_models_recipe_is_told(model: list[str], vq_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    draw(tmp_path, *model, "a red circle")
    assert "will differ" not in capsys.readouterr().err
    draw(tmp_path / "vq", "--model", str(vq_model), "--from", str(tmp_path / "00000_seed0.png"))
    assert "the picture will differ" in capsys.readouterr().err


def test_prompts_from_a_file_and_from_standard_input(
    model: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "prompts.txt"
    file.write_bytes("\ufeffa red circle\r\n\n  a blue ring  \n".encode())
    for i, words in enumerate((["--prompts", str(file)], ["--prompts", "-"], [])):
        monkeypatch.setattr(sys, "stdin", io.StringIO("a red circle\n\n  a blue ring  \n"))
        draw(tmp_path / str(i), *model, *words, "--json")
        told = [json.loads(line)["prompt"] for line in capsys.readouterr().out.splitlines()]
        assert told == ["a red circle", "a blue ring"]


def test_a_grid_has_a_row_for_each_prompt(model: list[str], tmp_path: Path) -> None:
    found = draw(tmp_path / "o", *model, "a red circle", "a blue ring", "--n", "3", "--grid", str(tmp_path / "new" / "grid.png"))
    sheet = pixels(tmp_path / "new" / "grid.png")
    assert sheet.shape == (2 * SIDE + 2, 3 * SIDE + 4, 3)
    assert np.array_equal(sheet[SIDE + 2 :, SIDE + 2 : 2 * SIDE + 2], found[4])
    draw(tmp_path / "p", *model, "a red circle", "a blue ring", "a", "--grid", str(tmp_path / "line"))
    assert pixels(tmp_path / "line").shape == (SIDE, 3 * SIDE + 4, 3)
    draw(tmp_path / "q", *model, *["a red circle"] * 9, "--grid", str(tmp_path / "eight"))
    assert pixels(tmp_path / "eight").shape == (2 * SIDE + 2, 8 * SIDE + 14, 3)


def test_long_and_odd_prompts_are_drawn_with_a_notice(model: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    draw(tmp_path, *model, "a red ring " * 1000, "\x01 ‮🙂", "")
    said = capsys.readouterr().err
    assert said.count("note:") == 2 and len(said) < 500 and "note: an empty prompt" in said
    assert "longer than the model's 16 tokens; it is read in 16 chunks, and the rest" in said
    assert len(list(tmp_path.glob("*.png"))) == 3
    draw(tmp_path / "negative", *model, "a", "--negative", "a red ring " * 1000)
    assert capsys.readouterr().err.count("note:") == 1


def test_the_newest_model_here_is_the_default(
    kl_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["sample", "a"]) == 2
    assert "no model: give --model DIR, or train one" in capsys.readouterr().err
    for i, name in enumerate(("old", "new")):
        shutil.copytree(kl_model, tmp_path / "runs" / name / "model")
        import os

        os.utime(tmp_path / "runs" / name / "model" / "model_index.json", (1000 + i, 1000 + i))
    (tmp_path / "runs" / "unfinished").mkdir()
    draw(tmp_path / "outputs", "a")
    assert "model: runs/new/model (the newest here)" in capsys.readouterr().err
    recipe: Any = read_recipe(tmp_path / "outputs" / "00000_seed0.png")
    assert recipe.model == "new" and str(tmp_path) not in json.dumps(recipe.to_dict())


def test_a_run_folder_is_a_model(kl_model: Path, tmp_path: Path) -> None:
    assert len(draw(tmp_path, "--model", str(kl_model.parent), "a")) == 1


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--sampler", "eulr"], "sampler: got 'eulr'; choose one of ddpm"),
        (["--spacing", "far"], "spacing: got 'far'"),
        (["--size", "33x32"], "size: got 33x32; both must be multiples of 8"),
        (["--size", "0x32"], "size: got '0x32'"),
        (["--size", "99999"], "at most 8192 px a side"),
        (["--steps", "0"], "--steps"),
        (["--steps", "100000"], "--steps"),
        (["--steps", "many"], "--steps"),
        (["--guidance", "nan"], "guidance"),
        (["--precision", "fp8"], "precision: got 'fp8'; choose one of fp32"),
        (["--guidance", "-1"], "--guidance"),
        (["--seed", "-1"], "--seed"),
        (["--seed", "1e3"], "--seed"),
        (["--n", "0"], "--n"),
        (["--batch", "0"], "--batch"),
        (["--eta", "2"], "--eta"),
        (["--device", "abacus"], "device: got 'abacus'; give cuda, or one of several such as cuda:1, or mps or cpu"),
        (["--device", "xpu"], "device: got 'xpu', which this machine or this torch lacks"),
        (["--colour", "red"], "--colour"),
        (["--prompts", "none.txt"], "not both"),
        (["--from", "none.png"], "none.png: No such file"),
        (["--model", "/no/such/model"], "/no/such/model: no such folder"),
        (["--out", "file/below"], "Not a directory"),
    ],
)
def test_mistakes_are_one_line(
    model: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: list[str], expected: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    own = (*(() if "--model" in words else model), *(() if "--out" in words else ("--out", "pictures")))
    assert main(["sample", "a red circle", *own, *words]) == 2
    said = capsys.readouterr().err.strip()
    assert expected in said and "\n" not in said and said.startswith("ldm sample: ")
    assert not list(tmp_path.rglob("*.png"))


def test_missing_and_empty_prompts_are_told(model: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\x00")
    for file, words in {"none.txt": "No such file", "empty.txt": "no prompts in it", "bytes.txt": "not UTF-8 text"}.items():
        assert main(["sample", *model, "--prompts", str(tmp_path / file)]) == 2
        assert f"{file}: {words}" in capsys.readouterr().err


def test_a_record_that_makes_no_sense_is_told(kl_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(kl_model, tmp_path / "model")
    record = json.loads((tmp_path / "model" / "ldm.json").read_text())
    for text, words in {
        json.dumps({**record, "defaults": {**record["defaults"], "stepz": 3}}): "stepz",
        json.dumps({**record, "defaults": {**record["defaults"], "steps": "many"}}): "steps",
        json.dumps({**record, "autoencoder": "0" * 64}): "put that one back",
        "{": "not readable JSON",
    }.items():
        (tmp_path / "model" / "ldm.json").write_text(text)
        assert main(["sample", "a", "--model", str(tmp_path / "model"), "--out", str(tmp_path / "o")]) == 2
        assert words in capsys.readouterr().err


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "tokenizer", "scheduler"])
def test_a_model_with_a_part_missing_or_cut_is_told(kl_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], part: str) -> None:
    shutil.copytree(kl_model, tmp_path / "model")
    for file in (tmp_path / "model" / part).iterdir():
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    assert main(["sample", "a", "--model", str(tmp_path / "model"), "--out", str(tmp_path / "o")]) == 2
    said = capsys.readouterr().err.strip()
    assert f"/{part}" in said and "\n" not in said
    shutil.rmtree(tmp_path / "model" / part)
    assert main(["sample", "a", "--model", str(tmp_path / "model"), "--out", str(tmp_path / "o")]) == 2
    assert f"{part} missing" in capsys.readouterr().err


def test_a_full_disk_keeps_what_is_there(
    model: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save, count = Image.Image.save, [0]

    def full(image: Image.Image, path: Any, **named: Any) -> None:
        count[0] += 1
        if count[0] == 2:
            raise OSError(28, "No space left on device", str(path))
        save(image, path, **named)

    monkeypatch.setattr(Image.Image, "save", full)
    assert main(["sample", *model, "a", "b", "c", "--out", str(tmp_path)]) == 2
    assert "No space left on device" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["00000_seed0.png"]
    assert read_recipe(tmp_path / "00000_seed0.png").prompt == "a"  # type: ignore[union-attr]


def test_help_is_quick_and_loads_no_torch() -> None:
    code = "import sys; from ldm.__main__ import main; code = main(['sample', '--help']); assert 'torch' not in sys.modules; sys.exit(code)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "--guidance" in done.stdout and "--from" in done.stdout


@pytest.mark.slow
def test_as_a_program(kl_model: Path, tmp_path: Path) -> None:
    root = Path(ldm.__file__).parents[1]
    command = [sys.executable, str(root / "sample.py"), "--model", str(kl_model), "--out", str(tmp_path), "--json"]
    done = subprocess.run(command, input="a red circle\n", capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["file"] == str(tmp_path / "00000_seed0.png") and "Traceback" not in done.stderr
    torch.testing.assert_close(torch.tensor(pixels(tmp_path / "00000_seed0.png")), ldm.load(kl_model).sample(["a red circle"], [0])[0])
