"""pix2pix: a picture of a view (labels, edges, another picture) by a conditional GAN with an L1 term, from pairs."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from ldm.config.errors import UserError
from ldm.config.schema import NonNegative, config
from ldm.data.dataset import offered
from ldm.data.views import ANY, ViewKind, parted
from ldm.diffusion.batch import ImageBatch
from ldm.diffusion.rng import Rng
from ldm.families import game
from ldm.families.family import Context, Terms
from ldm.families.game import GameLoss, full
from ldm.families.translator import PICTURE, TranslatorConfig, TranslatorFamily, classes_shown, opened
from ldm.models.translation import Generator, PatchGANConfig, UNetGeneratorConfig


@config
class Pix2Pix(TranslatorConfig):
    """A view becomes a picture: U-Net and PatchGAN on pairs (Isola 2017, arXiv 1611.07004, eq. 4)."""

    kind: Literal["pix2pix"] = "pix2pix"
    view: str = "source"  # what pictures are drawn of: labels, edges, sketch, grey, small:4, source, ... (docs/conditions.md)
    generator: Generator = UNetGeneratorConfig()
    discriminator: PatchGANConfig = PatchGANConfig()
    loss: GameLoss = "non_saturating"  # of both players
    adversarial: NonNegative = 1.0  # weight of the discriminator's opinion; 0: no discriminator, L1 alone
    l1: NonNegative = 100.0  # weight of the mean |difference| from the true picture
    r1: NonNegative = 0.0  # weight of the slope of the discriminator at true pictures
    conditional: bool = True  # whether the discriminator sees the view beside the picture

    def __post_init__(self) -> None:
        if not self.adversarial and not self.l1:
            raise UserError("l1: got 0, and adversarial too; nothing would be learned")

    def views(self) -> tuple[str, ...]:
        """The one that it reads."""
        return (self.view,)

    def assumed(self) -> ViewKind:
        """The view's, where any picture gives it."""
        name = parted(self.view)[0]
        return ANY[name][1] if name in ANY else PICTURE

    def build(self, context: Context) -> Pix2PixFamily:
        """The family, ready to train."""
        shown = offered(context.data, self.views())[self.view]
        if shown.form not in ("map", "classes"):
            raise UserError(f"view {self.view!r}: got {shown.form}; pix2pix reads maps and classes, such as labels, edges or source")
        return Pix2PixFamily(self, shown, context.resolution, None if context.init is None else context.init.folder)

    def opened(self, folder: Path) -> Pix2PixFamily:
        """With a model folder's weights."""
        return opened(Pix2PixFamily, self, folder)  # type: ignore[no-any-return]


class Pix2PixFamily(TranslatorFamily):
    """Generator and discriminator."""

    config: Pix2Pix
    reads_prompts = False
    paired = True  # whether its data has the true picture of each

    @property
    def conditional(self) -> bool:
        """As configured."""
        return self.config.conditional

    @property
    def plays(self) -> bool:
        """As configured."""
        return self.config.adversarial > 0

    def read(self, batch: ImageBatch) -> Tensor:
        """What the generator reads of a batch."""
        view = (batch.views or {}).get(self.config.view)
        if not isinstance(view, Tensor):
            raise UserError(f"view {self.config.view!r}: these samples have none")
        return self.network_input(view, (batch.image.shape[2], batch.image.shape[3]))

    def loss(self, batch: ImageBatch, rng: Rng) -> tuple[Terms, Terms]:
        """L1 and the discriminator's opinion of the generator's picture; the discriminator's lesson."""
        said, image, shown = self.config, batch.image, self.read(batch)
        made = full(self.generators["generator"](shown))
        terms, gauges = {}, {"difference": F.l1_loss(made.detach(), image)}
        if said.l1:
            terms["l1"] = said.l1 * F.l1_loss(made, image)
        if self.plays:
            judge, told = self.discriminators["discriminator"], (shown,) if said.conditional else ()
            leaf = made.detach().requires_grad_()
            value, slope = game.opinion(judge, said.loss, leaf, image, *told)
            terms["adversarial"] = game.through(made, said.adversarial * slope, said.adversarial * value)
            terms["discriminator"], logits = game.lesson(judge, said.loss, image, leaf.detach(), *told)
            gauges |= logits
            if said.r1:
                terms["r1"] = said.r1 * game.gradient_penalty(judge, image, *told)
        return terms, gauges

    def translate(self, batch: ImageBatch) -> Tensor:
        """Pictures (B,3,H,W) in [-1,1] of a batch's views."""
        return self.drawn(self.read(batch))

    def preview(self, batch: ImageBatch, seed: int) -> Tensor:
        """What was read, what was made of it, and the true picture, in turn (N,3,H,W)."""
        return torch.stack([self.seen(self.read(batch)), self.translate(batch), batch.image], 1).flatten(0, 1)

    def seen(self, shown: Tensor) -> Tensor:
        """What a generator reads as pictures (B,3,H,W) in [-1,1]."""
        if self.shown.form == "map":
            return shown.expand(-1, 3, -1, -1) if shown.shape[1] == 1 else shown
        return (torch.tensor(classes_shown(self.shown)).to(shown)[shown.argmax(1)] / 127.5 - 1).permute(0, 3, 1, 2)
