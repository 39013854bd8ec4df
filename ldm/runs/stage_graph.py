"""Which stage of a run reads what: of earlier stages, and of the parts from elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ldm.runs.pretrained import roles
from ldm.runs.stages import Encode, Evaluate, Export, Stage
from ldm.training.settings import Train

if TYPE_CHECKING:
    from ldm.runs.run import Run


def needs(run: Run, stage: Stage) -> tuple[str, ...]:
    """The families that a stage reads, by their field's name."""
    if isinstance(stage, Train):
        return run.family(stage.family).inputs()
    if isinstance(stage, Encode):
        return ("autoencoder",)
    of = run.stages.get(stage.of)
    if isinstance(stage, Evaluate) and isinstance(of, Train) and of.family == "autoencoder":
        return ("autoencoder",)
    return ("text", "autoencoder", "diffusion")


def inputs_of(run: Run, name: str) -> dict[str, str]:
    """The earlier stages whose products a stage reads: by role, the stage's name."""
    latest, stage = latest_of(run, name), run.stages[name]
    found = {family: latest[family] for family in needs(run, stage) if family in latest}
    if isinstance(stage, Train):
        if stage.family in latest:
            found["init"] = latest[stage.family]
        if stage.latents and not kept_cache(stage):
            found["latents"] = stage.latents
    elif isinstance(stage, Evaluate | Export) and stage.of:
        found[run.stages[stage.of].family] = stage.of  # type: ignore[union-attr]
    return found


def carried_from(run: Run, name: str) -> str:
    """The earlier stage whose state at its end a stage begins with; empty: none."""
    stage = run.stages[name]
    return latest_of(run, name)[stage.family] if isinstance(stage, Train) and stage.carry != "averages" else ""


def carried_on(run: Run, name: str) -> bool:
    """Whether a later stage begins with what this one has at its end, so that it must be kept."""
    return name in (carried_from(run, other) for other in run.stages)


def kept_cache(stage: Train) -> Path | None:
    """The latent cache that a stage reads from elsewhere, as `ldm data encode` made it; None: none, or an encode stage's."""
    return Path(stage.latents).expanduser() if "/" in stage.latents else None


def latest_of(run: Run, name: str) -> dict[str, str]:
    """By family, the last stage before this one that trains it."""
    before = dict(list(run.stages.items())[: list(run.stages).index(name)])
    return {stage.family: other for other, stage in before.items() if isinstance(stage, Train)}


def given_of(run: Run, name: str) -> dict[str, str]:
    """What a stage reads of the parts from elsewhere: by role, the part's family."""
    latest, stage, given = latest_of(run, name), run.stages[name], roles(run)
    found = {family: family for family in needs(run, stage) if family in given and family not in latest}
    if isinstance(stage, Train) and stage.family in given and stage.family not in latest:
        found["init"] = stage.family
    return found
