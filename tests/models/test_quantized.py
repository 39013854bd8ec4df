"""Weights in 8 and 4 bits: the error that they make, the gradients through them, and bitsandbytes as the oracle of nf4."""

from __future__ import annotations

import copy
from statistics import NormalDist

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from ldm.models import quantized
from ldm.models.lora import halvable, inject
from ldm.models.quantized import BYTES, NF4, Bits, pack, quantize, same, unpack
from ldm.models.unet import UNet, UNetConfig

SMALL = UNetConfig(channels=(64, 64), attention=(False, True), layers=1, heads=2, norm_groups=8, context_width=32)


def test_levels_of_nf4_are_quantiles_of_a_gaussian():
    """Dettmers 2023, section 3: quantiles up to an offset, those below zero and those above apart, 0 itself among them."""
    gauss, most = NormalDist(), 0.9677083

    def part(many: int) -> list[float]:
        return [gauss.inv_cdf(most + (0.5 - most) * i / many) for i in range(many)]

    wanted = torch.tensor(sorted([*(-value for value in part(7)), 0.0, *part(8)])) / part(8)[0]
    assert torch.allclose(torch.tensor(NF4), wanted, atol=1e-6)


@pytest.mark.parametrize("shape", [(96, 64), (40, 33, 3, 3), (7, 3)])
@pytest.mark.parametrize("bits", ["int8", "nf4"])
def test_a_weight_comes_back_as_near_as_its_bits_tell(bits: Bits, shape: tuple[int, ...]):
    weight = torch.randn(shape) * torch.linspace(0.01, 3, shape[0]).view(-1, *[1] * (len(shape) - 1))
    packed = pack(weight, bits)
    again = unpack(packed, weight.shape, torch.float32)
    assert again.shape == weight.shape and sum(t.nbytes for t in packed) == pytest.approx(
        BYTES[bits] * weight.numel(), rel=0.2 if weight.numel() > 100 else 20
    )
    if bits == "int8":
        rows = weight.flatten(1)
        assert ((again - weight).flatten(1).abs() <= rows.abs().amax(1, keepdim=True) / 254 * 1.0001).all()
    else:
        blocks = F.pad(weight.flatten(), (0, -weight.numel() % 64)).view(-1, 64)
        widest = max(b - a for a, b in zip(NF4, NF4[1:], strict=False)) / 2
        error = F.pad((again - weight).flatten(), (0, -weight.numel() % 64)).view(-1, 64)
        assert (error.abs() <= blocks.abs().amax(1, keepdim=True) * widest * 1.0001).all()
    assert torch.equal(unpack(pack(again, bits), weight.shape, torch.float32), again)  # to the bit, where nothing is lost any more
    assert torch.equal(unpack(pack(torch.zeros(shape), bits), weight.shape, torch.float32), torch.zeros(shape))


def test_nf4_is_that_of_bitsandbytes():
    functional = pytest.importorskip("bitsandbytes.functional")
    weight = torch.randn(64, 128)
    codes, state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    packed = pack(weight, "nf4")
    assert torch.allclose(packed.scale, state.absmax.flatten()) and (packed.codes != codes.flatten()).float().mean() < 1e-3  # ties
    wanted = functional.dequantize_4bit(codes, state)
    assert (unpack(packed, weight.shape, torch.float32) - wanted).abs().mean() < 1e-4


@pytest.mark.parametrize("bits", ["int8", "nf4"])
@pytest.mark.parametrize("kind", [torch.float64, torch.float32, torch.bfloat16])
def test_answers_and_gradients_are_those_of_the_whole_weight(bits: Bits, kind: torch.dtype):
    for layer, x in (
        (nn.Linear(80, 96), torch.randn(2, 5, 80)),
        (nn.Conv2d(32, 48, 3, stride=2, padding=1, bias=False), torch.randn(2, 32, 9, 8)),
        (nn.Conv2d(64, 128, 3, padding=2, dilation=2, groups=2), torch.randn(1, 64, 6, 6)),
    ):
        layer.to(kind).requires_grad_(False)
        x = x.to(kind).requires_grad_()
        twin = copy.deepcopy(layer)
        quantize(layer, bits)
        twin.load_state_dict({**twin.state_dict(), "weight": layer.weight})
        assert torch.equal(layer(x), twin(x)) and isinstance(layer, type(twin)) and layer.weight.dtype == kind
        given = torch.randn_like(twin(x))
        found, wanted = (torch.autograd.grad(one(x), x, given)[0] for one in (layer, twin))
        assert torch.allclose(found, wanted, rtol=1e-5 if kind != torch.bfloat16 else 2e-2, atol=1e-6 if kind != torch.bfloat16 else 2e-2)
        assert same(layer, layer.weight if kind != torch.bfloat16 else unpack(layer.packed, layer.weight.shape, torch.float32))
        assert not same(layer, layer.weight * 1.5)
        layer.to(torch.bfloat16)
        assert layer.scale.dtype == torch.float32 and layer.codes.dtype in (torch.int8, torch.uint8)


def test_the_graph_keeps_no_whole_weight():
    network = nn.Sequential(*(nn.Linear(256, 256) for _ in range(8))).requires_grad_(False)
    for layer in network:
        quantize(layer, "int8")
    kept: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    x = torch.randn(4, 256, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), torch.autocast("cpu", torch.bfloat16):
        network(x).sum().backward()
    assert x.grad is not None and not any(tensor.numel() == 256**2 and tensor.is_floating_point() for tensor in kept)


@pytest.mark.parametrize("bits", ["int8", "nf4"])
def test_adapters_learn_beside_a_quantized_network(bits: Bits):
    from ldm.diffusion.batch import Cond, Text

    torch.manual_seed(0)
    made = SMALL.build()
    learned = inject(made, 4, 4.0, (*UNet.lora_targets, "conv1"))
    cond = Cond(text=Text(tokens=torch.randn(1, 5, 32), mask=torch.ones(1, 5, dtype=torch.bool)))
    x = torch.randn(1, 4, 16, 16)
    grads, answers, before = [], [], sum(t.nbytes for t in (*made.parameters(), *made.buffers()))
    for now in (False, True):
        for layer in quantized.quantizable(halvable(made)) if now else ():
            quantize(layer, bits)
        for p in learned:
            p.grad = None
        with torch.autocast("cpu", torch.bfloat16):
            answer = made(x, torch.zeros(1), cond).float()
        answer.square().mean().backward()
        answers.append(answer.detach())
        grads.append(torch.cat([p.grad.flatten() for p in learned]))
    after = sum(t.nbytes for t in (*made.parameters(), *made.buffers()))
    assert after < (0.45 if bits == "int8" else 0.33) * before
    apart = (answers[1] - answers[0]).norm() / answers[0].norm()
    assert 1e-4 < apart < (0.03 if bits == "int8" else 0.3)
    assert F.cosine_similarity(*grads, dim=0) > (0.999 if bits == "int8" else 0.95)
