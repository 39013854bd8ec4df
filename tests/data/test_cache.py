"""A latent cache is whole or resumable, holds what the encoder said, and refuses everything it was not made for."""

from __future__ import annotations

import errno
import itertools
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import ldm.formats.atomic as checkpoint
from ldm.config.errors import UserError
from ldm.data.cache import CacheOptions, seal, write_cache
from ldm.data.cached import CachedLatents
from ldm.data.dataset import draw_flips
from ldm.data.folder import FolderData, FolderSource
from ldm.data.images import mirrored
from ldm.data.loader import batches
from ldm.diffusion.batch import MomentBatch
from ldm.formats.atomic import folder_hash, verify

PIXELS = 16


def encode(image: Tensor) -> tuple[Tensor, Tensor]:
    """Stands for an autoencoder: what it gives depends on every pixel and on nothing else."""
    mean = torch.nn.functional.avg_pool2d(image, 4)
    return mean, 0.1 + 0.01 * mean.abs()


def encode_vq(image: Tensor) -> tuple[Tensor, None]:
    return encode(image)[0], None


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> FolderData:
    root = tmp_path_factory.mktemp("photos")
    for i in range(12):
        pixels = np.random.default_rng(i).integers(0, 256, (20 + i, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / f"{i:02d}.png")
        (root / f"{i:02d}.txt").write_text("\n".join(f"word {k} of {i}" for k in range(1 + i % 3)))
    return FolderSource(path=str(root), min_side=8).build("train")


OPTIONS = {"autoencoder": "aaaa", "resolution": PIXELS, "seed": 3, "shard_images": 4}


def test_it_gives_back_what_the_encoder_said(tmp_path, data):
    told: list[int] = []
    write_cache(tmp_path, data, encode, CacheOptions(normalisation={"mean": [0.0]}, **OPTIONS), on_images=told.append, batch=2)
    latents = CachedLatents(tmp_path)
    assert len(latents) == len(data) == sum(told) == 11 and told == [2, 2, 2, 2, 2, 1]
    index, position = [10, 0, 4, 4], [100, 101, 102, 103]
    batch = latents.load(index, position, PIXELS, 9, False)
    images = data.load(index, index, PIXELS, 3, False)
    mean, std = encode(images.image)
    assert isinstance(batch, MomentBatch) and batch.mean.dtype == torch.float32 and batch.mean.shape == (4, 3, 4, 4)
    assert torch.equal(batch.mean, mean.half().float()) and torch.equal(batch.std, std.half().float())
    assert (batch.mean - mean).abs().max() <= 2**-11
    assert torch.equal(batch.size, images.size) and batch.position.tolist() == position
    # The same words at the same positions as the images themselves would have.
    assert list(batch.caption) == data.captions(index, position, 9) == latents.captions(index, position, 9)
    assert latents.all_captions(range(11)) == data.all_captions(range(11))
    assert "shard-000002" in latents.origin(10)
    described = latents.describe()
    assert described["images"] == 11 and described["shape"] == [3, 4, 4] and described["autoencoder"] == "aaaa"
    assert described["normalisation"] == {"mean": [0.0]} and described["data"] == data.fingerprint()
    json.dumps(described)
    verify(tmp_path)  # one manifest over the whole, as every product has


def test_all_captions_of_an_image_come_up(tmp_path, data):
    write_cache(tmp_path, data, encode, CacheOptions(**OPTIONS), batch=2)
    latents = CachedLatents(tmp_path)
    index = next(i for i, words in enumerate(data.all_captions(range(11))) if len(words) == 3)
    drawn = latents.captions([index] * 60, range(60), 0)
    assert set(drawn) == set(data.all_captions([index])[0])


def test_vq_has_no_deviation(tmp_path, data):
    write_cache(tmp_path, data, encode_vq, CacheOptions(**OPTIONS), batch=2)
    batch = CachedLatents(tmp_path).load([1], [1], PIXELS, 0, False)
    assert batch.std is None and batch.mean.shape == (1, 3, 4, 4)


def test_mirrored_copies(tmp_path, data):
    write_cache(tmp_path, data, encode, CacheOptions(flip=True, **OPTIONS), batch=2)
    latents = CachedLatents(tmp_path)
    index, position = [1, 5, 9] * 10, range(30)
    flips = draw_flips(2, position, True)
    batch = latents.load(index, position, PIXELS, 2, True)
    images = data.load(index, index, PIXELS, 3, False)
    expected = torch.stack([x.flip(-1) if f else x for x, f in zip(images.image, flips, strict=True)])
    assert 5 < sum(flips) < 25
    assert torch.equal(batch.mean, encode(expected)[0].half().float())
    assert torch.equal(batch.size, torch.where(torch.tensor(flips)[:, None], mirrored(images.size), images.size))
    assert torch.equal(latents.load(index, position, PIXELS, 2, False).mean, encode(images.image)[0].half().float())


def test_a_part_of_the_data_can_be_encoded(tmp_path, data):
    write_cache(tmp_path, data, encode, CacheOptions(images=5, **OPTIONS), batch=2)
    assert len(CachedLatents(tmp_path)) == 5


def test_the_loader_reads_it_and_mapping_changes_nothing(tmp_path, data):
    write_cache(tmp_path, data, encode, CacheOptions(**OPTIONS), batch=2)
    whole, mapped = CachedLatents(tmp_path), CachedLatents(tmp_path, in_memory_bytes=0)
    assert whole.in_memory and not mapped.in_memory and whole.fingerprint() == mapped.fingerprint()
    options = {"seed": 1, "batch": 4, "resolution": PIXELS, "stop": 6}
    for a, b in zip(batches(whole, **options), batches(mapped, workers=2, **options), strict=True):
        assert torch.equal(a.mean, b.mean) and torch.equal(a.std, b.std) and a.caption == b.caption


def test_ranks_share_the_work_and_workers_change_nothing(tmp_path, data):
    write_cache(tmp_path / "one", data, encode, CacheOptions(**OPTIONS), batch=2)
    for rank in (1, 0):
        write_cache(tmp_path / "two", data, encode, CacheOptions(**OPTIONS), rank=rank, world=2, workers=2, batch=2)
    seal(tmp_path / "two")
    assert folder_hash(tmp_path / "one") == folder_hash(tmp_path / "two")


def test_an_unfinished_cache_cannot_be_sealed_or_read(tmp_path, data):
    write_cache(tmp_path, data, encode, CacheOptions(**OPTIONS), rank=0, world=2, batch=2)
    with pytest.raises(UserError, match=r"shard-000001: missing"):
        seal(tmp_path)
    with pytest.raises(UserError, match=r"1 of 3 shards missing \(shard-000001\)"):
        CachedLatents(tmp_path)
    with pytest.raises(UserError, match="no latent cache here"):
        CachedLatents(tmp_path / "nowhere")


def test_it_goes_on_after_an_interruption_shard_by_shard(tmp_path, data):
    write_cache(tmp_path / "straight", data, encode, CacheOptions(**OPTIONS), batch=2)
    calls = 0

    def interrupted(image: Tensor) -> tuple[Tensor, Tensor]:
        nonlocal calls
        calls += 1
        if calls == 4:  # in the middle of the second shard
            raise KeyboardInterrupt
        return encode(image)

    with pytest.raises(KeyboardInterrupt):
        write_cache(tmp_path / "stopped", data, interrupted, CacheOptions(**OPTIONS), batch=2)
    assert {p.name for p in (tmp_path / "stopped").iterdir()} == {"cache.json", "shard-000000"}
    told: list[int] = []
    write_cache(tmp_path / "stopped", data, interrupted, CacheOptions(**OPTIONS), on_images=told.append, batch=2)
    assert calls == 4 + 4 and told == [4, 2, 2, 2, 1]
    assert folder_hash(tmp_path / "stopped") == folder_hash(tmp_path / "straight")


def test_it_survives_being_killed_anywhere(tmp_path, data):
    write_cache(tmp_path / "straight", data, encode, CacheOptions(**OPTIONS), batch=2)

    def killed_after(left: int) -> int:
        """The signal that ended a child process which was killed at its `left`-th sync."""
        if child := os.fork():
            return os.waitpid(child, 0)[1]
        try:
            torch.set_num_threads(1)
            sync, done = checkpoint._sync, 0

            def count(path: Path) -> None:
                nonlocal done
                done += 1
                if done == left:
                    os.kill(os.getpid(), 9)
                sync(path)

            checkpoint._sync = count
            write_cache(tmp_path / "killed", data, encode, CacheOptions(**OPTIONS), batch=2)
        finally:
            os._exit(0)

    # At the plan, in the first shard, after its rename, in the last shard, at the manifest over all; and then never.
    assert [killed_after(left) for left in (1, 3, 6, 8, 7, 100)] == [9, 9, 9, 9, 9, 0]
    assert folder_hash(tmp_path / "killed") == folder_hash(tmp_path / "straight")


def test_another_plan_makes_every_shard_anew(tmp_path, data):
    write_cache(tmp_path, data, encode, CacheOptions(**OPTIONS), batch=2)
    first = CachedLatents(tmp_path)
    write_cache(tmp_path, data, encode, CacheOptions(**(OPTIONS | {"autoencoder": "bbbb", "shard_images": 6})), batch=2)
    second = CachedLatents(tmp_path)
    assert second.plan.autoencoder == "bbbb" and second.fingerprint() != first.fingerprint()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cache.json", "manifest.json", "shard-000000", "shard-000001"]
    with pytest.raises(UserError, match=r"made with autoencoder bbbb, not aaaa"):
        second.require(autoencoder="aaaa")
    with pytest.raises(UserError, match=r"resolution 16, not 32"):
        second.load([0], [0], 32, 0, False)
    with pytest.raises(UserError, match="no mirrored copies"):
        second.load([0], [0], PIXELS, 0, True)
    second.require(autoencoder="bbbb", resolution=PIXELS, data=data.fingerprint())


def test_a_cache_that_is_not_to_be_replaced_is_refused_and_its_own_goes_on(tmp_path, data):
    write_cache(tmp_path, data, encode, CacheOptions(**OPTIONS), batch=2, replaces=False)
    first = folder_hash(tmp_path)
    changes: list[tuple[dict[str, object], str]] = [
        ({"autoencoder": "bbbb"}, "autoencoder"),
        ({"resolution": 2 * PIXELS}, rf"resolution \({PIXELS}, not {2 * PIXELS}\)"),
    ]
    for (change, said), rank in itertools.product(changes, (0, 1)):
        with pytest.raises(UserError, match=f"holds a cache of another {said}; give another --out, or remove it first"):
            write_cache(tmp_path, data, encode, CacheOptions(**(OPTIONS | change)), batch=2, replaces=False, rank=rank, world=2)
    write_cache(tmp_path, data, lambda image: pytest.fail("all is there"), CacheOptions(**OPTIONS), batch=2, replaces=False)
    assert folder_hash(tmp_path) == first
    shutil.rmtree(tmp_path / "shard-000001")
    (tmp_path / "manifest.json").unlink()
    with pytest.raises(UserError, match="holds a cache of another autoencoder"):  # parts may be working on it
        write_cache(tmp_path, data, encode, CacheOptions(**(OPTIONS | {"autoencoder": "bbbb"})), batch=2, replaces=False)
    write_cache(tmp_path, data, encode, CacheOptions(**OPTIONS), batch=2, replaces=False)
    assert folder_hash(tmp_path) == first


def test_shards_of_two_plans_are_never_mixed(tmp_path, data):
    write_cache(tmp_path / "a", data, encode, CacheOptions(**OPTIONS), batch=2)
    write_cache(tmp_path / "b", data, encode, CacheOptions(**(OPTIONS | {"autoencoder": "bbbb"})), batch=2)
    (tmp_path / "a" / "shard-000001").rename(tmp_path / "old")
    (tmp_path / "b" / "shard-000001").rename(tmp_path / "a" / "shard-000001")
    for refuses in (CachedLatents, seal):
        with pytest.raises(UserError, match="made for another autoencoder"):
            refuses(tmp_path / "a")


def test_damage_is_refused_by_name_and_mended_by_a_second_run(tmp_path, data):
    write_cache(tmp_path, data, encode, CacheOptions(**OPTIONS), batch=2)
    whole = folder_hash(tmp_path)
    file = tmp_path / "shard-000001" / "moments.safetensors"
    raw = bytearray(file.read_bytes())
    raw[-5] ^= 1
    file.write_bytes(raw)
    with pytest.raises(UserError, match=r"shard-000001: damaged"):
        CachedLatents(tmp_path)
    write_cache(tmp_path, data, encode, CacheOptions(**OPTIONS), batch=2)
    assert folder_hash(tmp_path) == whole


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e6])
def test_what_is_not_finite_is_never_stored(tmp_path, data, bad):
    def overflows(image: Tensor) -> tuple[Tensor, Tensor]:
        mean, std = encode(image)
        mean[1, 0, 0, 0] = bad
        return mean, std

    with pytest.raises(UserError, match=rf"{Path(data.origin(1)).name}.*latent mean is not finite"):
        write_cache(tmp_path, data, overflows, CacheOptions(**OPTIONS), batch=2)
    assert not list(tmp_path.glob("*shard*"))


def test_a_full_disk_is_one_clear_error_and_leaves_nothing_half(tmp_path, data, monkeypatch):
    write = Path.write_bytes
    written = 0

    def full(self: Path, content: bytes) -> int:
        nonlocal written
        written += 1
        if written == 2:
            write(self, content[: len(content) // 2])
            raise OSError(errno.ENOSPC, "No space left on device", str(self))
        return write(self, content)

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(UserError, match=r"the disk is full \(No space left on device; \d+ MiB free\)"):
        write_cache(tmp_path, data, encode, CacheOptions(**OPTIONS), batch=2)
    assert {p.name for p in tmp_path.iterdir()} == {"cache.json", "shard-000000"}
    write_cache(tmp_path, data, encode, CacheOptions(**OPTIONS), batch=2)
    assert len(CachedLatents(tmp_path)) == 11


def test_other_errors_of_the_disk_stay_what_they_are(tmp_path, data):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError):
        write_cache(tmp_path / "file" / "below", data, encode, CacheOptions(**OPTIONS), batch=2)


def test_nothing_to_encode_is_refused(tmp_path, data):
    with pytest.raises(UserError, match="nothing to encode"):
        write_cache(tmp_path, data, encode, CacheOptions(images=0, **OPTIONS), batch=2)
