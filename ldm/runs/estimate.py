"""What the stages of a run need, from the networks of its configuration: parameters, memory of a device, operations per image."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

import torch

from ldm.models import cost
from ldm.models.cost import Cost, TextShape
from ldm.families.latent_diffusion.fine_tuning import Adapt, TextualInversion
from ldm.families.autoencoder import KL, VQ
from ldm.families.clip import Clip
from ldm.families.perceptual_loss import PerceptualClip, PerceptualLpips
from ldm.formats.part import read_json
from ldm.formats.model_folder import open_model
from ldm.runs.pretrained import roles
from ldm.models.lora import TEXT_TARGETS, adapted_count
from ldm.models.autoencoder import KLConfig, VQConfig
from ldm.models.perceptual import FeatureDistance, Lpips
from ldm.models.unet import UNetConfig
from ldm.training.optim import AdamW
from ldm.runs.run import Run
from ldm.formats.single_file import named
from ldm.text.pretrained import PretrainedText
from ldm.training.settings import Train

Network = TypeVar("Network", bound=KLConfig | VQConfig | UNetConfig)
FLOAT, HALF = 4, 2  # bytes
SIZES = 6  # numbers of ImageBatch.size
# Text encoders by the width of their states, where the files are not here to tell.
PUBLISHED = {
    768: TextShape("CLIP ViT-L/14", 768, 12),
    1024: TextShape("OpenCLIP ViT-H/14 without its last layer", 1024, 23),
}


@dataclass(frozen=True, kw_only=True)
class Needs:
    """What a training stage needs."""

    parameters: dict[str, int]  # by part, those that are only used included
    learned: int
    averaged: int
    frozen: int
    cost: Cost  # of one image through the parts that learn, forward and backward
    extra: int  # FLOPs of one image in the frozen parts
    stage: Train

    @property
    def forward(self) -> int:
        """FLOPs of an image through the parts that learn, forward."""
        return self.cost.forward

    @property
    def flops(self) -> int:
        """FLOPs of an image in all."""
        return self.cost.training + self.extra

    @property
    def optimiser_bytes(self) -> int:
        """Two moments of each parameter; Muon keeps one, but for the few parameters that are no matrices."""
        return FLOAT * self.learned * (2 if isinstance(self.stage.optim, AdamW) else 1)

    @property
    def checkpoint_bytes(self) -> int:
        """Weights, moments and averages in float32."""
        return FLOAT * (self.learned + (self.averaged if self.stage.ema else 0)) + self.optimiser_bytes

    def memory(self, micro_batch: int) -> dict[str, int]:
        """Bytes on each device while a micro-batch is trained on, by what for.

        Weights, gradients, moments and averages are in float32 whatever the precision. Activations are what the forward
        pass keeps, counted on the meta device; under bf16 or fp16 half of that, and a cast copy of the learned weights.
        The allocator's own losses, workspaces and the frozen parts' passing activations are not in it.
        """
        full = self.stage.precision == "fp32"
        found = {
            "weights": FLOAT * self.learned,
            "gradients": FLOAT * self.learned,
            "optimiser": self.optimiser_bytes,
            "averages": FLOAT * self.averaged if self.stage.ema else 0,
            "cast weights": 0 if full else HALF * self.learned,
            "frozen parts": FLOAT * self.frozen,
            "activations": self.cost.activations * micro_batch // (1 if full else 2),
        }
        return {name: value for name, value in found.items() if value}


@dataclass(frozen=True, kw_only=True)
class Parts:
    """The networks of a run."""

    text: TextShape
    autoencoder: KLConfig | VQConfig
    unet: UNetConfig
    parameters: dict[str, int]
    notes: list[str] = field(default_factory=list)

    @property
    def factor(self) -> int:
        """Image pixels per latent pixel."""
        return 2 ** (len(self.autoencoder.channels) - 1)

    def training(self, run: Run, stage: Train) -> Needs:
        """What a training stage needs; several resolutions count as their mean, but for memory as the largest."""
        sides = (stage.resolution, *stage.also)
        each = [self._needs(run, stage, side) for side in sides]
        largest = max(each, key=lambda needs: needs.cost.activations)
        mean = cost.total(needs.cost for needs in each) * (1 / len(each))
        return replace(
            largest, cost=replace(mean, activations=largest.cost.activations), extra=sum(needs.extra for needs in each) // len(each)
        )

    def _needs(self, run: Run, stage: Train, side: int) -> Needs:
        if stage.family == "text":
            return self._clip(run, stage, side)
        return self._autoencoder(run, stage, side) if stage.family == "autoencoder" else self._diffusion(run, stage, side)

    def _clip(self, run: Run, stage: Train, side: int) -> Needs:
        assert isinstance(run.text, Clip)
        with torch.device("meta"):
            tower = run.text.tower.build()
        shared = self.text.width * run.text.tower.embedding + 1  # projection and temperature
        counts = {"text encoder": self.text.parameters, "image tower": cost.count(tower) + shared}
        return _needs(stage, counts, {}, self.text.cost + cost.tower(tower, side), 0)

    def _autoencoder(self, run: Run, stage: Train, side: int) -> Needs:
        assert isinstance(run.autoencoder, KL | VQ)
        family = run.autoencoder
        learned, encode, decode = cost.autoencoder(_recomputed(self.autoencoder, stage), side, side)
        spent, counts, frozen = encode + decode, {"autoencoder": learned}, {}
        if family.adversarial.weight:
            counts["discriminator"], game = cost.discriminator(family.adversarial.discriminator, side, side)
            # The share of the stage in which the discriminator takes part; memory must hold it then.
            heard = game * (1 - family.adversarial.start)
            spent += replace(heard, activations=game.activations)
        if isinstance(family.perceptual, PerceptualLpips | PerceptualClip):
            with torch.device("meta"):
                clip = isinstance(family.perceptual, PerceptualClip)
                judge = FeatureDistance(run.text.tower.build()) if clip and isinstance(run.text, Clip) else Lpips()
                judge.requires_grad_(False)
            frozen["perceptual"] = cost.count(judge)
            spent += cost.distance(judge, side, side)
        return _needs(stage, counts, frozen, spent, 0, averaged=learned)

    def _diffusion(self, run: Run, stage: Train, side: int) -> Needs:
        learned, spent = cost.unet(_recomputed(self.unet, stage), side // self.factor, side // self.factor, self.text.tokens)
        known, encode, _ = cost.autoencoder(self.autoencoder, side, side)
        extra = self.text.cost.forward + (0 if stage.latents else encode.forward)
        if run.diffusion.adapt is not None:
            return self._adapted(run.diffusion.adapt, stage, {"unet": learned, "autoencoder": known}, spent, extra)
        return _needs(stage, {"unet": learned}, {"autoencoder": known, "text encoder": self.text.parameters}, spent, extra)

    def _adapted(self, adapt: Adapt, stage: Train, frozen: dict[str, int], spent: Cost, extra: int) -> Needs:
        """Of a base that stays as it is: gradients of its weights are not made, and where captions are learned, the text encoder's are."""
        frozen = frozen | {"text encoder": self.text.parameters}
        spent = replace(spent, backward=spent.backward // 2)
        if isinstance(adapt, TextualInversion):
            learned = {"word": adapt.vectors * self.text.width}
        else:
            with torch.device("meta"):
                learned = {"adapters": adapted_count(self.unet.build(), adapt.rank, adapt.targets)}
            if adapt.text_rank:
                ends = [end for end in adapt.text_targets if end in TEXT_TARGETS]
                learned["text adapters"] = 2 * self.text.width * adapt.text_rank * self.text.layers * len(ends)
        if adapt.text_learns:
            spent = spent + replace(self.text.cost, backward=self.text.cost.backward // 2)
            extra -= self.text.cost.forward
        return _needs(stage, learned, frozen, spent, extra)

    def encoding(self, side: int, copies: int) -> tuple[Cost, int]:
        """What encoding an image costs, and the bytes it leaves in a latent cache: mean, deviation, six sizes."""
        _, encode, _ = cost.autoencoder(self.autoencoder, side, side)
        values = self.channels * (side // self.factor) ** 2 * (2 if isinstance(self.autoencoder, KLConfig) else 1)
        return encode * copies, copies * (HALF * values + FLOAT * SIZES)

    @property
    def channels(self) -> int:
        """Of the latents."""
        network = self.autoencoder
        return network.latent_channels if isinstance(network, KLConfig) else network.code_width


def _needs(stage: Train, learned: dict[str, int], frozen: dict[str, int], spent: Cost, extra: int, averaged: int = 0) -> Needs:
    total = sum(learned.values())
    return Needs(
        parameters=learned | frozen, learned=total, averaged=averaged or total, frozen=sum(frozen.values()),
        cost=spent, extra=extra, stage=stage,
    )


def _recomputed(network: Network, stage: Train) -> Network:
    """A network's configuration with what the stage says of recomputing."""
    return network if stage.checkpointing is None else replace(network, checkpointing=stage.checkpointing)


def parts_of(run: Run) -> Parts:
    """The networks of a run; what is pretrained is read from its folder, and taken as published where that is not here."""
    notes: list[str] = []
    text, autoencoder = _text(run, notes), _autoencoder(run, notes)
    network = _unet(run, notes)
    found = Parts(text=text, autoencoder=autoencoder, unet=network, parameters={}, notes=notes)
    unet = replace(network, in_channels=found.channels, out_channels=found.channels, context_width=text.width)
    trained = [run.family(stage.family) for stage in run.stages.values() if isinstance(stage, Train)]
    used = {name for family in trained for name in family.inputs()}
    counts = {}
    with torch.device("meta"):
        if "text" in used or run.text in trained:
            counts["text encoder"] = text.parameters
        if "autoencoder" in used or run.autoencoder in trained:
            counts["autoencoder"] = cost.count(autoencoder.build())
        if run.diffusion in trained:
            counts["unet"] = cost.count(unet.build())
    return replace(found, unet=unet, parameters=counts)


def _unet(run: Run, notes: list[str]) -> UNetConfig:
    if not run.init:
        return run.diffusion.network
    own = run.diffusion.network
    file = next(_files(_folder(run.init), "unet"), None)
    if file is None:
        notes.append(f"unet of {run.init}: its config.json is not here; counted as Stable Diffusion 1's")
        return replace(UNetConfig(), checkpointing=own.checkpointing)
    return replace(UNetConfig.from_diffusers(read_json(file)), checkpointing=own.checkpointing, dropout=own.dropout)


def _folder(path: str) -> Path:
    """Where a part from elsewhere lies, if it is on this machine."""
    folder = Path(path).expanduser()
    if named(path):
        return open_model(path).folder
    return folder / "model" if (folder / "model").is_dir() else folder


def _text(run: Run, notes: list[str]) -> TextShape:
    given = roles(run)
    if isinstance(run.text, Clip) and "text" not in given:
        small = run.text.text
        return TextShape("own", small.width, small.layers, small.max_tokens, run.text.vocabulary, small.max_tokens)
    asked = run.text if isinstance(run.text, PretrainedText) else PretrainedText(path=given["text"])
    folder = _folder(asked.path)
    found = next((shape for file in _files(folder, "text_encoder") if (shape := _clip_shape(file)) is not None), None)
    if found is None:
        found = PUBLISHED.get(run.diffusion.network.context_width, PUBLISHED[768])
        notes.append(f"text encoder {asked.path}: its config.json is not here; counted as {found.name}")
    else:
        found = replace(found, layers=found.layers - asked.skip_last)
    return replace(found, tokens=min(asked.max_tokens, found.positions))


def _clip_shape(file: Path) -> TextShape | None:
    values = read_json(file)
    values = values.get("text_config", values)
    names = ("hidden_size", "num_hidden_layers", "max_position_embeddings", "vocab_size", "intermediate_size")
    if not all(isinstance(values.get(name), int) for name in names):
        return None
    width, layers, positions, vocabulary, inner = (int(values[name]) for name in names)
    return TextShape(file.parent.name, width, layers, positions, vocabulary, positions, inner)


def _files(folder: Path, *parts: str) -> Iterator[Path]:
    """The config.json of a part's own folder, or of the part in a model's folder."""
    yield from (file for file in (*(folder / part / "config.json" for part in parts), folder / "config.json") if file.is_file())


def _autoencoder(run: Run, notes: list[str]) -> KLConfig | VQConfig:
    given = roles(run)
    if isinstance(run.autoencoder, KL | VQ) and "autoencoder" not in given:
        return run.autoencoder.network
    file = next(_files(_folder(given["autoencoder"]), "vae", "vqvae"), None)
    if file is None:
        notes.append(f"autoencoder {given['autoencoder']}: its config.json is not here; counted as kl-f8")
        return KLConfig()
    values = read_json(file)
    return VQConfig.from_diffusers(values) if values.get("_class_name") == "VQModel" else KLConfig.from_diffusers(values)
