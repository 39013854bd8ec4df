"""Image GPT: a palette by k-means, a transformer of its colours without words, and how it completes pictures."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import pytest
import torch

from ldm.config.errors import UserError
from ldm.data.scenes.source import ScenesSource
from ldm.diffusion.rng import Rng
from ldm.families.draws import Wanted
from ldm.families.family import Context, Product
from ldm.families.palette import PaletteAutoencoder, found, pixels
from ldm.families.registry import open_finished
from ldm.families.tokens.configuration import TokenDefaults
from ldm.families.tokens.family import Tokens, TokensFamily
from ldm.models.token_transformer import TokenTransformerConfig
from tests.finished_model import STORY

SIDE, CODES = 16, 6
DATA = ScenesSource(tier="one", images=8, val=2, captions=1).build("train")


def context(**products: Product) -> Context:
    return Context(data=DATA, val=DATA, resolution=SIDE, seed=0, total_images=8, products=products)


@pytest.fixture(scope="module")
def palette(tmp_path_factory: pytest.TempPathFactory) -> Product:
    folder = tmp_path_factory.mktemp("palette")
    PaletteAutoencoder(codes=CODES).build(context()).save(folder)
    return Product(folder, "palette")


@pytest.fixture(scope="module")
def family(palette: Product) -> TokensFamily:
    torch.manual_seed(1)
    network = TokenTransformerConfig(width=16, layers=1, heads=2, size_channels=4)
    config = Tokens(reads="none", order="causal", network=network, label_smoothing=0.0, defaults=TokenDefaults(chunk=2))
    made = config.build(context(autoencoder=palette))
    for weight in made.network.parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=0.3)
    assert isinstance(made, TokensFamily)
    return made.eval()


def test_colours_are_the_means_of_their_pixels() -> None:
    """What k-means ends with (Lloyd 1982); and with no more colours than codes the picture itself."""
    rng = np.random.default_rng(0)
    centres = rng.uniform(-1, 1, (5, 3))
    values = (centres[rng.integers(0, 5, 4000)] + 0.01 * rng.standard_normal((4000, 3))).astype(np.float64)
    colours = found(values, 5, 3).double().numpy()
    nearest = np.linalg.norm(values[:, None] - colours, axis=2).argmin(1)
    for code in range(5):
        assert np.allclose(values[nearest == code].mean(0), colours[code], atol=1e-6)
    assert np.abs(values - colours[nearest]).max() < 0.1  # one colour for each cluster
    few = found(np.repeat(centres, 3, 0), 8, 0).double().numpy()
    assert np.allclose(few[:5], np.unique(centres, axis=0), atol=1e-6) and np.array_equal(few[5:], few[[0] * 3])


def test_the_code_of_a_pixel_is_its_nearest_colour(palette: Product) -> None:
    codec = PaletteAutoencoder(codes=CODES).encoder(palette.folder, torch.device("cpu"))
    image = DATA.load([0, 1], [0, 1], SIDE, 0, False).image
    codes, colours = codec.encode_codes(image), codec.network.codebook  # type: ignore[union-attr]
    assert codec.codes == CODES and codec.factor == 1 and codes.shape == (2, SIDE, SIDE)
    away = (image.permute(0, 2, 3, 1)[..., None, :] - colours).square().sum(-1)  # (2,H,W,K)
    assert torch.equal(codes, away.argmin(-1))
    assert torch.equal(codec.decode_codes(codes), colours[codes].permute(0, 3, 1, 2))
    assert torch.allclose(codec.reconstruct(image), codec.decode_codes(codes), atol=1e-6)


def test_the_colours_are_of_the_pictures_that_the_stage_sees_and_do_not_learn() -> None:
    assert pixels(DATA, 3, SIDE, 0).shape == (3 * SIDE**2, 3)
    family = PaletteAutoencoder(codes=CODES).build(context())
    assert {id(one) for one in family.idle()} == {id(one) for one in family.parameters()}
    batch = DATA.load(range(8), range(8), SIDE, 0, False)
    family.requires_grad_(False)
    error = float(family.loss(batch, Rng(0, range(8)))[0]["palette"])
    assert error == pytest.approx(float((family.network.decode(batch.image) - batch.image).square().mean()), rel=1e-4)
    fewer = PaletteAutoencoder(codes=CODES - 3).build(context()).requires_grad_(False)
    assert error < float(fewer.loss(batch, Rng(0, range(8)))[0]["palette"])


def test_it_completes_the_lower_half_and_keeps_the_upper(family: TokensFamily) -> None:
    image = ((DATA.load([0, 1], [0, 1], SIDE, 0, False).image.permute(0, 2, 3, 1) + 1) * 127.5).byte()
    mask = torch.zeros(1, SIDE, SIDE, dtype=torch.bool)
    mask[:, 8:] = True
    made = family.sample(["", ""], [0, 1], edits=family.edits(image, mask))
    assert torch.equal(made[:, :8], image[:, :8]) and not torch.equal(made[:, 8:], image[:, 8:])
    assert torch.equal(family.sample([""], [1], edits=family.edits(image[1:], mask))[0], made[1])  # whatever stands beside it
    first, other = (family.sample([""], [7], edits=family.edits(image[i : i + 1], mask))[0, 8:] for i in (0, 1))
    assert not torch.equal(first, other)  # the upper half is told


def test_it_reads_no_words(family: TokensFamily, palette: Product) -> None:
    assert not family.reads_prompts and family.config.inputs() == {"autoencoder": "autoencoder"} and family.settings().guidance == 1
    assert torch.equal(family.sample(["a red circle"], [3]), family.sample([""], [3]))
    with pytest.raises(UserError, match=r"guidance: got 3: this model of kind tokens reads no prompt that could guide"):
        family.settings(Wanted(guidance=3.0))
    with pytest.raises(UserError, match="order: what reads none writes one code after another, which is causal order"):
        Tokens(reads="none", order="masked")
    assert family.tokens(cast(Any, "")) is None and family.unknown("zebra") == []


def test_a_folder_draws_what_the_family_drew(family: TokensFamily, palette: Product, tmp_path: Any) -> None:
    family.save(tmp_path / "product")
    family.config.assemble({"autoencoder": palette, "model": Product(tmp_path / "product", "")}, tmp_path / "model", STORY)
    again = open_finished(tmp_path / "model")
    assert torch.equal(again.sample(["", ""], [1, 2]), family.sample(["", ""], [1, 2]))
    assert not (tmp_path / "model" / "tokenizer").exists()
