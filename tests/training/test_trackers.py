"""Trackers get what the log gets, cost the run nothing when they fail or are slow, and are told no secret."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch  # noqa: F401
from PIL import Image

from ldm.__main__ import main
from ldm.training import trackers
from ldm.training.log import LOG, Log, read


class Slow:
    """A server that answers when it is let."""

    def __init__(self, folder: Path) -> None:
        self.go = GO
        self.got: list[int] = []
        MADE.append(self)

    def numbers(self, stage: str, images: int, values: Any) -> None:
        self.go.wait(60)
        self.got.append(images)

    def picture(self, stage: str, images: int, path: Path) -> None:
        raise ConnectionError("no route to https://u:marked@host")

    def close(self) -> None:
        self.go.wait(60)


GO, MADE = threading.Event(), []  # type: ignore[var-annotated]


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Slow]]:
    monkeypatch.setitem(trackers.MAKE, "wandb", Slow)
    monkeypatch.setattr(trackers, "WAITING", 5)
    GO.clear()
    MADE.clear()
    yield MADE
    GO.set()


def test_a_slow_server_never_blocks_and_loses_points_only_there(slow: list[Slow]) -> None:
    said: list[str] = []
    tracker = trackers.Background("wandb", Path(), said.append)
    began = time.perf_counter()
    for number in range(1000):
        tracker.numbers("a", number, {"loss": 1.0})
    assert time.perf_counter() - began < 120 and len(said) == 1 and "too slow" in said[0]
    GO.set()
    tracker.close()
    assert 5 <= len(slow[0].got) <= 7 and slow[0].got[0] == 0
    assert len(said) == 2 and f"{1000 - len(slow[0].got)} points are in log.jsonl only" in said[1]


def test_a_server_that_hangs_at_the_end_is_left(slow: list[Slow]) -> None:
    said: list[str] = []
    tracker = trackers.Background("wandb", Path(), said.append, patience_s=0.05)
    for number in range(100):
        tracker.numbers("a", number, {"loss": 1.0})
    began = time.perf_counter()
    tracker.close()
    assert time.perf_counter() - began < 120 and said[-1].startswith("tracker: wandb did not end within 0.05 s")


def test_a_failure_is_told_once_without_its_secrets(slow: list[Slow]) -> None:
    said: list[str] = []
    GO.set()
    tracker = trackers.Background("wandb", Path(), said.append)
    tracker.picture("a", 1, Path("x.png"))
    deadline = time.monotonic() + 60
    while not said and time.monotonic() < deadline:
        tracker.numbers("a", 1, {})
        time.sleep(0.01)
    tracker.numbers("a", 2, {})
    tracker.close()
    assert said == ["tracker: wandb failed (no route to https://***@host); the run goes on without it"]


def step(log: Any, images: int, value: float) -> None:
    log.step(step=images, images=images, terms={"mse": value}, gauges={}, lr=0.5)


def test_tensorboard_has_every_step_and_picture_and_hides_lost_work(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    picture = np.random.default_rng(0).integers(0, 255, (6, 8, 3), np.uint8)
    Image.fromarray(picture).save(tmp_path / "x.png")
    for first, values in ((0, [3.0, 2.0, 1.5]), (8, [1.0])):  # the second start goes on from image 8
        log = Log(tmp_path, tracker="tensorboard", console=False)
        with log.stage("low", 100, first) as stage:
            for number, value in enumerate(values):
                step(stage, first + 8 * (number + 1), value)
            stage.pictures(tmp_path / "x.png")
        log.close()
        time.sleep(1.01)  # event files are ordered by the second in their names
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard" / "low"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("mse")] == [(8, 3.0), (16, 1.0)]
    assert {"loss", "lr", "images_per_s"} <= set(events.Tags()["scalars"])
    image = events.Images("samples")[-1]
    assert (image.step, image.width, image.height) == (16, 8, 6)
    assert not [line for line in read(tmp_path / LOG) if "tracker" in line.get("note", "")]


def test_tensorboard_where_nothing_can_be_written(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    (tmp_path / "tensorboard").write_text("in the way")
    log = Log(tmp_path, tracker="tensorboard", console=False)
    with log.stage("low", 100, 0) as stage:
        step(stage, 8, 1.0)
    log.close()
    (said,) = [line["note"] for line in read(tmp_path / LOG) if "note" in line]
    assert "tensorboard did not start" in said and "File exists" in said
    assert [line["images"] for line in read(tmp_path / LOG) if "step" in line] == [8]


def test_tensorboard_that_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("torch.utils.tensorboard")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    log = Log(tmp_path, tracker="tensorboard", console=False)
    log.close()
    (said,) = [line["note"] for line in read(tmp_path / LOG)]
    assert "tensorboard did not start" in said and "the run goes on without it" in said


@pytest.mark.slow
def test_a_run_with_wandb_tells_no_secret(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    done = tiny.start_marked(tmp_path / "run", "tracker=wandb", "stages.text.log_every_steps=1", WANDB_MODE="offline")
    said = done.stdout + done.stderr
    assert done.returncode == 0 and "tracker:" not in said, said
    assert len([line for line in read(tmp_path / "run" / LOG) if "step" in line]) == 4
    assert list((tmp_path / "run" / "wandb").glob("offline-run-*"))
    assert tiny.MARK not in said.lower() and not tiny.marked_files(tmp_path / "run")


def test_a_setting_with_a_password_is_refused_and_not_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_TOKEN", tiny.MARKED["HF_TOKEN"])
    quickstart = str(tiny.ROOT / "configs" / "quickstart.yaml")
    for word in (
        "stages.diffusion-low.prompts=[https://user:markedpassword@host/x]",
        f"name=run-{tiny.MARKED['HF_TOKEN']}",
        "seed=http://u:marked@h",
    ):
        assert main(["train", quickstart, f"out={tmp_path / 'run'}", word]) == 2
        said = "".join(capsys.readouterr())
        assert tiny.MARK not in said.lower() and word.partition("=")[0] in said
        assert not (tmp_path / "run").exists()
