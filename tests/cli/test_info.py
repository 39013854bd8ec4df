"""The verb that reads pictures."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image, PngImagePlugin

from ldm.__main__ import main
from ldm.cli.info import about

COMFY = {
    "3": {
        "class_type": "KSampler",
        "inputs": {
            "seed": 156,
            "steps": 20,
            "cfg": 8,
            "sampler_name": "euler",
            "scheduler": "normal",
            "denoise": 1,
            "model": ["4", 0],
            "positive": ["6", 0],
            "negative": ["7", 0],
            "latent_image": ["5", 0],
        },
    },
    "6": {"class_type": "CLIPTextEncode", "inputs": {"text": "a bottle", "clip": ["4", 1]}},
    "7": {"class_type": "ConditioningCombine", "inputs": {"conditioning_1": ["8", 0]}},
    "8": {"class_type": "CLIPTextEncode", "inputs": {"text": "text, watermark", "clip": ["4", 1]}},
}
A1111 = "a cat\nNegative prompt: dog\nSteps: 20, Sampler: DPM++ 2M Karras, CFG scale: 7, Seed: 5, Size: 512x768, Model: v1-5"


def picture(path: Path, **chunks: str) -> Path:
    told = PngImagePlugin.PngInfo()
    for name, text in chunks.items():
        told.add_text(name, text)
    Image.new("RGB", (64, 48), "red").save(path, pnginfo=told)
    return path


def test_our_pictures_tell_their_recipe_and_whether_the_model_fits(
    kl_model: Path, vq_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["sample", "a red circle", "--model", str(kl_model), "--out", str(tmp_path), "--seed", "7", "--steps", "2"]) == 0
    capsys.readouterr()
    file = tmp_path / "00000_seed7.png"
    assert main(["info", str(file), "--model", str(kl_model), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["recipe"]["seed"] == 7 and told["recipe"]["prompt"] == "a red circle" and told["width"] == 32
    assert told["model_at_hand"] == str(kl_model) and told["watermark"] is None and told["says_made_by_a_model"]
    assert "Steps: 2" in told["parameters"]
    assert main(["info", str(file), "--model", str(vq_model)]) == 0
    said = capsys.readouterr().out
    assert "prompt: a red circle" in said and f"its model is none of: {vq_model}" in said and "a model made it" in said


def test_models_below_runs_are_compared(kl_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(["sample", "a", "--model", str(kl_model), "--out", str(tmp_path), "--steps", "1"]) == 0
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "mine").symlink_to(kl_model.parent)
    monkeypatch.chdir(tmp_path)
    from ldm.cli.info import _at_hand

    assert about(tmp_path / "00000_seed0.png", _at_hand(""))["model_at_hand"] == "runs/mine/model"


def test_other_programs_pictures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    webui = about(picture(tmp_path / "a.png", parameters=A1111))
    assert webui["recipe"]["sampler"] == "dpmpp_2m" and webui["recipe"]["spacing"] == "karras" and webui["recipe"]["height"] == 768
    comfy = about(picture(tmp_path / "c.png", prompt=json.dumps(COMFY), workflow="{}"))
    wanted = {"prompt": "a bottle", "negative": "text, watermark", "steps": 20, "guidance": 8, "seed": 156, "sampler": "euler"}
    wanted |= {"spacing": "linspace"}
    assert comfy["recipe"] == wanted and comfy["made_by"] == "ComfyUI" and "workflow" in comfy
    for broken in ("", "{}", "[]", '{"3": 5}', '{"3": {"class_type": "KSampler", "inputs": {"positive": ["3", 0]}}}'):
        about(picture(tmp_path / "b.png", prompt=broken))
    assert main(["info", str(picture(tmp_path / "n.png"))]) == 0
    assert "carries no recipe" in capsys.readouterr().out


def test_files_that_cannot_be_read_are_a_line_each(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text.png").write_text("no picture")
    good = picture(tmp_path / "good.png", parameters=A1111)
    assert main(["info", str(tmp_path / "none.png"), str(good), str(tmp_path / "text.png")]) == 2
    said = capsys.readouterr()
    assert "none.png: No such file" in said.err and len(said.err.strip().splitlines()) == 2 and "prompt: a cat" in said.out


def test_a_hidden_mark_is_read(tmp_path: Path) -> None:
    import numpy as np

    from ldm.sampling.watermark import hide

    values = np.full((64, 64, 3), 200, np.uint8)
    Image.fromarray(hide(values, "ours")).save(tmp_path / "m.png")
    assert about(tmp_path / "m.png")["watermark"] == "ours"
