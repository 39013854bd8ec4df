"""Image translation networks: U-Net and ResNet generators, PatchGAN, under the names of the published pix2pix and CycleGAN code.

Isola 2017 (arXiv 1611.07004) and Zhu 2017 (arXiv 1703.10593). A `.pth` of that code has the same names, shapes and results.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

import torch
from torch import Tensor, nn

from ldm.config.errors import UserError
from ldm.config.schema import BY_KIND, Count, Fraction, Positive, config

Norm = Literal["batch", "instance", "none"]
WIDEST = 8  # times `channels`, of the inner convolutions


class OwnBatchNorm(nn.Module):
    """BatchNorm2d of batches of one picture: each sample is normalised by itself, as the published training does, which takes them singly.

    So samples stay apart, in training and in drawing. The names are BatchNorm2d's; `follow` brings the running statistics up to date, which
    nothing here reads, for programs that draw by them.
    """

    EPS, MOMENTUM = 1e-5, 0.1  # BatchNorm2d's
    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))
        self.register_buffer("num_batches_tracked", torch.tensor(0))
        self.seen: list[tuple[Tensor, Tensor, int]] = []  # of the present step: sums of means and variances (C,), of how many pictures

    def forward(self, x: Tensor) -> Tensor:
        """(B,C,H,W), each (picture, channel) at the learned mean and deviation."""
        b, c, h, w = x.shape
        scale, shift = self.weight.repeat(b), self.bias.repeat(b)
        flat = x.reshape(1, b * c, h, w)
        out, mean, inverse = torch.native_batch_norm(flat, scale, shift, None, None, True, self.MOMENTUM, self.EPS)
        if self.training and self.weight.requires_grad and torch.is_grad_enabled():
            with torch.no_grad():
                unbiased = (inverse.reshape(b, c).float() ** -2 - self.EPS) * (h * w / max(h * w - 1, 1))
                self.seen.append((mean.reshape(b, c).float().sum(0), unbiased.sum(0), b))
        return out.reshape(x.shape)

    @torch.no_grad()
    def follow(self, mean: Tensor, var: Tensor) -> None:
        """One step of the running statistics towards a step's means over pictures."""
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.MOMENTUM)
        self.running_var.lerp_(var.to(self.running_var.dtype), self.MOMENTUM)
        self.num_batches_tracked += 1
        self.seen.clear()


def own_norms(network: nn.Module) -> Iterator[OwnBatchNorm]:
    """The BatchNorm layers of a network."""
    return (module for module in network.modules() if isinstance(module, OwnBatchNorm))


def _norm(kind: Norm, channels: int) -> nn.Module:
    if kind == "batch":
        return OwnBatchNorm(channels)
    return nn.InstanceNorm2d(channels) if kind == "instance" else nn.Identity()


def _start(network: nn.Module) -> None:
    """The published start: convolutions from N(0, 0.02), norms from N(1, 0.02), biases at zero."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d | OwnBatchNorm):
            nn.init.normal_(module.weight, 1.0 if isinstance(module, OwnBatchNorm) else 0.0, 0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


@config
class UNetGeneratorConfig:
    """U-Net with skip connections (pix2pix): as large a receptive field as the picture, details by the skips."""

    kind: Literal["unet"] = "unet"
    channels: Positive = 64  # of the outermost convolution; doubled inwards, up to eight times as many
    downs: Positive = 8  # convolutions that halve the picture, 5 at least: 8 for 256 px (published: unet_256), 7 for 128, 6 for 64
    norm: Norm = "batch"
    dropout: Fraction = 0.0  # in the inner blocks while training; published: 0.5
    skips: bool = True  # whether each block's input stands beside its output; without: an encoder and a decoder

    def __post_init__(self) -> None:
        if self.downs < 5:
            raise UserError(f"downs: got {self.downs}; this U-Net halves at least 5 times; take kind resnet for pictures below 32 px")

    @property
    def step(self) -> int:
        """Sides of pictures are multiples of it, px."""
        return 2**self.downs

    def build(self, in_channels: int, out_channels: int = 3) -> UNetGenerator:
        """A freshly initialised generator."""
        return UNetGenerator(self, in_channels, out_channels)


class UNetGenerator(nn.Module):
    """Pictures (B,out,H,W) in [-1,1] of pictures (B,in,H,W)."""

    def __init__(self, config: UNetGeneratorConfig, in_channels: int, out_channels: int) -> None:
        super().__init__()
        width, inner = config.channels, None
        for depth in reversed(range(1, config.downs)):
            outer = width * min(2 ** (depth - 1), WIDEST)
            inner = _Block(config, outer, width * min(2**depth, WIDEST), inner, config.dropout if 4 <= depth < config.downs - 1 else 0.0)
        wide = width * (2 if config.skips else 1)
        layers = [nn.Conv2d(in_channels, width, 4, 2, 1, bias=config.norm == "instance"), inner, nn.ReLU()]
        self.model = nn.Module()
        self.model.model = nn.Sequential(*layers, nn.ConvTranspose2d(wide, out_channels, 4, 2, 1), nn.Tanh())  # type: ignore[arg-type]
        _start(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.model.model(x)  # type: ignore[operator, no-any-return]


class _Block(nn.Module):
    """A halving, what lies within, a doubling; and its input beside that."""

    def __init__(self, config: UNetGeneratorConfig, outer: int, inner: int, within: nn.Module | None, dropout: float) -> None:
        super().__init__()
        self.skips, bias = config.skips, config.norm == "instance"
        wide = inner * 2 if within is not None and config.skips else inner
        down: list[nn.Module] = [nn.LeakyReLU(0.2), nn.Conv2d(outer, inner, 4, 2, 1, bias=bias)]
        up = [nn.ReLU(), nn.ConvTranspose2d(wide, outer, 4, 2, 1, bias=bias), _norm(config.norm, outer)]
        middle = [] if within is None else [_norm(config.norm, inner), within]
        self.model = nn.Sequential(*down, *middle, *up, *([nn.Dropout(dropout)] if dropout else []))

    def forward(self, x: Tensor) -> Tensor:
        made = self.model(x)
        return torch.cat([x, made], 1) if self.skips else made


@config
class ResNetGeneratorConfig:
    """Two halvings, residual blocks, two doublings (CycleGAN, after Johnson 2016, arXiv 1603.08155)."""

    kind: Literal["resnet"] = "resnet"
    channels: Positive = 64  # of the outermost convolution; four times as many in the blocks
    blocks: Count = 9  # residual blocks; published: 9 at 256 px, 6 at 128
    norm: Norm = "instance"
    dropout: Fraction = 0.0  # in the blocks while training

    @property
    def step(self) -> int:
        """Sides of pictures are multiples of it, px."""
        return 4

    def build(self, in_channels: int, out_channels: int = 3) -> ResNetGenerator:
        """A freshly initialised generator."""
        return ResNetGenerator(self, in_channels, out_channels)


class ResNetGenerator(nn.Module):
    """Pictures (B,out,H,W) in [-1,1] of pictures (B,in,H,W)."""

    def __init__(self, config: ResNetGeneratorConfig, in_channels: int, out_channels: int) -> None:
        super().__init__()
        width, norm, bias = config.channels, config.norm, config.norm == "instance"
        layers: list[nn.Module] = [nn.ReflectionPad2d(3), nn.Conv2d(in_channels, width, 7, bias=bias), _norm(norm, width), nn.ReLU()]
        for wide in (width, 2 * width):
            layers += [nn.Conv2d(wide, 2 * wide, 3, 2, 1, bias=bias), _norm(norm, 2 * wide), nn.ReLU()]
        layers += [_Residual(4 * width, config) for _ in range(config.blocks)]
        for wide in (4 * width, 2 * width):
            up = nn.ConvTranspose2d(wide, wide // 2, 3, 2, 1, output_padding=1, bias=bias)
            layers += [up, _norm(norm, wide // 2), nn.ReLU()]
        self.model = nn.Sequential(*layers, nn.ReflectionPad2d(3), nn.Conv2d(width, out_channels, 7), nn.Tanh())
        _start(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)


class _Residual(nn.Module):
    def __init__(self, width: int, config: ResNetGeneratorConfig) -> None:
        super().__init__()
        first, second = (
            [nn.ReflectionPad2d(1), nn.Conv2d(width, width, 3, bias=config.norm == "instance"), _norm(config.norm, width)] for _ in "ab"
        )
        self.conv_block = nn.Sequential(*first, nn.ReLU(), *([nn.Dropout(config.dropout)] if config.dropout else []), *second)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv_block(x)


Generator = Annotated[UNetGeneratorConfig | ResNetGeneratorConfig, BY_KIND]


@config
class PatchGANConfig:
    """PatchGAN discriminator; the defaults judge patches of 70x70 px."""

    channels: Positive = 64  # of the first convolution; doubled at each further one, up to 8 times as many
    layers: Positive = 3  # convolutions that halve the picture; 2: patches of 34 px, 1: 16 px
    norm: Norm = "batch"
    spectral: bool = False  # spectral normalisation of every convolution (Miyato 2018, arXiv 1802.05957)

    @property
    def smallest(self) -> int:
        """Least height and width of a picture, px."""
        return 3 * 2**self.layers  # the two unstrided convolutions take one place each and leave one

    def build(self, in_channels: int) -> PatchGAN:
        """A freshly initialised discriminator."""
        return PatchGAN(self, in_channels)


class PatchGAN(nn.Module):
    """Logits (B,1,h,w), positive where a patch looks real, of pictures (B,C,H,W) beside what they are conditioned on."""

    def __init__(self, config: PatchGANConfig, in_channels: int) -> None:
        super().__init__()
        width, bias = config.channels, config.norm == "instance"
        layers: list[nn.Module] = [nn.Conv2d(in_channels, width, 4, 2, 1), nn.LeakyReLU(0.2)]
        for i in range(1, config.layers + 1):
            before, width = width, config.channels * min(2**i, WIDEST)
            conv = nn.Conv2d(before, width, 4, 2 if i < config.layers else 1, 1, bias=bias)
            layers += [conv, _norm(config.norm, width), nn.LeakyReLU(0.2)]
        self.model = nn.Sequential(*layers, nn.Conv2d(width, 1, 4, 1, 1))
        _start(self)
        if config.spectral:
            for module in self.model:
                if isinstance(module, nn.Conv2d):
                    nn.utils.parametrizations.spectral_norm(module)

    def forward(self, picture: Tensor, told: Tensor | None = None) -> Tensor:
        return self.model(picture if told is None else torch.cat([told, picture], 1))
