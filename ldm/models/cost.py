"""Cost of networks: parameters, FLOPs and activation memory, counted on torch's meta device, where nothing is computed."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ldm.diffusion.batch import Cond, Text
from ldm.models.autoencoder import KLConfig, VQAutoencoder, VQConfig
from ldm.models.backbone import DenoiserConfig
from ldm.models.coder import Bottom, CoderStage
from ldm.models.dc_autoencoder import DCConfig
from ldm.models.discriminator import DiscriminatorConfig
from ldm.models.palette import Palette
from ldm.models.pixels import Pixels, PixelsConfig
from ldm.models.text_tower import TextTower, TowerPair

IMAGES = 2  # of a measured call: PyTorch's norms refuse a single value per channel, which one image may have at the lowest level


@dataclass(frozen=True)
class Cost:
    """Of one image. A multiplication and its addition count as two; only matrix products and convolutions count."""

    forward: int  # FLOPs
    backward: int  # FLOPs, what is recomputed included
    activations: int  # bytes that the forward pass keeps for the backward pass, in float32

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.forward + other.forward, self.backward + other.backward, self.activations + other.activations)

    def __mul__(self, times: float) -> Cost:
        return Cost(round(self.forward * times), round(self.backward * times), round(self.activations * times))

    @property
    def training(self) -> int:
        """FLOPs of a forward and a backward pass."""
        return self.forward + self.backward


NOTHING = Cost(0, 0, 0)


def count(network: nn.Module) -> int:
    """Parameters."""
    return sum(p.numel() for p in network.parameters())


class Ledger(TorchFunctionMode):
    """Within it the bytes that forward passes keep for backward ones are added up, each block of memory once.

    Attention's scores do not count: the kernels that train keep none, and only the meta device's own does.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.seen = {p.untyped_storage()._cdata for p in network.parameters()}
        self.held: list[Tensor] = []  # so that no block of memory takes the place of one that was counted
        self.bytes = 0
        self.inside = False

    def keep(self, tensor: Tensor) -> Tensor:
        """Count a tensor, unless it is a weight or has been counted."""
        storage = tensor.untyped_storage()
        if not self.inside and storage._cdata not in self.seen:
            self.seen.add(storage._cdata)
            self.held.append(tensor)
            self.bytes += storage.nbytes()
        return tensor

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Every call as it is, but for attention, whose inputs and output alone are counted."""
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        self.inside = True
        out = func(*args, **(kwargs or {}))
        self.inside = False
        for tensor in (*args[:3], out):
            self.keep(tensor)
        return out


def measure(network: nn.Module, call: Callable[[], Tensor]) -> Cost:
    """What `call`, which runs `network` on IMAGES meta images, and the backward pass from its sum cost for each of them."""
    from torch.utils.flop_counter import FlopCounterMode  # which imports triton where there is one

    with FlopCounterMode(display=False) as counter:
        with Ledger(network) as ledger, torch.autograd.graph.saved_tensors_hooks(ledger.keep, lambda tensor: tensor):
            out = call()
        forward = counter.get_total_flops()
        if out.requires_grad:  # not where a network has no weights, and nothing learns through it
            out.sum().backward()
        both = counter.get_total_flops()
    return Cost(forward, both - forward, ledger.bytes) * (1 / IMAGES)


def largest_block(network: nn.Module, blocks: Iterable[nn.Module], call: Callable[[], Tensor]) -> int:
    """The most bytes for an image that one recomputed block keeps while its backward pass runs."""
    most, before = 0, 0
    with Ledger(network) as ledger, torch.autograd.graph.saved_tensors_hooks(ledger.keep, lambda tensor: tensor):

        def enter(module: nn.Module, inputs: Any) -> None:
            nonlocal before
            before = ledger.bytes

        def leave(module: nn.Module, inputs: Any, output: Any) -> None:
            nonlocal most
            most = max(most, ledger.bytes - before)

        for module in blocks:
            module.register_forward_pre_hook(enter)
            module.register_forward_hook(leave)
        call()
    return most // IMAGES


def denoiser(config: DenoiserConfig, height: int, width: int, tokens: int) -> tuple[int, Cost]:
    """Parameters of a denoising network and its cost for latents (height, width) and so many text tokens."""
    return _denoiser(config, config.checkpointing, height, width, tokens)


@lru_cache(maxsize=64)  # by configurations of which two that differ in `checkpointing` alone are equal, hence the argument
def _denoiser(config: DenoiserConfig, checkpointing: bool, height: int, width: int, tokens: int) -> tuple[int, Cost]:
    with torch.device("meta"):
        network = config.build()
        image = torch.empty(IMAGES, config.in_channels, height, width)
        pooled = torch.empty(IMAGES, config.pooled_width)
        states, mask = torch.empty(IMAGES, tokens, config.context_width), torch.ones(IMAGES, tokens, dtype=torch.bool)
        cond = Cond(text=Text(tokens=states, mask=mask, pooled=pooled), size=torch.zeros(IMAGES, 6), guidance=torch.ones(IMAGES))
        cond = replace(cond, vector=torch.zeros(IMAGES, *config.vector_shape))

        def call() -> Tensor:
            return network(image, torch.zeros(IMAGES), cond)

        found = measure(network, call)
        if checkpointing:
            network.checkpointing = False
            found = replace(found, activations=found.activations + largest_block(network, network.recomputed(), call))
        return count(network), found


def autoencoder(config: KLConfig | VQConfig | DCConfig | PixelsConfig, height: int, width: int) -> tuple[int, Cost, Cost]:
    """Parameters of an autoencoder, its encoder's cost and its decoder's, for images of (height, width) px."""
    return _autoencoder(config, config.checkpointing, height, width)


@lru_cache(maxsize=64)
def _autoencoder(
    config: KLConfig | VQConfig | DCConfig | PixelsConfig, checkpointing: bool, height: int, width: int
) -> tuple[int, Cost, Cost]:
    with torch.device("meta"):
        network = config.build()
        image = torch.empty(IMAGES, config.in_channels, height, width)
        latent = torch.empty(IMAGES, network.latent_channels, height // network.factor, width // network.factor, requires_grad=True)

        def encode() -> Tensor:
            found = network.encode(image)
            return found if isinstance(found, Tensor) else torch.cat(found)

        def decode() -> Tensor:
            return network.decode(latent, quantise=False) if isinstance(network, VQAutoencoder | Palette) else network.decode(latent)

        costs = measure(network, encode), measure(network, decode)
        if checkpointing:
            assert not isinstance(network, Pixels), "which has no blocks"
            network.encoder.checkpointing = network.decoder.checkpointing = False
            blocks = [module for module in network.modules() if isinstance(module, CoderStage | Bottom)]
            most = max(largest_block(network, blocks, call) for call in (encode, decode))
            costs = costs[0], replace(costs[1], activations=costs[1].activations + most)
        return count(network), *costs


@lru_cache(maxsize=64)
def discriminator(config: DiscriminatorConfig, height: int, width: int) -> tuple[int, Cost]:
    """Parameters of a discriminator and what an update with it costs: its opinion of a picture, and its own lesson on two."""
    with torch.device("meta"):
        network = config.build()
        picture = torch.empty(IMAGES, config.in_channels, height, width, requires_grad=True)
        pair = torch.empty(2 * IMAGES, config.in_channels, height, width)
        lesson = measure(network, lambda: network(pair))
        frozen = config.build().requires_grad_(False)
        return count(network), lesson + measure(frozen, lambda: frozen(picture))


def distance(network: nn.Module, height: int, width: int) -> Cost:
    """What a frozen perceptual distance on the meta device costs, with its slope."""
    with torch.device("meta"):
        picture, other = torch.empty(IMAGES, 3, height, width, requires_grad=True), torch.empty(IMAGES, 3, height, width)
        return measure(network, lambda: network(picture, other))


def tower(network: nn.Module, side: int) -> Cost:
    """What a network of images alone, on the meta device, costs."""
    with torch.device("meta"):
        return measure(network, lambda: network(torch.empty(IMAGES, 3, side, side)))


@dataclass(frozen=True)
class TextShape:
    """A transformer of a CLIP's text side; of width 0 there is none."""

    name: str
    width: int
    layers: int
    tokens: int = 77
    vocabulary: int = 49_408
    positions: int = 77
    inner: int = 0  # of its feed-forward layers; 0: four times the width
    projected: int = 0  # channels that its pooled state is projected to, where it is; 0: as wide
    embedding: int = 0  # channels of the space that it shares with pictures; 0: there is none
    second: TextShape | None = None  # a tower beside it, whose states stand beside its own and whose pooled state, projected, is read

    @property
    def states(self) -> int:
        """Width of what is read of a token."""
        return self.width + (self.second.width if self.second else 0)

    @property
    def pooled(self) -> int:
        """Width of what is read of a whole caption."""
        return (self.second.projected or self.second.width) if self.second else self.width

    @property
    def towers(self) -> tuple[TextShape, ...]:
        """Itself, and the one beside it."""
        return (self, self.second) if self.second else (self,)

    @property
    def parameters(self) -> int:
        """Embeddings, layers, last norm, and the projection of two."""
        return sum(tower._own for tower in self.towers) + (self.second.width * self.pooled if self.second else 0)

    def built(self) -> TextTower | TowerPair:
        """The network, to count in; on torch's meta device, if that is chosen around the call."""
        first, *others = (tower._tower() for tower in self.towers)
        return TowerPair(first, others[0], nn.Linear(others[0].config.hidden_size, self.pooled, bias=False), 0) if others else first

    def _tower(self) -> TextTower:
        sides = {"hidden_size": self.width, "intermediate_size": self.inner or 4 * self.width, "num_attention_heads": 1}
        known = {"vocab_size": self.vocabulary, "max_position_embeddings": self.positions, "num_hidden_layers": self.layers}
        return TextTower({**sides, **known})

    @property
    def _own(self) -> int:
        w, m = self.width, self.inner or 4 * self.width
        layer = 4 * (w * w + w) + 2 * w * m + m + w + 4 * w
        return (self.vocabulary + self.positions) * w + self.layers * layer + 2 * w

    @property
    def cost(self) -> Cost:
        """Of one caption; the backward pass is twice the forward one, and ten states per layer are kept besides the feed-forward's."""
        return total(tower._cost for tower in self.towers)

    @property
    def _cost(self) -> Cost:
        w, m, n = self.width, self.inner or 4 * self.width, self.tokens
        forward = self.layers * (2 * n * (4 * w * w + 2 * w * m) + 4 * n * n * w)
        return Cost(forward, 2 * forward, 4 * self.layers * n * (10 * w + 2 * m))


def total(costs: Iterable[Cost]) -> Cost:
    """Their sum."""
    return sum(costs, NOTHING)
