"""ControlNet, T2I-Adapter, GLIGEN and IP-Adapter against diffusers on the same weights, and what they add before they have learned."""

from __future__ import annotations

import inspect
from typing import TypeVar

import pytest
import torch
from torch import Tensor, nn

from ldm.config.errors import UserError
from ldm.diffusion.batch import Beside, Cond, Injected, Objects, Text, Told
from ldm.models.conditioned import ConditionNetwork
from ldm.models.controlnet import ControlNet, ControlNetConfig
from ldm.models.t2i_adapter import T2IAdapter, T2IAdapterConfig
from ldm.models.unet import UNet, UNetConfig

UNETS = {
    "plain last level": UNetConfig(channels=(16, 32), attention=(True, False), heads=2, norm_groups=8, context_width=12, layers=1),
    "sizes": UNetConfig(
        channels=(16, 32),
        attention=(False, True),
        heads=(2, 4),
        depth=(1, 2),
        norm_groups=8,
        context_width=12,
        linear_projection=True,
        size_channels=4,
        pooled_channels=20,
    ),
}
NET = UNETS["plain last level"]
OWN = ControlNetConfig(widths=(4, 8, 12, 16))


M = TypeVar("M", bound=nn.Module)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def condition(injected: Injected | None = None, batch: int = 2) -> Cond:
    text = Text(tokens=draw(batch, 5, 12, seed=1), mask=torch.ones(batch, 5, dtype=torch.bool), pooled=draw(batch, 20, seed=2))
    return Cond(text=text, size=torch.arange(6 * batch).view(batch, 6) * 100.0, injected=injected)


def shaken(module: M) -> M:
    """With all weights at random, so that nothing is zero."""
    generator = torch.Generator().manual_seed(3)
    for weight in module.parameters():
        weight.data.add_(0.1 * torch.randn(weight.shape, generator=generator, dtype=torch.float64))
    return module


def unet(config: UNetConfig = NET) -> UNet:
    torch.manual_seed(0)
    return config.build().double().eval()


def control_of(base: UNet, own: ControlNetConfig = OWN) -> ControlNet:
    made = ControlNet.beside(base.config, own, 4).double()
    made.begin(base)
    return made


X, T, ONE = draw(2, 4, 8, 8), torch.tensor([3, 901]), torch.ones(2, dtype=torch.float64)
HINT = draw(2, 3, 64, 64, seed=5)
BOX = torch.tensor([[[0.1, 0.2, 0.5, 0.9], [0.3, 0.3, 0.4, 0.4]], [[0.0, 0.0, 1.0, 1.0], [0.0, 0.0, 0.0, 0.0]]], dtype=torch.float64)
THERE = torch.tensor([[True, True], [True, False]])


@pytest.mark.parametrize("name", UNETS)
@torch.no_grad()
def test_controlnet_is_that_of_diffusers(name: str) -> None:
    from diffusers import ControlNetModel, UNet2DConditionModel

    base = unet(UNETS[name])
    ours = shaken(control_of(base).double().eval())
    said = OWN.to_diffusers(base.config)
    assert {key for key in said if key[0] != "_"} <= set(inspect.signature(ControlNetModel.__init__).parameters)
    theirs = ControlNetModel.from_config(said).double().eval()
    theirs.load_state_dict(ours.state_dict(), strict=True)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    peer = UNet2DConditionModel.from_config(base.config.to_diffusers()).double().eval()
    peer.load_state_dict(base.state_dict(), strict=True)
    cond = condition()
    assert cond.text is not None
    sizes = {"text_embeds": cond.text.pooled, "time_ids": cond.size} if base.config.size_channels else None
    skips, middle = theirs(X, T, cond.text.tokens, HINT, 0.7, added_cond_kwargs=sizes, return_dict=False)
    injected = ours.added(X, T, cond, HINT, 0.7 * ONE)
    for one, other in zip((*injected.skips, injected.middle), (*skips, middle), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)
    more = {"down_block_additional_residuals": skips, "mid_block_additional_residual": middle}
    wanted = peer(X, T, cond.text.tokens, added_cond_kwargs=sizes, **more).sample
    torch.testing.assert_close(base(X, T, condition(injected)), wanted, rtol=1e-10, atol=1e-10)
    assert ControlNetConfig.from_diffusers(said) == OWN


@torch.no_grad()
def test_a_controlnet_starts_as_diffusers_makes_one_from_a_unet() -> None:
    from diffusers import ControlNetModel, UNet2DConditionModel

    base = unet()
    peer = UNet2DConditionModel.from_config(base.config.to_diffusers()).double()
    peer.load_state_dict(base.state_dict())
    theirs = ControlNetModel.from_unet(peer, conditioning_channels=3).state_dict()
    ours = control_of(base, ControlNetConfig()).state_dict()
    assert {k: tuple(v.shape) for k, v in ours.items()} == {k: tuple(v.shape) for k, v in theirs.items()}
    for name in theirs:
        if "cond_embedding" not in name:
            assert torch.equal(ours[name], theirs[name]), name


def test_controlnets_shrink_by_the_autoencoders_factor() -> None:
    assert ControlNetConfig.shrinking(8, 48).widths == (16, 32, 48, 48)
    assert ControlNetConfig.shrinking(4, 512).widths == (16, 32, 96)
    with pytest.raises(UserError, match="shrinks pictures by 6"):
        ControlNetConfig.shrinking(6, 48)
    with pytest.raises(UserError, match="channel_order"):
        ControlNetConfig.from_diffusers({"_class_name": "ControlNetModel", "controlnet_conditioning_channel_order": "bgr"})


@torch.no_grad()
def test_t2i_adapter_is_that_of_diffusers() -> None:
    import diffusers

    base, own = unet(), T2IAdapterConfig()
    ours = shaken(T2IAdapter(own, base.config.channels, 8).double())
    said = own.to_diffusers(base.config.channels, 8)
    theirs = diffusers.T2IAdapter.from_config(said).double()
    theirs.load_state_dict(ours.state_dict(), strict=True)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    features = theirs(HINT)
    injected = ours.added(HINT, ONE)
    for one, other in zip(injected.levels, features, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)
    peer = diffusers.UNet2DConditionModel.from_config(base.config.to_diffusers()).double().eval()
    peer.load_state_dict(base.state_dict(), strict=True)
    cond = condition()
    assert cond.text is not None
    wanted = peer(X, T, cond.text.tokens, down_intrablock_additional_residuals=[f.clone() for f in features]).sample
    torch.testing.assert_close(base(X, T, condition(injected)), wanted, rtol=1e-10, atol=1e-10)


@torch.no_grad()
def test_grounding_is_that_of_diffusers() -> None:
    from diffusers import UNet2DConditionModel

    ours = shaken(unet().grounded().double())
    said = ours.config.to_diffusers()
    assert said["attention_type"] == "gated" and UNetConfig.from_diffusers(said) == ours.config
    peer = UNet2DConditionModel.from_config(said).double().eval()
    peer.load_state_dict(ours.state_dict(), strict=True)
    again = ours.config.build().double().eval()
    again.load_state_dict(peer.state_dict(), strict=True)
    cond, phrase = condition(), draw(2, 2, 12, seed=6)
    assert cond.text is not None
    told = {"boxes": BOX, "masks": THERE.double(), "positive_embeddings": phrase}
    wanted = peer(X, T, cond.text.tokens, cross_attention_kwargs={"gligen": told}).sample
    objects = Objects(box=BOX, there=THERE, phrase=phrase, weight=ONE)
    for net in (ours, again, again.for_inference()):
        torch.testing.assert_close(net(X, T, condition(Injected(objects=objects))), wanted, rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_further_prompts_are_read_as_by_diffusers() -> None:
    from diffusers import UNet2DConditionModel
    from diffusers.models.attention_processor import IPAdapterAttnProcessor2_0

    ours = shaken(unet())
    peer = UNet2DConditionModel.from_config(ours.config.to_diffusers()).double().eval()
    peer.load_state_dict(ours.state_dict(), strict=True)
    some, more = draw(2, 3, 12, seed=7), draw(2, 4, 12, seed=8)
    made = {}
    for name, module in peer.named_modules():
        if name.endswith("attn2"):
            made[name] = shaken(IPAdapterAttnProcessor2_0(module.inner_dim, 12, (3, 4), [0.6, 0.3]).double())
            module.set_processor(made[name])
    cond = condition()
    assert cond.text is not None
    wanted = peer(X, T, (cond.text.tokens, [some[:, None], more[:, None]]), return_dict=False)[0]
    names = [name for name, module in ours.named_modules() if name.endswith("attn2")]
    assert [ours.get_submodule(name) for name in names] == ours.cross_attentions()
    beside = tuple(
        Beside(
            keys=tuple(made[name].to_k_ip[i](tokens) for name in names),
            values=tuple(made[name].to_v_ip[i](tokens) for name in names),
            weight=weight * ONE,
        )
        for i, (tokens, weight) in enumerate(((some, 0.6), (more, 0.3)))
    )
    for net in (ours, ours.for_inference()):
        torch.testing.assert_close(net(X, T, condition(Injected(beside=beside))), wanted, rtol=1e-10, atol=1e-10)


def beside(base: UNet, weight: Tensor, values: float = 1.0) -> Beside:
    widths = [layer.to_k.out_features for layer in base.cross_attentions()]
    keys = tuple(draw(2, 3, width, seed=i) for i, width in enumerate(widths))
    return Beside(keys=keys, values=tuple(values * key for key in keys), weight=weight)


def ports() -> dict[str, tuple[UNet, Injected]]:
    base = unet()
    objects = Objects(box=BOX, there=THERE, phrase=draw(2, 2, 12, seed=6), weight=ONE)
    return {
        "controlnet": (base, control_of(base).added(X, T, condition(), HINT, ONE)),
        "adapter": (base, T2IAdapter(T2IAdapterConfig(), base.config.channels, 8).double().added(HINT, ONE)),
        "grounding": (base.grounded().double(), Injected(objects=objects)),
        "beside": (base, Injected(beside=(beside(base, ONE, values=0.0),))),
    }


@pytest.mark.parametrize("name", ports())
def test_new_weights_change_no_bit_at_first_but_learn(name: str) -> None:
    net, injected = ports()[name]
    drawn = net(X, T, condition(injected))
    assert torch.equal(drawn, unet()(X, T, condition()))
    drawn.square().mean().backward()  # what begins with zero must not stay there


@pytest.mark.parametrize("name", ["controlnet", "adapter"])
def test_zeroed_layers_have_gradients(name: str) -> None:
    base = unet()
    adapter = T2IAdapter(T2IAdapterConfig(), base.config.channels, 8).double()
    module: ConditionNetwork = control_of(base) if name == "controlnet" else adapter
    injected = module(X, T, condition(), Told(value=HINT, strength=ONE)).injected
    base(X, T, condition(injected)).square().mean().backward()
    zeroed = [p for p in module.parameters() if not p.any()]
    assert sum(bool(p.grad is not None and p.grad.any()) for p in zeroed) >= 3


@torch.no_grad()
def test_a_weight_of_zero_leaves_a_sample_as_without_and_others_alone() -> None:
    """Each sample is told by itself: one that is not told draws what the base draws."""
    base = unet()
    net, control = shaken(base.grounded().double()), shaken(control_of(base))
    half = torch.tensor([1.0, 0.0], dtype=torch.float64)

    def drawn(weight: Tensor) -> Tensor:
        objects = Objects(box=BOX, there=THERE, phrase=draw(2, 2, 12, seed=6), weight=weight)
        more = Injected(objects=objects, beside=(beside(base, weight),))
        return net(X, T, condition(control.added(X, T, condition(), HINT, weight) + more))

    told, half_told, untold = drawn(ONE), drawn(half), net(X, T, condition())
    torch.testing.assert_close(half_told[0], told[0], rtol=1e-12, atol=1e-12)
    assert torch.equal(half_told[1], untold[1]) and not torch.allclose(told[1], untold[1])


def test_a_controlnet_beside_a_widened_unet_reads_the_latents_alone() -> None:
    wide = unet().widened(7)
    made = control_of(wide)
    assert made.config.in_channels == 4 and torch.equal(made.conv_in.weight, wide.conv_in.weight[:, :4])
