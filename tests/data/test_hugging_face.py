"""Tables of the `datasets` library become a data set: saved folders, parquet of bytes; the hub only when asked."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from tars import painted

from ldm.config.errors import UserError
from ldm.data.hugging_face import DatasetsData, DatasetsSource


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


def build(path: object, split: str = "train", **options: object) -> DatasetsData:
    return DatasetsSource(path=str(path), **options).build(split)  # type: ignore[arg-type]


def parquet(file: Path, count: int = 8, **columns: list[object]) -> Path:
    rows: dict[str, object] = {"image": [{"bytes": painted(i), "path": f"{i}.jpg"} for i in range(count)]}
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(rows | {"text": [f"picture {i}" for i in range(count)]} | columns), file, row_group_size=3)
    return file


def check(data: DatasetsData) -> None:
    for i in range(len(data)):
        row = int(data.name(i).removeprefix("row "))
        assert data.read(i) == painted(row) and data.all_captions([i]) == [[f"picture {row}"]]
    batch = data.load([0, 1, 0], [3, 4, 5], 16, 1, True)
    alone = data.load([1], [4], 16, 1, True)
    assert torch.equal(batch.image[1], alone.image[0]) and batch.caption[1] == alone.caption[0]
    json.dumps(data.describe())


def test_a_saved_folder_and_its_parts(tmp_path):
    import datasets

    features = datasets.Features({"words": datasets.Value("string"), "photo": datasets.Image()})
    rows = {"words": [f"picture {i}" for i in range(6)], "photo": [{"bytes": painted(i), "path": None} for i in range(6)]}
    table = datasets.Dataset.from_dict(rows, features=features)
    table.save_to_disk(tmp_path / "one")
    data, val = (build(tmp_path / "one", split, caption="words", val_share=0.3) for split in ("train", "val"))
    assert data.image_column == "photo" and len(data) + len(val) == 6 and not set(data._rows) & set(val._rows)
    check(data)
    assert data.fingerprint() == build(tmp_path / "one", caption="words", val_share=0.3).fingerprint() != val.fingerprint()
    datasets.DatasetDict({"train": table, "extra": table.select([4, 2, 3])}).save_to_disk(tmp_path / "two")
    extra = [build(tmp_path / "two", split, caption="words", part="extra") for split in ("train", "val")]
    assert sorted(c for d in extra for i in range(len(d)) for c in d.all_captions([i])[0]) == ["picture 2", "picture 3", "picture 4"]
    with pytest.raises(UserError, match=r"data\.part: .* has no 'test'; it has train, extra"):
        build(tmp_path / "two", part="test")
    with pytest.raises(UserError, match=r"no column of captions; name it by data\.caption \(there are words, photo\)"):
        build(tmp_path / "one")
    with pytest.raises(UserError, match=r"data\.image: no column 'x'; there are words, photo"):
        build(tmp_path / "one", image="x")


def test_parquet_of_bytes_with_sizes_and_scores(tmp_path):
    file = parquet(tmp_path / "a" / "0.parquet", 8, WIDTH=[900.0] * 8, HEIGHT=[700] * 8, aesthetic=[5.5] * 7 + [None], pwatermark=[0.5] * 8)
    data = build(file)
    check(data)
    fields = data.fields()
    assert set(fields.width.tolist()) == {900} and set(fields.height.tolist()) == {700}
    assert sum(np.isnan(fields.aesthetic)) == (7 in data._rows) and set(fields.watermark.tolist()) == {0.5}
    parquet(tmp_path / "a" / "1.parquet", 4, WIDTH=[1.0] * 4, HEIGHT=[1] * 4, aesthetic=[1.0] * 4, pwatermark=[0.0] * 4)
    assert build(tmp_path / "a").total == 12
    plain = tmp_path / "plain.parquet"
    pq.write_table(pa.table({"jpg": [painted(i) for i in range(5)], "TEXT": [f"picture {i}" for i in range(5)]}), plain)
    check(build(plain))
    assert set(build(plain).fields().width.tolist()) == {40} and np.isnan(build(plain).fields().aesthetic).all()


def test_bad_rows_are_counted_and_damaged_ones_replaced(tmp_path):
    cells = [{"bytes": painted(i), "path": f"{i}.jpg"} for i in range(8)]
    cells[2:5] = [{"bytes": b"<html>", "path": None}, None, {"bytes": None, "path": str(tmp_path / "gone.jpg")}]
    cells[5] = {"bytes": painted(5)[:-60], "path": None}
    text = [f"picture {i}" for i in range(8)]
    file = parquet(tmp_path / "bad.parquet", 8, image=cells, text=[*text[:6], None, text[7]])
    data = build(file, val_share=1e-9)
    assert {r.name: r.reason for r in data.rejected} == {
        "row 2": "not an image",
        "row 3": "no image",
        "row 4": "unreadable file",
        "row 6": "no caption",
    }
    if 5 in data._rows:
        data.load([data._rows.index(5)], [0], 16, 0, False)
        assert list(data.replaced) == ["row 5"]
    with pytest.raises(UserError, match="0 usable rows of 8"):
        build(file, min_side=100)


def test_what_is_no_data_set_is_said_in_one_line(tmp_path):
    with pytest.raises(UserError, match=r"data\.path: .*nowhere does not exist; .*data\.hub=true"):
        build(tmp_path / "nowhere")
    (tmp_path / "cut.parquet").write_bytes(parquet(tmp_path / "x.parquet").read_bytes()[:-30])
    with pytest.raises(UserError, match=r"cut\.parquet cannot be opened as a data set") as error:
        build(tmp_path / "cut.parquet")
    assert "\n" not in str(error.value)
    parquet(tmp_path / "many" / "whole.parquet")
    (tmp_path / "many" / "torn.parquet").write_bytes(b"PAR1 torn")
    with pytest.raises(UserError, match=r"many/torn\.parquet cannot be opened"):
        build(tmp_path / "many")
    with pytest.raises(UserError, match=r"no \.parquet files at"):
        (tmp_path / "bare").mkdir()
        build(tmp_path / "bare")


def test_the_hub_is_asked_only_when_wanted(monkeypatch):
    import datasets

    asked: list[str] = []
    monkeypatch.setattr(datasets, "load_dataset", lambda name, **more: asked.append(name) or 1 / 0)
    with pytest.raises(UserError, match="does not exist"):
        build("somebody/pictures")
    assert not asked
    with pytest.raises(UserError, match="somebody/pictures cannot be opened"):
        build("somebody/pictures", hub=True)
    assert asked == ["somebody/pictures"]
