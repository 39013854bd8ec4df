from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ldm.config.errors import UserError
from ldm.models.image_tower import ImageTowerConfig
from ldm.models.perceptual import FeatureDistance, load_lpips

# VGG16 as torchvision numbers it: convolutions with their widths, and M for pooling (a ReLU follows each convolution).
LAYERS = [64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512, "M"]
SLICES = (4, 9, 16, 23, 30)  # where the lpips package cuts them


def vgg16() -> nn.Sequential:
    layers: list[nn.Module] = []
    width = 3
    for layer in LAYERS:
        if layer == "M":
            layers.append(nn.MaxPool2d(2, 2))
        else:
            layers += [nn.Conv2d(width, layer, 3, padding=1), nn.ReLU()]
            width = layer
    return nn.Sequential(*layers)


@pytest.fixture(scope="module")
def parts() -> tuple[nn.Sequential, list[Tensor]]:
    torch.manual_seed(0)
    backbone = vgg16().requires_grad_(False)
    return backbone, [torch.rand(c) for c in (64, 128, 256, 512, 512)]


def lpips_state(backbone: nn.Sequential, heads: list[Tensor]) -> dict[str, Tensor]:
    """The state dict of the lpips package's LPIPS(net="vgg")."""
    state = {"scaling_layer.shift": torch.zeros(1, 3, 1, 1), "scaling_layer.scale": torch.ones(1, 3, 1, 1)}
    for name, value in backbone.state_dict().items():
        block = 1 + sum(int(name.split(".")[0]) >= end for end in SLICES)
        state[f"net.slice{block}.{name}"] = value
    for i, head in enumerate(heads):
        state[f"lin{i}.model.1.weight"] = state[f"lins.{i}.model.1.weight"] = head.view(1, -1, 1, 1)
    return state


def joined_state(backbone: nn.Sequential, heads: list[Tensor]) -> dict[str, Tensor]:
    """torchvision's vgg16, joined by the lpips package's file of heads."""
    state = {f"features.{name}": value for name, value in backbone.state_dict().items()}
    state |= {f"lin{i}.model.1.weight": head.view(1, -1, 1, 1) for i, head in enumerate(heads)}
    return state | {"classifier.0.weight": torch.zeros(1)}


def write(state: dict[str, Tensor], path: Path) -> Path:
    if path.suffix == ".safetensors":
        from safetensors.torch import save_file

        save_file({name: value.clone() for name, value in state.items()}, path)
    else:
        torch.save(state, path)
    return path


def lpips(backbone: nn.Sequential, heads: list[Tensor], a: Tensor, b: Tensor) -> Tensor:
    """The paper's distance, written after the lpips package."""
    shift, scale = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
    total, start = torch.zeros(len(a)), 0
    x, y = ((v - shift.view(1, 3, 1, 1)) / scale.view(1, 3, 1, 1) for v in (a, b))
    for head, end in zip(heads, SLICES, strict=True):
        x, y = backbone[start:end](x), backbone[start:end](y)
        start = end
        difference = (F.normalize(x, dim=1, eps=1e-10) - F.normalize(y, dim=1, eps=1e-10)) ** 2
        total = total + F.conv2d(difference, head.view(1, -1, 1, 1)).mean((1, 2, 3))
    return total


def pictures(size: int = 32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.rand(3, 3, size, size, generator=generator) * 2 - 1 for _ in range(2))
    return a, b


@pytest.mark.parametrize(("state", "name"), [(lpips_state, "lpips.pth"), (joined_state, "joined.safetensors")])
def test_lpips_is_the_published_distance(state, name, parts, tmp_path):
    distance = load_lpips(write(state(*parts), tmp_path / name))
    a, b = pictures()
    torch.testing.assert_close(distance(a, b), lpips(*parts, a, b), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(distance(a, a), torch.zeros(3))
    assert not distance.training and not any(p.requires_grad for p in distance.parameters())


def test_lpips_gives_a_gradient_even_where_all_features_are_zero(parts, tmp_path):
    backbone, heads = parts
    state = lpips_state(backbone, heads)
    for name in [n for n in state if n.startswith("net.slice3") and n.endswith("bias")]:
        state[name] = torch.full_like(state[name], -1e4)  # this block's ReLUs are shut
    distance = load_lpips(write(state, tmp_path / "shut.pth"))
    a, b = pictures()
    a.requires_grad_()
    distance(a, b).sum().backward()
    assert a.grad is not None and a.grad.isfinite().all() and a.grad.abs().sum() > 0


def test_a_lpips_file_that_lacks_something_is_refused_by_name(parts, tmp_path):
    state = lpips_state(*parts)
    missing = tmp_path / "nothing.pth"
    with pytest.raises(UserError, match=r"nothing\.pth: there is no such file"):
        load_lpips(missing)
    (tmp_path / "text.pth").write_text("not weights")
    with pytest.raises(UserError, match=r"text\.pth: not a readable weights file"):
        load_lpips(tmp_path / "text.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(UserError, match=r"list\.pth: holds a list, not a state dict"):
        load_lpips(tmp_path / "list.pth")
    heads = {name: value for name, value in state.items() if name.startswith("lin")}
    with pytest.raises(UserError, match=r"features\.0\.weight or net\.slice1\.0\.weight is missing"):
        load_lpips(write(heads, tmp_path / "heads.pth"))
    backbone = {name: value for name, value in state.items() if not name.startswith("lin")}
    with pytest.raises(UserError, match=r"lin0\.model\.1\.weight or lins\.0\.model\.1\.weight is missing"):
        load_lpips(write(backbone, tmp_path / "backbone.pth"))
    with pytest.raises(UserError, match=r"features\.0\.weight has shape \(2,\)"):
        load_lpips(write(state | {"net.slice1.0.weight": torch.zeros(2)}, tmp_path / "shape.pth"))


class Stub(nn.Module):
    """Features that are the picture itself, and a quarter of it, to compute by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def features(self, image: Tensor) -> list[Tensor]:
        return [image * self.weight, image[:, :, ::2, ::2]]


def test_feature_distance_is_the_mean_squared_distance_of_unit_features():
    distance = FeatureDistance(Stub())
    a, b = pictures(4)
    near, far = F.normalize(a, dim=1), F.normalize(b, dim=1)
    whole = ((near - far) ** 2).sum(1)
    wanted = 0.5 * (whole.mean((1, 2)) + whole[:, ::2, ::2].mean((1, 2)))
    torch.testing.assert_close(distance(a, b), wanted, rtol=1e-4, atol=1e-5)
    assert not any(p.requires_grad for p in distance.parameters())


def test_feature_distance_over_the_image_tower_drives_one_picture_to_the_other():
    torch.manual_seed(0)
    distance = FeatureDistance(ImageTowerConfig(channels=(8, 16)).build())
    a, b = pictures(16)
    assert distance(a, b).shape == (3,) and (distance(a, b) > 0).all()
    torch.testing.assert_close(distance(b, b), torch.zeros(3))
    x = a.clone().requires_grad_()
    optimiser = torch.optim.Adam([x], 0.05)
    for _ in range(40):
        optimiser.zero_grad()
        distance(x, b).sum().backward()
        optimiser.step()
    assert distance(x, b).sum() < 0.3 * distance(a, b).sum()


def test_feature_distance_of_one_pair_does_not_depend_on_the_others():
    torch.manual_seed(0)
    distance = FeatureDistance(ImageTowerConfig(channels=(8,)).build())
    a, b = pictures(16)
    torch.testing.assert_close(distance(a[1:2], b[1:2]), distance(a, b)[1:2], rtol=1e-5, atol=1e-6)
