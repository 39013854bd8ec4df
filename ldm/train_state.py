"""The state of a stage that is being trained: saved now and then, and taken up again by the next start."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ldm import checkpoint, optim
from ldm.ema import Ema
from ldm.errors import UserError
from ldm.sharded import collected, like

if TYPE_CHECKING:
    from ldm.families.family import Family
    from ldm.log import Log
    from ldm.processes import Learners
    from ldm.train import Train

FAILED_SAVES = 3  # so many in a row, and the run stops


class States:
    """The checkpoints of one stage, in its folder's `state`.

    Args:
        stage: its settings.
        folder: stages/NAME.
        key: hash of everything the result depends on; a checkpoint of another key is not continued.
    """

    def __init__(
        self,
        stage: Train,
        folder: Path,
        key: str,
        *,
        family: Family,
        optimizers: Sequence[torch.optim.Optimizer],
        ema: Ema | None,
        scaler: torch.amp.GradScaler,
        processes: Learners,
        log: Log,
    ) -> None:
        self.stage, self.folder, self.key = stage, folder, key
        self.family, self.optimizers, self.ema, self.scaler = family, optimizers, ema, scaler
        self.processes, self.log = processes, log
        self.failed = 0  # saves in a row

    def restore(self) -> int:
        """Continue the newest whole checkpoint of this very stage; returns the step to go on with."""
        found = checkpoint.newest_valid(self.folder / "state", self.log.note)
        if found is None:
            return 0
        path, tensors, meta = found
        if meta["key"] != self.key:
            return 0
        own = self.family.state_dict()
        self.family.load_state_dict({name: like(value, own[name]) if name in own else value for name, value in tensors["model"].items()})
        optim.restore_tensors(self.optimizers, tensors["optimizer"])
        if self.ema:
            self.ema.restore(tensors["ema"], meta["ema_updates"])
        if self.scaler.is_enabled():
            self.scaler.load_state_dict(meta["scaler"])
        self.log.note(f"{self.folder.name}: going on from {meta['images']} of {self.stage.images} images ({path.name})")
        return int(meta["step"])

    def save(self, step: int, *, must: bool) -> None:
        """Commit a checkpoint; a failure is told and tried again at the next period, unless it `must` succeed.

        Raises:
            UserError: when it failed and must not, or failed too often.
        """
        if self.processes.main or self.processes.sharded:
            tensors = {"model": dict(self.family.state_dict()), "optimizer": optim.state_tensors(self.optimizers)}
            if self.ema:
                tensors["ema"] = self.ema.state()
            if self.processes.sharded:
                tensors = {name: collected(group, self.processes.main) for name, group in tensors.items()}
        if self.processes.main:
            meta: dict[str, Any] = {
                "key": self.key,
                "step": step,
                "images": step * self.stage.batch,
                "ema_updates": self.ema.updates if self.ema else 0,
                "scaler": self.scaler.state_dict(),
            }
            try:
                checkpoint.save_state(self.folder / "state", meta["images"], tensors, meta, self.stage.keep)
                self.failed = 0
            except OSError as error:
                self._failed(error, tensors, meta["images"], must)
        self.processes.wait()

    def _failed(self, error: OSError, tensors: dict[str, dict[str, Tensor]], images: int, must: bool) -> None:
        needed = sum(t.numel() * t.element_size() for group in tensors.values() for t in group.values())
        free = shutil.disk_usage(self.folder).free
        text = (
            f"{self.folder / 'state'}: checkpoint at {images} images not written"
            f" ({error.strerror or error}); {needed:,} bytes needed, {free:,} free"
        )
        self.failed += 1
        if must or self.failed >= FAILED_SAVES:
            raise UserError(f"{text}. Earlier checkpoints are whole; make room and run the same command again") from None
        self.log.note(f"{text}; training goes on and tries again")
