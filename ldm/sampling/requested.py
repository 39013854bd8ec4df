"""A request becomes recipes: what is asked for, over what a followed picture says, over the model's own defaults."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ldm.config.errors import UserError
from ldm.sampling import doubts, jobs
from ldm.sampling.given import parse
from ldm.sampling.prompt_files import Asked
from ldm.sampling.recipe import Recipe
from ldm.sampling.request import Choice, Request
from ldm.sampling.unheard import in_words

if TYPE_CHECKING:
    from ldm.families.draws import Draws
    from ldm.sampling.given import Files
    from ldm.sampling.init_images import InitImage


MOST = 2**20  # pictures of one call: each is a recipe in memory


def init_image_for(
    request: Request, asked: Sequence[Asked], family: Draws, old: dict[str, Any], tell: Callable[[str], None]
) -> InitImage | None:
    """The picture that is started from, as large as what is drawn."""
    from ldm.sampling.init_images import init_image_of

    editing = request.editing
    if editing.picture is None:
        return None
    if sizes := [one for one in asked if one.width or one.height]:
        raise UserError(f"init: the prompt {sizes[0].prompt[:40]!r} has a size of its own; leave out --w and --h, or use --size")
    size = request.base.shape(old) or family.defaults["size"]
    return init_image_of(editing.picture, editing.mask, editing.margins(old), size, old, tell)


def recipes_of(
    request: Request,
    asked: Sequence[Asked],
    family: Draws,
    old: Mapping[str, Any],
    rest: Mapping[str, Any],
    init_image: InitImage | None,
    tell: Callable[[str], None],
    given: Files | None = None,
) -> list[Recipe]:
    """A recipe for each candidate of each picture; what is told of is likely a mistake, or changes nothing."""
    from ldm.text.prompt_syntax import literal, read

    base, choice = request.base, request.choice
    _refuse_too_many(choice, asked)
    if not family.redraws and request.editing.strength is None and "strength" not in old:
        rest = {**rest, "strength": 1.0}  # nothing of a picture is kept, and nobody asked for it
    listed = choice.listed(base.seed)
    common = jobs.Common(
        seeds=[number + k for number in listed for k in range(choice.best)] if listed else None,
        seed=base.first(old),
        n=choice.n * choice.best,
        wanted=request.sampler.chosen(old, request.editing.usual, family.settings()),
        negative=base.avoided(old),
        size=base.shape(old) if init_image is None else init_image.size,
        variations=choice.variations,
        rest=rest,
        given=told_by_lines(request, asked, given, tell),
        loras=told_by_loras(request, asked),
    )
    made = jobs.recipes(family, asked, common)
    for text in dict.fromkeys(text for one in made for text in (one.prompt, one.negative, one.to, one.source)):
        if how := family.overlong((read if rest["notation"] else literal)(text)):
            tell(f"{text[:40]!r}... {how}")
    for said in (*in_words(made, family), *doubts.of(made, family)):
        tell(said)
    if rest["watermark"]:
        from ldm.sampling.watermark import check

        for one in made:
            check(rest["watermark"], (one.height, one.width))
    return made


def _refuse_too_many(choice: Choice, asked: Sequence[Asked]) -> None:
    """Refuse more pictures than one call can list.

    Raises:
        UserError: naming the option.
    """
    of_each = (choice.seeds.count(",") + 1 if choice.seeds else choice.n) * choice.best * (choice.variations + 1)
    if len(asked) * of_each > MOST:
        raise UserError(f"n: {len(asked) * of_each:,} pictures in all; at most {MOST:,} are drawn by one call")


def told_by_lines(request: Request, asked: Sequence[Asked], given: Files | None, tell: Callable[[str], None]) -> dict[tuple[str, ...], str]:
    """What recipes tell of views, by those that prompts' own lines name; the request's count where a line does not tell the same view."""
    found = {}
    for own in {one.given for one in asked if one.given}:
        if given is None:
            raise UserError("given: views are not read here; leave them out of the prompts")
        views = {given.named(parse(word).view) for word in own}
        others = [word for word in request.views.given if given.named(parse(word).view) not in views]
        found[own] = given.field((*others, *own), {}, tell)
    return found


def told_by_loras(request: Request, asked: Sequence[Asked]) -> dict[tuple[str, ...], str]:
    """What recipes tell of LoRAs, by those that prompts name, where these differ."""
    from ldm.sampling.adapters import told_of

    sets = {one.loras for one in asked}
    return {own: told_of((*request.adapters.lora, *own)) for own in sets} if len(sets) > 1 else {}
