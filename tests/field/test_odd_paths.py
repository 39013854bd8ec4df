"""Brackets, braces, stars and quotation marks in the name of a folder are a part of the name."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from ldm.config.errors import UserError
from ldm.config.schema import build
from ldm.data.check import source_at
from ldm.data.storage import expand, find, matching

NAMES = ["[1] pics", "a[b]c", "{a,b}", "{00..01}", "a*b", "a?b", "set #2", "it's", "%41 & é", "a=b", "[!x]", "**"]


def picture(number: int) -> bytes:
    kept = io.BytesIO()
    Image.new("RGB", (32, 32), (number, 0, 0)).save(kept, "PNG")
    return kept.getvalue()


def fill(folder: Path, count: int) -> None:
    """A folder of images, shards and tables, `count` samples each."""
    import pyarrow as pa
    import pyarrow.parquet as parquet

    for name in ("images", "shards", "tables"):
        (folder / name).mkdir(parents=True)
    with tarfile.open(folder / "shards" / "00000.tar", "w") as tar:
        for i in range(count):
            (folder / "images" / f"{i}.png").write_bytes(picture(i))
            (folder / "images" / f"{i}.txt").write_text("red")
            for suffix, data in (("png", picture(i)), ("txt", b"red")):
                info = tarfile.TarInfo(f"{i}.{suffix}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    rows = {"image": [{"bytes": picture(i), "path": None} for i in range(count)], "text": ["red"] * count}
    parquet.write_table(pa.table(rows), folder / "tables" / "t.parquet")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of odd names, and others that their names would match as patterns."""
    made = tmp_path_factory.mktemp("odd")
    for name in NAMES:
        fill(made / name, 5)
    for name in ("1 pics", "abc", "a", "b", "00", "01", "axb", "set"):
        fill(made / name, 2)
    return made


@pytest.mark.parametrize("name", NAMES)
def test_a_data_set_in_a_folder_of_that_name(root: Path, name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))
    for kind in ("images", "shards", "tables"):
        parts = [source_at(str(root / name / kind)).build(split) for split in ("train", "val")]
        assert sum(map(len, parts)) == 5, kind
    assert find(str(root / name / "shards" / "*.tar"), ".tar") == [str(root / name / "shards" / "00000.tar")]
    assert find(str(root / name / "shards" / "{00000..00000}.tar"), ".tar") == [str(root / name / "shards" / "00000.tar")]


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_curating_a_table_there(root: Path, name: str, tmp_path: Path) -> None:
    pytest.importorskip("duckdb")
    from ldm.data.curation.curate import curate
    from ldm.data.curation.rules import Curation

    for i, table in enumerate((root / name / "tables", root / name / "tables" / "t.parquet", root / name / "tables" / "*.parquet")):
        assert curate([str(table)], tmp_path / f"{i}", Curation(min_caption=1)).rows == 5


def test_patterns_are_patterns_where_nothing_has_their_name(root: Path) -> None:
    assert len(matching(str(root / "a?c" / "tables" / "*.parquet"))) == 1
    assert expand("x/{00..02}.tar") == ["x/00.tar", "x/01.tar", "x/02.tar"]
    assert len(find(str(root / "[ab]" / "shards" / "*.tar"), ".tar")) == 2
    with pytest.raises(UserError, match="no \\.tar files"):
        find(str(root / "[q]" / "*.tar"), ".tar")


def test_known_fields_are_never_an_empty_list() -> None:
    from ldm.runs.run import Run

    for path in ("data", "models.m", "models.m.adapt", "stages.s", "stages.s.buckets", "prior_preservation", "stages.s.metrics.0"):
        data: Any = {"foo": 1, "kind": "train" if path.startswith("stages") else "latent_diffusion"}
        for part in reversed(path.split(".")):
            data = [data] if part == "0" else {part: data}
        with pytest.raises(UserError) as raised:
            build(data, Run, "run.yaml")
        assert not [line for line in str(raised.value).splitlines() if line.rstrip().endswith(("known are", "allowed are", "there are"))]
