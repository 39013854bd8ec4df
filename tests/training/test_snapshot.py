"""Checkpoints that are written beside the training: what they hold, how they fail, and who waits for them."""

from __future__ import annotations

import errno
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from finished_model import SIDE, Pictures

from ldm.config.errors import UserError
from ldm.distributed.processes import Learners, Stopped
from ldm.families.autoencoder import KL, Adversarial
from ldm.families.family import Context, Product
from ldm.formats import atomic
from ldm.models.autoencoder import KLConfig
from ldm.models.discriminator import DiscriminatorConfig
from ldm.training import checkpoint
from ldm.training.log import Log, read
from ldm.training.loop import Handover, Trainer
from ldm.training.settings import Train
from ldm.training.snapshot import BackgroundWriter, Snapshot

BATCH = 4


def trainer(folder: Path, images: int = 24, carried: Product | None = None, keeps: bool = False, **fields: Any) -> Trainer:
    (folder / "stage").mkdir(parents=True, exist_ok=True)
    data = Pictures()
    fields = {"save_every_images": BATCH, "keep": 9, "samples": 0} | fields
    stage = Train(model="autoencoder", images=images, batch=BATCH, resolution=SIDE, **fields)
    context = Context(data=data, val=data, resolution=SIDE, seed=0, total_images=images)
    torch.manual_seed(0)
    game = Adversarial(weight=0.5, start=0, discriminator=DiscriminatorConfig(channels=8, layers=1, norm_groups=4))
    family = KL(network=KLConfig(channels=(8, 8), layers=1, norm_groups=4), adversarial=game).build(context)
    family.finish = lambda context: {}  # type: ignore[method-assign]
    family.save = lambda folder: atomic.write_tensors(folder / "all.safetensors", family.state_dict())  # type: ignore[method-assign]
    return Trainer(
        stage,
        family,
        context,
        data=data,
        folder=folder / "stage",
        key="k",
        workers=0,
        processes=Learners(),
        log=Log(folder, console=False),
        handover=Handover(carried, keeps),
    )


def sums(folder: Path) -> dict[str, Any]:
    return {path.name: atomic.verify(path) for path in checkpoint.states(folder / "stage" / "state")}


def notes(folder: Path) -> list[str]:
    return [line["note"] for line in read(folder / "log.jsonl") if "note" in line]


def hold(monkeypatch: pytest.MonkeyPatch, before: Callable[[], None]) -> None:
    """Do something in every save before it writes."""
    real = checkpoint.save_state

    def save(*words: Any) -> Path:
        before()
        return real(*words)

    monkeypatch.setattr(checkpoint, "save_state", save)


def test_a_copy_is_of_its_moment_and_its_buffers_are_used_again() -> None:
    weights = {
        "model": {
            "a": torch.randn(5, 7),
            "n": torch.tensor(3),
            "h": torch.randn(9).bfloat16(),
            "c": torch.randn(2, 8, 3, 3).to(memory_format=torch.channels_last),
        }
    }
    snapshot, kept = Snapshot(), {name: value.clone() for name, value in weights["model"].items()}
    first = snapshot.take(weights, keep=True)
    for value in weights["model"].values():
        value.add_(1)
    assert all(torch.equal(first["model"][name], value) for name, value in kept.items())
    assert first["model"]["c"].stride() == weights["model"]["c"].stride()
    second = snapshot.take(weights, keep=True)
    assert all(second["model"][name].data_ptr() == value.data_ptr() for name, value in first["model"].items())
    assert all(torch.equal(second["model"][name], value) for name, value in weights["model"].items())
    weights["model"]["a"] = torch.randn(3)
    assert torch.equal(snapshot.take(weights, keep=True)["model"]["a"], weights["model"]["a"])
    assert snapshot.take(weights, keep=False) == {}


def test_what_is_copied_later_is_of_its_moment_and_is_waited_for() -> None:
    groups = {
        "model": {
            "now": torch.randn(5),
            "later": torch.randn(4, 6).t(),
            "n": torch.tensor(3),
            "none": torch.empty(0, 3),
            "h": torch.randn(3, 4).bfloat16(),
            "c": torch.randn(2, 8, 3, 3).to(memory_format=torch.channels_last),
            "part": torch.randn(6, 8)[:, ::2],
        }
    }
    kept = {name: value.clone() for name, value in groups["model"].items()}
    snapshot, writer, go = Snapshot(), BackgroundWriter(), threading.Event()
    taken = snapshot.take(groups, keep=True, later={("model", name) for name in kept if name != "now"})
    groups["model"]["now"].add_(1)
    writer.start(lambda: (go.wait(60), snapshot.finish()))
    threading.Timer(0.1, go.set).start()
    assert snapshot.wait() > 0 and snapshot.wait() == 0.0
    for value in groups["model"].values():
        value.add_(1)
    assert all(torch.equal(taken["model"][name], value) for name, value in kept.items())
    writer.end()
    snapshot.release()


@pytest.mark.slow
def test_the_next_step_waits_for_the_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, order = Snapshot.finish, []

    def slow(self: Snapshot) -> None:
        time.sleep(0.05)
        order.append("copied")
        real(self)

    monkeypatch.setattr(Snapshot, "finish", slow)
    made = trainer(tmp_path)
    for optimizer in made.optimizers:
        optimizer.register_step_pre_hook(lambda *_: order.append("step"))
    made.run()
    steps = len(made.optimizers)
    assert order == [*["step"] * steps, *(["copied"] + ["step"] * steps) * 5]


def test_the_writer_does_one_thing_at_a_time_and_tells_of_its_error_once() -> None:
    writer, go = BackgroundWriter(), threading.Event()
    writer.end()  # of nothing

    def work() -> None:
        go.wait(60)
        raise OSError(errno.EIO, "broken")

    writer.start(work)
    assert writer.busy and writer.waiting
    with pytest.raises(AssertionError):
        writer.start(work)
    go.set()
    with pytest.raises(OSError, match="broken"):
        writer.end()
    assert not writer.busy and not writer.waiting
    writer.end()


@pytest.mark.slow
def test_files_and_weights_are_the_same_as_when_training_waits(tmp_path: Path) -> None:
    made = {beside: trainer(tmp_path / str(beside), save_beside=beside) for beside in (True, False)}
    assert made[True].stage.identity() == made[False].stage.identity()
    for each in made.values():
        each.run()
    beside, waiting = (sums(tmp_path / str(name)) for name in made)
    assert beside == waiting and len(beside) == 5
    assert atomic.verify(tmp_path / "True/stage/model") == atomic.verify(tmp_path / "False/stage/model")
    told = [line for line in read(tmp_path / "True/log.jsonl") if "saved" in line]
    assert [line["saved"] for line in told] == [4, 8, 12, 16, 20] and all(line["written_s"] > 0 < line["stalled_s"] for line in told)


def test_weights_that_change_during_the_write_are_stored_as_they_were(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, go = trainer(tmp_path), threading.Event()
    made._update(made.family, made.data.load(range(BATCH), range(BATCH), SIDE, 0, False))
    before = {name: value.clone() for name, value in made.family.state_dict().items()}
    hold(monkeypatch, lambda: (go.wait(60), None)[1])
    made.states.save(1, must=False)
    with torch.no_grad():
        for buffer in made.family.buffers():  # these change in the next forward pass, the others after `still`
            buffer.fill_(7)
    made.states.still()
    with torch.no_grad():
        for parameter in made.family.parameters():
            parameter.fill_(7)
    made.states.settle(wait=False)  # does not wait
    assert not checkpoint.states(tmp_path / "stage/state")
    go.set()
    made.states.close()
    tensors, meta = checkpoint.load_state(checkpoint.states(tmp_path / "stage/state")[0])
    assert meta.step == 1 and all(torch.equal(tensors["model"][name], value) for name, value in before.items())


def test_a_second_save_waits_for_the_first_and_training_goes_on_beside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, under_way, most = trainer(tmp_path, images=20), [0], [0]
    steps: list[int] = []

    def slowly() -> None:
        under_way[0] += 1
        most[0] = max(most[0], under_way[0])
        steps.append(made.step)
        time.sleep(0.05)
        under_way[0] -= 1

    hold(monkeypatch, slowly)
    made.run()
    assert most == [1] and len(sums(tmp_path)) == 4 and steps == [1, 2, 3, 4]


def full(times: int) -> Callable[[], None]:
    left = [times]

    def before() -> None:
        left[0] -= 1
        if left[0] >= 0:
            raise OSError(errno.ENOSPC, "No space left on device")

    return before


def test_a_full_disk_is_told_and_training_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = trainer(tmp_path)
    hold(monkeypatch, full(2))
    made.run()
    assert len(sums(tmp_path)) == 3 and made.states.failed == 0
    told = [note for note in notes(tmp_path) if "not written (No space left on device)" in note]
    assert len(told) == 2 and "checkpoint at 4 images" in told[0] and "bytes needed" in told[0] and "training goes on" in told[0]


@pytest.mark.slow
def test_three_failures_in_a_row_end_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = trainer(tmp_path)
    hold(monkeypatch, full(3))
    with pytest.raises(UserError, match=r"checkpoint at 12 images not written .*make room and run the same command again"):
        made.run()
    # Its last save is found out about at the stage's end, too.
    made = trainer(tmp_path / "end", images=16)
    hold(monkeypatch, full(3))
    with pytest.raises(UserError, match="checkpoint at 12 images"):
        made.run()


def test_what_is_no_fault_of_the_disk_ends_the_run_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise ZeroDivisionError

    made = trainer(tmp_path)
    hold(monkeypatch, broken)
    with pytest.raises(ZeroDivisionError):
        made.run()


@pytest.mark.slow
@pytest.mark.parametrize("failing", [False, True])
def test_a_stop_waits_for_the_save_under_way_and_for_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: bool) -> None:
    made = trainer(tmp_path)
    saves: list[int] = []
    real, update = checkpoint.save_state, made._update

    def save(*words: Any) -> Path:
        time.sleep(0.05)
        saves.append(words[1])
        if failing:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*words)

    monkeypatch.setattr(checkpoint, "save_state", save)
    monkeypatch.setattr(made, "_update", lambda *words: (*update(*words)[:2], made.step == 1))
    with pytest.raises(UserError if failing else Stopped):
        made.run()
    assert saves == [4, 8] and not any(thread.name == "checkpoint" for thread in threading.enumerate())
    assert list(sums(tmp_path)) == ([] if failing else ["images-000000000008", "images-000000000004"])


def test_what_fails_in_a_step_does_not_cost_the_save_under_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = trainer(tmp_path)
    update = made._update

    def fails(*words: Any) -> Any:
        if made.step == 1:
            raise UserError("the first cause")
        return update(*words)

    hold(monkeypatch, lambda: time.sleep(0.1))
    monkeypatch.setattr(made, "_update", fails)
    with pytest.raises(UserError, match="the first cause"):
        made.run()
    assert list(sums(tmp_path)) == ["images-000000000004"]


def test_without_memory_for_a_copy_training_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*words: Any, **more: Any) -> Any:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes\nmore")

    monkeypatch.setattr(torch, "empty_like", none)
    made = trainer(tmp_path, images=8)
    made.states.save(1, must=False)
    assert len(sums(tmp_path)) == 1 and not made.states._writer.waiting
    (said,) = notes(tmp_path)
    assert said.endswith("you tried to allocate 9 bytes); training waits while it is written")
