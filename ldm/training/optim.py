"""Parameter groups, optimisers, and the learning rate as a pure function of progress."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ldm.config.schema import BY_KIND, Decay, NonNegative, Positive, PositiveFloat, config
from ldm.distributed.environment import computed_in
from ldm.distributed.sharding import is_split, like, whole
from ldm.families.family import ParameterGroup
from ldm.training.library_optimisers import Adafactor, AdamW8bit, Lion, Prodigy, ScheduleFree
from ldm.training.rate import Rate
from ldm.training.rate import lr_factor as lr_factor


@config
class AdamW(Rate):
    """Decoupled weight decay (Loshchilov and Hutter 2019, arXiv 1711.05101), in torch's fused form."""

    kind: Literal["adamw"] = "adamw"
    lr: PositiveFloat = 1e-4  # peak learning rate
    betas: tuple[Decay, Decay] = (0.9, 0.999)  # decay of the first and second moment
    weight_decay: NonNegative = 0.01  # of matrices and convolutions; biases and norms have none


@config
class Muon(Rate):
    """Orthogonalised momentum for matrices and convolutions (Jordan 2024), AdamW for all else."""

    needs_whole: ClassVar[str] = "orthogonalises whole matrices"
    state_bytes: ClassVar[float] = 4.0  # but for the few parameters that are no matrices
    kind: Literal["muon"] = "muon"
    lr: PositiveFloat = 4e-3  # peak rate of matrices; steps are scaled by sqrt(max(1, rows/columns))
    adamw_lr: PositiveFloat = 1e-3  # peak rate of biases, norms, embeddings and output layers
    momentum: Decay = 0.95  # Nesterov momentum
    rounds: Positive = 3  # Newton-Schulz rounds; more flatten the singular values further
    betas: tuple[Decay, Decay] = (0.9, 0.99)  # of the AdamW part
    weight_decay: NonNegative = 0.0  # decoupled, of matrices and convolutions


AnyOptim = AdamW | Muon | Adafactor | Lion | Prodigy | ScheduleFree | AdamW8bit
Optim = Annotated[AnyOptim, BY_KIND]


def build(optim: AnyOptim, groups: Sequence[ParameterGroup]) -> list[torch.optim.Optimizer]:
    """The optimisers of all parameter groups; each group carries `peak`, its learning rate at factor 1.

    Raises:
        UserError: where the library of one is not installed.
    """
    if not isinstance(optim, AdamW | Muon):
        return optim.made([_by_shape(learner, optim.lr * learner.lr_scale, optim.weight_decay) for learner in groups])
    adamw: list[dict[str, Any]] = []
    muon: list[dict[str, Any]] = []
    for learner in groups:
        rate = (optim.adamw_lr if isinstance(optim, Muon) else optim.lr) * learner.lr_scale
        if isinstance(optim, Muon):
            matrices = [p for p in learner.parameters if p.ndim >= 2]
            others = [p for p in learner.parameters if p.ndim < 2]
            inner = [p for p in matrices if min(p.shape[0], p.numel() // p.shape[0]) >= 16 and p not in learner.tables]
            edge = [p for p in matrices if min(p.shape[0], p.numel() // p.shape[0]) < 16 or p in learner.tables]
            muon += [_group(inner, optim.lr * learner.lr_scale, optim.weight_decay)]
            adamw += [_group(edge, rate, optim.weight_decay), _group(others, rate, 0.0)]
        else:
            adamw += _by_shape(learner, rate, optim.weight_decay)
    made: list[torch.optim.Optimizer] = []
    if adamw := [g for g in adamw if g["params"]]:
        made.append(torch.optim.AdamW(adamw, betas=optim.betas, fused=True))
    if muon := [g for g in muon if g["params"]]:
        assert isinstance(optim, Muon)
        made.append(MuonOptimizer(muon, momentum=optim.momentum, rounds=optim.rounds))
    return made


def _by_shape(learner: ParameterGroup, peak: float, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices and convolutions, whose weights decay, and all else; those of the two that there are."""
    matrices = [p for p in learner.parameters if p.ndim >= 2]
    others = [p for p in learner.parameters if p.ndim < 2]
    return [group for group in (_group(matrices, peak, weight_decay), _group(others, peak, 0.0)) if group["params"]]


def _group(parameters: list[nn.Parameter], peak: float, weight_decay: float) -> dict[str, Any]:
    return {"params": parameters, "lr": peak, "peak": peak, "weight_decay": weight_decay}


def set_lr(optimizers: Iterable[torch.optim.Optimizer], factor: float) -> None:
    """Set every group's learning rate to `factor` times its peak."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * factor


def orthogonalise(matrix: Tensor, rounds: int) -> Tensor:
    """The nearest semi-orthogonal matrix, roughly, by a quintic Newton-Schulz iteration (..., m, n).

    Singular values end between about 0.7 and 1.2, which is all that the optimiser needs (Jordan 2024). The matrix starts
    with a Schatten 4-norm of 1, which the Gram matrix gives for nothing and which starts closer than the Frobenius norm by
    about one round. Where n >= 4 m the rounds are worked on the small Gram matrix alone. Computed in bfloat16, but in float32
    on a CPU without instructions for it, whose emulation takes fifteen times as long.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrix.to(torch.bfloat16 if computed_in("bf16", matrix.device.type) == "bf16" else torch.float32)
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


COUNTERS = ("k", "weight_sum", "lr_max", "scheduled_lr", "d", "d_max", "d_numerator")  # what libraries count in their groups
NUMBERS = {"int": int, "float": float}


def state_tensors(optimizers: Sequence[torch.optim.Optimizer]) -> dict[str, Tensor]:
    """Every value of the optimisers' states as a tensor, in the order of their names.

    `optimiser.parameter.name` is a tensor, with `:int` or `:float` behind it a plain number; `optimiser.gN.name` is what the
    N-th group counts. Split tensors are gathered one by one, so all processes must go through them alike.
    """
    found: dict[str, Tensor] = {}
    seen: set[int] = set()  # storages: what libraries share among parameters is stored with each
    for o, optimizer in enumerate(optimizers):
        for g, group in enumerate(optimizer.param_groups):
            found |= {f"{o}.g{g}.{name}": torch.tensor(float(group[name]), dtype=torch.float64) for name in COUNTERS if name in group}
        for p, parameter in enumerate(_held(optimizer)):
            for name, value in optimizer.state.get(parameter, {}).items():
                if not isinstance(value, Tensor):
                    found[f"{o}.{p}.{name}:{type(value).__name__}"] = torch.tensor(value, dtype=torch.float64)
                    continue
                place = 0 if is_split(value) else value.untyped_storage().data_ptr()
                found[f"{o}.{p}.{name}"] = value.clone() if place and place in seen else value
                seen.add(place)
    return dict(sorted(found.items()))


def _laid(value: Tensor, parameter: Tensor) -> Tensor:
    """A state in its parameter's layout: fused optimisers go through both as they lie in memory."""
    if value.shape != parameter.shape or is_split(value) or value.stride() == parameter.stride():
        return value
    return torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def _held(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def unfit(optimizers: Sequence[torch.optim.Optimizer], tensors: Mapping[str, Tensor]) -> str:
    """Why stored tensors are no state of these optimisers; empty: they are."""
    for key in tensors:
        owner, _, rest = key.partition(".")
        place, _, name = rest.partition(".")
        here = optimizers[int(owner)] if owner.isdecimal() and int(owner) < len(optimizers) else None
        groups = place.startswith("g")
        count = 0 if here is None else len(here.param_groups) if groups else len(_held(here))
        number = place.removeprefix("g")
        if not name or not number.isdecimal() or int(number) >= count or (":" in name and name.partition(":")[2] not in NUMBERS):
            return f"optimizer.safetensors: {key[:60]} belongs to nothing here"
    return ""


@torch.no_grad()
def restore_tensors(optimizers: Sequence[torch.optim.Optimizer], tensors: Mapping[str, Tensor]) -> None:
    """The reverse of `state_tensors`; learning rates are not stored because they are a function of progress."""
    for o, optimizer in enumerate(optimizers):
        held = _held(optimizer)
        optimizer.state.clear()
        for key, value in tensors.items():
            owner, place, name = key.split(".", 2)
            if int(owner) != o:
                continue
            if place.startswith("g"):
                group = optimizer.param_groups[int(place[1:])]
                group[name] = type(group[name])(value.item())
                continue
            parameter = held[int(place)]
            name, _, kind = name.partition(":")
            whole_value: Any = NUMBERS[kind](value.item()) if kind else _laid(like(value.to(parameter.device), parameter), parameter)
            optimizer.state[parameter][name] = whole_value
