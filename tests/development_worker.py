"""Runs the python blocks of docs/development.md in their order, with what each says is registered, on a tiny model: FILE MODEL."""

from __future__ import annotations

import dataclasses
import importlib
import re
import sys
import types
from pathlib import Path
from typing import Annotated, Any, get_args

PART = re.compile(r"^```python\n(?P<code>.*?)^```$|^Register: `(?P<what>[^`]+)` in `(?P<union>\w+)`, `(?P<file>[\w/]+)\.py`", re.M | re.S)


def register(what: str, union: str, file: str, known: dict[str, Any]) -> None:
    """Do what a line `Register: ...` says, without changing the file."""
    from ldm.config.schema import BY_KIND, build

    module = importlib.import_module(file.replace("/", "."))
    registry = getattr(module, union)
    if isinstance(registry, dict):
        registry |= eval("{" + what + "}", vars(module) | known)
        return
    members, *rest = get_args(registry) or (registry, BY_KIND)  # a union of one is the class itself
    widened = Annotated[members | known[what], *rest]
    setattr(module, union, widened)
    kind = known[what].__dataclass_fields__["kind"].default
    holder = dataclasses.make_dataclass("Holder", [("chosen", widened)], frozen=True)
    assert isinstance(build({"chosen": {"kind": kind}}, holder, "page").chosen, known[what])


def main(page: Path, model: str) -> None:
    """Every block, in one module, so that later ones see earlier ones."""
    module = types.ModuleType("page")
    sys.modules["page"] = module
    text = page.read_text(encoding="utf-8")
    for part in PART.finditer(text):
        place = f"{page.name}:{text[: part.start()].count(chr(10)) + 1}"
        if part["code"] is None:
            register(part["what"], part["union"], part["file"], vars(module))
        else:
            exec(compile(part["code"].replace("runs/quickstart", model), place, "exec"), vars(module))
        print(f"done: {place}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
