"""Conditions of latent diffusion: a view, the port by which the network is told it, and how often in training it is not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from ldm.config.errors import UserError
from ldm.config.schema import Fraction, build, config, plain
from ldm.data.folder_views import MAPS, WORDS
from ldm.data.views import ANY, ViewKind, parted
from ldm.diffusion.batch import Boxes, Cond, Graph, Mixed, Told, View, Views, cat, sent, taken
from ldm.diffusion.process import Process
from ldm.diffusion.rng import Rng
from ldm.diffusion.schedules import Flow
from ldm.families.latent_diffusion.engine import Canvas, Edit
from ldm.families.latent_diffusion.ports import LOW_RES, UPSCALE, UPSCALED, Frozen, Port, learned_of
from ldm.formats.latent_codec import LatentCodec
from ldm.formats.model_folder import own_clip
from ldm.formats.part import load_module, load_weights, save_part
from ldm.models import cost
from ldm.models.conditioned import Conditioned, ConditionNetwork
from ldm.models.denoiser import Denoiser, Network
from ldm.text.own_clip import OwnClip


@config
class Condition:
    """One view that the network is told."""

    view: str  # labels, edges, sketch, grey, small:4, source, boxes, ... (docs/conditions.md)
    port: Port  # how the network is told it
    drop: Fraction = 0.1  # share of samples in training that are not told it, so that it may be left out when drawing


@dataclass(frozen=True)
class Read:
    """A condition with the kind of its view, as the data had it."""

    condition: Condition
    kind: ViewKind

    @property
    def view(self) -> str:
        """Its name."""
        return self.condition.view

    def record(self) -> dict[str, Any]:
        """As ldm.json holds it."""
        return {"condition": plain(self.condition), "kind": plain(self.kind)}


def assumed(conditions: Sequence[Condition]) -> list[Read]:
    """Conditions as a plan counts them, before the data is known."""
    usual = ViewKind(form="map", channels=3)
    known: dict[str, ViewKind] = {**MAPS, **WORDS, **{name: kind for name, (_, kind) in ANY.items()}}
    return [Read(each, known.get(parted(each.view)[0], usual)) for each in conditions]


def problems(conditions: Sequence[Condition], learn: str, begins: str, own: str, network: Network) -> list[str]:
    """What is wrong between conditions, and with what learns.

    Args:
        begins: what the weights begin with; empty: nothing.
        own: the path of the model in the configuration.
        network: that is told.
    """
    found = []
    views = [each.view for each in conditions]
    for view in {view for view in views if views.count(view) > 1}:
        found.append(f"{own}.conditions: the view {view} is told twice; leave one of the two out")
    for read in assumed(conditions):
        port, what = read.condition.port, f"{own}.conditions: {read.view} by port {read.condition.port.kind}"
        if read.kind.form not in port.forms:
            found.append(f"{own}.conditions: view {read.view} is of form {read.kind.form}; port {port.kind} takes {', '.join(port.forms)}")
        noise, drawn = port.noises()
        if drawn > noise:
            found.append(f"{what}: drawn_noise is above noise ({noise:g}), the most that training mixes in; lower it, or raise noise")
        if read.condition.drop == 1:
            found.append(f"{what}: drop 1 never tells it; take less, such as 0.1")
    for each in conditions:
        if each.port.unet and network.kind != "unet":
            found.append(f"{own}.conditions: port {each.port.kind} adds to a U-Net, but network is {network.kind}; choose port concat")
    if sum(bool(each.port.vector) for each in conditions) > 1:
        found.append(f"{own}.conditions: the network is told one vector, a level of noise or an embedding; leave the others out")
    for each in conditions if not begins else ():
        try:
            each.port.fitted(network, 1)
        except UserError as error:
            found.append(f"{own}.{error}")
    if sum(bool(each.port.brings) for each in conditions) > 1:
        found.append(f"{own}.conditions: two ports gated share one set of gates; name one view by it")
    if learn == "new":
        if not conditions:
            found.append(f"{own}.learn: got new, but there are no conditions that bring something new; leave it out")
        elif not begins:
            found.append(f"{own}.learn: got new, but there is no model whose weights stay; give one by init, or set learn=all")
        for each in conditions:
            if each.port.joins(ViewKind(form="map", channels=1), 1):
                found.append(f"{own}.learn: got new, but port {each.port.kind} changes the base's own first layer; set learn=all")
    return found


def kinds_for(conditions: Sequence[Condition], offered: Mapping[str, ViewKind], own: str) -> tuple[Read, ...]:
    """Conditions with their views' kinds.

    Raises:
        UserError: for a view of a form that its port does not take.
    """
    for each in conditions:
        if offered[each.view].form not in each.port.forms:
            takes = ", ".join(each.port.forms)
            raise UserError(f"{own}.conditions: view {each.view} is of form {offered[each.view].form}; port {each.port.kind} takes {takes}")
    return tuple(Read(each, offered[each.view]) for each in conditions)


@dataclass(frozen=True)
class Shape:
    """Latents before there are any, and the embeddings of pictures beside them."""

    factor: int
    channels: int
    embedding: int = 0


def beside(codec: LatentCodec, clip: OwnClip | None) -> Shape:
    """Of an autoencoder and a CLIP."""
    return Shape(codec.factor, codec.channels, clip.embedding if clip else 0)


def clip_of(reads: Sequence[Read], folder: Path) -> OwnClip | None:
    """The CLIP that embeds pictures where a condition is told embeddings: both sides of a text product's, or of a model folder's.

    Raises:
        UserError: where there is none.
    """
    asking = [read.view for read in reads if read.kind.form == "embedding"]
    if not asking:
        return None
    if (where := own_clip(folder)) is None:
        raise UserError(f"conditions: view {asking[0]} is what a CLIP makes of a picture, and {folder} has no image side; use kind clip")
    return OwnClip.load(where)


def count(conditions: Sequence[Condition], base: Denoiser, latents: Shape) -> tuple[int, int]:
    """Parameters of the conditions' own networks, and those that a base, on any device, has for them alone."""
    reads, networks = assumed(conditions), 0
    for read in reads:
        base = read.condition.port.prepared(base, latents.embedding)
    for read in reads:
        networks += cost.count(cast("torch.nn.Module", read.condition.port.network(read.kind, base, latents)))
    return networks, sum(weight.numel() for weight in learned_of(base, [read.condition.port for read in reads]))


def joined_channels(reads: Sequence[Read], channels: int) -> int:
    """Channels of x that views need, beside latents of so many."""
    return sum(read.condition.port.joins(read.kind, channels) for read in reads)


# Training


def told(reads: Sequence[Read], views: Views | None, frozen: Frozen, size: tuple[int, int], rng: Rng | None) -> dict[str, Told]:
    """What a network is told of a batch's views.

    Args:
        size: height and width of the latents.
        rng: draws the samples that are not told, each view by itself; None: all are.

    Raises:
        UserError: naming a view that the batch has not.
    """
    found = {}
    for read in reads:
        if views is None or read.view not in views:
            raise UserError(f"conditions: these samples have no view {read.view}; encode latents again for this model")
        with torch.no_grad():
            value = read.condition.port.encode(views[read.view], read.kind, frozen, size)
        device = frozen.codec.mean.device
        own = Told(value=value, strength=torch.ones(length(views[read.view]), device=device))
        if rng is not None and read.condition.drop:
            own = silenced(read, own, sent((rng.uniform(f"told {read.view}") >= read.condition.drop).float(), device))
        found[read.view] = noised(read, own, frozen.process, rng, None)
    return found


def silenced(read: Read, told: Told, said: Tensor) -> Told:
    """What is told where `said` (B,) is 1, and where it is 0 what stands for nothing."""
    if read.condition.port.blank(read.kind):
        return replace(told, value=told.value * said.view(-1, *[1] * (told.value.dim() - 1)))
    return replace(told, strength=told.strength * said)


def noised(read: Read, told: Told, process: Process, rng: Rng | None, share: float | None) -> Told:
    """What is told with the noise that its port mixes in, and its level: noise augmentation (Ho 2021, arXiv 2106.15282, section 4.2).

    Args:
        rng: noise by sample; None: none is mixed in.
        share: of the schedule; None: drawn for each sample, up to the port's most.
    """
    most = read.condition.port.noises()[0]
    if not most:
        return told
    clean = torch.zeros(len(told.strength), dtype=torch.float64)
    if rng is None or share == 0:
        return replace(told, level=process.schedule.draw(clean).to(told.strength))
    u = rng.uniform(f"level {read.view}") * most if share is None else clean + share
    level = sent(process.schedule.draw(u.clamp(max=1 - 1e-9)).to(torch.float32), told.value.device)
    alpha, sigma = (c.to(told.value).view(-1, *[1] * (told.value.dim() - 1)) for c in process.alpha_sigma(level))
    noise = sent(rng.normal(f"noise {read.view}", told.value.shape[1:]), told.value.device).to(told.value)
    return replace(told, value=alpha * told.value + sigma * noise, level=level)


def length(view: View) -> int:
    """Of how many pictures a view is."""
    if isinstance(view, Tensor):
        return len(view)
    first = next(iter(getattr(view, name) for name in view.__dataclass_fields__))
    return len(first)


# Drawing


def tell(reads: Sequence[Read], given: Views, strength: Mapping[str, float], frozen: Frozen, size: tuple[int, int]) -> Edit:
    """The edit that tells a network views, of one picture for all of a call or of each its own; the others it is not told.

    Args:
        given: by view, on any device; each picture's is encoded alone, so that none depends on the others.
        strength: by view; 1 where it is not named.
        size: height and width of the latents.

    Raises:
        UserError: for a view that the model does not read.
    """
    by_name = {read.view: read for read in reads}
    found: dict[str, Told] = {}
    for name, view in given.items():
        if name not in by_name:
            known = ", ".join(by_name) or "none"
            raise UserError(f"given: this model reads no view {name!r}; it reads {known}")
        read, device = by_name[name], frozen.codec.mean.device
        many = length(view)
        with torch.no_grad():
            parts = [_encoded(read, _one(view, i), frozen, size, device) for i in range(many)]
        value = torch.cat(parts) if isinstance(parts[0], Tensor) else cat(parts)
        found[name] = Told(value=value, strength=torch.full((many,), float(strength.get(name, 1.0)), device=device))

    def condition(cond: Cond, canvas: Canvas) -> Cond:
        own = {name: canvas.own_of(each) for name, each in found.items()}
        if not canvas.prompted:
            guided = {n for n in own if by_name[n].condition.port.guided(by_name[n].kind)}
            own = {n: silenced(by_name[n], t, 0 * t.strength) if n in guided else t for n, t in own.items()}
        drawn = {n: noised(by_name[n], t, frozen.process, canvas.rng, by_name[n].condition.port.noises()[1]) for n, t in own.items()}
        return replace(cond, given=drawn)

    return Edit(condition=condition)


def texts(view: View) -> list[str]:
    """The words of a view of one picture."""
    if isinstance(view, Boxes):
        return list(view.phrases[0])
    if isinstance(view, Graph):
        return [word for triple in view.triples[0] for word in triple]
    return list(view.words[0]) if isinstance(view, Mixed) else []


def _encoded(read: Read, view: View, frozen: Frozen, size: tuple[int, int], device: torch.device) -> Any:
    return read.condition.port.encode(view.to(device), read.kind, frozen, size)


def _one(view: View, i: int) -> View:
    return view[i : i + 1] if isinstance(view, Tensor) else taken(view, [i])


# Files


def folders(reads: Sequence[Read], networks: Mapping[str, Any]) -> dict[str, str]:
    """Where a model folder keeps each condition's network, by view; those without weights are left out."""
    found: dict[str, str] = {}
    for read in reads:
        if name := networks[read.view].folder:
            many = sum(other == name or other.startswith(f"{name}_") for other in found.values())
            found[read.view] = f"{name}_{many}" if many else name
    return found


def save(reads: Sequence[Read], conditioned: Conditioned, folder: Path, process: Process) -> dict[str, Any]:
    """Write the conditions' networks below a folder; returns what ldm.json says of them."""
    networks: Mapping[str, Any] = dict(conditioned.networks.items())
    where = folders(reads, networks)
    for view, name in where.items():
        save_part(networks[view].to_diffusers(), dict(networks[view].state_dict()), folder / name)
    network = cast("Network", conditioned.config)
    names = {read.condition.port.pipeline(network, network.in_channels - conditioned.joins, read.kind) for read in reads}
    joining = sum(bool(networks[read.view].joins) for read in reads)
    name = names.pop() if len(names) == 1 and joining <= 1 else ""  # no stock pipeline is told two pictures beside x
    noise = max((read.condition.port.noises()[0] for read in reads), default=0.0)
    if noise and isinstance(process.schedule, Flow):
        name = ""  # their noise is of a table
    pipeline: dict[str, Any] = {"name": name, "parts": {n: networks[v].class_name for v, n in where.items()}}
    if name == UPSCALE:
        by = {**process.scheduler_config(), "_class_name": LOW_RES["_class_name"]} if noise else LOW_RES
        pipeline |= {"scaling_factor": UPSCALED, "schedulers": {"low_res_scheduler": by}}
        said = {"max_noise_level": int(1000 * noise) or 350, "watermarker": [None, None]}
        pipeline |= {"said": said, "without": ["image_encoder", "requires_safety_checker"]}
    return {"conditions": [{**read.record(), "folder": where.get(read.view, "")} for read in reads], "pipeline": pipeline}


def reads_of(record: Mapping[str, Any], where: Path) -> tuple[Read, ...]:
    """The conditions that a model's ldm.json tells of.

    Raises:
        UserError: for what is not known here.
    """
    found = []
    for entry in record.get("conditions", ()):
        found.append(Read(build(entry["condition"], Condition, str(where)), build(entry["kind"], ViewKind, str(where))))
    return tuple(found)


def conditioned(
    base: Denoiser, reads: Sequence[Read], latents: Shape, record: Mapping[str, Any] | None = None, root: Path | None = None
) -> Denoiser:
    """A base with its conditions' networks; those that `record` tells of have the weights in the folder `root`, others are fresh."""
    if not reads:
        return base
    kept = {entry["condition"]["view"]: entry["folder"] for entry in (record or {}).get("conditions", ())}
    networks: dict[str, ConditionNetwork] = {}
    for read in reads:
        base = read.condition.port.prepared(base, latents.embedding)
    for read in reads:
        make = partial(read.condition.port.network, read.kind, base, latents)
        where = root / kept[read.view] if root is not None and kept.get(read.view) else None
        if where is None:
            networks[read.view] = make()
            networks[read.view].begin(base)
        else:
            networks[read.view] = load_module(make, load_weights(where), where)
    return Conditioned(base, networks)
