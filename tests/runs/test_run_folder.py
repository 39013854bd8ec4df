"""A run folder is used by one start at a time, by the version that began it, and loses nothing that was trained."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ldm.__main__ import main
from ldm.config.errors import UserError
from ldm.config.version import __version__
from ldm.runs.run_folder import check_version, only_one, set_aside


def begun(folder: Path, version: str) -> Path:
    (folder / "stages" / "text").mkdir(parents=True)
    (folder / "stages" / "text" / "done.json").write_text(json.dumps({"version": version}))
    return folder


@pytest.mark.parametrize("inside", [False, True])
def test_another_version_s_run_is_refused_in_one_line(inside: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old = begun(tmp_path / "old", "0.1.0")
    (old / "config.yaml").write_text("data: {kind: scenes}\ntext: {kind: clip}\nstages: {}\n")  # as 0.1 wrote it
    words = [str(old / "config.yaml")] if inside else ["configs/quickstart.yaml", f"out={old}"]
    assert main(["train", *words]) == 2
    said = capsys.readouterr().err
    assert "0.1.0" in said and __version__ in said and said.count("\n") == 1


def test_its_own_version_and_what_says_nothing_are_read(tmp_path: Path) -> None:
    check_version(begun(tmp_path / "own", __version__))
    (tmp_path / "own" / "stages" / "text" / "done.json").write_text("{")
    check_version(tmp_path / "own")
    check_version(tmp_path / "nothing")


def test_one_start_at_a_time(tmp_path: Path) -> None:
    with only_one(tmp_path), pytest.raises(UserError, match="in use by process"), only_one(tmp_path):
        pass


def test_what_was_trained_is_set_aside(tmp_path: Path) -> None:
    for number in (1, 2):
        (tmp_path / "text").mkdir()
        (tmp_path / "text" / "kept").write_text(str(number))
        assert set_aside(tmp_path / "text").name == f"text.replaced-{number}"
    assert (tmp_path / "text.replaced-1" / "kept").read_text() == "1"
