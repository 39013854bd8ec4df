"""Latent cache, writing: the autoencoder's posterior of every image, encoded once, in committed shards."""

from __future__ import annotations

import errno
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from ldm.config.errors import UserError
from ldm.config.schema import Count, Pixels, Positive
from ldm.data.buckets import Buckets, assign, sizes_of
from ldm.data.dataset import DataSet, expect
from ldm.data.images import Shape, mirrored
from ldm.data.loader import ordered
from ldm.diffusion.batch import Boxes, Graph, ImageBatch, Points, Text, View, cat
from ldm.formats.atomic import MANIFEST, commit, sha256, verify, write_json
from ldm.formats.records import Damaged, read_as, read_object

PLAN = "cache.json"
DATA = "moments.safetensors"
RECORD = "record.json"
FORMAT = 1
VIEW_PARTS = ("", "-box", "-there", "-point", "-part")  # ends of the columns of a view

Encode = Callable[[Tensor], tuple[Tensor, Tensor | None]]
Read = Callable[[Sequence[str]], Text]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Cache plan: what its shards must hold; those made under another plan are made anew."""

    autoencoder: str  # hash of the autoencoder's folder
    normalisation: dict[str, Any]  # the latent statistics by which the moments are already normalised
    data: str  # fingerprint of the data set
    images: Count
    resolution: Pixels  # px
    seed: int  # addresses the crops
    flip: bool  # whether mirrored copies are kept too
    mirrors: bool  # whether the data's captions allow it at all
    shard_images: Positive
    format: int = FORMAT
    text: str = ""  # hash of the text encoder whose states of the captions are kept; empty: none are
    shapes: tuple[tuple[Positive, Positive], ...] = ()  # height and width, px, of the buckets by number; empty: all are squares
    views: tuple[str, ...] = ()  # what else is kept of the pictures
    codes: Count = 0  # entries of the codebook whose numbers are kept in place of latents; 0: latents are

    @property
    def hash(self) -> str:
        """Of everything above."""
        said = {name: value for name, value in asdict(self).items() if name not in ("text", "shapes", "views", "codes") or value}
        return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()

    @property
    def shards(self) -> int:
        """How many folders the cache has."""
        return -(-self.images // self.shard_images)


@dataclass(frozen=True, kw_only=True)
class ShardRecord:
    """What a shard says of its rows."""

    plan: str  # hash of the plan that it was made under
    captions: list[list[str]]  # all of each sample
    buckets: list[Count] = field(default_factory=list)  # the number of each sample's shape; empty: squares
    words: dict[str, list[Any]] = field(default_factory=dict)  # by view, what of it is no number, of each sample


def shard_folder(folder: Path, number: int) -> Path:
    return folder / f"shard-{number:06d}"


def column(name: str, shape: tuple[int, int] | None) -> str:
    """What a shard calls the rows of one shape; None: all are squares."""
    return name if shape is None else f"{name}.{shape[0]}x{shape[1]}"


@dataclass(frozen=True, kw_only=True)
class CacheOptions:
    """What a latent cache is to hold of a data set."""

    autoencoder: str  # hash of the autoencoder's folder
    resolution: int  # px
    normalisation: dict[str, Any] = field(default_factory=dict)  # the latent statistics used by `encode`, for the record
    images: int | None = None  # the first so many samples only; None: all
    seed: int = 0  # addresses the crops
    flip: bool = False  # keep mirrored copies too (twice the size), if the data `mirrors`
    shard_images: int = 4096
    text: str = ""  # hash of the text encoder that reads
    buckets: Buckets | None = None  # keep each picture in the shape that fits it best; None, or data of one size: squares
    views: tuple[str, ...] = ()  # kept too; the data must have been asked for them
    codes: int = 0  # entries of the codebook whose numbers `encode` gives in place of a mean; 0: it gives latents


def write_cache(
    folder: Path,
    data: DataSet,
    encode: Encode,
    options: CacheOptions,
    *,
    read: Read | None = None,
    batch: int = 32,
    workers: int = 0,
    rank: int = 0,
    world: int = 1,
    part: tuple[int, int] = (0, 1),
    replaces: bool = True,
    on_images: Callable[[int], None] | None = None,
) -> None:
    """Encode every sample once into `folder`, in shards that are each whole or not there; finished ones are kept.

    Sample i is seen in the view of position i. Mean and deviation are stored as float16 (latents of unit variance lose
    less than one part in 2000), with all captions. Several ranks take shards in turn, and one calls `seal` afterwards.

    Args:
        encode: images (B,3,R,R) in [-1,1] on the CPU to normalised mean and deviation (B,c,h,w), no deviation for VQ; or, of an
            autoencoder that is read as codes, to their numbers (B,h,w), which are kept as integers, and None.
        read: captions to their states, which are kept too, as float16; each sample must have one caption.
        batch: images per call of `encode`.
        workers: threads that decode ahead.
        part: number and count of calls that share the work without knowing of each other; more than one do not `seal`.
        replaces: whether a cache of another plan in the folder is made anew, by a single part; if not, it is refused.
        on_images: called with the number of images that have just been encoded or found finished.

    Raises:
        UserError: if the disk is full (finished shards stay), a latent is not finite, a sample whose caption's states
            are to be kept has several, or the folder holds the cache of another plan, which is not to be replaced.
    """
    buckets = options.buckets
    sizes = sizes_of(data) if buckets else None
    choices = buckets.shapes(options.resolution) if buckets and sizes is not None else []
    plan = Plan(
        autoencoder=options.autoencoder,
        normalisation=options.normalisation,
        data=data.fingerprint(),
        images=len(data) if options.images is None else min(options.images, len(data)),
        resolution=options.resolution,
        seed=options.seed,
        flip=options.flip and data.mirrors,
        mirrors=data.mirrors,
        shard_images=options.shard_images,
        text=options.text,
        shapes=tuple(choices),
        views=options.views,
        codes=options.codes,
    )
    if plan.images == 0:
        raise UserError("the data set is empty: there is nothing to encode")
    tell = on_images or (lambda count: None)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if part[1] > 1 or not replaces:
            _share_plan(folder, plan)
        elif rank == 0:
            (folder / MANIFEST).unlink(missing_ok=True)
            write_json(folder / PLAN, asdict(plan))
        for number in range(part[0] * world + rank, plan.shards, part[1] * world):
            members = range(number * plan.shard_images, min((number + 1) * plan.shard_images, plan.images))
            if _whole(shard_folder(folder, number), plan):
                tell(len(members))
                continue
            record: dict[str, Any] = {"plan": plan.hash, "captions": data.all_captions(list(members))}
            if sizes is not None:
                record["buckets"] = assign(sizes[members.start : members.stop], choices).tolist()
            cuts = _cuts(members, record.get("buckets"), plan, batch)
            tensors, words = _encode_shard(data, encode, read, cuts, plan, workers, tell)
            record |= {"words": words} if words else {}
            commit(shard_folder(folder, number), _writer(tensors, record))
        if world == part[1] == 1:
            seal(folder)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        free = shutil.disk_usage(folder if folder.is_dir() else folder.parent).free / 2**20
        raise UserError(
            f"{folder}: the disk is full ({error.strerror}; {free:.0f} MiB free); free some space and run again, "
            f"the finished shards are kept"
        ) from None


def _share_plan(folder: Path, plan: Plan) -> None:
    """Write the plan, or find it written by another part.

    Raises:
        UserError: if what is there is of another plan, which is somebody's, or which other parts may be working on.
    """
    while True:
        try:
            there = read_as(folder / PLAN, Plan)
            if there.hash != plan.hash:
                old, new = asdict(there), asdict(plan)
                other = ", ".join(_told(name, old[name], new[name]) for name in new if old[name] != new[name])
                raise UserError(f"{folder}: holds a cache of another {other}; give another --out, or remove it first")
            return
        except (FileNotFoundError, Damaged):
            with suppress(FileNotFoundError):  # another part has just put its own there, which is the same
                write_json(folder / PLAN, asdict(plan))


def _told(name: str, old: object, new: object) -> str:
    """What differs; both values where they can be read."""
    return f"{name} ({old}, not {new})" if isinstance(old, int) and isinstance(new, int) else name.replace("_", " ")


def missing(folder: Path) -> int:
    """How many shards of a cache are not there yet."""
    plan = read_plan(folder)
    return sum(not (shard_folder(folder, number) / MANIFEST).is_file() for number in range(plan.shards))


def seal(folder: Path) -> None:
    """Commit the whole cache: a manifest over its shards' own; what earlier plans and kills left is removed.

    Raises:
        UserError: if a shard is missing or of another plan.
    """
    plan = read_plan(folder)
    shards = [shard_folder(folder, n) for n in range(plan.shards)]
    sums = {PLAN: sha256(folder / PLAN)}
    for shard in shards:
        try:
            own = read_object(shard / MANIFEST)
            record = read_as(shard / RECORD, ShardRecord)
        except (OSError, ValueError) as error:
            raise UserError(f"{shard}: missing or damaged ({error}); encode again") from None
        if record.plan != plan.hash:
            raise UserError(f"{shard}: made for another autoencoder, data set or size; encode again")
        sums |= {f"{shard.name}/{name}": value for name, value in own.items()}
        sums[f"{shard.name}/{MANIFEST}"] = sha256(shard / MANIFEST)
    keep = {PLAN, *(shard.name for shard in shards)}
    for path in list(folder.iterdir()):
        if path.name not in keep and path.name.startswith(("shard-", ".shard-", f".{PLAN}", f".{MANIFEST}")):
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
    try:
        write_json(folder / MANIFEST, sums)
    except FileNotFoundError:  # another part seals it at the same time, with the same sums
        if not (folder / MANIFEST).is_file():
            raise


def _whole(shard: Path, plan: Plan) -> bool:
    try:
        verify(shard)
        return read_as(shard / RECORD, ShardRecord).plan == plan.hash
    except (OSError, ValueError):
        return False


Cut = tuple[list[int], tuple[int, int] | None]  # samples, and their shape; None: squares


def _cuts(members: range, bucket: list[int] | None, plan: Plan, batch: int) -> list[Cut]:
    """The members of a shard in batches of one shape each."""
    groups: list[Cut] = [(list(members), None)]
    if bucket is not None:
        groups = [([i for i, b in zip(members, bucket, strict=True) if b == number], shape) for number, shape in enumerate(plan.shapes)]
    return [(group[i : i + batch], shape) for group, shape in groups for i in range(0, len(group), batch)]


def _encode_shard(
    data: DataSet, encode: Encode, read: Read | None, cuts: list[Cut], plan: Plan, workers: int, tell: Callable[[int], None]
) -> tuple[dict[str, np.ndarray], dict[str, list[Any]]]:
    """The arrays of one shard, and by view what of it is no number."""

    def load(index: list[int], shape: Shape) -> Callable[[], ImageBatch]:
        expect(data, index)  # a request for the whole cut, where its samples lie side by side
        return lambda: data.load(index, index, shape, plan.seed, False)

    tasks: Iterator[list[Callable[[], ImageBatch]]] = ([load(cut, shape or plan.resolution)] for cut, shape in cuts)
    columns: dict[str, list[np.ndarray]] = {}
    views: dict[tuple[int, int] | None, list[dict[str, View]]] = {}
    for (cut, shape), (images,) in zip(cuts, ordered(tasks, workers), strict=True):
        rows: dict[str, Tensor | None] = {"size": images.size}
        with torch.no_grad():
            mean, rows["std"] = encode(images.image)
            rows["mean"] = mean
            mask = None if images.mask is None else adaptive_avg_pool2d(images.mask, (mean.shape[-2], mean.shape[-1]))
            rows["mask"] = mask
            if plan.flip:
                rows["mirrored_size"] = mirrored(images.size)
                rows["mirrored_mask"] = None if mask is None else mask.flip(-1)
                rows["mirrored_mean"], rows["mirrored_std"] = encode(images.image.flip(-1))
        if read is not None:
            rows |= _states(data, read, cut)
        for name, value in rows.items():
            if value is None:
                continue
            whole = torch.int16 if plan.codes <= 2**15 else torch.int32
            kind = torch.float32 if name.endswith("size") else torch.float16 if value.is_floating_point() else whole
            value = value.detach().to("cpu", kind)
            finite = value.flatten(1).isfinite().all(1)
            if not finite.all():
                wrong = data.origin(cut[int((~finite).nonzero()[0])])
                raise UserError(f"{wrong}: its latent {name} is not finite in float16; encode in float32 instead")
            columns.setdefault(column(name, shape), []).append(value.numpy())
        if plan.views:
            views.setdefault(shape, []).append({name: _kept(view) for name, view in (images.views or {}).items()})
        tell(len(cut))
    arrays = {name: np.concatenate(parts) for name, parts in columns.items()}
    words: dict[str, dict[int, Any]] = {}
    for shape, parts in views.items():
        numbers = [i for cut, own in cuts if own == shape for i in cut]
        for name in plan.views:
            tensors, said = split_view(joined([part[name] for part in parts]))
            arrays |= {column(f"view-{name}{part}", shape): tensor.numpy() for part, tensor in tensors.items()}
            if said is not None:
                words.setdefault(name, {}).update(zip(numbers, said, strict=True))
    return arrays, {name: [said for _, said in sorted(of.items())] for name, of in words.items()}


def _kept(view: View) -> View:
    """A view as it is kept: maps of shares as bytes."""
    return (view * 255).round().to(torch.uint8) if isinstance(view, Tensor) and view.is_floating_point() else view


def joined(parts: Sequence[View]) -> View:
    """Views of several batches as one."""
    if isinstance(parts[0], Tensor):
        return torch.cat([part for part in parts if isinstance(part, Tensor)])
    return cat(parts)  # type: ignore[type-var,return-value]


def split_view(view: View) -> tuple[dict[str, Tensor], Sequence[Any] | None]:
    """The tensors of a view by the ends of their columns' names, and what is no number, one entry a sample."""
    if isinstance(view, Tensor):
        return {"": view}, None
    if isinstance(view, Boxes):
        return {"-box": view.box, "-there": view.there.to(torch.uint8)}, view.phrases
    if isinstance(view, Points):
        return {"-point": view.point, "-there": view.there.to(torch.uint8), "-part": view.part.to(torch.int16)}, None
    assert isinstance(view, Graph)
    return {}, view.triples


def rebuilt(tensors: Mapping[str, Tensor], words: Sequence[Any]) -> View:
    """The view that `split_view` took apart; `words` as they are read back from JSON."""
    if "" in tensors:
        return tensors[""]
    if "-box" in tensors:
        return Boxes(box=tensors["-box"], there=tensors["-there"].bool(), phrases=tuple(map(tuple, words)))
    if "-point" in tensors:
        return Points(point=tensors["-point"], there=tensors["-there"].bool(), part=tensors["-part"].long())
    return Graph(triples=tuple(tuple((a, b, c) for a, b, c in row) for row in words))


def _states(data: DataSet, read: Read, index: list[int]) -> dict[str, Tensor | None]:
    """The columns of captions' states."""
    captions = data.all_captions(index)
    for number, each in zip(index, captions, strict=True):
        if len(each) != 1:
            raise UserError(f"{data.origin(number)}: has {len(each)} captions; text states are kept for one. Leave text states out")
    text = read([each[0] for each in captions])
    return {"text_tokens": text.tokens, "text_mask": text.mask.float(), "text_pooled": text.pooled}


def _writer(tensors: dict[str, np.ndarray], record: dict[str, Any]) -> Callable[[Path], None]:
    def write(temporary: Path) -> None:
        from safetensors.numpy import save

        # Through Python's own files, whose errors say what the disk said.
        (temporary / DATA).write_bytes(save(tensors))
        (temporary / RECORD).write_text(json.dumps(record), encoding="utf-8")

    return write


def read_plan(folder: Path) -> Plan:
    try:
        return read_as(folder / PLAN, Plan)
    except FileNotFoundError:
        raise UserError(f"{folder}: no latent cache here ({PLAN} is missing)") from None
    except Damaged as error:
        raise UserError(f"{error}; encode again") from None
