"""One of two processes that train the same UNet sharded and whole: sharded in two starts, and whole in one."""

from __future__ import annotations

import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]

import torch  # noqa: E402
from finished_model import SIDE, Pictures  # noqa: E402

from ldm.distributed.processes import Learners, leave  # noqa: E402
from ldm.distributed.sharding import is_split  # noqa: E402
from ldm.families.family import Context, Product  # noqa: E402
from ldm.families.latent_diffusion.family import load  # noqa: E402
from ldm.training import checkpoint  # noqa: E402
from ldm.training.log import Log  # noqa: E402
from ldm.training.loop import Handover, Trainer  # noqa: E402
from ldm.training.optim import AdamW  # noqa: E402
from ldm.training.settings import Train  # noqa: E402

# Without clipping nothing is summed in another order: two gradients have one sum.
STAGE = Train(
    model="diffusion", images=40, batch=8, micro_batch=2, resolution=SIDE, optim=AdamW(lr=1e-3, clip=0), save_every_images=16, samples=2
)


def trainer(model: Path, folder: Path, processes: Learners, **more: Any) -> Trainer:
    """The stage, taken up where its folder stands."""
    data: Any = Pictures()
    family = load(model)
    context = Context(data=data, val=data, resolution=SIDE, seed=0, total_images=STAGE.images)
    log = Log(folder.parent, console=processes.main, write=False)
    stage = replace(STAGE, carry="all") if "carried" in more else STAGE
    return Trainer(
        stage, family, context, data=data, folder=folder, key="k", workers=0, processes=processes, log=log, handover=Handover(**more)
    )


if __name__ == "__main__":
    model, out = Path(sys.argv[1]), Path(sys.argv[2])
    processes = Learners()
    assert processes.launch.sharded
    first = trainer(model, out / "sharded", processes, keeps=True)
    assert all(is_split(p) for p in first.family.parameters()) and all(is_split(a) for a in first.ema.averages)  # type: ignore[union-attr]
    wide = max(first.family.parameters(), key=lambda p: p.numel())
    assert wide.to_local().numel() * 2 <= wide.numel() + wide[0].numel()  # type: ignore[operator]
    first.run()
    if processes.main:  # as if it had been stopped after the first checkpoint
        oldest = checkpoint.states(out / "sharded" / "state")[-1]
        for name in ("again", "alone"):
            shutil.copytree(oldest, out / name / "state" / oldest.name)
    processes.wait()
    again = trainer(model, out / "again", processes)
    assert again.step == 2
    again.run()  # saving once more on its way
    assert len(checkpoint.states(out / "again" / "state")) == 2
    later = trainer(model, out / "later", processes, carried=Product(out / "sharded" / "carried", ""))
    begun = later.states._collected(later.states._groups())
    if processes.main:
        kept, _ = checkpoint.load_state(out / "sharded" / "carried")
        assert all(torch.equal(begun[group][name], value) for group in kept for name, value in kept[group].items())
        assert {name: len(group) for name, group in begun.items()} == {name: len(group) for name, group in kept.items()}
    processes.launch = replace(processes.launch, sharded=False)
    whole = trainer(model, out / "whole", processes)
    assert not any(is_split(p) for p in whole.family.parameters())
    whole.run()
    processes.close()
    leave(0)
