"""Masked loss: a mask goes with its picture through crop, flip, resize, buckets and cached latents, and weighs the loss."""

from __future__ import annotations

import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from tars import painted, shard

from ldm.config.errors import UserError
from ldm.config.schema import build
from ldm.data.buckets import Buckets
from ldm.data.cache import CacheOptions, write_cache
from ldm.data.cached import CachedLatents
from ldm.data.check import check
from ldm.data.concatenation import Concatenation
from ldm.data.folder import FolderSource
from ldm.data.images import Rejected, mask_view, view
from ldm.data.masks import masks_say
from ldm.data.shards import ShardsSource
from ldm.diffusion.batch import MomentBatch
from ldm.families.latent_diffusion.masked_loss import MaskedLoss, weigh
from ldm.runs.run import Run


def png(pixels: np.ndarray, mode: str | None = None) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels, mode).save(out, "PNG")
    return out.getvalue()


def grey(height: int = 60, width: int = 90, seed: int = 0) -> np.ndarray:
    coarse = Image.fromarray(np.random.default_rng(seed).integers(0, 256, (6, 9), np.uint8))
    return np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC))


def folder(root: Path, names: tuple[str, ...] = ("-masklabel.png", "_mask.png", ".mask.png")) -> Path:
    """Pictures that are equal to their masks, so that a mask's view must equal its picture's; the last has none."""
    root.mkdir(exist_ok=True)
    for i, mark in enumerate(names):
        pixels = grey(60 + 8 * i, 90, i)
        (root / f"{i}.png").write_bytes(png(np.stack([pixels] * 3, 2)))
        (root / f"{i}{mark}").write_bytes(png(pixels))
        (root / f"{i}.txt").write_text("x")
    (root / "whole.png").write_bytes(painted(9, kind="PNG"))
    (root / "whole.txt").write_text("x")
    return root


@pytest.mark.parametrize("shape", [32, (48, 32), (32, 56)])
def test_the_mask_is_seen_as_its_picture_is(tmp_path, shape):
    data = FolderSource(path=str(folder(tmp_path)), masks="beside", val_share=0).build("train")
    assert data.describe()["with_mask"] == 3 and "side picture" not in data.describe()["rejected"]
    batch = data.load([0, 1, 2, 3] * 6, range(24), shape, 3, True)
    assert batch.mask is not None and batch.mask.shape == (24, 1, *batch.image.shape[2:]) and 0 <= batch.mask.min() <= batch.mask.max() <= 1
    for row in range(24):
        if data.names[row % 4] == "whole.png":
            assert bool((batch.mask[row] == 1).all())
        else:  # bicubic here, bilinear there
            assert float((batch.mask[row, 0] - (batch.image[row, 0] + 1) / 2).abs().mean()) < 0.03
    assert data.load([0], [0], 32, 0, False).to("cpu").mask is not None
    assert FolderSource(path=str(tmp_path), val_share=0).build("train").load([0], [0], 32, 0, False).mask is None
    changed = folder(tmp_path)
    (changed / "0-masklabel.png").write_bytes(png(grey(seed=7)))
    assert FolderSource(path=str(tmp_path), masks="beside", val_share=0).build("train").fingerprint() != data.fingerprint()


def test_what_a_mask_says(tmp_path):
    seen = view(png(np.zeros((32, 32, 3), np.uint8)), 32)
    half = np.zeros((32, 32), np.uint8)
    half[:, 16:] = 255
    assert np.array_equal(mask_view(png(half), seen, False, alpha=False), half)
    painted_white = np.full((32, 32, 4), 255, np.uint8)
    painted_white[..., 3] = half  # white paint on a transparent layer
    assert np.array_equal(mask_view(png(painted_white), seen, False, alpha=False), half)
    assert np.array_equal(mask_view(png(painted_white), seen, False, alpha=True), half)
    assert (mask_view(png(np.stack([half] * 3, 2)), seen, False, alpha=True) == 255).all()  # no transparency: all counts
    small = mask_view(png(half[::4, ::4]), seen, False, alpha=False)  # of another size: stretched to the picture
    assert np.abs(small.astype(int) - half).mean() < 12
    mirrored = view(png(np.zeros((32, 64, 3), np.uint8)), 32, (0.5, 0.0), True)
    wide = np.zeros((32, 64), np.uint8)
    wide[:, 40:] = 255
    assert np.array_equal(mask_view(png(wide), mirrored, True, alpha=False), wide[:, :31:-1])


def test_opacity_of_shards_is_a_mask_and_parts_without_one_count_whole(tmp_path):
    shard(tmp_path, 0, 3)
    data = ShardsSource(path=str(tmp_path), masks="alpha", val_share=0).build("train")
    plain = FolderSource(path=str(folder(tmp_path / "f")), val_share=0).build("train")
    masked = FolderSource(path=str(tmp_path / "f"), masks="beside", val_share=0).build("train")
    assert bool((data.load([0], [0], 32, 0, False).mask == 1).all())  # type: ignore[union-attr]
    both = Concatenation([masked, plain], [4, 4]).load([5, 0, 6, 1], [0, 1, 2, 3], 32, 0, False)
    assert both.mask is not None and bool((both.mask[[0, 2]] == 1).all()) and not bool((both.mask[[1, 3]] == 1).all())


@pytest.mark.parametrize("buckets", [None, Buckets()])
def test_cached_latents_keep_masks_at_their_size(tmp_path, buckets):
    data = FolderSource(path=str(folder(tmp_path / "f")), masks="beside", val_share=0, crop="centre").build("train")
    options = CacheOptions(autoencoder="a", resolution=64, flip=True, buckets=buckets, shard_images=3)
    write_cache(tmp_path / "cache", data, lambda image: (F.avg_pool2d(image, 8), None), options)
    cached = CachedLatents(tmp_path / "cache")
    shapes: list[Any] = [cached.plan.shapes[n] for n in cached.buckets()[1]] if buckets else [64] * 4  # type: ignore[index]
    flipped = 0
    for index, shape in enumerate(shapes):
        high, wide = shape if buckets else (64, 64)
        for position in range(6):
            found = cached.load([index], [position], shape, 5, True)
            image = data.load([index], [position], shape, 5, False)
            mirror = not torch.allclose(found.mean, F.avg_pool2d(image.image, 8), atol=1e-2)
            flipped += mirror
            assert image.mask is not None and found.mask is not None and found.mask.shape == (1, 1, high // 8, wide // 8)
            wanted = F.avg_pool2d(image.mask, 8)
            assert torch.allclose(found.mask, wanted.flip(-1) if mirror else wanted, atol=1e-3)
    assert 4 < flipped < 20


def test_errors_weigh_by_the_mask_in_closed_form():
    torch.manual_seed(0)
    mask = torch.zeros(2, 1, 16, 16)
    mask[0, :, :, 8:] = 1.0
    mask[1, :, :4, :2] = 1.0
    error = torch.rand(2, 4, 2, 2)
    seen: Any = SimpleNamespace(mask=mask)
    weight = torch.tensor([[[0.0, 1.0], [0.0, 1.0]], [[0.125, 0.0], [0.0, 0.0]]])[:, None]
    assert torch.allclose(weigh(MaskedLoss(), seen, error), error * weight)
    assert torch.allclose(weigh(MaskedLoss(unmasked=0.1), seen, error), error * weight.clamp(min=0.1))
    normal = weigh(MaskedLoss(normalise=True), seen, torch.ones(2, 4, 2, 2)).mean((1, 2, 3))
    assert torch.allclose(normal, torch.ones(2))
    assert torch.equal(weigh(MaskedLoss(unmasked=1.0), seen, error), error)
    row = torch.zeros(1, dtype=torch.long)
    moments = MomentBatch(mean=error[:1], std=None, caption=("",), size=torch.zeros(1, 6), position=row)
    with pytest.raises(UserError, match="encoded without masks"):
        weigh(MaskedLoss(), moments, error[:1])


def configuration(masks: str, loss: object) -> dict[str, Any]:
    stages = {"tune": {"kind": "train", "model": "diffusion", "images": 8, "resolution": 64}}
    models = {"diffusion": {"kind": "latent_diffusion", **({} if loss is None else {"masked_loss": loss})}}
    return {"data": {"kind": "folder", "path": "x", "masks": masks}, "init": "base", "models": models, "stages": stages}


def test_masks_without_their_loss_and_a_loss_without_masks_are_refused():
    with pytest.raises(UserError, match=r"data\.masks: no model of this run weighs its loss by masks"):
        build(configuration("beside", None), Run, "run.yaml")
    with pytest.raises(UserError, match=r"models\.diffusion\.masked_loss: no picture has a mask"):
        build(configuration("none", {}), Run, "run.yaml")
    build(configuration("alpha", {"unmasked": 0.1}), Run, "run.yaml")


def test_a_mask_of_other_proportions_is_left_out_and_told(tmp_path: Path) -> None:
    """Stretched over its picture it would mask what it does not show."""
    Image.new("RGB", (64, 64)).save(tmp_path / "x.png")
    seen = view((tmp_path / "x.png").read_bytes(), 32)
    for size, fits in (((64, 64), True), ((128, 128), True), ((33, 32), True), ((64, 32), False), ((32, 64), False)):
        Image.new("L", size, 255).save(tmp_path / "m.png")
        if fits:
            assert (mask_view((tmp_path / "m.png").read_bytes(), seen, False, False) == 255).all()
            continue
        with pytest.raises(Rejected, match=r"mask of other proportions: .* of a picture of 64x64"):
            mask_view((tmp_path / "m.png").read_bytes(), seen, False, False)


@pytest.mark.parametrize("masks", ["beside", "alpha"])
@pytest.mark.parametrize(
    ("value", "black_counts", "said"),
    [
        (255, False, "white everywhere"),
        (0, True, "black everywhere, so no part"),
        (0, False, "black everywhere, and black is not learned"),
        (102, False, "of one grey, 0.40, everywhere"),
        (None, False, ""),
    ],
)
def test_masks_that_are_the_same_everywhere_are_told(masks: Any, value: int | None, black_counts: bool, said: str, tmp_path: Path) -> None:
    for i in range(20):
        mask = Image.fromarray(grey(60, 60, i)) if value is None else Image.new("L", (60, 60), value)
        picture = Image.fromarray(np.stack([grey(60, 60, 99 + i)] * 3, 2))
        if masks == "alpha":
            picture.putalpha(mask)
        else:
            mask.save(tmp_path / f"{i}-masklabel.png")
        picture.save(tmp_path / f"{i}.png")
        (tmp_path / f"{i}.txt").write_text("x")
    data = FolderSource(path=str(tmp_path), masks=masks).build("train")
    if value == 0 and not black_counts:
        with pytest.raises(UserError, match=f"the masks of 16 pictures that were looked at are {said}"):
            masks_say(data, data.describe(), black_counts)
    else:
        found = masks_say(data, data.describe(), black_counts)
        assert said in found and bool(said) == bool(found)


def test_pictures_without_a_mask_count_whole_and_that_is_told_where_none_has_one(tmp_path: Path) -> None:
    some = FolderSource(path=str(folder(tmp_path)), masks="beside", val_share=0).build("train")
    assert masks_say(some, some.describe(), False) == ""
    none = FolderSource(path=str(folder(tmp_path / "none", ())), masks="beside", val_share=0).build("train")
    assert masks_say(none, none.describe(), False).startswith("data.masks: no picture has a mask beside it")


@pytest.mark.parametrize(
    ("value", "said"), [(0, "are black everywhere, and black is not learned"), (255, "are white everywhere"), (None, "")]
)
def test_data_check_looks_at_masks_as_a_training_does(value: int | None, said: str, tmp_path: Path) -> None:
    for i in range(4):
        picture = np.random.default_rng(i).integers(0, 256, (40, 40, 3), dtype=np.uint8)
        Image.fromarray(picture).save(tmp_path / f"{i}.png")
        (tmp_path / f"{i}.txt").write_text("a dog")
        mask = np.full((40, 40), value or 0, np.uint8)
        mask[:20] = 255 if value is None else value
        Image.fromarray(mask).save(tmp_path / f"{i}-masklabel.png")
    found, parts = check(FolderSource(path=str(tmp_path), val_share=0.0, max_bad=1.0), resolution=32)
    notes = "\n".join(found.notes)
    assert "4 pictures have masks beside them; data.masks=beside and masked_loss learn by them" in notes and len(parts[0]) == 4
    assert said in notes and ("everywhere" in notes) == bool(said)
