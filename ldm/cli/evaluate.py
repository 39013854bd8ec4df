"""The evaluate verb: measures a model and prints the figures with their protocol."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from ldm.cli.command import call
from ldm.config.errors import UserError
from ldm.runs.evaluation import measure


def main(words: Sequence[str]) -> int:
    """`ldm evaluate MODEL`: the exit code."""
    return call(evaluate, words, "ldm evaluate")


Option = typer.Option


def evaluate(
    model: Annotated[str, typer.Argument(help="A folder or file of a model, or owner/name on the hub.")],
    on: Annotated[str, Option(help="What to measure on: scenes, or captioned images: a folder, tar shards, parquet.")] = "scenes",
    tier: Annotated[str, Option(help="Of the scenes: one T0 T1 T2 T3.")] = "T0",
    n: Annotated[int, Option(min=2, help="Prompts: half with seen colour-shape pairs, half with held-out ones.")] = 200,
    seed: Annotated[int, Option(min=0, help="Of prompts and pictures.")] = 0,
    guidance: Annotated[str, Option(help="Guidance scales to compare, such as 1,2,3,5; default: the model's.")] = "",
    steps: Annotated[int, Option(min=0, help="Denoising steps; 0: the model's.")] = 0,
    sampler: Annotated[str, Option(help="Default: the model's.")] = "",
    images: Annotated[int, Option(min=4, help="Images for reconstruction and Fréchet distance.")] = 256,
    as_json: Annotated[Path | None, Option("--json", help="Also write the result to this file.")] = None,
    pictures: Annotated[Path | None, Option(help="Folder for example pictures.")] = None,
    device: Annotated[str, Option(help="cuda, mps or cpu; default: the best there is.")] = "",
) -> int:
    """Measure prompt adherence, reconstruction and Fréchet distance of a model, with the protocol beside every figure."""
    scales = _numbers(guidance)
    if as_json is not None:
        _make_room(as_json)  # before the work, which may take hours
    from ldm.cli.sampling_options import best_device
    from ldm.config.schema import build
    from ldm.config.version import __version__
    from ldm.data.check import source_at
    from ldm.data.scenes.source import ScenesSource
    from ldm.distributed.environment import calibrate
    from ldm.families.registry import open_finished
    from ldm.metrics.evaluator import Adherence, Frechet, Reconstruction
    from ldm.training.log import Log

    calibrate()
    if on == "scenes":
        source: Any = build({"kind": "scenes", "tier": tier, "val": 2 * images}, ScenesSource, "--tier")
    else:
        source = source_at(on)
    family = open_finished(model, device or best_device())
    metrics: list[Any] = [Reconstruction(images=images), Frechet(images=images, steps=steps, seed=seed)]
    if on == "scenes":
        own = {"tier": tier, "prompts": max(1, n // 2), "guidance": scales, "steps": steps, "sampler": sampler, "seed": seed}
        metrics.insert(0, build({"kind": "adherence", **own}, Adherence, "ldm evaluate"))
    log = Log(Path("."), console=True, write=False)
    with log.stage("evaluate", 0, 0) as progress:
        found = measure(
            family,
            metrics,
            data=source.build("val"),
            resolution=family.defaults["size"][0],
            seed=seed,
            pictures=pictures,
            progress=progress.progress,
        )
    result = {"model": model, "model_hash": family.content_hash, "version": __version__, "on": on, **found}
    table(result)
    if as_json is not None:
        as_json.write_text(json.dumps(result, indent=1))
        print(f"written to {as_json}", file=sys.stderr)
    return 0


def _make_room(path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--json {path}: {error.strerror}; name a file that can be written") from None
    if path.is_dir():
        raise UserError(f"--json {path}: is a folder; name a file in it, such as {path / 'result.json'}")


def _numbers(text: str) -> list[float]:
    try:
        return [float(word) for word in text.split(",") if word.strip()]
    except ValueError:
        raise UserError(f"guidance: got {text!r}; write numbers with commas, such as 1,2,3,5") from None


def table(result: dict[str, Any]) -> None:
    """Print what was measured."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    if not console.is_terminal:
        console.width = 140  # a file or a pipe needs no lines broken
    if "adherence" in result:
        found = result["adherence"]
        protocol = found["protocol"]
        shown = Table(title=f"adherence, tier {protocol['tier']}, {protocol['prompts']} seen and {protocol['prompts']} held-out prompts")
        names = [name for name in ("bind", "strict", "colour", "shape", "size", "cell", "rel", "count", "tone") if name in found["seen"]]
        for column in ("guidance", "pairs", *names):
            shown.add_column(column, justify="left" if column == "pairs" else "right", no_wrap=True)
        for scale, groups in found["intervals"].items():
            for pairs, values in groups.items():
                cells = [
                    f"{values[k]['mean']:.3f} [{values[k]['low']:.2f}, {values[k]['high']:.2f}]"
                    if k == "bind"
                    else f"{values[k]['mean']:.3f}"
                    for k in names
                ]
                shown.add_row(scale, pairs, *cells)
        console.print(shown)
        best = found["checker"]
        console.print(f"the checker on perfect pictures: bind {best['seen']:.3f} seen, {best['held_out']:.3f} held-out")
    if "reconstruction" in result:
        numbers = {k: v for k, v in result["reconstruction"].items() if isinstance(v, float | int)}
        console.print("reconstruction: " + ", ".join(f"{name} {value:.3f}" for name, value in numbers.items()))
    if "skipped" in result.get("frechet", {}):
        console.print(f"fréchet distance: not measured, {result['frechet']['skipped']}")
    elif "frechet" in result:
        found = result["frechet"]
        console.print(
            f"fréchet distance {found['distance']:.2f}; between real images {found['real_real_floor']:.2f}"
            f" ({found['protocol']['images']} images)"
        )
