"""Perceptual distances: LPIPS, and the same idea in the features of another frozen network."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.config.errors import UserError

# VGG16's 3x3 convolutions: for each block, torchvision's numbers of its convolutions and their width.
VGG16 = (((0, 2), 64), ((5, 7), 128), ((10, 12, 14), 256), ((17, 19, 21), 512), ((24, 26, 28), 512))
# LPIPS' own normalisation, for pixels in [-1,1].
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)


class Tower(Protocol):
    """A network that gives a list of feature maps on its way."""

    def features(self, image: Tensor) -> list[Tensor]:
        """Maps [(B,C,h,w), ...] of an image (B,3,H,W) in [-1,1]."""
        ...


class FeatureDistance(nn.Module):
    """Squared distance of a tower's unit-length features, mean over its maps (LPIPS without learned weights)."""

    def __init__(self, tower: nn.Module) -> None:
        super().__init__()
        self.tower = tower.eval().requires_grad_(False)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Distances (B,) >= 0 of two batches of pictures (B,3,H,W) in [-1,1]."""
        tower: Tower = self.tower  # type: ignore[assignment]
        pairs = zip(tower.features(a), tower.features(b), strict=True)
        parts = [(_unit(x, 1e-6) - _unit(y, 1e-6)).square().sum(1).mean((1, 2)) for x, y in pairs]
        return torch.stack(parts).mean(0)


class Lpips(nn.Module):
    """LPIPS over VGG16 (Zhang 2018, arXiv 1801.03924): feature differences under learned non-negative weights."""

    shift: Tensor
    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        before = 3
        self.blocks = nn.ModuleList()
        for numbers, width in VGG16:
            sizes = [before] + [width] * (len(numbers) - 1)
            self.blocks.append(nn.ModuleList(nn.Conv2d(size, width, 3, padding=1) for size in sizes))
            before = width
        self.heads = nn.ParameterList(torch.zeros(width) for _, width in VGG16)
        self.register_buffer("shift", torch.tensor(SHIFT).view(1, 3, 1, 1))
        self.register_buffer("scale", torch.tensor(SCALE).view(1, 3, 1, 1))

    def features(self, image: Tensor) -> list[Tensor]:
        """relu1_2, relu2_2, relu3_3, relu4_3 and relu5_3 of an image (B,3,H,W) in [-1,1]."""
        maps, x = [], (image - self.shift) / self.scale
        for i, block in enumerate(self.convolutions()):
            x = F.max_pool2d(x, 2) if i else x
            for conv in block:
                x = F.relu(conv(x))
            maps.append(x)
        return maps

    def convolutions(self) -> list[list[nn.Module]]:
        """VGG16's, by the five blocks."""
        return [list(block.children()) for block in self.blocks]

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Distances (B,) >= 0 of two batches of pictures (B,3,H,W) in [-1,1], of at least 16 px."""
        total = torch.zeros(len(a), device=a.device)  # (B,)
        for head, x, y in zip(self.heads, self.features(a), self.features(b), strict=True):
            difference = (_unit(x, 1e-20) - _unit(y, 1e-20)).square()  # (B,C,h,w)
            total = total + (difference * head.view(1, -1, 1, 1)).sum(1).mean((1, 2))
        return total


def load_lpips(path: Path) -> Lpips:
    """LPIPS with weights from a file, frozen.

    The file holds the state dict of the lpips package's `LPIPS(net="vgg")`, or that of torchvision's `vgg16` (keys
    "features.0.weight", ...) joined by the heads ("lin0.model.1.weight", ...).

    Args:
        path: .safetensors, or .pth / .pt, of which tensors alone are read.

    Raises:
        UserError: if the file is missing, is no such file, or lacks a tensor.
    """
    state = _read(path)
    network = Lpips()
    for i, (block, (numbers, _)) in enumerate(zip(network.convolutions(), VGG16, strict=True)):
        for conv, number in zip(block, numbers, strict=True):
            for name in ("weight", "bias"):
                end = f"{number}.{name}"
                _fill(getattr(conv, name), (f"features.{end}", f"net.slice{i + 1}.{end}"), state, path)
    for i, head in enumerate(network.heads):
        _fill(head, (f"lin{i}.model.1.weight", f"lins.{i}.model.1.weight"), state, path)
    return network.eval().requires_grad_(False)


def _read(path: Path) -> Mapping[str, Tensor]:
    if not path.is_file():
        raise UserError(f"{path}: there is no such file; LPIPS needs its weights from a .safetensors or .pth file")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # readers fail with many types
        raise UserError(f"{path}: not a readable weights file ({type(error).__name__}); LPIPS needs one") from error
    if not isinstance(state, dict):
        raise UserError(f"{path}: holds a {type(state).__name__}, not a state dict; save the network's state_dict()")
    return state


@torch.no_grad()
def _fill(target: Tensor, names: tuple[str, ...], state: Mapping[str, Tensor], path: Path) -> None:
    found = [state[name] for name in names if name in state]
    if not found:
        raise UserError(f"{path}: {' or '.join(names)} is missing; LPIPS needs VGG16's convolutions and its five heads")
    if found[0].numel() != target.numel():
        raise UserError(f"{path}: {names[0]} has shape {tuple(found[0].shape)}, not {tuple(target.shape)} as in VGG16")
    target.copy_(found[0].view_as(target))


def _unit(x: Tensor, floor: float) -> Tensor:
    """Features of length one at every place, (B,C,h,w), in float32 at least; shorter where below sqrt(floor)."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    return x * torch.rsqrt(x.square().sum(1, keepdim=True) + floor)
