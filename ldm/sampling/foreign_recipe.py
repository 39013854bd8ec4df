"""Foreign recipe: settings in another program's picture, as far as ours have them, and what of them cannot be followed."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ldm.sampling.recipe_values import LIMITS, NAMES, SCHEDULES, WHOLE, number_of

DECIDING = {"seed": "seed", "steps": "steps", "guidance": "guidance", "sampler": "sampler", "size": "width"}  # a field of each
ALSO = {"eulerancestral": "euler_a", "unipcbh2": "unipc"}  # ComfyUI's names where they differ
SPACED = {  # the spacings of other programs, by the same rule
    "karras": "karras",
    "exponential": "exponential",
    "normal": "linspace",
    "uniform": "linspace",
    "simple": "trailing",
    "sgmuniform": "trailing",
    "ddim": "leading",
    "ddimuniform": "leading",
}


@dataclass(frozen=True)
class Unfollowed:
    """Something that a picture was drawn with and that is not followed.

    Args:
        text: what, in a line.
        option: the option that takes its place where it is given; empty: none.
        tag: of a LoRA, what a prompt says to have it found by its name in --lora-dir.
    """

    text: str
    option: str = ""
    tag: str = ""

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class ForeignRecipe:
    """What another program's picture tells.

    Args:
        program: who wrote it.
        fields: those of a Recipe that it tells.
        unfollowed: what else it tells that decides the picture.
    """

    program: str
    fields: Mapping[str, Any]
    unfollowed: tuple[Unfollowed, ...] = ()


@dataclass
class Reading:
    """A foreign recipe in the making: every value is either taken, within its bounds, or told as not followed."""

    fields: dict[str, Any] = field(default_factory=dict)
    unfollowed: list[Unfollowed] = field(default_factory=list)

    def lose(self, text: str, option: str = "", tag: str = "") -> None:
        """Something cannot be followed; the same is told once."""
        if (lost := Unfollowed(text, option, tag)) not in self.unfollowed:
            self.unfollowed.append(lost)

    def number(self, name: str, said: Any, theirs: str) -> None:
        """A number of a recipe's field, from what stands under the name `theirs`."""
        if (value := number_of(name, said)) is None:
            low, high = LIMITS[name]
            self.lose(f"{theirs}: {shown(said)} ({'whole ' * (name in WHOLE)}numbers from {low:g} to {high:g} are taken)", name)
        else:
            self.fields[name] = value

    def sampler(self, said: Any) -> None:
        """A sampler by its name elsewhere, with or without a spacing behind it."""
        name = plain_name(said).removesuffix("gpu")
        name = name if name in OURS else name.removeprefix("k")
        for spacing in SCHEDULES:
            if name not in OURS and name.endswith(spacing):
                self.fields["spacing"], name = spacing, name.removesuffix(spacing)
        if name in OURS:
            self.fields["sampler"] = OURS[name]
        else:
            self.fields.pop("spacing", None)
            self.lose(f"sampler {shown(said)}: not one of {', '.join(NAMES.values())}", "sampler")

    def spacing(self, said: Any) -> None:
        """A spacing of the steps (noise schedule, scheduler) by its name elsewhere."""
        name = plain_name(said)
        if name in SPACED:
            self.fields["spacing"] = SPACED[name]
        elif name not in ("", "automatic"):
            self.lose(f"schedule {shown(said)}: not one of Karras, Exponential, Uniform, Simple, DDIM", "spacing")

    def lora(self, name: Any, weight: Any, said: str = "") -> None:
        """A LoRA, which must be given as a file."""
        stem = re.split(r"[/\\]", str(name)[:300])[-1].removesuffix(".safetensors")
        tag = f"<lora:{stem}:{shown(weight)}>" if shown(weight) != "?" and not set("<>:\r\n") & set(stem) else ""
        self.lose(f"LoRA {shown(name)} at weight {shown(weight)}{said}; give it by --lora FILE:WEIGHT, or --lora-dir", "lora", tag)

    def init(self, what: str) -> None:
        """A picture that it was drawn out of."""
        self.lose(f"{what}; give the picture that it was drawn out of by --init", "init")

    def made(self, program: str) -> ForeignRecipe:
        """The whole; what decides every picture and is neither taken nor told as lost, was not there."""
        lost = {one.option for one in self.unfollowed}
        lost |= {"size"} if lost & {"width", "height", "init"} else set()  # a picture that it is drawn out of has its size
        for name, theirs in DECIDING.items():
            if theirs not in self.fields and name not in lost:
                self.lose(f"{name}: not told by the picture; give it by --{name}", name)
        return ForeignRecipe(program, self.fields, tuple(self.unfollowed))


def plain_name(said: Any) -> str:
    """A name as programs agree on it: small letters and digits alone, `p` for a plus."""
    return "".join(c for c in str(said)[:100].lower().replace("+", "p") if c.isalnum())


OURS = {plain_name(theirs): name for name, theirs in NAMES.items()} | {plain_name(name): name for name in NAMES} | ALSO


def shown(value: Any, most: int = 80) -> str:
    """A value of a file as a line may tell it: short, and nothing that a terminal would obey."""
    text = value if isinstance(value, str) else f"{value:g}" if isinstance(value, float) else type(value).__name__
    text = str(value) if isinstance(value, int) and abs(value) < 2**70 else text
    text = text if len(text) <= most else text[:most] + "..."
    return text if text.isprintable() else ascii(text)
