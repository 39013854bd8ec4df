"""Experiment trackers: wandb and TensorBoard, each behind a thread that training never waits for."""

from __future__ import annotations

import os
import queue
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Protocol

from ldm.config.counts import plural
from ldm.config.secrets import redacted

KINDS = ("wandb", "tensorboard")
WAITING = 1000  # points that may wait for a slow server; more are dropped
NAMELESS = "host"  # in place of the machine's name
PATIENCE_S = 20.0  # that the end of a run waits for what is still to be sent


class Tracker(Protocol):
    """A place for figures and pictures; whatever it raises ends its use, not the run."""

    def numbers(self, stage: str, images: int, values: Mapping[str, float]) -> None:
        """One logged step."""

    def picture(self, stage: str, images: int, path: Path) -> None:
        """A picture file was written."""

    def close(self) -> None:
        """Nothing more comes."""


class Wandb:
    """Weights & Biases, offline unless WANDB_MODE says otherwise. It is told no configuration, command line or console output.

    Raises:
        Exception: whatever wandb raises, for no server within 20 s too.
    """

    def __init__(self, folder: Path) -> None:
        os.environ.setdefault("WANDB_MODE", "offline")
        os.environ.setdefault("WANDB_SILENT", "true")
        import wandb

        # Neither the command line nor the console: both may hold what is meant for nobody else.
        settings = wandb.Settings(init_timeout=20, console="off", x_disable_meta=True, disable_git=True, disable_code=True, host=NAMELESS)
        self._folder = folder
        self._picture: Callable[[str], Any] = wandb.Image
        self._run: Any = wandb.init(project="ldm", name=folder.resolve().name, dir=str(folder), settings=settings)

    def numbers(self, stage: str, images: int, values: Mapping[str, float]) -> None:
        """As the contract says."""
        self._run.log({f"{stage}/{name}": value for name, value in values.items()} | {f"{stage}/images": images})

    def picture(self, stage: str, images: int, path: Path) -> None:
        """As the contract says."""
        self._run.log({f"{stage}/samples": self._picture(str(path))})

    def close(self) -> None:
        """As the contract says."""
        self._run.finish()
        for log in (self._folder / "wandb").rglob("debug*.log"):  # of wandb's own, with every path of this machine
            log.unlink(missing_ok=True)


class TensorBoard:
    """Event files in `folder/tensorboard/STAGE`, counted in images; a stage that goes on hides what was beyond its checkpoint.

    Raises:
        ImportError: without the package tensorboard.
        OSError: where nothing can be written.
    """

    def __init__(self, folder: Path) -> None:
        from tensorboard.summary.writer import event_file_writer
        from torch.utils.tensorboard import SummaryWriter

        # The names of its files hold the name of the machine.
        event_file_writer.socket = SimpleNamespace(gethostname=lambda: NAMELESS)  # type: ignore[attr-defined,assignment]
        self._make: Callable[..., Any] = SummaryWriter
        self._folder = folder / "tensorboard"
        self._folder.mkdir(parents=True, exist_ok=True)
        self._stages: dict[str, Any] = {}

    def _stage(self, name: str, images: int) -> Any:
        if name not in self._stages:
            self._stages[name] = self._make(str(self._folder / name), purge_step=images, flush_secs=30)
        return self._stages[name]

    def numbers(self, stage: str, images: int, values: Mapping[str, float]) -> None:
        """As the contract says."""
        writer = self._stage(stage, images)
        for name, value in values.items():
            writer.add_scalar(name, value, global_step=images)

    def picture(self, stage: str, images: int, path: Path) -> None:
        """As the contract says."""
        import numpy as np
        from PIL import Image

        with Image.open(path) as image:
            self._stage(stage, images).add_image("samples", np.asarray(image.convert("RGB")), images, dataformats="HWC")

    def close(self) -> None:
        """As the contract says."""
        for writer in self._stages.values():
            writer.close()


MAKE: dict[str, Callable[[Path], Tracker]] = {"wandb": Wandb, "tensorboard": TensorBoard}


class Background:
    """A tracker in a thread of its own: what it is told waits in a line of bounded length, what fails is told of once.

    Args:
        name: one of KINDS.
        folder: the run folder.
        say: called in the caller's thread alone, with one line on what went wrong.
        patience_s: how long `close` waits.
    """

    def __init__(self, name: str, folder: Path, say: Callable[[str], None], patience_s: float = PATIENCE_S) -> None:
        self.name, self.patience_s = name, patience_s
        self._say = say
        self._line: queue.Queue[Callable[[Tracker], None] | None] = queue.Queue(WAITING)
        self._failure, self._told = "", False
        self._dropped = 0
        self._thread = threading.Thread(target=self._work, args=(folder,), name=name, daemon=True)
        self._thread.start()

    def numbers(self, stage: str, images: int, values: Mapping[str, float]) -> None:
        """One logged step."""
        kept = dict(values)
        self._put(lambda tracker: tracker.numbers(stage, images, kept))

    def picture(self, stage: str, images: int, path: Path) -> None:
        """A picture file was written."""
        self._put(lambda tracker: tracker.picture(stage, images, path))

    def close(self) -> None:
        """Wait a little for what is still to be sent."""
        until = time.monotonic() + self.patience_s
        with suppress(queue.Full):
            self._line.put(None, timeout=self.patience_s)
        self._thread.join(max(0.0, until - time.monotonic()))
        self._tell()
        if self._thread.is_alive():
            self._say(f"tracker: {self.name} did not end within {self.patience_s:g} s; what it was told last may be missing there")
        elif self._dropped:
            self._say(f"tracker: {self.name} was too slow; {plural(self._dropped, 'point is', 'points are')} in log.jsonl only")

    def _put(self, what: Callable[[Tracker], None]) -> None:
        self._tell()
        if self._failure:
            return
        try:
            self._line.put_nowait(what)
        except queue.Full:
            if not self._dropped:
                self._say(f"tracker: {self.name} is too slow; the run goes on, points are dropped there and are in log.jsonl")
            self._dropped += 1

    def _tell(self) -> None:
        if self._failure and not self._told:
            self._told = True
            self._say(f"tracker: {self.name} {self._failure}; the run goes on without it")

    def _work(self, folder: Path) -> None:
        doing = "did not start"
        try:
            tracker = MAKE[self.name](folder)
            doing = "failed"
            while (what := self._line.get()) is not None:
                what(tracker)
            doing = "did not end well"
            tracker.close()
        except BaseException as error:  # wandb raises its own SystemExit too
            self._failure = f"{doing} ({redacted(str(error).partition(chr(10))[0] or type(error).__name__)})"
