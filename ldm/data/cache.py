"""Latents once: the posterior of every image, kept in committed shards, and the data set that reads them back."""

from __future__ import annotations

import errno
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ldm.batch import ImageBatch, MomentBatch
from ldm.checkpoint import MANIFEST, Damaged, commit, sha256, verify, write_json
from ldm.data.dataset import DataSet, draw_captions, draw_flips
from ldm.data.images import mirrored
from ldm.data.loader import ordered
from ldm.errors import UserError

PLAN = "cache.json"
DATA = "moments.safetensors"
RECORD = "record.json"
FORMAT = 1
IN_MEMORY_BYTES = 2**32  # a cache up to this size is read into memory, a larger one is mapped

Encode = Callable[[Tensor], tuple[Tensor, Tensor | None]]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a cache must hold; shards made under another plan are made anew."""

    autoencoder: str  # hash of the autoencoder's folder
    normalisation: dict[str, Any]  # the latent statistics by which the moments are already normalised
    data: str  # fingerprint of the data set
    images: int
    resolution: int  # px
    seed: int  # addresses the crops
    flip: bool  # whether mirrored copies are kept too
    mirrors: bool  # whether the data's captions allow it at all
    shard_images: int
    format: int = FORMAT

    @property
    def hash(self) -> str:
        """Of everything above."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()

    @property
    def shards(self) -> int:
        """How many folders the cache has."""
        return -(-self.images // self.shard_images)


def _shard(folder: Path, number: int) -> Path:
    return folder / f"shard-{number:06d}"


def write_cache(
    folder: Path,
    data: DataSet,
    encode: Encode,
    *,
    autoencoder: str,
    resolution: int,
    normalisation: dict[str, Any] | None = None,
    images: int | None = None,
    batch: int = 32,
    seed: int = 0,
    flip: bool = False,
    shard_images: int = 4096,
    workers: int = 0,
    rank: int = 0,
    world: int = 1,
    on_images: Callable[[int], None] | None = None,
) -> None:
    """Encode every sample once into `folder`, in shards that are each whole or not there; finished ones are kept.

    Sample i is seen in the view of position i. Mean and deviation are stored as float16 (latents of unit variance lose
    less than one part in 2000), with all captions. Several ranks take shards in turn, and one calls `seal` afterwards.

    Args:
        encode: images (B,3,R,R) in [-1,1] on the CPU to normalised mean and deviation (B,c,h,w), no deviation for VQ.
        autoencoder: hash of the autoencoder's folder.
        normalisation: the latent statistics used by `encode`, for the record.
        images: encode the first so many samples only; None: all.
        batch: images per call of `encode`.
        flip: keep mirrored copies too (twice the size), if the data `mirrors`.
        workers: threads that decode ahead.
        on_images: called with the number of images that have just been encoded or found finished.

    Raises:
        UserError: if the disk is full (finished shards stay), or a latent is not finite.
    """
    plan = Plan(
        autoencoder=autoencoder, normalisation=normalisation or {}, data=data.fingerprint(),
        images=len(data) if images is None else min(images, len(data)),
        resolution=resolution, seed=seed, flip=flip and data.mirrors, mirrors=data.mirrors,
        shard_images=shard_images,
    )  # fmt: skip
    if plan.images == 0:
        raise UserError("the data set is empty: there is nothing to encode")
    tell = on_images or (lambda count: None)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if rank == 0:
            (folder / MANIFEST).unlink(missing_ok=True)
            write_json(folder / PLAN, asdict(plan))
        for number in range(rank, plan.shards, world):
            members = range(number * shard_images, min((number + 1) * shard_images, plan.images))
            if _whole(_shard(folder, number), plan):
                tell(len(members))
                continue
            tensors = _encode_shard(data, encode, members, plan, batch, workers, tell)
            record = {"plan": plan.hash, "captions": data.all_captions(list(members))}
            commit(_shard(folder, number), _writer(tensors, record))
        if world == 1:
            seal(folder)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        free = shutil.disk_usage(folder if folder.is_dir() else folder.parent).free / 2**20
        raise UserError(
            f"{folder}: the disk is full ({error.strerror}; {free:.0f} MiB free); free some space and run again, "
            f"the finished shards are kept"
        ) from None


def seal(folder: Path) -> None:
    """Put the manifest of the whole cache over its shards' own, and remove what earlier plans and kills left.

    Raises:
        UserError: if a shard is missing or of another plan.
    """
    plan = _read_plan(folder)
    shards = [_shard(folder, n) for n in range(plan.shards)]
    sums = {PLAN: sha256(folder / PLAN)}
    for shard in shards:
        try:
            own = json.loads((shard / MANIFEST).read_text())
            record = json.loads((shard / RECORD).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"{shard}: missing or damaged ({error}); encode again") from None
        if record["plan"] != plan.hash:
            raise UserError(f"{shard}: made for another autoencoder, data set or size; encode again")
        sums |= {f"{shard.name}/{name}": value for name, value in own.items()}
        sums[f"{shard.name}/{MANIFEST}"] = sha256(shard / MANIFEST)
    keep = {PLAN, *(shard.name for shard in shards)}
    for path in folder.iterdir():
        if path.name not in keep and path.name.startswith(("shard-", ".shard-", f".{PLAN}", f".{MANIFEST}")):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    write_json(folder / MANIFEST, sums)


def _whole(shard: Path, plan: Plan) -> bool:
    try:
        verify(shard)
        record = json.loads((shard / RECORD).read_text(encoding="utf-8"))
    except (Damaged, OSError, ValueError):
        return False
    return bool(record.get("plan") == plan.hash)


def _encode_shard(
    data: DataSet,
    encode: Encode,
    members: range,
    plan: Plan,
    batch: int,
    workers: int,
    tell: Callable[[int], None],
) -> dict[str, np.ndarray]:
    """The arrays of one shard."""

    def load(index: list[int]) -> Callable[[], ImageBatch]:
        return lambda: data.load(index, index, plan.resolution, plan.seed, False)

    cuts = [list(members[i : i + batch]) for i in range(0, len(members), batch)]
    tasks: Iterator[list[Callable[[], ImageBatch]]] = ([load(cut)] for cut in cuts)
    columns: dict[str, list[np.ndarray]] = {}
    for cut, (images,) in zip(cuts, ordered(tasks, workers), strict=True):
        rows: dict[str, Tensor | None] = {"size": images.size}
        with torch.no_grad():
            rows["mean"], rows["std"] = encode(images.image)
            if plan.flip:
                rows["mirrored_size"] = mirrored(images.size)
                rows["mirrored_mean"], rows["mirrored_std"] = encode(images.image.flip(-1))
        for name, value in rows.items():
            if value is None:
                continue
            value = value.detach().to("cpu", torch.float32 if name.endswith("size") else torch.float16)
            finite = value.flatten(1).isfinite().all(1)
            if not finite.all():
                wrong = data.origin(cut[int((~finite).nonzero()[0])])
                raise UserError(f"{wrong}: its latent {name} is not finite in float16; encode in float32 instead")
            columns.setdefault(name, []).append(value.numpy())
        tell(len(cut))
    return {name: np.concatenate(parts) for name, parts in columns.items()}


def _writer(tensors: dict[str, np.ndarray], record: dict[str, Any]) -> Callable[[Path], None]:
    def write(temporary: Path) -> None:
        from safetensors.numpy import save

        # Through Python's own files, whose errors say what the disk said.
        (temporary / DATA).write_bytes(save(tensors))
        (temporary / RECORD).write_text(json.dumps(record), encoding="utf-8")

    return write


def _arrays(file: Path, in_memory: bool) -> dict[str, Tensor]:
    """The arrays of a safetensors file, in memory or mapped."""
    # Torch takes no read-only memory; pages of mode "c" are copied on a write, which never reaches the file.
    raw: np.ndarray = np.fromfile(file, np.uint8) if in_memory else np.memmap(file, np.uint8, mode="c")
    length = int(raw[:8].view(np.uint64)[0])
    header = json.loads(raw[8 : 8 + length].tobytes())
    kinds = {"F16": np.float16, "F32": np.float32}
    found: dict[str, Tensor] = {}
    for name, entry in header.items():
        if name != "__metadata__":
            start, end = (8 + length + offset for offset in entry["data_offsets"])
            found[name] = torch.from_numpy(raw[start:end].view(kinds[entry["dtype"]]).reshape(entry["shape"]))
    return found


class CachedLatents:
    """A committed cache as a data set that gives MomentBatch.

    Args:
        folder: as `write_cache` left it.
        in_memory_bytes: a cache up to this size is read into memory after its sums are checked; a larger one is mapped
            unchecked, and must not be rewritten while it is read.

    Raises:
        UserError: naming the shard that is missing, damaged or of another plan.
    """

    def __init__(self, folder: Path, in_memory_bytes: int = IN_MEMORY_BYTES) -> None:
        self.folder = folder
        self.plan = _read_plan(folder)
        shards = [_shard(folder, n) for n in range(self.plan.shards)]
        if missing := [s.name for s in shards if not (s / DATA).is_file()]:
            raise UserError(f"{folder}: {len(missing)} of {len(shards)} shards missing ({missing[0]}); encode again")
        self.bytes = sum((s / DATA).stat().st_size for s in shards)
        self.in_memory = self.bytes <= in_memory_bytes
        self._captions: list[list[str]] = []
        self._shards: list[dict[str, Tensor]] = []
        digest = hashlib.sha256(self.plan.hash.encode())
        for shard in shards:
            try:
                if self.in_memory:
                    verify(shard)
                record = json.loads((shard / RECORD).read_text(encoding="utf-8"))
                self._shards.append(_arrays(shard / DATA, self.in_memory))
                digest.update((shard / MANIFEST).read_bytes())
            except (Damaged, OSError, ValueError, KeyError) as error:
                raise UserError(f"{shard}: damaged ({error}); remove it and encode again") from None
            if record.get("plan") != self.plan.hash:
                raise UserError(f"{shard}: made for another autoencoder, data set or size; encode again")
            self._captions += record["captions"]
        self._fingerprint = digest.hexdigest()

    def __len__(self) -> int:
        return self.plan.images

    @property
    def mirrors(self) -> bool:
        """As the data that was encoded."""
        return self.plan.mirrors

    def require(
        self, *, autoencoder: str | None = None, resolution: int | None = None, data: str | None = None
    ) -> None:
        """Check that the cache is what the caller means to train on; None: do not care.

        Raises:
            UserError: naming what differs.
        """
        wanted = {"autoencoder": autoencoder, "resolution": resolution, "data": data}
        for name, value in wanted.items():
            if value is not None and getattr(self.plan, name) != value:
                raise UserError(
                    f"{self.folder}: its latents were made with {name} {str(getattr(self.plan, name))[:12]}, "
                    f"not {str(value)[:12]}; encode again"
                )

    def load(
        self, index: Sequence[int], position: Sequence[int], resolution: int, seed: int, flip: bool
    ) -> MomentBatch:
        """As `ldm.data.dataset.Samples.load`; the crop is the stored one, flip and caption are drawn by position.

        Raises:
            UserError: if `resolution` is not the stored one, or `flip` is asked of a cache without mirrored copies.
        """
        self.require(resolution=resolution)
        flip = flip and self.mirrors
        if flip and not self.plan.flip:
            raise UserError(f"{self.folder}: has no mirrored copies; encode with flip=true or train with flip=false")
        rows = np.asarray(index, np.int64)
        mirror = np.asarray(draw_flips(seed, position, flip), bool)
        return MomentBatch(
            mean=self._gather("mean", rows, mirror),
            std=self._gather("std", rows, mirror) if "std" in self._shards[0] else None,
            caption=tuple(self.captions(index, position, seed)),
            size=self._gather("size", rows, mirror),
            position=torch.tensor([int(p) for p in position], dtype=torch.int64),
        )

    def _gather(self, name: str, rows: np.ndarray, mirror: np.ndarray) -> Tensor:
        """Rows of one column in float32."""
        shard, local = np.divmod(rows, self.plan.shard_images)
        places = zip(shard.tolist(), local.tolist(), mirror.tolist(), strict=True)
        # Joined from views and converted at once: three times as fast as an index array, which gathers value by value.
        found = [self._shards[s][f"mirrored_{name}" if m else name][r] for s, r, m in places]
        return torch.stack(found).float() if found else torch.empty(0, *self._shards[0][name].shape[1:])

    def captions(self, index: Sequence[int], position: Sequence[int], seed: int) -> list[str]:
        """As `ldm.data.dataset.Samples.captions`."""
        return draw_captions([self._captions[i] for i in index], position, seed)

    def all_captions(self, index: Sequence[int]) -> list[list[str]]:
        """As `ldm.data.dataset.Samples.all_captions`."""
        return [list(self._captions[i]) for i in index]

    def origin(self, index: int) -> str:
        """The shard and the row in it."""
        number, row = divmod(index, self.plan.shard_images)
        return f"{_shard(self.folder, number)}:{row}"

    def describe(self) -> dict[str, object]:
        """What is stored, under which plan."""
        return {
            "kind": "latents",
            "images": len(self),
            "captions": sum(map(len, self._captions)),
            "shape": list(self._shards[0]["mean"].shape[1:]),
            "bytes": self.bytes,
            "in_memory": self.in_memory,
            **{k: v for k, v in asdict(self.plan).items() if k not in ("images", "format")},
            "fingerprint": self.fingerprint(),
        }

    def fingerprint(self) -> str:
        """Hash of the plan and of the sums of every shard."""
        return self._fingerprint


def _read_plan(folder: Path) -> Plan:
    try:
        return Plan(**json.loads((folder / PLAN).read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise UserError(f"{folder}: no latent cache here ({PLAN} is missing)") from None
    except (ValueError, TypeError) as error:
        raise UserError(f"{folder / PLAN}: damaged ({error}); encode again") from None
