"""Data set validation before training: what was found, what was rejected and why, sizes, captions, buckets."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ldm.config.counts import plural
from ldm.config.errors import UserError
from ldm.data.buckets import Buckets, assign, table
from ldm.data.captions import cut_at_most, from_folder, prompt_marks
from ldm.data.file_names import SUFFIXES, printable
from ldm.data.folder import FolderData, FolderSource, how_to_unpack
from ldm.data.folder_scan import ARCHIVES, again, one_look
from ldm.data.hugging_face import DatasetsSource, is_saved
from ldm.data.images import Rejected, view
from ldm.data.masks import masks_say
from ldm.data.photos import Photos
from ldm.data.shards import ShardsData, ShardsSource
from ldm.data.storage import is_url
from ldm.data.views import ViewKind
from ldm.text.lengths import cut_captions

SIDES = (0, 64, 128, 256, 384, 512, 768, 1024, 1536, 2048)  # px, the lower ends of the histogram's bars
ASPECTS = (0.0, 0.5, 0.67, 0.8, 0.95, 1.05, 1.25, 1.5, 2.0)  # width over height
LENGTHS = (0, 10, 20, 40, 80, 160, 320, 640)  # characters
WORDS = 75  # tokens of a caption that CLIP's 77 leave room for
SHOWN = 20  # rejected samples that are named


@dataclass
class DataReport:
    """Report of a data set check, as plain values."""

    kind: str
    path: str
    images: int
    captions: int
    rejected: dict[str, int]
    examples: list[str]  # of what was left out
    damage: dict[str, list[str]]  # of shards
    sides: dict[str, int]  # shorter side in px
    aspects: dict[str, int]  # width over height
    caption_characters: dict[str, int]
    repeated_captions: int  # captions that another sample has too
    scores: dict[str, dict[str, float]]  # of those that are known: count, median, lowest, highest
    resolution: int  # px, of the buckets
    buckets: list[dict[str, Any]]  # width, height, images, mean share that is cut away, images that are enlarged
    decoded: int  # how many were decoded to see whether they can be
    undecodable: dict[str, int]
    fingerprint: str  # of the training part
    notes: list[str] = field(default_factory=list)
    cut_captions: dict[str, Any] | None = None  # those longer than a text encoder reads: how many, the tokens read, the longest


def source_at(path: str, captions: str = "auto") -> FolderSource | ShardsSource | DatasetsSource:
    """The source that fits what lies at a path: tar shards, a saved data set, parquet of bytes, or a folder of images.

    Raises:
        UserError: if nothing is there.
    """
    path = os.path.expanduser(path)
    place = Path(path)
    if is_url(path) or path.endswith(".tar") or ("{" in path and not place.exists()):
        return DatasetsSource(path=path, max_bad=1.0) if path.endswith(".parquet") else ShardsSource(path=path, max_bad=1.0)
    if not place.exists():
        raise UserError(f"{path} does not exist; give a folder of images, of tar shards or of parquet files")
    if place.suffix == ".parquet" or (place.is_dir() and is_saved(place)):
        return DatasetsSource(path=path, max_bad=1.0)
    if place.is_file() and place.suffix.lower() in ARCHIVES:
        raise UserError(f"{path} is an archive; {how_to_unpack(path)}")
    if place.is_file():
        raise UserError(f"{path} is one file; give a folder of images, tar shards, or parquet with image bytes")
    if any(place.rglob("*.tar")):
        return ShardsSource(path=path, max_bad=1.0)
    tables = [p for p in place.rglob("*.parquet") if not p.name.startswith(("metadata", "."))]
    if tables and not any(p.suffix.lower() in SUFFIXES for p in place.rglob("*")):
        return DatasetsSource(path=path, max_bad=1.0)
    return FolderSource(path=path, captions=captions, max_bad=1.0)  # type: ignore[arg-type]


def check(
    source: FolderSource | ShardsSource | DatasetsSource,
    resolution: int = 512,
    decode: int = 200,
    tokenizer: Callable[[], Any] | None = None,
    room: int = WORDS,
) -> tuple[DataReport, list[Photos]]:
    """Everything that can be said of a source, and its two parts.

    Args:
        resolution: px, for the table of buckets.
        decode: how many images, spread evenly, are decoded to see whether they can be.
        tokenizer: makes that of the model that is to be trained; None: Stable Diffusion's.
        room: tokens of a caption that it reads.

    Raises:
        UserError: if it is missing, empty or without captions.
    """
    with one_look():
        parts: list[Photos] = [source.build("train"), source.build("val")]
    described: dict[str, Any] = parts[0].describe()  # type: ignore[attr-defined]
    sizes = np.concatenate([part.sizes() for part in parts])
    texts = [text for part in parts for captions in _all(part) for text in dict.fromkeys(captions)]
    counted = Counter(texts)
    undecodable, decoded = _decode(parts, decode)
    examples = next((list(v) for k, v in described.items() if k in ("rejected_files", "rejected_samples", "rejected_rows")), [])
    choices = Buckets().shapes(resolution)
    found = DataReport(
        kind=source.kind,
        path=source.path,
        images=len(sizes),
        captions=len(texts),
        rejected=dict(described["rejected"]),
        examples=examples[:SHOWN],
        damage=described.get("damaged_shards", {}),
        sides=_bars(sizes.min(1), SIDES),
        aspects=_bars(sizes[:, 1] / sizes[:, 0], ASPECTS),
        caption_characters=_bars(np.array([len(t) for t in texts]), LENGTHS),
        repeated_captions=sum(n for n in counted.values() if n > 1),
        scores=_scores(parts),
        resolution=resolution,
        buckets=table(sizes, choices, assign(sizes, choices)),
        decoded=decoded,
        undecodable=dict(undecodable),
        fingerprint=str(described["fingerprint"]),
    )
    plain = isinstance(source, FolderSource) and source.captions != "kohya"
    if plain and any(from_folder(part.name(i)) for part in parts for i in range(len(part))):
        found.notes.append("folders are named as kohya's scripts have them; captions=kohya reads repeats and words from the names")
    found.notes += described.get("notes", [])
    if isinstance(source, FolderSource):
        found.notes += _views(parts)
        if source.masks == "none" and described["rejected"].get("side picture"):
            found.notes += _masks(replace(source, masks="beside"))
    if isinstance(parts[0], ShardsData):
        index = parts[0].index
        found.notes += again(index.name, index.column("hash"))
        found.notes += _loose(Path(source.path))
    if "with_repeats" in described:
        distinct = len({part.name(i) for part in parts for i in range(len(part))})
        found.notes.append(f"{plural(distinct, 'picture')}, counted as often as an epoch has them")
    if cut := cut_captions(texts, tokenizer or _usual_tokenizer, room):
        found.cut_captions = asdict(cut)
        found.notes.append(str(cut))
    if marked := prompt_marks(texts):
        found.notes.append(marked)
    if whole := cut_at_most(texts):
        found.notes.append(whole)
    small = int((sizes.min(1) < resolution).sum())
    if small:
        found.notes.append(
            f"{plural(small, 'image is', 'images are')} enlarged to reach {resolution} px; a filter with min_side leaves such out"
        )
    if found.repeated_captions > len(texts) // 4:
        top, times = counted.most_common(1)[0]
        repeated = plural(found.repeated_captions, "caption is", "captions are")
        found.notes.append(f"{repeated} not unique; the most frequent stands {plural(times, 'time')}: {top[:80]!r}")
    return found, parts


def _loose(place: Path) -> Iterator[str]:
    """Pictures that lie beside shards, which are not in them."""
    if place.is_dir():
        loose = sorted(path for path in place.rglob("*") if path.suffix.lower() in SUFFIXES)
        if loose:
            lie = plural(len(loose), "picture lies", "pictures lie")
            yield f"{lie} beside the shards, not read, such as {loose[0]}; data.kind=folder reads such"


def _masks(source: FolderSource) -> Iterator[str]:
    """What a training by the masks beside pictures would say of them."""
    with one_look():
        data = source.build("train")
    described: dict[str, Any] = data.describe()
    if many := described.get("with_mask", 0):
        have = plural(many, "picture has a mask", "pictures have masks")
        yield f"{have} beside them; data.masks=beside and masked_loss learn by them"
        try:
            said = masks_say(data, described, black_counts=False)
        except UserError as error:
            said = str(error)
        if said:
            yield said


def _views(parts: list[Photos]) -> Iterator[str]:
    """How many pictures have each view that their folder tells, and which have not."""
    folder = parts[0]
    assert isinstance(folder, FolderData)
    names = list(dict.fromkeys(part.name(i) for part in parts for i in range(len(part))))
    found = folder.found_views
    kinds: Mapping[str, ViewKind] = {}
    try:
        kinds = folder.views()
    except UserError as error:
        yield str(error)
    told: dict[str, Mapping[str, Any]] = {**found.maps, **found.words}
    for name, there in told.items():
        missing = [picture for picture in names if picture not in there]
        lacking = f", missing of {len(missing)}, such as {missing[0]}" if missing else ""
        kind = kinds.get(name)
        classes = f" ({plural(kind.channels, 'class', 'classes')})" if kind and kind.form == "classes" else ""
        yield f"view {name}{classes}: of {plural(len(names) - len(missing), 'picture')}{lacking}"
        if broken := found.broken.get(name):
            picture = next(iter(broken))
            yield f"view {name}: of {plural(len(broken), 'picture')} it cannot be read, such as {picture}: {broken[picture]}"


def _usual_tokenizer() -> Any:
    from ldm.formats.open_clip import open_clip_tokenizer

    return open_clip_tokenizer()


def _all(part: Photos) -> list[list[str]]:
    return part.all_captions(range(len(part)))


def _bars(values: NDArray[Any], lows: tuple[float, ...]) -> dict[str, int]:
    """How many values lie from each bound to the next, by the lower bound; empty ends are left out."""
    counts = np.bincount(np.searchsorted(lows, values, side="right") - 1, minlength=len(lows)).tolist()
    there = [i for i, n in enumerate(counts) if n]
    return {f"{lows[i]:g}+": counts[i] for i in range(there[0], there[-1] + 1)} if there else {}


def _scores(parts: list[Photos]) -> dict[str, dict[str, float]]:
    found = {}
    for name in ("aesthetic", "watermark"):
        values = np.concatenate([getattr(part.fields(), name) for part in parts])
        values = values[~np.isnan(values)]
        if len(values):
            low, middle, high = (round(float(v), 4) for v in (values.min(), np.median(values), values.max()))
            found[name] = {"known": len(values), "lowest": low, "median": middle, "highest": high}
    return found


def _decode(parts: list[Photos], count: int) -> tuple[Counter[str], int]:
    total = sum(map(len, parts))
    chosen = np.unique(np.linspace(0, total - 1, min(count, total)).round().astype(int)) if count else np.zeros(0, int)
    wrong: Counter[str] = Counter()
    for number in chosen.tolist():
        part, index = (parts[0], number) if number < len(parts[0]) else (parts[1], number - len(parts[0]))
        try:
            view(part.read(index), 64)
        except Rejected as error:
            wrong[error.reason] += 1
    return wrong, len(chosen)


def lines(found: DataReport) -> list[str]:
    """For a terminal."""
    said = [f"{found.path}: {plural(found.images, 'image')} with {plural(found.captions, 'caption')} ({found.kind})"]
    left = sum(found.rejected.values())
    if left:
        said.append(f"left out: {left:,}")
        said += [f"  {count:>9,}  {reason}" for reason, count in sorted(found.rejected.items(), key=lambda item: -item[1])]
        said += [f"             {printable(text)[:200]}" for text in found.examples[:5]]
    for name, places in list(found.damage.items())[:5]:
        said.append(printable(f"damaged: {name}: {'; '.join(places[:3])}"))
    whole = f"{found.decoded:,} decoded to see whether they can be: "
    said.append(whole + (", ".join(f"{n} {r}" for r, n in found.undecodable.items()) if found.undecodable else "all can"))
    charts = {"shorter side, px": found.sides, "width over height": found.aspects, "characters of a caption": found.caption_characters}
    for title, bars in charts.items():
        said.append(title)
        most = max(bars.values(), default=1)
        said += [f"  {low:>7} {count:>9,}  {'#' * round(30 * count / most)}" for low, count in bars.items()]
    for name, score in found.scores.items():
        said.append(f"{name}: known of {score['known']:,}, {score['lowest']:g} to {score['highest']:g}, median {score['median']:g}")
    said.append(f"buckets of {found.resolution} px: width x height, images, cut away, enlarged")
    said += [f"  {b['width']:>5} x {b['height']:<5} {b['images']:>9,}  {b['cut']:>6.1%} {b['enlarged']:>9,}" for b in found.buckets]
    return said + [f"note: {printable(note)[:400]}" for note in found.notes]
