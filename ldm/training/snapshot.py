"""Asynchronous checkpointing: a copy of the training state, and one thread that writes it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Mapping

import numpy as np
import torch
from torch import Tensor

from ldm.data import threads
from ldm.distributed.sharding import whole

Groups = Mapping[str, Mapping[str, Tensor]]


class Snapshot:
    """A copy of tensors in this machine's memory, in buffers that the next copy uses again (pinned where the tensors are on a GPU).

    What stays as it is until the optimiser's next step may be copied `later`, by the thread that writes, during the next forward and
    backward pass: `finish` copies it, and `wait` is asked before it changes.
    """

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, str], Tensor] = {}
        self._pending: list[tuple[Tensor, Tensor]] = []  # buffer, tensor
        self._taken: list[tuple[torch.device, torch.cuda.Event]] = []  # when pending tensors had the values that are wanted
        self._ready = threading.Event()
        self._ready.set()

    @torch.no_grad()
    def take(self, groups: Groups, keep: bool, later: Collection[tuple[str, str]] = ()) -> dict[str, dict[str, Tensor]]:
        """The tensors as they are now; later changes of theirs do not reach the copy, the next `take` does.

        Split tensors are gathered one after the other: every process must ask, those that do not `keep` get nothing.

        Args:
            later: groups and names of tensors that do not change before `wait` returns; their buffers hold them after `finish`. None of
                them is split.

        Raises:
            RuntimeError: where there is no memory for it, as torch says.
        """
        self.wait()
        taken: dict[str, dict[str, Tensor]] = {name: {} for name in groups} if keep else {}
        devices: set[torch.device] = set()
        delayed: list[tuple[Tensor, Tensor]] = []
        threads = torch.get_num_threads()
        # One thread saturates much of the memory's bandwidth; several wait for each other at every tensor, long on a busy machine.
        torch.set_num_threads(1)
        try:
            for group, tensors in groups.items():
                for name, tensor in tensors.items():
                    value = whole(tensor.detach())
                    if not keep:
                        continue
                    buffer = taken[group][name] = self._buffer((group, name), value)
                    if (group, name) in later:
                        delayed.append((buffer, value))
                        continue
                    buffer.copy_(value, non_blocking=True)
                    if value.is_cuda:
                        devices.add(value.device)
        finally:
            torch.set_num_threads(threads)
        for device in devices:
            torch.cuda.synchronize(device)
        if delayed:
            self._taken = [
                (device, torch.cuda.current_stream(device).record_event())
                for device in {value.device for _, value in delayed if value.is_cuda}
            ]
            self._pending = delayed
            self._ready.clear()
        return taken

    @torch.no_grad()
    def finish(self) -> None:
        """Copy what `take` left for later; in any thread."""
        try:
            streams = {device: torch.cuda.Stream(device) for device, _ in self._taken}
            for device, event in self._taken:
                streams[device].wait_event(event)
            for buffer, value in self._pending:
                if value.is_cuda:
                    with torch.cuda.stream(streams[value.device]):
                        buffer.copy_(value, non_blocking=True)
                else:
                    _copy_plain(buffer, value)
            for stream in streams.values():
                stream.synchronize()
        finally:
            self._pending, self._taken = [], []
            self._ready.set()

    def wait(self) -> float:
        """Until all that was taken is copied; returns the seconds that took."""
        if self._ready.is_set():
            return 0.0
        began = time.perf_counter()
        self._ready.wait()
        return time.perf_counter() - began

    def _buffer(self, key: tuple[str, str], value: Tensor) -> Tensor:
        held = self._buffers.get(key)
        if held is None or held.shape != value.shape or held.dtype != value.dtype or held.stride() != value.stride():
            # The layout stays as it is: a plain copy stalls training least.
            held = self._buffers[key] = torch.empty_like(value, device="cpu", pin_memory=value.is_cuda)
        return held

    def release(self) -> None:
        """Give the memory back."""
        self.wait()
        self._buffers.clear()


def _copy_plain(target: Tensor, source: Tensor) -> None:
    """As `copy_`, by this thread alone and without holding Python's lock, where both lie densely in one layout."""
    if target.stride() != source.stride() or source.numel() == 0:
        target.copy_(source)
        return
    to, of = (t.as_strided((t.numel(),), (1,)).view(torch.uint8).numpy() for t in (target, source))
    np.copyto(to, of)


class BackgroundWriter:
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
                with threads.piece():
                    work()
            except BaseException as error:
                self._error = error
            self.seconds = time.perf_counter() - began

        # A daemon, so that a second stop signal ends the process at once; what is half written is no checkpoint.
        self._thread = threads.start(run, "checkpoint")

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
