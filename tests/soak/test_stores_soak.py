"""What reading from a store costs: requests, bytes and seconds, with and without blocks, and how long it takes to begin.

`python -m pytest -m soak -s tests/soak/test_stores_soak.py`: two minutes. The server is on this machine and answers 20 ms late.
"""

from __future__ import annotations

import io
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from stores import served
from tars import packed

from ldm.data import storage
from ldm.data.loader import batches
from ldm.data.order import BlockBatches
from ldm.data.shards import ShardsSource

pytestmark = pytest.mark.soak
pytest.importorskip("aiohttp", reason='of the extra "http"')

DELAY_S = 0.02
SHARDS, EACH, BATCH, STEPS = 8, 500, 32, 128


def picture(number: int) -> bytes:
    """A JPEG of about 45 kB."""
    rng = np.random.default_rng(number)
    coarse = Image.fromarray(rng.integers(0, 256, (24, 24, 3), dtype=np.uint8)).resize((384, 384), Image.Resampling.BICUBIC)
    noisy = np.asarray(coarse, np.int16) + rng.integers(-12, 13, (384, 384, 3))
    out = io.BytesIO()
    Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(out, "JPEG", quality=88)
    return out.getvalue()


def made(folder: Path) -> None:
    folder.mkdir()
    few = [picture(i) for i in range(50)]
    for shard in range(SHARDS):
        keys = [f"{shard:05d}{i:04d}" for i in range(EACH)]
        rows = [(f"{key}.jpg", few[(7 * shard + i) % 50]) for i, key in enumerate(keys)]
        texts = [(f"{key}.txt", f"picture {key}".encode()) for key in keys]
        told = [(f"{key}.json", f'{{"key": "{key}", "caption": "picture {key}", "width": 384, "height": 384}}'.encode()) for key in keys]
        (folder / f"{shard:05d}.tar").write_bytes(packed(member for row in zip(rows, texts, told, strict=True) for member in row))


def test_requests_and_bytes_of_a_sample(tmp_path, monkeypatch):
    monkeypatch.setenv("LDM_CACHE", str(tmp_path / "cache"))
    made(tmp_path / "shards")
    with served(tmp_path / "shards") as server:
        began = time.perf_counter()
        data = ShardsSource(path=f"{server.url}/{{00000..{SHARDS - 1:05d}}}.tar").build("train")
        print(f"\nindex of {SHARDS * EACH} samples, {server.sent / 1e6:.0f} MB: {time.perf_counter() - began:.1f} s")
        server.delay_s = DELAY_S
        orders = {"each by itself": None} | {f"blocks of {n}": BlockBatches(0, len(data), BATCH, [64], n) for n in (16, 64)}
        rates = {}
        for name, order in orders.items():
            server.asked.clear()
            server.sent, held, began = 0, 0, time.perf_counter()
            for _ in batches(data, seed=0, batch=BATCH, resolution=64, order=order, stop=STEPS, workers=4):
                held = max(held, data._ahead.held)
            seconds, samples = time.perf_counter() - began, BATCH * STEPS
            rates[name] = len(server.asked) / samples
            print(
                f"{name}: {rates[name]:.4f} requests and {server.sent / samples / 1e3:.1f} kB a sample,"
                f" {samples / seconds:.0f} samples/s, at most {held / 1e6:.0f} MB held"
            )
        assert rates["each by itself"] == 1 and rates["blocks of 64"] < 2.2 / 64


def test_opening_two_thousand_shards(tmp_path, monkeypatch):
    monkeypatch.setenv("LDM_CACHE", str(tmp_path / "cache"))
    for i in range(2000):
        (tmp_path / f"{i:05d}.tar").write_bytes(b"\0" * 1024)
    with served(tmp_path) as server:
        server.delay_s = DELAY_S
        began = time.perf_counter()
        assert len(storage.find_stats(f"{server.url}/{{00000..01999}}.tar", ".tar")) == 2000
        print(f"\n2000 shards looked at in {time.perf_counter() - began:.1f} s, {server.most} at a time, {len(server.asked)} requests")
