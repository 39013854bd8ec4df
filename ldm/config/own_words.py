"""A message that names a field of a configuration, in the words of a verb that reads none."""

from __future__ import annotations

import re

READERS = {"train", "plan"}  # verbs of which a field is a word: data.captions=filename
OPTIONS = {"data check": {"data.captions": "--captions", "data.outside": "--outside"}}
FILES = {"data encode": "DATA may be a YAML file that says it"}
FIELD = re.compile(r"\b(?P<name>data\.(?!kind\b)\w+)=(?P<value>[\w.-]+)")


def in_own_words(said: str, verb: str) -> str:
    """The message with a verb's options in place of the fields of `data`; told at its end which are no words of that verb.

    Args:
        said: what is wrong, written for who trains.
        verb: as it is called, such as `data check`.
    """
    if verb in READERS:
        return said
    foreign: list[str] = []

    def own(found: re.Match[str]) -> str:
        option = OPTIONS.get(verb, {}).get(found["name"])
        if option is None:
            foreign.append(found["name"])
            return found[0]
        return option if found["value"] == "true" else f"{option} {found['value']}"

    said = FIELD.sub(own, said).replace("which data.kind=shards reads", "which can be read")
    where = f"{', '.join(dict.fromkeys(foreign))} is a field of a configuration, and no word of ldm {verb}"
    return f"{said} ({where}{'; ' if verb in FILES else ''}{FILES.get(verb, '')})" if foreign else said
