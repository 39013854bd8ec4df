"""DiT and MMDiT against diffusers' PixArt and SD3 transformers on the same weights, and what the loop and samplers ask of them."""

from __future__ import annotations

import inspect
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from ldm.config.errors import UserError
from ldm.diffusion.batch import Cond, Text, rows
from ldm.models import cost, denoiser
from ldm.models.backbone import Denoiser
from ldm.models.dit import DiTConfig
from ldm.models.mmdit import MMDiTConfig

PIXART: dict[str, Any] = {
    "num_attention_heads": 3,
    "attention_head_dim": 8,
    "num_layers": 2,
    "cross_attention_dim": 24,
    "caption_channels": 12,
    "sample_size": 8,
    "out_channels": 8,
}
SD3: dict[str, Any] = {
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "num_layers": 3,
    "joint_attention_dim": 12,
    "caption_projection_dim": 16,
    "pooled_projection_dim": 20,
    "in_channels": 4,
    "out_channels": 4,
    "sample_size": 8,
    "pos_embed_max_size": 6,
}
PEERS: dict[str, tuple[str, dict[str, Any]]] = {
    "pixart": ("PixArtTransformer2DModel", PIXART),
    "pixart, sizes": ("PixArtTransformer2DModel", {**PIXART, "use_additional_conditions": True, "patch_size": 1, "interpolation_scale": 2}),
    "pixart, 1024 px": ("PixArtTransformer2DModel", {**PIXART, "sample_size": 128}),
    "sd3": ("SD3Transformer2DModel", SD3),
    "sd3.5": ("SD3Transformer2DModel", {**SD3, "qk_norm": "rms_norm", "dual_attention_layers": (0, 1)}),
}
SMALL = {
    "dit": DiTConfig(heads=3, head_width=8, layers=2, context_width=12, sample_size=8, size_conditions=True),
    "mmdit": MMDiTConfig(heads=2, head_width=8, layers=3, context_width=12, pooled_channels=20, in_channels=4, out_channels=4, largest=6),
}
KINDS = pytest.mark.parametrize("kind", SMALL)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def condition() -> Cond:
    mask = torch.ones(2, 5, dtype=torch.bool)
    mask[0, 3:] = False
    text = Text(tokens=draw(2, 5, 12, seed=1), mask=mask, pooled=draw(2, 20, seed=2))
    return Cond(text=text, size=torch.tensor([[64, 48, 0, 0, 64, 48], [32, 32, 1, 2, 16, 32]]))


def build(kind: str, **changes: Any) -> Denoiser:
    """Of random weights throughout: fresh ones begin with zeros that hide mistakes."""
    torch.manual_seed(0)
    network = replace(SMALL[kind], **changes).build().double().eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(std=0.2)
    return network


@pytest.mark.parametrize("name", PEERS)
def test_weights_and_outputs_are_those_of_diffusers(name: str) -> None:
    import diffusers

    class_name, words = PEERS[name]
    peer_class = getattr(diffusers, class_name)
    torch.manual_seed(0)
    peer = peer_class(**words).double().eval()
    config = denoiser.config_of({**peer.config, "_class_name": class_name})
    ours = config.build().double().eval()
    ours.load_state_dict(peer.state_dict(), strict=True)
    # diffusers keeps positions and, in its RMSNorm, variances in float32
    limit = 1e-5 if "qk_norm" in words else 1e-12
    for height, width in ((8, 8), (12, 6)):
        x, t, cond = draw(2, 4, height, width), torch.tensor([3, 901]), condition()
        assert cond.text is not None and cond.size is not None
        told: dict[str, Any] = {"timestep": t, "encoder_hidden_states": cond.text.tokens}
        if class_name == "PixArtTransformer2DModel":
            told["encoder_attention_mask"] = cond.text.mask
            target = cond.size[:, 4:].double()
            sizes = {"resolution": target, "aspect_ratio": target[:, :1] / target[:, 1:]}
            told["added_cond_kwargs"] = sizes if config.reads_size else {"resolution": None, "aspect_ratio": None}
        else:
            told["pooled_projections"] = cond.text.pooled
        with torch.no_grad():
            torch.testing.assert_close(ours(x, t, cond), peer(x, **told).sample, rtol=limit, atol=limit)

    saved = config.to_diffusers()
    assert denoiser.config_of(saved) == config
    assert {key for key in saved if key[0] != "_"} <= set(inspect.signature(peer_class.__init__).parameters)
    peer_class.from_config(saved).load_state_dict(ours.state_dict(), strict=True)


@KINDS
def test_remembered_text_and_schedule_change_nothing(kind: str) -> None:
    network, x, cond = build(kind), draw(2, 4, 8, 4), condition()
    assert cond.text is not None
    steps, memory = network.schedule(torch.tensor([900.0, 20.0]), cond), network.remember(cond.text)
    for step, time in zip(steps, (900.0, 20.0), strict=True):
        plain = network(x, torch.full((2,), time), cond)
        torch.testing.assert_close(network(x, torch.full((2,), time), cond, memory, step), plain, rtol=1e-12, atol=1e-12)


@KINDS
def test_recomputed_blocks_have_the_same_gradients(kind: str) -> None:
    found = []
    for checkpointing in (False, True):
        network = build(kind, checkpointing=checkpointing)
        network(draw(2, 4, 4, 4), torch.tensor([5.0, 800.0]), condition()).square().sum().backward()
        found.append({name: p.grad for name, p in network.named_parameters()})
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-12, atol=1e-12)


@KINDS
def test_a_fresh_network_says_nothing_and_learns(kind: str) -> None:
    torch.manual_seed(0)
    network = SMALL[kind].build()
    x, cond = draw(2, 4, 4, 4).float(), condition()
    out = network(x, torch.tensor([5.0, 800.0]), cond)
    assert out.shape == x.shape and not out.any()
    (out - x).square().sum().backward()
    last = network.get_parameter("proj_out.weight").grad
    assert last is not None and last.abs().sum() > 0


@KINDS
def test_samples_do_not_see_each_other(kind: str) -> None:
    network, x, t, cond = build(kind), draw(2, 4, 4, 4), torch.tensor([5.0, 800.0]), condition()
    alone = network(x[:1], t[:1], rows(cond, 0, 1))
    torch.testing.assert_close(network(x, t, cond)[:1], alone, rtol=1e-12, atol=1e-12)


def test_padding_is_hidden_from_dit_and_seen_by_mmdit() -> None:
    for kind, hidden in (("dit", True), ("mmdit", False)):
        network, x, t, cond = build(kind), draw(2, 4, 4, 4), torch.tensor([5.0, 800.0]), condition()
        assert cond.text is not None
        tokens = cond.text.tokens.clone()
        tokens[0, 3:] += 1
        other = replace(cond, text=replace(cond.text, tokens=tokens))
        assert torch.equal(network(x, t, cond), network(x, t, other)) == hidden


@KINDS
def test_cost_is_counted(kind: str) -> None:
    small, found = cost.denoiser(SMALL[kind], 8, 8, 5)
    assert small == sum(p.numel() for p in SMALL[kind].build().parameters())
    assert found.forward > 0 and found.backward >= 1.9 * found.forward


@pytest.mark.parametrize(
    ("class_name", "words", "told"),
    [
        ("PixArtTransformer2DModel", {**PIXART, "norm_type": "ada_norm_zero"}, "norm_type"),
        ("PixArtTransformer2DModel", {**PIXART, "caption_channels": None}, "caption_channels"),
        ("PixArtTransformer2DModel", {**PIXART, "cross_attention_dim": 32}, "cross_attention_dim"),
        ("PixArtTransformer2DModel", {**PIXART, "a_field_of_tomorrow": 1}, "a_field_of_tomorrow"),
        ("SD3Transformer2DModel", {**SD3, "caption_projection_dim": 17}, "caption_projection_dim"),
        ("SD3Transformer2DModel", {**SD3, "dual_attention_layers": [3]}, "dual_attention_layers"),
        ("SD3Transformer2DModel", {**SD3, "qk_norm": "layer_norm"}, "qk_norm"),
    ],
)
def test_what_a_transformer_does_not_have_is_refused_by_name(class_name: str, words: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=told):
        denoiser.config_of({**words, "_class_name": class_name})


@KINDS
def test_what_is_missing_is_told(kind: str) -> None:
    network, x, t, cond = build(kind), draw(2, 4, 4, 4), torch.tensor([5.0, 800.0]), condition()
    with pytest.raises(ValueError, match="channels"):
        network(x[:, :3], t, cond)
    with pytest.raises(ValueError, match="text"):
        network(x, t, replace(cond, text=None))
    with pytest.raises(ValueError, match="cut into patches"):
        network(draw(2, 4, 5, 4), t, cond)
    wrong, match = (UserError, "positions") if kind == "mmdit" else (ValueError, "size")
    with pytest.raises(wrong, match=match):
        network(draw(2, 4, 16, 16), t, replace(cond, size=None))
