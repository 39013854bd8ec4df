"""Ports: how a denoising network is told a view, each with what its network reads, adds and learns."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Literal, Protocol, TypeAlias, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.config.errors import UserError
from ldm.config.schema import BY_KIND, Fraction, Positive, config
from ldm.data.views import ViewKind
from ldm.diffusion.batch import Boxes, Graph, Mixed, Movable, Objects, Triples, View
from ldm.diffusion.process import Process
from ldm.formats.assembly import PLAIN
from ldm.formats.latent_codec import LatentCodec, full
from ldm.models import denoiser
from ldm.models.beside_text import BesideText, EmbeddingTokens, MapTokens, TripleTokens
from ldm.models.conditioned import ConditionNetwork, Embedded, Joined
from ldm.models.controlnet import ControlNet, ControlNetConfig
from ldm.models.denoiser import Denoiser
from ldm.models.grounding import Grounding
from ldm.models.t2i_adapter import T2IAdapter, T2IAdapterConfig
from ldm.models.unet import UNet, UNetConfig
from ldm.text.encoder import TextEncoder
from ldm.text.own_clip import OwnClip

UPSCALE = "Upscale"
UPSCALED = 0.08333  # the scaling factor that StableDiffusionUpscalePipeline sets whatever an autoencoder says
LOW_RES = {  # what it noises the small picture by; at noise_level 0, as here, next to nothing
    "_class_name": "DDPMScheduler",
    "num_train_timesteps": 1000,
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "scaled_linear",
}


class Latents(Protocol):
    """What a condition's network must know of the latents beside it."""

    @property
    def factor(self) -> int:
        """How many times smaller than pictures they are."""
        ...

    @property
    def channels(self) -> int:
        """Of them."""
        ...

    @property
    def embedding(self) -> int:
        """Width of the embeddings of pictures; 0: there are none."""
        ...


@dataclass(frozen=True)
class Frozen:
    """Frozen networks that encoders of views may use."""

    codec: LatentCodec
    text: TextEncoder
    process: Process
    clip: OwnClip | None = None  # that makes embeddings of pictures


class PortConfig(ABC):
    """What a member of `Port` answers."""

    __slots__ = ()
    kind: str
    forms: ClassVar[tuple[str, ...]] = ("map", "classes")  # of views that it takes
    unet: ClassVar[bool] = False  # whether the base must be a U-Net
    brings: ClassVar[tuple[str, ...]] = ()  # parts of the names of weights that the base has for it alone

    @property
    def vector(self) -> bool:
        """Whether it tells the network something that joins the time embedding."""
        return bool(self.noises()[0])

    def guided(self, kind: ViewKind) -> bool:
        """Whether what guidance goes away from is not told it, as it is not told the prompt."""
        return False

    def blank(self, kind: ViewKind) -> bool:
        """Whether samples that are not told it are told zeros in its place, and not nothing."""
        return False

    def pipeline(self, network: denoiser.Network, channels: int, kind: ViewKind) -> str:
        """What the pipeline of diffusers that opens it is named, StableDiffusion...Pipeline; empty: none does."""
        return ""

    def noises(self) -> tuple[float, float]:
        """Share of the schedule up to which noise is mixed into what is told, in training, and how much when drawing; 0: none."""
        return 0.0, 0.0

    def joins(self, kind: ViewKind, channels: int) -> int:
        """Channels of x that it needs, beside latents of so many `channels`."""
        return 0

    def fitted(self, network: denoiser.Network, embedding: int = 0) -> denoiser.Network:
        """The base's configuration with what it needs there, of embeddings of so many values."""
        return network

    def prepared(self, base: Denoiser, embedding: int = 0) -> Denoiser:
        """The base with what it needs there, the same function still."""
        return base

    @abstractmethod
    def encode(self, view: View, kind: ViewKind, frozen: Frozen, size: tuple[int, int]) -> Tensor | Movable:
        """What its network is told of a view, without gradients: a function of each picture's own.

        Args:
            view: of B pictures, on the networks' device.
            size: height and width of the latents.
        """

    def left_out(self, view: View) -> Iterable[str]:
        """What of a view of one picture its network is not told, a line each."""
        return ()

    @abstractmethod
    def network(self, kind: ViewKind, base: Denoiser, codec: Latents) -> ConditionNetwork:
        """Its network beside a base, which leaves that as it is until it has learned."""


@config
class Concat(PortConfig):
    """Concat port: the view joins the input channels; all of the network learns."""

    kind: Literal["concat"] = "concat"
    # Latents of the map as a picture, or its pixels in the latents' size; auto: pixels of classes, latents of others.
    encoder: Literal["auto", "latents", "pixels"] = "auto"
    noise: Fraction = 0.0  # most noise that is mixed into the map in training, as a share of the schedule; the network is told how much
    drawn_noise: Fraction = 0.0  # and when drawing

    def pipeline(self, network: denoiser.Network, channels: int, kind: ViewKind) -> str:
        """Of latents that join; a small picture beside latents of its size is Stable Diffusion's upscaler, other pixels none is told."""
        if not self.pixels(kind):
            return "" if self.noise else "InstructPix2Pix"
        return UPSCALE if kind.form == "map" and kind.divide > 1 else ""

    def noises(self) -> tuple[float, float]:
        """As it says."""
        return self.noise, self.drawn_noise

    def fitted(self, network: denoiser.Network, embedding: int = 0) -> denoiser.Network:
        """With a class embedding of the level of noise."""
        return cast("denoiser.Network", network.told_vector("timestep")) if self.noise else network

    def prepared(self, base: Denoiser, embedding: int = 0) -> Denoiser:
        """The same function with one that says nothing yet."""
        fresh = self.noise and not base.config.reads_vector
        return base.taught_vector(base.config.told_vector("timestep")) if fresh else base

    def pixels(self, kind: ViewKind) -> bool:
        """Whether the map itself is told, not its latents."""
        return self.encoder == "pixels" or (self.encoder == "auto" and kind.form == "classes")

    def joins(self, kind: ViewKind, channels: int) -> int:
        """The map's channels, or those of its latents."""
        return kind.channels if self.pixels(kind) else channels

    def encode(self, view: View, kind: ViewKind, frozen: Frozen, size: tuple[int, int]) -> Tensor:
        """Maps (B,C,h,w)."""
        assert isinstance(view, Tensor)
        image = as_map(view, kind)
        if self.pixels(kind):
            return resized(image, size) if kind.form == "classes" else 2 * resized(image, size) - 1
        picture = 2 * image.expand(-1, 3, -1, -1) - 1
        whole = (size[0] * frozen.codec.factor, size[1] * frozen.codec.factor)
        return full(frozen.codec.moments(resized(picture, whole).to(frozen.codec.mean.device, frozen.codec.dtype))[0])

    def network(self, kind: ViewKind, base: Denoiser, codec: Latents) -> ConditionNetwork:
        """Nothing but the joining.

        Raises:
            UserError: for the pixels of a small picture that are not those of the latents.
        """
        if self.encoder == "pixels" and kind.divide not in (1, codec.factor):
            said = f"small:{kind.divide} beside an autoencoder that makes pictures {codec.factor} times smaller"
            raise UserError(f"models.diffusion.conditions: encoder pixels: got {said}; take small:{codec.factor}, or encoder: latents")
        return Joined(self.joins(kind, codec.channels), bool(self.noise))


class AddedToUNet(PortConfig):
    """Ports by which a network of its own adds to a U-Net, whose weights stay."""

    __slots__ = ()
    unet: ClassVar[bool] = True

    def encode(self, view: View, kind: ViewKind, frozen: Frozen, size: tuple[int, int]) -> Tensor:
        """The map as a picture (B,3,H,W) in [0,1]."""
        assert isinstance(view, Tensor)
        return resized(as_picture(view, kind), (size[0] * frozen.codec.factor, size[1] * frozen.codec.factor))


@config
class Residual(AddedToUNet):
    """Residual port: a ControlNet, a copy of the U-Net's way down, adds to its skips."""

    kind: Literal["residual"] = "residual"

    def pipeline(self, network: denoiser.Network, channels: int, kind: ViewKind) -> str:
        """Of a U-Net without further inputs."""
        return "ControlNet"

    def network(self, kind: ViewKind, base: Denoiser, codec: Latents) -> ConditionNetwork:
        """A ControlNet."""
        unet = cast(UNet, base).config
        return ControlNet.beside(unet, ControlNetConfig.shrinking(codec.factor, unet.channels[0]), codec.channels)


@config
class Adapter(AddedToUNet):
    """Adapter port: a T2I-Adapter, a small network, adds to each level of the U-Net on the way down."""

    kind: Literal["adapter"] = "adapter"
    layers: Positive = 2  # residual blocks per level

    def pipeline(self, network: denoiser.Network, channels: int, kind: ViewKind) -> str:
        """diffusers adds to a level behind its downsampling where the level does not attend, which fits the last one alone."""
        return "Adapter" if isinstance(network, UNetConfig) and all(network.attention[:-1]) else ""

    def network(self, kind: ViewKind, base: Denoiser, codec: Latents) -> ConditionNetwork:
        """A fresh T2I-Adapter."""
        return T2IAdapter(T2IAdapterConfig(layers=self.layers), cast(UNet, base).config.channels, codec.factor)


@config
class Gated(PortConfig):
    """Gated port: every transformer of the U-Net attends to objects too, each told by a box and a phrase (GLIGEN)."""

    kind: Literal["gated"] = "gated"
    most: Positive = 30  # boxes; others are left out. diffusers' pipeline always tells 30, those that are not there included

    unet: ClassVar[bool] = True
    forms: ClassVar[tuple[str, ...]] = ("boxes",)
    brings: ClassVar[tuple[str, ...]] = (".fuser.", "position_net.")

    def pipeline(self, network: denoiser.Network, channels: int, kind: ViewKind) -> str:
        """diffusers' pipeline takes four channels of the latents, whatever there are."""
        return "GLIGEN" if channels == 4 else ""

    def fitted(self, network: denoiser.Network, embedding: int = 0) -> denoiser.Network:
        """Gated."""
        return replace(network, gated=True) if isinstance(network, UNetConfig) else network

    def prepared(self, base: Denoiser, embedding: int = 0) -> Denoiser:
        """With gates that are shut, where there are none."""
        return cast(UNet, base).grounded()

    def encode(self, view: View, kind: ViewKind, frozen: Frozen, size: tuple[int, int]) -> Objects:
        """Boxes with the pooled text of their phrases, each encoded alone."""
        assert isinstance(view, Boxes)
        boxes = view.padded(self.most)
        known = pooled_of(frozen.text, {phrase for row in boxes.phrases for phrase in row if phrase}, self.kind)
        nothing = torch.zeros_like(next(iter(known.values())))
        phrase = torch.stack([known.get(word, nothing) for row in boxes.phrases for word in row]).view(*boxes.there.shape, -1)
        return Objects(box=boxes.box, there=boxes.there, phrase=phrase, weight=torch.ones(len(phrase), device=phrase.device))

    def left_out(self, view: View) -> Iterable[str]:
        """Boxes beyond the most."""
        assert isinstance(view, Boxes)
        return beyond(len(view.phrases[0]), self.most, "boxes")

    def network(self, kind: ViewKind, base: Denoiser, codec: Latents) -> ConditionNetwork:
        """Nothing but the telling: the weights are the U-Net's."""
        return Grounding()


@config
class Vector(PortConfig):
    """Vector port: the embedding of a picture in the run's own CLIP joins the time embedding (unCLIP, arXiv 2204.06125, section 2.1)."""

    kind: Literal["vector"] = "vector"
    noise: Fraction = 0.0  # most noise that is mixed into embeddings in training, as a share of the schedule; the network is told how much
    drawn_noise: Fraction = 0.0  # and when drawing

    unet: ClassVar[bool] = True
    forms: ClassVar[tuple[str, ...]] = ("embedding",)
    brings: ClassVar[tuple[str, ...]] = ("class_embedding.",)

    @property
    def vector(self) -> bool:
        """It does."""
        return True

    def guided(self, kind: ViewKind) -> bool:
        """It is, as in StableUnCLIPPipeline."""
        return True

    def noises(self) -> tuple[float, float]:
        """As it says."""
        return self.noise, self.drawn_noise

    def fitted(self, network: denoiser.Network, embedding: int = 0) -> denoiser.Network:
        """With a class embedding of the embedding and the level of noise in it, as StableUnCLIPPipeline tells them.

        Raises:
            UserError: where there are no embeddings.
        """
        if not embedding:
            raise UserError("conditions: port vector tells embeddings of pictures, and the text encoder makes none; use kind clip")
        return cast("denoiser.Network", network.told_vector("projection", 2 * embedding))

    def prepared(self, base: Denoiser, embedding: int = 0) -> Denoiser:
        """The same function with one that says nothing yet."""
        return base if base.config.reads_vector else base.taught_vector(base.config.told_vector("projection", 2 * embedding))

    def encode(self, view: View, kind: ViewKind, frozen: Frozen, size: tuple[int, int]) -> Tensor:
        """Embeddings (B,E) whose values have unit variance."""
        return embedded(view, frozen)

    def network(self, kind: ViewKind, base: Denoiser, codec: Latents) -> ConditionNetwork:
        """Nothing but the telling: the weights are the U-Net's."""
        return Embedded(codec.embedding)


@config
class Cross(PortConfig):
    """Cross port: every attention to the text reads tokens of the view too, by keys and values of their own (IP-Adapter)."""

    kind: Literal["cross"] = "cross"
    side: Positive = 4  # of the grid of tokens that a map becomes: 1 tells what is there, more tell where
    most: Positive = 8  # triples of a graph; others are left out

    unet: ClassVar[bool] = True
    forms: ClassVar[tuple[str, ...]] = ("map", "classes", "graph", "embedding")

    def guided(self, kind: ViewKind) -> bool:
        """Embeddings, as IP-Adapter's."""
        return kind.form == "embedding"

    def blank(self, kind: ViewKind) -> bool:
        """Embeddings: IP-Adapter attends to tokens of zeros where diffusers draws without the prompt."""
        return kind.form == "embedding"

    def pipeline(self, network: denoiser.Network, channels: int, kind: ViewKind) -> str:
        """Embeddings are told to the base's own pipeline, by load_ip_adapter."""
        return PLAIN if kind.form == "embedding" else ""

    def encode(self, view: View, kind: ViewKind, frozen: Frozen, size: tuple[int, int]) -> Tensor | Triples:
        """The map as a picture (B,3,H,W) in [0,1]; of a graph the pooled texts of its triples; embeddings (B,E) of unit variance."""
        if kind.form == "embedding":
            return embedded(view, frozen)
        if isinstance(view, Tensor):
            return resized(as_picture(view, kind), (size[0] * frozen.codec.factor, size[1] * frozen.codec.factor))
        assert isinstance(view, Graph)
        rows = [row[: self.most] for row in view.triples]
        known = pooled_of(frozen.text, {word for row in rows for triple in row for word in triple}, self.kind)
        nothing = torch.zeros_like(next(iter(known.values()))).repeat(3)
        words = [torch.cat([known[word] for word in row[k]]) if k < len(row) else nothing for row in rows for k in range(self.most)]
        there = torch.tensor([[k < len(row) for k in range(self.most)] for row in rows], device=nothing.device)
        return Triples(words=torch.stack(words).view(len(rows), self.most, -1), there=there)

    def left_out(self, view: View) -> Iterable[str]:
        """Triples beyond the most."""
        return beyond(len(view.triples[0]), self.most, "triples") if isinstance(view, Graph) else ()

    def network(self, kind: ViewKind, base: Denoiser, codec: Latents) -> ConditionNetwork:
        """Tokens, and keys and values of the width that each attention has."""
        unet = cast(UNet, base)
        width = unet.config.context_width
        reads: nn.Module = TripleTokens(width) if kind.form == "graph" else MapTokens(width, self.side)
        if kind.form == "embedding":
            reads = EmbeddingTokens(codec.embedding, width)
        return BesideText(reads, width, {name: layer.to_q.out_features for name, layer in unet.attentions_to_text().items()})


def beyond(many: int, most: int, what: str) -> list[str]:
    """What is told where there are more than a network reads."""
    return [f"{many} {what}, of which the model is told the first {most}"] if many > most else []


def pooled_of(text: TextEncoder, words: set[str], port: str) -> dict[str, Tensor]:
    """The pooled text (D,) of each of some words; of one at least.

    Raises:
        UserError: for a text encoder that has no pooled text as wide as its states.
    """
    every = sorted(words) or [""]
    pooled = text.encode(every).pooled
    if pooled is None or pooled.shape[1] != text.width:
        raise UserError(f"conditions: port {port} reads words by pooled text as wide as the states; this text encoder has none such")
    return dict(zip(every, pooled, strict=True))


def embedded(view: View, frozen: Frozen) -> Tensor:
    """Embeddings (B,E), whose values have unit variance, of pictures (B,3,H,W) in [0,1], of sums, or of embeddings (B,E) of any length."""
    assert frozen.clip is not None
    if isinstance(view, Mixed):
        each = []
        if view.image.shape[1]:
            each.append(frozen.clip.embed_images(2 * view.image.flatten(0, 1) - 1).unflatten(0, view.image.shape[:2]))
        if view.words[0]:
            each.append(frozen.clip.embed_captions([word for row in view.words for word in row]).unflatten(0, (len(view.words), -1)))
        every = torch.cat(each, dim=1)  # (B,K+M,E)
        total = (view.weight[..., None].to(every) * every).sum(1)
        if (total.norm(dim=1) < 1e-4 * every.norm(dim=2).amax(1)).any():
            raise UserError("given: the weights of what is told as an embedding leave nothing of it; change one of them")
        return embedded(total, frozen)
    assert isinstance(view, Tensor)
    if view.dim() == 2:
        return view.shape[1] ** 0.5 * F.normalize(view.float(), dim=1)
    return frozen.clip.embedded(2 * view.float() - 1)


def as_picture(view: Tensor, kind: ViewKind) -> Tensor:
    """A map as a picture (B,3,H,W) in [0,1]; classes in their colours, black where they are unknown."""
    if kind.form != "classes":
        return view.float().expand(-1, 3, -1, -1)
    colours = torch.tensor([(0, 0, 0), *kind.colours], device=view.device) / 255
    return colours[view[:, 0].long() + 1].permute(0, 3, 1, 2)


def as_map(view: Tensor, kind: ViewKind) -> Tensor:
    """A map (B,C,H,W) in [0,1]; class numbers as one channel for each class, none where they are unknown."""
    if kind.form != "classes":
        return view.float()
    return (view == torch.arange(kind.channels, device=view.device).view(1, -1, 1, 1)).float()


def resized(x: Tensor, size: tuple[int, int]) -> Tensor:
    """A map (B,C,H,W) in another size: the mean of what falls together, or enlarged."""
    if tuple(x.shape[2:]) == tuple(size):
        return x
    if x.shape[2] >= size[0] and x.shape[3] >= size[1]:
        return F.adaptive_avg_pool2d(x, size)
    return F.interpolate(x, size=size, mode="bicubic", align_corners=False)


def learned_of(base: nn.Module, ports: Iterable[PortConfig]) -> list[nn.Parameter]:
    """The weights that a base has for some ports alone."""
    marks = [mark for port in ports for mark in port.brings]
    return [weight for name, weight in base.named_parameters() if any(mark in name for mark in marks)]


# A new port is a class here and its network in ldm.models.
Port: TypeAlias = Annotated[Concat | Residual | Adapter | Gated | Vector | Cross, BY_KIND]
