"""The quickstart, cut down, with a transformer in the U-Net's place: it trains, resumes to the bit, draws and opens in diffusers."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import tiny
import torch

from ldm.diffusion.batch import Cond, Text
from ldm.formats.denoiser_folder import load_denoiser
from ldm.formats.part import load_part

NETWORKS = {
    "dit": "{kind: dit, heads: 2, head_width: 16, layers: 2, sample_size: 8}",
    "mmdit": "{kind: mmdit, heads: 2, head_width: 16, layers: 2, sample_size: 8, largest: 8, qk_norm: rms_norm}",
}
FLOW = ["models.diffusion.process={schedule: {kind: flow, shift: 2}, target: flow, density: {kind: logit_normal}}"]


def words(kind: str, out: Path) -> list[str]:
    rest = [word for word in tiny.WORDS if not word.startswith("models.diffusion.network")]
    return [*rest, f"models.diffusion.network={NETWORKS[kind]}", *FLOW, f"out={out}"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", NETWORKS)
def test_a_transformer_takes_the_place_of_the_unet(kind: str, tmp_path: Path) -> None:
    import diffusers

    from ldm.__main__ import main

    whole, again = tmp_path / "whole", tmp_path / "again"
    assert main(["train", "configs/quickstart.yaml", *words(kind, whole)]) == 0
    shutil.copytree(whole, again)
    for name in ("diffusion-high", "evaluation", "export"):
        shutil.rmtree(again / "stages" / name)
    assert main(["train", "configs/quickstart.yaml", *words(kind, again)]) == 0
    one, two = (load_part(folder / "model" / "transformer")[1] for folder in (whole, again))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)

    assert main(["sample", "a blue ring", "--model", str(whole), "--steps", "2", "--out", str(tmp_path / "drawn")]) == 0
    assert list((tmp_path / "drawn").glob("*.png"))

    ours, stored = load_denoiser(whole / "model")
    peer = getattr(diffusers, stored["_class_name"]).from_pretrained(whole / "model" / "transformer")
    x, t = torch.randn(1, 8, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([500.0])
    states, pooled = torch.randn(1, 5, 32), torch.randn(1, 32)
    mask = torch.ones(1, 5, dtype=torch.bool)
    told = {"encoder_attention_mask": mask} if kind == "dit" else {"pooled_projections": pooled}
    with torch.no_grad():
        wanted = peer.eval()(x, encoder_hidden_states=states, timestep=t, **told).sample
        found = ours.eval()(x, t, Cond(text=Text(tokens=states, mask=mask, pooled=pooled)))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
