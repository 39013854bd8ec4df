"""What is asked of a model becomes a list of recipes, one for each picture, and recipes become pictures."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from ldm.errors import UserError
from ldm.prompt_files import Asked
from ldm.recipe import Recipe

if TYPE_CHECKING:
    from torch import Tensor

    from ldm.families.latent_diffusion import LatentDiffusionFamily

MAX_SIDE = 8192  # px
NUMBERS = ("steps", "guidance", "rescale", "sampler", "spacing", "eta", "precision", "guidance_from", "guidance_to", "guidance_curve")


def recipes(
    family: LatentDiffusionFamily,
    asked: Sequence[Asked],
    seeds: Sequence[int] | None,
    *,
    seed: int,
    n: int,
    chosen: dict[str, Any],
    negative: str,
    size: tuple[int, int] | None,
    **rest: Any,
) -> list[Recipe]:
    """A recipe for every picture, prompt after prompt; what a prompt's own line says goes before everything else.

    Args:
        seeds: every prompt's; None: `n` from the line's seed or `seed` on.
        chosen: settings by the names of NUMBERS, None for the model's own.
        size: (height, width) px, or None for the model's own.
        rest: other fields of every recipe.
    """
    found = []
    for one in asked:
        own = {name: value for name in ("steps", "guidance") if (value := getattr(one, name)) is not None}
        settings = asdict(family.settings(**{**chosen, **own}))
        height, width = size or family.defaults["size"]
        first = seed if one.seed is None else one.seed
        avoided = negative if one.negative is None else one.negative
        for number in seeds if seeds is not None and one.seed is None else range(first, first + n):
            recipe = Recipe(
                prompt=one.prompt, negative=avoided, seed=number, width=one.width or width, height=one.height or height, **settings, **rest
            )  # fmt: skip
            check_size(recipe, family.factor)
            found.append(recipe)
    return found


def check_size(recipe: Recipe, factor: int) -> None:
    """Refuse sides, of a first pass too, that are no multiples of the autoencoder's factor, or beyond MAX_SIDE.

    Raises:
        UserError: naming the size and the fix.
    """
    shown = f"{recipe.width}x{recipe.height}"
    if max(recipe.width, recipe.height) > MAX_SIDE:
        raise UserError(f"size: got {shown}; at most {MAX_SIDE} px a side")
    if recipe.width % factor or recipe.height % factor:
        raise UserError(f"size: got {shown}; both must be multiples of {factor}")
    for side in (recipe.width / recipe.hires, recipe.height / recipe.hires):
        if side != int(side) or int(side) % factor:
            raise UserError(f"hires: {shown} divided by {recipe.hires:g} is not a multiple of {factor} px; choose another size or factor")


def alike(found: Sequence[Recipe], many: int) -> Iterator[list[int]]:
    """Places of recipes that differ in prompt and seed alone, in their order, at most `many` at a time."""
    groups: dict[Recipe, list[int]] = {}
    for i, recipe in enumerate(found):
        groups.setdefault(replace(recipe, prompt="", seed=0), []).append(i)
    for places in groups.values():
        for start in range(0, len(places), many):
            yield places[start : start + many]


def draw(
    family: LatentDiffusionFamily,
    found: Sequence[Recipe],
    *,
    edits: Sequence[Any] = (),
    on_step: Callable[[int, int], None] | None = None,
    note: Callable[[str], None],
) -> Tensor:
    """The pictures (N,H,W,3) uint8 of recipes that differ in prompt and seed alone.

    With `hires` above 1 they are drawn at a smaller size first, enlarged and drawn anew in part, as image-to-image does.
    """
    from ldm.prompt_syntax import literal, read

    first = found[0]
    meant = read if first.notation else literal
    told: dict[str, Any] = {name: getattr(first, name) for name in NUMBERS}
    told |= {"negative": meant(first.negative), "note": note}
    prompts, seeds = [meant(recipe.prompt) for recipe in found], [recipe.seed for recipe in found]
    passes = 1 if first.hires == 1 else 2

    def in_pass(number: int) -> Callable[[int, int], None] | None:
        return None if on_step is None else lambda done, steps: on_step(number * steps + done, passes * steps)

    if passes == 2:
        size = (first.first_height, first.first_width)
        small = family.sample(prompts, seeds, size=size, on_step=in_pass(0), edits=edits, **told)
        large = enlarged(small, first.height, first.width)
        edits = family.edits(large, None, first.hires_strength)
    return family.sample(prompts, seeds, size=(first.height, first.width), on_step=in_pass(passes - 1), edits=edits, **told)


def enlarged(images: Tensor, height: int, width: int) -> Tensor:
    """Pictures (N,H,W,3) uint8 at another size, by Lanczos' filter."""
    import numpy as np
    import torch
    from PIL import Image

    resized = [Image.fromarray(image.numpy()).resize((width, height), Image.Resampling.LANCZOS) for image in images]
    return torch.from_numpy(np.stack([np.asarray(image) for image in resized]))
