"""Prompts as other programs read them: ComfyUI's way to say a learned word is followed, other notation is told and read as words."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image, PngImagePlugin
from safetensors.torch import save_file

from ldm.__main__ import main
from ldm.families.latent_diffusion.family import load
from ldm.sampling.picture_files import read_pixels
from ldm.sampling.recipe import read_recipe

GRAPH = {
    "1": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "a.safetensors"}},
    "2": {"class_type": "CLIPTextEncode", "inputs": {"text": "a ring", "clip": ["1", 1]}},
    "3": {"class_type": "CLIPTextEncode", "inputs": {"text": "blurry, (embedding:neg/Easy.pt:1.2)", "clip": ["1", 1]}},
    "4": {"class_type": "EmptyLatentImage", "inputs": {"width": 32, "height": 32, "batch_size": 1}},
    "5": {
        "class_type": "KSampler",
        "inputs": {"seed": 7, "steps": 2, "cfg": 4, "sampler_name": "ddim", "scheduler": "normal", "denoise": 1},
    },
    "6": {"class_type": "VAEDecode", "inputs": {"samples": ["5", 0], "vae": ["1", 2]}},
    "7": {"class_type": "SaveImage", "inputs": {"images": ["6", 0]}},
}
GRAPH["5"]["inputs"] |= {"model": ["1", 0], "positive": ["2", 0], "negative": ["3", 0], "latent_image": ["4", 0]}


@pytest.fixture
def easy(kl_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A learned word of two vectors in a file."""
    monkeypatch.chdir(tmp_path)
    width = load(kl_model).text.width
    save_file({"emb_params": torch.randn(2, width, generator=torch.Generator().manual_seed(0))}, tmp_path / "easy.safetensors")
    return tmp_path / "easy.safetensors"


def draw(model: Path, out: str, *words: str) -> tuple[bytes, object]:
    """The pixels and the recipe of one picture."""
    assert main(["sample", *words, "--model", str(model), "--steps", "2", "--out", out]) == 0
    (file,) = Path(out).glob("*.png")
    return read_pixels(file).numpy().tobytes(), read_recipe(file)


def test_comfyuis_way_to_say_a_learned_word(kl_model: Path, easy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--embedding", str(easy)]
    plain = draw(kl_model, "a", "a ring, (easy:1.2)", *given)[0]
    assert draw(kl_model, "b", "a ring, (embedding:styles/Easy.safetensors:1.2)", *given)[0] == plain
    assert "note:" not in capsys.readouterr().err
    draw(kl_model, "c", "a ring, embedding:easy")
    assert "prompt: embedding:easy is read as words, since no such word was taught; give its file by --embedding" in capsys.readouterr().err


def test_a_graphs_learned_word_is_said_where_it_was(kl_model: Path, easy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chunks = PngImagePlugin.PngInfo()
    chunks.add_text("prompt", json.dumps(GRAPH))
    Image.new("RGB", (8, 8)).save("comfy.png", pnginfo=chunks)
    given = ["--embedding", str(easy)]
    pixels, _ = draw(kl_model, "a", "--from", "comfy.png", *given)
    said = capsys.readouterr().err
    assert "learned word" not in said and "is in no prompt" not in said
    usual = ["--guidance", "4", "--seed", "7", "--size", "32", "--sampler", "ddim", "--spacing", "linspace"]
    assert pixels == draw(kl_model, "b", "a ring", "--negative", "blurry, (easy:1.2)", *given, *usual)[0]
    assert draw(kl_model, "c", "--from", "comfy.png")[1].negative == "blurry, ()"  # type: ignore[attr-defined]
    assert "not followed: learned word (textual inversion) neg/Easy.pt; give it by --embedding FILE" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        ("a {red|blue} ring", "prompt: {red|blue} is read as words, as nothing here chooses"),
        ("a __colour__ ring", "prompt: __colour__ is read as words, as nothing here chooses"),
        ("a (red:1,3) ring", "prompt: (red:1,3) is read as words; write (red:1.3)"),
        ("a ring <embed:easy>", "prompt: <embed:easy> is read as words"),
        ("a (red:1.3) ring, [dot:0.5], (a, b)", ""),
        ("a [(red, [blue:20]):dot:0.5] ring", "prompt: words change at step 20, but 2 steps are taken; a share"),
    ],
)
def test_notation_that_is_read_as_words_is_told(
    kl_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], prompt: str, said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    draw(kl_model, "a", prompt)
    told = capsys.readouterr().err
    assert (said in told) if said else ("read as words" not in told)
    draw(kl_model, "b", prompt, "--literal")
    assert "prompt:" not in capsys.readouterr().err
