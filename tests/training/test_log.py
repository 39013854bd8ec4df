"""log.jsonl survives kills, full disks and resumes; the console speaks in measure; a tracker never stops a run."""

from __future__ import annotations

import errno
import io
import json
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ldm.training import log as module
from ldm.training.log import LOG, Log, StageLog, peak_memory_mb, read, seconds_by_stage
from ldm.training.throughput import Expected, peak


def step(log: StageLog, number: int, images: int, **terms: float) -> None:
    log.step(step=number, images=images, terms=terms or {"mse": 0.5, "kl": 0.25}, gauges={"norm": 2.0}, lr=1e-3)


def steps(folder: Path, stage: str = "a") -> list[int]:
    return [line["step"] for line in read(folder / LOG) if line.get("stage") == stage and "step" in line]


def test_a_line_tells_everything(tmp_path: Path) -> None:
    log = Log(tmp_path, console=False)
    log.note("hello")
    with log.stage("a", 100, 0) as stage:
        step(stage, 3, 48)
        stage.pictures(tmp_path / "x.png")
    log.close()
    note, line, pictures = (json.loads(text) for text in (tmp_path / LOG).read_text().splitlines())
    assert note["note"] == "hello" and pictures["pictures"].endswith("x.png")
    assert line["stage"] == "a" and line["step"] == 3 and line["images"] == 48 and line["lr"] == 1e-3 and line["loss"] == 0.75
    assert line["terms"] == {"mse": 0.5, "kl": 0.25} and line["gauges"] == {"norm": 2.0}
    assert line["images_per_s"] > 0 and line["seconds"] >= 0 and line["peak_memory_mb"] > 1 and line["time"] > 1.7e9


def test_rate_is_that_of_the_images_since_the_last_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    log = Log(tmp_path, console=False)
    with log.stage("a", 100, 16) as stage:
        now[0] += 2
        step(stage, 3, 48)
        now[0] += 4
        step(stage, 4, 64)
    assert [(line["images_per_s"], line["seconds"]) for line in read(tmp_path / LOG)] == [(16.0, 2.0), (4.0, 6.0)]


def test_a_torn_last_line_is_dropped(tmp_path: Path) -> None:
    for torn in (b'{"stage": "a", "step": 2, "ima', b"\xff\xfe{", b"{"):
        (tmp_path / LOG).write_bytes(b'{"stage": "a", "step": 1, "images": 8}\n' + torn)
        log = Log(tmp_path, console=False)
        log.note("next")
        log.close()
        assert [sorted(line) for line in read(tmp_path / LOG)] == [["images", "stage", "step"], ["note", "time"]]
    (tmp_path / LOG).write_bytes(b"torn")
    Log(tmp_path, console=False).close()
    assert (tmp_path / LOG).read_bytes() == b""


def test_lines_beyond_the_resumed_image_are_cut_and_other_stages_kept(tmp_path: Path) -> None:
    log = Log(tmp_path, console=False)
    with log.stage("before", 8, 0) as stage:
        step(stage, 9, 72)
    with log.stage("a", 100, 0) as stage:
        for number in range(1, 6):
            step(stage, number, 8 * number)
        stage.pictures(tmp_path / "lost.png")
    log.note("killed here")
    log.close()
    log = Log(tmp_path, console=False)
    with log.stage("a", 100, 24) as stage:
        step(stage, 4, 32)
    log.close()
    assert steps(tmp_path) == [1, 2, 3, 4] and steps(tmp_path, "before") == [9]
    assert "lost.png" not in (tmp_path / LOG).read_text() and "killed here" in (tmp_path / LOG).read_text()
    assert [p.name for p in tmp_path.iterdir()] == [LOG]
    log = Log(tmp_path, console=False)
    with log.stage("a", 50, 0) as stage:  # anew, and shorter
        step(stage, 1, 8)
    assert steps(tmp_path) == [1] and steps(tmp_path, "before") == [9]


def test_seconds_go_on_where_the_work_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])

    def start(at: int, seconds: float) -> float:
        log = Log(tmp_path, console=False)
        with log.stage("a", 100, at) as stage:
            now[0] += seconds
            step(stage, at + 1, at + 1)
        log.close()
        return log.seconds_before("a")

    assert start(0, 5) == 0
    assert start(1, 7) == 5 and seconds_by_stage(read(tmp_path / LOG)) == {"a": 12}
    assert start(2, 1) == 12
    assert start(0, 3) == 0 and seconds_by_stage(read(tmp_path / LOG)) == {"a": 3}
    assert Log(tmp_path, console=False).seconds_before("never") == 0


class FullDisk(io.BytesIO):
    """Takes so many bytes, then none."""

    def __init__(self, room: int) -> None:
        super().__init__()
        self.room = room

    def write(self, text: Any) -> int:
        if self.room == 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        taken = min(self.room, len(text))
        self.room -= taken
        return super().write(text[:taken])


def test_a_full_disk_is_told_once_and_spoils_no_later_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = Log(tmp_path, console=False)
    log._file.close()
    disk = log._file = FullDisk(room=60)
    for number in range(5):
        log.note(f"note {number} of a run whose disk is full")
    disk.room = 1000
    log.note("room again")
    lines = [json.loads(text) for text in disk.getvalue().splitlines()[1:]]
    assert [line["note"] for line in lines] == ["room again"]
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "No space left on device" in said and str(tmp_path / LOG) in said
    log.close()


def test_only_the_writing_process_writes(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    log = Log(folder, console=False, write=False)
    with log.stage("a", 10, 0) as stage:
        step(stage, 1, 8)
    log.close()
    assert not folder.exists() and read(folder / LOG) == []


def test_without_a_terminal_a_line_now_and_then(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    log = Log(tmp_path, console=True)
    with log.stage("diffusion", 1000, 0) as stage:
        for number in range(1, 101):
            now[0] += 0.5
            step(stage, number, 10 * number)
    lines = capsys.readouterr().err.splitlines()
    assert 10 <= len(lines) <= 12  # 50 s, at most one in 5 s, and the last
    said = lines[1].split()
    assert said == ["diffusion", "11%", "110", "of", "1,000", "20.0/s", "left", "0:44", "data", "0%", *said[10:]]
    assert said[11] == "GB" and float(said[10]) >= 0 and said[12:] == ["mse", "0.5", "kl", "0.25"]
    assert lines[-1].split()[1:5] == ["100%", "1,000", "of", "1,000"]
    with log.stage("evaluate", 0, 0) as stage:
        for _ in range(100):
            stage.advance(1)
        stage.progress(3, 3, "frechet")
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and lines[0].startswith("evaluate         1  ") and lines[1].endswith("frechet")


def test_on_a_terminal_a_bar_with_notes_above_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("COLUMNS", "140")
    monkeypatch.setenv("TERM", "xterm")
    log = Log(tmp_path)
    with log.stage("diffusion", 100, 0) as stage:
        step(stage, 1, 50)
        log.note("[b]saved[/b]")
    log.note("after")
    said = screen.getvalue()
    assert "diffusion" in said and "50%" in said and "mse 0.5" in said and "[b]saved[/b]" in said and said.endswith("after\n")


def test_memory_is_in_megabytes() -> None:
    assert 10 < peak_memory_mb() < 1e6


# Trackers


class Tracker(types.ModuleType):
    """A stand-in for wandb that fails where it is told to."""

    def __init__(self, fails: str = "") -> None:
        super().__init__("wandb")
        self.fails, self.said, self.finished, self.asked = fails, [], False, {}
        self.Settings = lambda **given: given
        self.Image = lambda path: f"image {path}"

    def init(self, **given: Any) -> Tracker:
        self.asked = given
        return self._may("init")

    def log(self, values: dict[str, Any]) -> None:
        self._may("log")
        self.said.append(values)

    def finish(self) -> None:
        self.finished = True
        self._may("finish")

    def _may(self, what: str) -> Tracker:
        if self.fails == what:
            raise RuntimeError("no route to host")
        return self


def tracked(folder: Path, fails: str, monkeypatch: pytest.MonkeyPatch) -> Tracker:
    tracker = Tracker(fails)
    monkeypatch.setitem(sys.modules, "wandb", tracker)
    monkeypatch.setenv("WANDB_MODE", "x")
    monkeypatch.delenv("WANDB_MODE")
    log = Log(folder, tracker="wandb", console=True)
    with log.stage("a", 100, 0) as stage:
        for number in range(1, 4):
            step(stage, number, 8 * number)
        stage.pictures(folder / "x.png")
    log.close()
    return tracker


def test_the_tracker_gets_every_step_and_is_offline_unless_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    tracker = tracked(tmp_path, "", monkeypatch)
    assert len(tracker.said) == 4 and tracker.finished and os.environ["WANDB_MODE"] == "offline"
    assert tracker.said[1] | {"a/images_per_s": 0, "a/data_wait": 0} == {
        "a/images": 16,
        "a/loss": 0.75,
        "a/mse": 0.5,
        "a/kl": 0.25,
        "a/norm": 2.0,
        "a/lr": 1e-3,
        "a/images_per_s": 0,
        "a/data_wait": 0,
    }
    assert tracker.said[3] == {"a/samples": f"image {tmp_path / 'x.png'}"}
    assert tracker.asked["settings"]["x_disable_meta"] and tracker.asked["settings"]["console"] == "off"


@pytest.mark.parametrize("fails", ["init", "log", "finish"])
def test_a_tracker_that_fails_is_told_of_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], fails: str
) -> None:
    tracked(tmp_path, fails, monkeypatch)
    assert capsys.readouterr().err.count("no route to host") == 1
    assert steps(tmp_path) == [1, 2, 3]


def test_a_tracker_that_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    log = Log(tmp_path, tracker="wandb")
    log.note("on")
    log.close()
    said = capsys.readouterr().err
    assert "wandb did not start" in said and "on\n" in said


def test_the_bar_tells_what_the_device_does_what_was_waited_for_and_what_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])

    def slow() -> Iterator[int]:
        for number in range(1, 11):
            now[0] += 1.5  # the reading
            yield number

    log = Log(tmp_path, console=True)
    log.expected = {
        "before": Expected(10**9, 10**9),
        "a": Expected(1000, 5e9, peak=2e12),
        "encode": Expected(200, 1e9),
        "b": Expected(4000, 2e9),
    }
    with log.stage("a", 1000, 0) as stage:
        for number in stage.waiting(slow()):
            now[0] += 4.5  # the update
            step(stage, number, 60 * number)
    # 10 images/s of 5e9 FLOPs are 5e10 of 2e12; 8.2e12 FLOPs follow
    assert [(line["images_per_s"], line["data_wait"], line["mfu"]) for line in read(tmp_path / LOG)] == [(10, 0.25, 0.025)] * 10
    first, *_, last = capsys.readouterr().err.splitlines()
    assert "10.0/s  left 1:34  run left 4:18  MFU 2%  data 25%" in first and "  run left 3:24  MFU" in last
    with log.stage("b", 4000, 0) as stage:
        now[0] += 5
        step(stage, 1, 50)
    said = capsys.readouterr().err
    assert "MFU" not in said and "run left" not in said and "mfu" not in read(tmp_path / LOG)[-1]


def test_peaks_are_found_by_the_names_that_cuda_gives() -> None:
    names = ("NVIDIA H100 80GB HBM3", "NVIDIA H100 PCIe", "NVIDIA L4", "NVIDIA L40S", "Tesla T4")
    assert [peak(name, "bf16") / 1e12 for name in names] == [989, 756, 121, 362, 65]
    assert peak("NVIDIA A100-SXM4-80GB", "fp32") == 19.5e12 and peak("NVIDIA A1000", "bf16") == peak("", "bf16") == 0


def test_each_part_of_an_evaluation_has_a_rate_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    with Log(tmp_path, console=True).stage("evaluation", 0, 0) as stage:
        for total, seconds, said in ((100, 10.0, "slow"), (50, 1.0, "quick"), (50, 2.0, "again")):
            for done in range(10, total + 1, 10):
                now[0] += seconds
                stage.progress(done, total, said)
    lines = {line.split()[-1]: line for line in capsys.readouterr().err.splitlines() if "100%" in line}
    assert [lines[name].split()[5] for name in ("slow", "quick", "again")] == ["1.0/s", "10.0/s", "5.0/s"]
