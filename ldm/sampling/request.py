"""A sampling request: what a picture is asked for, in small frozen objects with one place for defaults, checks and help.

Verbs take these objects and get their options from them; nothing here loads torch.
"""

from __future__ import annotations

import errno
import hashlib
import math
import re
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from ldm.config.errors import UserError
from ldm.config.introspection import default_of
from ldm.config.options import Given, option, options_of
from ldm.data.file_names import SUFFIXES
from ldm.families.draws import CURVES, PRECISIONS, THRESHOLDS, Running, Settings, Wanted
from ldm.sampling.foreign_recipe import Reading, shown
from ldm.sampling.prompt_files import Asked, read_prompts
from ldm.sampling.recipe import Recipe, read_recipe, writable
from ldm.sampling.recipe_values import MAX_SEED, NAMES, SPACINGS
from ldm.text.prompt_syntax import LEARNED

MAX_MARGIN = 4096  # px
TABLES = (".yaml", ".yml", ".toml", ".csv", ".tsv", ".parquet")  # lists of other forms, whose lines are no prompts
MOST_TEXT = 2**26  # bytes of a list of prompts
UNTAUGHT = re.compile(LEARNED.pattern + r"(?::[\d.]{1,8})?")  # with its weight
EDGES = ("left", "top", "right", "bottom")
STRENGTH = 0.75  # of image-to-image, unless it is told
REPLACED = {"cross_replace": 0.8, "self_replace": 0.4}  # shares of the steps in which attention is taken, unless they are told


@dataclass(frozen=True, kw_only=True)
class PromptOptions:
    """Prompts: what is drawn."""

    prompt: tuple[str, ...] = option((), "What to draw; several prompts are drawn in turn.", argument=True)
    prompts: Path | None = option(None, "A file, a prompt a line (flags --n --w --h --d --l --s, or JSON); -: input.")

    def read(self, recipe: str | None) -> list[Asked]:
        """The prompts: words, a file's, a recipe's, or standard input's.

        Raises:
            UserError: where there are none or too many, or the file cannot be read.
        """
        given, file = self.prompt, self.prompts
        if given and file is not None:
            raise UserError("prompts: give them as words or by --prompts, not both")
        if given or (file is None and recipe is not None):
            return [Asked(prompt=clean(text)) for text in given or [recipe or ""]]
        if file is None and (sys.stdin is None or sys.stdin.isatty()):  # None: closed
            raise UserError('no prompt: write ldm sample "a green ring", or --prompts FILE, or send lines to standard input')
        source = "standard input" if file is None or str(file) == "-" else str(file)
        if file is not None and file.suffix.lower() in TABLES:
            raise UserError(f"{source}: {file.suffix} is not read; write a prompt a line, or JSON")
        try:
            text = _whole(None if file is None or str(file) == "-" else file)
        except UnicodeDecodeError:
            raise UserError(f"{source}: not UTF-8 text") from None
        except OSError as error:
            hint = (
                "; --prompts names a file, a prompt itself stands without an option"
                if " " in source and error.errno == errno.ENOENT
                else ""
            )
            raise UserError(f"{source}: {error.strerror}{hint}") from None
        return read_prompts(clean(text), source)


def _whole(file: Path | None) -> str:
    """The text of a file, which may be a pipe, or of standard input.

    Raises:
        OSError: if it cannot be read, or has no end.
        UnicodeDecodeError: if it is no UTF-8.
    """
    if file is None:
        if sys.stdin is None:
            raise OSError(errno.EBADF, "closed; give --prompts FILE")
        text = sys.stdin.read(MOST_TEXT + 1)
        size = len(text)
    else:
        with file.open("rb") as opened:
            data = opened.read(MOST_TEXT + 1)
        text, size = "" if len(data) > MOST_TEXT else _decoded(data).replace("\r\n", "\n"), len(data)
    if size > MOST_TEXT:
        raise OSError(errno.EFBIG, f"longer than {MOST_TEXT:,} bytes, which no list of prompts is")
    return text


def _decoded(data: bytes) -> str:
    """The text of a file: UTF-8, or what Windows' shells and editors write, UTF-16."""
    if b"\0" not in data:
        return data.decode("utf-8-sig")
    from ldm.data.captions import decoded  # loads torch, and is seldom needed

    return decoded(data)


@dataclass(frozen=True, kw_only=True)
class Base:
    """Model and picture: what draws, and what all of its pictures have in common."""

    model: str = option("", "A folder or file of a model, or owner/name on the hub; default: the newest of runs/*.", given=Given.MODEL)
    seed: int | None = option(None, "Seed of each prompt's first picture; default: 0.", low=0, high=MAX_SEED)
    negative: str | None = option(None, "Negative prompt: what to stay away from; default: nothing.")
    size: str = option("", "WIDTHxHEIGHT in px, or one number for a square; default: the model's.")

    def first(self, old: Mapping[str, Any]) -> int:
        """The first seed."""
        return int(old.get("seed", 0) if self.seed is None else self.seed)

    def avoided(self, old: Mapping[str, Any]) -> str:
        """The negative prompt."""
        return clean(str(old.get("negative", "")) if self.negative is None else self.negative)

    def shape(self, old: Mapping[str, Any]) -> tuple[int, int] | None:
        """(height, width) px; None where neither the option nor the recipe says."""
        if not self.size:
            return (old["height"], old["width"]) if "height" in old else None
        return size_of(self.size)


@dataclass(frozen=True, kw_only=True)
class Following:
    """Recipe and notation: a picture whose settings are followed, and how prompts are read."""

    recipe: Path | None = option(None, "A picture whose recipe is followed where no option says otherwise.", name="--from")
    strict: bool = option(False, "Refuse a recipe of which something cannot be followed.")
    literal: bool = option(False, "Brackets, BREAK and AND in prompts stand for themselves.")

    def old(self, options: Sequence[object], tell: Callable[[str], None]) -> dict[str, Any]:
        """The recipe that is followed; without one nothing.

        Args:
            options: what else was chosen; an option that takes the place of what is not followed is no loss.
            tell: told what of it is not followed, a line each.

        Raises:
            UserError: if there is none in the file, or with `strict` something in it cannot be followed.
        """
        if self.recipe is None:
            if self.strict:
                raise UserError("strict: is about the recipe of a picture; give that by --from, or leave it out")
            return {}
        found = read_recipe(self.recipe)
        if isinstance(found, Recipe):
            return asdict(found)
        chosen = {name for one in options for name in options_of(type(one)) if getattr(one, name) != default_of(type(one), name)}
        by_name = [lost.tag for lost in found.unfollowed if lost.tag and "lora_dir" in chosen and "lora" not in chosen]
        for lost in found.unfollowed:
            if lost.option not in chosen and lost.tag not in by_name:
                self.depart(f"not followed: {lost}", tell)
        if "prompt" not in found.fields and "prompt" not in chosen and "prompts" not in chosen:
            raise UserError(f"from: {self.recipe}: its prompt cannot be told; write the prompt, too")
        tell(f"{self.recipe}: settings of {found.program}, whose noise of a seed is another: a picture alike, not the same")
        # Other programs' pictures say nothing of it, and mean the notation.
        words = {name: str(found.fields[name]) for name in ("prompt", "negative") if name in found.fields}
        if "embedding" not in chosen:  # told above, and no words of the prompt
            words = {name: UNTAUGHT.sub("", text).strip() for name, text in words.items()}
        if by_name and "prompt" in words:
            words["prompt"] = " ".join([words["prompt"], *by_name])
        return {"notation": True, **found.fields, **words}

    def depart(self, text: str, tell: Callable[[str], None]) -> None:
        """Tell what differs from the recipe, or with `strict` refuse it.

        Raises:
            UserError: the same.
        """
        if self.strict:
            raise UserError(f"from: {self.recipe}: {text} (leave --strict out to go on without)")
        tell(f"{self.recipe}: {text}")

    def compare(self, old: Mapping[str, Any], model: str, content_hash: str, tell: Callable[[str], None]) -> None:
        """Say so where a recipe is another model's; other programs give the beginning of a hash of the file.

        Args:
            model: the folder or file that draws.
        """
        said = str(old.get("model_hash", ""))
        if (not said and "model" not in old) or (said and content_hash.startswith(said)):
            return
        if said and Path(model).is_file() and file_hashed(Path(model), said):
            return
        hashed = f" (hash {shown(said, 10)})" if said else ""
        self.depart(f"made by the model {shown(old.get('model', '?'))}{hashed}, not by {model}: the picture will differ", tell)

    def carried(self, old: Mapping[str, Any]) -> dict[str, Any]:
        """What is taken over of a recipe as it is."""
        taken = {name: old[name] for name in ("to", "share", "variation", "variation_seed") if name in old}
        return {"notation": not self.literal and bool(old.get("notation", True)), **taken}


@dataclass(frozen=True, kw_only=True)
class Choice:
    """How many: pictures of a prompt, variations of them, and which are kept."""

    n: int = option(1, "Pictures per prompt (batch count); picture k has the seed SEED + k.", low=1)
    seeds: str = option("", "The seeds of every prompt, such as 1,5,9; in place of --seed and --n.")
    variations: int = option(0, "So many pictures near each one, in its place (variation seeds).", low=0)
    variation_strength: float | None = option(None, "How far away they are (variation strength); default: 0.2.", low=0, high=1)
    best: int = option(1, "Draw so many for each picture and keep the one that JUDGE likes best.", low=1)
    judge: str = option("", "own: the model's CLIP; scenes: their checker; or a folder with a CLIP (transformers).", given=Given.CLIP)

    def listed(self, seed: int | None) -> list[int] | None:
        """The seeds of every prompt, where they are listed."""
        if not self.seeds:
            return None
        if seed is not None or self.n != 1:
            raise UserError("seeds: not together with --seed or --n")
        try:
            found = [int(word) for word in self.seeds.split(",")]
        except ValueError:
            found = [-1]
        if min(found) < 0 or max(found) > MAX_SEED:
            raise UserError(f"seeds: got {self.seeds!r}; whole numbers from 0 with commas are needed, such as 1,5,9")
        if (twice := Counter(found).most_common(1)[0])[1] > 1:
            raise UserError(f"seeds: {twice[0]} stands there {twice[1]} times, and would draw the same again; each once")
        return found

    def check(self, inverted: bool) -> None:
        """Refuse what does not belong together.

        Args:
            inverted: whether there is no noise of a seed's own.

        Raises:
            UserError: saying what.
        """
        if self.variation_strength is not None and not self.variations:
            raise UserError(f"variation_strength: got {self.variation_strength}, but no variations; give --variations 4")
        if self.variation_strength == 0:
            raise UserError("variation_strength: 0 draws the same picture again; give it more, or leave --variations out")
        if self.judge and self.best == 1:
            raise UserError(f"judge: got {self.judge}, but there is nothing to choose from; give --best 4")
        if inverted and (self.n > 1 or self.variations or self.best > 1 or "," in self.seeds):
            raise UserError("invert: starts from the noise that its picture comes from, so every seed draws the same; leave --n out")
        if self.best > 1 and (self.variations or not self.judge):
            fix = "not together with --variations" if self.variations else "who chooses? Give --judge own, scenes or the FOLDER of a CLIP"
            raise UserError(f"best: {fix}")

    def varied(self) -> dict[str, float]:
        """What recipes say of variations."""
        if not self.variations:
            return {}
        return {"variation": 0.2 if self.variation_strength is None else self.variation_strength}


@dataclass(frozen=True, kw_only=True)
class SamplerOptions(Wanted):
    """Sampler: the numbers of denoising and of classifier-free guidance."""

    sampler: str | None = option(
        None,
        f"{', '.join(name if known.lower() == name else f'{name} ({known})' for name, known in NAMES.items())}; default: the model's,"
        " of films and with --invert ddim.",
    )
    spacing: str | None = option(
        None,
        f"Of the steps (schedule type): {' '.join(SPACINGS)}; default: the sampler's."
        " DPM++ 2M Karras is --sampler dpmpp_2m --spacing karras.",
    )
    guidance_interval: str = option("", "Guide only from one share of the steps to another, such as 0.1,0.8.")

    def check(self) -> None:
        """Refuse numbers that are none, and names that are not known.

        Raises:
            UserError: naming what is possible.
        """
        for name in ("guidance", "rescale", "eta", "temperature", "top_p", "truncation"):
            value = getattr(self, name)
            if value is not None and not math.isfinite(value):
                raise UserError(f"{name}: got {value}; a finite number is needed")
        for name, known in (
            ("sampler", NAMES),
            ("spacing", SPACINGS),
            ("precision", PRECISIONS),
            ("guidance_curve", CURVES),
            ("threshold", THRESHOLDS),
        ):
            value = getattr(self, name)
            if value and value not in known:
                choice = _here(name, value) or f"choose one of {', '.join(known)}"
                raise UserError(f"{name}: got {value!r}; {choice}")
        self.interval()

    def interval(self) -> dict[str, float]:
        """Between which shares of the steps there is guidance, where it is told."""
        if not self.guidance_interval:
            return {}
        try:
            first, last = (float(word) for word in self.guidance_interval.split(","))
        except ValueError:
            got = f"guidance_interval: got {self.guidance_interval!r}"
            raise UserError(f"{got}; two shares of the steps are needed, such as 0.1,0.8") from None
        return {"guidance_from": first, "guidance_to": last}

    def chosen(self, old: Mapping[str, Any], usual: Mapping[str, Any], own: Settings) -> Wanted:
        """The numbers that are asked for: what the options say, then a recipe, then what is `usual` here.

        Args:
            own: the model's; where it has no samplers, none is usual.
        """
        known = {name: value for name, value in usual.items() if name != "sampler" or own.sampler}
        return self.over({**known, **old, **self.interval()})


@dataclass(frozen=True, kw_only=True)
class Editing:
    """Start from a picture: img2img (SDEdit), inpainting, outpainting and DDIM inversion; and hires fix, a second, larger pass."""

    init: Path | None = option(
        None, "A picture to start from (img2img); where it is transparent in parts, these are new.", given=Given.PICTURE
    )
    strength: float | None = option(None, "Denoising strength: how much of INIT is drawn anew, 0 to 1; default: 0.75, with MASK 1.")
    mask: Path | None = option(
        None, "Inpainting: as large as INIT, white or painted where it is to be new; the rest keeps its bytes.", given=Given.PICTURE
    )
    outpaint: str = option("", "Go on beyond INIT's edges, in px: left=64,right=64 (also top, bottom), or 64 for all.")
    invert: Path | None = option(
        None, "A picture to edit by its prompt (DDIM inversion): start from the noise that it comes from.", given=Given.PICTURE
    )
    source: str | None = option(None, "The prompt of the picture as it was: INVERT's, or the one that the seed draws (prompt-to-prompt).")
    cross_replace: float | None = option(
        None, "Share of the steps in which words attend as SOURCE's (cross_replace_steps); default: 0.8, with INVERT 0.", low=0, high=1
    )
    self_replace: float | None = option(
        None, "And in which places attend to each other so (self_replace_steps); default: 0.4, with INVERT 0.", low=0, high=1
    )
    hires: float | None = option(None, "Hires fix: draw so many times smaller first, enlarge, and draw anew in part.", low=1, high=8)
    hires_strength: float | None = option(None, "Its denoising strength: how much the second pass draws anew; default: 0.5.", low=0, high=1)

    @property
    def picture(self) -> Path | None:
        """What is started from."""
        return self.init or self.invert

    @property
    def usual(self) -> dict[str, Any]:
        """Sampler settings that an edit begins with: noise that a picture comes from without guidance gives it back without."""
        return {"guidance": 1.0, "sampler": "ddim"} if self.invert else {}

    def passes(self, old: Mapping[str, Any]) -> dict[str, float]:
        """What recipes say of a first, smaller pass."""
        factor = old.get("hires", 1.0) if self.hires is None else self.hires
        if factor != 1 and self.picture is not None:
            raise UserError("hires: not together with --init; draw the picture first, and go on from it with a larger --size")
        if factor == 1 and self.hires_strength is not None:
            raise UserError(f"hires_strength: got {self.hires_strength}, but there is no second pass; give --hires 2")
        strength = old.get("hires_strength", 0.5) if self.hires_strength is None else self.hires_strength
        return {"hires": float(factor), "hires_strength": float(strength)}

    def margins(self, old: Mapping[str, Any]) -> tuple[int, int, int, int] | None:
        """px to add at left, top, right and bottom; None: nothing."""
        if not self.outpaint:
            numbers = str(old.get("outpaint", ""))
            return tuple(int(n) for n in numbers.split(",")) if numbers else None  # type: ignore[return-value]
        words = [word.strip() for word in self.outpaint.split(",")]
        named = [word.partition("=")[0] for word in words if "=" in word]
        found = dict.fromkeys(EDGES, 0)
        try:
            if "=" not in words[0]:  # of all edges but those that are named behind it
                found = dict.fromkeys(EDGES, int(words.pop(0)))
            found |= {edge: int(number) for edge, _, number in (word.partition("=") for word in words)}
            found = found if len(named) == len({*named}) == len(words) else {}
        except ValueError:
            found = {}
        if set(found) != set(EDGES) or min(found.values()) < 0 or not 0 < max(found.values()) <= MAX_MARGIN:
            raise UserError(f"outpaint: got {self.outpaint!r}; px for some of {', '.join(EDGES)} are needed, such as left=64,right=64")
        return found["left"], found["top"], found["right"], found["bottom"]

    def edited(self, size: str, old: Mapping[str, Any]) -> dict[str, Any]:
        """What a recipe says of the picture it starts from besides its hash; empty where there is none.

        Raises:
            UserError: for options that do not belong together.
        """
        margins = self.margins(old)
        if self.picture is None:
            self._without(margins, old)
        if self.source is not None and (self.init or margins):
            raise UserError("source: says what the picture of --invert shows, or what the seed draws; leave --init and --outpaint out")
        if self.invert is not None and (self.init or self.mask or margins):
            raise UserError("invert: not together with --init, --mask or --outpaint")
        if margins and (self.mask or size):
            raise UserError("outpaint: not together with --mask or --size; the margins are what is new")
        if self.strength is not None and not 0 <= self.strength <= 1:
            raise UserError(f"strength: got {self.strength}; a number from 0 (the picture as it is) to 1 (all new) is needed")
        for name, path in (("init", self.init), ("mask", self.mask), ("invert", self.invert)):
            if path is not None and not path.exists():
                raise UserError(f"{name}: {path}: No such file or directory")
        if self.picture is None:
            return self._exchanged(old, REPLACED)
        usual = 1.0 if self.mask or margins or self.invert or self._own_mask() else STRENGTH
        return {
            "strength": float(old.get("strength", usual) if self.strength is None else self.strength),
            "invert": self.invert is not None,
            "outpaint": ",".join(map(str, margins or ())),
            "source": "",
            **(self._exchanged(old, dict.fromkeys(REPLACED, 0.0)) if self.invert else {}),
        }

    def _exchanged(self, old: Mapping[str, Any], usual: Mapping[str, float]) -> dict[str, Any]:
        """What a recipe says of the picture as it was, and of its attention; empty where there is none."""
        source = clean(str(old.get("source", "") if self.source is None else self.source))
        given = {name: value for name in REPLACED if (value := getattr(self, name)) is not None}
        if self.invert is None and not source:
            if given:
                name = min(given)
                raise UserError(f"{name}: got {given[name]:g}, but nothing to take attention from; give --source PROMPT")
            return {}
        if self.invert is None and (self.hires or old.get("hires", 1)) != 1:
            raise UserError("source: not together with --hires; draw the picture first, and enlarge it by --init and a larger --size")
        before = {name: float(old[name]) for name in REPLACED if name in old} if old.get("source") == source else {}
        told = {**usual, **before, **given}
        if self.invert is None and not any(told.values()):
            raise UserError("source: no step takes anything of it with cross_replace and self_replace at 0; give one of them more")
        return {"source": source, **told}

    def _own_mask(self) -> bool:
        """Whether INIT is transparent in parts, which are new then."""
        from ldm.sampling.init_images import hole_in

        return self.init is not None and hole_in(self.init)

    def _without(self, margins: tuple[int, ...] | None, old: Mapping[str, Any]) -> None:
        """Refuse what needs a picture to start from."""
        for name, value in (("mask", self.mask), ("strength", self.strength)):
            if value is not None:
                raise UserError(f"{name}: got {value}, but no picture to start from; give it by --init")
        if old.get("init"):
            fix = "--invert" if old.get("invert") else "--init, and its mask, if any, by --mask"
            raise UserError(f"from: this picture was drawn out of another one; give that one by {fix}")
        if margins:
            raise UserError("outpaint: no picture to go on from; give it by --init")


@dataclass(frozen=True, kw_only=True)
class Views:
    """Views: what else than its prompt a picture is drawn by, where the model reads it (ControlNet, colourisation, boxes)."""

    given: tuple[str, ...] = option((), "VIEW=FILE[@WEIGHT], or VIEW=of:PICTURE, which it is made of; may be repeated.")


@dataclass(frozen=True, kw_only=True)
class Guidance:
    """Classifier guidance: what draws towards the words of a prompt besides classifier-free guidance."""

    classifier: Path | None = option(None, "A file of ldm classifier: draw towards the words of the prompt that it knows.")
    classifier_scale: float | None = option(None, "How strongly; 1 is Bayes' rule; default: 1.", low=0, high=1000)

    def guided(self, old: Mapping[str, Any]) -> dict[str, Any]:
        """What a recipe says of a classifier's guidance besides its hash; empty where there is none.

        Raises:
            UserError: for a scale without a file, a file that is missing, or a recipe that needs one.
        """
        if self.classifier is None:
            if self.classifier_scale is not None:
                raise UserError(f"classifier_scale: got {self.classifier_scale:g}, but no classifier; give --classifier FILE")
            if old.get("classifier"):
                raise UserError("from: this picture was drawn with a classifier; give its file by --classifier")
            return {}
        if not self.classifier.exists():
            raise UserError(f"classifier: {self.classifier}: No such file or directory")
        scale = self.classifier_scale
        return {"classifier_scale": float(old.get("classifier_scale") or 1.0) if scale is None else float(scale)}


@dataclass(frozen=True, kw_only=True)
class Adapters:
    """Adapters: LoRAs, words that textual inversion learned, and another autoencoder."""

    lora: tuple[str, ...] = option((), "FILE[:WEIGHT] of a LoRA (peft's, diffusers' or kohya's); may be repeated.", given=Given.LORA)
    embedding: tuple[str, ...] = option((), "FILE of a textual inversion embedding; may be repeated.", given=Given.EMBEDDING)
    vae: Path | None = option(None, "Another VAE than the model's: a folder (diffusers) or a file (CompVis).", given=Given.FILE)

    def check(self, low_memory: bool, old: Mapping[str, Any]) -> None:
        """Refuse them where weights are read again.

        Raises:
            UserError: saying so.
        """
        told = any(old.get(name) for name in ("loras", "embeddings", "vae"))
        if low_memory and (self.lora or self.embedding or self.vae or told):
            raise UserError("low_memory: not together with --lora, --embedding or --vae, as weights are read again; leave one of them out")


@dataclass(frozen=True, kw_only=True)
class NamedAdapters(Adapters):
    """Adapters: LoRAs and words that textual inversion learned, and where the LoRAs are that prompts name."""

    lora_dir: Path | None = option(None, "A folder of LoRAs: <lora:NAME:0.8> in a prompt is NAME's file in it.")

    def check(self, low_memory: bool, old: Mapping[str, Any]) -> None:
        """Refuse them where weights are read again.

        Raises:
            UserError: saying so.
        """
        if low_memory and self.lora_dir is not None:
            raise UserError("low_memory: not together with --lora-dir, as weights are read again; leave one of them out")
        super().check(low_memory, old)


@dataclass(frozen=True, kw_only=True)
class Output:
    """Output: where pictures go, and which are written."""

    safety: Path | None = option(None, "A folder with a safety checker (diffusers' layout); what it flags is not written.")
    watermark: str | None = option(None, "A short text to hide in the pixels; ldm info reads it.")
    batch: int = option(8, "Batch size; never changes a picture.", low=1)
    out: Path = option(Path("outputs"), "Folder of the pictures.")
    grid: Path | None = option(None, "Also one PNG of all (contact sheet), a row for each prompt; of one picture each, eight in a row.")
    save_steps: bool = option(False, "Beside each picture, a strip of what it was at every step.")
    resume: bool = option(False, "Leave out the pictures that OUT holds already.")
    as_json: bool = option(False, "Print one JSON object per picture.", name="--json")

    def check(self) -> None:
        """Refuse a folder that is named as a picture, since whoever writes `--out ring.png` wants a file, and a sheet that is no PNG.

        Raises:
            UserError: saying what gives one.
        """
        if self.out.suffix.lower() in SUFFIXES and not self.out.is_dir():
            raise UserError(
                f"out: {self.out} is named as a file, and pictures go into a folder under numbers; give --out {self.out.with_suffix('')},"
                f" or --grid {self.out.with_suffix('.png')}: one file with all of them, or with the only one"
            )
        if self.grid is not None:
            check_sheet("grid", self.grid)


def check_sheet(option: str, file: Path) -> None:
    """Refuse a sheet of pictures under another format's name, or in the place of a file.

    Raises:
        UserError: naming the option and the file.
    """
    if file.exists():
        raise UserError(f"{option}: {file} is there already; choose another name")
    if file.suffix.lower() in SUFFIXES and file.suffix.lower() != ".png":
        raise UserError(f"{option}: {file}: a PNG is written; give a name that ends in .png")


@dataclass(frozen=True, kw_only=True)
class Device:
    """Device: where it is drawn."""

    device: str = option("", "cuda, mps or cpu; default: the best there is.", given=Given.DEVICE)


@dataclass(frozen=True, kw_only=True)
class Request:
    """What pictures are asked for: everything that `ldm sample` can be told."""

    prompts: PromptOptions = field(default_factory=PromptOptions)
    base: Base = field(default_factory=Base)
    following: Following = field(default_factory=Following)
    choice: Choice = field(default_factory=Choice)
    sampler: SamplerOptions = field(default_factory=SamplerOptions)
    editing: Editing = field(default_factory=Editing)
    views: Views = field(default_factory=Views)
    guidance: Guidance = field(default_factory=Guidance)
    adapters: NamedAdapters = field(default_factory=NamedAdapters)
    output: Output = field(default_factory=Output)
    running: Running = field(default_factory=Running)
    device: Device = field(default_factory=Device)

    @property
    def parts(self) -> tuple[object, ...]:
        """All that was chosen."""
        return tuple(getattr(self, f.name) for f in fields(self))

    def fields(self, old: Mapping[str, Any]) -> dict[str, Any]:
        """What recipes say besides prompts, seeds, size and sampler settings, as far as it is known before the model is.

        Raises:
            UserError: for whatever is wrong with the request.
        """
        self.sampler.check()
        self.choice.check(self.editing.invert is not None)
        self.adapters.check(self.running.low_memory, old)
        told = self.editing.passes(old) | self.guidance.guided(old) | self.editing.edited(self.base.size, old)
        watermark = old.get("watermark", "") if self.output.watermark is None else self.output.watermark
        return {**told, **self.following.carried(old), **self.choice.varied(), "watermark": watermark}


def _here(name: str, said: str) -> str:
    """What another program's name of a sampler or a spacing is here, as the end of a message; empty where nobody knows."""
    reading = Reading()
    {"sampler": reading.sampler, "spacing": reading.spacing}.get(name, reading.lose)(said)
    found = [f"--{option} {reading.fields[option]}" for option in ("sampler", "spacing") if option in reading.fields]
    return f"here that is {' '.join(found)}" if found else ""


def clean(text: str) -> str:
    """A text as prompts and recipes may hold it."""
    return writable(text).replace("\0", " ")


def file_hashed(file: Path, said: str) -> bool:
    """Whether a weights file has the hash that the web UI tells: the beginning of its SHA-256, or of that of 64 kB of it (8 letters)."""
    with file.open("rb") as stream:
        if len(said) == 8:
            stream.seek(0x100000)
            return hashlib.sha256(stream.read(0x10000)).hexdigest().startswith(said)
        return hashlib.file_digest(stream, "sha256").hexdigest().startswith(said.lower())


def size_of(text: str) -> tuple[int, int]:
    """(height, width) px of WIDTHxHEIGHT or of one number for a square.

    Raises:
        UserError: for anything else.
    """
    words = text.lower().split("x")
    if len(words) > 2 or not all(re.fullmatch("0*[1-9][0-9]{0,5}", word) for word in words):
        raise UserError(f"size: got {text!r}; write WIDTHxHEIGHT in px, such as 512x512")
    return int(words[-1]), int(words[0])
