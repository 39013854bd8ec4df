"""The data a run can learn from: the union of source configurations, each of which builds a data set."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from ldm.config.schema import BY_KIND
from ldm.data.concatenation import ConcatenationSource
from ldm.data.dataset import DataSet, Samples, Split
from ldm.data.file_names import bare
from ldm.data.folder import FolderSource
from ldm.data.folder_scan import no_folder, one_look
from ldm.data.hugging_face import DatasetsSource
from ldm.data.scenes.source import ScenesSource
from ldm.data.shards import ShardsSource
from ldm.data.unpaired import UnpairedSource

Source = Annotated[ScenesSource | FolderSource | ShardsSource | DatasetsSource | ConcatenationSource | UnpairedSource, BY_KIND]
PHOTOGRAPHS = (FolderSource, ShardsSource, DatasetsSource)  # which share captions' affixes and masks

__all__ = [
    "ConcatenationSource",
    "DataSet",
    "DatasetsSource",
    "FolderSource",
    "Samples",
    "ScenesSource",
    "ShardsSource",
    "Source",
    "Split",
    "UnpairedSource",
]


def both_parts(source: Source) -> tuple[DataSet, DataSet]:
    """The training and the held-out part, of one look at each folder.

    Raises:
        UserError: as the source's `build`.
    """
    with one_look():
        return source.build("train"), source.build("val")


def affixes(source: Source) -> list[tuple[str, str]]:
    """Prefix and suffix of every source of photographs in one."""
    if isinstance(source, ConcatenationSource):
        return [pair for part in source.parts for pair in affixes(part.source)]
    return [(source.prefix, source.suffix)] if isinstance(source, PHOTOGRAPHS) else []


def lost(source: Source) -> str:
    """What is wrong with where a source lies, as far as a look shows it; empty: nothing.

    Raises:
        UserError: for a folder that has no pictures, or none with a caption, as its data set says it.
    """
    if isinstance(source, ConcatenationSource):
        return next(filter(None, (lost(part.source) for part in source.parts)), "")
    if not isinstance(source, FolderSource):
        return ""
    if not Path(source.path).is_dir():
        return no_folder(Path(source.path))
    if source.captions == "auto" and not source.caption and bare(Path(source.path)):
        source.build("train")
    return ""


def has_masks(source: Source) -> bool:
    """Whether a source, or a part of one of several, tells how much each pixel counts."""
    if isinstance(source, ConcatenationSource):
        return any(has_masks(part.source) for part in source.parts)
    return isinstance(source, PHOTOGRAPHS) and source.masks != "none"
