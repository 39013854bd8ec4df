"""Stand-ins for a trained model: they know the prompts' scenes and draw them, or do not listen."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from ldm.data.scenes.captions import parse, say
from ldm.data.scenes.render import render, to_bytes
from ldm.data.scenes.source import prompts
from ldm.data.scenes.spec import Specs
from ldm.families.draws import OWN, Wanted

SIDE = 32  # px


def always(guidance: float, prompt: str) -> bool:
    """Every prompt is drawn right."""
    return True


@dataclass
class Painter:
    """Draws a perfect answer to each prompt of a tier that it listens to, and a scene of its own instead of others."""

    able = frozenset({"sample", "reconstruct"})
    reads_prompts, told = True, {}

    tier: Any = "one"
    seed: int = 0  # of the prompts that it knows
    count: int = 64
    listens: Callable[[float, str], bool] = always  # (guidance, prompt)
    faithful: float = 1.0  # how much of a picture a reconstruction keeps
    calls: list[dict[str, Any]] = field(default_factory=list)
    defaults: dict[str, Any] = field(default_factory=lambda: {"size": (SIDE, SIDE)})
    content_hash: str = "hash"

    def __post_init__(self) -> None:
        """Learn the answers by heart."""
        self.answers: dict[str, Specs] = {}
        for pairs in ("seen", "held-out"):
            known = prompts(self.tier, self.count, self.seed, pairs)  # type: ignore[arg-type]
            self.answers |= {text: known.specs.take([i]) for i, text in enumerate(known.text)}
        self.own = prompts(self.tier, self.count, 12345).specs

    def parameters(self) -> Any:
        """As a module has them."""
        return iter([torch.zeros(1)])

    def settings(self, wanted: Wanted = OWN) -> SimpleNamespace:
        """The model's own: 20 steps of ddim at guidance 3."""
        own = {"steps": 20, "guidance": 3.0, "sampler": "ddim"}
        return SimpleNamespace(**{name: getattr(wanted, name) or value for name, value in own.items()}, spacing="trailing")

    def sample(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        settings: Wanted = OWN,
        *,
        size: tuple[int, int] | None = None,
        on_step: Callable[[int, int], None] | None = None,
    ) -> Tensor:
        """Pictures uint8 (N,H,W,3)."""
        used = self.settings(settings)
        self.calls.append({"prompts": tuple(prompts), "seeds": tuple(seeds), "size": size, **vars(used)})
        side = (size or self.defaults["size"])[0]
        for step in range(used.steps):
            if on_step is not None:
                on_step(step + 1, used.steps)
        pictures = []
        for i, prompt in enumerate(prompts):
            heard = self.listens(used.guidance, prompt)
            scene = self.answers.get(say(parse(prompt))) if heard else None
            pictures.append(to_bytes(render(self.own.take([i % self.count]) if scene is None else scene, side)))
        return torch.cat([torch.from_numpy(picture) for picture in pictures])

    def reconstruct(self, image: Tensor) -> Tensor:
        """Images (B,3,H,W) in [-1,1], duller the less it is faithful."""
        return image * self.faithful
