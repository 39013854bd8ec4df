"""What one stage leaves for the next: weights, averages and the optimiser's state, as its `carry` asks."""

from __future__ import annotations

import errno
import random
from pathlib import Path

import pytest
import torch
from faults import flip
from finished_model import SIDE
from test_snapshot import BATCH, notes, trainer

from ldm.config.errors import UserError
from ldm.families.family import Product
from ldm.formats import atomic
from ldm.training import checkpoint, optim
from ldm.training.loop import Trainer


def state(made: Trainer) -> dict[str, dict[str, torch.Tensor]]:
    return {group: {name: value.clone() for name, value in tensors.items()} for group, tensors in made.states._groups().items()}


def kept(folder: Path) -> Product:
    return Product(folder / "stage/carried", atomic.folder_hash(folder / "stage/carried"))


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(value, b[name]) for name, value in a.items())


@pytest.mark.slow
@pytest.mark.parametrize("carry", ["weights", "all"])
def test_a_stage_begins_with_what_the_one_before_had_at_its_end(carry: str, tmp_path: Path) -> None:
    before = trainer(tmp_path / "before", keeps=True)
    before.run()
    left = state(before)
    carried = kept(tmp_path / "before")
    after = trainer(tmp_path / "after", carried=carried, carry=carry)
    begun = state(after)
    assert after.step == 0 and after.ema is not None and before.ema is not None and after.ema.updates == before.ema.updates == 6
    assert equal(begun["model"], left["model"]) and equal(begun["ema"], left["ema"])
    assert not equal(left["ema"], dict(zip(left["ema"], before.ema.parameters, strict=True)))  # weights and averages differ
    assert equal(begun["optimizer"], left["optimizer"]) if carry == "all" else not begun["optimizer"]
    what = "weights, EMA, optimiser" if carry == "all" else "weights, EMA"
    assert notes(tmp_path / "after") == [f"stage: begins with the {what} of stage after 24 images"]
    after.run()
    moments = optim.state_tensors(after.optimizers)
    steps = {float(value) for name, value in moments.items() if name.endswith(".step")}
    assert steps == ({12.0} if carry == "all" else {6.0})


def test_a_stage_that_was_stopped_goes_on_from_its_own_checkpoint(tmp_path: Path) -> None:
    trainer(tmp_path / "before", keeps=True).run()
    carried = kept(tmp_path / "before")
    first = trainer(tmp_path / "parts", carried=carried, carry="all")
    for _ in range(2):
        first._update(first.family, first.data.load(range(BATCH), range(BATCH), SIDE, 0, False))
    first.states.save(2, must=True)
    again = trainer(tmp_path / "parts", carried=carried, carry="all")
    assert again.step == 2 and "begins with" not in notes(tmp_path / "parts")[-1]
    assert equal(state(again)["optimizer"], state(first)["optimizer"])


def test_a_damaged_or_missing_state_is_refused_before_anything_changes(tmp_path: Path) -> None:
    trainer(tmp_path / "before", keeps=True).run()
    carried = kept(tmp_path / "before")
    flip(carried.folder, random.Random(0))
    with pytest.raises(UserError, match=r"carried.*move .*stage away to train that stage again, or set carry=ema"):
        trainer(tmp_path / "after", carried=carried, carry="all")
    with pytest.raises(UserError, match=r"nowhere.*no readable manifest"):
        trainer(tmp_path / "after", carried=Product(tmp_path / "nowhere", "0"), carry="weights")


@pytest.mark.slow
def test_the_state_of_another_stage_is_refused(tmp_path: Path) -> None:
    for name, images in (("before", 24), ("other", 12)):
        trainer(tmp_path / name, images, keeps=True).run()
    there, other = kept(tmp_path / "before"), kept(tmp_path / "other")
    with pytest.raises(UserError, match=r"another state than the one that was kept here.*set carry=ema"):
        trainer(tmp_path / "after", carried=Product(other.folder, there.hash), carry="all")


def test_a_state_that_cannot_be_kept_ends_the_run_and_the_next_start_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = atomic.commit

    def full(target: Path, write: object) -> None:
        if target.name == "carried":
            raise OSError(errno.ENOSPC, "No space left on device")
        real(target, write)  # type: ignore[arg-type]

    with monkeypatch.context() as patched:
        patched.setattr(atomic, "commit", full)
        with pytest.raises(UserError, match=r"No space left on device.*make room and run the same command again"):
            trainer(tmp_path, keeps=True).run()
    again = trainer(tmp_path, keeps=True)
    assert again.step == 5
    again.run()
    assert checkpoint.load_state(tmp_path / "stage/carried")[1].step == 6
