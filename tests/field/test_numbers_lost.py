"""Weights that are no numbers end in one line, and never in a black picture."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ldm.__main__ import main
from ldm.config.errors import UserError
from ldm.data.pictures import finished
from ldm.families.draws import Wanted
from ldm.families.latent_diffusion.family import load


@pytest.mark.parametrize(("part", "layer"), [("unet", "conv_out"), ("text_encoder", "final_layer_norm")])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_part_that_lost_its_numbers(
    part: str, layer: str, value: float, kl_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "model"
    shutil.copytree(kl_model, model)
    (model / "manifest.json").unlink(missing_ok=True)  # a model that its maker wrote so
    (file,) = (model / part).glob("*.safetensors")
    weights = load_file(file)
    name = next(name for name in weights if f"{layer}.weight" in name)
    weights[name] = torch.full_like(weights[name], value)
    save_file(weights, file)
    assert main(["sample", "a red circle", "--model", str(model), "--steps", "1", "--out", str(tmp_path / "o")]) == 2
    assert "finite" in capsys.readouterr().err and not list((tmp_path / "o").glob("*.png"))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_decoder_that_lost_its_numbers(precision: str, kl_model: Path) -> None:
    family = load(kl_model)
    with torch.no_grad():
        family.codec.network.decoder.conv_in.weight.fill_(float("nan"))
    with pytest.raises(UserError, match="weights may be damaged"):
        family.sample(["a ring"], [0], Wanted(precision=precision), note=lambda text: None)


def test_pictures_without_numbers_are_refused() -> None:
    assert finished(torch.zeros(1, 3, 2, 2)).tolist() == torch.full((1, 2, 2, 3), 128).tolist()
    with pytest.raises(UserError, match="weights may be damaged"):
        finished(torch.tensor(float("nan")).expand(1, 3, 2, 2))
