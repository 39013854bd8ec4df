"""Conditioned denoising network: a base, and what makes of each view that it is told something that the base takes."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, ClassVar, Self, cast

import torch
from torch import Tensor, nn

from ldm.diffusion.batch import Cond, Text, Told
from ldm.models.attention_exchange import AttentionExchange
from ldm.models.backbone import Denoiser
from ldm.models.embeddings import waves


class ConditionNetwork(nn.Module):
    """Network of one condition. A fresh one must leave what the base computes as it is, to the bit."""

    folder: ClassVar[str] = ""  # where a pipeline folder keeps it, a second one with _1 behind; empty: it has no weights of its own
    class_name: ClassVar[str] = ""  # diffusers' name of it; empty: diffusers has none
    joins: int = 0  # channels that it adds to Cond.image

    def vector(self, told: Told | None, batch: int) -> Tensor | None:
        """What the base is told as Cond.vector (B,...) for a batch, whatever x and t; None: nothing."""
        return None

    @abstractmethod
    def forward(self, x: Tensor, t: Tensor, cond: Cond, told: Told | None) -> Cond:
        """`cond` with what the base is to take.

        Args:
            x: (B,C,h,w), the noised latents.
            t: (B,).
            cond: what the base is told already, by earlier conditions too.
            told: of the view; None: nothing is, for no sample. Where its strength is 0, the result must be as if nothing were.
        """

    def begin(self, base: Denoiser) -> None:
        """Take what a fresh one starts with from the base that it stands beside."""
        return

    def to_diffusers(self) -> dict[str, Any]:
        """The content of its config.json, where it has a folder."""
        return {}


NOT_TOLD = 1000.0  # the level of noise that stands for a map which is not told


class Joined(ConditionNetwork):
    """Concat port: a map of the latents' size joins the channels of x; zeros where nothing is told.

    Args:
        levels: whether the base is told how much noise is in the map (noise augmentation, Ho 2021, arXiv 2106.15282).
    """

    def __init__(self, channels: int, levels: bool = False) -> None:
        super().__init__()
        self.joins, self.levels = channels, levels

    def vector(self, told: Told | None, batch: int) -> Tensor | None:
        """The level of noise (B,)."""
        if not self.levels:
            return None
        if told is None:
            return torch.full((batch,), NOT_TOLD)
        level = torch.zeros_like(told.strength) if told.level is None else told.level
        return torch.where(told.strength > 0, level.to(told.strength), NOT_TOLD)

    def forward(self, x: Tensor, t: Tensor, cond: Cond, told: Told | None) -> Cond:
        """`cond` with the map behind what Cond.image has already."""
        if told is None:
            here = x.new_zeros(len(x), self.joins, *x.shape[2:])
        else:
            here = told.value.to(x) * told.strength.to(x).view(-1, 1, 1, 1)
        return replace(cond, image=here if cond.image is None else torch.cat([cond.image, here], dim=1))


class Embedded(ConditionNetwork):
    """Vector port: the embedding of a picture and the waves of the level of noise in it, side by side; zeros where nothing is told.

    Args:
        width: E, of the embedding.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def vector(self, told: Told | None, batch: int) -> Tensor | None:
        """(B,2E), as StableUnCLIPPipeline tells it."""
        if told is None:
            return torch.zeros(batch, 2 * self.width)
        level = torch.zeros_like(told.strength) if told.level is None else told.level
        both = torch.cat([told.value, waves(level, self.width).to(told.value)], dim=1)
        return both * told.strength.to(both)[:, None]

    def forward(self, x: Tensor, t: Tensor, cond: Cond, told: Told | None) -> Cond:
        """`cond` as it is: `vector` has told it."""
        return cond


class Conditioned(Denoiser):
    """A denoising network that is told views: loop, engine and guidance take it for its base.

    Args:
        base: the network that denoises.
        networks: by view, in the order in which channels join x.
    """

    def __init__(self, base: Denoiser, networks: Mapping[str, ConditionNetwork]) -> None:
        super().__init__(base.config)
        self.base = base
        self.networks = nn.ModuleDict(dict(networks))
        self.joins = sum(network.joins for network in networks.values())

    def forward(self, x: Tensor, t: Tensor, cond: Cond, memory: Any = None, step: Any = None) -> Tensor:
        """As the base's, told what each view's network makes of `cond.given`."""
        given = cond.given or {}
        told = self._vectored(cond, x)
        for view, network in self.networks.items():
            told = network(x, t, told, given.get(view))
        found: Tensor = self.base(x, t, told, memory, step)
        return found

    def remember(self, text: Text) -> Any:
        """As the base's."""
        return self.base.remember(text)

    def exchanging(self, memory: Any, exchange: AttentionExchange) -> Any:
        """As the base's."""
        return self.base.exchanging(memory, exchange)

    def schedule(self, t: Tensor, cond: Cond) -> list[Any]:
        """As the base's."""
        return self.base.schedule(t, self._vectored(cond, t if cond.text is None else cond.text.tokens))

    def _vectored(self, cond: Cond, like: Tensor) -> Cond:
        """What the base is told without its views but for what joins its time embedding; `like` (B,...) has the batch and its device."""
        told = cond.given or {}
        found = [cast(ConditionNetwork, network).vector(told.get(view), len(like)) for view, network in self.networks.items()]
        vectors = [vector.to(like.device) for vector in found if vector is not None]
        return replace(cond, given=None, vector=vectors[0] if vectors else cond.vector)

    @property
    def told_more(self) -> bool:
        """As the base's."""
        return self.base.told_more

    def recomputed(self) -> Iterable[nn.Module]:
        """As the base's."""
        return self.base.recomputed()

    def aligned(self) -> nn.Module:
        """As the base's."""
        return self.base.aligned()

    def for_inference(self, dtype: torch.dtype | None = None) -> Self:
        """The base in the form that only draws; conditions' networks as they are."""
        self.base = self.base.for_inference(dtype)
        self.networks.eval().requires_grad_(False)
        return self


def base_of(network: Denoiser) -> Denoiser:
    """The network without its conditions."""
    return network.base if isinstance(network, Conditioned) else network
