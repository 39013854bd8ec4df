"""One of several processes that train an autoencoder against its discriminator in float64; the first saves what all have learnt."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from safetensors.torch import save_file

from ldm.data.loader import batches
from ldm.diffusion.batch import ImageBatch
from ldm.diffusion.rng import Rng
from ldm.distributed.processes import Learners, leave
from ldm.families.autoencoder import KL, VQ, Adversarial
from ldm.families.family import Context
from ldm.models.autoencoder import KLConfig, VQConfig
from ldm.models.discriminator import DiscriminatorConfig
from ldm.training.log import Log
from ldm.training.loop import Trainer
from ldm.training.optim import AdamW
from ldm.training.settings import Train

STEPS, BATCH, SIDE, MICRO = 6, 8, 16, 2
GAME = Adversarial(weight=0.5, start=0.3, discriminator=DiscriminatorConfig(channels=8, layers=1, norm_groups=4))
SHAPE: dict[str, Any] = {"channels": (8, 8), "layers": 1, "norm_groups": 4}
FAMILIES = {
    "kl": KL(network=KLConfig(**SHAPE), adversarial=GAME, weight=1e-2),
    "vq": VQ(network=VQConfig(**SHAPE, codes=24), adversarial=GAME, redraw_every=2, redraw_until=1.0),
}


class Noise:
    """Pictures of float64 noise, one for each position."""

    mirrors = True

    def __len__(self) -> int:
        return 40

    def load(self, index: Sequence[int], position: Sequence[int], resolution: int, seed: int, flip: bool) -> ImageBatch:
        """As the contract says, but in float64."""
        image = Rng(seed, list(index)).uniform("image", (3, resolution, resolution)) * 2 - 1
        return ImageBatch(image=image, caption=("",) * len(index), size=torch.zeros(len(index), 6), position=torch.tensor(list(position)))


def learn(kind: str, processes: Learners, folder: Path, micro_batch: int = 0) -> dict[str, torch.Tensor]:
    """Weights, codebook uses and each step's gauges after a few steps."""
    data: Any = Noise()
    stage = Train(model="autoencoder", images=STEPS * BATCH, resolution=SIDE, batch=BATCH, optim=AdamW(lr=1e-3), micro_batch=micro_batch)
    context = Context(data=data, val=data, resolution=SIDE, seed=0, total_images=stage.images)
    torch.manual_seed(0)
    family = FAMILIES[kind].build(context).double()
    if kind == "vq":  # codes that nothing is near to, so that some are drawn anew
        with torch.no_grad():
            family.network.codebook[12:] = 1e3
            family.usage[12:] = 0
    log = Log(folder, console=False, write=False)
    trainer = Trainer(stage, family, context, data=data, folder=folder, key="", workers=0, processes=processes, log=log)
    model = processes.wrap(family)
    if processes.world > 1:
        assert isinstance(model, torch.nn.parallel.DistributedDataParallel) and not model.find_unused_parameters
    found: dict[str, torch.Tensor] = {}
    for batch in batches(data, seed=0, batch=BATCH, resolution=SIDE, stop=STEPS, rank=(processes.rank, processes.world)):
        terms, gauges, _ = trainer._update(model, batch)
        for name in ("lambda", "code_use", "perplexity", "codes_redrawn", "grad_norm_autoencoder", "grad_norm_discriminator"):
            if name in gauges:
                found[f"{kind}.{trainer.step}.{name}"] = gauges[name].double()
        for name, value in terms.items():
            found[f"{kind}.{trainer.step}.{name}"] = processes.mean(value.detach().double())
        trainer.step += 1
    assert trainer.skipped == 0 and trainer.ema is not None
    found |= {f"{kind}.weights.{name}": value.detach().clone() for name, value in family.state_dict().items()}
    return found | {f"{kind}.averages.{name}": value.clone() for name, value in trainer.ema.state().items()}


if __name__ == "__main__":
    folder, micro = Path(sys.argv[1]), int(sys.argv[2])
    processes = Learners()
    found = learn("kl", processes, folder, micro) | learn("vq", processes, folder, micro)
    if processes.main:
        save_file(found, folder / "found.safetensors")
    processes.close()
    leave(0)
