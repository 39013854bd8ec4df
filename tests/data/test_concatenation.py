"""Several sources are one data set, in which each part's samples are what they are alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from tars import painted

from ldm.config.errors import UserError
from ldm.config.schema import build
from ldm.data.concatenation import Concatenation, ConcatenationSource
from ldm.data.dataset import loaded
from ldm.data.filter import Filter, filter_samples
from ldm.data.loader import batches
from ldm.data.order import shuffled
from ldm.data.scenes.source import ScenesSource


def paint(path: Path, number: int, size: tuple[int, int]) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(painted(number, size, {".jpg": "JPEG", ".png": "PNG", ".webp": "WEBP"}[path.suffix]))


def source(root: Path, repeats: int = 3) -> ConcatenationSource:
    return build(
        {
            "kind": "several",
            "parts": [
                {"source": {"kind": "folder", "path": str(root / "folder"), "val_share": 0.2}, "repeats": repeats},
                {"source": {"kind": "folder", "path": str(root / "more"), "caption": "another", "val_share": 0.2}},
            ],
        },
        ConcatenationSource,
        "test",
    )


@pytest.fixture
def places(tmp_path: Path) -> Path:
    for i in range(12):
        paint(tmp_path / "folder" / f"p{i:02d}.{('jpg', 'png', 'webp')[i % 3]}", i, (40 + 2 * i, 90 - i))
        (tmp_path / "folder" / f"p{i:02d}.txt").write_text(f"picture {i}\nanother word for {i}\n")
    for i in range(6):
        paint(tmp_path / "more" / f"m{i}.png", 40 + i, (60 + i, 50))
    return tmp_path


def test_each_sample_is_that_of_its_part_and_comes_as_often_as_it_repeats(places: Path) -> None:
    data = source(places).build("train")
    first, second = data.parts
    assert len(data) == 3 * len(first) + len(second)
    origins = [data.origin(i) for i in range(len(data))]
    assert [origins.count(first.origin(i)) for i in range(len(first))] == [3] * len(first)
    assert origins[3 * len(first) :] == [second.origin(i) for i in range(len(second))]
    index, position = [len(data) - 1, 0, len(first) + 2, 3 * len(first), 1], [5, 6, 7, 8, 9]
    for ask in (Concatenation.load, loaded):
        together = ask(data, index, position, 24, 1, True)
        assert together.position.tolist() == position and list(together.caption) == data.captions(index, position, 1)
        parts = [(second, len(second) - 1), (first, 0), (first, 2), (second, 0), (first, 1)]
        for row, (part, number) in enumerate(parts):
            alone = ask(part, [number], [position[row]], 24, 1, True)
            assert torch.equal(alone.image[0], together.image[row]) and alone.image.dtype == together.image.dtype
            assert torch.equal(alone.size[0], together.size[row]) and alone.caption[0] == together.caption[row]
    assert data.all_captions(index) == [part.all_captions([number])[0] for part, number in parts]
    sizes = data.sizes()
    assert sizes is not None and sizes.tolist() == [*first.sizes().tolist() * 3, *second.sizes().tolist()]  # type: ignore[attr-defined]


def test_an_epoch_has_every_sample_and_any_number_of_processes_sees_the_same(places: Path) -> None:
    data = source(places).build("train")
    order = shuffled(4, np.arange(len(data)), len(data))
    assert sorted(order.tolist()) == list(range(len(data)))
    (whole,) = batches(data, seed=4, batch=8, resolution=16, stop=1)
    halves = [next(batches(data, seed=4, batch=8, resolution=16, stop=1, rank=(rank, 2), workers=2)) for rank in (0, 1)]
    assert torch.equal(whole.image, torch.cat([half.image for half in halves])) and whole.caption == halves[0].caption + halves[1].caption


def test_held_out_samples_count_once_and_the_fingerprint_tells_the_repeats(places: Path) -> None:
    val = source(places).build("val")
    assert len(val) == sum(map(len, val.parts)) > 1
    assert source(places).build("train").fingerprint() == source(places).build("train").fingerprint()
    assert source(places, 2).build("train").fingerprint() != source(places).build("train").fingerprint()


def test_filters_and_counts_see_all_parts(places: Path) -> None:
    (places / "more" / "bad.jpg").write_bytes(b"no picture")
    data = source(places).build("train")
    told = data.describe()
    assert told["kind"] == "several" and told["images"] == len(data) and told["rejected"] == {"not an image": 1}
    assert "bad.jpg" in str(told["rejected_files"])
    kept = filter_samples(data, Filter(min_side=50), "here")
    assert 0 < len(kept) < len(data)
    sizes = data.sizes()
    assert sizes is not None and len(kept) == int((sizes.min(1) >= 50).sum())


def test_numbers_and_bytes_and_parts_that_know_nothing_go_together(places: Path) -> None:
    scenes = ScenesSource(tier="one", images=4, val=2, captions=1).build("train")
    data = Concatenation([source(places).build("train"), scenes], [5, 6])
    batch = loaded(data, [0, 10, 5], [0, 1, 2], 32, 0, False)
    assert batch.image.dtype == torch.float32 and torch.equal(batch.image[2], scenes.load([0], [2], 32, 0, False).image[0])
    assert torch.equal(batch.image[1], scenes.load([1], [1], 32, 0, False).image[0])  # the sixth of four is the second
    assert data.sizes() is None and len(data.fields().height) == 11 and np.isnan(data.fields().aesthetic).all()


def test_wrong_parts_are_told(places: Path) -> None:
    with pytest.raises(UserError, match="parts: none; give at least one source"):
        ConcatenationSource(parts=())
    with pytest.raises(UserError, match=r"parts\.0\.source\.pth: .*did you mean path"):
        build({"kind": "several", "parts": [{"source": {"kind": "folder", "pth": "x"}}]}, ConcatenationSource, "test")
    with pytest.raises(UserError, match="nowhere is not a folder"):
        build({"kind": "several", "parts": [{"source": {"kind": "folder", "path": "nowhere"}}]}, ConcatenationSource, "test").build("train")
