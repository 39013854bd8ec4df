"""Adapters of a model: LoRA and its kin, which peft injects for training; merged into weights and taken out to the bit."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ldm.config.counts import be, plural
from ldm.config.errors import UserError
from ldm.models.blocks import Upsample
from ldm.models.layer_adapters import Difference, Hadamard, Kronecker, LayerAdapter, Pair

# As adapter files name them; "unet" is the denoising network, whatever its shape, and the second text encoder is SDXL's.
Part = Literal["unet", "text_encoder", "text_encoder_2"]
Method = Literal["lora", "dora", "loha", "lokr"]
ADAPTER = "default"  # peft's name for the only adapter of a network
MARKS = (".lora_", ".hada_", ".lokr_")  # in the names of peft's parameters
TEXT_TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj")
TEXT_PREFIX = "text_model."  # of a CLIP text model's layers in files; newer transformers leave it out in memory
SHOWN = 4  # names in a message


@dataclass(frozen=True)
class LearnedEmbedding:
    """Textual inversion embedding: a placeholder token and its vectors."""

    token: str
    rows: Tensor  # (V,D)
    name: str = "embedding"  # for messages
    hash: str = ""  # SHA-256 of the file
    second: Tensor | None = None  # (V,D'), of a second text encoder


@dataclass(frozen=True)
class Lora:
    """Adapters of a model's networks, by part and by the name of the layer, dotted as diffusers has it or flat as kohya has it."""

    pairs: Mapping[Part, Mapping[str, LayerAdapter]]
    metadata: Mapping[str, str] = field(default_factory=dict)  # what the file's header says
    name: str = "LoRA"  # for messages
    hash: str = ""  # SHA-256 of the file
    words: tuple[LearnedEmbedding, ...] = ()  # that the file brings
    notes: tuple[str, ...] = ()  # what a user should know of it
    network: str = "unet"  # how files name the part "unet": unet or transformer

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


def matched(
    lora: Lora, networks: Mapping[Part, nn.Module], aliases: Mapping[str, str] | None = None
) -> dict[tuple[Part, str], LayerAdapter]:
    """Every adapter by the part and the dotted name of the layer that it belongs to.

    Args:
        aliases: other flat names of layers of the denoising network.

    Raises:
        UserError: if there are none, or naming those whose matrices do not fit together, that belong to no layer, to one that has another
            already, or have another shape.
    """
    if not len(lora):
        raise UserError(f"{lora.name}: not a single LoRA weight in it; give another file")
    found: dict[tuple[Part, str], LayerAdapter] = {}
    foreign, misshapen = [], []
    for part, pairs in lora.pairs.items():
        weighted = weighted_modules(networks[part]) if part in networks else {}
        known = {flat(name): name for name in weighted}
        if part == "unet" and aliases:
            known = {**aliases, **known}
        for name, pair in pairs.items():
            if pair.shape is None and not isinstance(pair, Difference):
                raise UserError(f"{lora.name}: {part}.{name[:100]}: its matrices do not fit together; the file is damaged")
            own = known.get(flat(name))
            if own is None:
                foreign.append(f"{part}.{name}")
            elif (part, own) in found:
                raise UserError(f"{lora.name}: {part}.{own} is in it twice, under two names; give another file")
            elif not pair.fits(weighted[own].weight) or (pair.bias is not None and weighted[own].bias is None):
                misshapen.append(f"{part}.{name}")
            else:
                found[part, own] = pair
    if foreign:
        few = (
            f"{len(foreign)} of its {plural(len(lora), 'layer')} {be(len(foreign))} not"
            if found or misshapen
            else f"none of its {plural(len(lora), 'layer')} is"
        )
        raise UserError(f"{lora.name}: {few} in this model: {_few(foreign)}; it was made for another kind of model")
    if misshapen:
        raise UserError(f"{lora.name}: made for a model of another size: {_few(misshapen)} do not fit; use the model it was made for")
    return found


def weighted_modules(network: nn.Module) -> dict[str, Any]:
    """The modules with a weight of their own, by name."""
    return {name: module for name, module in network.named_modules() if isinstance(module._parameters.get("weight"), Tensor)}


def _few(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(name[:100] for name in names[:SHOWN]) + more


class Merged:
    """Adapters in the weights of networks; `undo` restores the very bits, because the former weights are kept.

    Args:
        networks: by part.
        loras: each with its strength, which its difference to the base is multiplied by; they add up, in this order.
        aliases: as `matched` has them.

    Raises:
        UserError: as `matched`, with all weights as they were.
    """

    def __init__(
        self, networks: Mapping[Part, nn.Module], loras: Sequence[tuple[Lora, float]], aliases: Mapping[str, str] | None = None
    ) -> None:
        wanted = [(matched(lora, networks, aliases), strength) for lora, strength in loras]
        self._kept: list[tuple[nn.Parameter, Tensor]] = []
        sums: dict[nn.Parameter, Tensor] = {}
        with torch.no_grad():
            for pairs, strength in wanted:
                for (part, name), pair in pairs.items():
                    layer: Any = networks[part].get_submodule(name)
                    added = [(layer.weight, pair.delta(layer.weight))]
                    if pair.bias is not None:
                        added.append((layer.bias, pair.bias.to(layer.bias.device, torch.promote_types(layer.bias.dtype, torch.float32))))
                    for own, delta in added:
                        sums[own] = sums[own] + strength * delta if own in sums else strength * delta
            for own, delta in sums.items():
                self._kept.append((own, own.detach().clone()))
                own.copy_(own.to(delta) + delta)

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


def adapted_count(network: nn.Module, rank: int, targets: Sequence[str], method: Method = "lora", factor: int | None = None) -> int:
    """Parameters of the adapters that `inject` would put in; LoKr's are put in to be counted.

    Raises:
        UserError: as `targeted`.
    """
    weights: list[Tensor] = [layer.weight for layer in targeted(network, targets).values()]
    if method == "lokr":
        return sum(p.numel() for p in inject(network, rank, rank, targets, method, factor))
    each = 2 if method == "loha" else 1
    return sum(each * rank * (len(weight) + weight[0].numel()) + (len(weight) if method == "dora" else 0) for weight in weights)


def inject(
    network: nn.Module, rank: int, alpha: float, targets: Sequence[str], method: Method = "lora", factor: int | None = None
) -> list[nn.Parameter]:
    """Put fresh adapters of no effect beside a frozen network's layers, and return their parameters, which alone learn.

    Args:
        targets: ends of layers' names, at whole words: `to_q`, `attn2.to_k`, `conv1`.
        factor: LoKr's: how many rows the first factor has, at most; None: about the root of the layer's.

    Raises:
        UserError: naming a target that no layer's name ends with.
    """
    from peft import LoHaConfig, LoKrConfig, LoraConfig

    chosen = list(targeted(network, targets))
    config: Any
    # An alpha that is no whole number is peft's business: it only divides by the rank.
    if method == "loha":
        config = LoHaConfig(r=rank, alpha=alpha, target_modules=chosen)  # type: ignore[arg-type]
    elif method == "lokr":
        config = LoKrConfig(r=rank, alpha=alpha, target_modules=chosen, decompose_factor=factor or -1)  # type: ignore[arg-type]
    else:
        config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=chosen, use_dora=method == "dora")  # type: ignore[arg-type]
    return _put_in(network, config)


def continue_with(network: nn.Module, adapters: Mapping[str, LayerAdapter]) -> list[nn.Parameter]:
    """Put adapters that have learned beside a frozen network's layers, to learn on; returns their parameters, which alone learn.

    Args:
        adapters: by the layers' dotted names.

    Raises:
        UserError: for others than LoRA, or DoRA, of all layers, and for an alpha of 0.
    """
    from peft import LoraConfig

    pairs = {name: pair for name, pair in adapters.items() if isinstance(pair, Pair) and pair.mid is None and pair.bias is None}
    dora = {pair.magnitude is not None for pair in pairs.values()}
    if len(pairs) != len(adapters) or len(dora) != 1:
        raise UserError("only LoRA or DoRA is continued, without kernels between, biases and other kinds; merge the file and train anew")
    if still := [name for name, pair in pairs.items() if not pair.alpha]:
        raise UserError(f"the alpha of {_few(still)} is 0, so nothing would be learned there; give another file, or train anew")
    (rank, alpha), _ = Counter((pair.rank, pair.alpha) for pair in pairs.values()).most_common(1)[0]
    found = _put_in(
        network,
        LoraConfig(
            r=rank,
            lora_alpha=alpha,  # type: ignore[arg-type]
            target_modules=list(pairs),
            use_dora=dora.pop(),
            rank_pattern={exact(name): pair.rank for name, pair in pairs.items() if pair.rank != rank},
            alpha_pattern={exact(name): pair.alpha for name, pair in pairs.items() if pair.alpha != alpha},  # type: ignore[misc]
        ),
    )
    with torch.no_grad():
        for name, pair in pairs.items():
            layer: Any = network.get_submodule(name)
            own = [(layer.lora_A[ADAPTER].weight, pair.down), (layer.lora_B[ADAPTER].weight, pair.up)]
            if pair.magnitude is not None:
                own.append((layer.lora_magnitude_vector[ADAPTER].weight, pair.magnitude))
            for parameter, value in own:
                parameter.copy_(value.reshape(parameter.shape))
    return found


def exact(name: str) -> str:
    """The pattern of peft that a layer's whole name alone matches."""
    return f"^{re.escape(name)}"


def _put_in(network: nn.Module, config: Any) -> list[nn.Parameter]:
    from peft import inject_adapter_in_model

    network.requires_grad_(False)
    inject_adapter_in_model(config, network, ADAPTER)
    return [p for name, p in network.named_parameters() if _is_adapters(name)]


def _is_adapters(name: str) -> bool:
    return any(mark in name for mark in MARKS)


def merged_state(network: nn.Module, base: nn.Module | None = None) -> dict[str, Tensor]:
    """The weights of a network with what `inject` put in added to its own, under the names that they had before; as `Merged` makes them.

    Args:
        base: the network as it was before, whose weights count; None: its own.
    """
    state = own_state(network) if base is None else dict(base.state_dict())
    for name, pair in injected(network).items():
        weight = state[f"{name}.weight"]
        delta = pair.delta(weight)
        state[f"{name}.weight"] = (weight.to(delta) + delta).to(weight.dtype)
    return state


def own_state(network: nn.Module) -> dict[str, Tensor]:
    """The weights of a network without what `inject` put in, under the names that they had before."""
    return {name.replace(".base_layer.", "."): value for name, value in network.state_dict().items() if not _is_adapters(name)}


def halvable(network: nn.Module) -> list[nn.Module]:
    """The frozen layers that only ever compute in the type of autocast, in which their weights may lie: its numbers stay, to the bit.

    None beside DoRA, which reads the weights. Not the convolutions of enlargements, of whose kernels sums are computed.
    """
    if any("lora_magnitude_vector" in name for name, _ in network.named_parameters()):
        return []
    kept = {id(child) for module in network.modules() if isinstance(module, Upsample) for child in module.children()}
    frozen = [layer for name, layer in layers(network) if not _is_adapters(name) and not any(p.requires_grad for p in layer.parameters())]
    return [layer for layer in frozen if id(layer) not in kept]


def injected(network: nn.Module) -> dict[str, LayerAdapter]:
    """What the adapters that `inject` has put into a network have learned, by the names of their layers."""
    from peft.tuners.loha import LoHaLayer
    from peft.tuners.lokr import LoKrLayer
    from peft.tuners.lora import LoraLayer

    def taken(layer: Any, *names: str) -> Any:
        """Copies of those of its parameters that it has."""
        parts = [getattr(layer, name) for name in names]
        return tuple(part[ADAPTER].detach().clone() for part in parts if ADAPTER in part)

    found: dict[str, LayerAdapter] = {}
    for name, layer in network.named_modules():
        if isinstance(layer, LoraLayer) and ADAPTER in layer.lora_A:
            parts: Any = (layer.lora_A[ADAPTER], layer.lora_B[ADAPTER])
            down, up = (part.weight.detach().clone() for part in parts)
            dora: Any = layer.lora_magnitude_vector[ADAPTER].weight if ADAPTER in layer.lora_magnitude_vector else None
            found[name] = Pair(
                down, up, float(layer.lora_alpha[ADAPTER]), magnitude=None if dora is None else dora.detach().clone().flatten()
            )
        elif isinstance(layer, LoHaLayer) and ADAPTER in layer.hada_w1_a:
            one, other = taken(layer, "hada_w1_a", "hada_w1_b"), taken(layer, "hada_w2_a", "hada_w2_b")
            found[name] = Hadamard(one, other, float(layer.alpha[ADAPTER]))
        elif isinstance(layer, LoKrLayer) and ADAPTER in layer.r:
            one, other = taken(layer, "lokr_w1", "lokr_w1_a", "lokr_w1_b"), taken(layer, "lokr_w2", "lokr_w2_a", "lokr_w2_b")
            found[name] = Kronecker(one, other, float(layer.alpha[ADAPTER]), layer.r[ADAPTER])
    return found
