"""Queue of the page: a model that several people draw with at once, fairly, one drawing at a time."""

from __future__ import annotations

import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from ldm.config.errors import UserError, out_of_memory
from ldm.sampling.recipe import Recipe

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from ldm.families.draws import Draws
    from ldm.sampling.given import Files
    from ldm.sampling.init_images import InitImage

State = Literal["waiting", "drawing", "done", "cancelled", "failed"]
OVER: tuple[State, ...] = ("done", "cancelled", "failed")
SHARE = 0.2  # of the time, at most, that previews may take
PREVIEWS = 4  # at a time


class Busy(UserError):
    """The queue is full, of this user's wishes or of everyone's."""


class Cancelled(Exception):
    """Nobody waits for what is being drawn any more."""


@dataclass(frozen=True)
class DrawOrder:
    """Pictures that are wished for together."""

    recipes: tuple[Recipe, ...]
    init_image: InitImage | None = None  # what all of them are drawn out of
    given: Files | None = None  # what their recipes tell of views
    family: Callable[[], Draws] | None = None  # opens the model that draws them; None: the studio's own
    room: int = 0  # how many that model draws at once; 0: the studio's own number
    notes: tuple[str, ...] = ()  # what whoever asked should know


@dataclass(eq=False)
class Job:
    """An order on its way; every field but the first two is written by the studio alone."""

    user: str
    order: DrawOrder
    state: State = "waiting"
    steps: int = 0  # that are done of the part being drawn
    of: int = 0  # steps of that part
    pictures: dict[int, np.ndarray] = field(default_factory=dict)  # by place in the order: (H,W,3) uint8
    preview: np.ndarray | None = None  # what the first picture being drawn looks like by now
    notes: list[str] = field(default_factory=list)
    error: str = ""
    taken: int = 0  # recipes that are drawn or being drawn
    began: float = field(default_factory=time.monotonic)
    seconds: float = 0.0  # from then until it was over

    @property
    def over(self) -> bool:
        """Whether nothing more will come."""
        return self.state in OVER

    @property
    def progress(self) -> float:
        """The share that is done, 0 to 1."""
        part = (self.taken - len(self.pictures)) * self.steps / self.of if self.of else 0.0
        return min(1.0, (len(self.pictures) + part) / len(self.order.recipes))


Unit = list[tuple[Job, int]]  # recipes, by job and place, that are drawn in one call


class Studio:
    """A model, or several by turns, and those who wait for them.

    Users take turns, and a turn is what the network draws at once (`defaults.chunk` pictures): whoever wishes for a hundred
    pictures does not hold up whoever wishes for one. Where a turn has room left, it takes along other users' pictures of the
    same settings and size. None of this changes a picture, which depends on its recipe alone.

    Args:
        family: ready to draw (`ldm.families.draws.Draws.ready`); what draws orders that name no other.
        each: orders that one user may have in the queue.
        total: orders in the queue in all.
        previews: whether pictures are shown while they are drawn.
    """

    def __init__(self, family: Draws, each: int = 4, total: int = 64, previews: bool = True) -> None:
        self.family = family
        self.each, self.total, self.previews = each, total, previews
        self._changed = threading.Condition()
        self._queue: dict[str, deque[Job]] = {}  # in the order of the next turns
        self._closing = False
        self._cost = 0.0  # seconds of the last preview
        self._worker = threading.Thread(target=self._work, name="studio", daemon=True)
        self._worker.start()

    def submit(self, user: str, order: DrawOrder) -> Job:
        """Put an order at the end of a user's queue.

        Raises:
            Busy: if the queue is full.
        """
        job = Job(user, order, notes=list(order.notes))
        if not order.recipes:
            job.state = "done"
            return job
        with self._changed:
            if self._closing:
                raise Busy("closed: the studio is shutting down")
            if sum(map(len, self._queue.values())) >= self.total:
                raise Busy(f"busy: {self.total} orders are waiting already; try again in a while")
            own = self._queue.setdefault(user, deque())
            if len(own) >= self.each:
                raise Busy(f"busy: {self.each} of your orders are waiting already; cancel one, or wait for one")
            own.append(job)
            self._changed.notify_all()
        return job

    def ahead(self, job: Job) -> int:
        """How many turns come before a waiting job's first, the one being drawn included."""
        with self._changed:
            if job.state != "waiting" or job not in self._queue.get(job.user, ()):
                return 0
            place = self._queue[job.user].index(job)
            users = list(self._queue)
            before = users.index(job.user)
            lengths = [len(self._queue[user]) for user in users]
            others = sum(min(length, place + (i < before)) for i, length in enumerate(lengths) if i != before)
            return others + place

    def waiting(self) -> tuple[int, int]:
        """The orders in the queue, those being drawn included, and their pictures that are still to be drawn."""
        with self._changed:
            jobs = [job for own in self._queue.values() for job in own]
            return len(jobs), sum(len(job.order.recipes) - len(job.pictures) for job in jobs)

    def wait(self, job: Job, timeout: float | None = None) -> bool:
        """Wait until a job is over, or so many seconds; whether it is."""
        with self._changed:
            return self._changed.wait_for(lambda: job.over, timeout)

    def result(self, job: Job) -> list[np.ndarray]:
        """A job's pictures (H,W,3) uint8 in the order of its recipes, once it is over.

        Raises:
            UserError: if it failed or was cancelled.
        """
        self.wait(job)
        if job.state != "done":
            raise UserError(job.error or job.state)
        return [job.pictures[place] for place in range(len(job.order.recipes))]

    def cancel(self, job: Job) -> None:
        """Take a job out of the queue; what is being drawn for it alone stops at the next step."""
        with self._changed:
            if not job.over:
                self._end(job, "cancelled")

    def close(self) -> None:
        """Cancel everything and stop."""
        with self._changed:
            self._closing = True
            for job in [job for jobs in self._queue.values() for job in jobs]:
                self._end(job, "cancelled")
            self._changed.notify_all()
        self._worker.join()

    def __enter__(self) -> Studio:
        return self

    def __exit__(self, *problem: object) -> None:
        self.close()

    def _end(self, job: Job, state: State, error: str = "") -> None:
        job.state, job.error, job.preview, job.seconds = state, error, None, time.monotonic() - job.began
        own = self._queue.get(job.user)
        if own is not None and job in own:
            own.remove(job)
            if not own:
                del self._queue[job.user]
        self._changed.notify_all()

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closing or bool(self._queue))
                if self._closing:
                    return
                unit = self._turn()
            self._draw(unit)
            with self._changed:  # only now, so that whoever came meanwhile stands before those who just had a turn
                for user in dict.fromkeys(job.user for job, _ in unit):
                    if user in self._queue:
                        self._queue[user] = self._queue.pop(user)

    def _turn(self) -> Unit:
        """The next user's next recipes, with others' that are alike where there is room."""
        first = next(iter(self._queue.values()))[0]
        room = first.order.room or int(self.family.defaults["chunk"])
        kind = _kind(first.order.recipes[first.taken])
        unit = self._take(first, room, kind)
        for job in [job for jobs in self._queue.values() for job in jobs if job is not first]:
            if first.order.init_image is None and job.order.init_image is None:
                unit += self._take(job, room - len(unit), kind)
        return unit

    @staticmethod
    def _take(job: Job, room: int, kind: Recipe) -> Unit:
        """Up to `room` of a job's next recipes, as long as they are of one kind."""
        recipes, start = job.order.recipes, job.taken
        while job.taken < len(recipes) and job.taken - start < room and _kind(recipes[job.taken]) == kind:
            job.taken += 1
        if job.taken > start:
            job.state, job.steps, job.of = "drawing", 0, 0
        return [(job, place) for place in range(start, job.taken)]

    def _draw(self, unit: Unit) -> None:
        """Draw a unit; one that fails is drawn again job by job, so that nobody fails for another's reason."""
        jobs = list(dict.fromkeys(job for job, _ in unit))
        try:
            images = self._images(unit)
        except Cancelled:
            return
        except Exception as error:
            if len(jobs) > 1:
                for one in jobs:
                    self._draw([(job, place) for job, place in unit if job is one])
                return
            if not isinstance(error, UserError):
                traceback.print_exc(file=sys.stderr)
            with self._changed:
                if not jobs[0].over:
                    self._end(jobs[0], "failed", _said(error))
            return
        with self._changed:
            for (job, place), image in zip(unit, images, strict=True):
                if not job.over:
                    job.pictures[place] = image.numpy()
            for job in jobs:
                job.preview, job.steps, job.of = None, 0, 0
                if not job.over and len(job.pictures) == len(job.order.recipes):
                    self._end(job, "done")
            self._changed.notify_all()

    def _images(self, unit: Unit) -> Tensor:
        from ldm.sampling import jobs as drawing

        found = [job.order.recipes[place] for job, place in unit]
        jobs = list(dict.fromkeys(job for job, _ in unit))

        def on_step(done: int, of: int) -> None:
            if all(job.over for job in jobs):
                raise Cancelled
            for job in jobs:
                job.steps, job.of = done, of

        def note(text: str) -> None:
            for job in jobs:
                if text not in job.notes:
                    job.notes.append(text)

        if all(job.over for job in jobs):
            raise Cancelled
        family = jobs[0].order.family() if jobs[0].order.family is not None else self.family
        watching = self._watching([job for job, _ in unit], family)
        first = jobs[0].order  # recipes that tell of the same views do so by hash, so that any order's files are theirs
        return drawing.draw(family, found, init_image=first.init_image, given=first.given, edits=watching, on_step=on_step, note=note)

    def _watching(self, owners: Sequence[Job], family: Draws) -> tuple[Any, ...]:
        """What changes nothing, shows what is drawn by now, and stops where nobody waits for it."""
        last = time.monotonic()

        def see(rows: Sequence[int], step: int, x0: Tensor) -> None:
            nonlocal last
            if all(job.over for job in owners):
                raise Cancelled
            if self.previews and time.monotonic() - last > max(0.2, self._cost / SHARE):
                began = time.monotonic()
                self._show(x0, [owners[row] for row in rows], family)
                last = time.monotonic()
                self._cost = last - began

        return family.watch(see)

    def _show(self, x0: Tensor, owners: Sequence[Job], family: Draws) -> None:
        """Decode the first picture of each job."""
        from ldm.data.pictures import to_uint8

        first: dict[Job, int] = {}
        for place, job in enumerate(owners):
            first.setdefault(job, place)
        shown = [(job, place) for job, place in first.items() if not job.over][:PREVIEWS]
        for job, place in shown:
            image = family.decode(x0[place : place + 1].detach())
            seen = to_uint8(image.nan_to_num())[0].numpy()
            with self._changed:
                if not job.over:
                    job.preview = seen


def _kind(recipe: Recipe) -> Recipe:
    """What recipes that may be drawn in one call have in common."""
    from ldm.sampling.jobs import OWN

    return replace(recipe, **OWN)


def _said(error: Exception) -> str:
    """An error as the user is told."""
    if isinstance(error, UserError):
        return str(error)
    if out_of_memory(error):
        return "memory: this machine has too little of it for such a picture; choose a smaller size"
    return f"something went wrong ({type(error).__name__}); the terminal of `ldm demo` says more"
