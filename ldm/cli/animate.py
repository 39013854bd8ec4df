"""The animate verb: prompt and seed interpolation as a film, or vid2vid, a short clip drawn anew as one."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.cli.command import call
from ldm.cli.models import check_sides, device_for, model_for, name_of, tell
from ldm.config.counts import plural
from ldm.config.errors import UserError
from ldm.config.options import Given, option
from ldm.families.draws import Draws
from ldm.sampling import doubts
from ldm.sampling.picture_files import save_all
from ldm.sampling.prompt_files import Asked
from ldm.sampling.prompt_tags import tagged
from ldm.sampling.recipe import Recipe
from ldm.sampling.recipe_values import MAX_SEED
from ldm.sampling.request import STRENGTH, Base, Device, NamedAdapters, SamplerOptions, Views, clean
from ldm.sampling.unheard import in_recipe, in_words

if TYPE_CHECKING:
    from torch import Tensor


def main(words: Sequence[str]) -> int:
    """`ldm animate PROMPT --to PROMPT`: the exit code."""
    return call(animate, words, "ldm animate")


@dataclass(frozen=True, kw_only=True)
class Film:
    """Film: the way from one prompt or seed to another, or a clip drawn anew, and where it goes."""

    prompt: str = option(MISSING, "What to draw.", argument=True)
    to: str | None = option(None, "What the film ends with; default: the same prompt.")
    to_seed: int | None = option(None, "And with which seed's noise; default: the same.", low=0, high=MAX_SEED)
    frames: int | None = option(None, "How many; default: 24.", low=2, high=512)
    loop: bool = option(False, "And back again.")
    clip: Path | None = option(
        None, "Instead: a short film to draw anew (vid2vid): a folder of frames, or an animated file.", given=Given.FILE
    )
    strength: float | None = option(None, "Denoising strength; default: 0.75, with SOURCE 1.", low=0, high=1, needs="clip")
    source: str | None = option(None, "What CLIP shows: start from the noise it comes from; guidance is 1 then by default.", needs="clip")
    cells: int = option(2, "Of CLIP: frames beside and above each other when drawn; 1: each alone.", low=1, high=8, needs="clip")
    rate: float = option(8.0, "Frames a second.", low=0.1, high=100)
    out: Path = option(Path("film.webp"), "The film: .webp, .png or .gif; never replaces a file.")
    pictures: Path | None = option(None, "A folder for the single frames, too.")

    def check(self) -> None:
        """Refuse what does not belong together.

        Raises:
            UserError: saying what.
        """
        if self.out.exists():
            raise UserError(f"out: {self.out} is there already; choose another name")
        if self.clip is None and self.to is None and self.to_seed is None:
            raise UserError("to: where does the film go? Give --to PROMPT, --to-seed NUMBER, or --clip FRAMES to draw a film anew")
        if self.clip is not None and (self.to is not None or self.to_seed is not None):
            raise UserError("clip: not together with --to or --to-seed")
        if self.clip is not None and (self.frames is not None or self.loop):
            raise UserError("clip: not together with --frames or --loop; the film is as long as the clip")

    def hears(self, seed: int | None) -> None:
        """Refuse a seed that changes nothing.

        Raises:
            UserError: saying why.
        """
        if seed is not None and self.source is not None and self.cells == 1:
            raise UserError("seed: changes nothing with --source and --cells 1, which start from the noise that the clip comes from")


def animate(film: Film, base: Base, sampler: SamplerOptions, views: Views, adapters: NamedAdapters, device: Device) -> int:
    """Make a film. Without CLIP, text and noise move from one prompt and seed to others."""
    film.check()
    if views.given and film.clip is not None:
        raise UserError("given: views are of one picture, and a clip has many; leave --given or --clip out")
    film.hears(base.seed)
    sampler.check()
    folder = model_for(base.model)
    check_sides(base.shape({}), folder)
    ends = [Asked(prompt=clean(text)) for text in (film.prompt, film.to) if text is not None]
    asked = tagged(ends, adapters.lora_dir, adapters.lora, tell)
    if asked[-1].loras != asked[0].loras:
        raise UserError("to: names other LoRAs than the prompt; a film is drawn with the same ones, so write the same tags into both")
    to = "" if film.to is None else asked[-1].prompt

    from ldm.sampling import jobs
    from ldm.sampling.adapters import with_adapters
    from ldm.sampling.animation import check_suffix, save_clip
    from ldm.sampling.given import Files

    check_suffix(film.out)
    film.out.parent.mkdir(parents=True, exist_ok=True)
    loras = (*adapters.lora, *asked[0].loras)
    family, added = with_adapters(folder, device_for(device.device), loras, adapters.embedding, {}, tell, vae=adapters.vae)
    # Of all samplers ddim adds no noise, which would flicker.
    wanted = sampler.chosen({}, {"sampler": "ddim", "guidance": None if film.source is None else 1.0}, family.settings())
    given = Files(family.told, family.unheard)
    rest: dict[str, Any] = {"model": name_of(folder), "model_hash": family.content_hash, "notation": True, **added}
    rest["given"] = given.field(views.given, {}, tell)
    common = jobs.Common(seed=base.first({}), wanted=wanted, negative=base.avoided({}), size=base.shape({}), rest=rest)
    (first,) = jobs.recipes(family, asked[:1], common)
    started = time.monotonic()
    if film.clip is None:
        recipes = way(first, film.frames or 24, to, film.to_seed, film.loop)
        from ldm.cli.grid import draw_cells

        _tell_words(recipes, family)
        drawn: Sequence[Any] = draw_cells(family, recipes, given=given, note=tell)
        first = replace(recipes[0], to=to)
    else:
        usual = STRENGTH if film.source is None else 1.0
        strength = usual if film.strength is None else film.strength
        first = replace(first, strength=strength, invert=film.source is not None, source=clean(film.source or ""))
        _tell_words([first], family)
        for said in in_recipe(replace(first, init="clip"), family.settings()):
            tell(said)
        anew, first = draw_clip(family, film.clip, first, film.cells)
        drawn, recipes = list(anew), [first] * len(anew)
    save_clip(film.out, [frame.numpy() for frame in drawn], film.rate, first)
    if film.pictures is not None:
        save_all(film.pictures, drawn, recipes)
    print(f"{plural(len(drawn), 'frame')} of {folder} in {time.monotonic() - started:.1f} s: {film.out}", file=sys.stderr)
    return 0


def _tell_words(recipes: Sequence[Recipe], family: Draws) -> None:
    for said in (*in_words(recipes, family), *doubts.of(recipes, family)):
        tell(said)


def way(base: Recipe, frames: int, to: str, to_seed: int | None, loop: bool = False) -> list[Recipe]:
    """A recipe for every frame on the way from a recipe's prompt and seed to others; the pace is even.

    Args:
        to: a prompt; empty: the same.
        to_seed: None: the same.
        loop: the second half goes back, so that the film may begin anew without a jump.
    """
    last = frames / 2 if loop else frames - 1
    shares = [k / last if k <= last else (frames - k) / last for k in range(frames)]
    found = []
    for share in shares:
        frame = base if to_seed is None else replace(base, variation=share, variation_seed=to_seed)
        found.append(replace(frame, to=to, share=share) if to else frame)
    return found


def draw_clip(family: Draws, clip: Path, recipe: Recipe, cells: int) -> tuple[Tensor, Recipe]:
    """The frames (F,H,W,3) of a clip drawn anew as one, and the recipe with its hash; all frames begin with the same noise."""
    import torch

    from ldm.families.draws import VideoEdit
    from ldm.sampling.animation import read_clip
    from ldm.sampling.picture_files import Bar
    from ldm.text.prompt_syntax import read

    values, said = read_clip(clip, (recipe.height, recipe.width))
    source = read(recipe.source) if recipe.invert else None
    anew = VideoEdit(
        prompt=read(recipe.prompt), negative=read(recipe.negative), source=source, seed=recipe.seed, strength=recipe.strength, cells=cells
    )
    settings, frames = family.settings(recipe.wanted()), torch.tensor(values)
    with Bar(len(frames)) as show:  # all go through every step together, so each is as far as all are
        drawn = family.restyle(frames, anew, settings, tell, lambda done, total: show(len(frames) * done / total))
    return drawn, replace(recipe, init=said)
