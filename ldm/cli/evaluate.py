"""The evaluate verb: prompt adherence, reconstruction and Fréchet distance of a model, with their protocol."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from ldm.cli.command import call
from ldm.cli.given import no_data
from ldm.cli.models import model_for
from ldm.config import terminal
from ldm.config.errors import UserError
from ldm.config.files import at_home
from ldm.config.options import Given, option
from ldm.families.draws import OWN, Wanted
from ldm.runs.evaluation import measure
from ldm.runs.neighbours_page import neighbours_page
from ldm.runs.tradeoff import check, write
from ldm.sampling.request import Device, SamplerOptions


def main(words: Sequence[str]) -> int:
    """`ldm evaluate MODEL`: the exit code."""
    return call(evaluate, words, "ldm evaluate")


TIERS = ("one", "T0", "T1", "T2", "T3")  # as ldm.data.scenes.spec has them, which loads numpy and torch
LEARNED = 10_000  # training scenes that neighbours are looked for among
SHOWN = 64  # pictures on the page of neighbours, at most
FEATURES = "inception=FILE, timm/MODEL=FILE, own for the CLIP of the model's run, or the FOLDER of a vision model of transformers"


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """Measurement: of what model, on what, how often."""

    model: tuple[str, ...] = option(
        (), "Folders or files of models, or owner/name on the hub; several share one plot.", argument=True, given=Given.MODEL
    )
    on: str = option("scenes", "What to measure on: scenes, or captioned images: a folder, tar shards, parquet.")
    tier: str | None = option(None, "Of the scenes: one T0 T1 T2 T3; default: T0.")
    n: int | None = option(None, "Prompts of scenes: half with seen colour-shape pairs, half with held-out ones; default: 200.", low=2)
    seed: int = option(0, "Of prompts and pictures.", low=0)
    guidance: str = option("", "Guidance scales to compare, such as 1,2,3,5; default: the model's.")
    abilities: int = option(0, "Prompts of scenes for each ability, such as a place, two colours, an unseen pair; 0: none.", low=0)
    diversity: int = option(0, "Prompts of scenes of one object of which 8 pictures each are compared with each other; 0: none.", low=0)
    completion: int = option(0, "Images of which the upper half is shown and the lower is drawn; 0: none.", low=0)
    split: str = option(
        "val", "Part of the data that reconstruction, Fréchet distance and CLIP score take: val, train, or all of a folder."
    )
    images: int = option(256, "Images for reconstruction and Fréchet distance.", low=4)
    features: str = option("", f"What pictures are compared by: {FEATURES}; default: random features.")
    clip: Path | None = option(
        None, "Folder of a CLIP, for the CLIP score and R-precision; own: the CLIP of the model's run.", given=Given.CLIP
    )
    told: int = option(0, "Images whose views a model that reads any is told, and how far what it draws agrees; 0: none.", low=0)
    as_json: Path | None = option(None, "Also write the result to this file.", name="--json")
    pictures: Path | None = option(None, "Folder for example pictures.")
    neighbours: int = option(
        0, "Nearest training pictures of each picture, on a page in the folder of --pictures; 0: none.", low=0, needs="pictures"
    )
    plot: tuple[Path, ...] = option(
        (), "Distance against adherence or CLIP score over the guidance scales, one curve a model: a .png or .svg, or a .html page."
    )

    def check(self) -> None:
        """Refuse what is of scenes alone where something else is measured on.

        Raises:
            UserError: naming the option.
        """
        scales = _numbers(self.guidance)
        if 0 in scales:
            raise UserError("guidance: 0 leaves the prompt out; measure from 1 on, which is no guidance")
        if not self.model:
            raise UserError("model: none; name a folder or file of a model")
        if len(set(self.model)) < len(self.model):
            raise UserError("model: the same is named twice; leave one out")
        if self.features == "own" and len(self.model) > 1:
            raise UserError("features: own is another space for each model, whose figures cannot be compared; measure each by itself")
        if str(self.clip) == "own" and len(self.model) > 1:
            raise UserError("clip: own is another space for each model, whose figures cannot be compared; measure each by itself")
        if self.split not in ("val", "train", "all"):
            raise UserError(f"split: got {self.split}; there are val, train and all")
        if self.split == "all" and (self.on == "scenes" or self.neighbours):
            beside = "--on scenes, which are made by number" if self.on == "scenes" else "--neighbours, which compares with a training part"
            raise UserError(f"split: all cannot be had beside {beside}; give val or train")
        for path in self.plot:
            check(path)
            if len(set(scales)) < 2:
                raise UserError("plot: a curve needs several scales, such as --guidance 1,2,3,5")
            if self.on != "scenes" and self.clip is None:
                raise UserError(f"plot: {self.on} has no prompts that can be read exactly; give --clip FOLDER, whose score is drawn then")
        if len(self.model) > 1 and self.pictures is not None:
            raise UserError("pictures: of one model at a time; leave --pictures out, or measure each by itself")
        if self.on != "scenes" and (said := no_data("on", self.on)):
            raise UserError(said)
        if self.tier not in (None, *TIERS):
            raise UserError(f"tier: got {self.tier!r}; there are {', '.join(TIERS)}")
        if self.features:
            _features(self.features, self.model[0])
        of_scenes = {"tier": self.tier, "n": self.n, "abilities": self.abilities or None, "diversity": self.diversity or None}
        for name, value in of_scenes.items():
            if self.on != "scenes" and value is not None:
                raise UserError(f"{name}: is of the prompts of scenes, and changes nothing with --on {self.on}; leave --{name} out")

    def metrics(self, model: str, steps: int, sampler: str) -> list[Any]:
        """What is measured of a model, in order; with so many steps and this sampler, 0 and empty for the model's own."""
        from ldm.config.schema import build
        from ldm.metrics.abilities import Abilities
        from ldm.metrics.adherence import Adherence
        from ldm.metrics.clip_score import ClipScore
        from ldm.metrics.completion import Completion
        from ldm.metrics.distances import Frechet
        from ldm.metrics.diversity import Diversity
        from ldm.metrics.language import Language
        from ldm.metrics.layout import Layout
        from ldm.metrics.neighbours import Neighbours
        from ldm.metrics.reconstruction import Reconstruction
        from ldm.metrics.told import ToldViews
        from ldm.metrics.written import Captions

        found: list[Any] = [
            Reconstruction(images=self.images),
            Captions(images=self.images, seed=self.seed),
            Language(captions=self.images),
        ]
        by = {"features": _features(self.features, model)} if self.features else {}
        for scale in _numbers(self.guidance) or [0.0]:
            drawn = {"images": self.images, "steps": steps, "seed": self.seed, "sampler": sampler, "guidance": scale}
            found.append(build({"kind": "frechet", **drawn, **by}, Frechet, "ldm evaluate"))
            if self.clip is not None:
                path = model if str(self.clip) == "own" else str(self.clip)
                found.append(build({"kind": "clip_score", "path": path, **drawn}, ClipScore, "ldm evaluate"))
        if self.told:
            own = {"images": self.told, "steps": steps, "seed": self.seed, "sampler": sampler}
            found.append(build({"kind": "told", **own, "guidance": next(iter(_numbers(self.guidance)), 0.0)}, ToldViews, "ldm evaluate"))
        if self.completion:
            own = {"images": self.completion, "steps": steps, "seed": self.seed, "sampler": sampler}
            own |= {"guidance": next(iter(_numbers(self.guidance)), 0.0)}
            found.append(build({"kind": "completion", **own}, Completion, "ldm evaluate"))
        if self.neighbours:
            shown: dict[str, Any] = {"images": min(self.images, SHOWN), "nearest": self.neighbours, "steps": steps, "seed": self.seed}
            shown |= {"sampler": sampler, "guidance": next(iter(_numbers(self.guidance)), 0.0)}
            seen = by or ({"features": {"kind": "own", "path": model}} if _has_own(model) else {})
            found.append(build({"kind": "neighbours", **shown, **seen}, Neighbours, "ldm evaluate"))
        if self.on == "scenes":
            own = {"tier": self.tier or "T0", "prompts": max(1, (self.n or 200) // 2), "guidance": _numbers(self.guidance)}
            own |= {"steps": steps, "sampler": sampler, "seed": self.seed}
            found.insert(0, build({"kind": "adherence", **own}, Adherence, "ldm evaluate"))
            asked = {"tier": own["tier"], "prompts": own["prompts"], "seed": self.seed}
            found.append(build({"kind": "layout", **asked}, Layout, "ldm evaluate"))
            for place, scale in enumerate(_numbers(self.guidance) or [0.0], 1) if self.abilities else ():
                own |= {"prompts": self.abilities, "guidance": scale}
                found.insert(place, build({"kind": "abilities", **own}, Abilities, "ldm evaluate"))
            if self.diversity:
                own |= {"prompts": self.diversity, "guidance": next(iter(_numbers(self.guidance)), 0.0)}
                found.append(build({"kind": "diversity", **own}, Diversity, "ldm evaluate"))
        return found


@dataclass(frozen=True, kw_only=True)
class Drawn(SamplerOptions):
    """Sampler: how pictures are drawn where that is not the model's own way."""

    guidance: float | None = None  # Measurement has several

    def other(self) -> Wanted:
        """What is asked for beside steps and sampler, which the metrics have."""
        self.check()
        told = {f.name: getattr(self, f.name) for f in fields(Wanted) if f.name not in ("steps", "sampler")}
        return Wanted(**(told | self.interval()))


def evaluate(wanted: Measurement, drawn: Drawn, device: Device) -> int:
    """Measure prompt adherence, reconstruction and Fréchet distance of a model, with the protocol beside every figure."""
    wanted = replace(wanted, model=tuple(map(model_for, wanted.model)))
    wanted.check()
    other = drawn.other()
    for name, path in (("json", wanted.as_json), *(("plot", path) for path in wanted.plot)):
        if path is not None:
            _make_room(name, path)  # before the work, which may take hours
    from ldm.cli.models import best_device
    from ldm.config.schema import build
    from ldm.config.version import __version__
    from ldm.data.check import source_at
    from ldm.data.scenes.source import ScenesSource
    from ldm.distributed.environment import calibrate
    from ldm.families.registry import open_finished
    from ldm.metrics.evaluator import check_weights
    from ldm.training.log import Log

    calibrate()
    metrics = {name: wanted.metrics(name, drawn.steps or 0, drawn.sampler or "") for name in wanted.model}
    for each in metrics.values():
        check_weights(each)
    if wanted.on == "scenes":
        trained = max(2 * wanted.images, LEARNED if wanted.neighbours else 0)
        asked = {
            "kind": "scenes",
            "tier": wanted.tier or "T0",
            "val": max(2 * wanted.images, wanted.completion, wanted.told),
            "images": trained,
        }
        source: Any = build(asked, ScenesSource, "--tier")
    else:
        source = source_at(wanted.on)
    data = replace(source, val_share=0).build("train") if wanted.split == "all" else source.build(wanted.split)
    log = Log(Path("."), console=True, write=False)
    results: dict[str, dict[str, Any]] = {}
    for name in wanted.model:
        family = open_finished(name, device.device or best_device())
        if other != OWN:
            if "sample" not in family.able:
                names = ", ".join(f.name for f in fields(Wanted) if getattr(other, f.name) is not None)
                raise UserError(f"{names}: {name}, a model of kind {family.kind}, draws no pictures; leave it out")
            family.settings(replace(other, sampler=drawn.sampler))  # what it has not is refused before anything is measured
        chosen = [metric for metric in metrics[name] if metric.asks in family.able]
        if "sample" in family.able and not family.reads_prompts and not family.told:
            asked_for = {"n": wanted.n, "abilities": wanted.abilities, "diversity": wanted.diversity, "clip": wanted.clip}
            if option := next((option for option, value in asked_for.items() if value), ""):
                raise UserError(f"{option}: is of prompts, and {name} reads no words; leave --{option} out")
            chosen = [metric for metric in chosen if not getattr(metric, "of_prompts", False)]
            print(f"{terminal.shown(name)} reads no words: whether it follows prompts is not measured", file=sys.stderr)
        unable = [metric for metric in metrics[name] if metric not in chosen and getattr(wanted, metric.kind, False)]
        if unable:  # which was asked for by name
            kind = unable[0].kind
            raise UserError(f"{kind}: {name}, a model of kind {family.kind}, cannot {unable[0].asks}; leave --{kind} out")
        if not chosen:
            raise UserError(
                f"{name}: a model of kind {family.kind} has nothing that is measured here; an evaluate stage of its run measures it"
            )
        with log.stage("evaluate", 0, 0) as progress:
            found = measure(
                family,
                chosen,
                data=data,
                resolution=family.defaults["size"][0],
                seed=wanted.seed,
                pictures=wanted.pictures,
                progress=progress.progress,
                train=source.build("train") if wanted.neighbours else None,
                asked=other,
            )
        about = {"model": name, "model_hash": family.content_hash, "version": __version__, "on": wanted.on}
        results[name] = {**about, **({"split": wanted.split} if wanted.split != "val" else {}), **found}
        if len(wanted.model) > 1:
            print(terminal.shown(name))
        table(results[name])
    if wanted.as_json is not None:
        told = list(results.values())
        wanted.as_json.write_text(json.dumps(told[0] if len(told) == 1 else {"models": told}, indent=1))
        print(f"written to {wanted.as_json}", file=sys.stderr)
    if wanted.pictures is not None and wanted.neighbours:
        print(f"written to {neighbours_page(wanted.pictures, results[wanted.model[0]])}", file=sys.stderr)
    for path in wanted.plot:
        write(path, results)
        print(f"written to {path}", file=sys.stderr)
    return 0


def _make_room(name: str, path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--{name} {path}: {error.strerror}; name a file that can be written") from None
    if path.is_dir():
        raise UserError(f"--{name} {path}: is a folder; name a file in it, such as {path / 'result'}{path.suffix or '.json'}")


def _has_own(model: str) -> bool:
    """Whether a model has a CLIP of its own run."""
    from ldm.formats.model_folder import own_clip, root_of

    return own_clip(root_of(model, note=lambda text: None)) is not None


def _features(text: str, model: str) -> dict[str, str]:
    """`inception=FILE`, `timm/MODEL=FILE`, `own` or a folder, as a configuration says it."""
    if text == "own":
        return {"kind": "own", "path": model}
    name, equals, file = text.partition("=")
    if not equals:
        if not (at_home(text) / "config.json").is_file():
            raise UserError(f"features: {text} has no config.json; a folder is needed as save_pretrained writes it")
        return {"kind": "transformers", "path": text}
    kind, _, model = name.partition("/")
    if kind not in ("inception", "timm") or (kind == "timm") != bool(model):
        raise UserError(f"features: got {text!r}; give {FEATURES}")
    return {"kind": kind, "weights": file} | ({"model": model} if model else {})


def _numbers(text: str) -> list[float]:
    try:
        found = [float(word) for word in text.split(",")] if text else []
    except ValueError:
        found = [math.nan]
    if not all(map(math.isfinite, found)) or len({*found}) < len(found):
        raise UserError(f"guidance: got {text!r}; write numbers with commas, each once, such as 1,2,3,5")
    return found


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
        for pairs, outlines in found["shapes"].items():
            if outlines:
                of = "perfect pictures" if pairs == "ideal" else f"{pairs.replace('_', '-')} pairs"
                console.print(f"overlap with the ideal shape, {of}: median {outlines['iou']:.3f}, 5 % worst {outlines['iou_worst']:.3f}")
    for found in (values for name, values in result.items() if name.startswith("abilities")):
        shares = ", ".join(f"{name.replace('_', ' ')} {found[name]:.2f}" for name in ("mean", *found["by_ability"]))
        console.print(f"abilities{_scale(found)}, {found['protocol']['prompts']} prompts each: {shares}")
    if "diversity" in result:
        found = result["diversity"]
        many = found["protocol"]["pictures"]
        told = f"{found['drawn']:.4f}, of true ones {found['real']:.4f}: a share of {found['share']:.2f}"
        console.print(f"diversity, mean difference of {many} pictures of one prompt: {told}")
    if "reconstruction" in result:
        numbers = {k: v for k, v in result["reconstruction"].items() if isinstance(v, float | int)}
        console.print("reconstruction: " + ", ".join(f"{name} {value:.3f}" for name, value in numbers.items()))
    for name in ("captions", "language", "layout", "completion"):
        if name in result:
            console.print(f"{name}: " + ", ".join(f"{k} {v:.3f}" for k, v in result[name].items() if isinstance(v, float)))
    for name, found in result.items():
        if name.startswith("frechet"):
            console.print(_distances(found))
        elif name.startswith("neighbours") and "skipped" not in found:
            console.print(_neighbours(found))
        elif name.startswith("clip_score"):
            told = found["protocol"]
            console.print(f"CLIP score{_scale(found)} {found['score']:.2f}; of the real images {found['real']:.2f} ({told['clip']})")
            likest = f"own caption the likest of {told['captions']}: {found['retrieval']:.1%}"
            console.print(f"{likest}; of the real images {found['retrieval_real']:.1%}")


def _scale(found: dict[str, Any]) -> str:
    return f" at guidance {found['protocol']['guidance']:g}"


def _neighbours(found: dict[str, Any]) -> str:
    told = f"nearest of {found['protocol']['among']:,} training pictures: cosine distance {found['distance']:.4f} (median; least"
    told += f" {found['closest']:.4f}), of held-out pictures {found['held_out']:.4f} ({found['closest_held_out']:.4f})"
    by_chance = "are nearer than 95 % of held-out pictures, 5 % would be by chance"
    return f"{told}; {found['closer']:.0%} {by_chance} ({found['protocol']['features']})"


def _distances(found: dict[str, Any]) -> str:
    if "skipped" in found:
        return f"fréchet distance: not measured, {terminal.shown(found['skipped'])}"
    told = f"fréchet distance{_scale(found)} {found['distance']:.2f}; between real images {found['real_real_floor']:.2f}"
    told += f" ({found['protocol']['images']} images, {found['protocol']['features']})"
    if "kernel" in found:
        shares = "".join(f", {name} {found[name]:.3f}" for name in ("precision", "recall") if name in found)
        told += f"; kernel {found['kernel']:.5f} ({found['kernel_floor']:.5f}), gaussian {found['gaussian']:.3f}{shares}"
    return told
