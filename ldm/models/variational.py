"""Networks of a conditional VAE: what a picture of a text is in a few numbers, and the picture of such numbers and a text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ldm.config.errors import UserError
from ldm.config.schema import Depth, Width, config
from ldm.diffusion.batch import Text
from ldm.models.style_generator import EVERY, StyleBlock
from ldm.models.text_discriminator import Bottleneck

LEAST, MOST = -10.0, 10.0  # of logarithms of variances


def _needed(channels: tuple[int, ...]) -> None:
    if not channels:
        raise UserError("channels: got []; the channels of at least one map are needed")


@config
class PosteriorConfig:
    """Residual blocks without norms at each of several sides; their last map, whole, is read beside the sentence."""

    channels: tuple[Width, ...] = (128,)  # of maps from the finest on; each further one has half its sides
    blocks: Depth = 2  # residual blocks at each
    embedding: Width = 256  # width of what is read of them

    def __post_init__(self) -> None:
        _needed(self.channels)

    @property
    def step(self) -> int:
        """Sides of what it sees are multiples of it."""
        return int(2 ** (len(self.channels) - 1))

    def build(self, side: int, in_channels: int, pooled: int, units: int) -> Posterior:
        """Freshly initialised, of maps (in_channels, side, side), told sentences of width `pooled`."""
        return Posterior(self, side, in_channels, pooled, units)


class Posterior(nn.Module):
    """q(z|x,c): mean and log variance (B,Z) of maps (B,C,h,w) and sentences (B,P)."""

    def __init__(self, config: PosteriorConfig, side: int, in_channels: int, pooled: int, units: int) -> None:
        super().__init__()
        widths, e = config.channels, config.embedding
        self.entry = nn.Conv2d(in_channels, widths[0], 3, padding=1)
        self.levels = nn.ModuleList(
            nn.Sequential(*(Bottleneck(before if k == 0 else width, width) for k in range(config.blocks)))
            for before, width in zip((widths[0], *widths[:-1]), widths, strict=True)
        )
        self.whole = nn.Linear(widths[-1] * (side // config.step) ** 2, e)  # flattened: places matter
        self.sentence = nn.Linear(pooled, e)
        self.joint, self.out = nn.Linear(2 * e, e), nn.Linear(e, 2 * units)

    def forward(self, x: Tensor, sentence: Tensor) -> tuple[Tensor, Tensor]:
        x = self.entry(x).permute(0, 2, 3, 1)
        for number, level in enumerate(self.levels):
            x = level(F.avg_pool2d(x.permute(0, 3, 1, 2), 2).permute(0, 2, 3, 1) if number else x)
        seen = self.whole(F.leaky_relu(x, 0.2).flatten(1))
        both = F.leaky_relu(torch.cat([seen, self.sentence(sentence)], 1), 0.2)
        mean, logvar = self.out(F.leaky_relu(self.joint(both), 0.2)).chunk(2, 1)
        return mean, logvar.clamp(LEAST, MOST)


@config
class DecoderConfig:
    """A style generator's blocks without noise of their own: all that is random of a picture is in z."""

    channels: tuple[Width, ...] = (128,)  # of maps from the coarsest on; each further one has twice its sides
    blocks: Depth = 4  # residual blocks at each
    tells: Literal["words", "sentence"] = "words"  # whether places attend to the caption's words; the style has the sentence either way
    heads: Width = 4  # of the attention to words
    style: Width = 128  # width of what z and the sentence make for every block
    mapping: Depth = 2  # layers that make it

    def __post_init__(self) -> None:
        _needed(self.channels)
        if wrong := [c for c in self.channels if c % self.heads]:
            raise UserError(f"heads: {self.heads} does not divide channels {wrong[0]}")

    @property
    def step(self) -> int:
        """What it makes is a multiple of so many places wide."""
        return int(2 ** (len(self.channels) - 1))

    def build(self, side: int, out_channels: int, states: int, pooled: int, units: int) -> Decoder:
        """Freshly initialised, for maps (out_channels, side, side); widths of words, of sentences and of z."""
        return Decoder(self, side, out_channels, states, pooled, units)


class Decoder(nn.Module):
    """Mean of p(x|z,c): maps (B,C,side,side) of z (B,Z) and texts; and the logarithm of its deviation, one number for each channel."""

    def __init__(self, config: DecoderConfig, side: int, out_channels: int, states: int, pooled: int, units: int) -> None:
        super().__init__()
        self.config, begin = config, side // config.step
        self.sides = [begin * 2**level for level in range(len(config.channels)) for _ in range(config.blocks)]  # of each block's map
        widths = [width for width in config.channels for _ in range(config.blocks)]
        self.start = nn.Linear(units, widths[0] * begin**2)  # of the first map, so that z may say what is where
        self.mapping = nn.ModuleList(nn.Linear(width, config.style) for width in (units + pooled, *[config.style] * (config.mapping - 1)))
        context = states if config.tells == "words" else 0
        self.blocks = nn.ModuleList(
            StyleBlock(before, width, config.style, context if i % EVERY == EVERY - 1 else 0, config.heads, noisy=False)
            for i, (before, width) in enumerate(zip([widths[0], *widths[:-1]], widths, strict=True))
        )
        self.norm = nn.LayerNorm(widths[-1])
        self.out = nn.Conv2d(widths[-1], out_channels, 3, padding=1)
        self.logstd = nn.Parameter(torch.zeros(out_channels))

    @property
    def deviation(self) -> Tensor:
        """Logarithm (C,1,1) of the deviation of p(x|z,c), as learned (Rybkin 2020, arXiv 2006.13202)."""
        return self.logstd.clamp(LEAST / 2, MOST / 2)[:, None, None]

    def forward(self, z: Tensor, texts: Sequence[Text]) -> Tensor:
        """Args as a style generator's: one text for all blocks, or one for each of them; pooled states are needed."""
        styles = []
        for text in texts:
            assert text.pooled is not None, "a decoder is told sentences"
            style = torch.cat([z, text.pooled], 1)
            for layer in self.mapping:
                style = F.leaky_relu(layer(style), 0.2)
            styles.append(style)
        x = self.start(z).view(len(z), self.sides[0], self.sides[0], -1)
        for i, block in enumerate(self.blocks):
            if x.shape[1] != self.sides[i]:
                x = x.repeat_interleave(2, 1).repeat_interleave(2, 2)
            k = i if len(texts) > 1 else 0
            x = block(x, styles[k], None, texts[k].tokens)
        return self.out(F.silu(self.norm(x)).permute(0, 3, 1, 2))  # type: ignore[no-any-return]
