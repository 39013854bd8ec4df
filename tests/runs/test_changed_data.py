"""A run tells what has changed in its data since it was last started."""

from __future__ import annotations

import os

import numpy as np
import pytest
from tars import painted

from ldm.data.content import DataChange
from ldm.data.folder import FolderSource
from ldm.data.scenes.source import ScenesSource
from ldm.runs.changed_data import MARKS, data_change, marks_of, remember


def test_touching_is_no_change_and_a_new_picture_is_one(tmp_path):
    for i in range(8):
        (tmp_path / f"{i}.jpg").write_bytes(painted(i))
        (tmp_path / f"{i}.txt").write_text(f"picture {i}")
    source = FolderSource(path=str(tmp_path), val_share=1e-9)
    out = tmp_path / ".run"
    out.mkdir()
    first = source.build("train")
    assert data_change(out, first.marks()) is None
    remember(out, first.marks())
    for file in tmp_path.glob("*.*"):
        os.utime(file, (1, 1))
    again = source.build("train")
    assert again.fingerprint() == first.fingerprint() and data_change(out, again.marks()) is None
    (tmp_path / "new.jpg").write_bytes(painted(30))
    (tmp_path / "new.txt").write_text("new")
    assert data_change(out, source.build("train").marks()) == DataChange(added=1, removed=0, altered=0)


@pytest.mark.parametrize("content", [b"", b"\x93NUMPY", np.arange(4).tobytes()])
def test_what_cannot_be_compared_is_not(tmp_path, content):
    (tmp_path / MARKS).write_bytes(content)
    scenes = ScenesSource(images=8, val=2).build("train")
    assert data_change(tmp_path, marks_of(scenes)) is None
    remember(tmp_path, marks_of(scenes))
    assert (tmp_path / MARKS).read_bytes() == content  # scenes are made by rule
