import pytest
import torch
from torch.nn import functional as F

from ldm.models.blocks import Downsample, ResnetBlock, Upsample, folded_upsample, recompute, start_as_identity


def test_a_folded_upsample_is_enlargement_and_convolution():
    torch.manual_seed(0)
    x, weight, bias = torch.randn(2, 5, 3, 4).double(), torch.randn(6, 5, 3, 3).double(), torch.randn(6).double()
    inputs = [v.requires_grad_() for v in (x, weight, bias)]
    wanted = F.conv2d(F.interpolate(x, scale_factor=2.0), weight, bias, padding=1)
    found = folded_upsample(x, weight, bias)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    slope = torch.randn_like(wanted)
    for a, b in zip(torch.autograd.grad(found, inputs, slope), torch.autograd.grad(wanted, inputs, slope), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("side", [4, 8])
def test_upsample_is_the_same_layer_on_either_path(side, monkeypatch):
    torch.manual_seed(0)
    folds = []
    monkeypatch.setattr("ldm.models.blocks.folded_upsample", lambda *a: folds.append(1) or folded_upsample(*a))
    layer, x = Upsample(4).double(), torch.randn(1, 4, side, side + 1).double()
    torch.testing.assert_close(layer(x), layer.conv(F.interpolate(x, scale_factor=2.0)), rtol=1e-12, atol=1e-12)
    assert len(folds) == (side >= 8)
    odd = (2 * side - 1, 2 * side + 2)
    torch.testing.assert_close(layer(x, odd), layer.conv(F.interpolate(x, size=odd)))


def test_a_folded_upsample_keeps_the_type_of_autocast():
    with torch.autocast("cpu", torch.bfloat16):
        assert Upsample(4)(torch.randn(1, 4, 8, 8)).dtype == torch.bfloat16


def test_downsample_halves_rounding_up_or_down():
    x = torch.zeros(1, 4, 7, 8)
    assert Downsample(4, padded_at_end=False)(x).shape == (1, 4, 4, 4)
    assert Downsample(4, padded_at_end=True)(x).shape == (1, 4, 3, 4)


def test_a_block_started_as_the_identity_passes_its_input_on():
    block, x = ResnetBlock(4, 4, groups=2, eps=1e-6, time_channels=3), torch.randn(2, 4, 5, 5)
    start_as_identity(block)
    assert torch.equal(block(x, torch.randn(2, 3)), x)


def test_recomputing_repeats_dropout_and_keeps_gradients():
    torch.manual_seed(0)
    block, x = ResnetBlock(4, 4, groups=2, eps=1e-6, dropout=0.5), torch.randn(2, 4, 5, 5, requires_grad=True)
    found = []
    for run in (lambda: block(x), lambda: recompute(block, x)):
        torch.manual_seed(1)
        found.append(torch.autograd.grad(run().square().sum(), (x, *block.parameters())))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
