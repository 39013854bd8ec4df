"""Post-hoc EMA: power-function averages of weights, from whose snapshots one of any length is made afterwards.

Karras 2023, arXiv 2312.02696, section 3 and appendix C. The length sigma_rel is the spread of the averaged times as a share of training.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ldm.config.errors import UserError
from ldm.config.schema import Count, PositiveFloat, config
from ldm.distributed.sharding import like
from ldm.formats import atomic, records
from ldm.formats.tensor_file import read_tensors

LONGEST = 12**-0.5  # of all weights alike, exponent 0
SNAPSHOTS = 20  # of a stage, where it does not say how often
FOLDER = "ema"  # of a stage: its snapshots


@config
class PostHocEma:
    """Power-function averages that are kept beside the EMA, so that `ldm ema` makes one of any length afterwards."""

    lengths: tuple[PositiveFloat, ...] = (0.05, 0.1)  # sigma_rel of the averages; two at least, and the wanted ones should lie near them
    every_images: Count = 0  # between snapshots, 4 bytes per parameter and length each; 0: 20 in the stage

    def __post_init__(self) -> None:
        if len(set(self.lengths)) < 2 or not all(length < LONGEST for length in self.lengths):
            raise UserError(f"post_hoc_ema.lengths: got {list(self.lengths)}; give two or more different ones below {LONGEST:.4f}")


@config
class SnapshotMeta:
    """What a snapshot's meta.json says."""

    images: Count
    updates: Count  # t, that the averages have seen
    lengths: tuple[PositiveFloat, ...]


def exponent(length: float) -> float:
    """gamma of sigma_rel = (gamma+1)^½ (gamma+2)^-1 (gamma+3)^-½ (eq. 4): the real root of a cubic that is largest."""
    inverse = length**-2
    roots = np.roots([1, 7, 16 - inverse, 12 - inverse])
    return float(max(root.real for root in roots if abs(root.imag) < 1e-6))


def products(a: tuple[NDArray[np.float64], NDArray[np.float64]], b: tuple[NDArray[np.float64], NDArray[np.float64]]) -> NDArray[np.float64]:
    """Inner products (n, m) of the response functions p(s) = (gamma+1) s^gamma / t^(gamma+1), s in (0, t] (appendix C.2).

    Args:
        a: gamma and t, each (n,).
        b: the same, each (m,).
    """
    (ga, ta), (gb, tb) = ((gamma, t) for gamma, t in (a, b))
    ga, ta, gb, tb = ga[:, None], ta[:, None], gb[None], tb[None]
    ratio = ta / tb
    shared = np.where(ta < tb, ratio**gb, ratio**-ga) / np.maximum(ta, tb)
    return np.asarray((ga + 1) * (gb + 1) / (ga + gb + 1) * shared)


def coefficients(lengths: Sequence[float], updates: Sequence[int], wanted: float, at: int) -> NDArray[np.float64]:
    """The shares (n,) of stored averages in one of another length, by least squares of their response functions; they add up to 1.

    Args:
        lengths: sigma_rel of the stored ones.
        updates: t of the stored ones.
        wanted: sigma_rel of the one that is made.
        at: its t.
    """
    stored = (np.array([exponent(length) for length in lengths]), np.array(updates, np.float64))
    target = (np.array([exponent(wanted)]), np.array([at], np.float64))
    found = np.linalg.lstsq(products(stored, stored), products(stored, target), rcond=1e-14)[0][:, 0]
    return np.asarray(found / found.sum())


def misfit(lengths: Sequence[float], updates: Sequence[int], wanted: float, at: int) -> float:
    """How far what is made is from the wanted average: the norm of the difference of response functions, as a share of the wanted one's."""
    stored = (np.array([exponent(length) for length in lengths]), np.array(updates, np.float64))
    target = (np.array([exponent(wanted)]), np.array([at], np.float64))
    x, whole = coefficients(lengths, updates, wanted, at), products(target, target)[0, 0]
    square = x @ products(stored, stored) @ x - 2 * x @ products(stored, target)[:, 0] + whole
    return float(np.sqrt(max(square, 0) / whole))


class PowerAverages:
    """Power-function averages of parameters, in float32: after update t, average + (1 - 1/t)^(gamma+1) (average before - weights).

    Args:
        parameters: the trained parameters, in a fixed order.
        lengths: sigma_rel of each average.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], lengths: Sequence[float]) -> None:
        self.parameters, self.lengths = list(parameters), tuple(lengths)
        self.updates = 0
        self.averages: list[list[Tensor]] = [[p.detach().float().clone() for p in self.parameters] for _ in lengths]

    @torch.no_grad()
    def update(self) -> None:
        """Take the present weights in."""
        self.updates += 1
        present = [p.detach().float() for p in self.parameters]
        for length, averages in zip(self.lengths, self.averages, strict=True):
            torch._foreach_lerp_(averages, present, 1 - (1 - 1 / self.updates) ** (exponent(length) + 1))

    def state(self) -> dict[str, Tensor]:
        """The averages by length and position, to store."""
        return {f"{length}.{i}": a for length, own in zip(self.lengths, self.averages, strict=True) for i, a in enumerate(own)}

    def restore(self, state: dict[str, Tensor], updates: int) -> None:
        """Take up stored averages of the same lengths and parameters."""
        for length, own in zip(self.lengths, self.averages, strict=True):
            for i, average in enumerate(own):
                average.copy_(like(state[f"{length}.{i}"], average))
        self.updates = updates


def snapshots(folder: Path) -> list[Path]:
    """The committed snapshots of a stage's folder, oldest first."""
    return sorted(path for path in (folder / FOLDER).glob("images-*") if (path / atomic.MANIFEST).is_file())


def keep(folder: Path, images: int, averages: dict[str, Tensor], lengths: Sequence[float], updates: int) -> None:
    """Commit a snapshot of averages, as `PowerAverages.state` names them, below a stage's folder.

    Raises:
        OSError: as the file system says.
    """

    def write(target: Path) -> None:
        for length in lengths:
            own = {name.removeprefix(f"{length}."): a for name, a in averages.items() if name.startswith(f"{length}.")}
            atomic.write_tensors(target / f"{length}.safetensors", own)
        atomic.write_json(target / "meta.json", {"images": images, "updates": updates, "lengths": list(lengths)})

    atomic.commit(folder / FOLDER / f"images-{images:012d}", write)


def drop_beyond(folder: Path, images: int) -> None:
    """Remove snapshots of work that is lost and will be done again."""
    for path in snapshots(folder):
        if int(path.name.partition("-")[2]) > images:
            shutil.rmtree(path, ignore_errors=True)


class Snapshots:
    """The snapshots that a stage has left.

    Raises:
        UserError: where there are none, or one cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        self.paths = snapshots(folder)
        if not self.paths:
            raise UserError(
                f"{folder}: holds no averages of which another can be made; train it with stages.{folder.name}.post_hoc_ema={{}}"
            )
        try:
            self.metas = [records.read_as(path / "meta.json", SnapshotMeta) for path in self.paths]
        except (OSError, records.Damaged) as error:
            raise UserError(f"{error}; remove that folder to do without it") from None
        self.stored = [(path, length, meta.updates) for path, meta in zip(self.paths, self.metas, strict=True) for length in meta.lengths]

    @property
    def images(self) -> int:
        """That the newest has seen."""
        return self.metas[-1].images

    def misfit(self, length: float) -> float:
        """As `misfit` says, of an average of this length at the newest snapshot."""
        return misfit([one[1] for one in self.stored], [one[2] for one in self.stored], length, self.metas[-1].updates)

    def made(self, length: float) -> list[Tensor]:
        """The average of this length at the newest snapshot, by position.

        Raises:
            UserError: naming the snapshot that is damaged, or a length that none can have.
        """
        if not 0 < length < LONGEST:
            raise UserError(f"length: got {length:g}; sigma_rel lies between 0 and {LONGEST:.4f}")
        shares = coefficients([one[1] for one in self.stored], [one[2] for one in self.stored], length, self.metas[-1].updates)
        found: dict[int, Tensor] = {}
        for (path, own, _), share in zip(self.stored, shares.tolist(), strict=True):
            try:
                atomic.verify(path)
                tensors = read_tensors(path / f"{own}.safetensors")[0]
            except (OSError, ValueError) as error:
                raise UserError(f"{error}; remove {path} to do without it") from None
            for name, tensor in tensors.items():
                part = tensor.double() * share
                found[int(name)] = found[int(name)] + part if int(name) in found else part
        return [found[i] for i in range(len(found))]


def linked(source: Path, target: Path) -> None:
    """Snapshots of a former stage for one that goes on from it, without a second copy where the file system can share one."""
    if (source / FOLDER).is_dir():
        shutil.copytree(source / FOLDER, target / FOLDER, copy_function=_link)


def _link(source: str, target: str) -> None:
    try:
        Path(target).hardlink_to(source)
    except OSError:
        shutil.copy2(source, target)
