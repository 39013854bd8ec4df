"""Image translators: what pix2pix and CycleGAN share, from the view that a generator reads to the picture that it draws at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ldm.config.errors import UserError
from ldm.config.schema import build, plain
from ldm.data.pictures import finished
from ldm.data.views import ViewKind, grey, small
from ldm.diffusion.batch import Views
from ldm.diffusion.rng import Rng
from ldm.families.draws import Draws, SamplingCall
from ldm.families.family import Family, Footprint, Found, ModelConfig, ParameterGroup, Terms, TrainingStage
from ldm.families.latent_diffusion.ports import as_map, resized
from ldm.formats import translator_file
from ldm.formats.model_folder import root_of
from ldm.formats.part import content_hash, load_module, load_part, read_config, save_part
from ldm.formats.rounding import Comparison
from ldm.models import cost
from ldm.models.translation import PatchGANConfig, ResNetGeneratorConfig, UNetGeneratorConfig, own_norms
from ldm.text.prompt_syntax import Prompt

PICTURE = ViewKind(form="map", channels=3)


class TranslatorConfig(ModelConfig):
    """What pix2pix and CycleGAN answer alike."""

    __slots__ = ()
    answers = frozenset({"translate"})
    exports = True
    continues = True
    refuses: ClassVar[Mapping[str, str]] = {**ModelConfig.refuses, "tags": "reads no captions"}
    generator: UNetGeneratorConfig | ResNetGeneratorConfig
    discriminator: PatchGANConfig
    players: ClassVar[tuple[str, ...]] = ("",)  # what the names of its generators and discriminators end in

    def assumed(self) -> ViewKind:
        """The kind of what its generators read, before the data is known."""
        return PICTURE

    def usage(self, prompt: str, model: str) -> str:
        """It draws of a picture, whatever the words."""
        return f'python sample.py "" --init PICTURE --model {model}'

    def find(self, path: str, note: Callable[[str], None]) -> Found:
        """A translator to begin with: a model folder, a run's, or a published latest_net_G.pth."""
        folder = root_of(path, note)
        return Found(path, folder, content_hash(folder))

    def step_px(self, others: Mapping[str, ModelConfig]) -> int:
        """As often as the generator halves a picture."""
        return self.generator.step

    def check(self, stage: TrainingStage, where: str, begins: str) -> Any:
        """Whether discriminators see a whole patch."""
        if stage.resolution < self.discriminator.smallest:
            yield (
                f"models.{stage.model}.discriminator.layers: got {self.discriminator.layers}, which needs pictures of at least"
                f" {self.discriminator.smallest} px, not {stage.resolution}; take fewer layers"
            )

    def footprint(self, stage: TrainingStage, side: int, others: Mapping[str, ModelConfig], note: Callable[[str], None]) -> Footprint:
        """Generators and discriminators."""
        read = self.assumed().channels
        with torch.device("meta"):
            made, seen = self.generator.build(read), self.discriminator.build(read + 3)
            shown, picture = torch.empty(cost.IMAGES, read, side, side), torch.empty(cost.IMAGES, read + 3, side, side)
            spent = cost.measure(made, lambda: made(shown)) + cost.measure(seen, lambda: seen(picture)) * 3
        many = len(self.players)
        learned = {"generator": many * cost.count(made), "discriminator": many * cost.count(seen)}
        return Footprint(learned=learned, frozen={}, cost=spent * many, averaged=learned["generator"])


@dataclass(frozen=True)
class Shown:
    """What a call draws of."""

    value: Tensor  # (1 or N,C,H,W) in [-1,1], as generators read it
    strength: float = 1.0  # that was asked for


class TranslatorFamily(Family, Draws):
    """Generators and discriminators by name, and drawing."""

    preview_columns = 9
    able = frozenset({"translate"})
    reads_seeds = False

    def __init__(self, config: TranslatorConfig, shown: ViewKind, size: int, init: Path | None = None) -> None:
        super().__init__()
        self.config, self.kind, self.shown, self.size = config, config.kind, shown, size
        made, judged = config.generator, config.discriminator
        seen = 3 + shown.channels * self.conditional
        self.generators = nn.ModuleDict({f"generator{one}": made.build(shown.channels) for one in config.players})
        self.discriminators = nn.ModuleDict({f"discriminator{one}": judged.build(seen) for one in config.players if self.plays})
        for networks in (self.generators, self.discriminators):
            for name in networks if init is not None else ():
                if init is not None and (init / name).is_dir():  # a published file has no discriminator
                    fresh = networks[name]
                    networks[name] = load_module(lambda fresh=fresh: fresh, load_part(init / name)[1], init / name)  # type: ignore[misc]

    @property
    def views(self) -> tuple[str, ...]:
        """The views of pictures that it reads."""
        return self.config.views()

    @property
    def conditional(self) -> bool:
        """Whether discriminators see what the picture was drawn of, too."""
        return False

    @property
    def plays(self) -> bool:
        """Whether there are discriminators."""
        return True

    # Training

    def compilable(self) -> list[nn.Module]:
        """The generators."""
        return list(self.generators.values())

    def parameter_groups(self) -> list[ParameterGroup]:
        """Generators and discriminators."""
        groups = [ParameterGroup("generator", list(self.generators.parameters()))]
        return groups + ([ParameterGroup("discriminator", list(self.discriminators.parameters()))] if self.plays else [])

    def progress(self, images: int) -> None:
        """A new step begins."""
        for norm in own_norms(self):
            norm.seen.clear()

    def after_step(self, step: int, rng: Rng) -> Terms:
        """Running statistics follow, whatever the processes and passes that shared the batch."""
        for norm in own_norms(self):
            if norm.seen:
                mean, var, count = (torch.stack([torch.as_tensor(one[k]) for one in norm.seen]).sum(0) for k in range(3))
                norm.follow(self.ranks.mean(mean / count), self.ranks.mean(var / count))
        return {}

    def network_input(self, view: Tensor, size: tuple[int, int]) -> Tensor:
        """What a generator reads, (B,C,H,W) in [-1,1], of a view."""
        return (2 * resized(as_map(view, self.shown), size) - 1).to(next(self.parameters()))

    def save(self, folder: Path) -> None:
        """A folder for each network."""
        said = {"size": self.size, "shown": plain(self.shown)}
        for name, network in self.generators.items():
            save_part({**plain(self.config.generator), **said}, dict(network.state_dict()), folder / name)
        for name, network in self.discriminators.items():
            save_part(plain(self.config.discriminator), dict(network.state_dict()), folder / name)

    def publish(self, folder: Path, dtype: str, note: Callable[[str], None]) -> list[Comparison]:
        """As latest_net_G.pth, or latest_net_G_A.pth and latest_net_G_B.pth."""
        made = self.config.generator
        name, dropout = _netg(made), "" if made.dropout else " --no_dropout"
        words = f"--netG {name} --ngf {made.channels} --norm {made.norm}{dropout} --input_nc {self.shown.channels}"
        note(f"options of the published code: {words}" if name else "the published code builds no such generator; ldm opens the file")
        return [
            translator_file.write_file(dict(network.state_dict()), folder / f"latest_net_{name.replace('generator', 'G')}.pth", dtype)
            for name, network in self.generators.items()
        ]

    # Drawing

    @property
    def factor(self) -> int:
        """As often as a generator halves a picture."""
        return self.config.generator.step

    @property
    def defaults(self) -> dict[str, Any]:
        """The size that it was trained at; every picture is drawn by itself."""
        return {"size": (self.size, self.size), "chunk": 1}

    @torch.no_grad()
    def drawn(self, shown: Tensor, player: str = "") -> Tensor:
        """Pictures (N,3,H,W) in [-1,1] of what a generator reads, one by one, so that none depends on its neighbours."""
        generator, was = self.generators[f"generator{player}"], self.training
        self.eval()
        made = [generator(one[None].to(self.device)).float().clamp(-1, 1) for one in shown]
        self.train(was)
        return torch.cat(made)

    def edits(self, image: Tensor, mask: Tensor | None = None, strength: float | None = None) -> tuple[Any, ...]:
        """What is drawn of: pictures (1 or N,H,W,3) uint8 of the view, classes by their colours."""
        if mask is not None:
            self.refuse("mask", "draws whole pictures; leave --mask out")
        if self.shown.form == "map" and self.shown.channels not in (1, 3):
            self.refuse("init", f"reads {self.shown.channels} channels, which no picture has")
        shown = self.network_input(in_view(image.permute(0, 3, 1, 2), self.shown), (image.shape[1], image.shape[2]))
        return (Shown(shown, 1.0 if strength is None else strength),)

    @property
    def told(self) -> Mapping[str, ViewKind]:
        """The view that it reads."""
        return dict.fromkeys(self.views, self.shown)

    def tell(self, given: Views, strength: Mapping[str, float], size: tuple[int, int]) -> tuple[Any, ...]:
        """As `ldm.families.draws.Draws.tell`."""
        if weak := [name for name, value in strength.items() if value != 1]:
            self.refuse(f"given: {weak[0]}@{strength[weak[0]]:g}", "knows no weights of a view; leave @ out")
        return tuple(Shown(self.network_input(view, size)) for view in given.values() if isinstance(view, Tensor))

    def player(self, prompt: str | Prompt) -> str:
        """Which generator draws a prompt."""
        return self.config.players[0]

    def draw(self, call: SamplingCall) -> Tensor:
        """One picture for each prompt, of the pictures that `edits` was told; seeds change nothing."""
        self.settings(call.settings)
        if words_of(call.negative).strip():
            self.refuse("negative", "reads no negative prompt; leave it out")
        if not call.edits:
            self.refuse("init", "draws of a picture alone; give one by --init FILE")
        if len(call.edits) > 1:
            self.refuse("given", "draws of one picture; leave --init out, or --given")
        if call.edits[-1].strength != 1 and call.note is not None:
            call.note("strength: changes nothing here, whole pictures are drawn at once")
        shown = call.edits[-1].value.expand(len(call.prompts), -1, -1, -1)
        made = []
        for i, prompt in enumerate(call.prompts):
            made.append(self.drawn(shown[i : i + 1], self.player(prompt)))
            if call.on_step is not None:
                call.on_step(i + 1, len(call.prompts))
        return finished(torch.cat(made))


def words_of(prompt: str | Prompt) -> str:
    """A prompt's words."""
    return prompt if isinstance(prompt, str) else " ".join(piece.text for part in prompt.at(0, 1) for piece in part)


def shown_of(model: Draws, given: Views, strength: Mapping[str, float]) -> tuple[Shown, ...]:
    """What a model without weights of views draws of, pictures that it is told.

    Raises:
        UserError: for a weight, or a view that it does not read.
    """
    if weak := [name for name, value in strength.items() if value != 1]:
        model.refuse(f"given: {weak[0]}@{strength[weak[0]]:g}", "knows no weights of a view; leave @ out")
    if unread := [name for name in given if name not in model.told]:
        model.refuse(f"given: {unread[0]}", f"reads {', '.join(model.told) or 'no views'}; leave it out")
    return tuple(Shown(2 * view.float() - 1) for view in given.values() if isinstance(view, Tensor))


def _netg(config: UNetGeneratorConfig | ResNetGeneratorConfig) -> str:
    """What the published code calls a generator; empty: it builds no such one."""
    if isinstance(config, ResNetGeneratorConfig):
        return f"resnet_{config.blocks}blocks" if config.blocks in (6, 9) else ""
    return f"unet_{2**config.downs}" if config.downs in (7, 8) and config.skips else ""


def in_view(image: Tensor, shown: ViewKind) -> Tensor:
    """Pictures (B,3,H,W) uint8 as the view that they show: grey, smaller, or the class whose colour is nearest."""
    if shown.form == "classes":
        colours = torch.tensor(classes_shown(shown))
        return (image.permute(0, 2, 3, 1)[..., None, :].int() - colours).square().sum(-1).argmin(-1)[:, None].short()
    made = small(image, shown.divide) if shown.divide > 1 else image
    return (grey(made) if shown.channels == 1 else made).float() / 255


def classes_shown(shown: ViewKind) -> list[tuple[int, int, int]]:
    """The colours of classes; shades of grey where they have none of their own."""
    return list(shown.colours) or [(255 * i // max(shown.channels - 1, 1),) * 3 for i in range(shown.channels)]


def opened(kind: Any, config: TranslatorConfig, folder: Path) -> Any:
    """A translator of `kind` with a model folder's weights.

    Raises:
        UserError: naming the part that is missing or does not fit.
    """
    said = read_config(folder / f"generator{config.players[0]}")
    where = str(folder / f"generator{config.players[0]}" / "config.json")
    size = said.get("size")
    if not isinstance(size, int) or size < 1:
        raise UserError(f"{where}: size is {size!r}; a number of px is needed; copy the whole model folder again")
    family = kind(config, build(said.get("shown", {}), ViewKind, where), size, folder)
    family.content_hash = content_hash(folder)
    return family
