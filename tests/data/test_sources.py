"""Every source builds a data set that keeps the one contract, and its kind picks it."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import TypeAdapter

from ldm.data.cache import CacheOptions, write_cache
from ldm.data.cached import CachedLatents
from ldm.data.dataset import DataSet, Samples, draw_captions, draw_flips, loaded
from ldm.data.filter import Filter, FilteredSamples
from ldm.data.folder import FolderSource
from ldm.data.loader import batches
from ldm.data.sources import Source


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import datasets

    root = tmp_path_factory.mktemp("sources") / "photos"
    root.mkdir()
    for i in range(6):
        pixels = np.random.default_rng(i).integers(0, 256, (40, 50, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / f"{i}.png")
        (root / f"{i}.txt").write_text(f"photograph {i}\nnumber {i}")
    (root.parent / "shards").mkdir()
    with tarfile.open(root.parent / "shards" / "00000.tar", "w") as tar:
        for file in sorted(root.iterdir()):
            tar.add(file, file.name)
    rows = {"image": [str(root / f"{i}.png") for i in range(6)], "text": [[f"photograph {i}", f"number {i}"] for i in range(6)]}
    datasets.disable_progress_bars()
    datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image()).save_to_disk(root.parent / "saved")
    return root


def kinds(photos: Path) -> dict[str, dict[str, object]]:
    return {
        "folder": {"kind": "folder", "path": str(photos), "val_share": 0.3},
        "scenes": {"kind": "scenes", "tier": "T1", "images": 40, "val": 6},
        "shards": {"kind": "shards", "path": str(photos.parent / "shards"), "val_share": 0.3},
        "datasets": {"kind": "datasets", "path": str(photos.parent / "saved"), "val_share": 0.3},
    }


@pytest.mark.parametrize("kind", ["folder", "shards", "datasets"])
@pytest.mark.parametrize("workers", [0, 2])
def test_pictures_are_bytes_until_they_are_on_a_device(photos, kind, workers):
    data: DataSet = TypeAdapter(Source).validate_python(kinds(photos)[kind]).build("train")
    for source in (data, FilteredSamples(data, np.arange(len(data)), Filter())):
        index, position = [0, 2, 1, 0], [11, 12, 13, 14]
        seen, own = loaded(source, index, position, (24, 32), 5, True), source.load(index, position, (24, 32), 5, True)
        assert seen.image.dtype == torch.uint8 and torch.equal(seen.to("cpu").image, own.image)
        assert seen.caption == own.caption and torch.equal(seen.size, own.size)
        (batch,) = batches(source, seed=1, batch=4, resolution=24, stop=1, workers=workers)
        assert batch.image.dtype == torch.uint8 and batch.to("cpu").image.dtype == torch.float32


@pytest.mark.parametrize("kind", ["folder", "scenes", "shards", "datasets"])
@pytest.mark.parametrize("split", ["train", "val"])
def test_every_source_keeps_the_contract(photos, kind, split):
    source = TypeAdapter(Source).validate_python(kinds(photos)[kind])
    assert source.kind == kind
    data: DataSet = source.build(split)
    index, position = [0, len(data) - 1, 0], [11, 12, 13]
    batch = data.load(index, position, 32, 5, True)
    assert batch.image.shape == (3, 3, 32, 32) and batch.image.dtype == torch.float32
    assert batch.image.abs().max() <= 1 and batch.size.shape == (3, 6) and batch.position.tolist() == position
    assert batch.size[:, 4:].tolist() == [[32, 32]] * 3
    assert list(batch.caption) == data.captions(index, position, 5)
    for row, (i, p) in enumerate(zip(index, position, strict=True)):
        alone = data.load([i], [p], 32, 5, True)
        assert torch.equal(alone.image[0], batch.image[row]) and alone.caption[0] == batch.caption[row]
        assert batch.caption[row] in data.all_captions([i])[0] and data.origin(i)
    assert data.fingerprint() == source.build(split).fingerprint()
    assert data.fingerprint() != source.build("val" if split == "train" else "train").fingerprint()
    json.dumps(data.describe())
    assert data.describe()["fingerprint"] == data.fingerprint() and data.describe()["kind"] == kind
    nothing = data.captions([], [], 0)
    assert nothing == []


@pytest.mark.parametrize("kind", ["folder", "scenes", "shards", "datasets"])
def test_every_source_can_be_cached(photos, kind, tmp_path):
    data = TypeAdapter(Source).validate_python(kinds(photos)[kind]).build("val")
    write_cache(tmp_path, data, lambda x: (x[:, :, ::8, ::8], None), CacheOptions(autoencoder="a", resolution=32, images=6))
    latents: Samples = CachedLatents(tmp_path)
    count = min(6, len(data))
    batch = latents.load(range(count), range(count), 32, 0, False)
    image = data.load(range(count), range(count), 32, 0, False)
    assert torch.equal(batch.mean, image.image[:, :, ::8, ::8].half().float())
    assert torch.equal(batch.size, image.size)
    assert all(c in data.all_captions([i])[0] for i, c in enumerate(batch.caption))


@pytest.mark.parametrize("kind", ["folder", "scenes", "shards", "datasets"])
def test_flips_leave_captions_true_cached_or_not(photos, kind, tmp_path):
    data = TypeAdapter(Source).validate_python(kinds(photos)[kind]).build("train")
    write_cache(tmp_path, data, lambda x: (x[:, :, ::8, ::8], None), CacheOptions(autoencoder="a", resolution=32, images=2, flip=True))
    index, position = [0] * 8, range(8)
    latents = CachedLatents(tmp_path)
    flipped, plain = (latents.load(index, position, 32, 0, flip).mean for flip in (True, False))
    assert latents.mirrors == data.mirrors == (not torch.equal(flipped, plain))
    # Scenes are drawn by index alone, so a flip would show in the images themselves.
    if not data.mirrors:
        assert torch.equal(*(data.load(index, position, 32, 0, flip).image for flip in (True, False)))


def test_half_of_the_positions_are_mirrored_if_any():
    assert draw_flips(0, range(5), False) == [False] * 5 and draw_flips(0, [], True) == []
    flips = draw_flips(0, range(1000), True)
    assert 430 < sum(flips) < 570 and flips[17:19] == draw_flips(0, [17, 18], True)


def test_captions_are_drawn_evenly_and_by_position():
    choices = [["one"], ["a", "b", "c"]] * 600
    drawn = draw_captions(choices, range(1200), 4)
    assert drawn[::2] == ["one"] * 600
    assert all(150 < drawn.count(word) < 250 for word in "abc")
    assert draw_captions(choices[1:2], [1], 4) == drawn[1:2]


def test_a_folder_source_is_plain_data():
    assert TypeAdapter(FolderSource).dump_python(FolderSource(path="x"))["path"] == "x"
