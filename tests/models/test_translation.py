"""Translation networks against the published layout, built here from torch's own layers, at float64."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ldm.config.errors import UserError
from ldm.models.translation import PatchGANConfig, ResNetGeneratorConfig, UNetGeneratorConfig, own_norms


def published_norm(kind: str) -> Any:
    return nn.BatchNorm2d if kind == "batch" else partial(nn.InstanceNorm2d, affine=False)


class Skip(nn.Module):
    """The published U-Net's block; `within` None: the innermost one."""

    def __init__(self, outer: int, inner: int, within: nn.Module | None, norm: Any, bias: bool, first: int = 0, drop: bool = False) -> None:
        super().__init__()
        self.outermost = bool(first)
        down = nn.Conv2d(first or outer, inner, 4, 2, 1, bias=bias)
        up = nn.ConvTranspose2d(inner if within is None else 2 * inner, outer, 4, 2, 1, bias=bias or self.outermost)
        if self.outermost:
            layers = [down, within, nn.ReLU(True), up, nn.Tanh()]
        elif within is None:
            layers = [nn.LeakyReLU(0.2, True), down, nn.ReLU(True), up, norm(outer)]
        else:
            layers = [nn.LeakyReLU(0.2, True), down, norm(inner), within, nn.ReLU(True), up, norm(outer)]
        self.model = nn.Sequential(*layers, *([nn.Dropout(0.5)] if drop else []))

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x) if self.outermost else torch.cat([x, self.model(x)], 1)


def published_unet(downs: int, width: int, told: int, kind: str) -> nn.Module:
    norm, bias = published_norm(kind), kind == "instance"
    block = Skip(8 * width, 8 * width, None, norm, bias)
    for _ in range(downs - 5):
        block = Skip(8 * width, 8 * width, block, norm, bias, drop=True)
    for times in (4, 2, 1):
        block = Skip(times * width, 2 * times * width, block, norm, bias)
    whole = nn.Module()
    whole.model = Skip(3, width, block, norm, bias, first=told)
    whole.forward = whole.model.forward
    return whole


class Added(nn.Module):
    def __init__(self, width: int, norm: Any, bias: bool) -> None:
        super().__init__()
        pair = [[nn.ReflectionPad2d(1), nn.Conv2d(width, width, 3, bias=bias), norm(width)] for _ in range(2)]
        self.conv_block = nn.Sequential(*pair[0], nn.ReLU(True), *pair[1])

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv_block(x)


def published_resnet(blocks: int, width: int, told: int, kind: str) -> nn.Module:
    norm, bias = published_norm(kind), kind == "instance"
    layers: list[Any] = [nn.ReflectionPad2d(3), nn.Conv2d(told, width, 7, bias=bias), norm(width), nn.ReLU(True)]
    layers += [nn.Conv2d(width, 2 * width, 3, 2, 1, bias=bias), norm(2 * width), nn.ReLU(True)]
    layers += [nn.Conv2d(2 * width, 4 * width, 3, 2, 1, bias=bias), norm(4 * width), nn.ReLU(True)]
    layers += [Added(4 * width, norm, bias) for _ in range(blocks)]
    layers += [nn.ConvTranspose2d(4 * width, 2 * width, 3, 2, 1, 1, bias=bias), norm(2 * width), nn.ReLU(True)]
    layers += [nn.ConvTranspose2d(2 * width, width, 3, 2, 1, 1, bias=bias), norm(width), nn.ReLU(True)]
    whole = nn.Module()
    whole.model = nn.Sequential(*layers, nn.ReflectionPad2d(3), nn.Conv2d(width, 3, 7), nn.Tanh())
    whole.forward = whole.model.forward
    return whole


def published_patches(width: int, told: int, kind: str) -> nn.Module:
    norm, bias = published_norm(kind), kind == "instance"
    layers: list[Any] = [nn.Conv2d(told, width, 4, 2, 1), nn.LeakyReLU(0.2, True)]
    for before, after, stride in ((1, 2, 2), (2, 4, 2), (4, 8, 1)):
        layers += [nn.Conv2d(before * width, after * width, 4, stride, 1, bias=bias), norm(after * width), nn.LeakyReLU(0.2, True)]
    whole = nn.Module()
    whole.model = nn.Sequential(*layers, nn.Conv2d(8 * width, 1, 4, 1, 1))
    whole.forward = whole.model.forward
    return whole


@pytest.mark.parametrize("kind", ["batch", "instance"])
@pytest.mark.parametrize("net", ["unet", "resnet", "patches"])
def test_names_results_gradients_and_statistics_are_the_published_ones_at_batches_of_one(net: str, kind: Any) -> None:
    torch.manual_seed(0)
    ours: nn.Module
    if net == "unet":
        ours, theirs = UNetGeneratorConfig(channels=4, downs=6, norm=kind, dropout=0.5).build(5), published_unet(6, 4, 5, kind)
        assert "model.model.1.model.3.model.1.weight" in ours.state_dict()
    elif net == "resnet":
        ours, theirs = ResNetGeneratorConfig(channels=4, blocks=2, norm=kind).build(5), published_resnet(2, 4, 5, kind)
        assert "model.10.conv_block.1.weight" in ours.state_dict()
    else:
        ours, theirs = PatchGANConfig(channels=4, norm=kind).build(5), published_patches(4, 5, kind)
    ours, theirs = ours.double(), theirs.double()
    theirs.load_state_dict(ours.state_dict(), strict=True)
    for module in (*ours.modules(), *theirs.modules()):
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    x = torch.randn(2, 5, 64, 64, dtype=torch.float64)
    made = ours(x)
    each = torch.cat([theirs(one[None]) for one in x])
    assert torch.allclose(made, each, atol=1e-12)
    mine, others = (torch.autograd.grad(y.square().sum(), list(module.parameters())) for y, module in ((made, ours), (each, theirs)))
    assert all(torch.allclose(a, b, rtol=1e-9, atol=1e-10) for a, b in zip(mine, others, strict=True))
    if kind == "batch":
        theirs.load_state_dict(ours.state_dict(), strict=True)
        theirs(x[:1])
        for norm in own_norms(ours):
            norm.seen.clear()
        ours(x[:1])
        for norm in own_norms(ours):
            [(mean, var, count)] = norm.seen
            norm.follow(mean / count, var / count)
        stored = ours.state_dict()
        assert all(torch.allclose(value, stored[name], rtol=1e-6) for name, value in theirs.state_dict().items())


def test_samples_stay_apart_in_training_and_in_drawing() -> None:
    torch.manual_seed(0)
    net, x = UNetGeneratorConfig(channels=4, downs=5).build(3), torch.randn(3, 3, 32, 32)
    assert torch.allclose(net(x)[1:2], net(x[1:2]), atol=1e-5)
    net.eval()
    assert torch.allclose(net(x)[1:2], net(x[1:2]), atol=1e-5)


def test_without_skips_and_with_spectral_normalisation() -> None:
    net = UNetGeneratorConfig(channels=4, downs=5, skips=False).build(3)
    assert net(torch.randn(1, 3, 32, 32)).shape == (1, 3, 32, 32)
    judge = PatchGANConfig(channels=4, layers=1, norm="none", spectral=True).build(3)
    for _ in range(20):
        judge(torch.randn(2, 3, 32, 32))
    convolution: Any = judge.model[2]
    assert float(torch.linalg.matrix_norm(convolution.weight.flatten(1), 2)) == pytest.approx(1, abs=0.05)
    with pytest.raises(UserError, match="downs: got 4; this U-Net halves at least 5 times"):
        UNetGeneratorConfig(downs=4)
