"""Discriminator of pictures beside what they are said to show: whether a picture, or its latents, is real and matches a sentence."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ldm.config.errors import UserError
from ldm.config.schema import Depth, Width, config
from ldm.models.style_generator import neighbours


@config
class TextDiscriminatorConfig:
    """Residual blocks without norms at each of several sides; its last map, whole, is judged beside the sentence."""

    channels: tuple[Width, ...] = (128,)  # of maps from the finest on; each further one has half its sides
    blocks: Depth = 2  # residual blocks at each
    embedding: Width = 256  # width of what is judged
    spectral: bool = False  # spectral normalisation of every layer (Miyato 2018, arXiv 1802.05957)

    def __post_init__(self) -> None:
        if not self.channels:
            raise UserError("channels: got []; the channels of at least one map are needed")

    @property
    def step(self) -> int:
        """Sides of what it sees are multiples of it."""
        return int(2 ** (len(self.channels) - 1))

    def build(self, side: int, in_channels: int, pooled: int) -> TextDiscriminator:
        """A freshly initialised discriminator of maps (in_channels, side, side), told sentences of width `pooled`."""
        return TextDiscriminator(self, side, in_channels, pooled)


class TextDiscriminator(nn.Module):
    """Logits (B,), positive where maps (B,C,h,w) look real and as sentences (B,P) say."""

    def __init__(self, config: TextDiscriminatorConfig, side: int, in_channels: int, pooled: int) -> None:
        super().__init__()
        widths = config.channels
        self.entry = nn.Conv2d(in_channels, widths[0], 3, padding=1)
        self.levels = nn.ModuleList(
            nn.Sequential(*(Bottleneck(before if k == 0 else width, width) for k in range(config.blocks)))
            for before, width in zip((widths[0], *widths[:-1]), widths, strict=True)
        )
        e = config.embedding
        self.whole = nn.Linear(widths[-1] * (side // config.step) ** 2, e)  # flattened: places matter
        self.sentence = nn.Linear(pooled, e)
        self.joint, self.out = nn.Linear(3 * e, e), nn.Linear(e, 1)
        self.picture_side, self.text_side = nn.Linear(e, e // 2), nn.Linear(pooled, e // 2)  # of the contrastive term
        if config.spectral:
            for module in list(self.modules()):
                if isinstance(module, nn.Conv2d | nn.Linear):
                    nn.utils.parametrizations.spectral_norm(module)

    def features(self, x: Tensor) -> Tensor:
        """What is seen (B,E) of maps (B,C,h,w), whatever the sentence."""
        x = self.entry(x).permute(0, 2, 3, 1)
        for number, level in enumerate(self.levels):
            x = level(F.avg_pool2d(x.permute(0, 3, 1, 2), 2).permute(0, 2, 3, 1) if number else x)
        return F.leaky_relu(self.whole(F.leaky_relu(x, 0.2).flatten(1)), 0.2)

    def judge(self, seen: Tensor, sentence: Tensor) -> Tensor:
        """Logits (B,) of what was seen beside sentences."""
        said = self.sentence(sentence)
        return self.out(F.leaky_relu(self.joint(torch.cat([seen, said, seen * said], 1)), 0.2))[:, 0]

    def pictures(self, seen: Tensor) -> Tensor:
        """Unit vectors (B,E/2) of what was seen, whose cosines with those of `words` the contrastive term learns."""
        return F.normalize(self.picture_side(seen), dim=1)

    def words(self, sentence: Tensor) -> Tensor:
        """Unit vectors (N,E/2) of sentences."""
        return F.normalize(self.text_side(sentence), dim=1)

    def forward(self, x: Tensor, sentence: Tensor) -> Tensor:
        return self.judge(self.features(x), sentence)


class Bottleneck(nn.Module):
    """A bottleneck of a depthwise convolution beside the places (B,h,w,C) that come in."""

    def __init__(self, before: int, width: int) -> None:
        super().__init__()
        inner = 2 * width
        self.widen, self.narrow = nn.Linear(before, inner), nn.Linear(inner, width)
        self.around = nn.Conv2d(inner, inner, 3, padding=1, groups=inner)
        self.skip = nn.Identity() if before == width else nn.Linear(before, width)

    def forward(self, x: Tensor) -> Tensor:
        h = F.leaky_relu(self.widen(F.leaky_relu(x, 0.2)), 0.2)
        return self.skip(x) + self.narrow(F.leaky_relu(neighbours(self.around, h), 0.2))  # type: ignore[no-any-return]
