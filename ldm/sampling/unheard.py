"""Settings without effect: what a request says that changes no picture, a line each for whoever asked."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from ldm.config.errors import UserError
from ldm.families.draws import Draws, Settings, steps_taken
from ldm.sampling.adapters import remembered
from ldm.sampling.prompt_files import Asked
from ldm.sampling.recipe import Recipe
from ldm.sampling.request import Request

# The options of a request that a line of a prompt file may say, by the line's fields.
OF_LINES: dict[str, tuple[str, ...]] = {
    "seed": ("seed",),
    "negative": ("negative",),
    "guidance": ("guidance",),
    "steps": ("steps",),
    "size": ("width", "height"),
}


def in_recipe(recipe: Recipe, usual: Settings) -> Iterator[str]:
    """What of a recipe's sampler settings its sampler or its guidance does not read.

    Args:
        usual: the model's own settings, which nobody asked for.
    """
    from ldm.diffusion.samplers import SAMPLERS

    diffuses = recipe.sampler in SAMPLERS
    if diffuses and recipe.eta and not SAMPLERS[recipe.sampler].stochastic_by_eta:
        readers = ", ".join(name for name, one in SAMPLERS.items() if one.stochastic_by_eta)
        yield f"eta: {recipe.sampler} does not read it; {readers} does"
    yield from _without_steps(recipe) if diffuses else ()
    if recipe.temperature == 0:
        idle = [name for name in ("top_k", "top_p") if getattr(recipe, name) != getattr(usual, name)]
        yield from (f"{name}: temperature 0 draws the likeliest codes alone, so it changes nothing" for name in idle)
    if recipe.stop_after and recipe.link_steps.split(",")[recipe.stop_after - 1 :] != usual.link_steps.split(",")[recipe.stop_after - 1 :]:
        yield f"link_steps: --stop-after {recipe.stop_after} leaves models out, so their steps change nothing"
    if recipe.classifier and not recipe.classifier_scale:
        yield "classifier_scale: 0 leaves the classifier out"
    if recipe.guidance == 0:
        yield "guidance: 0 leaves the prompt out; 1 is no guidance"
    elif recipe.guidance < 1:
        yield f"guidance: {recipe.guidance:g} weakens the prompt; 1 is no guidance"
    taken = steps_taken(recipe.steps, recipe.strength) if recipe.init and diffuses else recipe.steps
    if taken and recipe.guidance != 1 and not any(recipe.guides(i, taken) for i in range(taken)):
        interval = f"{recipe.guidance_from:g} to {recipe.guidance_to:g}"
        yield f"guidance_interval: none of the {taken} steps lies in {interval}, so there is no guidance; widen it, or take more --steps"
    if recipe.guidance == 1:
        composed = recipe.notation and " AND " in recipe.prompt
        unread: dict[str, Any] = {
            "negative": recipe.negative and not composed,
            "rescale": recipe.rescale != usual.rescale and recipe.rescale and not composed,
            "guidance_interval": (recipe.guidance_from, recipe.guidance_to) != (usual.guidance_from, usual.guidance_to),
            "guidance_curve": recipe.guidance_curve != usual.guidance_curve,
        }
        yield from (f"{name}: is not read without guidance; give --guidance above 1" for name, unused in unread.items() if unused)


def _without_steps(recipe: Recipe) -> Iterator[str]:
    """Strengths so small, and intervals so short, that no step is theirs."""
    first, steps = recipe.steps, steps_taken(recipe.steps, recipe.strength) if recipe.init else recipe.steps
    more = "give it more, or more --steps"
    if not steps:
        yield f"strength: {recipe.strength:g} of {first} steps is none, so nothing is drawn anew; {more}"
    if recipe.hires != 1 and not steps_taken(first, recipe.hires_strength):
        yield f"hires_strength: {recipe.hires_strength:g} of {first} steps is none, so the first picture is enlarged, and no more; {more}"


def in_words(recipes: Sequence[Recipe], family: Draws) -> Iterator[str]:
    """The learned words that are in no prompt."""
    texts = {text for one in recipes for text in (one.prompt, one.negative, one.to, one.source)}
    for token in dict.fromkeys(
        str(word["token"]) for one in recipes[:1] for word in remembered({"embeddings": one.embeddings}, "embeddings")
    ):
        if not any(family.says(text, token) for text in texts):
            yield f"embedding: {token} is in no prompt, so it changes nothing; write it there"


def in_lines(request: Request, asked: Sequence[Asked]) -> Iterator[str]:
    """The options that every line of a prompt file takes the place of.

    Raises:
        UserError: for listed seeds beside a line's own.
    """
    own = [one for one in asked if one.seed is not None]
    if own and request.choice.seeds:
        raise UserError(f"seeds: the prompt {own[0].prompt[:40]!r} has a seed of its own; leave that out, or --seeds")
    given: dict[str, Any] = {"seed": request.base.seed, "negative": request.base.negative, "size": request.base.size or None}
    given |= {"guidance": request.sampler.guidance, "steps": request.sampler.steps}
    for name, fields in OF_LINES.items():
        if given[name] is not None and all(getattr(one, field) is not None for one in asked for field in fields):
            yield f"{name}: every line says its own, so --{name} changes nothing"
    if request.editing.invert is not None and request.base.seed is not None:
        yield "seed: --invert starts from the noise that its picture comes from, whatever the seed"
