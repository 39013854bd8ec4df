"""What lets a checkpoint be written while training goes on: a copy of the state, and one thread that writes it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from ldm.sharded import whole

Groups = Mapping[str, Mapping[str, Tensor]]


class Snapshot:
    """A copy of tensors in this machine's memory, in buffers that the next copy uses again (pinned where the tensors are on a GPU)."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, str], Tensor] = {}

    @torch.no_grad()
    def take(self, groups: Groups, keep: bool) -> dict[str, dict[str, Tensor]]:
        """The tensors as they are now; later changes of theirs do not reach the copy, the next `take` does.

        Split tensors are gathered one after the other: every process must ask, those that do not `keep` get nothing.

        Raises:
            RuntimeError: where there is no memory for it, as torch says.
        """
        taken: dict[str, dict[str, Tensor]] = {name: {} for name in groups} if keep else {}
        devices: set[torch.device] = set()
        threads = torch.get_num_threads()
        # One thread saturates much of the memory's bandwidth; several wait for each other at every tensor, long on a busy machine.
        torch.set_num_threads(1)
        try:
            for group, tensors in groups.items():
                for name, tensor in tensors.items():
                    value = whole(tensor.detach())
                    if keep:
                        taken[group][name] = self._buffer((group, name), value).copy_(value, non_blocking=True)
                        if value.is_cuda:
                            devices.add(value.device)
        finally:
            torch.set_num_threads(threads)
        for device in devices:
            torch.cuda.synchronize(device)
        return taken

    def _buffer(self, key: tuple[str, str], value: Tensor) -> Tensor:
        held = self._buffers.get(key)
        if held is None or held.shape != value.shape or held.dtype != value.dtype or held.stride() != value.stride():
            # The layout stays as it is: a plain copy stalls training least.
            held = self._buffers[key] = torch.empty_like(value, device="cpu", pin_memory=value.is_cuda)
        return held

    def release(self) -> None:
        """Give the memory back."""
        self._buffers.clear()


class Writer:
    """One piece of work at a time, in a thread of its own. What it raises waits for whoever asks next."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self.seconds = 0.0  # that the last work took

    @property
    def busy(self) -> bool:
        """Whether the work is still being done."""
        return self._thread is not None and self._thread.is_alive()

    @property
    def waiting(self) -> bool:
        """Whether there is work of which nobody has asked yet how it ended."""
        return self._thread is not None

    def start(self, work: Callable[[], object]) -> None:
        """Begin; the former work must have been asked for."""
        assert self._thread is None, "one at a time"

        def run() -> None:
            began = time.perf_counter()
            try:
                work()
            except BaseException as error:
                self._error = error
            self.seconds = time.perf_counter() - began

        # A daemon, so that a second stop signal ends the process at once; what is half written is no checkpoint.
        self._thread = threading.Thread(target=run, name="checkpoint", daemon=True)
        self._thread.start()

    def end(self) -> None:
        """Wait for the work.

        Raises:
            BaseException: whatever it raised, once.
        """
        if self._thread is None:
            return
        self._thread.join()
        error, self._error, self._thread = self._error, None, None
        if error is not None:
            raise error
