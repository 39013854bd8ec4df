"""Cost estimates: parameters, device memory and FLOPs of every stage, as its models' configurations say."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from ldm.families.family import Footprint, ModelConfig
from ldm.models import cost
from ldm.models.cost import Cost
from ldm.runs.run import Encode, Run
from ldm.training.settings import Train

FLOAT, HALF = 4, 2  # bytes


@dataclass(frozen=True, kw_only=True)
class Needs:
    """What a training stage needs."""

    footprint: Footprint
    stage: Train

    @property
    def parameters(self) -> dict[str, int]:
        """By network, those that are only used included."""
        return self.footprint.learned | self.footprint.frozen

    @property
    def learned(self) -> int:
        """Parameters that learn."""
        return sum(self.footprint.learned.values())

    @property
    def averaged(self) -> int:
        """Parameters with an EMA."""
        return (self.footprint.averaged or self.learned) if self.stage.ema else 0

    @property
    def forward(self) -> int:
        """FLOPs of an image through the parts that learn, forward."""
        return self.footprint.cost.forward

    @property
    def flops(self) -> int:
        """FLOPs of an image in all."""
        return self.footprint.cost.training + self.footprint.extra

    @property
    def optimiser_bytes(self) -> int:
        """What the optimiser keeps of each parameter: two moments, say."""
        return int(self.stage.optim.state_bytes * self.learned)

    @property
    def checkpoint_bytes(self) -> int:
        """Weights, moments and EMA in float32."""
        return FLOAT * (self.learned + self.averaged) + self.optimiser_bytes

    @property
    def host_bytes(self) -> int:
        """With `offload`: float32 weights, gradients, moments and EMA, what is copied through, and the copy that a save is written from."""
        if not self.stage.offload:
            return 0
        through = FLOAT if self.stage.precision == "fp32" else HALF
        copied = self.checkpoint_bytes if self.stage.save_beside else 0
        return self.checkpoint_bytes + (FLOAT + through) * self.learned + copied

    def memory(self, micro_batch: int, processes: int = 1, *, sharded: bool = False) -> dict[str, int]:
        """Bytes on each device while a micro-batch is trained on, by what for.

        Weights, gradients, moments and EMA are in float32 whatever the precision. Activations are what the forward pass keeps,
        counted on the meta device. Under bf16 or fp16 they are half of that, frozen weights that are only computed with are of that type
        themselves unless they are quantized, and there is a cast copy of the learned weights and of the float32 frozen ones that
        gradients pass through, which autocast makes anew at every use and the graph keeps. The allocator's own losses, workspaces and
        the frozen parts' passing activations are not in it. With `offload` weights and gradients are of the type that is computed in,
        and moments and EMA are in the machine's memory. Over several processes that share weights (`sharded`, FSDP2) gradients, moments
        and EMA are split; the weights are whole within a step.

        A single process that trains on its batch in one pass has no gradients when the forward pass ends, and no activations when
        the backward pass does: measured, at most a quarter of the lesser adds to the greater, and the rest is "freed in turn".
        """
        shards = processes if sharded else 1
        full, offload = self.stage.precision == "fp32", self.stage.offload
        held = HALF if offload and not full else FLOAT  # vectors, which stay in float32, are few
        found = {
            "weights": held * self.learned,
            "gradients": held * self.learned // shards,
            "optimiser": 0 if offload else self.optimiser_bytes // shards,
            "EMA": 0 if offload else FLOAT * self.averaged // shards,
            "cast weights": 0 if full else HALF * ((0 if offload else self.learned) + self.footprint.passed),
            "frozen parts": FLOAT * sum(self.footprint.frozen.values())
            - (0 if full else HALF * self.footprint.halved)
            - self.footprint.spared,
            "activations": self.footprint.cost.activations * micro_batch // (1 if full else 2),
        }
        if processes == 1 and micro_batch >= self.stage.batch and not offload:
            kept = found["activations"] + (0 if full else HALF * self.learned)  # until the backward pass: autocast's copies, too
            found["freed in turn"] = -3 * min(found["gradients"], kept) // 4
        return {name: value for name, value in found.items() if value}


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """The models of a run, counted."""

    models: dict[str, ModelConfig]  # with what a base model's files on this machine say
    parameters: dict[str, int]  # of each model that some stage trains or reads
    notes: dict[str, None] = field(default_factory=dict)  # what was assumed, each once

    def note(self, text: str) -> None:
        """Remember what was assumed."""
        self.notes[text] = None

    def training(self, stage: Train) -> Needs:
        """What a training stage needs; several resolutions count as their mean, but for memory as the largest."""
        model = self.models[stage.model].for_stage(stage)
        others = _inputs(self.models, stage.model)
        each = [model.footprint(stage, side, others, self.note) for side in (stage.resolution, *stage.also)]
        largest = max(each, key=lambda one: one.cost.activations)
        mean = cost.total(one.cost for one in each) * (1 / len(each))
        extra = sum(one.extra for one in each) // len(each)
        spent = replace(mean, activations=largest.cost.activations)
        return Needs(footprint=replace(largest, cost=spent, extra=extra), stage=stage)

    def encoding(self, stage: Encode, copies: int) -> tuple[Cost, int]:
        """What encoding an image costs, and the bytes that it leaves in a latent cache."""
        spent, kept = self.models[stage.model].encoding(stage.resolution, self.note)
        return spent * copies, kept * copies


def estimate(run: Run) -> Estimate:
    """The models of a run; what comes from elsewhere is read from its folder, and taken as published where that is not here."""
    notes: dict[str, None] = {}

    def note(text: str) -> None:
        notes[text] = None

    used = {read.model for name in run.stages for read in run.reads(name).values() if read.model}
    used |= {stage.model for stage in run.stages.values() if isinstance(stage, Train)}
    models = {name: _counted(model, run.init, note) for name, model in run.everything().items()}
    widths = {name: model.text_width() for model in models.values() for name in model.inputs().values() if model.text_width()}
    counts = {name: model.parameters(_inputs(models, name), note, widths.get(name, 768)) for name, model in models.items() if name in used}
    found = Estimate(models=models, parameters=counts, notes=notes)
    for stage in run.stages.values():
        if isinstance(stage, Train) and not counts[stage.model]:
            counts[stage.model] = found.training(stage).learned
    return found


def _counted(model: ModelConfig, base: str, note: Callable[[str], None]) -> ModelConfig:
    return model.counted(base, note) if model.continues else model


def _inputs(models: Mapping[str, ModelConfig], name: str) -> dict[str, ModelConfig]:
    return {role: models[other] for role, other in models[name].inputs().items() if other in models}
