"""CycleGAN: pictures of one domain become pictures of another and back, learned without pairs."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from ldm.config.errors import UserError
from ldm.config.schema import Fraction, NonNegative, config
from ldm.data.unpaired import OTHER
from ldm.data.views import ViewKind
from ldm.diffusion.batch import ImageBatch
from ldm.diffusion.rng import Rng
from ldm.families import game
from ldm.families.family import Context, Terms
from ldm.families.game import GameLoss, full
from ldm.families.translator import PICTURE, TranslatorConfig, TranslatorFamily, opened, words_of
from ldm.models.translation import Generator, PatchGANConfig, ResNetGeneratorConfig
from ldm.text.prompt_syntax import Prompt


@config
class CycleGAN(TranslatorConfig):
    """Two domains become each other: two generators, two discriminators, and the way there and back (Zhu 2017, arXiv 1703.10593)."""

    kind: Literal["cyclegan"] = "cyclegan"
    domains: tuple[str, str] = ("a", "b")  # what prompts call the data's two domains, in their order
    generator: Generator = ResNetGeneratorConfig()
    discriminator: PatchGANConfig = PatchGANConfig(norm="instance")
    loss: GameLoss = "least_squares"  # of the players
    adversarial: NonNegative = 1.0  # weight of the discriminators' opinions
    cycle: NonNegative = 10.0  # weight of the mean |difference| of a picture from itself, there and back
    identity_weight: NonNegative = 5.0  # of what a generator changes in a picture of its own target domain
    # First share of the training, in which generators only learn to leave pictures of both domains as they are (CartoonGAN, Chen 2018,
    # section 3.3): what follows starts there, and not where black for white makes yellow of blue.
    begin_as_identity: Fraction = 0.0

    players: ClassVar[tuple[str, ...]] = ("_A", "_B")  # as published: G_A draws b of a, D_A judges b

    def __post_init__(self) -> None:
        if self.begin_as_identity and not self.identity_weight:
            raise UserError("begin_as_identity: needs identity_weight above 0, which weighs it; leave one of the two out")
        if len({name.casefold() for name in self.domains}) < 2 or not all(name.strip() for name in self.domains):
            raise UserError(f"domains: got {', '.join(map(repr, self.domains))}; two different names are needed, such as day, night")

    def usage(self, prompt: str, model: str) -> str:
        """It draws a picture of the second domain."""
        return f'python sample.py "{self.domains[1]}" --init PICTURE --model {model}'

    def views(self) -> tuple[str, ...]:
        """The other domain's picture, which unpaired data has."""
        return (OTHER,)

    def build(self, context: Context) -> CycleGANFamily:
        """The family, ready to train."""
        found = CycleGANFamily(self, PICTURE, context.resolution, None if context.init is None else context.init.folder)
        found.total_images = context.total_images
        return found

    def opened(self, folder: Path) -> CycleGANFamily:
        """With a model folder's weights."""
        return opened(CycleGANFamily, self, folder)  # type: ignore[no-any-return]


class CycleGANFamily(TranslatorFamily):
    """Both directions."""

    config: CycleGAN
    paired = False  # whether its data has the true picture of each
    images, total_images = 0, 0  # seen so far by the stage, and its length

    @property
    def plays(self) -> bool:
        """As configured."""
        return self.config.adversarial > 0

    def progress(self, images: int) -> None:
        """How far the stage is, for `begin_as_identity`; a new step begins."""
        super().progress(images)
        self.images = images

    @property
    def told(self) -> Mapping[str, ViewKind]:
        """None: it draws of pictures of its own domains."""
        return {}

    def both(self, batch: ImageBatch) -> tuple[Tensor, Tensor]:
        """Pictures of both domains, which show nothing in common."""
        view = (batch.views or {}).get(OTHER)
        if not isinstance(view, Tensor):
            raise UserError("these samples have no second domain; take data of kind unpaired")
        return batch.image, 2 * view - 1

    def loss(self, batch: ImageBatch, rng: Rng) -> tuple[Terms, Terms]:
        """For each direction the discriminator's opinion and lesson, the way back, and what stays as it is."""
        said, pictures = self.config, self.both(batch)
        begins = self.images < said.begin_as_identity * self.total_images
        heard = 0.0 if begins else said.adversarial
        terms: Terms = {}
        gauges: Terms = {}
        for i, player in enumerate(said.players):
            there, back = (self.generators[f"generator{one}"] for one in (player, said.players[1 - i]))
            source, target = pictures[i], pictures[1 - i]
            if said.identity_weight:  # in one call: no layer couples samples
                made, same = full(there(torch.cat([source, target]))).chunk(2)
                change = F.l1_loss(same, target) + (F.l1_loss(made, source) if begins else 0)
                terms[f"identity{player}"] = said.identity_weight * change
            else:
                made = full(there(source))
            if said.cycle:
                terms[f"cycle{player}"] = said.cycle * F.l1_loss(full(back(made)), source)
            if self.plays:
                judge, leaf = self.discriminators[f"discriminator{player}"], made.detach().requires_grad_()
                value, slope = game.opinion(judge, said.loss, leaf, target)
                terms[f"adversarial{player}"] = game.through(made, heard * slope, heard * value)
                terms[f"discriminator{player}"], logits = game.lesson(judge, said.loss, target, leaf.detach())
                gauges |= {f"{name}{player}": logit for name, logit in logits.items()}
        return terms, gauges

    def player(self, prompt: str | Prompt) -> str:
        """The generator of the domain that a prompt names.

        Raises:
            UserError: for a prompt that names none, or both.
        """
        words, names = words_of(prompt).casefold(), [name.casefold().strip() for name in self.config.domains]
        named = [i for i, name in enumerate(names) if re.search(rf"(?<!\w){re.escape(name)}(?!\w)", words)]
        named = [names.index(words.strip())] if words.strip() in names else named  # one name may have the other in it
        if len(named) != 1:
            raise UserError(f"prompt: got {words!r}; say what the picture shall become: {' or '.join(self.config.domains)}")
        return self.config.players[1 - named[0]]

    def translate(self, batch: ImageBatch) -> Tensor:
        """Pictures (B,3,H,W) in [-1,1] of the second domain, of a batch's first."""
        return self.drawn(batch.image, self.config.players[0])

    def preview(self, batch: ImageBatch, seed: int) -> Tensor:
        """Of each direction the picture, what was made of it, and that back again, in turn (N,3,H,W)."""
        shown = []
        for i, player in enumerate(self.config.players):
            source = self.both(batch)[i]
            made = self.drawn(source, player)
            shown.append(torch.stack([source, made, self.drawn(made, self.config.players[1 - i])], 1).flatten(0, 1))
        return torch.cat(shown)
