"""What draws: the protocol that sampling, evaluation and the page take, and the numbers of one sampling call."""

from __future__ import annotations

import math
import re
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, Protocol

from ldm.config.errors import UserError
from ldm.config.options import option
from ldm.text.prompt_syntax import LEARNED

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from ldm.data.views import ViewKind
    from ldm.diffusion.batch import View, Views
    from ldm.formats.export_source import ExportedModel
    from ldm.formats.rounding import Comparison
    from ldm.models.lora import LearnedEmbedding, Lora
    from ldm.text.prompt_syntax import Prompt

PRECISIONS = ("fp32", "bf16", "fp16")
SMALL = "small"  # the view that a picture, made smaller, is to what makes it larger
BEFORE = "before"  # in a model folder: the model whose pictures it is told
AFTER = "after"  # in a chain, the role of the model whose pictures one is told, among what that is assembled from
BACKENDS = ("torch", "openvino")  # what may compute a network; torch computes all
THRESHOLDS = ("none", "static", "dynamic")
# How guidance changes over the share of the steps that is done; each has a mean of 1.
CURVES: dict[str, Callable[[float], float]] = {
    "constant": lambda share: 1.0,
    "linear": lambda share: 2 * share,
    "cosine": lambda share: 1 - math.cos(math.pi * share),
}
See = Callable[[Sequence[int], int, "Tensor"], None]


def steps_taken(steps: int, strength: float) -> int:
    """How many of the steps an edit of this strength takes, rounded down."""
    return int(steps * strength + 1e-9)  # 0.29 * 100 is 28.999999999999996


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Sampler settings: the numbers of one sampling call."""

    steps: int
    guidance: float  # classifier-free guidance scale; 1: none
    rescale: float
    sampler: str
    spacing: str
    eta: float = 0.0
    precision: str = "fp32"  # of matrix products and convolutions
    guidance_from: float = 0.0  # the share of the steps after which guidance begins; before, it is 1
    guidance_to: float = 1.0  # and after which it ends (Kynkaanniemi 2024, arXiv 2404.07724)
    clip_skip: int = (
        1  # the text encoder's layer that is read, from the last one: 1 the last (of XL's as 2), 2 the one before (web UIs' count)
    )
    threshold: str = ""  # of x0 at every step, where data has a range: none static dynamic; empty: it has none
    guidance_curve: str = "constant"  # or rising with the same mean: linear, cosine (Wang 2024, arXiv 2404.13040)
    link_steps: str = ""  # of a chain of models: the steps of all but the first, with commas
    stop_after: int = 0  # of a chain: how many of its models draw; 0: all
    original_size: str = ""  # WIDTHxHEIGHT in px that a network which is told sizes (XL) is told of the original; empty: as drawn
    crop: str = ""  # LEFT,TOP in px, of what was cut off it; empty: nothing
    target_size: str = ""  # WIDTHxHEIGHT in px after the cut; empty: as drawn
    temperature: float = 1.0  # of the codes that are drawn (logits are divided by it); 0: the likeliest
    top_k: int = 0  # so many likeliest codes are drawn from; 0: all
    top_p: float = 1.0  # the likeliest codes that have this much probability together are drawn from
    truncation: float = 1.0  # of GANs: how far styles lie from their mean; of VAEs: the scale of z

    def sizes(self, height: int, width: int) -> tuple[int, ...]:
        """What such a network is told of a picture that is drawn with these sides, px: original height and width, top, left, height, width.

        Raises:
            UserError: for what is no size and no place.
        """
        found = {"original_size": (width, height), "crop": (0, 0), "target_size": (width, height)}
        for name in found:
            if told := getattr(self, name):
                match = re.fullmatch(r"(\d{1,5}),(\d{1,5})" if name == "crop" else r"([1-9]\d{0,4})x([1-9]\d{0,4})", told)
                if match is None:
                    form = "LEFT,TOP in px, such as 0,0" if name == "crop" else "WIDTHxHEIGHT in px, such as 1024x1024"
                    raise UserError(f"{name}: got {told!r}; write {form}")
                found[name] = (int(match[1]), int(match[2]))
        return tuple(side for pair in found.values() for side in reversed(pair))

    def checked(self) -> Settings:
        """The same.

        Raises:
            UserError: on an interval of guidance that is none, or an unknown precision, curve or threshold.
        """
        if not 0 <= self.guidance_from < self.guidance_to <= 1:
            interval = f"{self.guidance_from:g} to {self.guidance_to:g}"
            raise UserError(f"guidance interval: got {interval}; two shares of the steps, such as 0.1 to 0.8, are needed")
        for field, names in (("guidance_curve", tuple(CURVES)), ("precision", PRECISIONS), ("threshold", ("", *THRESHOLDS))):
            if (value := getattr(self, field)) not in names:
                raise UserError(f"{field}: got {value!r}; choose one of {', '.join(names)}")
        self.sizes(1, 1)
        return self

    def guides(self, i: int, steps: int) -> bool:
        """Whether step i of `steps` lies where there is guidance."""
        return self.guidance_from <= min((i + 0.5) / steps, 1.0) <= self.guidance_to

    def guidance_at(self, i: int, steps: int) -> float:
        """The guidance of step i of `steps`."""
        share = min((i + 0.5) / steps, 1.0)
        if not self.guides(i, steps):
            return 1.0
        if self.guidance_curve == "constant":
            return self.guidance
        return 1 + (self.guidance - 1) * CURVES[self.guidance_curve](share)

    def wanted(self) -> Wanted:
        """The same numbers, asked for."""
        return Wanted(**{name: getattr(self, name) for name in NUMBERS})


NUMBERS = tuple(f.name for f in fields(Settings))
OF_CODES = ("temperature", "top_k", "top_p")  # those of models that draw codes
OF_GANS = ("truncation",)
# A model without a sampler has these, and no others.
DIRECT = Settings(steps=1, guidance=1.0, rescale=0.0, sampler="", spacing="")


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """Sampler settings as they are asked for: those of `Settings`, None for the model's own."""

    steps: int | None = option(None, "Denoising (sampling) steps; default: the model's.", low=1, high=1000)
    guidance: float | None = option(None, "Classifier-free guidance (CFG scale); 1: none; default: the model's.", low=0, high=1000)
    guidance_from: float | None = None
    guidance_to: float | None = None
    guidance_curve: str | None = option(None, "Guidance over the steps: constant, or rising: linear cosine.")
    clip_skip: int | None = option(
        None, "Clip skip, as web UIs count: the text encoder's Nth layer from the last; default: 1.", low=1, high=64
    )
    threshold: str | None = option(None, f"Of pixel models, at every step: {' '.join(THRESHOLDS)} (Imagen's); default: the model's.")
    rescale: float | None = option(None, "Guidance rescale (CFG rescale, Lin 2023); default: the model's.", low=0, high=1)
    sampler: str | None = None
    spacing: str | None = None
    eta: float | None = option(None, "Noise of ddim's steps; default: 0, none.", low=0, high=1)
    precision: str | None = option(None, f"Precision: {' '.join(PRECISIONS)}; default: the model's.")
    link_steps: str | None = option(None, "Of a chain of models: steps of all but the first, such as 15,10; default: each model's.")
    stop_after: int | None = option(None, "Of a chain: draw with the first so many of its models alone; default: all.", low=0, high=64)
    original_size: str | None = option(None, "WIDTHxHEIGHT that a network which is told sizes (XL) is told of the original.")
    crop: str | None = option(None, "LEFT,TOP in px that it is told were cut off; default: 0,0.")
    target_size: str | None = option(None, "WIDTHxHEIGHT after the cut that it is told; default of both: as drawn.")
    temperature: float | None = option(None, "Of drawn codes (token models); 0: the likeliest; default: the model's.", low=0, high=100)
    top_k: int | None = option(None, "Draw from so many likeliest codes (token models); 0: all.", low=0, high=2**20)
    top_p: float | None = option(None, "Draw from the likeliest codes of so much probability together (token models).", low=0, high=1)
    truncation: float | None = option(
        None, "Of GANs and VAEs: 1 as it learned, less for surer pictures that are more alike.", low=0, high=1
    )

    def over(self, old: Mapping[str, Any]) -> Wanted:
        """The same with another's numbers, a recipe's for example, where nothing is asked for.

        A spacing belongs to its sampler: with a sampler asked for, the other's spacing does not count.
        """
        own = {name: getattr(self, name) for name in NUMBERS}
        told = {name: old.get(name) for name in NUMBERS if name != "spacing" or not self.sampler}
        return Wanted(**{name: told.get(name) if value in (None, "") else value for name, value in own.items()})


OWN = Wanted()  # the model's own numbers


@dataclass(frozen=True, kw_only=True)
class Running:
    """How a finished model runs: what changes time and memory, and pictures by no more than rounding."""

    attention: str | None = option(None, "Kernel: auto sdpa plain xformers sliced; default: auto.")
    backend: str | None = option(None, "What computes the network: torch, or openvino (an extra) on CPUs; default: torch.")
    compiled: bool = option(False, "Compile the network first (torch.compile): minutes, then faster steps.", name="--compile")
    low_memory: bool = option(False, "One part of the model in memory at a time (CPU offload).")
    tile: int = option(512, "Decode pictures larger than TILE x TILE px in stripes (tiled VAE); 0: never.", low=0)

    @property
    def other(self) -> str:
        """The backend's name where it is not torch."""
        return "" if self.backend in (None, "", BACKENDS[0]) else str(self.backend)

    def checked(self) -> Running:
        """The same.

        Raises:
            UserError: for a backend that is not known, or what belongs to torch beside another one.
        """
        if self.other and self.other not in BACKENDS:
            raise UserError(f"backend: got {self.backend!r}; choose one of {', '.join(BACKENDS)}")
        for name in ("attention", "compiled", "low_memory"):
            if self.other and getattr(self, name):
                said = "compile" if name == "compiled" else name
                raise UserError(f"{said}: is torch's, not {self.other}'s; leave it out, or draw by ldm sample --backend torch")
        return self

    def following(self, old: Mapping[str, Any]) -> Running:
        """The same with the backend of a recipe that is followed, unless one is asked for."""
        return (replace(self, backend=str(old["backend"])) if old.get("backend") and not self.backend else self).checked()


PLAIN = Running()


@dataclass(frozen=True, kw_only=True)
class VideoEdit:
    """A short clip that is drawn anew as one: what of it changes, and into what.

    Args:
        prompt, negative: of every frame.
        source: what it shows, to start from the noise that it comes from (DDIM inversion); None: from noised frames (SDEdit).
        strength: the share of the steps that is taken.
        cells: frames beside and above each other when drawn; 1: each alone.
    """

    prompt: Prompt
    negative: Prompt
    source: Prompt | None
    seed: int
    strength: float
    cells: int


class Guide(Protocol):
    """A classifier that guides drawing besides the prompt (Dhariwal 2021, arXiv 2105.05233)."""

    @property
    def hash(self) -> str:
        """SHA-256 of its file."""
        ...

    def edit(self, prompts: Sequence[str], scale: float) -> Any:
        """The edit that draws towards what each prompt of a call says, of what it knows."""
        ...

    def save(self, path: Path) -> None:
        """One file, whole or not at all."""
        ...


@dataclass(frozen=True, kw_only=True)
class GuideTraining:
    """How a classifier of noisy latents is trained."""

    words: tuple[str, ...]  # of captions, that are told apart
    images: int  # how many are seen
    batch: int
    rate: float  # learning rate at the start
    seed: int  # of order, noise and first weights


@dataclass(frozen=True, kw_only=True)
class SamplingCall:
    """What is asked of a model in one call of `Draws.sample`, whose arguments these are."""

    prompts: Sequence[str | Prompt]
    seeds: Sequence[int]  # as many
    settings: Wanted = OWN
    size: tuple[int, int]  # (height, width), px
    negative: str | Prompt = ""
    latents: Tensor | None = None
    edits: Sequence[Any] = ()
    on_step: Callable[[int, int], None] | None = None
    note: Callable[[str], None] | None = None


class Draws(Protocol):
    """A finished model that draws pictures, of prompts or of other pictures.

    A family that draws names it as a base class behind `Family`, gives `kind`, `defaults` and `draw`, and answers what else it
    can; the defaults here say that it cannot. Picture i depends on its own prompt, seed, size and settings alone.
    """

    kind: str  # of its configuration, for messages
    content_hash: str = ""  # of its files; recipes remember it
    reads_prompts: bool = True  # whether words change what it draws
    draws_pictures: bool = True  # else only what the next model of a chain is told
    reads_seeds: bool = True  # whether pictures of other seeds are others
    redraws: bool = False  # whether `edits` draws pictures anew in part, as hires fix does
    hands: str = SMALL  # the view that the next model of a chain is told, without its argument
    able: frozenset[str] = frozenset({"sample"})  # what a metric may ask of it
    merged: frozenset[str] = frozenset()  # SHA-256 of the LoRA and embedding files that it has in its weights already

    @property
    def factor(self) -> int:
        """Sides of pictures are multiples of it, px."""
        return 1

    @property
    def device(self) -> torch.device:
        """Where its networks lie."""
        return next(self.parameters()).device

    @property
    @abstractmethod
    def defaults(self) -> dict[str, Any]:
        """What counts where nothing is asked for: `size` (height, width) in px, and `chunk`, how many pictures are drawn at once."""

    def parameters(self) -> Iterator[nn.Parameter]:
        """Of its networks, as a torch module has them."""
        self.refuse("parameters", "is no torch module")

    def settings(self, wanted: Wanted = OWN) -> Settings:
        """The numbers of a sampling call, the model's own where none are asked for; without a sampler there is nothing to choose.

        Raises:
            UserError: for what it has not.
        """
        for name in NUMBERS:
            if getattr(wanted, name) not in (None, "", getattr(DIRECT, name)):
                self.refuse(f"{name}: got {getattr(wanted, name)!r}", "has no such setting; leave it out")
        return DIRECT

    def sample(
        self,
        prompts: Sequence[str | Prompt],
        seeds: Sequence[int] | None = None,
        settings: Wanted = OWN,
        *,
        size: tuple[int, int] | None = None,
        negative: str | Prompt = "",
        latents: Tensor | None = None,
        edits: Sequence[Any] = (),
        on_step: Callable[[int, int], None] | None = None,
        note: Callable[[str], None] | None = None,
    ) -> Tensor:
        """One picture for each (prompt, seed), uint8 (N,H,W,3).

        Args:
            prompts: N texts, taken as they stand, or what `ldm.text.prompt_syntax.read` makes of their notation.
            seeds: N integers; by default 0, 1, 2, ...
            size: (height, width) in px, multiples of `factor`; None: `defaults["size"]`.
            latents: (N,...) noise of unit variance as `noise` makes it, in place of the seeds' own.
            edits: what `edits`, `inverted`, `exchanged`, `watch` and a guide gave.
            on_step: called as on_step(steps done, steps in all) over the whole call.
            note: told what a user should know, one line each; None: a warning.

        Raises:
            UserError: for a setting that the model has not, or a size that it does not draw.
        """
        return self.draw(
            SamplingCall(
                prompts=prompts,
                seeds=list(range(len(prompts)) if seeds is None else seeds),
                settings=settings,
                size=size or self.defaults["size"],
                negative=negative,
                latents=latents,
                edits=edits,
                on_step=on_step,
                note=note,
            )
        )

    @abstractmethod
    def draw(self, call: SamplingCall) -> Tensor:
        """What `sample` gives: one picture for each (prompt, seed), uint8 (N,H,W,3)."""

    def hand(self, call: SamplingCall) -> Tensor:
        """What the next model of a chain is told, its view `hands`: the pictures (N,3,H,W) in [0,1]."""
        return self.draw(call).permute(0, 3, 1, 2).float() / 255

    def edits(self, image: Tensor, mask: Tensor | None = None, strength: float | None = None) -> tuple[Any, ...]:
        """What `sample` is told to draw out of pictures (1 or N,H,W,3) uint8, of which `mask` (1 or N,H,W) or all is to be new."""
        self.refuse("init", "starts from no picture; leave --init out")

    @property
    def told(self) -> Mapping[str, ViewKind]:
        """The views of pictures that it reads when it draws, by name."""
        return {}

    def tell(self, given: Views, strength: Mapping[str, float], size: tuple[int, int]) -> tuple[Any, ...]:
        """What `sample` is told to draw by views of pictures of `size`, of one picture for all of a call or of each its own.

        Args:
            given: by name, those of `told` or some of them.
            strength: how much each counts, 1 where it is not named.
            size: (height, width) in px.
        """
        self.refuse("given", "is told no views of pictures; leave --given out")

    def unheard(self, name: str, view: View) -> Iterator[str]:
        """What of a view of one picture is not told, or not understood, as far as that can be said."""
        yield from ()

    def inverted(self, image: Tensor, source: Prompt, settings: Settings, strength: float) -> tuple[Any, ...]:
        """What `sample` is told to start from the noise that pictures (1 or N,H,W,3) come from, told `source` (DDIM inversion)."""
        self.refuse("invert", "does not go back from a picture to its noise; leave --invert out")

    def exchanged(self, source: Prompt, cross: float, inward: float) -> tuple[Any, ...]:
        """What `sample` is told to take the attention of pictures of `source` in these shares of the steps (prompt-to-prompt).

        Args:
            cross: of words.
            inward: of places, to each other.
        """
        self.refuse("source", "has no attention to exchange; leave --source out")

    def noise(self, seeds: Sequence[int], size: tuple[int, int]) -> Tensor:
        """The noise of unit variance that pictures of `size` begin with, one for each seed."""
        self.refuse("variation", "has no noise to vary; leave it out")

    def watch(self, see: See) -> tuple[Any, ...]:
        """Edits that change nothing, and tell `see` which pictures of a call are estimated at which step, x0 (B,c,h,w) of `decode`.

        Empty where pictures are drawn at once.
        """
        return ()

    def decode(self, x0: Tensor) -> Tensor:
        """Images (B,3,H,W), float, in [-1,1] or somewhat beyond, of the estimates that `watch` tells."""
        self.refuse("save_steps", "draws without steps; leave --save-steps out")

    def guide(self, file: Path) -> Guide:
        """The classifier that a file of `ldm classifier` holds.

        Raises:
            UserError: if it is not for this model.
        """
        self.refuse("classifier", "is guided by none; leave --classifier out")

    def restyle(
        self,
        frames: Tensor,
        clip: VideoEdit,
        settings: Settings,
        note: Callable[[str], None],
        on_step: Callable[[int, int], None] | None = None,
    ) -> Tensor:
        """Frames (F,H,W,3) uint8 drawn anew as one clip; all begin with the same noise. `on_step` is told steps done and all steps."""
        self.refuse("clip", "draws no clips anew; leave --clip out")

    def captions(self, image: Tensor | None, seeds: Sequence[int], settings: Wanted = OWN) -> list[str]:
        """A caption for each of pictures (N,3,H,W) in [-1,1] of `defaults["size"]`, or of nothing, one for each seed."""
        self.refuse("caption", "draws pictures; choose a model that writes captions, as configs/captioner.yaml trains one")

    def bits(self, captions: Sequence[str]) -> list[float]:
        """Bits that each caption takes, of a model of captions alone."""
        self.refuse("likelihood", "is no model of captions")

    def adapt(self, loras: Sequence[tuple[Lora, float]], words: Sequence[LearnedEmbedding]) -> None:
        """Merge LoRAs, each at its weight, and teach words (textual inversion).

        Raises:
            UserError: for what does not fit.
        """
        if loras or words:
            self.refuse("lora" if loras else "embedding", "takes no LoRA and no embedding; leave them out")

    def take_autoencoder(self, path: Path, note: Callable[[str], None]) -> str:
        """Decode and encode by another autoencoder from now on: a folder, or a file of weights; returns the hash of its content.

        Raises:
            UserError: for one whose latents have another shape.
        """
        self.refuse("vae", "has no autoencoder to replace; leave --vae out")

    def exported(self, root: Path, path: Path) -> ExportedModel:
        """Its networks and records, as files of other programs are written from.

        Args:
            root: its model folder.
            path: what it was named by, for titles.
        """
        self.refuse("export", "has no form but its own folder; copy that")

    def publish(self, folder: Path, dtype: str, note: Callable[[str], None]) -> list[Comparison]:
        """Write its networks into `folder` as the files of the code that its kind was published with; what was read back of each.

        Args:
            dtype: fp32, fp16 or bf16.
            note: told what that code must know.
        """
        self.refuse("to: published", "has no such files; write --to diffusers")

    def overlong(self, prompt: Prompt) -> str:
        """What should be known of a prompt that is longer than is read at once; empty: nothing."""
        return ""

    def says(self, prompt: str, word: str) -> bool:
        """Whether a prompt has a learned word in it."""
        return word.casefold() in prompt.casefold()

    def untaught(self, prompt: str) -> list[str]:
        """The learned words that a prompt names as ComfyUI does (embedding:NAME), and that the model does not have."""
        return list(dict.fromkeys(LEARNED.findall(prompt)))

    def tokens(self, prompt: Prompt) -> tuple[int, int] | None:
        """The tokens of a prompt, and how many are read at once; None where there is no such number."""
        return None

    def unknown(self, prompt: str) -> list[str]:
        """The words of a prompt that no caption can have had from which the model learned, as far as that can be told."""
        return []

    def misspelt(self, prompt: str) -> dict[str, str]:
        """The words of a prompt that no such caption can have had whole, and what each may be meant to be."""
        return {}

    def ready(self, folder: Path, running: Running, precision: str) -> None:
        """Bring the networks into the form that only draws; they can neither learn nor be saved then.

        Args:
            folder: where it was opened from.
            running: what was chosen.
            precision: that it will draw with.

        Raises:
            UserError: for what does not run here.
        """
        if running.checked().other:
            self.refuse(f"backend: got {running.backend}", "is computed by torch alone; leave it out")
        for name in ("attention", "low_memory"):
            if getattr(running, name):
                self.refuse(name, "has no such choice; leave it out")
        if running.compiled:
            if not (networks := self.compilable()):
                self.refuse("compile", "has no network that torch.compile takes; leave it out")
            from ldm.models.inference import check_compiler, compile_each

            check_compiler(next(networks[0].parameters()).device)
            compile_each(networks)

    def compilable(self) -> list[nn.Module]:
        """As `Family.compilable`: what is compiled where that is asked for."""
        return []

    def learn_guide(self, cache: Path, training: GuideTraining, on_images: Callable[[int, float], None]) -> Guide:
        """A classifier that learned on a latent cache of this model; `on_images` is told images seen and the loss.

        Raises:
            UserError: for another model's cache, or words that tell nothing apart.
        """
        self.refuse("classifier", "denoises no latents; choose a latent diffusion model")

    def refuse(self, what: str, why: str) -> NoReturn:
        """Say that this kind of model cannot do something.

        Raises:
            UserError: always.
        """
        raise UserError(f"{what}: this model of kind {self.kind} {why}")
