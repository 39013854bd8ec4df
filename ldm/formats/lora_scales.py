"""Scales of an adapter's layers (alpha, rank) as peft's adapter_config.json and diffusers' header state them."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Any

from ldm.config.errors import UserError
from ldm.models.lora import TEXT_PREFIX

HEADER = "lora_adapter_metadata"  # diffusers' field of a safetensors file's header: JSON, PART.FIELD of peft's configuration
KINDS = ("LORA", "LOHA", "LOKR")
NAMES = (  # fields that say how it was trained, or what the weights show anyway
    " task_type peft_type auto_mapping peft_version base_model_name_or_path revision inference_mode r target_modules exclude_modules"
    " lora_alpha alpha lora_dropout dropout rank_dropout module_dropout rank_dropout_scale use_rslora modules_to_save"
    " layers_to_transform layers_pattern rank_pattern alpha_pattern megatron_core eva_config runtime_config qalora_group_size use_dora"
    " lora_bias use_effective_conv2d decompose_both decompose_factor init_weights ensure_weight_tying trainable_token_indices"
    " fan_in_fan_out target_parameters"
)
SILENT = frozenset(NAMES.split())
# Beginnings that take a part out of the base's weights, so that the adapter means nothing beside the whole ones.
INITS = (True, False, None, "gaussian", "eva", "orthogonal")
MOST_PATTERNS, MOST_EXPRESSIONS, LONGEST_PATTERN = 10_000, 100, 1000
MEMORY_BYTES = 2**20  # of the automaton of one expression
WORDS = re.compile(r"\^?([\w.]|\\\.)+\$?")  # a pattern that is a name: a dot in it stands for itself or for any character


class Stated:
    """What a configuration of peft says of the scales of an adapter's layers.

    Patterns are a stranger's regular expressions: names are compared as they stand, others by RE2, in linear time and bounded memory.

    Args:
        values: the configuration.
        where: the file or field, for messages.

    Raises:
        UserError: naming a field that is damaged or that changes more than scales.
    """

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        self.where = where
        self.kind = values.get("peft_type") or "LORA"
        if self.kind not in KINDS:
            raise UserError(f"{where}: describes {str(self.kind)[:40]}; known here are {', '.join(KINDS)}")
        if odd := next((name for name, value in values.items() if value and name not in SILENT and not _harmless(name, value)), None):
            got = str(values[odd])[:40]
            raise UserError(f"{where}: {odd[:40]} is {got!r}, which is not known here; merge this adapter by peft and give the whole model")
        self.dora, self.stabilised = (_flag(values, name, where) for name in ("use_dora", "use_rslora"))
        name = "lora_alpha" if self.kind == "LORA" else "alpha"
        self.rank = _number(values["r"], f"{where}: r") if "r" in values else None
        # Where neither is told, peft's 8 and 8, which is a scale of 1.
        self.alpha = _number(values.get(name, 8), f"{where}: {name}") if values.keys() & {name, "r"} else None
        self.alphas = Patterns(values.get("alpha_pattern"), f"{where}: alpha_pattern")
        self.ranks = Patterns(values.get("rank_pattern"), f"{where}: rank_pattern")

    def rank_of(self, layer: str) -> float | None:
        """r of a layer; None: it is not told."""
        found = self.ranks.of(layer)
        return self.rank if found is None else found

    def alpha_of(self, layer: str, rank: int) -> float:
        """alpha of a layer of rank r, so that alpha / r is what it was trained with."""
        found = self.alphas.of(layer)
        usual = rank if self.alpha is None else self.alpha
        own = usual if found is None else found
        return own * rank**0.5 if self.stabilised else own


def in_header(texts: Mapping[str, str], file: str) -> dict[str, Stated]:
    """What diffusers' header of a file states, by part.

    Raises:
        UserError: for a header that cannot be read, and as `Stated`.
    """
    where = f"{file}: the header's {HEADER}"
    try:
        values = json.loads(texts.get(HEADER, "{}"))
    except (ValueError, RecursionError):
        values = None
    if not isinstance(values, dict):
        raise UserError(f"{where} is no JSON object; the file is damaged")
    parts: dict[str, dict[str, Any]] = {}
    for key, value in values.items():
        part, _, name = key.partition(".")
        parts.setdefault(part, {})[name] = value
    return {part: Stated(said, f"{where}, {part[:40]}") for part, said in parts.items()}


class Patterns:
    """Numbers by patterns of layers' names; the first pattern counts that matches a name's end at whole words, as peft has it.

    Raises:
        UserError: naming the pattern that is none, or the number that is none.
    """

    def __init__(self, values: Any, where: str) -> None:
        values = {} if values is None else values
        if not isinstance(values, dict) or len(values) > MOST_PATTERNS:
            raise UserError(f"{where}: got {str(values)[:40]!r}; at most {MOST_PATTERNS} patterns with a number each are read")
        self._numbers = [_number(number, f"{where}: {pattern[:60]}") for pattern, number in values.items()]
        self._ends: dict[str, int] = {}
        self._whole: dict[str, int] = {}
        self._odd: list[tuple[int, Any]] = []
        for i, pattern in enumerate(values):
            if WORDS.fullmatch(pattern):
                names = self._whole if pattern.startswith("^") else self._ends
                names.setdefault(pattern.strip("^$").replace("\\", ""), i)
            elif len(self._odd) < MOST_EXPRESSIONS:
                self._odd.append((i, _expression(pattern, where)))
            else:
                raise UserError(f"{where}: more than {MOST_EXPRESSIONS} regular expressions; give layers' names there")

    def of(self, layer: str) -> float | None:
        """The number of a layer, dotted; None: no pattern matches it, with or without the text model's prefix."""
        short = layer.removeprefix(TEXT_PREFIX)
        found: list[int] = []
        for name in (short, TEXT_PREFIX + short):
            words = name.split(".")
            ends = (".".join(words[i:]) for i in range(len(words)))
            found += [self._ends[end] for end in ends if end in self._ends]
            found += [self._whole[name]] if name in self._whole else []
            found += [i for i, expression in self._odd if expression.fullmatch(name)]
        return self._numbers[min(found)] if found else None


def _expression(pattern: str, where: str) -> Any:
    import re2

    options = re2.Options()
    options.max_mem, options.log_errors = MEMORY_BYTES, False
    why = "it is too long" if len(pattern) > LONGEST_PATTERN else ""
    try:
        if not why:
            return re2.compile(rf"(?:.*\.)?(?:{pattern})", options)
    except (re2.error, UnicodeEncodeError) as error:
        why = (error.args[0].decode(errors="replace") if error.args and isinstance(error.args[0], bytes) else str(error))[:80]
    raise UserError(f"{where}: {pattern[:60]!a} cannot be followed ({why}); give layers' names there")


def _harmless(name: str, value: Any) -> bool:
    return (name == "bias" and value == "none") or (name == "init_lora_weights" and any(value is x or value == x for x in INITS))


def _flag(values: Mapping[str, Any], name: str, where: str) -> bool:
    value = values.get(name) or False
    if not isinstance(value, bool):
        raise UserError(f"{where}: {name}: got {str(value)[:40]!r}; true or false is needed")
    return value


def _number(value: Any, where: str) -> float:
    try:
        found = math.nan if isinstance(value, bool | str) else float(value)
    except (TypeError, ValueError, OverflowError):
        found = math.nan
    if not math.isfinite(found):
        raise UserError(f"{where}: got {str(value)[:40]!r}; a finite number is needed")
    return found
