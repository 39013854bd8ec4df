"""A latent cache in aspect-ratio buckets: each picture in its own shape, batches as its pictures would make them."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from ldm.config.errors import UserError
from ldm.data.buckets import Buckets, bucket_stage
from ldm.data.cache import CacheOptions, write_cache
from ldm.data.cached import CachedLatents
from ldm.data.dataset import draw_flips
from ldm.data.folder import FolderData, FolderSource
from ldm.data.images import mirrored
from ldm.data.loader import batches
from ldm.formats.atomic import folder_hash

CHOSEN = Buckets(step=8)
OPTIONS = {"autoencoder": "aaaa", "resolution": 32, "seed": 3, "shard_images": 7, "buckets": CHOSEN}
SIZES = [(48, 48), (80, 40), (40, 70), (61, 40)]


def encode(image: Tensor) -> tuple[Tensor, Tensor]:
    mean = torch.nn.functional.avg_pool2d(image, 4)
    return mean, 0.1 + 0.01 * mean.abs()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> FolderData:
    root = tmp_path_factory.mktemp("photos")
    for i in range(24):
        width, height = SIZES[i * i % 7 % 4]
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (height, width, 3), dtype=np.uint8)).save(root / f"{i:02}.png")
        (root / f"{i:02}.txt").write_text(f"picture {i}")
    return FolderSource(path=str(root), min_side=8).build("train")


@pytest.mark.parametrize("in_memory_bytes", [0, 2**30])
def test_each_sample_is_what_the_encoder_said_of_its_shape(tmp_path: Path, data: FolderData, in_memory_bytes: int) -> None:
    told: list[int] = []
    write_cache(tmp_path, data, encode, CacheOptions(flip=True, **OPTIONS), on_images=told.append, batch=3)
    latents = CachedLatents(tmp_path, in_memory_bytes)
    assert sum(told) == len(latents) == len(data)
    kept = latents.buckets()
    assert kept is not None
    shapes, bucket = kept
    assert list(shapes) == CHOSEN.shapes(32) and len(set(bucket.tolist())) > 2
    sizes = data.sizes()
    assert sizes is not None and latents.sizes().tolist() == sizes.tolist()  # type: ignore[union-attr]
    for number in set(bucket.tolist()):
        index = np.flatnonzero(bucket == number).tolist()
        position = [100 + i for i in index]
        found = latents.load(index, position, shapes[number], 5, True)
        images = data.load(index, index, shapes[number], 3, False)
        flips = torch.tensor(draw_flips(5, position, True))
        mean, std = encode(torch.where(flips[:, None, None, None], images.image.flip(-1), images.image))
        assert found.mean.shape[2:] == (shapes[number][0] // 4, shapes[number][1] // 4)
        assert torch.equal(found.mean, mean.half().float()) and torch.equal(found.std, std.half().float())  # type: ignore[arg-type]
        assert torch.equal(found.size, torch.where(flips[:, None], mirrored(images.size), images.size))
        assert list(found.caption) == data.captions(index, position, 5)


def test_batches_hold_the_samples_that_the_pictures_would(tmp_path: Path, data: FolderData) -> None:
    write_cache(tmp_path, data, encode, CacheOptions(**OPTIONS), batch=3)
    latents = CachedLatents(tmp_path)
    own, seen = (bucket_stage(source, CHOSEN, resolution=32, seed=9, batch=4, steps=20) for source in (latents, data))
    assert own is not None and seen is not None and own.rows == seen.rows
    options = {"seed": 9, "batch": 4, "stop": 20}
    for ours, theirs in zip(batches(latents, order=own.order, **options), batches(data, order=seen.order, **options), strict=True):
        assert ours.caption == theirs.caption
        assert tuple(4 * side for side in ours.mean.shape[2:]) == tuple(theirs.image.shape[2:])


def test_ranks_share_the_work_and_restarts_keep_what_is_there(tmp_path: Path, data: FolderData) -> None:
    write_cache(tmp_path / "one", data, encode, CacheOptions(**OPTIONS), batch=3)
    for rank in (1, 0):
        write_cache(tmp_path / "two", data, encode, CacheOptions(**OPTIONS), rank=rank, world=2, workers=2, batch=3)
    write_cache(tmp_path / "two", data, lambda image: pytest.fail("all is there"), CacheOptions(**OPTIONS), batch=3)
    assert folder_hash(tmp_path / "one") == folder_hash(tmp_path / "two")


def test_other_shapes_are_another_cache(tmp_path: Path, data: FolderData) -> None:
    write_cache(tmp_path, data, encode, CacheOptions(**OPTIONS), batch=3)
    first = CachedLatents(tmp_path)
    first.require_shapes(CHOSEN.shapes(32))
    with pytest.raises(UserError, match="24x40, 32x32, 40x24, not squares"):
        first.require_shapes([])
    with pytest.raises(UserError, match="40x24, not 32x32; encode"):
        first.require_shapes(Buckets(step=16).shapes(32))
    with pytest.raises(UserError, match="it cannot be read in another shape"):
        first.load([0], [0], (16, 48), 0, False)
    write_cache(tmp_path, data, encode, CacheOptions(**(OPTIONS | {"buckets": None})), batch=3)
    second = CachedLatents(tmp_path)
    assert second.buckets() is None and second.sizes() is None and second.fingerprint() != first.fingerprint()
    assert second.load([0], [0], 32, 0, False).mean.shape[2:] == (8, 8)
    with pytest.raises(UserError, match="in squares, not 24x40"):
        second.require_shapes(CHOSEN.shapes(32))


def test_squares_have_the_name_that_they_always_had(tmp_path: Path, data: FolderData) -> None:
    write_cache(tmp_path, data, encode, CacheOptions(**(OPTIONS | {"buckets": None})), batch=3)
    plan = CachedLatents(tmp_path).plan
    assert plan.hash == dataclasses.replace(plan, shapes=()).hash != dataclasses.replace(plan, shapes=((32, 32),)).hash


def test_a_latent_that_is_not_finite_is_named(tmp_path: Path, data: FolderData) -> None:
    def wrong(image: Tensor) -> tuple[Tensor, Tensor]:
        mean, std = encode(image)
        return mean / (0.0 if mean.shape[2] > mean.shape[3] else 1.0), std

    with pytest.raises(UserError, match=r"\d\d.png: its latent mean is not finite"):
        write_cache(tmp_path, data, wrong, CacheOptions(**OPTIONS), batch=3)
