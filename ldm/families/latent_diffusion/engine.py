"""The sampling engine: text to image by guided denoising of latents, open at a few places to methods that edit."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from ldm.config.errors import UserError
from ldm.config.schema import Fraction, NonNegative, Positive, config
from ldm.data.pictures import finished
from ldm.diffusion.batch import Cond, Movable, Text, sent, taken, tensors_of
from ldm.diffusion.guidance import composed
from ldm.diffusion.learned_variance import share_of
from ldm.diffusion.process import SPACINGS, Grid, Process
from ldm.diffusion.rng import Rng
from ldm.diffusion.samplers import SAMPLERS, Denoise, ancestral
from ldm.diffusion.thresholding import thresholded
from ldm.families.draws import NUMBERS, OWN, See, Settings, Wanted, steps_taken
from ldm.families.latent_diffusion.prompt_schedule import PromptSchedule, PromptShape, shape_of
from ldm.families.latent_diffusion.prompt_to_prompt import Exchange, of_targets
from ldm.formats.latent_codec import LatentCodec
from ldm.models.denoiser import Denoiser
from ldm.text.encoder import TextEncoder
from ldm.text.prompt_syntax import Prompt, literal

PRECISION = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
M = TypeVar("M", bound=Movable)
REMEMBERED = 4  # conditions whose keys and values are kept


@config
class Defaults:
    """How the finished model is sampled unless it is told otherwise."""

    steps: Positive = 30  # denoising steps
    guidance: NonNegative = 5.0  # classifier-free guidance scale; 1: none
    rescale: Fraction = 0.0  # guidance rescale (Lin 2023, arXiv 2305.08891, eq. 16)
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"  # of matrix products and convolutions, by autocast
    threshold: Literal["", "none", "static", "dynamic"] = ""  # of x0 at every step; empty: static of pixels, latents have no range
    sampler: str = "dpmpp_2m"  # a name of ldm.diffusion.samplers.SAMPLERS
    chunk: Positive = 8  # images per network call; a part of the model's numerics, so that batch size is not

    def __post_init__(self) -> None:
        if self.sampler not in SAMPLERS:
            raise UserError(f"sampler: got {self.sampler!r}; choose one of {', '.join(SAMPLERS)}")


def choose(usual: Defaults, wanted: Wanted = OWN) -> Settings:
    """The numbers of a sampling call, those of `usual` where none are asked for.

    Raises:
        UserError: on an unknown sampler, spacing, precision or curve, or an interval that is none.
    """
    name = wanted.sampler or usual.sampler
    if name not in SAMPLERS:
        raise UserError(f"sampler: got {name!r}; choose one of {', '.join(SAMPLERS)}")
    own = {name: value for name in NUMBERS if (value := getattr(wanted, name)) not in (None, "")}
    model: dict[str, Any] = {"steps": SAMPLERS[name].steps or usual.steps, "guidance": usual.guidance, "rescale": usual.rescale}
    chosen = Settings(
        **{**model, "precision": usual.precision, "threshold": usual.threshold, "spacing": SAMPLERS[name].spacing, **own, "sampler": name}
    )
    if chosen.spacing not in SPACINGS:
        raise UserError(f"spacing: got {chosen.spacing!r}; choose one of {', '.join(SPACINGS)}")
    return chosen.checked()


@dataclass(frozen=True)
class Canvas:
    """What an edit may look at: a chunk of B pictures while they are drawn."""

    rows: tuple[int, ...]  # (B,) which pictures of the call these are; padding repeats the last
    grid: Grid  # the noise levels that are visited
    noise: Tensor  # (B,c,h,w) the pictures' own noise, unit variance
    rng: Rng  # more noise of theirs, by purpose
    prompted: bool = True  # whether the network is told the prompts; guidance goes away from what it says without them

    def own(self, values: Tensor) -> Tensor:
        """These pictures' rows of a tensor with one row for each picture of the call, or one for all, where noise lies."""
        found = values[list(self.rows)] if len(values) > 1 else values.expand(len(self.rows), *values.shape[1:])
        return found.to(self.noise) if found.is_floating_point() else found.to(self.noise.device)

    def own_of(self, values: M) -> M:
        """The same of a batch with one row for each picture of the call, or one for all, moved to where noise lies."""
        many = max(len(tensor) for tensor in tensors_of(values))
        return taken(values, self.rows if many > 1 else [0] * len(self.rows)).to(self.noise.device)

    def twice(self) -> Canvas:
        """The same pictures twice, one half of the batch after the other."""
        rng = Rng(self.rng.seed, self.rng.positions * 2)
        return Canvas(self.rows * 2, self.grid, torch.cat([self.noise, self.noise]), rng)

    def noised(self, x0: Tensor, i: int) -> Tensor:
        """Latents x0 (B,c,h,w) at level i of the grid, with the pictures' own noise."""
        return float(self.grid.alpha[i]) * x0 + float(self.grid.sigma[i]) * self.noise


@dataclass(frozen=True, kw_only=True)
class Edit:
    """How a method departs from drawing out of noise. Every part may be left out; several edits act in their order."""

    strength: float = 1.0  # the share of the steps that is taken; the first ones are left out
    start: Callable[[Tensor, Canvas], Tensor] | None = None  # x (B,c,h,w) at the first level visited, from what it would be
    condition: Callable[[Cond, Canvas], Cond] | None = None  # what the network is told; with the prompts, and without
    guide: Callable[[Denoise, Canvas], Denoise] | None = None  # the denoiser (x, i) -> x0, from the guided one
    after_step: Callable[[Tensor, int, Canvas], Tensor] | None = None  # x at level i, that a step has just reached
    exchange: Exchange | None = None  # a prompt that is drawn beside every picture, whose attention is taken
    finish: Callable[[Tensor, Canvas], Tensor] | None = None  # the picture (B,H,W,3) uint8, from the decoded one


def watching(see: See) -> Edit:
    """The edit that changes nothing, and tells `see` what the network makes of x at every step."""

    def guide(denoise: Denoise, canvas: Canvas) -> Denoise:
        def watched(x: Tensor, i: int) -> Tensor:
            x0 = denoise(x, i)
            see(canvas.rows, int(i), x0)
            return x0

        return watched

    return Edit(guide=guide)


def warn(text: str) -> None:
    """A notice to whoever calls from Python."""
    warnings.warn(text, stacklevel=4)


def stay(part: nn.Module) -> None:
    """All parts lie on the device all the time, so nothing is done before one is used."""


@dataclass(frozen=True)
class Engine:
    """Networks and mathematics that draw together.

    Args:
        chunk: pictures per network call, padded where fewer are left, so that no picture depends on how many are drawn.
        note: told what a user should know, one line each.
        turn: told that the network is used next.
    """

    denoiser: Denoiser
    process: Process
    codec: LatentCodec
    text: TextEncoder
    chunk: int
    note: Callable[[str], None] = warn
    turn: Callable[[nn.Module], None] = stay

    def draw(
        self,
        prompts: Sequence[str | Prompt],
        seeds: Sequence[int],
        settings: Settings,
        size: tuple[int, int],
        *,
        negative: str | Prompt = "",
        latents: Tensor | None = None,
        edits: Sequence[Edit] = (),
        on_step: Callable[[int, int], None] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Pictures (N,H,W,3) uint8, and the latents (N,c,h,w) that they were decoded from; arguments as `sample` has them.

        Raises:
            UserError: on a size that is not a multiple of the autoencoder's factor, or a result that is not finite.
        """
        height, width = size
        factor = self.codec.factor
        if height % factor or width % factor or min(height, width) < factor:
            raise UserError(f"size: got {width}x{height}; both must be multiples of {factor}")
        if len(prompts) != len(seeds):
            raise ValueError(f"{len(prompts)} prompts but {len(seeds)} seeds")
        shape = (self.codec.channels, height // factor, width // factor)
        grid = shortened(self.process.grid(settings.steps, settings.spacing), min((e.strength for e in edits), default=1.0))
        read, avoided = [_read(prompt) for prompt in prompts], _read(negative)
        exchange = next((edit.exchange for edit in edits if edit.exchange is not None), None)
        shaped = partial(shape_of if exchange is None else exchange.shape, self.text)
        alike: dict[PromptShape, list[int]] = {}
        for row, prompt in enumerate(read):
            alike.setdefault(shaped(prompt, avoided, len(grid.t)), []).append(row)
        chunks = [(kind, rows[i : i + self.chunk]) for kind, rows in alike.items() for i in range(0, len(rows), self.chunk)]
        image = torch.empty(len(prompts), height, width, 3, dtype=torch.uint8)
        x0 = torch.empty(len(prompts), *shape, dtype=self._place()[1])
        drawn: list[tuple[list[int], Canvas, Tensor]] = []
        was_training = self.denoiser.training
        self.denoiser.eval()
        try:
            for i, (kind, rows) in enumerate(chunks):
                padded = (*rows, *[rows[-1]] * (self.chunk - len(rows)))
                rng = Rng(0, [seeds[row] for row in padded])
                noise = rng.normal("init", shape) if latents is None else latents.cpu()[list(padded)]
                canvas = Canvas(padded, grid, noise.to(*self._place()), rng)
                report = None if on_step is None else _offset(on_step, i, len(chunks), len(grid.t))
                x = self._denoise([read[row] for row in padded], avoided, kind, canvas, settings, edits, report)
                drawn.append((rows, canvas, x))
            for rows, canvas, x in drawn:  # only now, so that each part has one turn
                made = finished(self._decode(x, settings))
                for edit in edits:
                    made = made if edit.finish is None else edit.finish(made, canvas)
                image[rows], x0[rows] = made[: len(rows)].cpu(), x[: len(rows)].cpu()
        finally:
            self.denoiser.train(was_training)
        return image, x0

    @property
    def variance_told(self) -> bool:
        """Whether the network says the variance of ddpm's steps too."""
        return self.denoiser.config.out_channels == 2 * self.codec.channels

    def _place(self) -> tuple[torch.device, torch.dtype]:
        """Where the network lies, and the type that x is kept in: at least float32, whatever the network's own."""
        weight = next(self.denoiser.parameters())
        return weight.device, torch.promote_types(weight.dtype, torch.float32)

    def guided_denoiser(
        self,
        prompts: Sequence[Prompt],
        negative: Prompt,
        shape: PromptShape,
        canvas: Canvas,
        settings: Settings,
        edits: Sequence[Edit] = (),
        hear: Callable[[Tensor], None] = lambda said: None,
    ) -> Denoise:
        """What tells x0 (B,c,h,w) of x at each level of a canvas' grid: the guided network, and whatever guides it further.

        With an exchange x has 2B rows: what is drawn beside the pictures, and then these.
        `hear` is told what the network says of the variance (B,c,h,w), told the prompts, where it says something.
        """
        grid, device = canvas.grid, canvas.noise.device
        exchange, own = next((edit.exchange for edit in edits if edit.exchange is not None), None), canvas
        exchanged = None if exchange is None else exchange.between(self.text, prompts, shape, len(grid.t))
        if exchanged is not None:
            prompts, canvas = exchanged.prompts, canvas.twice()
        height, width = (side * self.codec.factor for side in canvas.noise.shape[2:])
        size = sent(torch.tensor([settings.sizes(height, width)]).float().expand(len(prompts), 6), device)

        # A network that is told the scale draws as if guided by it in one call, so nothing is left to guide.
        told = torch.full((len(prompts),), settings.guidance, device=device) if self.denoiser.config.reads_guidance else None

        def about(text: Text, prompted: bool) -> Cond:
            cond, here = Cond(text=text, size=size, guidance=told), canvas if prompted else replace(canvas, prompted=False)
            for edit in edits:
                cond = cond if edit.condition is None else edit.condition(cond, here)
            return cond

        script = PromptSchedule(self.text, prompts, [negative] * len(prompts), shape, len(grid.t), about, settings.clip_skip)
        # Of the conditions that steps share; a few, for those that take turns.
        remembered: list[tuple[Cond, Any, list[Any]]] = []
        times = sent(grid.t, device)

        def predict(x: Tensor, i: int, c: Cond) -> Tensor:
            self.turn(self.denoiser)
            found = next((found for found in remembered if found[0] is c), None)
            if found is None:
                assert c.text is not None
                # Without sizes and pooled text, the steps are those of any condition.
                steps = remembered[0][2] if remembered and not self.denoiser.told_more else self.denoiser.schedule(times, c)
                found = (c, self.denoiser.remember(c.text), steps)
                remembered[:] = [*remembered[1 - REMEMBERED :], found]
            t, memory = times[i].expand(len(x)), found[1]
            taken = None if exchanged is None else exchanged.at(i)
            if taken is not None:
                memory = self.denoiser.exchanging(memory, taken.to(x.device))
            output = self.denoiser(x, t, c, memory, found[2][i]).to(x.dtype)
            if self.variance_told:
                output, said = output.chunk(2, dim=1)
                hear(said[-len(prompts) :])
            return self.process.x0_from(output, x, t)

        steps = len(grid.t)
        weights = sent(script.weights(), device)
        denoise = composed(
            predict, script.told, weights, lambda i: settings.guidance_at(i, steps) if told is None else 1.0, settings.rescale
        )
        if settings.threshold in ("static", "dynamic"):
            assert self.codec.bound is not None, "settings() refuses it"
            denoise = thresholded(denoise, settings.threshold, self.codec.bound)
        for edit in edits:
            if edit.guide is not None:
                denoise = edit.guide(denoise, own) if exchanged is None else of_targets(edit.guide, denoise, own)
        return denoise

    def _denoise(
        self,
        prompts: list[Prompt],
        negative: Prompt,
        shape: PromptShape,
        canvas: Canvas,
        settings: Settings,
        edits: Sequence[Edit],
        report: Callable[[int], None] | None,
    ) -> Tensor:
        """Clean latents (B,c,h,w) of a chunk."""
        entry, grid, told_of = SAMPLERS[settings.sampler], canvas.grid, set[int]()

        def after_step(x: Tensor, i: int) -> Tensor:
            for edit in edits:
                if edit.after_step is not None:
                    x = torch.cat([x[: -len(canvas.rows)], edit.after_step(x[-len(canvas.rows) :], i, canvas)])
            if report is not None and i not in told_of:
                told_of.add(i)
                report(i)
            return x

        kind = PRECISION[settings.precision]
        with torch.autocast(canvas.noise.device.type, kind, enabled=kind != torch.float32):
            x = entry.start(canvas.noise, grid)
            for edit in edits:
                x = x if edit.start is None else edit.start(x, canvas)
            said: list[Tensor] = []  # of the variance, at the last call
            hear = lambda value: said.__setitem__(slice(None), [value])  # noqa: E731
            denoise, rng = self.guided_denoiser(prompts, negative, shape, canvas, settings, edits, hear), canvas.rng
            if any(edit.exchange is not None for edit in edits):
                x, rng = torch.cat([x, x]), canvas.twice().rng
            run = ancestral(lambda: share_of(said[0])) if self.variance_told and settings.sampler == "ddpm" else entry.run
            x = run(denoise, x, grid.alpha, grid.sigma, rng, eta=settings.eta, after_step=after_step)[-len(canvas.rows) :]
        if not x.isfinite().all():
            cure = "its weights may be damaged" if kind == torch.float32 else "choose bf16 or fp32"
            raise UserError(f"precision: with {settings.precision} the network's numbers are not finite; {cure}")
        return x

    def _decode(self, x: Tensor, settings: Settings) -> Tensor:
        """Images (B,3,H,W) of latents; those that overflow in a half type are decoded once more in float32."""
        kind = PRECISION[settings.precision]
        with torch.autocast(x.device.type, kind, enabled=kind != torch.float32):
            image = self.codec.decode(x)
        whole = image.isfinite().flatten(1).all(1)
        if kind != torch.float32 and not whole.all():
            self.note(f"the decoder overflowed in {settings.precision}; it was run again in float32")
            image = torch.where(whole.view(-1, 1, 1, 1), image.float(), self.codec.decode(x))
        return image


def _read(prompt: str | Prompt) -> Prompt:
    """A prompt given as text is meant as it stands."""
    return literal(prompt) if isinstance(prompt, str) else prompt


def shortened(grid: Grid, strength: float) -> Grid:
    """The last `strength` of a grid's steps, rounded down."""
    left_out = len(grid.t) - steps_taken(len(grid.t), strength)
    return Grid(t=grid.t[left_out:], alpha=grid.alpha[left_out:], sigma=grid.sigma[left_out:])


def _offset(on_step: Callable[[int, int], None], round_: int, rounds: int, steps: int) -> Callable[[int], None]:
    return lambda step: on_step(round_ * steps + step, rounds * steps)
