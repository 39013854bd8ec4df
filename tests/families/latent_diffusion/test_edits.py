"""Drawing out of pictures: what is kept, what is new, and that the hooks are met where they should be."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from finished_model import CAPTIONS, SIDE, Pictures
from torch import Tensor, nn

from ldm.config.errors import UserError
from ldm.data.pictures import to_uint8
from ldm.diffusion.batch import Cond
from ldm.diffusion.process import Process
from ldm.diffusion.samplers import SAMPLERS
from ldm.diffusion.schedules import Cosine
from ldm.families.draws import Wanted
from ldm.families.latent_diffusion.edits import encoded, towards
from ldm.families.latent_diffusion.engine import Canvas, Edit, shortened
from ldm.families.latent_diffusion.family import LatentDiffusionFamily, load

FACTOR = 8


@pytest.fixture(scope="module")
def family(kl_model: Path) -> LatentDiffusionFamily:
    return load(kl_model)


@pytest.fixture(scope="module")
def inpainter(kl_model: Path, tmp_path_factory: pytest.TempPathFactory) -> LatentDiffusionFamily:
    """The same model with a UNet that is told a mask."""
    made = load(kl_model)
    torch.manual_seed(2)
    network = replace(made.config.network, in_channels=9)
    found = LatentDiffusionFamily(replace(made.config, network=network), network.build(), made.codec, made.text)
    found.resolution = made.resolution
    return found.eval()


def pictures(count: int = 1, side: int = SIDE) -> Tensor:
    return to_uint8(Pictures(count).load(range(count), range(count), side, 0, False).image)


def left_half() -> Tensor:
    mask = torch.zeros(1, SIDE, SIDE, dtype=torch.bool)
    mask[:, :, : SIDE // 2] = True
    return mask


@pytest.mark.parametrize("name", SAMPLERS)
def test_strength_0_is_the_autoencoders_reconstruction(family: LatentDiffusionFamily, name: str) -> None:
    image = pictures()
    x0 = encoded(family.codec, image)
    with torch.no_grad():
        expected = to_uint8(family.codec.decode(x0.expand(family.defaults["chunk"], -1, -1, -1)))[:1]
    drawn = family.sample(["a ring"], [3], Wanted(sampler=name), edits=family.edits(image, strength=0))
    assert torch.equal(drawn, expected)
    near = to_uint8(family.reconstruct(image.permute(0, 3, 1, 2) / 127.5 - 1))
    assert (drawn.int() - near.int()).abs().max() <= 1


@pytest.mark.parametrize("name", SAMPLERS)
def test_strength_1_forgets_the_picture(family: LatentDiffusionFamily, name: str) -> None:
    edits = family.edits(pictures(), strength=1)
    assert torch.equal(
        family.sample(["a ring"], [3], Wanted(sampler=name), edits=edits), family.sample(["a ring"], [3], Wanted(sampler=name))
    )


def test_strength_is_the_share_of_steps(family: LatentDiffusionFamily) -> None:
    x0 = encoded(family.codec, pictures())
    for strength, taken in ((0.29, 29), (0.5, 50), (0.999, 99), (0.009, 0)):
        seen: list[tuple[int, int]] = []
        tell = partial(lambda seen, *told: seen.append(told), seen)
        family.sample(["a"], [0], Wanted(steps=100, guidance=1), edits=family.edits(pictures(), strength=strength), on_step=tell)
        assert seen == [(i + 1, taken) for i in range(taken)]
        assert len(shortened(Process().grid(100), strength).t) == taken
    assert x0.shape == (1, 4, 4, 4)


def test_more_strength_goes_further_from_the_picture(family: LatentDiffusionFamily) -> None:
    x0 = encoded(family.codec, pictures())
    settings = family.settings(Wanted(steps=20, sampler="ddim", guidance=1.0))
    gone = []
    for strength in (0.0, 0.25, 0.5, 0.75, 1.0):
        with torch.no_grad():
            x = family.engine().draw(["a ring"] * 4, range(4), settings, (SIDE, SIDE), edits=family.edits(pictures(), strength=strength))[1]
        gone.append(float((x - x0).square().mean()))
    assert gone[0] == 0 and gone == sorted(gone)


@pytest.mark.parametrize("strength", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("name", SAMPLERS)
def test_outside_the_mask_bytes_are_kept(family: LatentDiffusionFamily, name: str, strength: float) -> None:
    image, mask = pictures(), left_half()
    drawn = family.sample(CAPTIONS[:3], [1, 2, 3], Wanted(sampler=name), edits=family.edits(image, mask, strength))
    assert torch.equal(drawn[:, ~mask[0]], image.expand(3, -1, -1, -1)[:, ~mask[0]])
    assert not torch.equal(drawn[:, mask[0]], image.expand(3, -1, -1, -1)[:, mask[0]])


@pytest.mark.parametrize("name", SAMPLERS)
def test_blending_holds_known_latents_on_the_way_and_at_the_end(family: LatentDiffusionFamily, name: str) -> None:
    image, mask = pictures(), left_half()
    x0, seen = encoded(family.codec, image), []

    def look(x: Tensor, i: int, canvas: Canvas) -> Tensor:
        seen.append(i)
        assert torch.allclose(x[..., 2:], canvas.noised(x0, i)[..., 2:], atol=1e-6)
        assert not torch.allclose(x[..., :2], canvas.noised(x0, i)[..., :2], atol=1e-2)
        return x

    settings = family.settings(Wanted(sampler=name))
    with torch.no_grad():
        edits = (*family.edits(image, mask), Edit(after_step=look))
        x = family.engine().draw(["a ring"], [0], settings, (SIDE, SIDE), edits=edits)[1]
    assert seen and torch.allclose(x[..., 2:], x0[..., 2:], atol=1e-6)


def test_a_latent_pixel_is_free_if_any_of_its_pixels_is_new(family: LatentDiffusionFamily) -> None:
    mask = torch.zeros(1, SIDE, SIDE, dtype=torch.bool)
    mask[0, 13, 21] = True  # one pixel, of latent row 1 and column 2
    x0 = encoded(family.codec, pictures())
    with torch.no_grad():
        x = family.engine().draw(["a"], [0], family.settings(), (SIDE, SIDE), edits=family.edits(pictures(), mask))[1]
    changed = ~torch.isclose(x, x0, atol=1e-6).all(1)[0]
    assert changed.nonzero().tolist() == [[1, 2]]


class Listener(nn.Module):
    """A network that says nothing and remembers the pictures it was told."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        self.scale, self.told = nn.Parameter(torch.zeros(1)), []

    told_more, joins, exchanging = False, 0, None

    def remember(self, text: Any) -> None:
        return None

    def schedule(self, t: Tensor, cond: Cond) -> list[None]:
        return [None] * len(t)

    def forward(self, x: Tensor, t: Tensor, cond: Cond, memory: None = None, step: None = None) -> Tensor:
        self.told.append(cond.image)
        return x * self.scale


def test_an_inpainting_unet_is_told_the_mask_and_what_is_known(inpainter: LatentDiffusionFamily) -> None:
    unet, image, mask = inpainter.denoiser, pictures(), left_half()
    inpainter.denoiser = Listener(unet.config)
    try:
        inpainter.sample(["a"], [0], Wanted(guidance=3.0), edits=inpainter.edits(image, mask))
        inpainter.sample(["a"], [0], Wanted(guidance=1.0))
        inpainter.sample(["a"], [0], Wanted(guidance=1.0), edits=inpainter.edits(image, strength=0.5))
        found = inpainter.denoiser.told
        told, alone, whole = found[0], next(t for t in found if len(t) == 2), found[-1]
    finally:
        inpainter.denoiser = unet
    hidden = (image.permute(0, 3, 1, 2) / 127.5 - 1) * ~mask
    with torch.no_grad():
        known, grey = inpainter.codec.moments(hidden)[0], inpainter.codec.moments(torch.zeros(1, 3, SIDE, SIDE))[0]
    assert told.shape == (4, 5, 4, 4)  # with and without the prompt, twice for the chunk
    assert torch.equal(told[:, :1], mask[:, None, ::FACTOR, ::FACTOR].float().expand(4, -1, -1, -1))
    assert torch.allclose(told[:, 1:], known.expand(4, -1, -1, -1), atol=1e-6)
    for given in (alone, whole):  # without a mask all is new
        assert (given[:, 0] == 1).all() and torch.allclose(given[:, 1:], grey.expand(2, -1, -1, -1), atol=1e-6)


def test_an_inpainting_unet_keeps_bytes_too(inpainter: LatentDiffusionFamily) -> None:
    image, mask = pictures(), left_half()
    drawn = inpainter.sample(["a ring"], [0], edits=inpainter.edits(image, mask))
    assert torch.equal(drawn[0, ~mask[0]], image[0, ~mask[0]]) and not torch.equal(drawn[0, mask[0]], image[0, mask[0]])


@pytest.mark.parametrize("name", ["ddpm", "unipc", "dpmpp_2m_sde"])
def test_an_edited_picture_does_not_depend_on_its_neighbours(family: LatentDiffusionFamily, inpainter: Any, name: str) -> None:
    prompts, seeds, masks = list(CAPTIONS[:3]), [7, 5, 7], left_half().repeat(3, 1, 1)
    masks[1] = ~masks[1]
    for model in (family, inpainter):
        together = model.sample(prompts, seeds, Wanted(sampler=name), edits=model.edits(pictures(3), masks, 0.6))
        for i in range(3):
            edits = model.edits(pictures(3)[i : i + 1], masks[i : i + 1], 0.6)
            alone = model.sample(prompts[i : i + 1], seeds[i : i + 1], Wanted(sampler=name), edits=edits)
            assert torch.equal(together[i], alone[0])


def test_mistakes_are_named(family: LatentDiffusionFamily) -> None:
    for strength in (-0.1, 1.5, float("nan")):
        with pytest.raises(UserError, match=r"strength: got .*from 0"):
            family.edits(pictures(), strength=strength)
    with pytest.raises(UserError, match="init: its latents are 6x6, but 4x4 are drawn"):
        family.sample(["a"], [0], edits=family.edits(pictures(side=48), strength=0.5))


def test_guidance_by_a_judge_is_bayes_rule() -> None:
    """Data N(0,1), so E[x0|x] = alpha x; a judge of y = x0 + r noise: E[x0|x,y] has a closed form."""
    grid, r, y = Process().grid(10), 0.5, 1.7
    x = torch.randn(4, 3, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    canvas = Canvas(rows=(0, 1, 2, 3), grid=grid, noise=x, rng=None)  # type: ignore[arg-type]

    def judge(x: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = (v.view(-1, 1, 1, 1) for v in Process().alpha_sigma(t))
        return (-((y - alpha * x) ** 2) / (2 * (sigma**2 + r**2))).sum((1, 2, 3))

    guide = towards(judge).guide
    assert guide is not None
    for i in range(10):
        a, s = float(grid.alpha[i]), float(grid.sigma[i])
        with torch.no_grad():
            found = guide(lambda x, i, a=a: a * x, canvas)(x, i)
        assert torch.allclose(found, a * x + s**2 / (s**2 + r**2) * (y - a * x), rtol=1e-9)


def test_of_next_to_pure_noise_nothing_is_judged() -> None:
    """A cosine schedule begins at an alpha of 5e-5, where the smallest gradient would become a shift of thousands."""
    grid = Process(schedule=Cosine()).grid(20, "trailing")
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    canvas = Canvas(rows=(0,), grid=grid, noise=x, rng=None)  # type: ignore[arg-type]
    guide = towards(lambda x, t: 0.01 * x.sum((1, 2, 3))).guide
    assert guide is not None and 0 < float(grid.alpha[0]) < 1e-3
    with torch.no_grad():
        assert torch.equal(guide(lambda x, i: x, canvas)(x, 0), x)
        a, s = float(grid.alpha[1]), float(grid.sigma[1])
        torch.testing.assert_close(guide(lambda x, i: x, canvas)(x, 1), x + 0.01 * s**2 / a)


def test_a_judge_is_followed(family: LatentDiffusionFamily) -> None:
    wish = towards(lambda x, t: 0.5 * x.mean((1, 2, 3)), 8.0)
    settings = family.settings(Wanted(guidance=1.0))
    with torch.no_grad():
        plain, drawn = (family.engine().draw(["a"], [0], settings, (SIDE, SIDE), edits=e)[1].mean() for e in ((), (wish,)))
    assert drawn > plain


# Half types


def overflowing(kl_model: Path) -> LatentDiffusionFamily:
    """A model whose decoder holds numbers on the way that float16 has not, and ends in ordinary ones."""
    made = load(kl_model)
    with torch.no_grad():
        made.codec.network.decoder.conv_in.weight.mul_(1e6)
    return made


def test_a_decoder_that_overflows_is_run_again_in_float32(kl_model: Path) -> None:
    family, said = overflowing(kl_model), []
    drawn = family.sample(["a ring"], [0], Wanted(precision="fp16"), note=said.append)
    assert said == ["the decoder overflowed in fp16; it was run again in float32"]
    with torch.no_grad():
        x = family.engine(said.append).draw(["a ring"], [0], family.settings(Wanted(precision="fp16")), (SIDE, SIDE))[1]
        expected = to_uint8(family.codec.decode(x.expand(2, -1, -1, -1)))[:1]
    assert torch.equal(drawn, expected) and drawn.float().std() > 1
    with pytest.warns(UserWarning, match="decoder overflowed"):
        family.sample(["a ring"], [0], Wanted(precision="fp16"))
    said.clear()
    load(kl_model).sample(["a ring"], [0], Wanted(precision="fp16"), note=said.append)
    assert said == []


def test_only_the_picture_that_overflowed_is_decoded_again(kl_model: Path) -> None:
    family = load(kl_model)
    half = family.sample(CAPTIONS[:2], [0, 1], Wanted(precision="fp16"))
    decode, calls = family.codec.decode, []

    def decoding(z: Tensor) -> Tensor:
        image = decode(z)
        calls.append(image.dtype)
        return image.clone().index_fill_(0, torch.tensor([1]), float("inf")) if len(calls) == 1 else image

    family.codec.decode = decoding  # type: ignore[method-assign]
    drawn = family.sample(CAPTIONS[:2], [0, 1], Wanted(precision="fp16"), note=lambda text: None)
    assert calls == [torch.float16, torch.float32]
    assert torch.equal(drawn[0], half[0]) and (drawn[1].int() - half[1].int()).abs().max() <= 2


@pytest.mark.parametrize(("precision", "cure"), [("fp16", "choose bf16 or fp32"), ("fp32", "weights may be damaged")])
def test_a_network_that_overflows_is_told(kl_model: Path, precision: str, cure: str) -> None:
    family = load(kl_model)
    with torch.no_grad():
        family.denoiser.conv_out.bias.fill_(1e6 if precision == "fp16" else float("inf"))
    with pytest.raises(UserError, match=cure):
        family.sample(["a ring"], [0], Wanted(precision=precision))
