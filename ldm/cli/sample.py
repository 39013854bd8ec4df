"""The verb that draws: a model and prompts become picture files, each with its recipe."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from ldm.cli.command import call
from ldm.cli.sampling_options import (
    MAX_SEED,
    asked_for,
    device_for,
    edits_asked,
    guided_by,
    hires_of,
    interval_of,
    known,
    margins_of,
    model_for,
    name_of,
    seeds_of,
    size_given,
    tell,
    tell_overlong,
)
from ldm.config.errors import UserError
from ldm.distributed.environment import return_blocks
from ldm.families.draws import CURVES, PRECISIONS, Running, Wanted
from ldm.sampling.recipe import NAMES, SPACINGS, Recipe, read_recipe, writable

Option = typer.Option


def main(words: Sequence[str]) -> int:
    """`ldm sample PROMPT ...`: the exit code."""
    return call(sample, words, "ldm sample")


def sample(
    prompt: Annotated[list[str] | None, typer.Argument(help="What to draw; several prompts are drawn in turn.")] = None,
    prompts: Annotated[Path | None, Option(help="A file, a prompt a line (flags --n --w --h --d --l --s, or JSON); -: input.")] = None,
    recipe: Annotated[Path | None, Option("--from", help="A picture whose recipe is followed where no option says otherwise.")] = None,
    model: Annotated[str, Option(help="A folder or file of a model, or owner/name on the hub; default: the newest of runs/*.")] = "",
    lora: Annotated[list[str] | None, Option(help="FILE[:WEIGHT] of a LoRA (peft's, diffusers' or kohya's); may be repeated.")] = None,
    embedding: Annotated[list[str] | None, Option(help="FILE of a word (textual inversion); may be repeated.")] = None,
    n: Annotated[int, Option(min=1, help="Pictures per prompt; picture k has the seed SEED + k.")] = 1,
    seed: Annotated[int | None, Option(min=0, max=MAX_SEED, help="Seed of each prompt's first picture; default: 0.")] = None,
    seeds: Annotated[str, Option(help="The seeds of every prompt, such as 1,5,9; in place of --seed and --n.")] = "",
    steps: Annotated[int | None, Option(min=1, max=1000, help="Denoising steps; default: the model's.")] = None,
    guidance: Annotated[float | None, Option(min=0, max=1000, help="Classifier-free guidance; 1: none; default: the model's.")] = None,
    guidance_interval: Annotated[str, Option(help="Guide only from one share of the steps to another, such as 0.1,0.8.")] = "",
    guidance_curve: Annotated[str, Option(help="Guidance over the steps: constant, or rising: linear cosine.")] = "",
    rescale: Annotated[float | None, Option(min=0, max=1, help="Guidance rescale (Lin 2023); default: the model's.")] = None,
    sampler: Annotated[str, Option(help=f"{' '.join(NAMES)}; default: the model's.")] = "",
    spacing: Annotated[str, Option(help=f"Of the steps: {' '.join(SPACINGS)}; default: the sampler's.")] = "",
    eta: Annotated[float | None, Option(min=0, max=1, help="Noise of ddim's steps; default: 0, none.")] = None,
    precision: Annotated[str, Option(help="Of matrix products and convolutions: fp32 bf16 fp16; default: the model's.")] = "",
    negative: Annotated[str | None, Option(help="What to stay away from; default: nothing.")] = None,
    size: Annotated[str, Option(help="WIDTHxHEIGHT in px; default: the model's.")] = "",
    literal: Annotated[bool, Option("--literal", help="Brackets, BREAK and AND in prompts stand for themselves.")] = False,
    hires: Annotated[float | None, Option(min=1, max=8, help="Draw so many times smaller first, enlarge, and draw anew in part.")] = None,
    hires_strength: Annotated[float | None, Option(min=0, max=1, help="How much the second pass draws anew; default: 0.5.")] = None,
    init: Annotated[Path | None, Option(help="A picture to start from, in place of noise.")] = None,
    strength: Annotated[float | None, Option(help="How much of INIT is drawn anew, 0 to 1; default: 0.75, with MASK 1.")] = None,
    mask: Annotated[Path | None, Option(help="A picture as large as INIT, white where it is to be new; the rest keeps its bytes.")] = None,
    outpaint: Annotated[str, Option(help="Go on beyond INIT's edges, in px: left=64,right=64 (also top, bottom), or 64 for all.")] = "",
    invert: Annotated[Path | None, Option(help="A picture to edit by its prompt: start from the noise that it comes from.")] = None,
    source: Annotated[str | None, Option(help="What the picture of --invert shows.")] = None,
    classifier: Annotated[Path | None, Option(help="A file of ldm classifier: draw towards the words of the prompt that it knows.")] = None,
    classifier_scale: Annotated[float | None, Option(min=0, max=1000, help="How strongly; 1 is Bayes' rule; default: 1.")] = None,
    variations: Annotated[int, Option(min=0, help="So many pictures near each one, in its place.")] = 0,
    variation_strength: Annotated[float | None, Option(min=0, max=1, help="How far away they are; default: 0.2.")] = None,
    best: Annotated[int, Option(min=1, help="Draw so many for each picture and keep the one that JUDGE likes best.")] = 1,
    judge: Annotated[str, Option(help="own: the model's CLIP; scenes: their checker; or a folder with a CLIP (transformers).")] = "",
    safety: Annotated[Path | None, Option(help="A folder with a safety checker (diffusers' layout); what it flags is not written.")] = None,
    mark: Annotated[str | None, Option(help="A short text to hide in the pixels; ldm info reads it.")] = None,
    batch: Annotated[int, Option(min=1, help="Pictures between two writes to disk; never changes a picture.")] = 8,
    out: Annotated[Path, Option(help="Folder of the pictures.")] = Path("outputs"),
    grid: Annotated[Path | None, Option(help="Also one PNG of all, a row for each prompt.")] = None,
    save_steps: Annotated[bool, Option("--save-steps", help="Beside each picture, a strip of what it was at every step.")] = False,
    resume: Annotated[bool, Option("--resume", help="Leave out the pictures that OUT holds already.")] = False,
    as_json: Annotated[bool, Option("--json", help="Print one JSON object per picture.")] = False,
    device: Annotated[str, Option(help="cuda, mps or cpu; default: the best there is.")] = "",
    attention: Annotated[str, Option(help="Kernel: auto sdpa plain xformers sliced; default: auto.")] = "",
    compiled: Annotated[bool, Option("--compile", help="Compile the network first: minutes, then faster steps.")] = False,
    low_memory: Annotated[bool, Option("--low-memory", help="One part of the model in memory at a time.")] = False,
    tile: Annotated[int, Option(min=0, help="Decode pictures larger than TILE x TILE px in stripes; 0: never.")] = 512,
) -> int:
    """Draw pictures of prompts. The same seed gives the same picture, whatever the batch and its neighbours."""
    found = read_recipe(recipe) if recipe else {}
    # Other programs' pictures say nothing of it, and mean the notation.
    old: dict[str, Any] = asdict(found) if isinstance(found, Recipe) else {"notation": True, **found}
    wanted = asked_for(prompt or [], prompts, old.get("prompt"))
    start = int(old.get("seed", 0) if seed is None else seed)
    own_seeds = seeds_of(seeds, seed, n)
    shape = size_given(size, old)
    interval = interval_of(guidance_interval, old)
    for name, value in (("guidance", guidance), ("rescale", rescale), ("eta", eta)):
        if value is not None and not math.isfinite(value):
            raise UserError(f"{name}: got {value}; a finite number is needed")
    known("sampler", sampler, tuple(NAMES))
    known("spacing", spacing, SPACINGS)
    known("precision", precision, PRECISIONS)
    known("guidance_curve", guidance_curve, tuple(CURVES))
    margins = margins_of(outpaint, old)
    passes = hires_of(hires, hires_strength, init or invert, old)
    edited = guided_by(classifier, classifier_scale, old) | edits_asked(init, strength, mask, invert, source, margins, size, old)
    if variation_strength is not None and not variations:
        raise UserError(f"variation_strength: got {variation_strength}, but no variations; give --variations 4")
    if best > 1 and (variations or not judge):
        fix = "not together with --variations" if variations else "who chooses? Give --judge own, scenes or the FOLDER of a CLIP"
        raise UserError(f"best: {fix}")
    if low_memory and (lora or embedding or old.get("loras") or old.get("embeddings")):
        raise UserError("low_memory: not together with --lora or --embedding, as weights are read again; leave one of them out")
    avoided = writable(old.get("negative", "") if negative is None else negative).replace("\0", " ")
    folder = model_for(model)
    out.mkdir(parents=True, exist_ok=True)
    if grid is not None:
        grid.parent.mkdir(parents=True, exist_ok=True)

    from ldm.distributed.processes import processes
    from ldm.families.registry import open_finished
    from ldm.sampling import jobs
    from ldm.sampling.adapters import add
    from ldm.sampling.init_images import init_image_of
    from ldm.sampling.judges import judge_of
    from ldm.sampling.picture_files import free, present, read_pixels, save_sheet
    from ldm.sampling.safety import SafetyFilter
    from ldm.sampling.writing import Writer, to_json

    team = processes(cpu=device == "cpu")
    place = device_for(device, team.local)
    choose = judge_of(judge, folder, place) if best > 1 else None
    # As many threads as torch finds by itself: a number found by timing would change the last bits from run to run.
    if low_memory:
        return_blocks()
    family = open_finished(folder, place, low_memory)
    added = add(family, lora or [], embedding or [], old, tell)
    # Noise that a picture comes from without guidance gives it back without guidance, too.
    usual = {"guidance": 1.0, "sampler": "ddim"} if invert else {}
    own = Wanted(steps=steps, guidance=guidance, rescale=rescale, sampler=sampler, spacing=spacing, eta=eta, precision=precision)
    chosen = replace(own, guidance_curve=guidance_curve).over({**usual, **old, **interval})
    running = Running(attention=attention, compiled=compiled, low_memory=low_memory, tile=tile)
    family.ready(Path(folder), running, family.settings(chosen).precision)
    rest: dict[str, Any] = {"model": name_of(folder), "model_hash": family.content_hash, **passes, **edited, **added}
    rest["notation"] = not literal and bool(old.get("notation", True))
    rest["mark"] = old.get("mark", "") if mark is None else mark
    if old.get("model_hash", family.content_hash) != family.content_hash:
        tell(f"{recipe} was made by the model {old['model']}, not by {folder}: the picture will differ")
    rest |= {name: old[name] for name in ("to", "share", "variation", "variation_seed") if name in old}
    if variations:
        rest |= {"variation": 0.2 if variation_strength is None else variation_strength}
    guide = None
    if classifier is not None:
        guide = family.guide(classifier)
        if old.get("classifier") not in (None, "", guide.hash):
            tell(f"classifier: {classifier} is not the file that the recipe was made with: the picture will differ")
        rest["classifier"] = guide.hash
    init_image, picture = None, init or invert
    if picture is not None:
        if sizes := [one for one in wanted if one.width or one.height]:
            raise UserError(f"init: the prompt {sizes[0].prompt[:40]!r} has a size of its own; leave out --w and --h, or use --size")
        init_image = init_image_of(picture, mask, margins, shape or family.defaults["size"], old, tell)
        shape = init_image.size
        rest |= {"init": init_image.init_hash, "mask": init_image.mask_hash}
    each = (len(own_seeds) if own_seeds else n) * max(1, variations)  # of a prompt
    candidates = [number + k for number in own_seeds for k in range(best)] if own_seeds else None
    common = jobs.Common(
        seeds=candidates, seed=start, n=n * best, wanted=chosen, negative=avoided, size=shape, variations=variations, rest=rest
    )
    made = jobs.recipes(family, wanted, common)
    for text in dict.fromkeys(text for one in made for text in (one.prompt, one.negative, one.to, one.source)):
        tell_overlong(family, text, rest["notation"])
    if rest["mark"]:
        from ldm.sampling.watermark import check

        for one in made:
            check(rest["mark"], (one.height, one.width))
    if resume and (kept := present(out)):
        groups = [made[i : i + best] for i in range(0, len(made), best)]
        missing = [group for group in groups if not any(one in kept for one in group)]
        tell(f"{len(groups) - len(missing)} of {len(groups)} pictures are in {out} already")
        made = [one for group in missing for one in group]
    first = free(out)
    team.wait()  # so that all find the same files there

    started = time.monotonic()
    writer = Writer(
        out=out,
        first=first,
        batch=batch,
        best=best,
        judge=choose,
        safety=None if safety is None else SafetyFilter.load(safety, place),
        classifier=guide,
        save_steps=save_steps,
        tell=tell,
        told=to_json if as_json else lambda told: None,
        processes=team,
    )
    paths = writer.write(family, made, init_image)
    if team.rank == 0:
        if grid is not None and paths:
            columns = each if each > 1 or len(wanted) > 8 else min(len(wanted), 8)
            save_sheet([read_pixels(paths[number]) for number in sorted(paths)], grid, columns)
        where = f"{out}/{f', all on {grid}' if grid else ''}"
        said = f"{len(paths)} picture{'s' * (len(paths) != 1)} of {folder} in {time.monotonic() - started:.1f} s: {where}"
        print(said, file=sys.stderr)
    return 0
