"""A hundred thousand samples from a folder, from shards and from parquet: `python -m pytest -m soak -s tests/soak/test_loading_soak.py`."""

from __future__ import annotations

import io
import os
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as arrow
import pyarrow.parquet as parquet
import pytest
from PIL import Image
from tars import shard

from ldm.data.folder import FolderSource
from ldm.data.hugging_face import DatasetsSource
from ldm.data.loader import batches
from ldm.data.shards import ShardsSource

pytestmark = [pytest.mark.soak, pytest.mark.timeout(3600), pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="no /proc here")]
SAMPLES, BATCH, WARM = 100_000, 200, 20_000


def resident_mb() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def picture(number: int) -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.random.default_rng(number).integers(0, 256, (5, 6, 3), dtype=np.uint8)).resize((48, 40)).save(out, "JPEG")
    return out.getvalue()


def folder(root: Path) -> Any:
    for number in range(300):
        (root / f"{number:03}.jpg").write_bytes(picture(number))
        (root / f"{number:03}.txt").write_text(f"picture {number}")
    return FolderSource(path=str(root))


def shards(root: Path) -> Any:
    for number in range(6):
        shard(root, number, 50)
    return ShardsSource(path=str(root))


def table(root: Path) -> Any:
    rows = {"image": [{"bytes": picture(i), "path": None} for i in range(300)], "text": [f"picture {i}" for i in range(300)]}
    parquet.write_table(arrow.table(rows), root / "rows.parquet")
    return DatasetsSource(path=str(root))


@pytest.mark.parametrize("make", [folder, shards, table])
def test_nothing_is_left_open_and_nothing_grows(make: Any, tmp_path: Path) -> None:
    data = make(tmp_path).build("train")
    feed = batches(data, seed=0, batch=BATCH, resolution=32, stop=SAMPLES // BATCH, workers=2)
    seen, started, before = 0, time.monotonic(), (0.0, 0, 0)
    for batch in feed:
        seen += len(batch.position)
        if seen == WARM:
            before = resident_mb(), len(os.listdir("/proc/self/fd")), threading.active_count()
    after = resident_mb(), len(os.listdir("/proc/self/fd")), threading.active_count()
    rate = seen / (time.monotonic() - started)
    grown = f"{after[0] - before[0]:+.1f} MB, {after[1] - before[1]:+d} files open"
    print(f"\n{make.__name__}: {seen:,} samples, {rate:,.0f} a second; from {WARM:,} on {grown}")
    assert seen == SAMPLES and after[0] - before[0] < 40 and after[1] <= before[1] + 2
