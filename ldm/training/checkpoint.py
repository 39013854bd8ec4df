"""Training checkpoints: saved at once or asynchronously, verified, resumed, handed on to a later stage."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ldm.config.counts import plural
from ldm.config.errors import UserError
from ldm.config.schema import Count, config, plain
from ldm.distributed.one_reader import one_reader
from ldm.distributed.sharding import collected, like
from ldm.formats import atomic, records
from ldm.formats.tensor_file import read_summed
from ldm.training import optim
from ldm.training.ema import Ema
from ldm.training.offload import Offload
from ldm.training.post_hoc_ema import PowerAverages
from ldm.training.snapshot import BackgroundWriter, Snapshot

if TYPE_CHECKING:
    from ldm.distributed.processes import Learners
    from ldm.families.family import Family, Product
    from ldm.training.copies import Copies
    from ldm.training.log import Log
    from ldm.training.settings import Train

CARRIED = "carried"  # folder of a finished stage: its state at the end, for a stage that begins with it
FAILED_SAVES = 3  # so many in a row, and the run stops


@config
class Meta:
    """What a state's meta.json says."""

    key: str  # of the stage whose state it is
    step: Count
    images: Count
    ema_updates: Count = 0
    power_updates: Count = 0  # of the averages for `ldm ema`
    scaler: dict[str, int | float] = field(default_factory=dict)  # of fp16's loss scale; empty: none


Loaded = tuple[Path, dict[str, dict[str, Tensor]], Meta]  # a state, and where it lies


@dataclass(frozen=True)
class Former:
    """A stage of other settings that is gone on from."""

    folder: Path  # its own, put aside
    images: int  # that it had seen
    optimiser: bool  # whether its optimiser is of the same kind


@dataclass(frozen=True)
class Learning:
    """What learns, and all that a state holds of it."""

    family: Family
    optimizers: Sequence[torch.optim.Optimizer]
    scaler: torch.amp.GradScaler
    ema: Ema | None = None
    power: PowerAverages | None = None  # for `ldm ema`
    offload: Offload | None = None  # where the weights in float32 are

    def weights(self) -> dict[str, Tensor]:
        """What learns, in float32, and the family's buffers."""
        own = dict(self.family.state_dict())
        return own if self.offload is None else self.offload.state(own)


class States:
    """The checkpoints of one stage, in its folder's `state`, and copies of them elsewhere.

    Args:
        learning: what they hold.
        stage: its settings.
        folder: stages/NAME.
        key: hash of everything the result depends on; a checkpoint of another key is not continued.
    """

    def __init__(
        self, stage: Train, folder: Path, key: str, learning: Learning, *, processes: Learners, log: Log, copies: Copies | None = None
    ) -> None:
        self.stage, self.folder, self.key, self.learning = stage, folder, key, learning
        self.family, self.optimizers, self.scaler = learning.family, learning.optimizers, learning.scaler
        self.ema, self.power = learning.ema, learning.power
        self.processes, self.log, self.copies = processes, log, copies
        self.failed = 0  # saves in a row
        self._snapshot, self._writer = Snapshot(), BackgroundWriter()
        self._told: Callable[[OSError], None] = _raise  # what to do when the save under way fails
        self._cost: dict[str, Any] = {}  # of the save under way

    def restore(self) -> int:
        """Continue the newest whole checkpoint of this very stage; returns the step to go on with."""
        found = one_reader(self.processes, lambda: newest_valid(self.folder / "state", self.log.note, self.key))
        if found is None:
            return 0
        path, tensors, meta = found
        if wrong := self._unfit(tensors, optimiser=True, power=True):
            raise UserError(f"{path}: {wrong}; move it away to go on from the one before")
        self._take(tensors, meta, optimiser=True, power=True)
        self.log.note(f"{self.folder.name}: going on from {meta.images} of {plural(self.stage.images, 'image')} ({path.name})")
        return meta.step

    def extend(self, former: Former) -> int:
        """Begin with what a stage of other settings has left; returns the step to go on with.

        Raises:
            UserError: where that is gone, damaged or does not fit.
        """
        path, tensors, meta = one_reader(self.processes, lambda: _whole(left_in(former.folder)[0]))
        if wrong := self._unfit(tensors, optimiser=former.optimiser, power=True):
            raise UserError(f"{path}: {wrong}; train this stage from the beginning, without --extend")
        self._take(tensors, meta, optimiser=former.optimiser, power=True)
        step = step_after(meta.images, self.stage.batch)
        skipped = step * self.stage.batch - meta.images
        whole = f"; its batches of {self.stage.batch} begin at {step * self.stage.batch}" if skipped else ""
        anew = "" if former.optimiser else "; the optimiser is another one and begins anew"
        self.log.note(f"{self.folder.name}: goes on from {meta.images} of {self.stage.images} images ({former.folder.name}){whole}{anew}")
        return step

    def _take(self, tensors: dict[str, dict[str, Tensor]], meta: Meta, *, optimiser: bool, power: bool = False) -> None:
        own, offload = self.family.state_dict(), self.learning.offload
        new = tensors["model"] if offload is None else offload.take(tensors["model"])
        new = {name: like(value, own[name]) if name in own else value for name, value in new.items()}
        self.family.load_state_dict(new, strict=offload is None)
        if self.ema:
            self.ema.restore(tensors["ema"], meta.ema_updates)
        if self.power and power:
            self.power.restore(tensors["power"], meta.power_updates)
        if optimiser:
            optim.restore_tensors(self.optimizers, tensors["optimizer"])
            if self.scaler.is_enabled() and meta.scaler:
                self.scaler.load_state_dict(meta.scaler)

    def _unfit(self, tensors: Mapping[str, Mapping[str, Tensor]], *, optimiser: bool, power: bool = False) -> str:
        """Why a state cannot be taken up by what learns here; empty: it can."""
        averages = self.ema.state() if self.ema else {}
        powers = self.power.state() if self.power and power else {}
        for group, own in {"model": self.learning.weights(), "ema": averages, "power": powers}.items():
            theirs = tensors.get(group, {})
            for name in [*own, *theirs] if own else ():
                if name not in theirs or name not in own or theirs[name].shape != own[name].shape:
                    return f"{group}.safetensors: {name} does not fit this model"
        return optim.unfit(self.optimizers, tensors.get("optimizer", {})) if optimiser else ""

    def keep(self, step: int) -> None:
        """Leave the state at the stage's end in `carried`, for a later stage to begin with.

        Raises:
            UserError: when it cannot be written.
        """
        tensors, meta = self._collected(self._groups()), self._meta(step)
        if self.processes.main:
            folder = self.folder / CARRIED
            told = partial(self._failed, needed=size_of(tensors), images=meta.images, must=True)
            self._end(lambda: atomic.commit(folder, partial(write_state, tensors=tensors, meta=meta)), told)
        self.processes.wait()

    def take_over(self, carried: Product, *, optimiser: bool) -> None:
        """Begin with the weights and EMA that another stage has kept, and with its optimiser's state where that is asked for.

        Raises:
            UserError: when it is gone, damaged or not what was kept.
        """
        folder = carried.folder
        try:
            _, tensors, meta = one_reader(self.processes, lambda: _whole(folder, carried.hash))
            if wrong := self._unfit(tensors, optimiser=optimiser):
                raise atomic.Damaged(f"{folder}: {wrong}")
        except atomic.Damaged as error:
            raise UserError(f"{error}; move {folder.parent} away to train that stage again, or set carry=ema") from None
        self._take(tensors, meta, optimiser=optimiser)
        what = ", ".join(["weights", *(["EMA"] if self.ema else []), *(["optimiser"] if optimiser else [])])
        self.log.note(f"{self.folder.name}: begins with the {what} of {folder.parent.name} after {meta.images} images")

    def _groups(self) -> dict[str, dict[str, Tensor]]:
        groups = {"model": self.learning.weights(), "optimizer": optim.state_tensors(self.optimizers)}
        groups |= {"ema": self.ema.state()} if self.ema else {}
        return groups | ({"power": self.power.state()} if self.power else {})

    def _meta(self, step: int) -> Meta:
        return Meta(
            key=self.key,
            step=step,
            images=step * self.stage.batch,
            ema_updates=self.ema.updates if self.ema else 0,
            power_updates=self.power.updates if self.power else 0,
            scaler=self.scaler.state_dict(),
        )

    def save(self, step: int, *, must: bool) -> None:
        """Commit a checkpoint; a failure is told and tried again at the next period, unless it `must` succeed.

        With `save_beside` it is written while training goes on, from a copy of the state, and its failure is found by
        `settle`. One is written at a time: a save waits for the one before. One that `must` succeed is over on return.

        Raises:
            UserError: when it failed and must not, or failed too often.
        """
        began = time.perf_counter()
        self.settle(wait=True)
        groups, meta = self._groups(), self._meta(step)
        beside = self.stage.save_beside and not must
        copied = self._copied(groups) if beside else None
        tensors = self._collected(groups) if copied is None else copied
        if self.processes.main:
            work = partial(self._written, tensors, meta)
            told = partial(self._failed, needed=size_of(tensors), images=meta.images, must=must)
            if copied is not None:
                stalled = round(time.perf_counter() - began, 4)
                self._cost = {"saved": meta.images, "stage": self.folder.name, "stalled_s": stalled}
                self._told = told
                self._writer.start(partial(self._copy_and, work))
            else:
                self._end(work, told)
        if not beside:
            self.processes.wait()

    def _written(self, tensors: dict[str, dict[str, Tensor]], meta: Meta) -> None:
        path = save_state(self.folder / "state", meta.images, tensors, meta, self.stage.keep)
        if self.copies is not None:
            self.copies.state(path, self.stage.keep)

    def _copy_and(self, work: Callable[[], object]) -> None:
        self._snapshot.finish()
        work()

    def still(self) -> None:
        """Before weights, EMA or the optimiser's state change: the save under way must have its copy of them."""
        if waited := self._snapshot.wait():
            self._cost["stalled_s"] = round(self._cost["stalled_s"] + waited, 4)

    def settle(self, *, wait: bool) -> None:
        """Find out how the save under way ended, if it has; or `wait` until it has.

        Raises:
            UserError: when too many failed in a row.
        """
        if self.copies is not None:
            self.copies.tell()
        if not self._writer.waiting or (self._writer.busy and not wait):
            return
        failed = self.failed
        self._end(self._writer.end, self._told)
        if self.failed <= failed:
            self.log.record({**self._cost, "written_s": round(self._writer.seconds, 4)})

    def close(self) -> None:
        """After the last step: wait for the save under way, and give the copy's memory back.

        Raises:
            UserError: as `settle`.
        """
        self.settle(wait=True)
        self._snapshot.release()

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Around a stage's steps: what fails there does not cost the save under way. A second stop signal does."""
        try:
            yield
        except Exception:
            with suppress(Exception):  # what came first is what is told
                self.settle(wait=True)
            raise

    def _copied(self, groups: dict[str, dict[str, Tensor]]) -> dict[str, dict[str, Tensor]] | None:
        """The state as it is now; nothing where there is no memory for a copy."""
        if not (self.processes.main or self.processes.sharded):
            return {}
        try:
            return self._snapshot.take(groups, self.processes.main, self._unchanged(groups))
        except RuntimeError as error:
            if self.processes.sharded:  # the others are gathering with this one: it cannot turn to another way alone
                raise
            self._snapshot.release()
            said = str(error).partition("\n")[0]
            self.log.note(f"{self.folder.name}: no memory for a copy of the state ({said}); training waits while it is written")
            return None

    def _unchanged(self, groups: dict[str, dict[str, Tensor]]) -> set[tuple[str, str]]:
        """What only the optimiser's step changes, and not the passes before it, as it does buffers."""
        if self.processes.sharded:
            return set()
        names = {"model": {name for name, _ in self.family.named_parameters()}}
        return {(group, name) for group, tensors in groups.items() for name in names.get(group, tensors) if name in tensors}

    def _collected(self, groups: dict[str, dict[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
        if not self.processes.sharded:
            return groups
        return {name: collected(group, self.processes.main) for name, group in groups.items()}

    def _end(self, work: Callable[[], Any], told: Callable[[OSError], None]) -> None:
        try:
            work()
        except OSError as error:
            told(error)
            return
        self.failed = 0

    def _failed(self, error: OSError, *, needed: int, images: int, must: bool) -> None:
        free = shutil.disk_usage(self.folder).free
        text = (
            f"{self.folder / 'state'}: checkpoint at {images} images not written"
            f" ({error.strerror or error}); {needed:,} bytes needed, {free:,} free"
        )
        self.failed += 1
        if must or self.failed >= FAILED_SAVES:
            fix = "allow larger files (ulimit -f)" if error.errno == errno.EFBIG else "make room"
            raise UserError(f"{text}. Earlier checkpoints are whole; {fix} and run the same command again") from None
        self.log.note(f"{text}; training goes on and tries again")


def _raise(error: OSError) -> None:
    raise error


def save_state(folder: Path, images: int, tensors: dict[str, dict[str, Tensor]], meta: Meta, keep: int) -> Path:
    """Commit one training state as `folder/images-0000012800` and remove all but the newest `keep` afterwards.

    What a save that was killed has left is removed before, as the room may be needed.

    Raises:
        OSError: as `commit`; before anything is written where the disk has no room for the tensors.
    """
    target = folder / f"images-{images:012d}"
    for left in folder.glob(".images-*"):
        shutil.rmtree(left, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    if shutil.disk_usage(folder).free < size_of(tensors):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target))
    atomic.commit(target, partial(write_state, tensors=tensors, meta=meta))
    for old in states(folder)[keep:]:
        shutil.rmtree(old, ignore_errors=True)
    return target


def write_state(folder: Path, tensors: Mapping[str, Mapping[str, Tensor]], meta: Meta) -> None:
    """Fill a folder with a training state, as `load_state` reads it: a file of tensors for each group, and meta.json."""
    for name, group in tensors.items():
        atomic.write_tensors(folder / f"{name}.safetensors", group)
    (folder / "meta.json").write_text(json.dumps(plain(meta), indent=1))


def size_of(groups: Mapping[str, Mapping[str, Tensor]]) -> int:
    """Bytes of all tensors."""
    return sum(t.numel() * t.element_size() for group in groups.values() for t in group.values())


def states(folder: Path) -> list[Path]:
    """The committed states of a folder, newest first."""
    return sorted((path for path in folder.glob("images-*") if re.fullmatch(r"images-\d{12}", path.name)), reverse=True)


def left_in(folder: Path) -> tuple[Path, Meta]:
    """The state that a stage's folder holds: that at its end, or else the newest checkpoint that verifies.

    Raises:
        UserError: where there is none.
    """
    why = f"{folder} holds no state to go on from (keep_state: false, or none was saved yet)"
    for path in (*([folder / CARRIED] if (folder / CARRIED).is_dir() else []), *states(folder / "state")):
        try:
            atomic.verify(path)
            return path, records.read_as(path / "meta.json", Meta)
        except (OSError, records.Damaged) as error:
            why = str(error)
    raise UserError(f"{why}; train this stage from the beginning, without --extend")


def step_after(images: int, batch: int) -> int:
    """The first step of batches of this size that begins at so many images or later: batches are counted from image 0."""
    return -(-images // batch)


def newest_key(folder: Path) -> str:
    """The key of the newest state that verifies; empty: there is none."""
    found = newest_valid(folder, lambda text: None)
    return "" if found is None else found[2].key


def load_state(path: Path, wanted: str = "") -> tuple[dict[str, dict[str, Tensor]], Meta]:
    """The tensors by file and the meta of a committed state; each file is read once, all sums are checked before anything is returned.

    Files are read into memory, not mapped, so a later rewrite cannot kill the reader.

    Args:
        wanted: the state's `folder_hash`; empty: any state will do.

    Raises:
        Damaged: as `verify`, and where it is not the state that is wanted.
    """
    sums = atomic.listed(path)
    if wanted and atomic.state_hash(sums) != wanted:
        raise atomic.Damaged(f"{path}: another state than the one that was kept here ({atomic.state_hash(sums)[:12]}, not {wanted[:12]})")
    tensors: dict[str, dict[str, Tensor]] = {}
    try:
        for name, expected in sorted(sums.items()):
            if name.endswith(".safetensors"):
                tensors[Path(name).stem], found = _summed(path / name)
            else:
                found = atomic.sha256(path / name)
            if found != expected:
                raise atomic.Damaged(f"{path / name}: its bytes differ from the manifest")
        return tensors, records.read_as(path / "meta.json", Meta)
    except (OSError, records.Damaged) as error:
        raise atomic.Damaged(str(error) if isinstance(error, records.Damaged) else f"{path}: {error}") from None


def _summed(file: Path) -> tuple[dict[str, Tensor], str]:
    try:
        return read_summed(file)
    except ValueError as error:
        raise atomic.Damaged(f"{file}: its bytes differ from the manifest ({error})") from None


def _whole(path: Path, wanted: str = "") -> Loaded:
    return path, *load_state(path, wanted)


def newest_valid(folder: Path, say: Callable[[str], None], key: str = "") -> Loaded | None:
    """The newest state that verifies, of a key where one is given; damaged ones and others' are reported through `say` and passed over."""
    for path in states(folder):
        try:
            tensors, meta = load_state(path)
        except atomic.Damaged as error:
            say(f"checkpoint {path.name} refused: {error}; trying the one before")
            continue
        if key and meta.key != key:
            say(f"checkpoint {path.name} is of other settings; trying the one before")
            continue
        return path, tensors, meta
    return None
