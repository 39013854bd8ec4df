"""The sample verb: text to image, img2img (SDEdit), inpainting and hires fix; every picture a file with its recipe."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.cli.command import call
from ldm.cli.models import check_sides, device_for, model_for, name_of, tell
from ldm.cli.starting import loading
from ldm.config.counts import be, plural
from ldm.distributed.environment import return_blocks
from ldm.sampling import doubts
from ldm.sampling.given import Files
from ldm.sampling.prompt_files import Asked
from ldm.sampling.prompt_tags import tagged
from ldm.sampling.recipe import Recipe
from ldm.sampling.request import Request
from ldm.sampling.requested import init_image_for, recipes_of, told_by_loras
from ldm.sampling.unheard import in_lines

if TYPE_CHECKING:
    from ldm.distributed.processes import Processes
    from ldm.families.draws import Draws, Guide, Running
    from ldm.metrics.judges import Judge
    from ldm.sampling.writing import PictureWriter


def main(words: Sequence[str]) -> int:
    """`ldm sample PROMPT ...`: the exit code."""
    return call(sample, words, "ldm sample")


def sample(request: Request) -> int:
    """Draw pictures of prompts. The same seed gives the same picture, whatever the batch and its neighbours."""
    with loading() as loaded:
        return _sample(request, loaded)


def _sample(request: Request, loaded: Callable[[], None]) -> int:
    old = request.following.old(request.parts, tell)
    adapters = request.adapters
    asked = tagged(request.prompts.read(old.get("prompt")), adapters.lora_dir, adapters.lora, tell, request.following.literal)
    request.choice.listed(request.base.seed)
    for said in (*in_lines(request, asked), *doubts.unquoted(request.prompts.prompt), *doubts.files_named(request.prompts.prompt)):
        tell(said)
    rest = request.fields(old)
    folder, output, running = model_for(request.base.model), request.output, request.running.following(old)
    if request.editing.picture is None:
        check_sides(request.base.shape(old), folder, rest.get("hires", 1.0))
    output.check()
    output.out.mkdir(parents=True, exist_ok=True)
    if output.grid is not None:
        output.grid.parent.mkdir(parents=True, exist_ok=True)

    from ldm.distributed.processes import processes
    from ldm.distributed.watchdog import Verb
    from ldm.families.registry import open_finished
    from ldm.metrics.judges import judge_of
    from ldm.sampling.adapters import add, decoded_by
    from ldm.sampling.picture_files import read_pixels, save_sheet

    device = request.device.device or ("cpu" if running.other else "")
    with processes(device == "cpu", Verb("sample", "The same command with --resume draws the rest")) as team:
        place = device_for(device, team.local)
        judge = judge_of(request.choice.judge, folder, place) if request.choice.best > 1 else None
        # As many threads as torch finds by itself: a number found by timing would change the last bits from run to run.
        if running.low_memory:
            return_blocks()
        family = open_finished(folder, place, running.low_memory)
        rest |= add(family, (*adapters.lora, *asked[0].loras), adapters.embedding, old, tell)
        rest |= decoded_by(family, adapters.vae, old, tell)
        chosen = request.sampler.chosen(old, request.editing.usual, family.settings())
        family.ready(Path(folder), running, family.settings(chosen).precision)
        loaded()
        rest |= {"model": name_of(folder), "model_hash": family.content_hash, "backend": running.other}
        request.following.compare(old, folder, family.content_hash, tell)
        given = Files(family.told, family.unheard)
        rest["given"] = given.field(request.views.given, old, tell)
        guide = _guide(request, family, old)
        if guide is not None:
            rest["classifier"] = guide.hash
        init_image = init_image_for(request, asked, family, old, tell)
        if init_image is not None:
            rest |= {"init": init_image.init_hash, "mask": init_image.mask_hash}
        made = recipes_of(request, asked, family, old, rest, init_image, tell, given)
        if output.resume:
            made = _missing(request, made)
        writer, started = replace(_writer(request, guide, judge, team, place), given=given), time.monotonic()
        if len({one.loras for one in asked}) > 1:
            writer = replace(writer, drawing=_by_loras(request, running, asked, family, rest["loras"], place))
        paths = writer.write(family, made, init_image)
        if team.rank == 0:
            if output.grid is not None and paths:
                each = len(request.choice.listed(request.base.seed) or range(request.choice.n)) * max(1, request.choice.variations)
                columns = each if each > 1 else min(len(asked), 8)
                save_sheet([read_pixels(paths[number]) for number in sorted(paths)], output.grid, columns)
            where = f"{_named(output.out, [paths[number] for number in sorted(paths)])}{f', all on {output.grid}' if output.grid else ''}"
            said = f"{plural(len(paths), 'picture')} of {folder} in {time.monotonic() - started:.1f} s: {where}"
            print(said, file=sys.stderr)
    return 0


def _named(folder: Path, files: Sequence[Path]) -> str:
    """Where pictures are: numbers go on in a folder, so the first and the last are named."""
    if not files:
        return f"{folder}/"
    return str(files[0]) if len(files) == 1 else f"{files[0]} to {files[-1].name}"


def _guide(request: Request, family: Draws, old: Mapping[str, Any]) -> Guide | None:
    """The classifier that guides."""
    file = request.guidance.classifier
    if file is None:
        return None
    guide = family.guide(file)
    if old.get("classifier") not in (None, "", guide.hash):
        tell(f"classifier: {file} is not the file that the recipe was made with: the picture will differ")
    return guide


def _by_loras(
    request: Request, running: Running, asked: Sequence[Asked], family: Draws, loras: str, place: str
) -> Callable[[Recipe], Draws]:
    """The model with the LoRAs of a recipe; another set than the last one's is merged into a model of its own."""
    from ldm.families.registry import open_finished
    from ldm.sampling.adapters import add, decoded_by

    folder = model_for(request.base.model)
    named = {told: own for own, told in told_by_loras(request, asked).items()}
    now = [(loras, family)]

    def drawing(recipe: Recipe) -> Draws:
        if recipe.loras != now[0][0]:
            found = open_finished(folder, place)
            add(found, (*request.adapters.lora, *named[recipe.loras]), request.adapters.embedding, {}, lambda text: None)
            decoded_by(found, request.adapters.vae, {"vae": recipe.vae}, lambda text: None)
            found.ready(Path(folder), running, recipe.precision)
            now[0] = (recipe.loras, found)
        return now[0][1]

    return drawing


def _missing(request: Request, made: list[Recipe]) -> list[Recipe]:
    """The recipes of pictures that are not there yet."""
    from ldm.sampling.picture_files import present

    kept, best = present(request.output.out), request.choice.best
    if not kept:
        return made
    groups = [made[i : i + best] for i in range(0, len(made), best)]
    missing = [group for group in groups if not any(one in kept for one in group)]
    there = len(groups) - len(missing)
    tell(f"{there} of {plural(len(groups), 'picture')} {be(there)} in {request.output.out} already")
    return [one for group in missing for one in group]


def _writer(request: Request, guide: Guide | None, judge: Judge | None, team: Processes, device: str) -> PictureWriter:
    """What becomes of pictures once they are drawn."""
    from ldm.sampling.picture_files import free
    from ldm.sampling.safety import SafetyFilter
    from ldm.sampling.writing import PictureWriter, to_json

    output = request.output
    first = free(output.out)
    team.wait()  # so that all find the same files there
    return PictureWriter(
        out=output.out,
        first=first,
        batch=output.batch,
        best=request.choice.best,
        judge=judge,
        safety=None if output.safety is None else SafetyFilter.load(output.safety, device),
        classifier=guide,
        save_steps=output.save_steps,
        tell=tell,
        told=to_json if output.as_json else lambda told: None,
        processes=team,
    )
