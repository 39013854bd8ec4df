"""A base model of which little learns, adapters or a new word's embedding; all else is frozen, and not in checkpoints."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

import torch
from torch import Tensor, nn

from ldm.config.counts import plural
from ldm.config.errors import UserError
from ldm.config.schema import Count, NonNegative, PathText, Positive, PositiveFloat, config, plain, refuse_unread
from ldm.diffusion.batch import ImageBatch, MomentBatch
from ldm.diffusion.rng import Rng
from ldm.families.family import Context, Family, ParameterGroup, Terms
from ldm.formats.atomic import sha256, write_json
from ldm.formats.embedding_files import write_embedding
from ldm.formats.lora_files import Style, read, write
from ldm.formats.lora_keys import sgm_names
from ldm.formats.model_folder import RECORD, read_record
from ldm.formats.part import save_part
from ldm.formats.text_folder import text_parts
from ldm.models.conditioned import base_of
from ldm.models.cost import TextShape
from ldm.models.denoiser import Denoiser
from ldm.models.layer_adapters import LayerAdapter
from ldm.models.lora import (
    TEXT_PREFIX,
    TEXT_TARGETS,
    Lora,
    Method,
    Pair,
    Part,
    adapted_count,
    continue_with,
    flat,
    inject,
    injected,
    matched,
    merged_state,
    targeted,
    weighted_modules,
)
from ldm.models.quantized import Bits
from ldm.models.text_tower import TowerPair, towers
from ldm.text.encoder import TextEncoder
from ldm.text.textual_inversion import PartlyTrainedEmbedding, add_word, first_embeddings


class Adaptable(Family):
    """What adapters need of the family whose networks they learn beside."""

    denoiser: Denoiser
    text: TextEncoder
    text_learns: bool

    @property
    def networks(self) -> dict[Part, nn.Module]:
        """What adapters may learn beside, as files name it."""
        return {"unet": base_of(self.denoiser), **self.text.networks}

    @abstractmethod
    def preview(self, batch: ImageBatch | MomentBatch, seed: int) -> Tensor:
        """Pictures of a batch's captions (N,3,H,W) in [-1,1]."""

    @abstractmethod
    def halve(self, kind: torch.dtype, bits: Bits | None = None) -> None:
        """Put the denoising network's frozen weights, where they are only computed with, into a half type, and large ones into bits."""

    @abstractmethod
    def base_denoiser(self) -> Denoiser | None:
        """The denoising network as its files have it; None: its own weights are those, neither halved nor quantized.

        Raises:
            UserError: if the files are no longer those that training began with.
        """

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """What a model folder must say besides the networks' own configurations."""

    @abstractmethod
    def save_denoiser(self, state: dict[str, Tensor], folder: Path, **said: Any) -> None:
        """Write the denoising network with other weights below `folder`, and what it was trained with."""


class AdaptedFamily(Family):
    """Learned parameters, in a module tree of their own, and the frozen base model that uses them.

    Checkpoints, EMA and the processes' exchange of gradients see the learned parameters alone.
    """

    def __init__(self, inner: Adaptable, context: Context) -> None:
        super().__init__()
        self._inner = (inner,)  # a tuple, so that it stays out of the module tree
        self.noised = inner.noised
        self.base = {"unet": "" if context.init is None else context.init.hash, "resolution": str(context.resolution)}
        self.base |= {"seed": str(context.seed), "images": str(context.total_images)}

    @property
    def inner(self) -> Adaptable:
        """The base model with what learns in its place."""
        return self._inner[0]

    bits: Bits | None = None  # that the base's frozen weights lie in

    def frozen(self) -> list[nn.Module]:
        """All of the base; the learned parameters, which it shares, move with it."""
        return [self.inner, *self.inner.frozen()]

    def compilable(self) -> list[nn.Module]:
        """The base's, with what learns in it."""
        return self.inner.compilable()

    def loss(self, batch: ImageBatch | MomentBatch, rng: Rng) -> tuple[Terms, Terms]:
        """The base's."""
        return self.inner.loss(batch, rng)

    def loss_at(self, batch: ImageBatch | MomentBatch, rng: Rng, level: Tensor) -> tuple[Tensor, Tensor]:
        """The base's."""
        return self.inner.loss_at(batch, rng, level)

    def known(self, batch: ImageBatch | MomentBatch) -> MomentBatch | None:
        """As the base."""
        return self.inner.known(batch)

    def compute_in(self, kind: torch.dtype) -> None:
        """The denoising network's frozen weights lie in that type, to which autocast would cast them at every use, or in bits."""
        self.inner.halve(kind, self.bits)

    def averaged(self) -> list[nn.Parameter]:
        """Everything that learns."""
        return [p for group in self.parameter_groups() for p in group.parameters]

    preview_by_sample = True

    def preview(self, batch: ImageBatch | MomentBatch, seed: int) -> Tensor:
        """The base's."""
        self.inner.text.forget()
        pictures = self.inner.preview(batch, seed)
        self.inner.text.forget()
        return pictures

    def metadata(self) -> dict[str, str]:
        """What files tell of their origin: the base's hash, and the names that kohya's scripts give such things."""
        base, side = self.base, self.base["resolution"]
        return {
            "ldm_base_hash": base["unet"],
            "ss_sd_model_hash": base["unet"],
            "ss_resolution": f"({side}, {side})",
            "ss_seed": base["seed"],
            "ss_num_train_images": base["images"],
            "ss_v2": "False",
            **({"ss_base_model_version": "sdxl_base_v1-0"} if len(self.inner.text.networks) > 1 else {}),
            "ss_noise_offset": str(self.inner.describe().get("offset_noise")),
        }

    def save_text(self, state: dict[str, Tensor], folder: Path) -> None:
        """text_encoder/ with other weights, and tokenizer/; of a pair those of both."""
        for name, part in text_parts(self.inner.text.model, state).items():
            save_part(*part, folder / name, "model")
        self.inner.text.save_words(folder)


class LoraFamily(AdaptedFamily):
    """Adapters of the denoising network, and where they are asked for of the text encoder."""

    def __init__(self, config: LowRank, inner: Adaptable, context: Context) -> None:
        super().__init__(inner, context)
        self.text_lr, self.bits = config.text_lr, config.bits
        self.unet, self.text = nn.ParameterList(), nn.ParameterList()
        inner.text_learns = config.text_learns
        if config.init:
            for part, adapters in config.continued_in(inner.networks).items():
                try:
                    (self.unet if part == "unet" else self.text).extend(continue_with(inner.networks[part], adapters))
                except UserError as error:
                    raise UserError(f"adapt.init: {config.init}: {error}") from None
            return
        how = (config.method, config.factor)
        targets = config.targets or inner.denoiser.lora_targets
        self.unet.extend(inject(inner.denoiser, config.rank, config.alpha, targets, *how))
        if config.text_learns:
            scaled = config.alpha * config.text_rank / config.rank
            for network in inner.text.networks.values():
                found = read_layers(inner.text.model, network, config.text_targets)
                self.text.extend(inject(network, config.text_rank, scaled, found, *how))

    def parameter_groups(self) -> list[ParameterGroup]:
        """The denoising network's adapters, and the text encoder's at their own rate."""
        found = [ParameterGroup(name="model", parameters=list(self.unet))] if len(self.unet) else []
        return found + ([ParameterGroup(name="text", parameters=list(self.text), lr_scale=self.text_lr)] if len(self.text) else [])

    def lora(self) -> Lora:
        """What has been learned."""
        pairs: dict[Part, Any] = {"unet": injected(self.inner.denoiser)} if len(self.unet) else {}
        for part, network in self.inner.text.networks.items() if len(self.text) else ():
            pairs[part] = {name.removeprefix(TEXT_PREFIX): pair for name, pair in injected(network).items()}
        return Lora(pairs=pairs, metadata=self.metadata())

    def save(self, folder: Path) -> None:
        """The merged network and text encoder as a model has them, and lora/ with peft's, diffusers' and kohya's files."""
        unet: Any = self.inner.denoiser
        lora = replace(self.lora(), network=self.inner.denoiser.config.folder)
        sgm = sgm_names(unet.config, lora.pairs.get("unet", {})) if isinstance(self.inner.text.model, TowerPair) else None
        for style in get_args(Style):
            write(lora, folder / LORA, style, self.metadata(), sgm)
        said = {"base": self.base["unet"], MERGED: hashes(folder / LORA)}
        self.inner.save_denoiser(merged_state(self.inner.denoiser, self.inner.base_denoiser()), folder, **said)
        if len(self.text):
            self.save_text(merged_state(self.inner.text.model), folder)


def read_layers(model: nn.Module, tower: nn.Module, targets: Sequence[str]) -> list[str]:
    """The names of a text tower's layers that adapters find by `targets`, without those after the states that are read.

    Raises:
        UserError: as `targeted`.
    """
    found = list(targeted(tower, targets))
    if not isinstance(model, TowerPair) or tower is not model.text_encoder:
        return found
    unread = f"encoder.layers.{len(model.text_encoder.encoder.layers) - 1}."
    return [name for name in found if not name.startswith(unread)]


class InvertedFamily(AdaptedFamily):
    """A new word's embedding."""

    def __init__(self, config: TextualInversion, inner: Adaptable, context: Context) -> None:
        super().__init__(inner, context)
        self.config = config
        self.rows = new_word(inner, config)

    def loss(self, batch: ImageBatch | MomentBatch, rng: Rng) -> tuple[Terms, Terms]:
        """The base's, of captions with the word in them."""
        return self.inner.loss(replace(batch, caption=tuple(self.captions(batch.caption, rng))), rng)

    def loss_at(self, batch: ImageBatch | MomentBatch, rng: Rng, level: Tensor) -> tuple[Tensor, Tensor]:
        """The base's, of captions with the word in them."""
        return super().loss_at(replace(batch, caption=tuple(self.captions(batch.caption, rng))), rng, level)

    def captions(self, captions: Sequence[str], rng: Rng) -> list[str]:
        """Captions that have the word stay; others become one of the templates, by chance."""
        config = self.config
        chosen = (rng.uniform("template") * len(config.templates)).long().tolist()
        return [
            text if config.token in text else config.templates[i].replace("{}", config.token)
            for text, i in zip(captions, chosen, strict=True)
        ]

    def preview(self, batch: ImageBatch | MomentBatch, seed: int) -> Tensor:
        """Pictures of captions with the word in them."""
        texts = [text if self.config.token in text else self.config.templates[0].replace("{}", self.config.token) for text in batch.caption]
        return super().preview(replace(batch, caption=tuple(texts)), seed)

    def save(self, folder: Path) -> None:
        """The base with one word more, and embedding/ with diffusers' and A1111's files."""
        self.inner.save(folder)
        save_word(self, self.config.token, self.rows, folder, EMBEDDING)


class NewWord(Protocol):
    """A word that an embedding is learned for."""

    @property
    def token(self) -> str:
        """It."""
        ...

    @property
    def init(self) -> str:
        """What it means at first."""
        ...

    @property
    def vectors(self) -> int:
        """How many embeddings it has."""
        ...


def new_word(inner: Adaptable, word: NewWord) -> nn.Parameter:
    """Teach a base a word, and return its embeddings (V,D), which learn.

    Raises:
        UserError: as `add_word`.
    """
    start = first_embeddings(inner.text, word.init, word.vectors)
    rows = nn.Parameter(start + start.std() * 0.01 * torch.randn_like(start) * (word.vectors > 1))
    tables = add_word(inner.text, word.token, start)
    inner.text.model.requires_grad_(False)
    at = 0
    for tower, table in zip(towers(inner.text.model), tables, strict=True):
        tower.set_input_embeddings(PartlyTrainedEmbedding(table, rows, at))
        at += table.shape[1]
    inner.text_learns = True
    return rows


def save_word(family: AdaptedFamily, token: str, rows: Tensor, folder: Path, name: str) -> None:
    """The text encoder with a word more, and NAME/ with diffusers' and A1111's files of it, which ldm.json remembers."""
    model = family.inner.text.model
    state = dict(model.state_dict())
    for stem, module in model.named_modules():
        if isinstance(module, PartlyTrainedEmbedding):
            del state[f"{stem}.table"], state[f"{stem}.rows"]
            state[f"{stem}.weight"] = module.whole()
    family.save_text(state, folder)
    widths = [tower.config.hidden_size for tower in towers(model)]
    write_embedding(folder / name, token, rows.detach().split(widths, dim=1), family.metadata())
    write_json(folder / RECORD, {**read_record(folder), "base": family.base["unet"], MERGED: hashes(folder / name)})


LORA, EMBEDDING, CUSTOM = "lora", "embedding", "custom"  # folders in a product, beside the model's parts
KEPT = (LORA, EMBEDDING, CUSTOM)  # what an export puts beside the model, too
MERGED = "merged"  # in ldm.json: SHA-256 sums of these files, so that none is applied to the model twice


def hashes(folder: Path) -> str:
    """SHA-256 sums of a folder's files."""
    return " ".join(sorted(sha256(file) for file in folder.rglob("*.safetensors")))


class AdaptConfig:
    """What a member of `Adapt` answers; the defaults are those of one whose captions are encoded once and are used as they stand."""

    __slots__ = ()
    kind: str

    @property
    def text_learns(self) -> bool:
        """Whether captions are encoded anew at every step."""
        return False

    @property
    def halves(self) -> bool:
        """Whether the denoising network's frozen weights may lie in a half type."""
        return True

    @property
    def bits(self) -> Bits | None:
        """What they are quantized to; None: they are not."""
        return None

    def identity(self) -> dict[str, Any]:
        """What the result depends on: all fields."""
        return plain(self)

    def check(self) -> None:
        """Nothing: fields were looked at one by one."""

    def remarks(self) -> list[str]:
        """What a user should know before any work, a line each, beginning with a field's name."""
        return []

    def suits(self, denoiser: Denoiser) -> None:
        """Any network."""

    def oversized(self, denoiser: Denoiser, text: TextShape) -> Iterator[str]:
        """What is set larger than a denoiser on the meta device and a text encoder can use: nothing."""
        yield from ()

    def example_of(self, caption: str) -> str:
        """A caption as it is."""
        return caption


@config
class LowRank(AdaptConfig):
    """LoRA (Hu 2021, arXiv 2106.09685) and its kin: small matrices beside the base's frozen ones learn, and are merged in the product."""

    kind: Literal["lora"] = "lora"
    method: Method = "lora"  # what is learned: plain LoRA, DoRA (also each output's magnitude), LoHa or LoKr
    rank: Positive = 8  # of the denoising network's adapters
    alpha: PositiveFloat = 8.0  # adapters are scaled by alpha / rank
    targets: tuple[str, ...] = ()  # ends of the names of its layers that get one: to_q, attn2.to_k, conv1; none: what is usual for it
    factor: Positive | None = None  # LoKr's: rows of the first factor, at most; null: about the root of the layer's
    text_rank: Count = 0  # of the text encoder's adapters, of the same alpha / rank; 0: the text encoder stays as it is
    text_targets: tuple[str, ...] = TEXT_TARGETS  # its layers
    text_lr: NonNegative = 0.5  # their learning rate, as a share of the stage's
    base_precision: Literal["stage", "int8", "nf4"] = "stage"  # of the denoising network's frozen weights: the stage's, or 8 or 4 bits
    init: PathText = ""  # a LoRA or DoRA file (or folder) to continue: method, ranks, alphas and layers are its own; empty: begin anew

    @property
    def text_learns(self) -> bool:
        """Whether captions are encoded anew at every step."""
        return any(part != "unet" for part in continued(self.init).pairs) if self.init else self.text_rank > 0

    @property
    def halves(self) -> bool:
        """Whether the frozen weights are only computed with, and so may lie in a half type; DoRA reads them."""
        if self.init:
            return all(getattr(pair, "magnitude", None) is None for pairs in continued(self.init).pairs.values() for pair in pairs.values())
        return self.method != "dora"

    @property
    def bits(self) -> Bits | None:
        """What the frozen weights are quantized to."""
        return None if self.base_precision == "stage" else self.base_precision

    def count(self, denoiser: Denoiser, text: TextShape) -> dict[str, int]:
        """Parameters that learn, of a denoiser on any device and a text encoder."""
        if self.init:
            return {f"adapters of {part}": sum(pair.count for pair in pairs.values()) for part, pairs in continued(self.init).pairs.items()}
        found = {"adapters": adapted_count(denoiser, self.rank, self.targets or denoiser.lora_targets, self.method, self.factor)}
        if self.text_rank:
            with torch.device("meta"):
                model = text.built()
                learning = [(tower, read_layers(model, tower, self.text_targets)) for tower in towers(model)]
                counts = [adapted_count(tower, self.text_rank, names, self.method, self.factor) for tower, names in learning]
            found["text adapters"] = sum(counts)
        return found

    def identity(self) -> dict[str, Any]:
        """What the result depends on, a file by its content; fields that are newer than others only where they say something."""
        found = {
            name: value
            for name, value in plain(self).items()
            if name not in ("method", "factor", "init", "base_precision") or value != getattr(USUAL, name)
        }
        return found | ({"init": continued(self.init).hash} if self.init else {})

    def check(self) -> None:
        """Refuse what does not belong together, and a file that cannot be continued.

        Raises:
            UserError: naming the field.
        """
        if self.factor is not None and self.method != "lokr":
            raise UserError(f"factor: got {self.factor}, which only LoKr has; say method: lokr, or leave it out")
        if self.bits and not self.halves:
            raise UserError(
                f"base_precision: got {self.base_precision}, but DoRA reads the base's weights at every step; leave it out, or the method"
            )
        if not self.text_learns:
            refuse_unread(self, ("text_lr", "text_targets"), "where the text encoder learns nothing; set text_rank, or leave it out")
        elif self.init:
            refuse_unread(self, ("text_targets",), "with init, whose own layers go on learning; leave it out")
        if not self.init:
            return
        pairs: Mapping[Part, Mapping[str, Any]] = continued(self.init).pairs
        text = [pair for part, own in pairs.items() if part != "unet" for pair in own.values()]
        unet = list(pairs.get("unet", {}).values())
        others = sorted({type(pair).__name__ for pair in (*unet, *text) if not isinstance(pair, Pair) or pair.mid is not None})
        if others:
            kinds = ", ".join(KINDS.get(name, "LoCon with kernels between") for name in others)
            raise UserError(f"init: {self.init} holds {kinds}; only LoRA and DoRA are continued: {ANEW}")
        said = (("method", "method", [*unet, *text]), ("rank", "rank", unet), ("alpha", "alpha", unet), ("text_rank", "rank", text))
        for name, field, own in said:
            got, theirs = getattr(self, name), {getattr(pair, field) for pair in own}
            if got != getattr(USUAL, name) and theirs != {got}:
                has = ", ".join(str(value) for value in sorted(theirs)[:3]) or "none"
                raise UserError(f"{name}: got {got}, but init continues {self.init}, which has {has}; leave it out")
        for name in continued(self.init).pairs.get("unet", {}) if self.targets else ():
            if not any(flat(name).endswith(flat(target)) for target in self.targets):
                raise UserError(f"targets: got {list(self.targets)}, but init continues {self.init}, which has {name}; leave them out")

    def remarks(self) -> list[str]:
        """Of a file that is continued what it is: a saved configuration states defaults, which cannot be told from what was asked for."""
        if not self.init:
            return []
        found = []
        for part, pairs in sorted(continued(self.init).pairs.items(), key=lambda one: one[0] != "unet"):
            own: Any = list(pairs.values())
            method = "DoRA" if any(pair.magnitude is not None for pair in own) else "LoRA"
            ranks, alphas = (_few_of({getattr(pair, name) for pair in own}) for name in ("rank", "alpha"))
            found.append(f"{plural(len(own), 'layer')} of {part} by {method} of rank {ranks}, alpha {alphas}")
        return [f"init: goes on with {self.init}: {'; '.join(found)}, as the file has them"]

    def suits(self, denoiser: Denoiser) -> None:
        """Refuse targets that a denoising network, on any device, has not, and a file to continue that is for another one.

        Raises:
            UserError: naming them.
        """
        if not self.init:
            targeted(denoiser, self.targets or denoiser.lora_targets)
        elif own := continued(self.init).pairs.get("unet"):
            self._matched(replace(continued(self.init), pairs={"unet": own}), {"unet": denoiser})

    def oversized(self, denoiser: Denoiser, text: TextShape) -> Iterator[str]:
        """Ranks that are larger than their layers' sides."""
        if self.init:
            every = [pair for own in continued(self.init).pairs.values() for pair in own.values()]
            yield from too_large("init", [(getattr(pair, "rank", 0), min(pair.shape or (0,))) for pair in every])
            return
        yield from too_large("rank", self._sides(denoiser, self.targets or denoiser.lora_targets, self.rank), self.method)
        if self.text_rank:
            with torch.device("meta"):
                model = text.built()
            found = [self._sides(tower, read_layers(model, tower, self.text_targets), self.text_rank) for tower in towers(model)]
            yield from too_large("text_rank", [each for sides in found for each in sides], self.method)

    def _sides(self, network: nn.Module, targets: Sequence[str], rank: int) -> list[tuple[int, int]]:
        """Of each layer that gets adapters the rank, and the largest that it can use; of LoKr one less where it makes a factor whole."""
        if self.method != "lokr":
            weights = [layer.weight for layer in targeted(network, targets).values()]
            return [(rank, min(len(weight), weight[0].numel())) for weight in weights]
        inject(network, rank, rank, targets, "lokr", self.factor)
        pairs: list[Any] = list(injected(network).values())
        return [(rank, rank - 1 if len(pair.second) == 1 else rank) for pair in pairs]

    def continued_in(self, networks: Mapping[Part, nn.Module]) -> dict[Part, dict[str, LayerAdapter]]:
        """What is continued, by part and by the dotted names of the networks' layers.

        Raises:
            UserError: for a file that is missing, damaged or for another model.
        """
        found: dict[Part, dict[str, LayerAdapter]] = {}
        for (part, name), pair in self._matched(continued(self.init), networks).items():
            found.setdefault(part, {})[name] = pair
        return found

    def _matched(self, lora: Lora, networks: Mapping[Part, nn.Module]) -> dict[tuple[Part, str], LayerAdapter]:
        unet: Any = networks["unet"]
        return matched(lora, networks, sgm_names(unet.config, weighted_modules(unet)))


def too_large(field: str, sides: Sequence[tuple[int, int]], method: Method = "lora") -> Iterator[str]:
    """What is told of ranks that are larger than layers can use; a line at most.

    Args:
        sides: of each layer its rank, and the largest that it can use.
    """
    over = [(rank, side) for rank, side in sides if rank > side]
    if not over:
        return
    ranks, smaller = (_few_of(set(values)) for values in zip(*over, strict=True))
    where = f"{len(over)} of {plural(len(sides), 'layer')}"
    if method == "lokr":
        yield f"{field}: rank {ranks} is so large that {where} learn the second factor whole; there it only divides alpha"
    else:
        yield f"{field}: rank {ranks} is larger than the smaller side ({smaller}) of {where}, which can use no more"


def _few_of(values: set[float]) -> str:
    """One value, or the range of several."""
    return f"{min(values):g}" if len(values) == 1 else f"{min(values):g} to {max(values):g}"


USUAL = LowRank()
ANEW = "merge it into its base (LyCORIS' and peft's tools do), and train anew with init=MERGED"
KINDS = {"Hadamard": "LoHa", "Kronecker": "LoKr", "Difference": "whole differences", "Whole": "whole weights"}


@lru_cache(maxsize=1)
def continued(file: str) -> Lora:
    """The LoRA in a file that training goes on from.

    Raises:
        UserError: if it cannot be read, or brings more than training continues.
    """
    try:
        found = read(file)
    except UserError as error:
        raise UserError(f"init: {error}") from None
    if found.words:
        raise UserError(f"init: {file} brings the word {found.words[0].token}, which training does not continue; give a file without")
    return found


@config
class TextualInversion(AdaptConfig):
    """Textual inversion (Gal 2022, arXiv 2208.01618): the base's weights stay; a new word's embedding learns what its pictures share."""

    kind: Literal["textual_inversion"] = "textual_inversion"
    token: str  # the new word, such as <thing>
    init: str  # what it means at first, in words that the base knows
    vectors: Positive = 1  # how many embeddings it has; prompts have room for fewer words the more they are
    templates: tuple[str, ...] = ("a picture of {}", "{}", "a {}")  # captions of pictures whose own has not the word; {}: the word

    @property
    def text_learns(self) -> bool:
        """Whether captions are encoded anew at every step."""
        return True

    def example_of(self, caption: str) -> str:
        """A caption with the new word."""
        return caption if self.token in caption else self.templates[0].replace("{}", self.token)

    def count(self, denoiser: nn.Module, text: TextShape) -> dict[str, int]:
        """Parameters that learn: the new word's embeddings."""
        return {"word": self.vectors * text.states}

    def __post_init__(self) -> None:
        check_word(self)
        if not self.templates or any(text.count("{}") != 1 for text in self.templates):
            raise UserError(f"templates: got {list(self.templates)}; each needs {{}} once, where the word stands")


def check_word(word: NewWord) -> None:
    """Refuse what prompts cannot have as a word, and one that means nothing at first.

    Raises:
        UserError: naming the field.
    """
    if len(word.token) < 3 or any(c.isspace() or c in "()[]:" for c in word.token):
        raise UserError(f"token: got {word.token!r}; one word of three characters or more without brackets or colons, such as <thing>")
    if not word.init.strip():
        raise UserError("init: empty; say what the new word means at first, in words the base knows, such as 'ball'")
