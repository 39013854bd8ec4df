import inspect
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from ldm.config.errors import UserError
from ldm.diffusion.rng import Rng
from ldm.models import autoencoder as module
from ldm.models.autoencoder import KLAutoencoder, KLConfig, VQAutoencoder, VQConfig, code_use, fold_latent_stats, redraw_dead
from ldm.models.blocks import ResnetBlock

DOWN, ATTN_DOWN = "DownEncoderBlock2D", "AttnDownEncoderBlock2D"
UP, ATTN_UP = "UpDecoderBlock2D", "AttnUpDecoderBlock2D"
TINY = {
    "block_out_channels": (8, 16),
    "down_block_types": (DOWN, DOWN),
    "up_block_types": (UP, UP),
    "norm_num_groups": 4,
    "latent_channels": 3,
}
ATTENDS = {"down_block_types": (DOWN, ATTN_DOWN), "up_block_types": (ATTN_UP, UP)}
KL_PEERS = {
    "sd1": {},
    "no quant convs": {"use_quant_conv": False, "use_post_quant_conv": False, "shift_factor": 0.1},
    "no middle attention": {"mid_block_add_attention": False, "layers_per_block": 2, "force_upcast": False},
    "attention": ATTENDS,
    "other channels": {"in_channels": 4, "out_channels": 1},
    "one level": {"block_out_channels": (8,), "down_block_types": (DOWN,), "up_block_types": (UP,)},
}
SPATIAL = {"norm_type": "spatial", "block_out_channels": (32, 64)}
VQ_PEERS = {
    "ldm": {"num_vq_embeddings": 11},
    "narrow codes": {"num_vq_embeddings": 11, "vq_embed_dim": 2, **ATTENDS},
    "movq": {"num_vq_embeddings": 11, **SPATIAL, **ATTENDS},
    "amused": {**SPATIAL, "norm_type": "group", "mid_block_add_attention": False, "lookup_from_codebook": True},
}
KL_SMALL = KLConfig(channels=(8, 16), layers=1, latent_channels=3, norm_groups=4)
VQ_SMALL = VQConfig(channels=(8, 16), layers=1, latent_channels=3, norm_groups=4, codes=11)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def build(config: KLConfig | VQConfig) -> KLAutoencoder | VQAutoencoder:
    torch.manual_seed(0)
    return config.build().double()


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", KL_PEERS)
def test_kl_weights_and_outputs_are_those_of_diffusers(name):
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    peer = AutoencoderKL(**{**TINY, **KL_PEERS[name]}).double()
    config = KLConfig.from_diffusers(dict(peer.config))
    ours = config.build().double()
    ours.load_state_dict(peer.state_dict(), strict=True)
    for height, width in ((16, 16), (17, 14)):
        image = draw(2, config.in_channels, height, width)
        with torch.no_grad():
            posterior, (mean, logvar) = peer.encode(image).latent_dist, ours.encode(image)
            close(mean, posterior.mean)
            close(logvar, posterior.logvar)
            close(ours.decode(mean), peer.decode(mean).sample)
    assert mean.shape[1] == ours.latent_channels and ours.factor == 2 ** (len(config.channels) - 1)

    saved = config.to_diffusers()
    assert KLConfig.from_diffusers(saved) == config
    assert {key for key in saved if key[0] != "_"} <= set(inspect.signature(AutoencoderKL.__init__).parameters)
    AutoencoderKL.from_config(saved).load_state_dict(ours.state_dict(), strict=True)


@pytest.mark.parametrize("name", VQ_PEERS)
def test_vq_weights_and_outputs_are_those_of_diffusers(name):
    from diffusers import VQModel

    torch.manual_seed(0)
    peer = VQModel(**{**TINY, **VQ_PEERS[name]}).double()
    config = VQConfig.from_diffusers(dict(peer.config))
    ours = config.build().double()
    ours.load_state_dict(peer.state_dict(), strict=True)
    for height, width in ((16, 16), (17, 14)):
        image = draw(2, 3, height, width)
        with torch.no_grad():
            z = ours.encode(image)
            close(z, peer.encode(image).latents)
            wanted, _, (_, _, numbers) = peer.quantize(z)
            found, codes, _ = ours.quantize(z)
            close(found, wanted)
            assert torch.equal(codes.flatten(), numbers) and codes.shape == z[:, 0].shape
            close(ours.decode(z), peer.decode(z).sample)
            close(ours.decode(found, quantise=False), ours.decode(z))
    assert z.shape[1] == ours.latent_channels == ours.codebook.shape[1]

    saved = config.to_diffusers()
    assert VQConfig.from_diffusers(saved) == config
    assert {key for key in saved if key[0] != "_"} <= set(inspect.signature(VQModel.__init__).parameters)
    VQModel.from_config(saved).load_state_dict(ours.state_dict(), strict=True)


def test_published_parameter_count_of_stable_diffusion():
    with torch.device("meta"):
        assert sum(p.numel() for p in KLConfig().build().parameters()) == 83_653_863


def test_a_published_vae_config_file_is_read():
    values = {
        "_class_name": "AutoencoderKL",
        "_diffusers_version": "0.6.0",
        "act_fn": "silu",
        "in_channels": 3,
        "out_channels": 3,
        "block_out_channels": [128, 256, 512, 512],
        "down_block_types": [DOWN] * 4,
        "up_block_types": [UP] * 4,
        "latent_channels": 4,
        "layers_per_block": 2,
        "norm_num_groups": 32,
        "sample_size": 512,
    }
    expected = KLConfig(scaling_factor=0.18215, sample_size=512)
    assert KLConfig.from_diffusers(values) == expected


@pytest.mark.parametrize(
    ("config", "field", "value"),
    [
        (KL_SMALL, "act_fn", "gelu"),
        (KL_SMALL, "latents_mean", [0.0, 0.0, 0.0]),
        (KL_SMALL, "down_block_types", [DOWN, "SkipDownBlock2D"]),
        (KL_SMALL, "up_block_types", [ATTN_UP, UP]),
        (KL_SMALL, "a_field_of_tomorrow", 1),
        (KL_SMALL, "_class_name", "VQModel"),
        (VQ_SMALL, "norm_type", "layer"),
        (VQ_SMALL, "_class_name", "AutoencoderKL"),
    ],
)
def test_an_autoencoder_field_that_is_not_supported_is_refused_by_name(config, field, value):
    with pytest.raises(UserError, match=field):
        type(config).from_diffusers({**config.to_diffusers(), field: value})


@pytest.mark.parametrize(
    ("config", "changes", "message"),
    [
        (KL_SMALL, {"attention": (True,)}, "attention has 1 entries for the 2 levels"),
        (KL_SMALL, {"norm_groups": 3}, "norm_groups 3 does not divide 8"),
        (VQ_SMALL, {"norm": "spatial", "code_channels": 2}, "code_channels is 2, but norm=spatial"),
    ],
)
def test_autoencoder_fields_that_do_not_fit_each_other_are_refused(config, changes, message):
    with pytest.raises(UserError, match=message):
        replace(config, **changes)


@pytest.mark.parametrize("quant_conv", [True, False])
def test_a_fresh_posterior_is_as_narrow_as_asked(quant_conv):
    _, logvar = build(replace(KL_SMALL, quant_conv=quant_conv, logvar_start=-5.0)).encode(draw(2, 3, 16, 16))
    assert (logvar == -5).all()
    assert KLConfig().logvar_start == -6


@pytest.mark.parametrize("config", [KL_SMALL, VQ_SMALL])
def test_zero_residuals_start_every_block_as_the_identity(config):
    network = build(replace(config, zero_residuals=True))
    blocks = [m for m in network.modules() if isinstance(m, ResnetBlock) and m.conv_shortcut is None]
    x = draw(1, 16, 4, 4)
    assert blocks and all(torch.equal(b(x), x) for b in blocks if b.norm1.num_channels == 16)
    plain = [m for m in build(config).modules() if isinstance(m, ResnetBlock)]
    assert all(b.conv2.weight.abs().sum() > 0 for b in plain)


@pytest.mark.parametrize("config", [KL_SMALL, replace(VQ_SMALL, channels=(32, 64), norm="spatial")])
def test_checkpointing_an_autoencoder_changes_neither_output_nor_gradients(config):
    found = []
    for checkpointing in (False, True):
        network, image = build(replace(config, checkpointing=checkpointing)), draw(2, 3, 8, 8).requires_grad_()
        z = network.encode(image)
        out = network.decode(z if isinstance(z, Tensor) else z[0])
        out.square().mean().backward()
        found.append([out, image.grad, *(p.grad for p in network.decoder.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("config", [KL_SMALL, VQ_SMALL])
def test_no_picture_touches_another(config):
    network, image = build(config), draw(3, 3, 8, 8).requires_grad_()
    z = network.encode(image)
    out = network.decode(z if isinstance(z, Tensor) else z[0])
    (slope,) = torch.autograd.grad(out[1].sum(), image)
    assert slope[1].abs().sum() > 0 and slope[[0, 2]].abs().sum() == 0


def test_last_layer_is_where_the_pixels_are_made():
    for config in (KL_SMALL, VQ_SMALL):
        network = config.build()
        assert network.last_layer is network.decoder.conv_out.weight


@pytest.mark.parametrize("quant_conv", [True, False])
def test_folded_statistics_give_normalised_latents_and_the_same_pictures(quant_conv):
    config = replace(KL_SMALL, quant_conv=quant_conv, post_quant_conv=quant_conv, scaling_factor=0.2, shift_factor=0.1)
    network, image = build(config), draw(2, 3, 16, 16)
    with torch.no_grad():  # log-variances that differ from place to place
        last = network.encoder.conv_out if network.quant_conv is None else network.quant_conv
        last.weight.copy_(0.3 * draw(*last.weight.shape, seed=4))
    mean, std = (0.5, -2.0, 0.1), (0.3, 4.0, 1.5)
    made, state = fold_latent_stats(config, network.state_dict(), mean, std)
    folded = made.build().double()
    folded.load_state_dict(state, strict=True)
    m, s = (torch.tensor(v, dtype=torch.float64).view(1, -1, 1, 1) for v in (mean, std))
    with torch.no_grad():
        (mean_before, logvar_before), (mean_after, logvar_after) = network.encode(image), folded.encode(image)
        close(mean_after, (mean_before - m) / s)
        close((0.5 * logvar_after).exp(), (0.5 * logvar_before).exp() / s)
        close(folded.decode(mean_after), network.decode(mean_before))
    assert made.quant_conv and made.post_quant_conv and (made.scaling_factor, made.shift_factor) == (1.0, None)
    assert config.to_diffusers()["scaling_factor"] == 0.2  # the old one is left as it was
    half = {name: value.half() for name, value in network.state_dict().items()}
    assert {value.dtype for value in fold_latent_stats(config, half, mean, std)[1].values()} == {torch.float16}


@pytest.mark.parametrize(("mean", "std"), [((0.0,) * 2, (1.0,) * 3), ((0.0,) * 3, (1.0, 0.0, 1.0))])
def test_statistics_that_cannot_be_folded_are_refused(mean, std):
    with pytest.raises(UserError, match="3 means and positive deviations are needed"):
        fold_latent_stats(KL_SMALL, KL_SMALL.build().state_dict(), mean, std)


def test_the_nearest_code_is_found_in_any_type_and_in_pieces(monkeypatch):
    network = build(replace(VQ_SMALL, codes=64))
    with torch.no_grad():
        network.codebook.copy_(draw(64, 3))
    z = draw(2, 3, 5, 4, seed=1)
    distance = (z.permute(0, 2, 3, 1)[..., None, :] - network.codebook).square().sum(-1)  # (B,h,w,K)
    assert torch.equal(network.quantize(z)[1], distance.argmin(-1))
    monkeypatch.setattr(module, "SEARCH_BYTES", 64 * 8 * 7)  # seven places at a time
    assert torch.equal(network.quantize(z)[1], distance.argmin(-1))
    network.float()
    with torch.autocast("cpu", torch.bfloat16):  # the search does not lose bits to autocast
        assert torch.equal(network.quantize(z.float())[1], distance.argmin(-1))


def test_quantised_gradients_go_straight_through_and_terms_pull_their_own_side():
    network, z = build(VQ_SMALL), draw(2, 3, 5, 4).requires_grad_()
    found, codes, terms = network.quantize(z)
    close(found, network.codebook[codes].permute(0, 3, 1, 2))
    weights = draw(2, 3, 5, 4, seed=1)
    (slope,) = torch.autograd.grad((found * weights).sum(), z, retain_graph=True)
    assert torch.equal(slope, weights)
    error = (found - z).detach()
    close(terms["codebook"], error.square().mean())
    close(terms["commitment"], error.square().mean())
    (pull,) = torch.autograd.grad(terms["commitment"], z, retain_graph=True)
    close(pull, -2 * error / error.numel())
    (pull,) = torch.autograd.grad(terms["codebook"], network.codebook, retain_graph=True)
    rows = error.permute(0, 2, 3, 1).flatten(0, 2)
    close(pull, torch.zeros_like(pull).index_add_(0, codes.flatten(), 2 * rows / error.numel()))
    for name, other in (("commitment", network.codebook), ("codebook", z)):
        assert torch.autograd.grad(terms[name], other, retain_graph=True, allow_unused=True)[0] is None


def test_code_use_counts_codes_and_their_evenness():
    share, perplexity = code_use(torch.tensor([5.0, 5.0, 5.0, 5.0]))
    assert share == 1 and perplexity == pytest.approx(4)
    share, perplexity = code_use(torch.tensor([6.0, 2.0, 0.0, 0.0]))
    assert share == 0.5 and perplexity == pytest.approx(math.exp(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25))))


def test_dead_codes_are_redrawn_from_encoder_outputs_repeatably():
    codebook, latest = draw(6, 3).float(), draw(9, 3, seed=1).float()
    usage = torch.tensor([3.0, 0.0, 1.0, 0.001, 2.0, 0.1])
    fresh, dead = redraw_dead(codebook, usage, latest, Rng(0, [17]))
    assert dead.tolist() == [False, True, False, True, False, False]
    rows = {tuple(row) for row in latest.tolist()}
    drawn = [tuple(row) for row in fresh.tolist()]
    assert set(drawn) <= rows and len(set(drawn)) == 6
    assert torch.equal(redraw_dead(codebook, usage, latest, Rng(0, [17]))[0], fresh)
    assert not torch.equal(redraw_dead(codebook, usage, latest, Rng(0, [18]))[0], fresh)
    few, _ = redraw_dead(codebook, usage, latest[:2], Rng(0, [17]))
    assert few.shape == (6, 3)


def test_redrawing_brings_a_collapsed_codebook_to_use():
    network, usage = replace(VQ_SMALL, codes=32).build(), torch.ones(32)
    z = draw(4, 3, 8, 8).float()
    shares = []
    for step in range(60):
        with torch.no_grad():
            codes = network.quantize(z)[1]
            usage.lerp_(torch.bincount(codes.flatten(), minlength=32).float(), 0.1)
            shares.append(float(code_use(usage)[0]))
            if step % 10 == 9:
                fresh, dead = redraw_dead(network.codebook, usage, z.permute(0, 2, 3, 1).flatten(0, 2), Rng(0, [step]))
                network.codebook.copy_(torch.where(dead[:, None], fresh, network.codebook))
                usage.masked_fill_(dead, float(usage.mean()))
    assert shares[-1] > 0.9
