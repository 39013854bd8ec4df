"""Updates that are not finite are not made: nothing that is trained or averaged moves, and too many in a row end the run."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from finished_model import SIDE, Pictures

from ldm.config.errors import UserError
from ldm.distributed.processes import Learners
from ldm.families.autoencoder import VQ, Adversarial
from ldm.families.family import Context
from ldm.models.autoencoder import VQConfig
from ldm.models.discriminator import DiscriminatorConfig
from ldm.training import loop
from ldm.training.log import Log
from ldm.training.loop import Trainer
from ldm.training.optim import AdamW
from ldm.training.settings import Train

BATCH = 4


class Poisoned(Pictures):
    """Pictures of which some are not numbers."""

    poison: frozenset[int] = frozenset()

    def load(self, index: Any, position: Any, resolution: int, seed: int, flip: bool) -> Any:
        """As the contract says."""
        batch = super().load(index, position, resolution, seed, flip)
        image = batch.image.clone()
        for row, number in enumerate(index):
            if number in self.poison:
                image[row, 1, 2, 3] = torch.nan
        return replace(batch, image=image)


def trainer(folder: Path, data: Any, images: int = 40, precision: Any = "fp32") -> Trainer:
    """A VQ autoencoder against its discriminator: all that an update can touch."""
    game = Adversarial(weight=0.5, start=0, discriminator=DiscriminatorConfig(channels=8, layers=1, norm_groups=4))
    config = VQ(network=VQConfig(channels=(8, 8), layers=1, norm_groups=4, codes=16), adversarial=game, redraw_every=1, redraw_until=1.0)
    stage = Train(model="autoencoder", images=images, batch=BATCH, resolution=SIDE, optim=AdamW(lr=1e-3), precision=precision)
    context = Context(data=data, val=data, resolution=SIDE, seed=0, total_images=images)
    torch.manual_seed(0)
    return Trainer(
        stage,
        config.build(context),
        context,
        data=data,
        folder=folder / "stage",
        key="",
        workers=0,
        processes=Learners(),
        log=Log(folder, console=False),
    )


def everything(made: Trainer) -> dict[str, torch.Tensor]:
    """Weights, buffers, optimiser and averages, copied."""
    from ldm.training import optim

    assert made.ema is not None
    groups = {"model": made.family.state_dict(), "optim": optim.state_tensors(made.optimizers), "ema": made.ema.state()}
    return {f"{group}.{name}": value.detach().clone() for group, tensors in groups.items() for name, value in tensors.items()}


def test_a_poisoned_sample_moves_nothing_and_is_named(tmp_path: Path) -> None:
    data = Poisoned()
    made = trainer(tmp_path, data)
    clean = data.load(range(BATCH), range(BATCH), SIDE, 0, False)
    made._update(made.family, clean)
    made.step += 1
    before = everything(made)
    assert made.ema is not None and made.ema.updates == 1
    image = clean.image.clone()
    image[2, 0, 5, 5] = torch.inf
    made._update(made.family, replace(clean, image=image, position=torch.arange(BATCH, 2 * BATCH)))
    after = everything(made)
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert made.ema.updates == 1 and made.skipped == 1
    (line,) = [line for line in map(json.loads, (tmp_path / "log.jsonl").read_text().splitlines()) if "skipped" in line]
    assert line["skipped"]["positions"] == [4, 7] and len(line["skipped"]["samples"]) == BATCH
    from ldm.data.order import shuffled

    assert line["skipped"]["not_finite"] == [f"picture {shuffled(0, [6], len(data))[0]}"]
    made.step += 1
    made._update(made.family, clean)
    assert made.skipped == 0 and any(not torch.equal(before[name], value) for name, value in everything(made).items())


def test_too_many_in_a_row_end_the_run_with_the_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = Poisoned()
    data.poison = frozenset(range(12))
    monkeypatch.setattr(loop, "SKIPPED_UPDATES", 3)
    made = trainer(tmp_path, data)
    with pytest.raises(UserError, match=r"stage: 3 updates in a row, up to step 2, .* not finite; the weights are as before"):
        made.run()
    said = (tmp_path / "log.jsonl").read_text()
    assert said.count('"skipped"') == 3 and "not finite as read: picture" in said


def test_one_bad_sample_among_good_ones_does_not_end_a_run(tmp_path: Path) -> None:
    data = Poisoned()
    data.poison = frozenset({5})
    made = trainer(tmp_path, data, images=24)
    made.run()
    said = (tmp_path / "log.jsonl").read_text()
    assert said.count('"skipped"') == 2  # twice through twelve pictures
    assert all(bool(value.isfinite().all()) for value in made.family.state_dict().values())
