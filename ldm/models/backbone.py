"""Backbone contract: what a denoising network and its configuration answer, with default answers."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import fields, replace
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn

from ldm.config.errors import UserError
from ldm.config.schema import plain
from ldm.diffusion.batch import Cond, Text
from ldm.models.attention_exchange import AttentionExchange


class DenoiserConfig:
    """What the configuration of a denoising network answers; a member is a frozen dataclass with a `kind` of its own.

    Every field has a default. Its config.json holds its fields as they are, but for those that do not count in comparisons,
    under the first of its class names, unless it says otherwise.
    """

    __slots__ = ()

    folder: ClassVar[Literal["unet", "transformer"]] = "transformer"  # where a pipeline folder keeps it
    class_names: ClassVar[tuple[str, ...]]  # what config.json may call it, the one that is written first
    later: ClassVar[tuple[str, ...]] = ()  # fields that a model trained before there were any has at their default

    kind: str  # its name in the union
    in_channels: int  # channels of x and Cond.image together
    out_channels: int  # channels of the prediction
    context_width: int  # width of the text states
    checkpointing: bool  # recompute blocks in the backward pass

    @abstractmethod
    def build(self) -> Denoiser:
        """A freshly initialised network."""

    @property
    def stock(self) -> bool:
        """Whether diffusers can open the model."""
        return False

    @property
    def pooled_width(self) -> int:
        """Width of the pooled text, where it is read."""
        return self.context_width

    @property
    def multiple(self) -> int:
        """Sides of the latents must be multiples of it."""
        return 1

    @property
    def aligned_width(self) -> int:
        """Channels of the states of `Denoiser.aligned`; 0: no block of it can be aligned (`align`)."""
        return 0

    @property
    def reads_pooled(self) -> bool:
        """Whether the network must be told the pooled text."""
        return False

    def told_pooled(self, width: int) -> Self:
        """With this width of the pooled text, where the network reads one, by its field `pooled_channels` (0: as the text states)."""
        if not self.reads_pooled or self.pooled_width == width:
            return self
        return replace(self, pooled_channels=0 if width == self.context_width else width)  # type: ignore[type-var]

    @property
    def reads_size(self) -> bool:
        """Whether the network must be told Cond.size (as Stable Diffusion XL's)."""
        return False

    @property
    def reads_guidance(self) -> bool:
        """Whether the network must be told Cond.guidance, as one that was distilled from guided steps (Meng 2023, arXiv 2210.03142)."""
        return False

    @property
    def vector_shape(self) -> tuple[int, ...]:
        """Shape of a sample's Cond.vector, where the network is told one; numbers have none."""
        return ()

    @property
    def reads_vector(self) -> bool:
        """Whether the network must be told Cond.vector."""
        return False

    def told_vector(self, kind: str, width: int = 0) -> Self:
        """A network that is also told a vector: a number by its waves (`timestep`), or one of so many values (`projection`).

        Raises:
            UserError: for a network that cannot be.
        """
        raise UserError(f"network.kind: got {self.kind}, which is told no vector (a level of noise, an embedding); use unet")

    def identity(self) -> dict[str, Any]:
        """What a trained network depends on, as plain values: all fields but what changes no bit, and later ones at their default."""
        usual = type(self)()
        unsaid = {name for name in self.later if getattr(self, name) == getattr(usual, name)}
        return {**{k: v for k, v in plain(self).items() if k not in unsaid}, "checkpointing": False}

    def continuing(self, base: Self) -> Self:
        """The configuration of a network that goes on from `base`: its shape is the base's, what concerns training alone is as here."""
        return replace(base, checkpointing=self.checkpointing)  # type: ignore[type-var]

    def to_diffusers(self) -> dict[str, Any]:
        """The content of config.json; whoever writes the folder adds `sample_size`, the side of the latents."""
        said = {field.name: getattr(self, field.name) for field in fields(self) if field.compare}  # type: ignore[arg-type]
        return {"_class_name": self.class_names[0]} | {k: list(v) if isinstance(v, tuple) else v for k, v in said.items() if k != "kind"}

    @classmethod
    def from_diffusers(cls, values: Mapping[str, Any]) -> Self:
        """The configuration behind a config.json.

        Raises:
            UserError: for a field whose value this network does not have.
        """
        said = {k: v for k, v in values.items() if not k.startswith("_") and k != "sample_size"}
        if unknown := said.keys() - {field.name for field in fields(cls)}:  # type: ignore[arg-type]
            raise UserError(f"config.json of {cls.class_names[0]}: the field {min(unknown)!r} is not known here; leave it out")
        return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in said.items()})


class Denoiser(nn.Module):
    """A network that predicts the target of a diffusion process: x, t and what it is told in, (B,C',h,w) out."""

    lora_targets: ClassVar[tuple[str, ...]] = (
        "to_q",
        "to_k",
        "to_v",
        "to_out.0",
    )  # ends of layers' names that LoRA adapts by default, as diffusers' scripts do

    joins: int = 0  # channels of x that are views, where it is told any

    def __init__(self, config: DenoiserConfig) -> None:
        super().__init__()
        self.config = config
        self.checkpointing = config.checkpointing

    @abstractmethod
    def forward(self, x: Tensor, t: Tensor, cond: Cond, memory: Any = None, step: Any = None) -> Tensor:
        """Predict the target.

        Args:
            x: (B,C,h,w), the noised latents.
            t: (B,), the time in the units of training.
            cond: all else that the network is told.
            memory: what `remember` made of the text of `cond`; None: nothing is remembered.
            step: what `schedule` made of `t` and `cond`; None: nothing is.

        Returns:
            (B,C',h,w).
        """

    def remember(self, text: Text) -> Any:
        """What depends on the prompt alone (such as keys and values), computed once for all steps."""
        return None

    def exchanging(self, memory: Any, exchange: AttentionExchange) -> Any:
        """What `remember` made, with an exchange of attention between rows of the batch.

        Raises:
            UserError: for a network that has no attention to the text alone.
        """
        raise UserError(f"source: attention is exchanged in U-Nets, not in {self.config.class_names[0]}; leave it out")

    def schedule(self, t: Tensor, cond: Cond) -> list[Any]:
        """What depends on the times t (S,) alone, and with `told_more` on `cond`, computed once for each step: S of it."""
        return [None] * len(t)

    @property
    def told_more(self) -> bool:
        """Whether `schedule` depends on the prompt."""
        return False

    def recomputed(self) -> Iterable[nn.Module]:
        """The blocks that the backward pass computes anew where the configuration asks for `checkpointing`."""
        return ()

    def aligned(self) -> nn.Module:
        """The block whose states may learn to tell what is seen (`align`), with `aligned_width` of the configuration as channels.

        It gives (B,C,h,w), or (B,N,C) of N patches, alone or first.

        Raises:
            ValueError: for a network that has none.
        """
        raise ValueError(f"{self.config.class_names[0]} has no block that can be aligned")

    def for_inference(self, dtype: torch.dtype | None = None) -> Self:
        """The network, changed in place so that it only draws.

        Args:
            dtype: the type that it will be called under autocast with, which must not change its numbers; None: as it is.
        """
        return self.eval().requires_grad_(False)

    def told_guidance(self, channels: int) -> Self:
        """The same function, told the guidance scale as waves of so many channels, to which new weights of zero listen.

        Raises:
            UserError: for a network that cannot be.
        """
        name = self.config.class_names[0]
        raise UserError(f"distill.guidance: {name} cannot be told a scale; give one scale twice, such as [3, 3], which it learns alone")

    def taught_vector(self, wanted: Any) -> Self:
        """The same function, with a class embedding as a configuration of its kind has it, that says nothing yet."""
        raise UserError(f"init: {self.config.class_names[0]} is told no vector; train it with one from the start")

    def widened(self, in_channels: int) -> Self:
        """The same function with more input channels, to which new weights of zero listen.

        Raises:
            UserError: for a network that cannot be.
        """
        name = self.config.class_names[0]
        raise UserError(f"init: {name} cannot be widened; train it with inpaint, or with its conditions, from the start")
