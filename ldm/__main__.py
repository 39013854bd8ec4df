"""`ldm VERB` and `python -m ldm VERB`: each verb's module is imported only when it is called."""

from __future__ import annotations

import difflib
import errno
import gc
import importlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

VERBS = {
    "train": ("ldm.cli.train", "train what a YAML file says: ldm train CONFIG [key=value ...]"),
    "plan": ("ldm.cli.plan", "what a run would do and cost: ldm plan CONFIG --processes 256 --samples 2e9"),
    "sample": ("ldm.cli.sample", "draw pictures: ldm sample PROMPT ... --model DIR"),
    "demo": ("ldm.demo.server", "draw in a browser: ldm demo MODEL"),
    "grid": ("ldm.cli.grid", 'settings side by side: ldm grid --x guidance=1,3,7 --y steps=5,20 "a green ring"'),
    "animate": ("ldm.cli.animate", 'films: ldm animate "a green ring" --to "a yellow square" --frames 24, or edit one: --clip FRAMES'),
    "info": ("ldm.cli.info", "what pictures remember of how they were made: ldm info picture.png"),
    "caption": ("ldm.cli.caption", "write captions beside pictures: ldm caption FOLDER --model DIR"),
    "data": ("ldm.cli.data", "look at data, index shards, curate tables: ldm data check PATH"),
    "classifier": ("ldm.cli.classifier", "train what guides drawing: ldm classifier CACHE --model DIR --words red,blue --out FILE"),
    "evaluate": ("ldm.cli.evaluate", "measure a model: ldm evaluate MODEL --on scenes --tier T0"),
    "ema": ("ldm.cli.ema", "an EMA of another length, chosen after training: ldm ema RUN --length 0.1"),
    "report": ("ldm.cli.report", "write the page of a run: ldm report RUN"),
    "watch": ("ldm.cli.watch", "look at a run while it trains: ldm watch RUN"),
    "bench": ("ldm.cli.bench", "measure ldm beside its peers on this machine: ldm bench B1 B14 --json FILE"),
    "export": ("ldm.cli.export", "write a model for other programs: ldm export MODEL --to diffusers --dtype fp16 --out DIR"),
    "doctor": ("ldm.cli.doctor", "what is installed here, and what would be in the way"),
}
SMALLER = "choose a smaller --size, or --precision bf16"
FITS = {"sample": f"{SMALLER}, or --low-memory", "grid": SMALLER, "animate": f"{SMALLER}, or --cells 1", "data": "choose a smaller --batch"}
SHARED = {"train", "plan", "sample", "caption", "info", "doctor", "watch"}  # whose work is shared out to processes, or only read
HUB = "--hub"


def usage() -> str:
    """The help text."""
    lines = "\n".join(f"  {verb:<10} {said}" for verb, (_, said) in VERBS.items())
    about = (
        "`ldm VERB --help` tells more. With --hub a verb that opens models may fetch those named owner/name;\n"
        "without it none uses the network."
    )
    return f"usage: ldm VERB ...\n\nLatent text-to-image diffusion for people who train.\n\n{lines}\n\n{about}"


def main(words: Sequence[str] | None = None) -> int:
    """Run one verb; the exit code: 0, 2 after a mistake of the user, 130 when interrupted."""
    words = list(sys.argv[1:] if words is None else words)
    if sys.version_info < (3, 11):  # noqa: UP036  # where it was started without being installed
        print(f"ldm: Python 3.11 or newer is needed; this is {sys.version.split()[0]}", file=sys.stderr)
        return 2
    if not words or words[0] in ("-h", "--help", "help"):
        print(usage())
        return 0
    if words[0] in ("-V", "--version"):
        from ldm.config.version import __version__

        print(f"ldm {__version__}")
        return 0
    verb = words[0]
    if verb not in VERBS:
        from ldm.config import synonyms
        from ldm.config.terminal import shown

        near = difflib.get_close_matches(verb, [*VERBS, "--version", "--help"], 1)
        known = synonyms.VERBS.get(verb.lower(), "")
        said = f"{known} {verb}" if known == "data" else known
        hint = f"that is ldm {said}" if known else f"did you mean {near[0]}?" if near else f"there are {', '.join(VERBS)}"

        print(f"ldm {shown(verb)}: no such verb; {hint}", file=sys.stderr)
        return 2
    return run(verb, words[1:])


def run(verb: str, words: Sequence[str]) -> int:
    """Call a verb and turn its mistakes into one line each."""
    from ldm.config.terminal import guarded, hook
    from ldm.distributed.environment import prepare

    sys.excepthook = hook
    prepare()
    with guarded():
        return _call(verb, words)


def _call(verb: str, words: Sequence[str]) -> int:
    from ldm.config.errors import UserError, first_line, out_of_memory

    words = list(words)
    options = words[: words.index("--")] if "--" in words else words
    if HUB in options:
        from ldm.cli.command import FETCHES

        if {verb, f"{verb} {words[0]}"} & FETCHES:
            words.remove(HUB)
            os.environ["LDM_HUB"] = "1"
    try:
        from ldm.distributed.launcher import adopt_slurm, works_alone

        adopt_slurm(os.environ)
        if verb not in SHARED and [verb, *words[:1]] != ["data", "encode"]:
            works_alone(verb)
        return int(_imported(VERBS[verb][0]).main(words))
    except UserError as error:
        from ldm.config.own_words import in_own_words

        return _refused(verb, in_own_words(str(error), " ".join([verb, *words[:1]]) if verb == "data" else verb))
    except ModuleNotFoundError as error:
        name = (error.name or "").partition(".")[0]
        if name in ("", "ldm"):
            raise
        print(f"ldm {verb}: {name} is not installed for {sys.executable}; {_way_in()}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print(f"ldm {verb}: interrupted", file=sys.stderr)
        return 130
    except OSError as error:
        if error.filename is None and error.errno is None:
            raise
        where = f"{error.filename}: " if error.filename else ""
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        advice = "; make room and run the same command again, what is finished is kept" if full else ""
        if error.errno == errno.EFBIG and not error.filename:
            advice = "; the file system or this shell (ulimit -f) allows no larger files"
        return _refused(verb, f"{where}{error.strerror or error}{advice}")
    except Exception as error:
        if not out_of_memory(error):
            raise
        advice = "close other programs, or use a machine with more"
        advice = advice if isinstance(error, ImportError) else FITS.get(verb, advice)
        print(f"ldm {verb}: too little memory ({first_line(error)}); {advice}", file=sys.stderr)
        return 2


def _imported(name: str) -> Any:
    """A verb's module. What imports make stays, so nothing is collected meanwhile: a tenth of the time of a mistake's answer."""
    gc.disable()
    try:
        return importlib.import_module(name)
    finally:
        gc.enable()


def _refused(verb: str, said: str) -> int:
    """Say in one line why not, and what may be meant instead; the exit code."""
    from ldm.config.files import meant

    print(f"ldm {verb}: {said}{meant(said)}", file=sys.stderr)
    return 2


def _way_in() -> str:
    """How a package that is missing gets here: most often it is there, and another Python was called."""
    clone = Path(__file__).parents[1]
    if Path(".venv/bin/activate").exists() or (clone / ".venv" / "bin" / "activate").exists():
        return "run `source .venv/bin/activate` first, in the folder of the clone"
    return "run `make quickstart`, which installs it" if (clone / "Makefile").exists() else "`python -m pip check` says what is missing"


if __name__ == "__main__":
    sys.exit(main())
