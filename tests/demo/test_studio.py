"""Many users, one model: fair turns, the pictures of `sample.py`, cancelling, and trouble that stays with its owner."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from finished_model import CAPTIONS, SIDE

from ldm.config.errors import UserError
from ldm.demo.studio import Busy, DrawOrder, Job, Studio
from ldm.families.latent_diffusion.engine import Edit
from ldm.families.registry import load
from ldm.sampling import jobs
from ldm.sampling.recipe import Recipe

DRAW = jobs.draw  # before any test puts something in its place


@pytest.fixture(scope="module")
def family(kl_model: Path) -> Any:
    return load(kl_model)


@pytest.fixture
def studio(family: Any) -> Iterator[Studio]:
    with Studio(family) as made:
        yield made


def recipe(seed: int = 0, prompt: str = CAPTIONS[0], **more: Any) -> Recipe:
    told = {
        "negative": "",
        "steps": 3,
        "guidance": 3.0,
        "rescale": 0.0,
        "sampler": "ddim",
        "spacing": "trailing",
        "eta": 0.0,
        "width": SIDE,
        "height": SIDE,
        "model": "m",
        "model_hash": "h",
    }
    return Recipe(prompt=prompt, seed=seed, **{**told, **more})


def order(*recipes: Recipe) -> DrawOrder:
    return DrawOrder(recipes)


def alone(family: Any, one: Recipe) -> np.ndarray:
    return np.asarray(DRAW(family, [one], note=print)[0])


class Gate:
    """Holds the studio in the middle of a drawing until it is opened, and remembers who was drawn."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.opened, self.entered, self.turns = threading.Event(), threading.Event(), list[list[Recipe]]()

        def slow(family: Any, found: Any, *, edits: Any, **rest: Any) -> Any:
            self.turns.append(list(found))
            self.entered.set()
            assert self.opened.wait(120)
            return DRAW(family, found, edits=edits, **rest)

        monkeypatch.setattr(jobs, "draw", slow)


def test_pictures_are_those_of_the_same_recipes_alone(studio: Studio, family: Any) -> None:
    wished = [recipe(seed, CAPTIONS[seed % 4], sampler=("ddim", "euler_a")[seed % 2]) for seed in range(5)]
    found = studio.result(studio.submit("ann", order(*wished)))
    assert all(np.array_equal(image, alone(family, one)) for image, one in zip(found, wished, strict=True))


def test_many_threads_with_mixed_requests_get_their_solo_pictures(studio: Studio, family: Any) -> None:
    assert mixed(studio, family, threads=8, each=5) == (40, 40)


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_640_mixed_requests_of_32_threads_get_their_solo_pictures(studio: Studio, family: Any) -> None:
    began = time.monotonic()
    found = mixed(studio, family, threads=32, each=20)
    print(f"{found[0]} of {found[1]} equal in {time.monotonic() - began:.0f} s")
    assert found == (640, 640)


def mixed(studio: Studio, family: Any, threads: int, each: int) -> tuple[int, int]:
    """How many requests of many threads got exactly the picture that they get alone, and of how many."""
    kinds = [
        {"sampler": sampler, "width": width, "guidance": guidance, "steps": steps}
        for sampler, steps in (("ddim", 2), ("euler_a", 3), ("dpmpp_2m", 3))
        for width in (SIDE, SIDE // 2)
        for guidance in (1.0, 4.0)
    ]
    wished = [
        [recipe(100 * t + k, CAPTIONS[(t + k) % len(CAPTIONS)], **kinds[(5 * t + k) % len(kinds)]) for k in range(each)]
        for t in range(threads)
    ]
    got: dict[Recipe, np.ndarray] = {}
    problems: list[BaseException] = []

    def user(t: int) -> None:
        try:
            for one in wished[t]:
                got[one] = studio.result(studio.submit(f"user{t}", order(one)))[0]
        except BaseException as problem:
            problems.append(problem)

    running = [threading.Thread(target=user, args=(t,)) for t in range(threads)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    assert not problems
    return sum(np.array_equal(image, alone(family, one)) for one, image in got.items()), threads * each


def test_one_picture_does_not_wait_for_a_hundred(family: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(monkeypatch)
    with Studio(family) as studio:
        many = studio.submit("ann", order(*[recipe(seed) for seed in range(8)]))
        assert gate.entered.wait(120)
        few = studio.submit("bob", order(recipe(99, steps=2)))
        also = studio.submit("cem", order(recipe(98, steps=4)))
        assert [studio.ahead(job) for job in (few, also)] == [1, 2]
        gate.opened.set()
        studio.result(many), studio.result(few), studio.result(also)
    assert [[one.seed for one in turn] for turn in gate.turns] == [[0, 1], [99], [98], [2, 3], [4, 5], [6, 7]]


def test_pictures_alike_of_different_users_share_a_turn(family: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(monkeypatch)
    with Studio(family) as studio:
        first = studio.submit("zoe", order(recipe(1, steps=2)))
        assert gate.entered.wait(120)
        waiting = [studio.submit(name, order(recipe(seed))) for seed, name in enumerate(("ann", "bob", "cem"))]
        gate.opened.set()
        found = [studio.result(job)[0] for job in (first, *waiting)]
    assert [[one.seed for one in turn] for turn in gate.turns] == [[1], [0, 1], [2]]
    monkeypatch.undo()
    assert all(np.array_equal(found[1 + seed], alone(family, recipe(seed))) for seed in range(3))


def test_cancelling_frees_the_place_at_once_and_the_next_picture_is_right(family: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with Studio(family) as studio:
        for seed in range(5):
            long = studio.submit("ann", order(recipe(seed, steps=1000)))
            until(lambda job=long: job.steps > 0)
            studio.cancel(long)
            assert long.state == "cancelled" and studio.wait(long, 0)
            one = recipe(seed, steps=2)
            assert np.array_equal(studio.result(studio.submit("ann", order(one)))[0], alone(family, one))
            with pytest.raises(UserError, match="cancelled"):
                studio.result(long)


def test_cancelling_what_waits_and_what_shares_a_turn(family: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(monkeypatch)
    with Studio(family) as studio:
        studio.submit("zoe", order(recipe(9, steps=2)))
        assert gate.entered.wait(120)
        kept, dropped = studio.submit("ann", order(recipe(1))), studio.submit("bob", order(recipe(2)))
        waiting = studio.submit("cem", order(recipe(3)))
        studio.cancel(waiting)
        gate.opened.set()
        until(lambda: kept.state == "drawing" or kept.over)
        studio.cancel(dropped)
        assert np.array_equal(studio.result(kept)[0], alone(family, recipe(1)))
    assert all(one.seed != 3 for turn in gate.turns for one in turn)


def until(happened: Any) -> None:
    began = time.monotonic()
    while not happened():
        assert time.monotonic() - began < 120
        time.sleep(0.002)


def test_full_queues_say_so(family: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(monkeypatch)
    with Studio(family, each=2, total=3) as studio:
        for user in ("ann", "ann", "bob"):
            studio.submit(user, order(recipe()))
        with pytest.raises(Busy, match="3 orders are waiting already"):
            studio.submit("cem", order(recipe()))
        studio.total = 10
        with pytest.raises(Busy, match="2 of your orders are waiting already"):
            studio.submit("ann", order(recipe()))
        gate.opened.set()
    with pytest.raises(Busy, match="shutting down"):
        studio.submit("ann", order(recipe()))


def test_trouble_stays_with_its_owner(family: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def fragile(family: Any, found: Any, **rest: Any) -> Any:
        for one in found:
            if one.seed == 13:
                raise RuntimeError("CUDA out of memory" if one.steps == 2 else "damaged")
            if one.seed == 14:
                raise UserError("seed: 14 is not liked")
        return DRAW(family, found, **rest)

    gate = Gate(monkeypatch)
    monkeypatch.setattr(jobs, "draw", lambda *a, **k: (gate.entered.set(), gate.opened.wait(120), fragile(*a, **k))[2])
    with Studio(family) as studio:
        studio.submit("zoe", order(recipe(5, steps=2)))
        assert gate.entered.wait(120)
        good, bad = studio.submit("ann", order(recipe(1))), studio.submit("bob", order(recipe(13)))
        others = [studio.submit("cem", order(recipe(13, steps=2))), studio.submit("dan", order(recipe(14)))]
        gate.opened.set()
        assert np.array_equal(studio.result(good)[0], alone(family, recipe(1)))
        for job, said in zip((bad, *others), ("went wrong .RuntimeError", "memory: this machine", "14 is not liked"), strict=True):
            with pytest.raises(UserError, match=said):
                studio.result(job)
    assert "damaged" in capsys.readouterr().err


def test_previews_and_progress_are_seen_and_change_nothing(studio: Studio, family: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[np.ndarray] = []
    shares: list[float] = []
    show = Studio._show

    def spy(self: Studio, x0: Any, owners: list[Job], family: Any) -> None:
        show(self, x0, owners, family)
        seen.append(owners[0].preview)  # type: ignore[arg-type]
        shares.append(owners[0].progress)

    monkeypatch.setattr(Studio, "_show", spy)
    wished = [recipe(seed, steps=120) for seed in range(2)]
    job = studio.submit("ann", order(*wished))
    found = studio.result(job)
    assert seen and all(image.shape == (SIDE, SIDE, 3) and image.dtype == np.uint8 for image in seen)
    assert shares == sorted(shares) and 0 < shares[-1] <= 1 and job.progress == 1 and job.preview is None
    assert all(np.array_equal(image, alone(family, one)) for image, one in zip(found, wished, strict=True))


def test_an_empty_order_is_done_and_notes_are_kept(studio: Studio, monkeypatch: pytest.MonkeyPatch) -> None:
    assert studio.result(studio.submit("ann", DrawOrder(()))) == []
    monkeypatch.setattr(jobs, "draw", lambda *a, **k: (k["note"]("look"), k["note"]("look"), DRAW(*a, **k))[2])
    job = studio.submit("ann", order(recipe()))
    studio.result(job)
    assert job.notes == ["look"]


def test_a_watching_edit_is_all_that_is_added(studio: Studio) -> None:
    (made,) = studio._watching([], studio.family)
    assert replace(made, guide=None) == Edit()
