"""What checkpoints survive: a death at any point of a save, turned bits, cuts, missing and foreign files, failing disks."""

from __future__ import annotations

import errno
import os
import random
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from faults import child, dying_at, flip, is_whole, save, tensors
from test_snapshot import trainer

from ldm.formats import atomic
from ldm.formats.atomic import Damaged
from ldm.training import checkpoint
from ldm.training.checkpoint import newest_valid

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")


def silent(text: str) -> None:
    """Told nobody."""


@pytest.mark.slow
@needs_fork
@pytest.mark.parametrize("keep", [1, 2])
def test_a_death_at_any_point_of_a_save_leaves_the_old_step_or_the_new_one(keep: int, tmp_path: Path) -> None:
    point, ended = 0, False
    outcomes = set()
    while not ended:
        folder = tmp_path / str(point)
        save(folder, 1, keep)
        save(folder, 2, keep)
        ended = child(dying_at(point, lambda folder=folder: save(folder, 3, keep)))  # type: ignore[misc]
        found = newest_valid(folder, silent)
        assert found is not None
        step = found[2].step
        assert step in (2, 3) and is_whole(found, step)
        outcomes.add(step)
        save(folder, 4, keep)  # what the dead one left is in nobody's way
        again = newest_valid(folder, silent)
        assert again is not None and is_whole(again, 4)
        assert not [path for path in folder.iterdir() if path.name.startswith(".")]
        point += 1
    assert outcomes == {2, 3} and point > 15


def test_no_turned_bit_is_accepted(tmp_path: Path) -> None:
    save(tmp_path, 1, 2)
    newest = save(tmp_path, 2, 2)
    chance = random.Random(0)
    for _ in range(300):
        back, said = flip(newest, chance), []
        found = newest_valid(tmp_path, said.append)
        assert found is not None and is_whole(found, 1) and len(said) == 1 and str(newest) in said[0]
        back()
    found = newest_valid(tmp_path, silent)
    assert found is not None and is_whole(found, 2)


def test_no_cut_file_is_accepted(tmp_path: Path) -> None:
    newest, chance = save(tmp_path, 1), random.Random(0)
    for file in sorted(path for path in newest.rglob("*") if path.is_file()):
        data = file.read_bytes()
        for size in {0, len(data) - 1, *(chance.randrange(len(data)) for _ in range(20))}:
            file.write_bytes(data[:size])
            assert newest_valid(tmp_path, silent) is None
        file.write_bytes(data)
    assert newest_valid(tmp_path, silent) is not None


def test_files_that_are_missing_extra_or_of_another_step_are_named(tmp_path: Path) -> None:
    first, second = save(tmp_path, 1, 2), save(tmp_path, 2, 2)
    for file in sorted(path for path in second.rglob("*") if path.is_file()):
        data = file.read_bytes()
        file.unlink()
        with pytest.raises(Damaged, match=r"missing|no readable manifest"):
            atomic.verify(second)
        shutil.copy(first / file.name, file)
        with pytest.raises(Damaged, match=r"bytes differ"):
            atomic.verify(second)
        file.write_bytes(data)
    (second / "more.bin").write_bytes(b"x")
    with pytest.raises(Damaged, match="unexpected files: more"):
        atomic.verify(second)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EACCES])
@pytest.mark.parametrize("name", ["fsync", "rename", "mkdir"])
def test_a_failing_disk_leaves_what_was_there(code: int, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 1)

    def fail(*words: object, **named: object) -> None:
        raise OSError(code, os.strerror(code), str(words[0]))

    with monkeypatch.context() as patched:
        patched.setattr(os, name, fail)
        with pytest.raises(OSError, match=os.strerror(code)):
            save(tmp_path, 2)
    found = newest_valid(tmp_path, silent)
    assert found is not None and is_whole(found, 1)
    assert [path.name for path in tmp_path.iterdir()] == ["images-000000000001"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 kB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


@pytest.mark.parametrize("looked_before", [True, False])
def test_a_disk_that_is_really_full_leaves_what_was_there(looked_before: bool, small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twenty amounts of room, from none to more than enough; without the look at what is free it is met in the middle of a file."""
    outcomes = set()
    if not looked_before:
        monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=2**40))
    for room in range(20):
        state, filler = small_disk / "state", small_disk / "filler"
        save(state, 1)
        free = os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_frsize
        filler.write_bytes(bytes(max(0, free - 4096 * room)))
        try:
            save(state, 2)
            step = 2
        except OSError as error:
            assert error.errno == errno.ENOSPC
            step = 1
        found = newest_valid(state, silent)
        assert found is not None and is_whole(found, step) and len(list(state.iterdir())) == 1
        outcomes.add(step)
        shutil.rmtree(state)
        filler.unlink()
    assert outcomes == {1, 2}


def test_where_there_is_no_room_nothing_is_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=checkpoint.size_of(tensors(2)) - 1))
    monkeypatch.setattr(atomic, "commit", None)
    with pytest.raises(OSError, match=r"No space left on device.*images-000000000002"):
        save(tmp_path, 2)


@pytest.mark.slow
def test_a_damaged_newest_state_is_passed_over(tmp_path: Path) -> None:
    """A damaged newest state is passed over, and what is trained is what the one before says."""
    made = trainer(tmp_path, save_beside=False)
    made.run()
    newest, before = checkpoint.states(tmp_path / "stage" / "state")[:2]
    flip(newest, random.Random(1))
    again = trainer(tmp_path, save_beside=False)
    assert again.step == checkpoint.load_state(before)[1].step
    log = (tmp_path / "log.jsonl").read_text()
    assert f"checkpoint {newest.name} refused" in log and f"going on from {again.step * 4} of 24" in log


def killed_until_done(folder: Path, kills: int, chance: random.Random) -> int:
    """Train in children that are killed at random moments until one finishes after `kills` of them; returns how many were."""

    def work() -> None:
        trainer(folder, 64).run()

    dead = 0
    while dead < kills:
        if child(work, 0.15 + chance.random() * 0.5):
            shutil.rmtree(folder)  # it was done before its turn to die
        else:
            dead += 1
    assert child(work)
    return dead


@pytest.mark.slow
@needs_fork
def test_killed_ten_times_it_ends_with_the_same_bits(tmp_path: Path) -> None:
    assert child(lambda: trainer(tmp_path / "whole", 64).run() and None)
    dead = killed_until_done(tmp_path / "killed", 10, random.Random(0))
    whole, killed = (atomic.verify(tmp_path / name / "stage" / "model") for name in ("whole", "killed"))
    assert dead == 10 and whole == killed
