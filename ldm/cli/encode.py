"""The encode verb: writes a latent cache from pictures and an autoencoder, by one process or many."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from ldm.cli.command import call
from ldm.cli.models import model_for
from ldm.cli.progress import bar
from ldm.config.counts import plural
from ldm.config.errors import UserError
from ldm.config.options import Given, option

Option = typer.Option


@dataclass(frozen=True)
class Encoding:
    """Encoding: what the cache holds, and how it is made."""

    resolution: int = option(512, "px, height and width.", low=8, high=8192)
    codes: bool = option(False, "Keep the numbers of a VQ autoencoder's codes, for token models; else latents.")
    flip: bool = option(False, "Keep mirrored latents too, for training with flip (twice the size).")
    text: bool = option(False, "Keep the text encoder's states of the captions too.")
    views: tuple[str, ...] = option((), "A view to keep beside, such as grey or small:4, for models with conditions; may be repeated.")
    buckets: bool = option(False, "Pictures in shapes near their own, for stages with buckets; else squares.")
    bucket_step: int = option(0, "px, sides are multiples of it; 0: 64 from 256 px on, 8 below.", low=0, needs="buckets")
    max_aspect: float = option(2.0, "Of a bucket's longer side to its shorter one.", low=1, needs="buckets")
    images: int = option(0, "The first so many; 0: all.", low=0)
    batch: int = option(16, "Pictures per call of the encoder.", low=1)
    seed: int = option(0, "Of the crops.", low=0)
    workers: int = option(2, "Threads that decode ahead.", low=0)
    shard: int = option(4096, "Pictures of a file; a restart does unfinished files again.", low=1)


def main(words: list[str]) -> int:
    """`ldm data encode DATA ...`: the exit code."""
    return call(encode, words, "ldm data encode")


def encode(
    data: Annotated[
        str, typer.Argument(help="A folder of images, tar shards, parquet with image bytes, or a YAML file of a run."), Given.DATA
    ],
    model: Annotated[str, Option(help="Whose autoencoder: a folder or file of a model, or owner/name on the hub."), Given.MODEL],
    out: Annotated[Path, Option(help="The folder of the cache; what is there of the same cache is kept, another one is refused.")],
    options: Encoding,
    part: Annotated[str, Option(help="One of several calls that share the work, such as 3/16 of 0/16 to 15/16.")] = "",
    device: Annotated[str, Option(help="cuda, mps or cpu; default: the best there is."), Given.DEVICE] = "",
    as_json: Annotated[bool, Option("--json", help="Print one JSON object.")] = False,
) -> int:
    """Encode pictures to latents, each once, for `latents:` of a training stage; start it again and it goes on."""
    number, parts = _part(part)
    place = _model(model_for(model))
    source = _source(data)
    from ldm.cli.models import device_for
    from ldm.data.buckets import Buckets, sizes_of, wrong_step
    from ldm.data.cache import CacheOptions, missing, seal, write_cache
    from ldm.data.cached import CachedLatents
    from ldm.data.dataset import asked
    from ldm.distributed.processes import processes
    from ldm.distributed.watchdog import Verb
    from ldm.formats.latent_codec import autoencoder_folder, load_codec

    seen: Any = asked(source.build("train"), options.views)
    with processes(device == "cpu", Verb("data encode", "The same command goes on")) as team:
        where = device_for(device, team.local)
        codec = load_codec(autoencoder_folder(place)).to(where)
        if options.resolution % codec.factor:
            raise UserError(f"resolution: got {options.resolution}; this autoencoder needs a multiple of {codec.factor}")
        if options.codes and not codec.codes:
            raise UserError(f"--codes: the autoencoder of {model} has no codebook; leave it out")
        chosen = Buckets(step=options.bucket_step, max_aspect=options.max_aspect) if options.buckets else None
        if chosen and (wrong := list(wrong_step(chosen, options.resolution, codec.factor, "buckets"))):
            raise UserError("; ".join(wrong))
        if chosen and sizes_of(seen) is None:
            raise UserError(f"--buckets: the pictures of {data} all have one size, or do not tell theirs; leave it out")
        read, text_hash = _reader(place, where) if options.text else (None, "")
        count = min(options.images or len(seen), len(seen))
        started = time.monotonic()
        with bar(count, team.main and sys.stderr.isatty()) as advance:
            write_cache(
                out,
                seen,
                lambda image: (codec.encode_codes(image.to(where)), None) if options.codes else codec.moments(image.to(where)),
                CacheOptions(
                    autoencoder=codec.hash,
                    normalisation=codec.statistics.to_dict(),
                    resolution=options.resolution,
                    images=count,
                    seed=options.seed,
                    flip=options.flip,
                    shard_images=options.shard,
                    text=text_hash,
                    buckets=chosen,
                    codes=codec.codes if options.codes else 0,
                    views=options.views,
                ),
                batch=options.batch,
                workers=options.workers,
                rank=team.rank,
                world=team.world,
                part=(number, parts),
                replaces=False,
                on_images=advance,
                read=read,
            )
        team.wait()
        if team.main:
            if left := missing(out) if parts > 1 else 0:
                told = {"folder": str(out), "part": number, "parts": parts, "missing": left}
                print(
                    json.dumps(told, indent=1) if as_json else f"{out}: part {part} is done; other parts still make {left:,} of its shards"
                )
                return 0
            if team.world > 1 or parts > 1:
                seal(out)
            described = CachedLatents(out).describe()
            if as_json:
                print(json.dumps({"folder": str(out), **described}, indent=1))
            else:
                seconds = time.monotonic() - started
                size = int(str(described["bytes"])) / 2**20
                shapes = f" in up to {len(chosen.shapes(options.resolution))} shapes" if chosen else ""
                what = f"{'codes' if options.codes else 'latents'} of {plural(count, 'picture')}"
                print(f"{out}: {what} at {options.resolution} px{shapes}, {size:,.1f} MiB, in {seconds:.1f} s")
    return 0


def _part(text: str) -> tuple[int, int]:
    """Number and count of `3/16`; the whole where nothing is said."""
    number, slash, count = text.partition("/")
    if not text:
        return 0, 1
    if not (slash and number.isdecimal() and count.isdecimal() and int(number) < int(count) <= 10**6):
        raise UserError(f"--part: got {text!r}; give a number from 0 and the count, such as 0/16 to 15/16")
    return int(number), int(count)


def _source(data: str) -> Any:
    """Where pictures come from: a path, or what a run's file says."""
    if data.endswith((".yaml", ".yml")):
        from ldm.config.schema import build, configuration, read
        from ldm.runs.run import Run, place

        file = configuration(data)
        return place(build(read(file, []), Run, data), file)[0].data
    from ldm.data.check import source_at

    return source_at(data)


def _model(name: str) -> Path:
    from ldm.formats.model_folder import open_model

    return open_model(name).folder


def _reader(folder: Path, device: str) -> tuple[Callable[..., Any], str]:
    """What reads captions, and the hash of what reads."""
    from ldm.text.encoder import TextEncoder
    from ldm.text.pretrained import text_hash

    text = TextEncoder.load(folder)
    text.model.to(device)
    return text.encode, text_hash(folder)
