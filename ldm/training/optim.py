"""Parameter groups, optimisers, and the learning rate as a pure function of progress."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ldm.config.schema import BY_KIND, Count, Fraction, NonNegative, Positive, PositiveFloat, config
from ldm.distributed.sharding import like, whole
from ldm.families.family import ParameterGroup


@config
class AdamW:
    """Decoupled weight decay (Loshchilov and Hutter 2019, arXiv 1711.05101), in torch's fused form."""

    needs_whole: ClassVar[str] = ""  # why it cannot train sharded weights (FSDP2); empty: it can
    kind: Literal["adamw"] = "adamw"
    lr: PositiveFloat = 1e-4  # peak learning rate
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)  # decay of the first and second moment
    weight_decay: NonNegative = 0.01  # of matrices and convolutions; biases and norms have none
    warmup_images: Count = 0  # the rate rises linearly over so many images
    schedule: Literal["constant", "linear", "cosine"] = "constant"  # after the warm-up, to final_lr at the stage's end
    decay_from: Fraction = 0.0  # share of the stage after which the linear or cosine decay begins
    final_lr: Fraction = 0.0  # rate at the stage's end, as a share of the peak
    clip: NonNegative = 1.0  # gradient norm limit of each parameter group; 0: none


@config
class Muon:
    """Orthogonalised momentum for matrices and convolutions (Jordan 2024), AdamW for all else."""

    needs_whole: ClassVar[str] = "orthogonalises whole matrices"
    kind: Literal["muon"] = "muon"
    lr: PositiveFloat = 4e-3  # peak rate of matrices; steps are scaled by sqrt(max(1, rows/columns))
    adamw_lr: PositiveFloat = 1e-3  # peak rate of biases, norms, embeddings and output layers
    momentum: Fraction = 0.95  # Nesterov momentum
    rounds: Positive = 3  # Newton-Schulz rounds; more flatten the singular values further
    betas: tuple[Fraction, Fraction] = (0.9, 0.99)  # of the AdamW part
    weight_decay: NonNegative = 0.0  # decoupled, of matrices and convolutions
    warmup_images: Count = 0  # the rate rises linearly over so many images
    schedule: Literal["constant", "linear", "cosine"] = "constant"  # after the warm-up, to final_lr at the stage's end
    decay_from: Fraction = 0.0  # share of the stage after which the linear or cosine decay begins
    final_lr: Fraction = 0.0  # rate at the stage's end, as a share of the peak
    clip: NonNegative = 1.0  # gradient norm limit of each parameter group; 0: none


Optim = Annotated[AdamW | Muon, BY_KIND]


def lr_factor(optim: AdamW | Muon, images: int, total_images: int) -> float:
    """The learning rate after `images` of `total_images`, as a share of the peak."""
    if images < optim.warmup_images:
        return (images + 1) / (optim.warmup_images + 1)
    start = max(optim.warmup_images, optim.decay_from * total_images)
    if optim.schedule == "constant" or images <= start:
        return 1.0
    done = min(1.0, (images - start) / max(1.0, total_images - start))
    falling = 1 - done if optim.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))
    return optim.final_lr + (1 - optim.final_lr) * falling


def build(optim: AdamW | Muon, groups: Sequence[ParameterGroup]) -> list[torch.optim.Optimizer]:
    """The optimisers of all parameter groups; each group carries `peak`, its learning rate at factor 1."""
    adamw: list[dict[str, Any]] = []
    muon: list[dict[str, Any]] = []
    for learner in groups:
        matrices = [p for p in learner.parameters if p.ndim >= 2]
        others = [p for p in learner.parameters if p.ndim < 2]
        rate = (optim.adamw_lr if isinstance(optim, Muon) else optim.lr) * learner.lr_scale
        if isinstance(optim, Muon):
            inner = [p for p in matrices if min(p.shape[0], p.numel() // p.shape[0]) >= 16]
            edge = [p for p in matrices if min(p.shape[0], p.numel() // p.shape[0]) < 16]
            muon += [_group(inner, optim.lr * learner.lr_scale, optim.weight_decay)]
            adamw += [_group(edge, rate, optim.weight_decay), _group(others, rate, 0.0)]
        else:
            adamw += [_group(matrices, rate, optim.weight_decay), _group(others, rate, 0.0)]
    made: list[torch.optim.Optimizer] = []
    if adamw := [g for g in adamw if g["params"]]:
        made.append(torch.optim.AdamW(adamw, betas=optim.betas, fused=True))
    if muon := [g for g in muon if g["params"]]:
        assert isinstance(optim, Muon)
        made.append(MuonOptimizer(muon, momentum=optim.momentum, rounds=optim.rounds))
    return made


def _group(parameters: list[nn.Parameter], peak: float, weight_decay: float) -> dict[str, Any]:
    return {"params": parameters, "lr": peak, "peak": peak, "weight_decay": weight_decay}


def set_lr(optimizers: Iterable[torch.optim.Optimizer], factor: float) -> None:
    """Set every group's learning rate to `factor` times its peak."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * factor


def orthogonalise(matrix: Tensor, rounds: int) -> Tensor:
    """The nearest semi-orthogonal matrix, roughly, by a quintic Newton-Schulz iteration in bfloat16 (..., m, n).

    Singular values end between about 0.7 and 1.2, which is all that the optimiser needs (Jordan 2024). The matrix starts
    with a Schatten 4-norm of 1, which the Gram matrix gives for nothing and which starts closer than the Frobenius norm by
    about one round. Where n >= 4 m the rounds are worked on the small Gram matrix alone.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrix.bfloat16()
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)  # so that the Gram matrix neither over- nor underflows
    gram = x @ x.mT
    size = gram.float().norm(dim=(-2, -1), keepdim=True) + 1e-7
    gram = gram / size.to(gram.dtype)
    if x.shape[-1] < 4 * x.shape[-2]:
        x = x / size.sqrt().to(x.dtype)
        for i in range(rounds):
            gram = x @ x.mT if i else gram
            x = a * x + (b * gram + c * gram @ gram) @ x
    else:
        product: Tensor | None = None
        for i in range(rounds):
            step = b * gram + c * gram @ gram
            step.diagonal(dim1=-2, dim2=-1).add_(a)
            product = step if product is None else step @ product
            if i < rounds - 1:
                gram = step @ (gram @ step)
        assert product is not None
        x = (product / size.sqrt().to(product.dtype)) @ x
    return x.mT if tall else x


class MuonOptimizer(torch.optim.Optimizer):
    """Momentum, orthogonalised per matrix; a convolution counts as the matrix (out, in * kh * kw)."""

    def __init__(self, groups: list[dict[str, Any]], *, momentum: float, rounds: int) -> None:
        super().__init__(groups, {"momentum": momentum, "rounds": rounds})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        for group in self.param_groups:
            held = [p for p in group["params"] if p.grad is not None]
            if not held:
                continue
            grads: list[Tensor] = [p.grad for p in held]  # type: ignore[misc]
            for p in held:
                if not self.state[p]:
                    self.state[p]["momentum"] = torch.zeros_like(p)
            velocity = [self.state[p]["momentum"] for p in held]
            torch._foreach_lerp_(velocity, grads, 1 - group["momentum"])
            ahead = torch._foreach_lerp(grads, velocity, group["momentum"])
            if group["weight_decay"]:
                torch._foreach_mul_(held, 1 - group["lr"] * group["weight_decay"])
            # Parameters of one shape share their matrix products.
            shapes: dict[tuple[int, ...], list[int]] = {}
            for i, p in enumerate(held):
                shapes.setdefault((p.shape[0], p.numel() // p.shape[0]), []).append(i)
            for (rows, columns), members in shapes.items():
                stacked = torch.stack([ahead[i].reshape(rows, columns) for i in members])
                update = orthogonalise(stacked, group["rounds"])
                scale = -group["lr"] * max(1.0, rows / columns) ** 0.5
                for i, part in zip(members, update, strict=True):
                    held[i].add_(part.view_as(held[i]).to(held[i].dtype), alpha=scale)


def clip(groups: Sequence[ParameterGroup], limit: float) -> dict[str, Tensor]:
    """Scale each group's gradients to a norm of at most `limit` (0: leave them); returns the norms before."""
    norms: dict[str, Tensor] = {}
    for learner in groups:
        grads = [p.grad for p in learner.parameters if p.grad is not None]
        norm = whole(torch.nn.utils.get_total_norm(grads))
        if limit:
            torch.nn.utils.clip_grads_with_norm_(learner.parameters, limit, norm)
        norms[learner.name] = norm
    return norms


def state_tensors(optimizers: Sequence[torch.optim.Optimizer]) -> dict[str, Tensor]:
    """Every tensor of the optimisers' states under `optimiser.parameter.name`, in the order of these names.

    Split tensors are gathered one by one, so all processes must go through them alike; what was read from a file has any order.
    """
    found: dict[str, Tensor] = {}
    for o, optimizer in enumerate(optimizers):
        for p, entry in optimizer.state_dict()["state"].items():
            for name, value in entry.items():
                found[f"{o}.{p}.{name}"] = torch.as_tensor(value)
    return dict(sorted(found.items()))


def unfit(optimizers: Sequence[torch.optim.Optimizer], tensors: Mapping[str, Tensor]) -> str:
    """Why stored tensors are no state of these optimisers; empty: they are."""
    counts = [sum(len(group["params"]) for group in optimizer.param_groups) for optimizer in optimizers]
    for key in tensors:
        owner, _, rest = key.partition(".")
        place, _, name = rest.partition(".")
        known = owner.isdecimal() and place.isdecimal() and int(owner) < len(counts) and int(place) < counts[int(owner)]
        if not known or not name:
            return f"optimizer.safetensors: {key[:60]} belongs to no parameter here"
    return ""


def restore_tensors(optimizers: Sequence[torch.optim.Optimizer], tensors: dict[str, Tensor]) -> None:
    """The reverse of `state_tensors`; learning rates are not stored because they are a function of progress."""
    for o, optimizer in enumerate(optimizers):
        held = [p for group in optimizer.param_groups for p in group["params"]]
        entries: dict[int, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            owner, parameter, name = key.split(".", 2)
            if int(owner) == o:
                entries.setdefault(int(parameter), {})[name] = like(value, held[int(parameter)])
        state = optimizer.state_dict()
        optimizer.load_state_dict({"state": entries, "param_groups": state["param_groups"]})
