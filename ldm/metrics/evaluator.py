"""Evaluators: the metrics a stage or `ldm evaluate` can compute, each a configuration that runs on a model."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from ldm.config.errors import UserError
from ldm.config.schema import BY_KIND, Count, NonNegative, Positive, config
from ldm.data.dataset import DataSet
from ldm.data.dataset import asked as viewed
from ldm.data.pictures import save_grid, to_uint8
from ldm.data.scenes import grammar, marks
from ldm.data.scenes.captions import Target, say
from ldm.data.scenes.checker import WORK, read
from ldm.data.scenes.render import render, to_bytes
from ldm.data.scenes.source import Scenes, prompts
from ldm.data.scenes.spec import TierName, pairs_of
from ldm.data.scenes.views import KINDS
from ldm.data.unpaired import OTHER
from ldm.diffusion.batch import rows
from ldm.families.draws import OWN, Wanted
from ldm.formats.records import Damaged, read_object
from ldm.metrics import abilities, adherence, completion, diversity, frechet, grounding, shapes, told, translation, written
from ldm.metrics.extractors import BATCH, Features, RandomFeatures, gaussian_distance, kernel_distance, nearest, precision_recall
from ldm.metrics.judges import ClipJudge
from ldm.metrics.reconstruction import psnr, ssim

Values = dict[str, Any]
NEIGHBOURS = 3  # of precision and recall
PROMPTS = "prompts.json"  # beside example pictures: what each grid was asked for, by its name


class Reconstructs(Protocol):
    """A model that knows its autoencoder's pictures."""

    def reconstruct(self, image: Tensor) -> Tensor:
        """The autoencoder's picture of images (B,3,H,W) in [-1,1]."""
        ...


@dataclass(frozen=True)
class Bench:
    """What a measurement may use."""

    model: Any
    data: DataSet | None  # validation images
    resolution: int  # px
    seed: int
    device: torch.device
    pictures: Path | None  # folder for example pictures
    progress: Callable[[int, int, str], None]  # (done, in all, what)
    train: DataSet | None = None  # what the model learned from
    asked: Wanted = OWN  # how pictures are drawn where a metric does not say it
    shown: set[str] = field(default_factory=set)  # names of the pictures written so far
    drawn: dict[Any, Tensor] = field(default_factory=dict)  # the pictures of the last captions, for the next metric that asks for the same

    def real(self, count: int) -> Any:
        """The first validation images, at most `count`."""
        if self.data is None:
            raise UserError("this measurement needs images to compare with: give --on scenes or --on folder")
        index = list(range(min(count, len(self.data))))
        return self.data.load(index, index, self.resolution, 0, False)

    def draw(self, captions: Sequence[str], seed: int, wanted: Wanted, what: str) -> Tensor:
        """Pictures (N,H,W,3) of captions, uint8, with seeds from `seed` on."""
        key = (tuple(captions), seed, wanted)
        if key not in self.drawn:
            seeds = [seed + i for i in range(len(captions))]
            images = self.model.sample(captions, seeds, wanted, on_step=lambda done, total: self.progress(done, total, what))
            self.drawn.clear()
            self.drawn[key] = images
        return self.drawn[key]

    def show(self, name: str, images: Tensor, columns: int, prompts: Sequence[str] = ()) -> None:
        """Write example pictures (N,3,H,W) in [-1,1], and the prompts they answer, where pictures are wanted."""
        if self.pictures is None:
            return
        number = 1
        while (own := name if number == 1 else f"{name}-{number}") in self.shown:
            number += 1
        self.shown.add(own)
        save_grid(images, self.pictures / f"{own}.png", columns)
        if prompts:
            path = self.pictures / PROMPTS
            try:
                known = read_object(path)
            except (OSError, Damaged):
                known = {}
            path.write_text(json.dumps(known | {own: list(prompts)}, indent=1), encoding="utf-8")


def _wanted(bench: Bench, metric: Abilities | Completion | Diversity | Frechet | ClipScore | Neighbours | ToldViews | Grounding) -> Wanted:
    """The sampler settings that a metric asks for; what it leaves at 0 or empty is the model's own."""
    return replace(bench.asked, steps=metric.steps or None, guidance=metric.guidance or None, sampler=metric.sampler or None)


def _used(bench: Bench, wanted: Wanted) -> Values:
    """The settings that pictures were drawn with, for the protocol."""
    used = bench.model.settings(wanted)
    return {"guidance": used.guidance, "steps": used.steps, "sampler": used.sampler, **_told(bench)}


def _told(bench: Bench) -> Values:
    """What else was asked for of drawing, for the protocol."""
    return {name: value for name, value in asdict(bench.asked).items() if value is not None}


def _floats(images: Tensor) -> Tensor:
    return images.permute(0, 3, 1, 2).float() / 127.5 - 1


@config
class Adherence:
    """Whether pictures show what their prompts state, read by the scenes' exact checker."""

    kind: Literal["adherence"] = "adherence"
    tier: TierName  # whose prompts
    prompts: Positive = 100  # with colour-shape pairs seen in training, and as many with held-out pairs
    guidance: tuple[NonNegative, ...] = ()  # guidance scales that are compared; none: the model's own
    steps: Count = 0  # denoising steps; 0: the model's own
    sampler: str = ""  # empty: the model's own
    size: Count = 0  # px; 0: the model's own
    seed: Count = 0  # of prompts and pictures
    pairs: tuple[str, ...] = ()  # as many prompts more with these colour-shape pairs alone, as in [cyan cross, blue ring]: chosen.bind

    asks = "sample"  # of the model

    def __post_init__(self) -> None:
        try:
            pairs_of(self.pairs)
        except ValueError as error:
            raise UserError(f"pairs: {error}") from None

    def names(self, scenes: bool) -> tuple[str, ...]:
        """The plain values of the result."""
        groups = ("seen", "held_out", *(("chosen",) if self.pairs else ()))
        outlines = tuple(f"shapes.{pairs}.{name}" for pairs in (*groups, "ideal") for name in ("iou", "iou_worst"))
        return (*(f"{pairs}.{name}" for pairs in groups for name in adherence.METRICS), *outlines)

    def run(self, bench: Bench) -> Values:
        """Means by attribute and the quality of shapes at the first guidance scale, all with intervals, and the checker's own score."""
        groups = {pairs: prompts(self.tier, self.prompts, self.seed, pairs) for pairs in ("seen", "held-out")}
        if self.pairs:
            groups["chosen"] = prompts(self.tier, self.prompts, self.seed, "seen", self.pairs)
        own = replace(bench.asked, steps=self.steps or None, sampler=self.sampler or None)
        scales = self.guidance or (bench.model.settings().guidance,)
        size = (self.size, self.size) if self.size else None
        intervals: Values = {}
        outlines: Values = {}
        total, done = len(groups) * self.prompts * len(scales), 0
        for scale in scales:
            per_pairs: Values = {}
            for pairs, asked in groups.items():
                seeds = [self.seed * 1_000_003 + i for i in range(len(asked))]

                def on_step(step: int, steps: int, base: int = done, many: int = len(asked), scale: float = scale) -> None:
                    bench.progress(base + many * step // steps, total, f"guidance {scale:g}")

                images = bench.model.sample(asked.text, seeds, replace(own, guidance=scale), size=size, on_step=on_step)
                done += len(asked)
                reading = read(images.numpy())
                scores = adherence.grade(reading, asked.targets)
                per_pairs[pairs] = {name: value.to_dict() for name, value in adherence.summary(scores).items()}
                if scale == scales[0]:
                    outlines[pairs.replace("-", "_")] = shapes.summary(shapes.overlaps(images.numpy(), reading))
                    shown = f"adherence-{pairs}-{images.shape[1]}"  # another size's pictures may stand beside them
                    bench.show(shown, _floats(images[:32]), 8, asked.text[:32])
            intervals[f"{scale:g}"] = per_pairs
        first = intervals[f"{scales[0]:g}"]
        means = {pairs.replace("-", "_"): {k: round(v["mean"], 4) for k, v in found.items()} for pairs, found in first.items()}
        used = bench.model.settings(replace(own, guidance=scales[0]))
        protocol = {
            "tier": self.tier,
            "prompts": self.prompts,
            "guidance": list(scales),
            "steps": used.steps,
            "sampler": used.sampler,
            "spacing": used.spacing,
            "seed": self.seed,
            "size": self.size or bench.model.defaults["size"][0],
            **_told(bench),
            "intervals": "95 % bootstrap over prompts, 1000 resamples",
        }
        best, outlines["ideal"] = self._checker(groups, protocol["size"])
        return {**means, "intervals": intervals, "shapes": outlines, "checker": best, "protocol": protocol}

    def _checker(self, groups: Any, size: int) -> tuple[Values, Values]:
        """The checker's score and the shapes of perfect answers, drawn at the size that is measured: nothing can score more."""
        found, overlaps = {}, []
        for pairs, asked in groups.items():
            images = to_bytes(render(asked.specs, size))
            reading = read(images)
            found[pairs.replace("-", "_")] = round(float(adherence.grade(reading, asked.targets)["bind"].mean()), 4)
            overlaps.append(shapes.overlaps(images, reading))
        return found, dict(shapes.summary(np.concatenate(overlaps)))


@config
class Abilities:
    """Which abilities a model has: prompts of one kind each, every one read by the scenes' exact checker."""

    kind: Literal["abilities"] = "abilities"
    tier: TierName  # whose words and scenes
    prompts: Positive = 24  # of each ability
    guidance: NonNegative = 0.0  # 0: the model's own
    steps: Count = 0  # denoising steps; 0: the model's own
    sampler: str = ""  # empty: the model's own
    size: Count = 0  # px; 0: the model's own
    seed: Count = 0  # of prompts and pictures

    asks = "sample"  # of the model

    def names(self, scenes: bool) -> tuple[str, ...]:
        """The plain values of the result."""
        return ("mean", *abilities.names(self.tier))

    def run(self, bench: Bench) -> Values:
        """The share of prompts whose every stated fact holds, by ability, the mean of them, and intervals."""
        wanted = _wanted(bench, self)
        size = (self.size, self.size) if self.size else None
        groups = abilities.asked(self.tier, self.prompts, self.seed)
        found: Values = {}
        for number, (name, group) in enumerate(groups.items()):

            def on_step(step: int, steps: int, base: int = number * self.prompts, name: str = name) -> None:
                bench.progress(base + self.prompts * step // steps, len(groups) * self.prompts, name.replace("_", " "))

            seeds = [self.seed * 1_000_003 + i for i in range(self.prompts)]
            images = bench.model.sample(group.text, seeds, wanted, size=size, on_step=on_step)
            scores = adherence.score(images.numpy(), group.targets)
            found[name] = adherence.summary({name: scores[group.score]})[name]
            bench.show(f"abilities-{name}-{images.shape[1]}", _floats(images[:8]), 8, group.text[:8])
        used = bench.model.settings(wanted)
        protocol = {"tier": self.tier, "prompts": self.prompts, **_used(bench, wanted)}
        protocol |= {"spacing": used.spacing, "seed": self.seed, "size": self.size or bench.model.defaults["size"][0]}
        shares = {name: round(value.mean, 4) for name, value in found.items()}
        mean = round(sum(shares.values()) / len(shares), 4)
        return {"mean": mean, **shares, "by_ability": {name: value.to_dict() for name, value in found.items()}, "protocol": protocol}


@config
class Diversity:
    """How much pictures of one prompt differ, beside true pictures that the prompt says the same of: what a collapsed generator lacks.

    The differences are mean |differences| of values in [0,1]; `share` is the model's over the true pictures'.
    """

    kind: Literal["diversity"] = "diversity"
    tier: Literal["one", "T0"]  # whose prompts: scenes of one object
    prompts: Positive = 25
    pictures: Positive = 8  # of each prompt, 2 at least
    guidance: NonNegative = 0.0  # 0: the model's own
    steps: Count = 0  # denoising steps; 0: the model's own
    sampler: str = ""  # empty: the model's own
    seed: Count = 0  # of prompts and pictures

    asks = "sample"  # of the model

    def __post_init__(self) -> None:
        if self.pictures < 2:
            raise UserError("pictures: got 1; the pictures of a prompt are compared with each other, so 2 at least are needed")

    def names(self, scenes: bool) -> tuple[str, ...]:
        """The plain values of the result."""
        return ("drawn", "real", "share")

    def run(self, bench: Bench) -> Values:
        """The differences of drawn and of true pictures, and the share."""
        asked, wanted, size = prompts(self.tier, self.prompts, self.seed), _wanted(bench, self), bench.model.defaults["size"]
        text = [one for one in asked.text for _ in range(self.pictures)]
        images = bench.draw(text, self.seed * 1_000_003, wanted, "diversity")
        drawn = diversity.spread(images.unflatten(0, (len(asked), self.pictures)).numpy())
        real = diversity.spread(diversity.alike(asked, self.tier, self.pictures, size[0]))
        bench.show("diversity", _floats(images[: 4 * self.pictures]), self.pictures, asked.text[:4])
        protocol = {"tier": self.tier, "prompts": self.prompts, "pictures": self.pictures, "seed": self.seed, "size": size[0]}
        found = {"drawn": round(drawn, 5), "real": round(real, 5), "share": round(drawn / real, 4)}
        return {**found, "protocol": protocol | _used(bench, wanted)}


@config
class Completion:
    """Whether pictures of held-out images are completed of their upper half alone: what is right of a scene that the half tells.

    Of scenes those count of whose objects a quarter of the height at least is shown; `cut` is `bind` of those of which as much is hidden,
    and `grey` the same where the lower half is filled with grey.
    """

    kind: Literal["completion"] = "completion"
    images: Positive = 200  # validation images
    caption: Literal["empty", "whole"] = "empty"  # what a model that reads prompts is told besides
    guidance: NonNegative = 0.0  # 0: the model's own
    steps: Count = 0  # denoising steps; 0: the model's own
    sampler: str = ""  # empty: the model's own
    seed: Count = 0  # of pictures

    asks = "complete"  # of the model

    def names(self, scenes: bool) -> tuple[str, ...]:
        """The plain values of the result; what the checker reads only on scenes."""
        return ("psnr", *(("bind", "colour", "shape", "cell", "count", "bg", "cut", "grey") if scenes else ()))

    def run(self, bench: Bench) -> Values:
        """PSNR of the hidden half, and means over scenes."""
        size, wanted = bench.model.defaults["size"], _wanted(bench, self)
        real = replace(bench, resolution=size[0]).real(self.images)
        true = to_uint8(real.image)
        count, mask = len(true), completion.hidden(size[0], size[1])
        captions = list(real.caption) if self.caption == "whole" else [""] * count
        made = bench.model.sample(
            captions,
            [self.seed * 1_000_003 + i for i in range(count)],
            wanted,
            size=size,
            edits=bench.model.edits(true, mask),
            on_step=lambda done, total: bench.progress(done, total, "completion"),
        )
        bench.show("completion", _floats(torch.stack([torch.where(mask[..., None], 128, true), made], 1).flatten(0, 1)[:64]), 8)
        found: Values = {"psnr": round(completion.error(made, true), 3)}
        counted = {}
        if isinstance(bench.data, Scenes):
            index = np.arange(count)
            told, cut = completion.tellable(bench.data.specs(index))
            grey = torch.where(mask[..., None], 128, true).to(torch.uint8)
            for name, images, rows in (("", made, told), ("cut", made, cut), ("grey", grey, cut)):
                if not rows.any():
                    raise UserError(f"completion: none of {count} scenes can be told of its upper half; give it more images")
                scores = adherence.summary(adherence.score(images[rows].numpy(), bench.data.targets(index[rows].tolist())))
                if name:
                    found[name] = round(scores["bind"].mean, 4)
                else:
                    found |= {one: round(scores[one].mean, 4) for one in self.names(True) if one in scores}
            counted = {"told": int(told.sum()), "cut": int(cut.sum())}
        return {**found, "protocol": {"images": count, "caption": self.caption, "seed": self.seed, **counted} | _used(bench, wanted)}


@config
class Reconstruction:
    """How faithful the autoencoder is: PSNR, SSIM, Fréchet distance of reconstructions and, on scenes, what the checker reads from them.

    PSNR and SSIM reward the mean of what may have been there; the distance of reconstructions from images (rFID where the
    features are Inception's) is what a discriminator betters.
    """

    kind: Literal["reconstruction"] = "reconstruction"
    images: Positive = 200  # validation images
    size: Count = 0  # px; 0: the stage's own
    features: Features = RandomFeatures()  # what reconstructions and images are compared by

    asks = "reconstruct"  # of the model

    def names(self, scenes: bool) -> tuple[str, ...]:
        """The plain values of the result; what the checker reads only on scenes."""
        return ("psnr", "ssim", "frechet", *((*adherence.METRICS, "iou", "iou_worst") if scenes else ()))

    def run(self, bench: Bench) -> Values:
        """Means over validation images."""
        if self.size:
            bench = replace(bench, resolution=self.size)
        real = bench.real(self.images).image
        made = []
        for start in range(0, len(real), 50):
            with torch.no_grad():
                made.append(bench.model.reconstruct(real[start : start + 50].to(bench.device)).cpu())
            bench.progress(min(start + 50, len(real)), len(real), "reconstruction")
        images = torch.cat(made).float().clamp(-1, 1)
        a, b = (images + 1) / 2, (real + 1) / 2
        # Equal images have infinite PSNR, which JSON does not know.
        found: Values = {"psnr": round(float(psnr(a, b).clamp(max=100).mean()), 3), "ssim": round(float(ssim(a, b).mean()), 4)}
        extractor = self.features.load(bench.device)
        if len(real) > 1:
            sets = [extractor.features(x) for x in (real, images)]
            if isinstance(self.features, RandomFeatures):
                sets = frechet.standardise(*sets)
            found["frechet"] = round(frechet.distance(*sets), 3)
        if isinstance(bench.data, Scenes):
            drawn = a.permute(0, 2, 3, 1).double().numpy()
            reading = read(drawn)
            scores = adherence.grade(reading, bench.data.targets(range(len(real))))
            found |= {name: round(value.mean, 4) for name, value in adherence.summary(scores).items()}
            found |= shapes.summary(shapes.overlaps(drawn, reading))
        pairs = torch.stack([real[:16], images[:16]], 1).flatten(0, 1)
        bench.show(f"reconstruction-{bench.resolution}", pairs, 8)
        return {**found, "protocol": {"images": len(real), "resolution": bench.resolution, **extractor.protocol}}


@config
class ToldViews:
    """Whether pictures agree with the views that the model is told of validation images: the same views taken of what it draws.

    On scenes also what the checker reads, and the entropy of colours, which tells whether a model that is told no colour varies it.
    """

    kind: Literal["told"] = "told"
    images: Positive = 64  # validation images whose views are told
    views: tuple[str, ...] = ()  # those that are told; none: all that the model reads
    captions: bool = True  # tell the images' captions, too
    steps: Count = 0  # denoising steps; 0: the model's own
    guidance: NonNegative = 0.0  # 0: the model's own
    sampler: str = ""  # empty: the model's own
    seed: Count = 0  # of the pictures

    asks = "sample"  # of the model

    def names(self, scenes: bool) -> tuple[str, ...]:
        """The plain values of the result; what the checker reads only on scenes."""
        return ("error", *(f"errors.{view}" for view in self.views), *((*adherence.METRICS, "colour_bits") if scenes else ()))

    def run(self, bench: Bench) -> Values:
        """The mean difference of views told and drawn, by view."""
        reads = bench.model.told
        views = self.views or tuple(reads)
        if not reads:
            raise UserError("told: this model reads no views of pictures; leave it out")
        if unknown := [view for view in views if view not in reads]:
            raise UserError(f"told: {', '.join(unknown)} is no view that this model reads; it reads {', '.join(reads)}")
        if bench.data is None:
            raise UserError("told: needs images whose views are told: give --on scenes or --on folder")
        real = replace(bench, data=viewed(bench.data, views)).real(self.images)
        many, side = len(real.image), bench.resolution
        wanted, captions = _wanted(bench, self), real.caption if self.captions else ("",) * many
        edits = bench.model.tell(real.views, {}, (side, side))
        seeds = [self.seed * 1_000_003 + i for i in range(many)]

        def on_step(done: int, total: int) -> None:
            bench.progress(done, total, "told")

        images = bench.model.sample(captions, seeds, wanted, size=(side, side), edits=edits, on_step=on_step)
        each = {view: told.error(images, view, real.views[view], reads[view]) for view in views}
        errors = {view: round(value, 5) for view, value in each.items() if value is not None}
        found: Values = {"error": round(sum(errors.values()) / len(errors), 5)} if errors else {}
        if isinstance(bench.data, Scenes):
            reading = read(images.numpy())
            scores = adherence.grade(reading, bench.data.targets(range(many)))
            found |= {name: round(value.mean, 4) for name, value in adherence.summary(scores).items()}
            found["colour_bits"] = round(told.bits(reading.colour), 3)
        bench.show("told", torch.stack([real.image[:16], _floats(images[:16])], 1).flatten(0, 1), 8, captions[:16])
        protocol = {"images": many, "views": list(views), "captions": self.captions, "resolution": side, **_used(bench, wanted)}
        return {**found, "errors": errors, "protocol": protocol}


@config
class Translation:
    """How well translated pictures show what they were drawn of.

    PSNR, mean |difference| of pairs, Fréchet distance from true pictures; on scenes the overlap of objects' labels and what the checker
    reads, of pairs seen in training and of held-out ones. Of unpaired scenes `bind` is the content kept, `bg` the style reached.
    """

    kind: Literal["translation"] = "translation"
    images: Positive = 100  # validation images
    features: Features = RandomFeatures()  # what pictures are compared by

    asks = "translate"  # of the model

    def names(self, scenes: bool) -> tuple[str, ...]:
        """The plain values of the result."""
        of_scenes = (*adherence.METRICS, "label_iou", "held_out.bind", "held_out.label_iou")
        return ("psnr", "l1", "frechet", "real_real_floor", *(of_scenes if scenes else ()))

    def run(self, bench: Bench) -> Values:
        """Means over validation images, and over scenes with held-out pairs."""
        real = bench.real(self.images)
        found, made = self._compared(bench, bench.data, real, "translation")
        extractor, half = self.features.load(bench.device), len(real.image) // 2
        true = real.image if bench.model.paired else 2 * real.views[OTHER] - 1
        if half > 1:
            sets = [extractor.features(x) for x in (true[:half], true[half : 2 * half], made[:half])]
            a, b, c = frechet.standardise(*sets) if isinstance(self.features, RandomFeatures) else sets
            found |= {"frechet": round(frechet.distance(b, c), 3), "real_real_floor": round(frechet.distance(a, b), 3)}
        other = translation.held_out(bench.data, bench.model.views)
        if other is not None:
            count = min(self.images, len(other))
            batch = other.load(list(range(count)), list(range(count)), bench.resolution, 0, False)
            found["held_out"] = self._compared(bench, other, batch, "translation-held-out")[0]
        return {**found, "protocol": {"images": len(real.image), "resolution": bench.resolution, **extractor.protocol}}

    def _compared(self, bench: Bench, data: Any, batch: Any, name: str) -> tuple[Values, Tensor]:
        with torch.no_grad():
            made = bench.model.translate(batch.to(bench.device)).cpu().float()
            bench.show(name, bench.model.preview(rows(batch, 0, 24).to(bench.device), 0).cpu(), bench.model.preview_columns)
        a, b = (made + 1) / 2, (batch.image + 1) / 2
        found: Values = {}
        if bench.model.paired:
            found = {"psnr": round(float(psnr(a, b).clamp(max=100).mean()), 3), "l1": round(float((a - b).abs().mean()), 5)}
        if isinstance(data, Scenes):
            index = list(range(len(a)))
            labels = data.with_views(("labels",)).load(index, index, bench.resolution, 0, False).views
            assert labels is not None
            found["label_iou"] = round(translation.label_overlap(a, labels["labels"]), 4)  # type: ignore[arg-type]
        return found | dict(translation.shown(a, data, len(a))), made


@config
class Frechet:
    """Distances between pictures of validation captions and the validation images, in a space of features.

    With learned features: Fréchet and kernel distance (FID and KID where they are Inception's), Gaussian distance (CMMD
    where they are CLIP's), precision and recall.
    """

    kind: Literal["frechet"] = "frechet"
    images: Positive = 256  # pictures, and real images; fix it, the distance depends on it
    steps: Count = 0  # denoising steps; 0: the model's own
    guidance: NonNegative = 0.0  # 0: the model's own
    sampler: str = ""  # empty: the model's own
    seed: Count = 0  # of the pictures
    features: Features = RandomFeatures()  # what pictures are compared by

    asks = "sample"  # of the model

    def names(self, scenes: bool) -> tuple[str, ...]:
        """The plain values of the result."""
        learned = () if isinstance(self.features, RandomFeatures) else ("kernel", "kernel_floor", "gaussian", "precision", "recall")
        return ("distance", "real_real_floor", *learned)

    def run(self, bench: Bench) -> Values:
        """The distances, and their floor: those between two sets of real images of the same number."""
        extractor = self.features.load(bench.device)
        real = bench.real(2 * self.images)
        half = len(real.image) // 2
        if half < 2:
            return {"skipped": f"{len(real.image)} validation images; a distance needs 4 at least"}
        wanted = _wanted(bench, self)
        images = bench.draw(real.caption[:half], self.seed, wanted, "frechet")
        a, b, c = (extractor.features(x) for x in (real.image[:half], real.image[half : 2 * half], _floats(images)))
        found: Values = {}
        if isinstance(self.features, RandomFeatures):
            a, b, c = frechet.standardise(a, b, c)
        else:
            found = {"kernel": round(kernel_distance(b, c), 6), "kernel_floor": round(kernel_distance(a, b), 6)}
            found["gaussian"] = round(gaussian_distance(b, c), 4)
            if half > NEIGHBOURS:
                found["precision"], found["recall"] = (round(share, 4) for share in precision_recall(c, b, NEIGHBOURS))
        protocol = {"images": half, **_used(bench, wanted), **extractor.protocol}
        distances = {"distance": round(frechet.distance(b, c), 3), "real_real_floor": round(frechet.distance(a, b), 3)}
        return {**distances, **found, "protocol": protocol}


@config
class ClipScore:
    """How well pictures show their captions, by a CLIP: 100 x the cosine similarity, mean over pictures (arXiv 2104.08718)."""

    kind: Literal["clip_score"] = "clip_score"
    path: Path  # a folder that transformers' CLIPModel opens
    images: Positive = 256  # validation captions
    steps: Count = 0  # denoising steps; 0: the model's own
    guidance: NonNegative = 0.0  # 0: the model's own
    sampler: str = ""  # empty: the model's own
    seed: Count = 0  # of the pictures

    asks = "sample"  # of the model

    def names(self, scenes: bool) -> tuple[str, ...]:
        """The plain values of the result."""
        return ("score", "real")

    def run(self, bench: Bench) -> Values:
        """The mean score of pictures, and that of the validation images with the same captions."""
        judge = ClipJudge.load(self.path.expanduser(), bench.device)
        real = bench.real(self.images)
        many = len(real.image)

        wanted = _wanted(bench, self)
        images = bench.draw(real.caption, self.seed, wanted, "clip score")
        true = ((real.image + 1) * 127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1)
        score, best = (100 * sum(judge.scores(of, real.caption)) / many for of in (images, true))
        protocol = {"images": many, **_used(bench, wanted), "clip": self.path.name}
        return {"score": round(score, 3), "real": round(best, 3), "protocol": protocol}


@config
class Neighbours:
    """Nearest training pictures of what a model draws, beside those of held-out pictures: copies are nearer than any of these."""

    kind: Literal["neighbours"] = "neighbours"
    images: Positive = 32  # pictures, of validation captions, and as many held-out ones beside them
    nearest: Positive = 3  # training pictures of each
    among: Count = 0  # of how many training pictures, spread evenly; 0: all
    steps: Count = 0  # denoising steps; 0: the model's own
    guidance: NonNegative = 0.0  # 0: the model's own
    sampler: str = ""  # empty: the model's own
    seed: Count = 0  # of the pictures
    features: Features = RandomFeatures()  # what pictures are compared by

    asks = "sample"  # of the model

    def names(self, scenes: bool) -> tuple[str, ...]:
        """The plain values of the result."""
        return ("distance", "held_out", "closest", "closest_held_out", "closer")

    def run(self, bench: Bench) -> Values:
        """Median and least cosine distance to the nearest training picture, of drawn and of held-out pictures, and every row.

        `closer` is the share of drawn pictures that are nearer to one than all but 5 % of the held-out pictures are.
        """
        if bench.train is None or not len(bench.train):
            raise UserError("neighbours: there are no training pictures to look among")
        extractor, real = self.features.load(bench.device), bench.real(self.images)
        many, train = len(real.image), bench.train
        if not many:
            return {"skipped": "no validation images; neighbours need some"}
        wanted = _wanted(bench, self)
        images = _floats(bench.draw(real.caption, self.seed, wanted, "neighbours"))
        side = images.shape[2]
        count = min(self.among or len(train), len(train))
        places = [i * len(train) // count for i in range(count)]
        found = []
        for start in range(0, count, BATCH):
            part = places[start : start + BATCH]
            found.append(extractor.features(train.load(part, part, side, 0, False).image))
            bench.progress(start + len(part), count, "neighbours: training pictures")
        learned = np.concatenate(found)
        index, far = nearest(extractor.features(images), learned, self.nearest)
        beside = nearest(extractor.features(real.image), learned)[1][:, 0]
        rows = []
        shown = []
        for i in range(many):
            samples = [places[k] for k in index[i]]
            rows.append({"caption": real.caption[i], "samples": samples, "distances": [round(float(d), 5) for d in far[i]]})
            shown += [images[i : i + 1].cpu(), train.load(samples, samples, side, 0, False).image]
        bench.show(f"neighbours-{side}", torch.cat(shown), 1 + index.shape[1], real.caption)
        protocol = {"images": many, "among": count, **_used(bench, wanted)}
        values = {
            "distance": float(np.median(far[:, 0])),
            "held_out": float(np.median(beside)),
            "closest": float(far[:, 0].min()),
            "closest_held_out": float(beside.min()),
            "closer": float((far[:, 0] < np.quantile(beside, 0.05)).mean()),
        }
        return {**{k: round(v, 5) for k, v in values.items()}, "nearest": rows, "protocol": {**protocol, **extractor.protocol}}


@config
class Grounding:
    """Whether pictures of scenes show what views tell, read by the exact checker; nothing else need say it."""

    kind: Literal["grounding"] = "grounding"
    tier: TierName  # whose scenes
    prompts: Positive = 100  # with colour-shape pairs seen in training, and as many with held-out pairs
    views: tuple[str, ...] = ()  # that are told; none: all that the model reads and the scenes have
    caption: Literal["whole", "placeless", "empty"] = "placeless"  # all of it; without places and relations; nothing
    steps: Count = 0  # denoising steps; 0: the model's own
    guidance: NonNegative = 0.0  # 0: the model's own
    sampler: str = ""  # empty: the model's own
    seed: Count = 0  # of prompts and pictures

    asks = "sample"  # of the model

    def names(self, scenes: bool) -> tuple[str, ...]:
        """The plain values of the result."""
        return tuple(f"{pairs}.{name}" for pairs in ("seen", "held_out") for name in ("recall", "overlap", "labels", *adherence.METRICS))

    def run(self, bench: Bench) -> Values:
        """Objects found in their boxes (recall), mean overlap of boxes, overlap of labels, and adherence."""
        names = self.views or tuple(name for name in bench.model.told if name.partition(":")[0] in KINDS)
        wanted, size = _wanted(bench, self), bench.model.defaults["size"]
        found: Values = {}
        for pairs in ("seen", "held-out"):
            asked = prompts(self.tier, self.prompts, self.seed, pairs)
            seeds = [self.seed * 1_000_003 + i for i in range(len(asked))]
            edits = bench.model.tell(grounding.exact(asked.specs, names, size[0], self.seed), {}, size) if names else ()
            texts = [_less(text, target, self.caption) for text, target in zip(asked.text, asked.targets, strict=True)]
            images = bench.model.sample(texts, seeds, wanted, edits=edits, on_step=lambda i, n, pairs=pairs: bench.progress(i, n, pairs))
            reading = read(images.numpy())
            recall, overlap = grounding.grounded(asked.specs, reading)
            labels = grounding.exact(asked.specs, ("labels",), min(size[0], WORK), self.seed)["labels"]
            scores = adherence.summary(adherence.grade(reading, asked.targets))
            found[pairs.replace("-", "_")] = {
                "recall": round(float(recall.mean()), 4),
                "overlap": round(float(overlap.mean()), 4),
                "labels": round(grounding.labelled(images.numpy(), np.asarray(labels)), 4),
                **{name: round(value.mean, 4) for name, value in scores.items()},
            }
            bench.show(f"grounding-{pairs}", _floats(images[:32]), 8, texts[:32])
        protocol = {"tier": self.tier, "prompts": self.prompts, "views": list(names), "caption": self.caption, "seed": self.seed}
        return {**found, "protocol": protocol | _used(bench, wanted)}


@config
class Captions:
    """Whether written captions say what held-out pictures show."""

    kind: Literal["captions"] = "captions"
    images: Positive = 200  # pictures; of scenes as many again with held-out colour-shape pairs
    seed: Count = 0  # of what is drawn at random, at a temperature above 0

    asks = "caption"  # of the model

    def names(self, scenes: bool) -> tuple[str, ...]:
        """The plain values of the result."""
        own = ("f1", "precision", "recall", "exact")
        return ("words_f1", *own, *(f"held_out_{name}" for name in own), "shuffled_f1") if scenes else ("words_f1",)

    def run(self, bench: Bench) -> Values:
        """F1 of words against the first caption; of scenes also of facts, read by the grammar, and what shuffled captions would have."""
        found: Values = {}
        other = translation.held_out(bench.data, ())
        for name, data in (("", bench.data), ("held_out_", other)):
            if data is None and name:
                continue
            index = list(range(min(self.images, len(data)))) if data is not None else []
            real = replace(bench, data=data).real(self.images)
            said = bench.model.captions(real.image, [self.seed + i for i in index])
            bench.progress(len(index), len(index), "captions")
            if not name:
                found["words_f1"] = written.words_agree(said, [rows[0] for rows in data.all_captions(index)] if data is not None else [])
                bench.show("captions", real.image[:32], 8, said[:32])
            if isinstance(data, Scenes):
                targets = data.targets(index)
                found |= {f"{name}{key}": value for key, value in written.facts_agree(said, targets).items()}
                if not name:
                    found["shuffled_f1"] = written.facts_agree(said[1:] + said[:1], targets)["f1"]
        return {**found, "protocol": {"images": self.images, "temperature": bench.model.settings().temperature, "seed": self.seed}}


@config
class Language:
    """Bits that held-out captions take of a model of captions alone, beside the entropy of the scenes' grammar."""

    kind: Literal["language"] = "language"
    captions: Positive = 400  # held-out ones

    asks = "likelihood"  # of the model

    def names(self, scenes: bool) -> tuple[str, ...]:
        """The plain values of the result."""
        return ("bits", "entropy", "excess") if scenes else ("bits",)

    def run(self, bench: Bench) -> Values:
        """Bits of a caption; where it is known in closed form the entropy, and by what share the bits exceed it."""
        if bench.data is None or not len(bench.data):
            raise UserError("language: needs captions to measure on: give --on scenes or --on folder")
        count = min(self.captions, len(bench.data))
        index = list(range(count))
        bits = bench.model.bits(bench.data.captions(index, index, bench.seed))
        found = {"bits": round(sum(bits) / count, 4)}
        least = grammar.entropy(bench.data.source) if isinstance(bench.data, Scenes) else None
        if least:
            found |= {"entropy": round(least, 4), "excess": round(found["bits"] / least - 1, 4)}
        return {**found, "protocol": {"captions": count}}


@config
class Layout:
    """Whether a written scene is the one that a prompt states, mark by mark; how it looks when drawn is what adherence measures."""

    kind: Literal["layout"] = "layout"
    tier: TierName  # whose prompts
    prompts: Positive = 100  # with colour-shape pairs seen in training, and as many with held-out pairs
    seed: Count = 0  # of prompts and scenes

    asks = "scene"  # of the model

    def names(self, scenes: bool) -> tuple[str, ...]:
        """The plain values of the result."""
        return ("exact", "marks", "held_out_exact", "held_out_marks")

    def run(self, bench: Bench) -> Values:
        """Shares of scenes that are right in every mark, and of marks that are right."""
        found: Values = {}
        for pairs, name in (("seen", ""), ("held-out", "held_out_")):
            asked = prompts(self.tier, self.prompts, self.seed, pairs)  # type: ignore[arg-type]
            made = bench.model.marks_of(asked.text, [self.seed * 1_000_003 + i for i in range(len(asked))])
            bench.progress(len(asked), len(asked), f"scenes, {pairs}")
            true = marks.to_marks(asked.specs)
            right = (made == true) | ((made == marks.END) & (true == marks.END))
            counted = (true != marks.END) | (made != marks.END)
            found[f"{name}exact"] = round(float(right.all(1).mean()), 4)
            found[f"{name}marks"] = round(float(right[counted].mean()), 4)
        return {**found, "protocol": {"tier": self.tier, "prompts": self.prompts, "seed": self.seed}}


def _less(text: str, target: Target, caption: str) -> str:
    """A caption, without places and relations or empty where that is asked."""
    if caption == "whole":
        return text
    silent = tuple(replace(phrase, cell=-1) for phrase in target.phrases)
    return "" if caption == "empty" else say(replace(target, phrases=silent, relation=-1))


def check_weights(metrics: Sequence[Any]) -> None:
    """Raises UserError for weights that are not here, before anything is measured."""
    for metric in metrics:
        if isinstance(metric, Frechet | Reconstruction | Translation | Neighbours):
            metric.features.check()
        if isinstance(metric, ClipScore):
            ClipJudge.check(metric.path.expanduser())


Evaluator = Annotated[
    Adherence
    | Abilities
    | Diversity
    | Completion
    | Reconstruction
    | Translation
    | Frechet
    | ClipScore
    | Neighbours
    | ToldViews
    | Grounding
    | Captions
    | Language
    | Layout,
    BY_KIND,
]
