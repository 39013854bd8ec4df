"""Sampling jobs: what is asked becomes a list of recipes, one for each picture, and recipes become pictures, hires fix included."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

from ldm.config.errors import UserError
from ldm.families.draws import Draws, Guide, Wanted
from ldm.sampling.prompt_files import Asked
from ldm.sampling.recipe import Recipe
from ldm.sampling.recipe_values import MAX_SEED, MAX_SIDE
from ldm.sampling.unheard import in_recipe

if TYPE_CHECKING:
    from torch import Tensor

    from ldm.sampling.given import Files
    from ldm.sampling.init_images import InitImage
    from ldm.text.prompt_syntax import Prompt

OWN: dict[str, Any] = {"prompt": "", "seed": 0, "variation_seed": 0, "variation": 0.0, "to": "", "share": 0.0}  # of each in a call


@dataclass(frozen=True, kw_only=True)
class Common:
    """What the pictures of several prompts have in common, unless a prompt's own line says otherwise.

    Args:
        seeds: every prompt's; None: `n` from the line's seed or `seed` on.
        wanted: sampler settings.
        size: (height, width) px; None: the model's own.
        variations: of every picture, in its place: with the noise of seed + 1, seed + 2, ... mixed into its own; 0: the picture.
        rest: other fields of every recipe.
        given: what recipes tell of views, by those that a prompt's own line names; where it says nothing, `rest` does.
        loras: what recipes tell of LoRAs, by those that a prompt's own tags name; where it says nothing, `rest` does.
    """

    seeds: Sequence[int] | None = None
    seed: int = 0
    n: int = 1
    wanted: Wanted = Wanted()
    negative: str = ""
    size: tuple[int, int] | None = None
    variations: int = 0
    rest: Mapping[str, Any] = field(default_factory=dict)
    given: Mapping[tuple[str, ...], str] = field(default_factory=dict)
    loras: Mapping[tuple[str, ...], str] = field(default_factory=dict)


def recipes(family: Draws, asked: Sequence[Asked], common: Common) -> list[Recipe]:
    """A recipe for every picture, prompt after prompt."""
    found = []
    for one in asked:
        own = {name: value for name in ("steps", "guidance") if (value := getattr(one, name)) is not None}
        told: dict[str, Any] = {**asdict(family.settings(replace(common.wanted, **own))), **common.rest, "prompt": one.prompt}
        if one.loras in common.loras:
            told["loras"] = common.loras[one.loras]
        if one.given:
            told["given"] = common.given[one.given]
        height, width = common.size or family.defaults["size"]
        told |= {"height": one.height or height, "width": one.width or width}
        told["negative"] = common.negative if one.negative is None else one.negative
        first = common.seed if one.seed is None else one.seed
        listed = common.seeds if one.seed is None else None
        numbers = range(first, first + common.n) if listed is None else listed
        if max(numbers) > MAX_SEED:
            raise UserError(f"seed: {first} and {common.n - 1} more lead beyond {MAX_SEED}; choose a smaller one")
        for number in numbers:
            recipe = Recipe(seed=number, **told)
            check_size(recipe.height, recipe.width, family.factor, recipe.hires)
            if recipe.hires != 1 and not family.redraws:
                family.refuse("hires", "draws no picture anew in part; leave --hires out")
            found += [replace(recipe, variation_seed=number + 1 + k) for k in range(common.variations)] or [recipe]
    return found


def check_size(height: int, width: int, factor: int, hires: float = 1.0) -> None:
    """Refuse sides, of a first pass too, that are no multiples of the autoencoder's factor, or beyond MAX_SIDE.

    Raises:
        UserError: naming the size and the fix.
    """
    shown = f"{width}x{height}"
    if max(width, height) > MAX_SIDE:
        raise UserError(f"size: got {shown}; at most {MAX_SIDE} px a side")
    if width % factor or height % factor:
        raise UserError(f"size: got {shown}; both must be multiples of {factor}")
    for side in (width / hires, height / hires):
        if side != int(side) or int(side) % factor:
            raise UserError(f"hires: {shown} divided by {hires:g} is not a multiple of {factor} px; choose another size or factor")


def alike(found: Sequence[Recipe], many: int) -> Iterator[list[int]]:
    """Places of recipes that differ in what OWN names alone, in their order, at most `many` at a time."""
    groups: dict[Recipe, list[int]] = {}
    for i, recipe in enumerate(found):
        groups.setdefault(replace(recipe, **OWN), []).append(i)
    for places in groups.values():
        for start in range(0, len(places), many):
            yield places[start : start + many]


def draw(
    family: Draws,
    found: Sequence[Recipe],
    *,
    init_image: InitImage | None = None,
    edits: Sequence[Any] = (),
    classifier: Guide | None = None,
    given: Files | None = None,
    on_step: Callable[[int, int], None] | None = None,
    note: Callable[[str], None],
) -> Tensor:
    """The pictures (N,H,W,3) uint8 of recipes that differ in what OWN names alone.

    With `hires` above 1 they are drawn at a smaller size first, enlarged and drawn anew in part, as image-to-image does.

    Args:
        init_image: the picture that the recipes start from, as large as they say.
        edits: further methods, of both passes.
        classifier: what guides recipes with a `classifier_scale`.
        given: the files of recipes that tell of views.
        note: told what a user should know, one line each.
    """
    import torch

    first = found[0]
    for said in in_recipe(first, family.settings()):
        note(said)
    meant = _reader(first)
    prompts, wanted, negative = [_between(recipe) for recipe in found], first.wanted(), meant(first.negative)
    seeds = [recipe.seed for recipe in found]
    passes = 1 if first.hires == 1 else 2

    def in_pass(number: int) -> Callable[[int, int], None] | None:
        return None if on_step is None else lambda done, steps: on_step(number * steps + done, passes * steps)

    def drawn(number: int, size: tuple[int, int], edits: Sequence[Any]) -> Tensor:
        latents, tell = noise_of(family, found, size), in_pass(number)
        edits = (*(given.edits(family, first.given, size) if given is not None else ()), *edits)
        return family.sample(prompts, seeds, wanted, size=size, negative=negative, latents=latents, edits=edits, on_step=tell, note=note)

    if init_image is not None:
        image = torch.tensor(init_image.pixels)[None]
        new = None if init_image.mask is None else torch.tensor(init_image.mask)[None]
        edits = (*edits_of(family, first, image, new), *edits)
    if first.cross_replace or first.self_replace:
        edits = (*family.exchanged(meant(first.source), first.cross_replace, first.self_replace), *edits)
    if classifier is not None and first.classifier_scale:
        edits = (classifier.edit([recipe.prompt for recipe in found], first.classifier_scale), *edits)
    if passes == 2:
        small = drawn(0, (first.first_height, first.first_width), edits)
        large = enlarged(small, first.height, first.width)
        edits = (*family.edits(large, None, first.hires_strength), *edits)
    return drawn(passes - 1, (first.height, first.width), edits)


def edits_of(family: Draws, recipe: Recipe, image: Tensor, new: Tensor | None) -> tuple[Any, ...]:
    """How a recipe departs from pictures (1 or N,H,W,3) uint8, of which `new` (1 or N,H,W) or all is to be new."""
    if not recipe.invert:
        return family.edits(image, new, recipe.strength)
    return family.inverted(image, _reader(recipe)(recipe.source), family.settings(recipe.wanted()), recipe.strength)


def noise_of(family: Draws, found: Sequence[Recipe], size: tuple[int, int]) -> Tensor | None:
    """The noise (N,c,h,w) of recipes of which some are variations; None where each has its seed's own."""
    if not any(recipe.variation for recipe in found):
        return None
    import torch

    from ldm.diffusion.interpolation import slerp

    own, other = (family.noise([getattr(r, name) for r in found], size) for name in ("seed", "variation_seed"))
    return slerp(own, other, torch.tensor([recipe.variation for recipe in found]))


def _reader(recipe: Recipe) -> Callable[[str], Prompt]:
    from ldm.text.prompt_syntax import literal, read

    return read if recipe.notation else literal


def _between(recipe: Recipe) -> Prompt:
    """A recipe's prompt, or what lies on the way to its second one."""
    meant = _reader(recipe)
    return replace(meant(recipe.prompt), end=meant(recipe.to), share=recipe.share) if recipe.share else meant(recipe.prompt)


def enlarged(images: Tensor, height: int, width: int) -> Tensor:
    """Pictures (N,H,W,3) uint8 at another size, by Lanczos' filter."""
    import numpy as np
    import torch
    from PIL import Image

    resized = [Image.fromarray(image.numpy()).resize((width, height), Image.Resampling.LANCZOS) for image in images]
    return torch.from_numpy(np.stack([np.asarray(image) for image in resized]))
