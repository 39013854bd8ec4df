"""Contract of a family, and of the configuration that answers for it: what the training loop and the run rely on."""

from __future__ import annotations

import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, NoReturn, Protocol

import torch
from torch import Tensor, nn

from ldm.config.errors import UserError
from ldm.config.schema import build, plain
from ldm.config.version import __version__
from ldm.data.sources import DataSet
from ldm.diffusion.batch import ImageBatch, MomentBatch
from ldm.diffusion.rng import Rng
from ldm.families.chain import BEFORE, chained, within
from ldm.families.draws import AFTER, SMALL
from ldm.formats import atomic
from ldm.formats.integrity import check
from ldm.formats.latent_codec import Codec
from ldm.formats.model_folder import RECORD, read_record
from ldm.models.cost import NOTHING, Cost, TextShape
from ldm.models.vision_tower import TowerShape
from ldm.text.lengths import CutCaptions

Terms = dict[str, Tensor]


@dataclass(frozen=True)
class Ranks:
    """What a loss may know about the other processes: how many they are, and how to average a tensor over them."""

    rank: int = 0
    world: int = 1
    mean: Callable[[Tensor], Tensor] = lambda tensor: tensor

    def rows(self, own: Tensor) -> Tensor:
        """The rows (N,...) of this process as those of all (world*N,...), by rank; every process has as many.

        What all compute alike of them may be descended: each process carries the slope at its own rows, times `world`, since the
        gradients of all are averaged afterwards.
        """
        if self.world == 1:
            return own
        before = self.rank * len(own)
        every = own.new_zeros(self.world * len(own), *own.shape[1:])
        every[before : before + len(own)] = own.detach()
        every = self.mean(every) * self.world
        carried = own.detach() + self.world * (own - own.detach())
        return torch.cat([every[:before], carried, every[before + len(own) :]])


@dataclass(frozen=True)
class Found:
    """A model from elsewhere: what the configuration calls it, where it lies now, and one hash of all that its use depends on."""

    path: str
    folder: Path
    hash: str
    tower: Path | None = None  # the CLIP in it whose image tower is read


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """What training on one image needs, whatever the precision and the optimiser."""

    learned: dict[str, int]  # parameters by network
    frozen: dict[str, int]  # parameters of networks that are only used
    cost: Cost  # of one image through the networks that learn, forward and backward
    extra: int = 0  # FLOPs of one image in the frozen networks
    averaged: int = 0  # parameters with an EMA; 0: all that is learned
    halved: int = 0  # of the frozen parameters, those that lie in the half type that is computed in
    spared: int = 0  # bytes that quantized ones, which are not among those, lie in less than float32 has
    passed: int = 0  # frozen float32 parameters that gradients pass through, as many as the backward pass needs at a time


class TrainingStage(Protocol):
    """What a model's configuration may ask of the stage that trains it."""

    @property
    def model(self) -> str:
        """The model's name in the run."""
        ...

    @property
    def resolution(self) -> int:
        """px, height and width."""
        ...

    @property
    def also(self) -> tuple[int, ...]:
        """px, further resolutions, taken in turn."""
        ...

    @property
    def latents(self) -> str:
        """The encode stage or cache whose latents are read; empty: images."""
        ...

    @property
    def caption_dropout(self) -> float | None:
        """Of this stage; None: as the model says."""
        ...

    @property
    def held_out(self) -> int | None:
        """Samples of which the held-out loss is measured; None: a number that suits."""
        ...

    @property
    def checkpointing(self) -> bool | None:
        """Whether blocks are recomputed in the backward pass; None: as the network says."""
        ...


class ModelConfig:
    """One model of a run as its configuration describes it; members of `ldm.families.registry.Model`.

    Whatever the run, its plan, the verbs and the report must know of a model is asked here, so that nobody asks its kind.
    """

    __slots__ = ()
    kind: str
    refuses: ClassVar[Mapping[str, str]] = {  # fields of a training stage that have no effect here, and why
        "latents": "reads images, not cached latents",
        "buckets": "reads squares",
        "caption_dropout": "drops no captions",
        "tags": "reads no captions",
        "prompts": "draws nothing of prompts",
        "checkpointing": "has no blocks that can be recomputed",
        **dict.fromkeys(("held_out", "held_out_every_images"), "has no noise levels, by which held-out loss is told"),
    }
    encodes: ClassVar[bool] = False  # whether an encode stage can make latents with it
    encodes_text: ClassVar[bool] = False  # whether others can read its text encoder
    reads_latents: ClassVar[bool] = True  # whether of a cache it reads the latents, not captions and views alone
    hands: ClassVar[str] = SMALL  # in a chain, the view that the next model is told of what it draws, without its argument
    exports: ClassVar[bool] = False  # whether an export stage can make a model folder of it
    adopts: ClassVar[bool] = False  # whether a model from elsewhere is used in another form than it lies in
    continues: ClassVar[bool] = False  # whether a later stage or a base model's weights can be continued
    beside: ClassVar[tuple[str, ...]] = ()  # folders of its product that an export puts beside the model

    @property
    def has_codes(self) -> bool:
        """Whether it encodes by a codebook, as far as is known."""
        return False

    @property
    def has_tower(self) -> bool:
        """Whether others can read its image tower, as far as is known."""
        return False

    @property
    def answers(self) -> frozenset[str]:
        """What a metric may ask of the finished model: sample, reconstruct, caption, ..."""
        return frozenset()

    def remarks(self) -> list[str]:
        """What a user should know of its settings before any work, a line each, beginning with the field's name."""
        return []

    @property
    def reads_prompts(self) -> bool:
        """Whether words, or views of what they say, change what it makes."""
        return True

    @property
    def reads_codes(self) -> bool:
        """Whether it reads numbers of codes where others read latents."""
        return False

    @property
    def requires(self) -> Mapping[str, str]:
        """By role of an input, what that must be: encodes_text, has_codes, has_tower."""
        return {}

    @property
    def reads_masks(self) -> bool:
        """Whether its loss weighs by the data's masks."""
        return False

    @property
    def learns_masked_out(self) -> bool:
        """Whether it learns from what is masked out, too."""
        return False

    def views(self) -> tuple[str, ...]:
        """The views of pictures that it learns from, by name; data that has not one of them is refused."""
        return ()

    def told(self) -> tuple[str, ...]:
        """Those that it is told when it draws, too."""
        return self.views()

    def example_of(self, caption: str) -> str:
        """A prompt that shows what was learned, made of a caption of the run's data."""
        return caption

    def usage(self, prompt: str, model: str) -> str:
        """The command that shows what a finished model folder can do."""
        return f'python sample.py "{prompt}" --model {model}'

    def inputs(self) -> dict[str, str]:
        """The models of the run that this one reads: by role, the model's name."""
        return {}

    def assembled_from(self) -> dict[str, str]:
        """Those of its inputs that the finished model needs too."""
        return self.inputs()

    def from_base(self, base: str) -> dict[str, ModelConfig]:
        """By role, the inputs that a base model brings along where the run names none."""
        return {}

    def elsewhere(self) -> str:
        """The path or hub name of a model that is used as it is and never trained; empty: it is trained here."""
        return ""

    def find(self, path: str, note: Callable[[str], None]) -> Found:
        """What lies at a path or hub name, for a model that is used as it is or begins from a base.

        Raises:
            UserError: naming what is missing or damaged, or that this kind begins from nothing.
        """
        raise UserError(f"init: a model of kind {self.kind} begins from nothing; leave init out")

    def found_for(self, found: Found, asked: Mapping[str, str]) -> Found:
        """What was found, with what the run's other models ask of it (values of `requires`, each with the field that asks).

        Raises:
            UserError: if its files have it not.
        """
        return found

    def adopt(self, found: Found, target: Path) -> None:
        """For a model that `adopts`: write what was found to `target` in the form that it is used in."""
        self.cannot("be taken from elsewhere")

    def continued(self, base: Path) -> ModelConfig:
        """This configuration with what a base model's files decide.

        Raises:
            UserError: naming the field, both values and the fix.
        """
        return self

    def oversized(self, others: Mapping[str, ModelConfig]) -> Iterator[str]:
        """What is set larger than the base model can use, a line each, beginning with the field's name; `others` are its inputs by role."""
        yield from ()

    def counted(self, base: str, note: Callable[[str], None]) -> ModelConfig:
        """This configuration as a plan counts it, with what a base model's files on this machine say; `note` is told what is assumed."""
        return self

    def for_stage(self, stage: TrainingStage) -> ModelConfig:
        """This configuration with what a training stage says of it."""
        return self

    def build(self, context: Context) -> Family:
        """The family, ready to train."""
        self.cannot("be trained")

    def shards(self) -> bool:
        """Whether the family's parameters may be split over processes (`Family.shardable`), known before it is built."""
        return False

    def identity(self) -> dict[str, Any]:
        """What the trained result depends on, as plain values."""
        return plain(self)

    def shown(self) -> dict[str, Any]:
        """What only the finished model's use depends on (defaults of sampling, say)."""
        return {}

    def check(self, stage: TrainingStage, where: str, begins: str) -> Iterator[str]:
        """What is wrong between this configuration and a stage that trains it.

        Args:
            where: the stage's path in the configuration.
            begins: what its weights begin with: a path, the name of an earlier stage as `stages.NAME`, or empty.
        """
        yield from ()

    def step_px(self, others: Mapping[str, ModelConfig]) -> int:
        """Sides of pictures must be multiples of this; `others` are its inputs by role."""
        return 1

    def text_width(self) -> int:
        """Width of the text states that it expects; 0: it reads none."""
        return 0

    def parameters(self, others: Mapping[str, ModelConfig], note: Callable[[str], None], width: int = 768) -> int:
        """Parameters of the network as others use it; 0: all that it learns. Arguments as `footprint`'s and `text_shape`'s."""
        return 0

    def footprint(self, stage: TrainingStage, side: int, others: Mapping[str, ModelConfig], note: Callable[[str], None]) -> Footprint:
        """What a training step on images of `side` x `side` px needs; `others` are its inputs by role."""
        return Footprint(learned={}, frozen={}, cost=NOTHING)

    def latent_network(self, note: Callable[[str], None]) -> Codec:
        """For an autoencoder: the configuration of its network; `note` is told what is assumed.

        Raises:
            UserError: for any other model.
        """
        self.cannot("make latents; name an autoencoder")

    def encoding(self, side: int, note: Callable[[str], None]) -> tuple[Cost, int]:
        """For a model that encodes: the cost of one image of `side` x `side` px, and the values kept of it."""
        return NOTHING, 0

    def text_shape(self, note: Callable[[str], None], width: int = 768) -> TextShape:
        """For a text encoder: its shape; `note` is told what is assumed, `width` is what its reader expects.

        Raises:
            UserError: for any other model.
        """
        self.cannot("encode text; name a text encoder")

    def image_tower(self, side: int, note: Callable[[str], None]) -> TowerShape:
        """For a model that `has_tower`: its image tower's shape; `side` is what its reader sees, `note` is told what is assumed.

        Raises:
            UserError: for any other model.
        """
        self.cannot("see pictures; name a model of kind clip")

    def encoder(self, product: Path, device: torch.device) -> Any:
        """For a model that encodes: the latent codec of a finished stage's product."""
        self.cannot("make latents")

    def assemble(self, products: Mapping[str, Product], target: Path, story: Mapping[str, Any]) -> None:
        """Put its product (role `model`) and its inputs' together as a model folder, committed at once.

        Here: the product itself, with an ldm.json that names kind, configuration and story.
        """

        def write(folder: Path) -> None:
            shutil.copytree(products["model"].folder, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns(atomic.MANIFEST))
            said = {"kind": self.kind, "config": plain(self), "story": dict(story), "ldm_version": __version__}
            atomic.write_json(folder / RECORD, said)

        atomic.commit(target, write)

    def lead_in(self, folder: Path) -> None:
        """Of the model before in a chain: what it adds to the folder of the one behind, which holds it, for a pipeline of diffusers."""

    def measured(self, products: Mapping[str, Product], scratch: Path, story: Mapping[str, Any], device: torch.device) -> Any:
        """What a metric asks: the finished model, opened as an export would assemble it from its products, if that is not there yet."""
        if not scratch.is_dir():
            self.assemble(products, scratch, story)
        return self._opened(products, scratch, device)

    def _opened(self, products: Mapping[str, Product], folder: Path, device: torch.device) -> Any:
        """What was assembled in a folder; behind the model whose pictures it is told, if there is one."""
        found = self.open(folder, device)
        if AFTER not in products:
            return found
        before = products[AFTER].config
        assert before is not None
        return chained(before._opened(within(products), folder / BEFORE, device), found)

    @classmethod
    def open(cls, folder: Path, device: str | torch.device, low_memory: bool = False) -> Any:
        """A finished model folder of this kind, as `assemble` wrote it: what draws.

        Raises:
            UserError: if its ldm.json does not hold this kind's configuration.
        """
        found = build(read_record(folder).get("config", {}), cls, str(folder / RECORD))
        check(folder)
        family = found.opened(folder)
        for module in (family, *family.frozen()):
            module.to(device)
        return family.eval()

    def opened(self, folder: Path) -> Any:
        """The family with the weights of a model folder that this configuration was saved in: a torch module that draws."""
        self.cannot("be opened by itself")

    def cannot(self, what: str) -> NoReturn:
        """Refuse what this kind of model has not.

        Raises:
            UserError: always.
        """
        raise UserError(f"a model of kind {self.kind} cannot {what}")


@dataclass(frozen=True)
class Product:
    """What a finished stage left: a folder of parts and the hash of its content."""

    folder: Path
    hash: str
    config: ModelConfig | None = None  # of the model that it is; None: not asked for


@dataclass(frozen=True, kw_only=True)
class Context:
    """What a family may look at when it is built: the data, the earlier products, the stage's numbers."""

    data: DataSet
    val: DataSet
    resolution: int  # px
    seed: int
    total_images: int  # the length of the stage
    held_out: DataSet | None = None  # of val, what training would see: the stage's filter and tags; None: val as it is
    own: int = 0  # of the data's samples the first so many are the run's own, others preserve a prior; 0: all
    products: Mapping[str, Product] = field(default_factory=dict)  # by role, what the inputs of its configuration have left
    init: Product | None = None  # an earlier stage of the same model or a base model, to continue
    device: torch.device = torch.device("cpu")


class Family(nn.Module, ABC):
    """Networks with their loss.

    Trainable networks are submodules; frozen ones are listed by `frozen`, outside the module tree, so that no wrapper,
    optimiser or state dict ever sees them. `forward` is the loss, so that gradients pass through whatever wraps the module.
    """

    ranks: Ranks = Ranks()
    shardable: bool = False  # whether its parameters may be split over processes: `forward` alone uses them, and none is a scalar

    @abstractmethod
    def loss(self, batch: Any, rng: Rng) -> tuple[Terms, Terms]:
        """Terms (scalars whose sum is minimised) and gauges (scalars to watch, no gradient) for one batch."""

    def forward(self, batch: Any, rng: Rng) -> tuple[Terms, Terms]:
        """The loss."""
        return self.loss(batch, rng)

    noised: bool = False  # whether it answers `loss_at`

    def loss_at(self, batch: Any, rng: Rng, level: Tensor) -> tuple[Tensor, Tensor]:
        """The loss (B,) of each sample, and the share sigma (B,) of noise in it.

        Args:
            level: (B,) in [0,1), the noise level of each as a share of the schedule, from clean to noisy.

        Raises:
            ValueError: where the family is not `noised`.
        """
        raise ValueError(f"{type(self).__name__} adds no noise, so it has no loss by noise level")

    def known(self, batch: ImageBatch | MomentBatch) -> MomentBatch | None:
        """What frozen networks make of a batch, which `loss_at` takes in its place; None: nothing that may be kept."""
        return None

    def frozen(self) -> list[nn.Module]:
        """Networks that are used but never trained."""
        return []

    def parameter_groups(self) -> list[ParameterGroup]:
        """Parameters by who learns them; each group's gradients are clipped apart."""
        return [ParameterGroup(name="model", parameters=[p for p in self.parameters() if p.requires_grad])]

    def compilable(self) -> list[nn.Module]:
        """The networks, or blocks of them, that nearly all of a training step goes through, as calls of their own.

        No backward pass through one may be made twice or be differentiated itself, and none is called but as a module.
        """
        return []

    def idle(self) -> list[nn.Parameter]:
        """Parameters that do not learn at this step; their gradients are dropped."""
        return []

    def progress(self, images: int) -> None:
        """Told before each step how many images the stage has seen (start of an adversarial term, say)."""

    def after_step(self, step: int, rng: Rng) -> Terms:
        """Called after the optimiser's step number `step` (codebook maintenance, say); returns gauges."""
        return {}

    def averaged(self) -> list[nn.Parameter]:
        """The parameters whose moving average is sampled and saved."""
        return [p for p in self.parameter_groups()[0].parameters]

    def compute_in(self, kind: torch.dtype) -> None:
        """Told the type that autocast computes in, before the networks go to their device: frozen weights may lie in it, or in bits."""

    def preview(self, batch: ImageBatch, seed: int) -> Tensor | None:
        """A few pictures (N,3,H,W) in [-1,1] for the eye, laid out in rows of `preview_columns`."""
        return None

    preview_columns: int = 8
    preview_by_sample: bool = False  # what is shown of sample i depends on that sample and seed + i alone, so that processes share the work

    def finish(self, context: Context) -> dict[str, Any]:
        """Measurements on the final weights (latent statistics, say) that belong to the product; also logged."""
        return {}

    def cut_captions(self, captions: Sequence[str]) -> CutCaptions | None:
        """Which captions are longer than it reads; None: none, or it reads none."""
        return None

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Write the parts in diffusers' layout below `folder`."""


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters that are clipped together and learn at `lr_scale` times the stage's rate."""

    name: str
    parameters: list[nn.Parameter]
    lr_scale: float = 1.0
    tables: frozenset[nn.Parameter] = frozenset()  # of them, embeddings and output layers of symbols, a row each: none of Muon's matrices


def agree(where: str, said: Any, theirs: Any, but: tuple[str, ...], base: Path) -> None:
    """Refuse a configuration that contradicts the base model which it continues.

    Args:
        where: the path of both in the configuration.
        but: fields that may differ.

    Raises:
        UserError: naming the field, both values and the fix.
    """
    for one in fields(said):
        if one.name in but or not one.compare:
            continue
        a, b = getattr(said, one.name), getattr(theirs, one.name)
        if a != b:
            raise UserError(f"{where}.{one.name}: got {in_words(a)}, but the base model {base} has {in_words(b)}; leave {where} out")


def in_words(value: Any) -> str:
    """A configuration's value as a message says it."""
    return str(getattr(value, "kind", None) or value)
