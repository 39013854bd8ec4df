"""Representation alignment: its loss as the papers have it, for each network; what learns of it; what a model keeps; what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from finished_model import SIDE, UNET
from torch import Tensor
from torch.nn import functional as F

from ldm.config.errors import UserError
from ldm.data.dataset import asked
from ldm.data.scenes.source import ScenesSource
from ldm.diffusion.rng import Rng
from ldm.families.autoencoder import KL as KLModel
from ldm.families.clip import Clip
from ldm.families.family import Context, ModelConfig, Product
from ldm.families.latent_diffusion.alignment import EPS, Aligned, Alignment
from ldm.families.latent_diffusion.conditions import Condition
from ldm.families.latent_diffusion.family import LatentDiffusion, LatentDiffusionFamily
from ldm.families.latent_diffusion.fine_tuning import LowRank
from ldm.families.latent_diffusion.ports import Residual
from ldm.formats.clip_folder import load_own_tower
from ldm.models.backbone import DenoiserConfig
from ldm.models.dit import DiTConfig
from ldm.models.mmdit import MMDiTConfig
from ldm.models.vision_tower import Tower
from ldm.training.settings import Train

DATA = ScenesSource(tier="one", images=8, val=4)
NETWORKS: dict[str, Any] = {
    "unet": UNET,
    "one level": replace(UNET, channels=(16,), attention=(False,), middle="none"),
    "dit": DiTConfig(heads=2, head_width=8, layers=4, sample_size=4),
    "mmdit": MMDiTConfig(heads=2, head_width=8, layers=4, sample_size=4),
}


def begun(model: Path, network: Any = UNET, side: int = SIDE, **fields: Any) -> LatentDiffusionFamily:
    torch.manual_seed(0)
    config = LatentDiffusion(**{"network": network, "align": Alignment(), **fields})
    data = asked(DATA.build("train"), config.views())
    products = {name: Product(model, "") for name in ("text", "autoencoder")}
    family = config.build(Context(data=data, val=data, resolution=side, seed=0, total_images=8, products=products))
    assert isinstance(family, LatentDiffusionFamily)
    torch.manual_seed(1)
    with torch.no_grad():
        for weight in family.denoiser.parameters():  # fresh ones answer zero
            weight.add_(0.05 * torch.randn_like(weight))
    return family.eval()


def batch_of(family: LatentDiffusionFamily, side: int = SIDE) -> Any:
    return asked(DATA.build("train"), family.config.views()).load(range(4), range(4), side, 0, False).to("cpu")


@pytest.mark.parametrize("name", NETWORKS)
def test_the_loss_is_one_minus_the_cosine_of_places(name: str, own_clip_model: Path) -> None:
    side = 64 if name == "unet" else SIDE  # of what the tower sees at 32
    family = begun(own_clip_model, NETWORKS[name], side)
    batch, found = batch_of(family, side), cast(Aligned, family.alignment)
    assert found.tower.resolution == SIDE
    heard: list[Any] = []
    family.denoiser.aligned().register_forward_hook(lambda module, told, output: heard.append(output))
    terms = family.loss(batch, Rng(0, range(4)))[0]
    tower, _ = load_own_tower(own_clip_model)
    picture = 2 * batch.views["embedding"] - 1
    assert (picture - batch.image).abs().max() < 1 / 127  # cached as bytes
    seen = tower.features(F.interpolate(picture, (SIDE, SIDE), mode="bicubic", antialias=True))[-1]  # type: ignore[union-attr]
    spread = seen.std((2, 3), keepdim=True, correction=0)
    seen = (seen - seen.mean((2, 3), keepdim=True)) / (spread + EPS * spread.mean(1, keepdim=True))
    states = heard[0][0] if isinstance(heard[0], tuple) else heard[0]
    if states.dim() == 3:  # patches of 2x2 of 4x4 latents, row by row
        states = torch.stack([states[:, 0:2], states[:, 2:4]], dim=1).permute(0, 3, 1, 2)
    assert states.shape[1] == family.denoiser.config.aligned_width
    told = found.projection(states)
    size = max(told.shape[-1], seen.shape[-1])
    told, seen = (F.interpolate(one, size=(size, size), mode="bilinear") for one in (told, seen))
    cosine = (told * seen).sum(1) / (told.norm(dim=1) * seen.norm(dim=1))
    assert terms["alignment"].item() == pytest.approx(0.5 * (1 - cosine.mean().item()), abs=1e-5)


@pytest.mark.parametrize("name", ["unet", "mmdit"])
def test_it_reaches_what_comes_before_the_block_alone_and_no_tower(name: str, own_clip_model: Path) -> None:
    network = NETWORKS[name]
    for checkpointing in (False, True):
        family = begun(own_clip_model, replace(network, checkpointing=checkpointing)).train()
        family.loss(batch_of(family), Rng(0, range(4)))[0]["alignment"].backward()
        learned = {n for n, weight in family.named_parameters() if weight.grad is not None and weight.grad.abs().max() > 0}
        assert {"alignment.projection.weight", "alignment.projection.bias"} <= learned and not any("tower" in n for n in learned)
        inside, outside = ("down_blocks.1", "up_blocks") if name == "unet" else ("transformer_blocks.0", "transformer_blocks.1")
        assert any(inside in n for n in learned) and not any(outside in n for n in learned)
        assert all(weight.grad is None for module in family.frozen() for weight in module.parameters())


def test_no_picture_depends_on_others_and_a_mask_of_features_that_are_equal_everywhere_is_no_nan(own_clip_model: Path) -> None:
    family = begun(own_clip_model)
    batch, found = batch_of(family), cast(Aligned, family.alignment)
    states = torch.randn(4, 32, 2, 2)

    def loss(rows: list[int], pictures: Tensor) -> Tensor:
        found._hear(found, None, states[rows])
        return found({"embedding": pictures[rows]}, (4, 4))

    pictures = batch.views["embedding"]
    each = torch.stack([loss([i], pictures) for i in range(4)])
    assert torch.allclose(loss([0, 1, 2, 3], pictures), each.mean(), atol=1e-6)
    assert loss([0], torch.full_like(pictures, 0.5)).isfinite()


def test_a_model_keeps_nothing_of_it_and_previews_draw(own_clip_model: Path, tmp_path: Path) -> None:
    plain, family = begun(own_clip_model, align=None), begun(own_clip_model)
    names = {name for name, _ in family.named_parameters()} - {name for name, _ in plain.named_parameters()}
    assert names == {"alignment.projection.weight", "alignment.projection.bias"}
    for one, where in ((plain, "plain"), (family, "aligned")):
        one.save(tmp_path / where)
    files = {where: sorted(f.relative_to(tmp_path / where) for f in (tmp_path / where).rglob("*")) for where in ("plain", "aligned")}
    assert files["plain"] == files["aligned"]
    assert all((tmp_path / "plain" / f).read_bytes() == (tmp_path / "aligned" / f).read_bytes() for f in files["plain"] if f.suffix)
    assert family.preview(batch_of(family), 0).shape == (4, 3, SIDE, SIDE)
    assert "align" in family.config.identity() and "align" not in plain.config.identity()


def test_what_it_cannot_be_had_with_is_refused_before_any_work(own_clip_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stage = Train(model="diffusion", resolution=SIDE, images=8)
    told = Condition(view="labels", port=Residual())

    def said(begins: str = "base", **fields: Any) -> str:
        return "\n".join(LatentDiffusion(align=Alignment(), **fields).check(stage, "stages.last", begins))

    assert "models.diffusion.align: cannot be had beside adapt" in said(adapt=LowRank())
    assert "models.diffusion.align: cannot be had beside learn=new" in said(conditions=(told,), learn="new")
    assert "models.diffusion.align: cannot be had without a text encoder" in said(text="")
    with monkeypatch.context() as patched:
        patched.setattr(type(UNET), "aligned_width", DenoiserConfig.aligned_width)
        assert "models.diffusion.align: UNet2DConditionModel has no block for it; leave align out" in said()
    assert "align" not in said() and "align" not in said(conditions=(told,))
    assert LatentDiffusion(align=Alignment()).requires["text"] == "has_tower"
    family = begun(own_clip_model)
    with pytest.raises(UserError, match="align: these samples have no pictures, only latents; encode them again for this model"):
        family.loss(replace(batch_of(family), views=None), Rng(0, range(4)))


def test_a_plan_counts_the_layer_and_the_tower(own_clip_model: Path) -> None:
    stage = Train(model="diffusion", resolution=SIDE, images=8)
    others: dict[str, ModelConfig] = {"text": Clip(), "autoencoder": KLModel()}
    plain, aligned = (LatentDiffusion(align=a).footprint(stage, SIDE, others, lambda _: None) for a in (None, Alignment()))
    extra = {k: v for k, v in aligned.learned.items() if k not in plain.learned}
    assert extra == {"alignment": 640 * 9 * 128 + 128} and aligned.extra > plain.extra
    tower = Tower(cast(Any, others["text"]).tower.build(), SIDE)
    assert aligned.frozen["image tower"] == sum(p.numel() for p in tower.parameters())
