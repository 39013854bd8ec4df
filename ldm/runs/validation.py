"""What is wrong between the fields of a run, told before any work."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from ldm.data.buckets import wrong_step
from ldm.data.sources import ScenesSource
from ldm.families.autoencoder import KL, VQ
from ldm.runs.pretrained import problems, roles
from ldm.runs.stage_graph import kept_cache, needs
from ldm.runs.stages import Encode, Evaluate, Export
from ldm.training.settings import Train

if TYPE_CHECKING:
    from ldm.runs.run import Run


def contradictions(run: Run) -> Iterator[str]:
    """What is wrong between fields, before any work."""
    if not run.stages:
        yield "stages: none; a run needs at least one"
    if run.prior is not None and run.prior.prompts and not run.init:
        yield "prior.prompts: the base model draws them; name it by init, or give prior.path"
    begun = list(problems(run))
    yield from begun
    if begun:
        return
    given = roles(run)
    trained: dict[str, str] = {}  # the families made so far, and by which stage
    encoded: dict[str, Encode] = {}
    own = isinstance(run.autoencoder, KL | VQ) and "autoencoder" not in given
    factor = 2 ** (len(run.autoencoder.network.channels) - 1) if own else 1  # type: ignore[union-attr]
    for name, stage in run.stages.items():
        where = f"stages.{name}"
        if not name or set(name) & set("/\\. ") or name.startswith("-"):
            yield f"{where}: a stage's name becomes a folder; use letters, digits, - and _"
        for needed in needs(run, stage):
            if needed not in trained and (needed not in given or needed == "diffusion"):
                yield f"{where}: needs a stage before it that trains {needed} (kind: train, family: {needed})"
        sides = (stage.resolution, *stage.also) if isinstance(stage, Train) else (stage.resolution,) if isinstance(stage, Encode) else ()
        for side in sides:
            if side % factor:
                yield f"{where}.resolution: got {side}; the autoencoder needs a multiple of {factor}"
        if isinstance(stage, Train | Encode) and stage.buckets:
            yield from wrong_step(stage.buckets, stage.resolution, factor, f"{where}.buckets")
        if isinstance(stage, Train):
            if stage.buckets:
                yield from _shapeless(stage, where)
            if stage.exact and (stage.family == "text" or (stage.family == "autoencoder" and isinstance(run.autoencoder, VQ))):
                why = "pairs of the whole batch" if stage.family == "text" else "codes of the whole batch"
                yield f"{where}.exact: this family learns from {why}, which depend on how many processes there are; leave it out"
            if stage.latents:
                cache = encoded.get(stage.latents)
                if cache is None:
                    if not kept_cache(stage):  # one that ldm data encode made says itself what it holds
                        yield f"{where}.latents: {stage.latents!r} is no encode stage before this one, and no path, which has a slash"
                elif cache.resolution != stage.resolution:
                    yield f"{where}.latents: {stage.latents} holds {cache.resolution} px, the stage wants {stage.resolution}"
                elif stage.flip and not cache.flip and not isinstance(run.data, ScenesSource):
                    yield f"{where}.flip: {stage.latents} holds no mirrored latents; set stages.{stage.latents}.flip=true too"
                elif _shapes(stage) != _shapes(cache):
                    yield f"{where}.buckets: {stage.latents} is encoded otherwise; set stages.{stage.latents}.buckets alike"
                if stage.also:
                    yield f"{where}.also: cached latents have one resolution"
                if stage.family != "diffusion":
                    yield f"{where}.latents: only family: diffusion reads latents"
                if stage.filter.wants():
                    yield f"{where}.filter: the stage reads cached latents; write stages.{stage.latents}.filter instead"
            if stage.carry != "averages":
                yield from _uncarried(run, stage, trained, where)
            if stage.checkpointing is not None and stage.family == "text":
                yield f"{where}.checkpointing: family: text has none; leave it out"
            if stage.caption_dropout is not None and stage.family != "diffusion":
                yield f"{where}.caption_dropout: only family: diffusion drops captions"
            network = run.diffusion.network
            if stage.family == "diffusion" and run.diffusion.inpaint is None and network.in_channels == 2 * network.out_channels + 1:
                yield f"diffusion.network: has {network.in_channels} input channels, as for inpainting; set diffusion.inpaint={{}} too"
            if stage.family == "diffusion" and stage.latents and run.diffusion.inpaint is not None:
                yield f"{where}.latents: diffusion.inpaint hides parts of pictures, which cached latents do not have; leave latents out"
            if stage.family == "diffusion" and run.diffusion.adapt is not None:
                if "diffusion" not in given:
                    yield "diffusion.adapt: there is no model to adapt; give one by init, or leave adapt out"
                elif "diffusion" in trained:
                    yield f"{where}: stages.{trained['diffusion']} has learned what diffusion.adapt names; give that one more images"
            trained[stage.family] = name
        elif isinstance(stage, Encode):
            encoded[name] = stage
        elif stage.of or isinstance(stage, Evaluate):
            of = run.stages.get(stage.of)
            before = stage.of in list(run.stages)[: list(run.stages).index(name)]
            allowed = ("diffusion",) if isinstance(stage, Export) else ("autoencoder", "diffusion")
            if not isinstance(of, Train) or of.family not in allowed or not before:
                yield f"{where}.of: {stage.of!r} is no earlier train stage of {' or '.join(allowed)}"
            if isinstance(stage, Evaluate):
                yield from _unmeasured(run, stage, where)


def _shapes(stage: Train | Encode) -> list[tuple[int, int]]:
    return stage.buckets.shapes(stage.resolution) if stage.buckets else []


def _shapeless(stage: Train, where: str) -> Iterator[str]:
    """Why a stage cannot have buckets."""
    if stage.family == "text":
        yield f"{where}.buckets: family: text reads squares"
    if stage.also:
        yield f"{where}.buckets: also (further resolutions) cannot be had beside it"


def _uncarried(run: Run, stage: Train, trained: Mapping[str, str], where: str) -> Iterator[str]:
    """Why a stage cannot begin with what another one had at its end."""
    before = run.stages.get(trained.get(stage.family, ""))
    if not isinstance(before, Train):
        yield f"{where}.carry: no stage before it trains {stage.family}, so there is nothing to carry on; leave it out"
        return
    name = trained[stage.family]
    if stage.ema and not before.ema:
        yield f"{where}.carry: stages.{name} has no averages (ema: 0) to carry on; set ema there, or 0 here"
    if stage.carry == "all" and stage.optim.kind != before.optim.kind:
        kinds = f"{stage.optim.kind} cannot take over the state of stages.{name}'s {before.optim.kind}"
        yield f"{where}.carry: {kinds}; set carry=weights, or the same optim.kind"


def _unmeasured(run: Run, stage: Evaluate, where: str) -> Iterator[str]:
    """Required values that none of the stage's metrics will give."""
    scenes = isinstance(run.data, ScenesSource)
    given = {f"{m.kind}.{name}" for m in stage.metrics for name in m.names(scenes)}
    for path in stage.require:
        kind, _, name = path.partition(".")
        if f"{kind.rstrip('_0123456789')}.{name}" not in given:
            yield f"{where}.require: {path} is not measured here; there are {', '.join(sorted(given))}"
