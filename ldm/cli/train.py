"""The train verb: options and configuration are checked without torch, then the run starts."""

from __future__ import annotations

import math
import os
import re
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ldm.cli.progress import PLANNING, working
from ldm.config.errors import UserError
from ldm.config.stand_ins import told
from ldm.config.synonyms import COUNTED, NEEDLESS, place_of
from ldm.config.terminal import shown
from ldm.distributed.environment import keep_blocks
from ldm.runs.run_folder import check_version

EXTEND = "--extend"
PART = re.compile(r"(?!.*\.ya?ml$)[A-Za-z][\w.\[\]-]*")  # a path of fields, and no file
USAGE = """usage: python train.py CONFIG [key=value ...] [--extend] [--plan] [--help [PART]]

  CONFIG      a YAML file, such as configs/quickstart.yaml, or the config.yaml of a run folder
  key=value   change one field: seed=1, out=DIR, models.autoencoder.kind=vq, stages.diffusion-high.images=100000
  --extend    more images, another batch, optim, precision or data: go on from the state of the same stages with their former settings
  --plan      say what would be done, why, and what it would cost, and stop; with it
    --processes N   for so many processes instead of this launch's
    --tflops X      if each does 10^12 X floating-point operations a second
    --json          as JSON
  --hub       models and data named owner/name may be fetched; without it no network is used
  --help      this text, and the fields of CONFIG's parts, of the kinds that it chooses: type, value, default, meaning; without a CONFIG
              every field of every kind
  --help PART a part alone, with every kind that it may be: --help data, --help models.autoencoder, --help stages.NAME.optim
"""


def main(words: Sequence[str]) -> int:
    """`ldm train CONFIG [key=value ...]`: the exit code.

    Raises:
        UserError: on anything the user can mend.
    """
    keep_blocks()
    words, part = _help(words)
    if part is not None:
        print(told(partial(_manual, [word for word in words if not word.startswith("-")], part)))
        return 0
    words, options = _options(words)
    extend = options.pop(EXTEND, None) is not None
    if "--plan" not in options and options:
        raise UserError(f"{next(iter(options))}: only together with --plan")
    fields, files = _told_apart(words)
    if len(files) != 1:
        if torn := next((word for word in fields if any(word.count(a) != word.count(b) for a, b in ("{}", "[]"))), ""):
            raise UserError(f'{torn}: put the whole word into quotation marks, as the shell splits it at spaces: "{torn} ..."')
        if at := next((n for n, word in enumerate(words) if n and (word == "=" or (word[:1] == "=" and word[1:]))), 0):
            value = words[at][1:] or "".join(words[at + 1 : at + 2])
            raise UserError(f"{words[at - 1]} {words[at]}: a field and its value are one word, without blanks: {words[at - 1]}={value}")
        if not files:
            raise UserError(f"one CONFIG file is needed, got none\n\n{USAGE}")
        needless = next((NEEDLESS[word] for word in files if word in NEEDLESS), "")
        hint = f"; {needless}" if needless else "; fields are words with =, such as seed=1"
        raise UserError(f"one CONFIG file is needed, got {' '.join(files)}{hint}")
    from ldm.config.schema import build, configuration, read, said_twice

    for line in said_twice(fields):
        print(f"note: {shown(line)}", file=sys.stderr)
    file = configuration(files[0])
    # The types of the fields stand beside the networks and load torch; what is wrong with the values is said before.
    check_version(file.parent)
    values = read(file, fields)
    _refuse_former(values, file)
    told(partial(validated, values, file, "--plan" not in options))
    if "--plan" in options:
        print(_plan(values, file, options, extend))
        return 0
    from ldm.runs.execution import execute
    from ldm.runs.run import Run, place

    run, out = place(build(values, Run, str(file)), file)
    check_version(out)
    code = execute(run, out, file, extend)
    if int(os.environ.get("WORLD_SIZE") or 1) > 1:
        from ldm.distributed.processes import leave

        leave(code)
    return code


def _plan(values: Mapping[str, Any], file: Path, options: Mapping[str, float], extend: bool) -> str:
    """The plan as text, or as JSON."""
    with working(PLANNING):
        from ldm.config.schema import build
        from ldm.runs.plan import as_json, make, show
        from ldm.runs.run import Run, place

        run, out = place(build(values, Run, str(file)), file)
        check_version(out)
        found = make(run, out, processes=int(options.get("--processes", 0)), tflops=options.get("--tflops", 0.0), extend=extend)
    return as_json(found) if "--json" in options else show(found)


def _told_apart(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """key=value words, and files. A field has no slash before its =, a file may have both: runs/lr=3e-4/config.yaml."""
    fields = [word for word in words if "/" not in word.partition("=")[0] and "=" in word]
    return fields, [word for word in words if word not in fields]


def _help(words: Sequence[str]) -> tuple[list[str], str | None]:
    """The words without --help and the PART after it; None: no help is asked for."""
    left, part = [], None
    waiting = list(words)
    while waiting:
        word = waiting.pop(0)
        if word.partition("=")[0] not in ("--help", "-h"):
            left.append(word)
            continue
        part = part or word.partition("=")[2]
        if not part and waiting and PART.fullmatch(waiting[0]) and not Path(waiting[0]).exists():
            part = waiting.pop(0)
    return left, part


def _manual(words: Sequence[str], part: str) -> str:
    """The help text, with the values of a CONFIG where one is named.

    Raises:
        UserError: for a file that cannot be read, or a part that is not there.
    """
    from ldm.config.manual import MISSING, describe
    from ldm.config.schema import configuration, read, resolved
    from ldm.runs.run import Run

    fields, files = _told_apart(words)
    given = resolved(read(configuration(files[0]), fields), Run) if files else MISSING
    fields_said = describe(Run, given, part)
    return fields_said if part else f"{USAGE}\n{fields_said}"


def validated(values: Mapping[str, Any], file: Path, starts: bool = False) -> str:
    """Nothing, of values that make a run; of one that starts, with its data there.

    Raises:
        UserError: telling every mistake at once.
    """
    from ldm.config.schema import build
    from ldm.data.sources import lost
    from ldm.runs.run import Run, place

    run, _ = place(build(values, Run, str(file)), file)
    if starts and (said := lost(run.data)):
        raise UserError(said)
    return ""


def _refuse_former(values: Mapping[str, Any], file: Path) -> None:
    """Refuse what a configuration of ldm 0.1 said, naming where it stands now.

    Raises:
        UserError: for a model beside `models`, or a stage's `family`.
    """
    for name in ("text", "autoencoder", "diffusion"):
        if name in values:
            raise UserError(f"{file}: {name}: since ldm 0.2 it stands in models, with its kind: models.{name} (docs/configuration.md)")
    stages = values.get("stages")
    for name, stage in stages.items() if isinstance(stages, Mapping) else ():
        if isinstance(stage, Mapping) and "family" in stage:
            raise UserError(
                f"{file}: stages.{name}.family: since ldm 0.2 it is stages.{name}.model, a name in models (docs/configuration.md)"
            )


def _options(words: Sequence[str]) -> tuple[list[str], dict[str, float]]:
    """The words that are no options, and the options with their numbers (0 where they take none)."""
    left: list[str] = []
    options: dict[str, float] = {}
    waiting = iter(words)
    for word in waiting:
        name, sign, value = word.partition("=")
        if not word.startswith("-"):
            left.append(word)
        elif name in ("--processes", "--tflops"):
            options[name] = _positive(name, value if sign else next(waiting, ""))
        elif word in (EXTEND, "--plan", "--json", "--help", "-h"):
            options[word] = 0
        else:
            raise UserError(
                f"{name}: no such option{_field_of(name, value)}; there are {EXTEND}, --plan, with it --processes, --tflops, --json,"
                " --help and key=value words"
            )
    return left, options


def _field_of(name: str, value: str) -> str:
    """What is meant by an option that other programs have: here fields are words."""
    word = name.lstrip("-").replace("-", "_")
    if word in NEEDLESS:
        return f"; {NEEDLESS[word]}"
    place = told(partial(_place_of, word))
    return (
        f"; fields are words without dashes, such as {place}={value or '...'}{COUNTED.get(place.rpartition('.')[2], '')}" if place else ""
    )


def _place_of(word: str) -> str:
    from ldm.config.manual import paths_of
    from ldm.runs.run import Run

    return place_of(word, paths_of(Run))


def _positive(name: str, text: str) -> float:
    whole = name == "--processes"
    try:
        number = float(int(text) if whole else float(text))
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise UserError(f"{name}: got {text or 'nothing'}; a {'whole number' if whole else 'number'} above 0 is needed")
    return number
