import weakref
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ldm.diffusion.batch import Cond, Text
from ldm.models.autoencoder import KLConfig, VQConfig
from ldm.models.blocks import Upsample
from ldm.models.inference import FoldedUpsample, FusedAttention, FusedMapAttention, prepare, shared_copy
from ldm.models.unet import UNetConfig

SMALL = UNetConfig(channels=(16, 32), layers=1, attention=(True, True), heads=2, norm_groups=8, context_width=12)
XL = replace(SMALL, size_channels=8, pooled_channels=20, linear_projection=True, upcast_attention=True, mask_padding=True)
KL = KLConfig(channels=(8, 16), layers=1, norm_groups=4, attention=(False, True))
MOVQ = VQConfig(channels=(32, 64), layers=1, norm_groups=32, codes=16, norm="spatial")
CLOSE = {torch.float64: 1e-12, torch.float32: 2e-6}


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def told(batch: int, dtype: torch.dtype) -> Cond:
    mask = torch.ones(batch, 5, dtype=torch.bool)
    mask[0, 3:] = False
    text = Text(tokens=draw(batch, 5, 12).to(dtype), mask=mask, pooled=draw(batch, 20).to(dtype))
    return Cond(text=text, size=torch.arange(6 * batch).view(batch, 6) * 100.0)


def built(config: UNetConfig | KLConfig | VQConfig, dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    return config.build().to(dtype).eval()


@pytest.mark.parametrize("dtype", CLOSE, ids=str)
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("config", [SMALL, XL], ids=["sd", "xl"])
@torch.no_grad()
def test_a_prepared_unet_is_the_same_function(config, channels_last, dtype):
    plain = built(config, dtype)
    before = {name: value.clone() for name, value in plain.state_dict().items()}
    fast = prepare(plain, channels_last=channels_last)
    cond = told(2, dtype)
    for height, width in ((16, 16), (17, 20), (9, 7), (3, 2)):
        x, t = draw(2, 4, height, width).to(dtype), torch.tensor([3, 901])
        wanted = plain(x, t, cond)
        for memory in (None, fast.remember(cond.text)):
            torch.testing.assert_close(fast(x, t, cond, memory), wanted, rtol=CLOSE[dtype], atol=CLOSE[dtype])
    after = plain.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[n], before[n]) and after[n].stride() == before[n].stride() for n in before)
    assert {type(m) for m in fast.modules()} >= {FusedAttention, FoldedUpsample}
    assert not {type(m) for m in plain.modules()} & {FusedAttention, FoldedUpsample}


@pytest.mark.parametrize("dtype", CLOSE, ids=str)
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("config", [KL, MOVQ], ids=["kl", "movq"])
@torch.no_grad()
def test_a_prepared_autoencoder_is_the_same_function(config, channels_last, dtype):
    plain = built(config, dtype)
    fast = prepare(plain, channels_last=channels_last)
    for height, width in ((16, 16), (10, 6)):
        image, z = draw(2, 3, height, width).to(dtype), draw(2, plain.latent_channels, height, width).to(dtype)
        for a, b in ((fast.encode(image), plain.encode(image)), (fast.decode(z), plain.decode(z))):
            torch.testing.assert_close(a, b, rtol=10 * CLOSE[dtype], atol=10 * CLOSE[dtype])
    assert FusedMapAttention in {type(m) for m in fast.modules()}
    assert plain.state_dict().keys() == config.build().state_dict().keys()


@pytest.mark.parametrize("size", [None, (16, 18), (15, 18), (16, 17), (15, 17), (3, 3), (2, 5)])
def test_a_folded_enlargement_has_any_size_that_halving_can_ask_for(size):
    torch.manual_seed(0)
    layer = Upsample(4).double()
    height, width = (8, 9) if size is None else [-(-side // 2) for side in size]
    x = draw(2, 4, height, width)
    wanted = layer.conv(F.interpolate(x, size=size or (16, 18)))
    for y in (x, x.to(memory_format=torch.channels_last)):
        torch.testing.assert_close(FoldedUpsample(layer)(y, size), wanted, rtol=1e-12, atol=1e-12)


def test_what_an_adapter_stands_in_for_is_left_alone():
    class Adapter(nn.Linear):
        pass

    plain = built(SMALL, torch.float32)
    attention = plain.down_blocks[0].attentions[0].transformer_blocks[0].attn1
    attention.to_q = Adapter(16, 16, bias=False)
    fast = prepare(plain)
    assert type(fast.down_blocks[0].attentions[0].transformer_blocks[0].attn1.to_q) is Adapter


def test_a_shared_copy_has_modules_of_its_own_on_the_same_weights():
    plain = built(SMALL, torch.float32)
    copied = shared_copy(plain)
    assert all(a is b for a, b in zip(plain.parameters(), copied.parameters(), strict=True))
    assert not set(plain.modules()) & set(copied.modules())


@pytest.mark.parametrize("config", [SMALL, XL], ids=["sd", "xl"])
@torch.no_grad()
def test_weights_cast_once_give_what_autocast_gives_to_the_bit(config):
    plain = built(config, torch.float32)
    fast = prepare(plain, dtype=torch.bfloat16)
    convolved = {name for name, p in fast.named_parameters() if p.ndim > 1}
    assert all((p.dtype == torch.bfloat16) == ("norm" not in name) for name, p in fast.named_parameters()) and convolved
    assert {p.dtype for p in plain.parameters()} == {torch.float32}
    x, t, cond = draw(2, 4, 17, 16).float(), torch.tensor([3, 901]), told(2, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(fast(x, t, cond, fast.remember(cond.text)), prepare(plain)(x, t, cond))


@pytest.mark.parametrize("dtype", CLOSE, ids=str)
@pytest.mark.parametrize("config", [SMALL, replace(SMALL, pooled_text=True, pooled_channels=20), XL], ids=["sd", "pooled", "xl"])
@torch.no_grad()
def test_a_schedules_embeddings_in_one_call_are_those_of_each_step(config, dtype):
    network, cond = built(config, dtype), told(2, dtype)
    times = torch.tensor([999.0, 500.5, 3.0])
    for t, step in zip(times, network.schedule(times, cond), strict=True):
        x = draw(2, 4, 6, 5).to(dtype)
        wanted = network(x, t.expand(2), cond)
        torch.testing.assert_close(network(x, t.expand(2), cond, None, step), wanted, rtol=CLOSE[dtype], atol=CLOSE[dtype])


def test_in_place_is_the_same_and_leaves_no_second_weight():
    torch.manual_seed(0)
    plain = UNetConfig(channels=(32, 64), layers=1, attention=(True, True), heads=2, context_width=16, norm_groups=8).build()
    apart = prepare(plain, channels_last=True)
    old = [(weakref.ref(p), p.data_ptr()) for p in plain.parameters()]
    count = sum(p.numel() for p in apart.parameters())
    own = prepare(plain, channels_last=True, in_place=True)
    assert own is plain and sum(p.numel() for p in own.parameters()) == count
    for name, value in apart.named_parameters():
        assert torch.equal(value, own.get_parameter(name))
    assert not any(reference() is not None for reference, _ in old)
