"""The data verb: checks a data set, indexes tar shards, curates tables, fetches pictures."""

from __future__ import annotations

import difflib
import json
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from ldm.cli.command import call
from ldm.cli.given import check_captioned
from ldm.config.counts import plural
from ldm.config.errors import UserError
from ldm.config.files import at_home
from ldm.config.options import Given
from ldm.data.curation.fetch import DownloadOptions
from ldm.data.curation.rules import UNIQUE, Curation

USAGE = """usage: ldm data WHAT ...

  check PATH          what is there, what is left out and why; sizes, captions, buckets; a page of samples
  hash PATH           a table of pictures with their captions, sizes, and hashes for finding duplicates
  index PATH          read tar shards once, so that their samples have addresses
  encode DATA         latents of all pictures, once for many trainings
  curate TABLE ...    filter parquet tables of links or pictures, remove duplicates, split, and account for every row
  fetch TABLE         the pictures of a table's links as tar shards, by img2dataset

`ldm data WHAT --help` tells more."""


def main(words: list[str]) -> int:
    """`ldm data`: the exit code."""
    verbs: dict[str, Callable[..., int]] = {"check": check, "index": index, "curate": curate, "fetch": fetch, "hash": hash_pictures}
    if not words or words[0] in ("-h", "--help", "help"):
        print(USAGE)
        return 0
    if words[0] == "encode":
        from ldm.cli.encode import main as encode

        return encode(words[1:])
    if words[0] not in verbs:
        known = (*verbs, "encode")
        near = difflib.get_close_matches(words[0], known, 1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"
        if at_home(words[0]).exists():
            hint = f"did you mean check {words[0]}?"
        raise UserError(f"{words[0]}: no such word; {hint}")
    return call(verbs[words[0]], words[1:], f"ldm data {words[0]}")


def check(
    path: Annotated[
        str, typer.Argument(help="A folder of images, tar shards, parquet with image bytes, a saved data set, or a URL."), Given.DATA
    ],
    resolution: Annotated[int, typer.Option(help="px; for the table of buckets.", min=8, max=8192)] = 512,
    captions: Annotated[str, typer.Option(help="Of a folder: auto, txt, metadata, filename, kohya or none.")] = "auto",
    outside: Annotated[bool, typer.Option("--outside", help="Also read what links and rows name outside the data set.")] = False,
    decode: Annotated[int, typer.Option(help="How many images are decoded to see whether they can be; -1: all.", min=-1)] = 200,
    model: Annotated[str, typer.Option(help="Whose text encoder reads the captions; default: as Stable Diffusion's.")] = "",
    html: Annotated[Path | None, typer.Option(help="Write a page with a grid of samples.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> int:
    """Say what was found, what was left out and why, and what training would see."""
    if captions not in ("auto", "txt", "metadata", "filename", "kohya", "none"):
        raise UserError(f"--captions: got {captions!r}; there are auto, txt, metadata, filename, kohya, none")
    if captions == "auto":
        check_captioned(path)
    from ldm.data import check as checking
    from ldm.data.folder import FolderSource

    source = checking.source_at(path, captions)
    if captions != "auto" and not isinstance(source, FolderSource):
        raise UserError(f"--captions: is of a folder of images, and changes nothing with {path}; leave it out")
    tokenizer = _tokenizer(model) if model else None
    room = tokenizer.model_max_length - len(tokenizer("")["input_ids"]) if tokenizer else checking.WORDS
    many, source = sys.maxsize if decode < 0 else decode, replace(source, outside=outside)
    found, parts = checking.check(source, resolution, many, tokenizer=(lambda: tokenizer) if tokenizer else None, room=room)
    if html is not None:
        from ldm.cli.data_page import data_page

        html.parent.mkdir(parents=True, exist_ok=True)
        html.write_text(data_page(found, parts), encoding="utf-8", errors="backslashreplace")
    print(json.dumps(asdict(found), indent=1, ensure_ascii=False) if as_json else "\n".join(checking.lines(found)))
    if html is not None and not as_json:
        print(f"{html}: the page")
    return 0


def _tokenizer(model: str) -> Any:
    from ldm.formats.model_folder import open_model
    from ldm.formats.tokenizer_files import load_tokenizer

    return load_tokenizer(open_model(model).folder / "tokenizer")


def index(
    path: Annotated[str, typer.Argument(help="A folder of shards, a pattern such as {00000..00099}.tar, or a URL."), Given.DATA],
    out: Annotated[Path | None, typer.Option(help="The index file; otherwise beside the shards, or in the cache.")] = None,
    verify: Annotated[bool, typer.Option(help="Read all shards again and compare them with their hashes.")] = False,
    workers: Annotated[int, typer.Option(help="Processes that read shards; 1: threads of this one.", min=1, max=256)] = 1,
    upload: Annotated[bool, typer.Option("--upload", help="Also put it beside shards in a store, for other machines.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> int:
    """Read tar shards once and keep where each sample lies; shards that have not changed are not read again.

    A call that was stopped is taken up by the next one, and calls at the same time, on several machines too, share the work.
    """
    from ldm.data.shard_index import open_index
    from ldm.data.shard_index import upload as put_beside
    from ldm.data.shard_reader import ShardRecord

    told: set[str] = set()

    def tell(record: ShardRecord, number: int, count: int) -> None:
        told.add(record.name)
        left = sum(record.rejected.values())
        said = f"{record.name}: {plural(record.samples, 'sample')}" + (f", {left} left out" if left else "")
        said += "".join(f"\n  damaged {place}" for place in record.damage[:5])
        print(f"[{number}/{count}] {said}", file=sys.stderr if as_json else sys.stdout, flush=True)

    found = open_index(path, renew=not verify, verify=verify, file=out, workers=workers, uploads=upload, on_shard=tell)
    if upload:
        print(f"{put_beside(found)}: the index", file=sys.stderr)
    if as_json:
        shards = [asdict(record) for record in found.shards]
        print(json.dumps({"root": found.root, "samples": len(found), "shards": shards}, indent=1, ensure_ascii=False))
        return 0
    reasons: dict[str, int] = {}
    for record in found.shards:
        for reason, count in record.rejected.items():
            reasons[reason] = reasons.get(reason, 0) + count
    size = sum(record.bytes for record in found.shards) / 2**20
    print(f"{plural(len(found), 'sample')} in {plural(len(found.shards), 'shard')}, {size:,.1f} MiB")
    for reason, count in sorted(reasons.items(), key=lambda item: -item[1]):
        print(f"  {count:>9,}  left out: {reason}")
    for record in found.shards:  # of shards that an earlier call read
        if record.damage and record.name not in told:
            more = f" and at {plural(len(record.damage) - 1, 'more place')}" if len(record.damage) > 1 else ""
            print(f"  {record.name}: damaged {record.damage[0]}{more}")
    return 0


def curate(
    tables: Annotated[list[str], typer.Argument(help="Parquet files, folders of them, patterns or URLs.")],
    out: Annotated[Path, typer.Option(help="The folder for train.parquet, val.parquet and audit.json.")],
    asked: Curation,
    subset: Annotated[str, typer.Option(help="laion-high-resolution or improved-aesthetics; filters tighten it.")] = "",
    memory_mb: Annotated[int, typer.Option(help="Of the database, which goes on on the disk.", min=64)] = 1024,
    threads: Annotated[int, typer.Option(help="Of the database.", min=1)] = 2,
    ray: Annotated[str, typer.Option(help="Filter table by table on Ray's workers: local, auto or a cluster's address.")] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> int:
    """Filter tables of links or pictures; what each rule removed is told and kept in audit.json."""
    from ldm.data.curation import curate as curating

    if wrong := [name for name in asked.unique if name not in UNIQUE]:
        raise UserError(f"--unique: got {wrong[0]!r}; there are {', '.join(UNIQUE)}")
    if subset:
        asked = curating.with_subset(subset, asked)
    if ray:
        from ldm.data.curation.spread import curate_spread, on_ray

        audit = curate_spread(tables, out, asked, on_ray(ray, threads), memory_mb=memory_mb, threads=threads)
    else:
        audit = curating.curate(tables, out, asked, memory_mb=memory_mb, threads=threads)
    print(json.dumps(asdict(audit), indent=1, ensure_ascii=False, default=str) if as_json else "\n".join(curating.lines(audit)))
    return 0


def fetch(
    table: Annotated[Path, typer.Argument(help="A parquet file of links, or a folder of them, as ldm data curate writes.")],
    out: Annotated[Path, typer.Option(help="The folder of the shards; what is there already is not fetched again.")],
    options: DownloadOptions,
    img2dataset: Annotated[str, typer.Option(help="The program, in its own environment; default: the one on the path.")] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> int:
    """Fetch pictures, and say which links gave none and why; start it again and it goes on."""
    from ldm.data.curation import fetch as fetching

    if options.distributor not in ("multiprocessing", "pyspark", "ray"):
        raise UserError(f"--distributor: got {options.distributor!r}; there are multiprocessing, pyspark, ray")
    columns, command = fetching.columns_of(table), fetching.command_of(img2dataset)
    words = fetching.words_of(table, out, columns, options)
    print(" ".join([command, *words]), file=sys.stderr)
    fetching.run([command, *words], out, options, lambda said: print(said, file=sys.stderr, flush=True))
    found = fetching.look(out)
    print(json.dumps(asdict(found), indent=1, ensure_ascii=False) if as_json else "\n".join(found.lines()))
    return 1 if found.wrong else 0


def hash_pictures(
    path: Annotated[str, typer.Argument(help="A folder of images, tar shards, or parquet with image bytes."), Given.DATA],
    out: Annotated[Path, typer.Option(help="The parquet table.")],
    threads: Annotated[int, typer.Option(help="That decode.", min=1)] = 2,
) -> int:
    """Write a table that `ldm data curate --unique sha256 --near 3` understands."""
    check_captioned(path)
    from ldm.data.check import source_at
    from ldm.data.curation.hashes import write
    from ldm.data.folder_scan import one_look

    source = source_at(path)
    with one_look():
        parts = [source.build("train"), source.build("val")]
    count = write(parts, out, threads)
    print(f"{out}: {plural(count, 'picture')}")
    return 0
