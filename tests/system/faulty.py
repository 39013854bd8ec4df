"""`ldm train` with a fault built in: FAULT=kind:rank:step makes one process misbehave at a step of the autoencoder's stage."""

from __future__ import annotations

import os
import resource
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

# As ldm.distributed.environment.prepare does, but for a module that loads torch before.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

import torch

from ldm.__main__ import main
from ldm.config.errors import UserError
from ldm.families.autoencoder import AutoencoderFamily

BATCH = 8
kinds, rank, steps = (os.environ.get("FAULT") or "none:0:0").split(":")
at = dict(zip(steps.split("+"), kinds.split("+"), strict=True))  # by step, the fault
mine = os.environ.get("RANK", "0") == rank and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"  # a launcher's second try is sound
words = sys.argv[1:]
own_loss = AutoencoderFamily.loss


def loss(self: AutoencoderFamily, batch: Any, rng: Any) -> Any:
    """The family's loss, with the fault in it."""
    kind = at.get(str(self.images // BATCH)) if mine else None
    if kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif kind == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif kind == "term":
        os.kill(os.getpid(), signal.SIGTERM)
    elif kind == "raise":
        raise ValueError("the wheel came off")
    elif kind == "mistake":
        raise UserError("wheel: it came off; put it on again")
    elif kind == "memory":
        limits = resource.getrlimit(resource.RLIMIT_AS)
        try:
            resource.setrlimit(resource.RLIMIT_AS, (2**30 + 1024 * int(Path("/proc/self/statm").read_text().split()[0]) * 4, limits[1]))
            torch.zeros(2**31)
        finally:
            resource.setrlimit(resource.RLIMIT_AS, limits)
    elif kind == "hang":
        time.sleep(1000)
    elif kind == "slow":
        time.sleep(0.4)
    elif kind == "pixel":
        image = batch.image.clone()
        image[-1, 0, 0, 0] = torch.nan
        return own_loss(self, replace(batch, image=image), rng)
    elif kind == "loss":
        terms, gauges = own_loss(self, batch, rng)
        return terms | {"kl": terms["kl"] + torch.inf}, gauges
    elif kind == "gradient":
        terms, gauges = own_loss(self, batch, rng)
        weight = next(self.network.parameters())
        handle = weight.register_hook(lambda grad: (handle.remove(), torch.full_like(grad, torch.inf))[1])
        return terms, gauges
    return own_loss(self, batch, rng)


AutoencoderFamily.loss = loss  # type: ignore[method-assign]
if mine and kinds == "word":
    words.append(steps)

if __name__ == "__main__":
    sys.exit(main(["train", *words]))
