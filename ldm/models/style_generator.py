"""Style-based generator that is told a text: noise becomes a map at once, no steps.

A style of noise and sentence scales and shifts every block (Karras 2018, StyleGAN, arXiv 1812.04948), noise is added at every block, and
places attend to words (Xu 2018, AttnGAN, 1711.10485; Kang 2023, GigaGAN, 2303.05511). Every block may be told another text.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ldm.config.errors import UserError
from ldm.config.schema import Count, Depth, Positive, Width, config
from ldm.diffusion.batch import Text
from ldm.diffusion.rng import Rng
from ldm.models.attention import attention

EVERY = 2  # of so many blocks one attends to words
STYLES = 64  # of fixed noise, whose mean is the style that truncation leads to


@config
class StyleGeneratorConfig:
    """Blocks of two convolutions at each of several sides, the last of which is the picture's, or its latents'."""

    channels: tuple[Width, ...] = (128,)  # of maps from the coarsest on; each further one has twice its sides
    blocks: Depth = 4  # residual blocks at each
    tells: Literal["words", "sentence"] = "words"  # whether places attend to the caption's words; the style has the sentence either way
    heads: Width = 4  # of the attention to words
    noise: Positive = 64  # numbers of z, the noise of the style
    style: Width = 128  # its width
    mapping: Depth = 2  # layers that make a style of z and sentence
    augmentation: Count = 0  # numbers of a Gaussian around the sentence that stand in its place (StackGAN); 0: the sentence itself

    def __post_init__(self) -> None:
        if not self.channels:
            raise UserError("channels: got []; the channels of at least one map are needed")
        if wrong := [c for c in self.channels if c % self.heads]:
            raise UserError(f"heads: {self.heads} does not divide channels {wrong[0]}")

    @property
    def step(self) -> int:
        """What the generator makes is a multiple of so many places wide."""
        return int(2 ** (len(self.channels) - 1))

    def build(self, side: int, out_channels: int, states: int, pooled: int, shown: int = 0) -> StyleGenerator:
        """A freshly initialised generator.

        Args:
            side: of what it makes, a multiple of `step`.
            out_channels: of what it makes.
            states: width of a word's state.
            pooled: width of a sentence's state.
            shown: channels of a picture that it is told beside the text; 0: there is none.
        """
        return StyleGenerator(self, side, out_channels, states, pooled, shown)


class StyleGenerator(nn.Module):
    """Maps (B,C,h,w) of noise (B,noise_size) and texts."""

    def __init__(self, config: StyleGeneratorConfig, side: int, out_channels: int, states: int, pooled: int, shown: int) -> None:
        super().__init__()
        self.config, start = config, side // config.step
        self.sides = [start * 2**level for level in range(len(config.channels)) for _ in range(config.blocks)]  # of each block's map
        widths = [width for width in config.channels for _ in range(config.blocks)]
        self.start = nn.Parameter(torch.randn(config.channels[0], start, start))
        self.shown = nn.Conv2d(shown, config.channels[0], 3, padding=1) if shown else None
        told = config.augmentation or pooled
        self.augmented = nn.Linear(pooled, 2 * told) if config.augmentation else None
        inputs = (config.noise + told, *[config.style] * (config.mapping - 1))
        self.mapping = nn.ModuleList(nn.Linear(width, config.style) for width in inputs)
        context = states if config.tells == "words" else 0
        self.blocks = nn.ModuleList(
            StyleBlock(before, width, config.style, context if i % EVERY == EVERY - 1 else 0, config.heads)
            for i, (before, width) in enumerate(zip([widths[0], *widths[:-1]], widths, strict=True))
        )
        self.norm = nn.LayerNorm(widths[-1])
        self.out = nn.Conv2d(widths[-1], out_channels, 3, padding=1)

    @property
    def noise_size(self) -> int:
        """Numbers of a picture's noise: z, the augmentation's, and one for each place of every block."""
        return self.config.noise + self.config.augmentation + sum(side**2 for side in self.sides)

    def gaussian(self, sentence: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log variance (B,A) of what stands in the place of sentences (B,P) (conditioning augmentation, StackGAN, eq. 2)."""
        assert self.augmented is not None
        mean, logvar = self.augmented(sentence).chunk(2, 1)
        return mean, logvar.clamp(-10, 10)

    def style(self, z: Tensor, sentence: Tensor) -> Tensor:
        """Styles (B,W) of noise (B,Z) and what is told of sentences."""
        x = torch.cat([F.normalize(z, dim=1) * z.shape[1] ** 0.5, sentence], 1)
        for layer in self.mapping:
            x = F.leaky_relu(layer(x), 0.2)
        return x

    def _mean_style(self, told: Tensor) -> Tensor:
        z = Rng(0, range(STYLES)).normal("truncation", (self.config.noise,)).to(told)
        return torch.stack([self.style(z, one.expand(STYLES, -1)).mean(0) for one in told])

    def forward(self, noise: Tensor, texts: Sequence[Text], shown: Tensor | None = None, truncation: float = 1.0) -> Tensor:
        """Maps (B,C,side,side).

        Args:
            noise: (B,noise_size), standard normal.
            texts: one for all blocks, or one for each of them; pooled states are needed.
            shown: (B,shown,h,w), a picture that it is told.
            truncation: how far styles lie from their mean over z, and the scale of noise; 1: as it learned, 0: one picture of each text.
        """
        given = self.config
        z, eps, maps = noise.split([given.noise, given.augmentation, sum(side**2 for side in self.sides)], 1)
        styles = []
        for text in texts:
            told = text.pooled
            assert told is not None, "a generator is told sentences"
            if given.augmentation:
                mean, logvar = self.gaussian(told)
                told = mean + truncation * (0.5 * logvar).exp() * eps
            found = self.style(z, told)
            styles.append(found if truncation == 1 else self._mean_style(told).lerp(found, truncation))
        x = self.start.expand(len(noise), -1, -1, -1)
        if self.shown is not None:
            assert shown is not None, "it learned to be told a picture"
            x = x + self.shown(F.interpolate(shown, x.shape[2:], mode="bilinear", antialias=True))
        x = x.permute(0, 2, 3, 1)
        for i, (block, part) in enumerate(zip(self.blocks, maps.split([side**2 for side in self.sides], 1), strict=True)):
            side = self.sides[i]
            if x.shape[1] != side:
                x = x.repeat_interleave(2, 1).repeat_interleave(2, 2)
            k = i if len(texts) > 1 else 0
            x = block(x, styles[k], truncation * part.view(-1, side, side, 1), texts[k].tokens)
        return self.out(F.silu(self.norm(x)).permute(0, 3, 1, 2))  # type: ignore[no-any-return]


class StyleBlock(nn.Module):
    """A modulated bottleneck with a depthwise convolution and noise, if any, and attention to words, each beside places (B,h,w,C)."""

    def __init__(self, before: int, width: int, style: int, context: int, heads: int, noisy: bool = True) -> None:
        super().__init__()
        inner = 2 * width
        self.norm = nn.LayerNorm(before, elementwise_affine=False)
        self.widen, self.narrow = nn.Linear(before, inner), nn.Linear(inner, width)
        self.around = nn.Conv2d(inner, inner, 3, padding=1, groups=inner)
        self.modulation = nn.Linear(style, 2 * before + width)
        self.strength = nn.Parameter(torch.zeros(inner)) if noisy else None  # of the noise
        self.skip = nn.Identity() if before == width else nn.Linear(before, width)
        self.attention = _Words(width, context, heads) if context else None

    def forward(self, x: Tensor, style: Tensor, noise: Tensor | None, words: Tensor) -> Tensor:
        before, width = x.shape[3], self.narrow.out_features
        scale, shift, gate = self.modulation(style)[:, None, None].split([before, before, width], 3)
        h = F.silu(self.widen(self.norm(x) * (1 + scale) + shift))
        h = neighbours(self.around, h)
        h = F.silu(h if self.strength is None or noise is None else h + self.strength * noise)
        x = self.skip(x) + self.narrow(h) * (1 + gate)
        return x if self.attention is None else x + self.attention(x, words)


def neighbours(convolution: nn.Conv2d, x: Tensor) -> Tensor:
    """A convolution of places (B,h,w,C)."""
    return convolution(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)  # type: ignore[no-any-return]


class _Words(nn.Module):
    """What places (B,h,w,C) read of words (B,L,D), padding included, as Stable Diffusion's networks do."""

    def __init__(self, width: int, context: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.query = nn.Linear(width, width, bias=False)
        self.keys_values = nn.Linear(context, 2 * width, bias=False)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, words: Tensor) -> Tensor:
        read = (self.query(self.norm(x.flatten(1, 2))), *self.keys_values(words).chunk(2, 2))
        q, k, v = (part.unflatten(2, (self.heads, -1)).transpose(1, 2) for part in read)
        return self.out(attention(q, k, v).transpose(1, 2).flatten(2)).view(x.shape)  # type: ignore[no-any-return]
