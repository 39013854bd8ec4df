import inspect
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from ldm.config.errors import UserError
from ldm.diffusion.batch import Cond, Text
from ldm.models.embeddings import coordinates, waves
from ldm.models.transformer import Memory
from ldm.models.unet import UNet, UNetConfig

CROSS, PLAIN = "CrossAttnDownBlock2D", "DownBlock2D"
CROSS_UP, PLAIN_UP = "CrossAttnUpBlock2D", "UpBlock2D"
TINY = {"sample_size": 8, "block_out_channels": (16, 32, 32, 32), "norm_num_groups": 8, "cross_attention_dim": 12, "attention_head_dim": 4}
XL = {
    "block_out_channels": (16, 32, 64),
    "down_block_types": (PLAIN, CROSS, CROSS),
    "up_block_types": (CROSS_UP, CROSS_UP, PLAIN_UP),
    "use_linear_projection": True,
    "transformer_layers_per_block": [1, 2, 3],
    "attention_head_dim": [2, 4, 8],
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 6 * 8 + 20,
}
TWO = {"block_out_channels": (16, 32), "down_block_types": (CROSS, PLAIN), "up_block_types": (PLAIN_UP, CROSS_UP)}
PEERS = {
    "sd1": {},
    "sd2": {"use_linear_projection": True, "attention_head_dim": [2, 4, 4, 4], "upcast_attention": True},
    "xl": XL,
    "inpainting": {"in_channels": 9},
    "one level": {"block_out_channels": (16,), "down_block_types": (CROSS,), "up_block_types": (CROSS_UP,), "layers_per_block": 3},
    "plain middle": {**TWO, "mid_block_type": "UNetMidBlock2D", "layers_per_block": 1},
    "no middle": {**TWO, "mid_block_type": None, "layers_per_block": [1, 1], "cross_attention_dim": [12, 12]},
    "sines first": {**TWO, "flip_sin_to_cos": False, "freq_shift": 1, "norm_eps": 1e-4, "dropout": 0.3},
    "told the guidance": {**TWO, "time_cond_proj_dim": 6},
    "no attention": {**TWO, "down_block_types": (PLAIN, PLAIN), "up_block_types": (PLAIN_UP, PLAIN_UP)},
}
SMALL = UNetConfig(channels=(16, 32), attention=(True, False), heads=2, norm_groups=8, context_width=12, layers=1)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def condition(batch: int, pooled: int = 20, **more: Tensor) -> Cond:
    mask = torch.ones(batch, 5, dtype=torch.bool)
    mask[0, 3:] = False
    text = Text(tokens=draw(batch, 5, 12, seed=1), mask=mask, pooled=draw(batch, pooled, seed=2))
    return Cond(text=text, size=torch.arange(6 * batch).view(batch, 6) * 100.0, **more)


def build(**changes: object) -> UNet:
    torch.manual_seed(0)
    return replace(SMALL, **changes).build().double()


def guidance_of_diffusers(scales: Tensor, channels: int) -> Tensor:
    from diffusers import StableDiffusionPipeline

    told: Tensor = StableDiffusionPipeline.get_guidance_scale_embedding(None, scales - 1, channels)  # reads nothing of the pipeline
    return told.double()


def test_a_network_that_comes_to_be_told_the_guidance_is_the_same_function():
    network = build()
    told = network.told_guidance(6)
    x, t, scales = draw(2, 4, 8, 8), torch.tensor([3, 901]), torch.tensor([1.0, 7.5])
    assert torch.equal(network(x, t, condition(2)), told(x, t, condition(2, guidance=scales)))
    assert told.config.reads_guidance and told.told_more and not network.config.reads_guidance
    with pytest.raises(ValueError, match=r"Cond\.guidance is None"):
        told(x, t, condition(2))
    torch.nn.init.normal_(told.time_embedding.cond_proj.weight)
    x0 = told(x, t, condition(2, guidance=scales))
    steps = told.schedule(t, condition(2, guidance=scales))
    assert not torch.equal(x0, network(x, t, condition(2)))
    for i in range(2):
        torch.testing.assert_close(told(x, t, condition(2, guidance=scales), None, steps[i])[i], x0[i], rtol=1e-9, atol=1e-9)


def test_a_field_that_came_later_is_no_part_of_what_older_networks_are_known_by():
    assert "guidance_channels" not in SMALL.identity()
    assert replace(SMALL, guidance_channels=6).identity()["guidance_channels"] == 6


@pytest.mark.parametrize("name", PEERS)
def test_weights_and_outputs_are_those_of_diffusers(name):
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    peer = UNet2DConditionModel(**{**TINY, **PEERS[name]}).double().eval()
    config = UNetConfig.from_diffusers(dict(peer.config))
    ours = config.build().double().eval()
    ours.load_state_dict(peer.state_dict(), strict=True)
    for height, width in ((8, 8), (9, 7)):
        scales = torch.tensor([1.0, 7.5])
        x, t, cond = draw(2, config.in_channels, height, width), torch.tensor([3, 901]), condition(2, guidance=scales)
        assert cond.text is not None
        added = {"text_embeds": cond.text.pooled, "time_ids": cond.size} if config.size_channels else None
        with torch.no_grad():
            told = guidance_of_diffusers(scales, config.guidance_channels) if config.guidance_channels else None
            wanted = peer(x, t, cond.text.tokens, timestep_cond=told, added_cond_kwargs=added).sample
            torch.testing.assert_close(ours(x, t, cond), wanted, rtol=1e-10, atol=1e-10)

    saved = config.to_diffusers()
    assert UNetConfig.from_diffusers(saved) == config
    assert {key for key in saved if key[0] != "_"} <= set(inspect.signature(UNet2DConditionModel.__init__).parameters)
    UNet2DConditionModel.from_config(saved).load_state_dict(ours.state_dict(), strict=True)


@pytest.mark.parametrize(
    ("config", "parameters"),
    [
        (UNetConfig(), 859_520_964),  # Stable Diffusion 1.5
        (UNetConfig(context_width=1024, heads=(5, 10, 20, 20), linear_projection=True), 865_910_724),  # 2.1
        (
            UNetConfig(
                channels=(320, 640, 1280),
                attention=(False, True, True),
                depth=(1, 2, 10),
                heads=(5, 10, 20),
                context_width=2048,
                linear_projection=True,
                size_channels=256,
                pooled_channels=1280,
            ),
            2_567_463_684,  # XL
        ),
    ],
)
def test_published_parameter_counts(config, parameters):
    with torch.device("meta"):
        assert sum(p.numel() for p in config.build().parameters()) == parameters


def test_published_config_files_are_read():
    values = {
        "_class_name": "UNet2DConditionModel",
        "_diffusers_version": "0.6.0",
        "act_fn": "silu",
        "attention_head_dim": 8,
        "block_out_channels": [320, 640, 1280, 1280],
        "center_input_sample": False,
        "cross_attention_dim": 768,
        "down_block_types": [CROSS, CROSS, CROSS, PLAIN],
        "downsample_padding": 1,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "in_channels": 4,
        "layers_per_block": 2,
        "mid_block_scale_factor": 1,
        "norm_eps": 1e-05,
        "norm_num_groups": 32,
        "out_channels": 4,
        "sample_size": 64,
        "up_block_types": [PLAIN_UP, CROSS_UP, CROSS_UP, CROSS_UP],
    }
    config = UNetConfig.from_diffusers(values)
    assert config == UNetConfig() and config.sample_size == 64


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("act_fn", "gelu"),
        ("class_embed_type", "simple_projection"),
        ("down_block_types", ["AttnDownBlock2D", PLAIN]),
        ("up_block_types", [CROSS_UP, PLAIN_UP]),
        ("mid_block_type", "UNetMidBlock2DSimpleCrossAttn"),
        ("layers_per_block", [1, 2]),
        ("cross_attention_dim", [12, 16]),
        ("addition_embed_type", "image"),
        ("resnet_time_scale_shift", "scale_shift"),
        ("time_embedding_type", "fourier"),
        ("a_field_of_tomorrow", 1),
        ("_class_name", "UNet3DConditionModel"),
        ("coordinates", True),
    ],
)
def test_an_unsupported_field_is_refused_by_name(field, value):
    with pytest.raises(UserError, match=field):
        UNetConfig.from_diffusers({**SMALL.to_diffusers(), field: value})


def test_micro_conditioning_of_impossible_width_is_refused():
    values = SMALL.to_diffusers() | {"addition_embed_type": "text_time", "addition_time_embed_dim": 8}
    with pytest.raises(UserError, match="projection_class_embeddings_input_dim"):
        UNetConfig.from_diffusers(values | {"projection_class_embeddings_input_dim": 48})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention": (True,)}, "attention has 1 entries for the 2 levels"),
        ({"heads": (1, 2, 3)}, "heads has 3 entries"),
        ({"heads": 3}, "heads 3 does not divide 16"),
        ({"norm_groups": 7}, "norm_groups 7 does not divide 16"),
        ({"pooled_channels": 8}, "pooled_channels is set, but neither"),
        ({"pooled_text": True, "size_channels": 8}, "leave pooled_text off"),
    ],
)
def test_fields_that_do_not_fit_each_other_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        replace(SMALL, **changes)


def test_own_fields_survive_saving_and_are_not_called_stock():
    config = replace(SMALL, coordinates=True, pooled_text=True, pooled_channels=20, mask_padding=True)
    saved = config.to_diffusers()
    assert saved["_class_name"] == "LDMUNet" and not config.stock and SMALL.stock
    assert UNetConfig.from_diffusers(saved) == config


def test_how_a_network_starts_or_saves_memory_is_not_its_identity():
    assert replace(SMALL, zero_start=True, checkpointing=True, sample_size=64) == SMALL


def test_heads_and_depth_mean_the_same_for_all_levels_or_for_each():
    a, b = build(heads=(2, 2), depth=(1, 1)), build()
    x, cond = draw(1, 4, 4, 4), condition(1)
    assert torch.equal(a(x, torch.tensor([5]), cond), b(x, torch.tensor([5]), cond))


def test_padding_is_seen_unless_it_is_masked():
    x, t, cond = draw(2, 4, 4, 4), torch.tensor([5, 6]), condition(2)
    assert cond.text is not None
    tokens = cond.text.tokens.clone()
    tokens[0, 3:] += 1
    changed = replace(cond, text=replace(cond.text, tokens=tokens))
    with torch.no_grad():
        stock, masked = build(), build(mask_padding=True)
        assert not torch.allclose(stock(x, t, cond)[0], stock(x, t, changed)[0])
        assert torch.equal(masked(x, t, cond), masked(x, t, changed))
        everything = replace(cond, text=replace(cond.text, mask=torch.ones_like(cond.text.mask)))
        torch.testing.assert_close(masked(x, t, everything), stock(x, t, cond), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("changes", [{}, {"size_channels": 8, "pooled_channels": 20}, {"coordinates": True}])
def test_checkpointing_changes_neither_output_nor_gradients(changes):
    found = []
    for checkpointing in (False, True):
        network, x = build(checkpointing=checkpointing, **changes), draw(2, 4, 5, 4).requires_grad_()
        out = network(x, torch.tensor([5, 600]), condition(2))
        out.square().mean().backward()
        found.append([out, x.grad, *(p.grad for p in network.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_no_sample_touches_another():
    network, cond = build(coordinates=True, size_channels=8, pooled_channels=20), condition(3)
    x, t = draw(3, 4, 4, 4).requires_grad_(), torch.tensor([1, 500, 999])
    out = network(x, t, cond)
    for i in range(3):
        (slope,) = torch.autograd.grad(out[i].sum(), x, retain_graph=True)
        assert slope[i].abs().sum() > 0 and slope[[j for j in range(3) if j != i]].abs().sum() == 0
    assert cond.text is not None and cond.text.pooled is not None and cond.size is not None
    alone = Text(tokens=cond.text.tokens[1:2], mask=cond.text.mask[1:2], pooled=cond.text.pooled[1:2])
    single = network(x[1:2], t[1:2], Cond(text=alone, size=cond.size[1:2]))
    torch.testing.assert_close(single, out[1:2], rtol=1e-12, atol=1e-12)


def test_text_that_is_remembered_gives_the_same_prediction():
    network, x, t, cond = build(mask_padding=True), draw(2, 4, 4, 4), torch.tensor([5, 6]), condition(2)
    assert cond.text is not None
    with torch.no_grad():
        memory = network.remember(cond.text)
        assert isinstance(memory, Memory) and len(memory.keys_values) == 4  # down 1, middle 1, up 2
        assert torch.equal(network(x, t, cond, memory), network(x, t, cond))


def test_an_image_condition_joins_the_channels_of_x():
    network, image = build(in_channels=7), draw(2, 3, 4, 4, seed=5)
    x, t = draw(2, 4, 4, 4), torch.tensor([5, 6])
    a = network(x, t, condition(2, image=image))
    assert torch.equal(a, network(torch.cat([x, image], 1), t, condition(2)))
    with pytest.raises(ValueError, match=r"x and Cond\.image have 4 channels; this U-Net wants 7"):
        network(x, t, condition(2))


def test_a_condition_that_is_missing_is_named():
    x, t, cond = draw(2, 4, 4, 4), torch.tensor([5, 6]), condition(2)
    assert cond.text is not None
    with pytest.raises(ValueError, match=r"Cond\.text is None"):
        build()(x, t, Cond())
    with pytest.raises(ValueError, match=r"Cond\.text\.pooled is None"):
        build(pooled_text=True, pooled_channels=20)(x, t, Cond(text=replace(cond.text, pooled=None)))
    with pytest.raises(ValueError, match=r"Cond\.size is None"):
        build(size_channels=8, pooled_channels=20)(x, t, Cond(text=cond.text))


def test_pooled_text_reaches_the_prediction():
    x, t, cond = draw(2, 4, 4, 4), torch.tensor([5, 6]), condition(2)
    assert cond.text is not None and cond.text.pooled is not None
    other = replace(cond, text=replace(cond.text, pooled=cond.text.pooled + 1))
    assert torch.equal(build()(x, t, cond), build()(x, t, other))
    told = build(pooled_text=True, pooled_channels=20)
    assert not torch.allclose(told(x, t, cond), told(x, t, other))


def test_coordinates_tell_places_apart():
    maps = coordinates(torch.zeros(2, 4, 3, 5))
    assert maps.shape == (2, 6, 3, 5)
    # The middles of five parts of (-1,1), and of three.
    torch.testing.assert_close(maps[0, 0, 0], torch.tensor([-0.8, -0.4, 0.0, 0.4, 0.8]))
    torch.testing.assert_close(maps[1, 1, :, 0], torch.tensor([-2 / 3, 0.0, 2 / 3]))
    torch.testing.assert_close(maps[0, 2], torch.cos(math.pi * maps[0, 0]))
    torch.testing.assert_close(maps[0, 5], torch.sin(math.pi * maps[0, 1]))


def test_waves_of_an_odd_width_end_with_a_zero():
    assert waves(torch.tensor([3.0]), 7).shape == (1, 7) and waves(torch.tensor([3.0]), 7)[0, -1] == 0


def test_a_fresh_network_starts_at_zero_and_still_learns_everywhere():
    network = build(zero_start=True, attention=(True, True))
    x, t, cond = draw(2, 4, 4, 4), torch.tensor([5, 6]), condition(2)
    assert network(x, t, cond).abs().max() == 0
    optimiser = torch.optim.SGD(network.parameters(), 0.1)
    for _ in range(4):  # zero by zero, the gradient reaches every layer
        optimiser.zero_grad()
        (network(x, t, cond) - 1).square().mean().backward()
        optimiser.step()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in network.parameters())


def test_autocast_predicts_about_the_same():
    network, x, t, cond = build().float(), draw(2, 4, 8, 8).float(), torch.tensor([5, 6]), condition(2)
    with torch.no_grad():
        exact = network(x, t, cond)
        with torch.autocast("cpu", torch.bfloat16):
            rough = network(x, t, cond)
    assert (rough.float() - exact).abs().max() < 0.05 * exact.abs().max()


def test_dropout_works_in_training_only():
    network, x, t, cond = build(dropout=0.5), draw(2, 4, 4, 4), torch.tensor([5, 6]), condition(2)
    assert not torch.equal(network(x, t, cond), network(x, t, cond))
    network.eval()
    assert torch.equal(network(x, t, cond), network(x, t, cond))
