"""The caption verb: text files beside pictures, written by a model."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from ldm.cli.command import call
from ldm.cli.models import device_for, tell
from ldm.cli.progress import bar
from ldm.config.counts import plural
from ldm.config.errors import UserError
from ldm.config.files import at_home
from ldm.config.options import Given, option

Option = typer.Option


@dataclass(frozen=True, kw_only=True)
class Words:
    """Words: how captions are drawn, and what stands around them."""

    temperature: float | None = option(None, "Of drawn words; 0: the likeliest; default: the model's.", low=0, high=100)
    top_k: int | None = option(None, "Draw from so many likeliest words; 0: all.", low=0, high=2**20)
    top_p: float | None = option(None, "Draw from the likeliest words of so much probability together.", low=0, high=1)
    seed: int | None = option(None, "Of what is drawn at random; a picture's is SEED plus its number in order of names; default: 0.", low=0)
    prefix: str = option("", "Before every caption, such as 'sks style,'.")
    suffix: str = option("", "Behind every caption.")


def main(words: list[str]) -> int:
    """`ldm caption PATH ...`: the exit code."""
    return call(caption, words, "ldm caption")


def caption(
    model: Annotated[str, Option(help="A run or model folder that writes captions, or a folder of transformers: BLIP, GIT, ViT-GPT2.")],
    words: Words,
    paths: Annotated[list[Path] | None, typer.Argument(help="Folders of pictures, or pictures."), Given.PICTURES] = None,
    count: Annotated[int, Option(help="Without pictures: so many captions, of a model of captions alone.", min=0)] = 0,
    overwrite: Annotated[bool, Option("--overwrite", help="Write captions anew that stand beside pictures already.")] = False,
    dry_run: Annotated[bool, Option("--dry-run", help="Print captions, and write nothing.")] = False,
    batch: Annotated[int, Option(help="Pictures at a time.", min=1)] = 16,
    device: Annotated[str, Option(help="cuda, mps or cpu; default: the best there is."), Given.DEVICE] = "",
) -> int:
    """Write a caption into a text file beside each picture that has none; start it again and it goes on."""
    if not paths and not count:
        raise UserError("pictures: none; name a folder or files, or give --count for a model of captions alone")
    if paths and count:
        raise UserError("count: is of a model of captions alone, and changes nothing with pictures; leave --count out")
    place = at_home(model)
    if not place.is_dir():
        raise UserError(f"model: {model}: no such folder; give a run or model folder that writes captions, or one of transformers")
    from ldm.data.captions import clean
    from ldm.distributed.processes import processes
    from ldm.distributed.watchdog import Verb
    from ldm.sampling.captioning import Captioner, OwnCaptioner, Picture, find, write
    from ldm.sampling.captioning import caption as write_all
    from ldm.text.captioner import PretrainedCaptioner, is_pretrained

    found = find(paths, tell) if paths else []
    todo = [one for one in found if overwrite or not one.captioned]
    first = words.seed or 0
    numbers = {one.path: number for number, one in enumerate(found)}
    with processes(device == "cpu", Verb("caption", "The same command goes on")) as team:
        team.wait()  # so that all have found the same files before one is written
        where = device_for(device, team.local)
        captioner: Captioner
        if is_pretrained(place):
            if not paths:
                raise UserError(f"pictures: none; {model} reads pictures; name a folder or files")
            for name in ("temperature", "top_k", "top_p", "seed"):
                if getattr(words, name) is not None:
                    raise UserError(f"{name}: {model} writes as its generation_config.json says; leave --{name.replace('_', '-')} out")
            captioner = PretrainedCaptioner.load(place, where)
        else:
            from ldm.families.draws import Wanted
            from ldm.families.registry import open_finished

            chosen = Wanted(temperature=words.temperature, top_k=words.top_k, top_p=words.top_p)
            family = open_finished(place, where)
            captioner = OwnCaptioner(family, chosen)
            if not paths:
                if team.main:
                    lines = family.captions(None, [first + i for i in range(count)], chosen)
                    print("\n".join(_around(clean(line), words) for line in lines))
                return 0
        own, wrote = todo[team.rank :: team.world], 0

        def done(picture: Picture, said: str) -> None:
            nonlocal wrote
            wrote += 1
            if dry_run:
                print(f"{picture.path}\t{_around(said, words)}")
            else:
                write(picture, _around(said, words))

        with bar(len(own), team.main and sys.stderr.isatty()) as advance:
            seeds = [first + numbers[one.path] for one in own]
            bad = write_all(own, captioner, seeds, batch=batch, done=done, advance=advance, tell=lambda line: print(line, file=sys.stderr))
        totals = team.gather([(wrote, bad)])
        wrote, bad = (sum(row[k] for row in totals) for k in range(2))
        if team.main:
            stand = len(found) - len(todo)
            parts = [f"{plural(wrote, 'caption')} {'printed' if dry_run else 'written'}"]
            parts += [f"{stand} stood already (--overwrite writes them anew)"] if stand else []
            parts += [f"{plural(bad, 'picture')} left out"] if bad else []
            print(", ".join(parts), file=sys.stderr)
    return 1 if bad else 0


def _around(caption: str, words: Words) -> str:
    """A caption with what stands before and behind it, as `data.prefix` and `data.suffix` join them."""
    from ldm.data.tags import affixed

    return affixed(caption, words.prefix, words.suffix)
