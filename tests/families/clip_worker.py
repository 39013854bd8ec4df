"""One of several processes that share a batch of CLIP; the first saves the averaged gradients. Started by test_clip.py."""

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from finished_model import SIDE, TEXT, Pictures  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

from ldm.diffusion.batch import rows  # noqa: E402
from ldm.diffusion.rng import Rng  # noqa: E402
from ldm.families.clip import Clip  # noqa: E402
from ldm.families.family import Context, Ranks  # noqa: E402
from ldm.models.image_tower import ImageTowerConfig  # noqa: E402

CONFIG = Clip(text=TEXT, tower=ImageTowerConfig(channels=(8, 16), embedding=24, grid=2), vocabulary=560)


def gradients(rank: int, world: int) -> dict[str, torch.Tensor]:
    """Of this rank's share of 6 pairs."""
    data = Pictures()
    torch.manual_seed(0)
    family = CONFIG.build(Context(data=data, val=data, resolution=SIDE, seed=0, total_images=1))
    family.ranks = Ranks(rank=rank, world=world)
    batch = data.load(range(6), range(6), SIDE, 0, False)
    share = rows(batch, rank * 6 // world, (rank + 1) * 6 // world)
    terms, _ = family(share, Rng(0, share.position))
    terms["contrastive"].backward()
    return {name: p.grad for name, p in family.named_parameters() if p.grad is not None}


if __name__ == "__main__":
    rank, world, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", init_method=f"file://{folder / 'meet'}", rank=rank, world_size=world)
    found = gradients(rank, world)
    for value in found.values():
        dist.all_reduce(value)
        value /= world
    if rank == 0:
        save_file(found, folder / "found.safetensors")
    dist.barrier()
    # Gloo's threads now and then abort a process that takes them down at its end; there is nothing left to take down.
    os._exit(0)
