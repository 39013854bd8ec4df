"""Patch discriminator (PatchGAN) of the adversarial autoencoder."""

from __future__ import annotations

from torch import Tensor, nn

from ldm.config.errors import UserError
from ldm.config.schema import Positive, config


@config
class DiscriminatorConfig:
    """A PatchGAN (Isola 2017, arXiv 1611.07004); the defaults judge patches of 70x70 px."""

    in_channels: Positive = 3  # channels of the picture
    channels: Positive = 64  # width of the first convolution; doubled at each further one, up to 8 times as wide
    layers: Positive = 3  # convolutions that halve the picture; 2: patches of 34 px, 1: 16 px
    norm_groups: Positive = 32  # groups of every GroupNorm

    def __post_init__(self) -> None:
        if 2 * self.channels % self.norm_groups:
            raise UserError(f"norm_groups {self.norm_groups} does not divide 2 x channels ({2 * self.channels})")

    def build(self) -> PatchDiscriminator:
        """A freshly initialised discriminator."""
        return PatchDiscriminator(self)


class PatchDiscriminator(nn.Module):
    """Strided convolutions with GroupNorm, which unlike the usual BatchNorm leaves the samples of a batch apart.

    New weights are drawn from N(0, 0.02), as in the paper.
    """

    def __init__(self, config: DiscriminatorConfig) -> None:
        super().__init__()
        self.config = config
        width = config.channels
        layers: list[nn.Module] = [nn.Conv2d(config.in_channels, width, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for i in range(1, config.layers + 1):
            before, width = width, config.channels * min(2**i, 8)
            stride = 2 if i < config.layers else 1
            layers += [nn.Conv2d(before, width, 4, stride=stride, padding=1), nn.GroupNorm(config.norm_groups, width), nn.LeakyReLU(0.2)]
        layers.append(nn.Conv2d(width, 1, 4, padding=1))
        self.layers = nn.Sequential(*layers)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0, 0.02)
                assert module.bias is not None
                nn.init.zeros_(module.bias)

    @property
    def smallest(self) -> int:
        """Least height and width of a picture, px."""
        return 3 * 2**self.config.layers  # the two unstrided convolutions take one place each and leave one

    def forward(self, image: Tensor) -> Tensor:
        """Logits (B,1,h,w), positive where a patch looks real, of pictures (B,3,H,W) in [-1,1].

        Raises:
            UserError: if the picture is smaller than `smallest`.
        """
        if min(image.shape[2:]) < self.smallest:
            height, width = image.shape[2:]
            raise UserError(
                f"discriminator.layers is {self.config.layers}, which needs pictures of at least {self.smallest} px, "
                f"not {width}x{height}; take fewer layers"
            )
        return self.layers(image)
