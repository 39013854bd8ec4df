"""Filters against a plain reading of the same columns, and what they refuse."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.config.errors import UserError
from ldm.data.filter import Filter, FilteredSamples, filter_samples
from ldm.data.folder import FolderSource
from ldm.data.scenes.source import ScenesSource

WEB = ScenesSource(tier="one", images=400, val=4, web=True).build("train")


@pytest.mark.parametrize(
    "chosen",
    [Filter(min_side=128), Filter(min_aesthetic=5), Filter(max_watermark=0.5), Filter(min_side=128, min_aesthetic=5, max_watermark=0.5)],
)
def test_the_web_corpus_is_filtered_by_its_columns(chosen: Filter) -> None:
    columns = WEB.web(np.arange(len(WEB)))
    wanted = [
        i
        for i in range(len(WEB))
        if columns.original_px[i] >= chosen.min_side
        and (not chosen.min_aesthetic or columns.aesthetic[i] > chosen.min_aesthetic)
        and (chosen.max_watermark == 1 or columns.p_watermark[i] < chosen.max_watermark)
    ]
    data = filter_samples(WEB, chosen, "filter")
    assert isinstance(data, FilteredSamples) and data.kept.tolist() == wanted and 0 < len(wanted) < len(WEB)
    assert data.describe()["images"] == len(wanted) and data.origin(1) == WEB.origin(wanted[1])


def test_samples_are_the_data_s_own_at_the_same_positions() -> None:
    data = filter_samples(WEB, Filter(min_aesthetic=6), "filter")
    assert isinstance(data, FilteredSamples)
    rows = [int(i) for i in data.kept[[3, 0, 7]]]
    ours, theirs = data.load([3, 0, 7], [10, 11, 12], 16, 5, False), WEB.load(rows, [10, 11, 12], 16, 5, False)
    assert torch.equal(ours.image, theirs.image) and ours.caption == theirs.caption == tuple(data.captions([3, 0, 7], [10, 11, 12], 5))
    assert torch.equal(ours.size, theirs.size) and data.all_captions([3]) == WEB.all_captions(rows[:1])
    assert data.mirrors == WEB.mirrors and float(data.fields().aesthetic.min()) > 6


def test_nothing_asked_is_the_data_itself_and_what_is_asked_is_in_the_fingerprint() -> None:
    assert filter_samples(WEB, Filter(), "filter") is WEB
    prints = {filter_samples(WEB, Filter(min_aesthetic=score), "filter").fingerprint() for score in (0, 4, 5, 6)}
    assert len(prints) == 4
    assert filter_samples(WEB, Filter(min_aesthetic=5), "").fingerprint() == filter_samples(WEB, Filter(min_aesthetic=5), "").fingerprint()


@pytest.mark.parametrize(
    ("chosen", "said"),
    [
        (Filter(min_aesthetic=5), r"stages.x.filter.min_aesthetic: this data \(scenes\) tells no aesthetic scores"),
        (Filter(max_watermark=0.5), "max_watermark: .* tells no watermark probabilities"),
        (Filter(min_side=64), "min_side: .* tells no original sizes"),
    ],
)
def test_data_without_the_column_refuses_by_its_name(chosen: Filter, said: str) -> None:
    plain = ScenesSource(tier="one", images=8, val=2).build("train")
    with pytest.raises(UserError, match=said):
        filter_samples(plain, chosen, "stages.x.filter")


def test_a_filter_that_nothing_passes_says_how_many_pass_each_part() -> None:
    with pytest.raises(UserError, match=r"x: none of 400 samples passes \(min_side alone keeps [1-9]\d*, min_aesthetic alone keeps 0\)"):
        filter_samples(WEB, Filter(min_side=64, min_aesthetic=11), "x")


def photographs(folder: Path) -> Path:
    """Five pictures; the table tells scores of four of them, and that the last was larger once."""
    folder.mkdir()
    rows = []
    for i, (side, aesthetic, watermark) in enumerate([(40, 6.0, 0.1), (64, 5.0, 0.1), (80, 7.0, 0.9), (96, None, None), (48, 5.5, 0.2)]):
        Image.new("RGB", (side, side + 10), (40 * i, 0, 0)).save(folder / f"{i}.png")
        row: dict[str, object] = {"file_name": f"{i}.png", "text": f"picture {i}"}
        if aesthetic is not None:
            row |= {"aesthetic": aesthetic, "pwatermark": watermark}
        rows.append(row | ({"original_width": 500, "original_height": 400} if i == 4 else {}))
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return folder


def test_a_folder_knows_sizes_and_what_its_table_tells(tmp_path: Path) -> None:
    folder = photographs(tmp_path / "photos")
    source = FolderSource(path=str(folder), val_share=0.01)
    data = source.build("train")

    def kept(chosen: Filter) -> set[str]:
        sifted = filter_samples(data, chosen, "filter")
        return {caption for (caption,) in sifted.all_captions(list(range(len(sifted))))}

    there = {caption for (caption,) in data.all_captions(list(range(len(data))))}
    assert kept(Filter(min_side=64)) == there & {"picture 1", "picture 2", "picture 3", "picture 4"}
    assert kept(Filter(min_side=400)) == {"picture 4"} & there
    assert kept(Filter(min_aesthetic=5)) == there & {"picture 0", "picture 2", "picture 4"}  # more than 5; unknown is left out
    assert kept(Filter(min_aesthetic=5, max_watermark=0.5)) == there & {"picture 0", "picture 4"}


def test_what_is_no_probability_is_unknown(tmp_path: Path) -> None:
    folder = photographs(tmp_path / "photos")
    told = [-1, 2, 0.9, "nan", 0.0]
    rows = [json.dumps({"file_name": f"{i}.png", "text": f"picture {i}", "pwatermark": value}) for i, value in enumerate(told)]
    (folder / "metadata.jsonl").write_text("\n".join(rows), encoding="utf-8")
    data = FolderSource(path=str(folder), val_share=0).build("train")
    sifted = filter_samples(data, Filter(max_watermark=0.5), "filter")
    assert sifted.all_captions(list(range(len(sifted)))) == [["picture 4"]]


def test_a_folder_without_scores_refuses(tmp_path: Path) -> None:
    folder = photographs(tmp_path / "photos")
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    text = "\n".join(json.dumps({k: row[k] for k in ("file_name", "text")}) for row in rows)
    (folder / "metadata.jsonl").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=r"min_aesthetic: this data \(folder\) tells no aesthetic scores \(column aesthetic\)"):
        filter_samples(FolderSource(path=str(folder)).build("train"), Filter(min_aesthetic=5), "filter")
