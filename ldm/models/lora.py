"""Low-rank adapters (Hu 2021, arXiv 2106.09685): peft injects them for training; merged into weights and taken out to the bit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ldm.config.errors import UserError

Part = Literal["unet", "text_encoder"]  # as LoRA files name them; "unet" is the denoising network, whatever its shape
ADAPTER = "default"  # peft's name for the only adapter of a network
TEXT_TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj")
TEXT_PREFIX = "text_model."  # of a CLIP text model's layers in files; newer transformers leave it out in memory
SHOWN = 4  # names in a message


@dataclass(frozen=True)
class Pair:
    """What is added to one layer's weight: alpha / r times up @ down."""

    down: Tensor  # (r,in) or (r,in,kh,kw)
    up: Tensor  # (out,r) or (out,r,1,1)
    alpha: float

    @property
    def rank(self) -> int:
        """r."""
        return len(self.down)

    @property
    def scale(self) -> float:
        """alpha / r."""
        return self.alpha / self.rank

    def delta(self, weight: Tensor) -> Tensor:
        """What is added to `weight`, in its shape, at least in float32."""
        kind = torch.promote_types(weight.dtype, torch.float32)
        up, down = (part.to(weight.device, kind).flatten(1) for part in (self.up, self.down))
        return (up @ down * self.scale).view(weight.shape)

    def fits(self, weight: Tensor) -> bool:
        """Whether it can be added to a layer's weight: the same outputs, inputs and kernel."""
        inner = self.up[0].numel() == self.rank
        return inner and len(self.up) == len(weight) and self.down[0].numel() == weight[0].numel()


@dataclass(frozen=True)
class Lora:
    """Adapters of a model's networks, by part and by the name of the layer, dotted as diffusers has it or flat as kohya has it."""

    pairs: Mapping[Part, Mapping[str, Pair]]
    metadata: Mapping[str, str] = field(default_factory=dict)  # what the file's header says
    name: str = "LoRA"  # for messages
    hash: str = ""  # SHA-256 of the file

    def __len__(self) -> int:
        return sum(len(pairs) for pairs in self.pairs.values())


def flat(name: str) -> str:
    """A layer's name as every style of file can say it: without dots, and without the text model's prefix."""
    return name.removeprefix(TEXT_PREFIX).replace(".", "_").removeprefix(flat_prefix())


def flat_prefix() -> str:
    """The text model's prefix in a flat name."""
    return TEXT_PREFIX.replace(".", "_")


def layers(network: nn.Module) -> Iterator[tuple[str, Any]]:
    """The layers that can be adapted, linear ones and convolutions, by name."""
    for name, module in network.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            yield name, module


def matched(lora: Lora, networks: Mapping[Part, nn.Module]) -> dict[tuple[Part, str], Pair]:
    """Every adapter by the part and the dotted name of the layer that it belongs to.

    Raises:
        UserError: if there are none, or naming those that belong to no layer or have another shape.
    """
    if not len(lora):
        raise UserError(f"{lora.name}: not a single LoRA weight in it; give another file")
    found: dict[tuple[Part, str], Pair] = {}
    foreign, misshapen = [], []
    for part, pairs in lora.pairs.items():
        known = {flat(name): (name, layer) for name, layer in layers(networks[part])} if part in networks else {}
        for name, pair in pairs.items():
            if flat(name) not in known:
                foreign.append(f"{part}.{name}")
            elif not pair.fits(known[flat(name)][1].weight):
                misshapen.append(f"{part}.{name}")
            else:
                found[part, known[flat(name)][0]] = pair
    if foreign:
        few = f"{len(foreign)} of its {len(lora)} layers are" if found or misshapen else f"none of its {len(lora)} layers is"
        raise UserError(f"{lora.name}: {few} in this model: {_few(foreign)}; it was made for another kind of model")
    if misshapen:
        raise UserError(f"{lora.name}: made for a model of another size: {_few(misshapen)} do not fit; use the model it was made for")
    return found


def _few(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


class Merged:
    """Adapters in the weights of networks; `undo` restores the very bits, because the former weights are kept.

    Args:
        networks: by part.
        loras: each with its weight; they add up, in this order.

    Raises:
        UserError: as `matched`, with all weights as they were.
    """

    def __init__(self, networks: Mapping[Part, nn.Module], loras: Sequence[tuple[Lora, float]]) -> None:
        wanted = [(matched(lora, networks), weight) for lora, weight in loras]
        self._kept: list[tuple[nn.Parameter, Tensor]] = []
        sums: dict[tuple[Part, str], Tensor] = {}
        for pairs, weight in wanted:
            for place, pair in pairs.items():
                layer: Any = networks[place[0]].get_submodule(place[1])
                delta = weight * pair.delta(layer.weight)
                sums[place] = sums[place] + delta if place in sums else delta
        with torch.no_grad():
            for (part, name), delta in sums.items():
                own: Any = networks[part].get_submodule(name)
                self._kept.append((own.weight, own.weight.detach().clone()))
                own.weight.copy_(own.weight.to(delta) + delta)

    def undo(self) -> None:
        """The former weights again."""
        with torch.no_grad():
            for weight, former in self._kept:
                weight.copy_(former)
        self._kept = []


def targeted(network: nn.Module, targets: Sequence[str]) -> dict[str, Any]:
    """The layers whose names end, at whole words, with one of `targets`.

    Raises:
        UserError: naming a target that no layer's name ends with.
    """
    known = dict(layers(network))
    for target in targets:
        if not any(name == target or name.endswith(f".{target}") for name in known):
            ends = sorted({name.rsplit(".", 1)[-1] for name in known if not name.rsplit(".", 1)[-1].isdigit()})
            raise UserError(f"targets: no layer's name ends with {target!r}; there are {', '.join(ends)}")
    return {name: layer for name, layer in known.items() if any(name == t or name.endswith(f".{t}") for t in targets)}


def adapted_count(network: nn.Module, rank: int, targets: Sequence[str]) -> int:
    """Parameters of the adapters that `inject` would put in.

    Raises:
        UserError: as `targeted`.
    """
    weights: list[Tensor] = [layer.weight for layer in targeted(network, targets).values()]
    return sum(rank * (len(weight) + weight[0].numel()) for weight in weights)


def inject(network: nn.Module, rank: int, alpha: float, targets: Sequence[str]) -> list[nn.Parameter]:
    """Put fresh adapters of no effect beside a frozen network's layers, and return their parameters, which alone learn.

    Args:
        targets: ends of layers' names, at whole words: `to_q`, `attn2.to_k`, `conv1`.

    Raises:
        UserError: naming a target that no layer's name ends with.
    """
    from peft import LoraConfig, inject_adapter_in_model

    chosen = list(targeted(network, targets))
    network.requires_grad_(False)
    # An alpha that is no whole number is peft's business: it only divides by the rank.
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=chosen, init_lora_weights=True)  # type: ignore[arg-type]
    inject_adapter_in_model(config, network, ADAPTER)
    return [p for name, p in network.named_parameters() if f".{ADAPTER}." in name and ".lora_" in name]


def merged_state(network: nn.Module) -> dict[str, Tensor]:
    """The weights of a network with what `inject` put in added to its own, under the names that they had before; as `Merged` makes them."""
    state = {name.replace(".base_layer.", "."): value for name, value in network.state_dict().items() if ".lora_" not in name}
    for name, pair in injected(network).items():
        weight = state[f"{name}.weight"]
        delta = pair.delta(weight)
        state[f"{name}.weight"] = (weight.to(delta) + delta).to(weight.dtype)
    return state


def injected(network: nn.Module) -> dict[str, Pair]:
    """What the adapters that `inject` has put into a network have learned, by the names of their layers."""
    from peft.tuners.lora import LoraLayer

    found = {}
    for name, layer in network.named_modules():
        if isinstance(layer, LoraLayer) and ADAPTER in layer.lora_A:
            parts: Any = (layer.lora_A[ADAPTER], layer.lora_B[ADAPTER])
            down, up = (part.weight.detach().clone() for part in parts)
            found[name] = Pair(down, up, float(layer.lora_alpha[ADAPTER]))
    return found
