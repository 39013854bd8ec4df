"""Token models that are told the codes of a smaller picture (MUSE): what places are told, losses, chains, folders and refusals."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from ldm.config.errors import UserError
from ldm.config.schema import build
from ldm.data.scenes.source import ScenesSource
from ldm.diffusion.batch import ImageBatch, MomentBatch, rows
from ldm.diffusion.rng import Rng, mix
from ldm.families.autoencoder import VQ as VQModel
from ldm.families.autoencoder import measure
from ldm.families.chain import SEEDS, Chain
from ldm.families.clip import Clip
from ldm.families.draws import Wanted
from ldm.families.family import Context, Product
from ldm.families.registry import open_finished
from ldm.families.tokens.configuration import TokenDefaults
from ldm.families.tokens.family import Tokens, TokensFamily
from ldm.formats.latent_codec import save_codec
from ldm.models import cost
from ldm.models.autoencoder import VQConfig
from ldm.models.token_transformer import TokenShape, TokenTransformerConfig
from ldm.runs.run import Run
from ldm.text.encoder import SmallText, TextEncoder, small_clip_text, train_tokenizer
from ldm.training.settings import Train
from tests.finished_model import CAPTIONS, STORY, Pictures

SIDE = 32  # px, 8x8 codes, told those of 16 px, 2x2
PROMPTS = ["a small red circle", "a large blue ring", "a small green square"]
CPU = torch.device("cpu")
TEXT = SmallText(width=16, layers=2, heads=2, max_tokens=16)
SMALL = VQConfig(channels=(4, 4, 4, 8), layers=1, norm_groups=4, latent_channels=4, codes=16, middle_attention=False)  # f8
FINE = VQConfig(channels=(4, 4, 8), layers=1, norm_groups=4, latent_channels=3, codes=24, middle_attention=False)  # f4
NETWORK = TokenTransformerConfig(width=16, layers=1, heads=2, size_channels=4, res_blocks=2)
DEFAULTS = TokenDefaults(steps=4, guidance=3.0, chunk=2)
FIRST = Tokens(network=NETWORK, defaults=DEFAULTS, autoencoder="small")
LARGER = Tokens(network=NETWORK, defaults=DEFAULTS, autoencoder="fine", small="small", after="tokens", enlarges=2)


@pytest.fixture(scope="module")
def products(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Product]:
    """A text encoder and two autoencoders with random weights."""
    root = tmp_path_factory.mktemp("products")
    torch.manual_seed(0)
    tokenizer = train_tokenizer(CAPTIONS, 600, TEXT.max_tokens)
    TextEncoder(small_clip_text(TEXT, tokenizer), tokenizer).save(root / "text")
    for name, config in (("small", SMALL), ("autoencoder", FINE)):
        network = config.build().eval()
        torch.nn.init.normal_(network.codebook)
        torch.nn.init.normal_(network.quant_conv.weight, std=2.0)
        save_codec(root / name / "vqvae", network, measure(network, cast(Any, Pictures()), SIDE, 0, CPU, images=8))
    return {name: Product(root / name, name) for name in ("text", "autoencoder", "small")}


def built(config: Tokens, products: dict[str, Product], side: int = SIDE, init: Product | None = None) -> TokensFamily:
    torch.manual_seed(1)
    data = cast(Any, Pictures())
    made = config.build(Context(data=data, val=data, resolution=side, seed=0, total_images=8, products=products, init=init))
    assert isinstance(made, TokensFamily)
    for name, weight in made.network.named_parameters():
        if weight.dim() > 1 and init is None:  # far from the start, where all places are nearly equally sure
            torch.nn.init.normal_(weight, std=0.5 if "conv2" in name else 0.3)
    return made


@pytest.fixture(scope="module")
def family(products: dict[str, Product]) -> TokensFamily:
    return built(LARGER, products)


@pytest.fixture(scope="module")
def folder(family: TokensFamily, products: dict[str, Product], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A chain: 16 px by one model, 32 px by another."""
    root, first = tmp_path_factory.mktemp("chain"), {**products, "autoencoder": products["small"]}
    built(FIRST, first, 16).save(root / "first")
    family.save(root / "product")
    before = {"after": Product(root / "first", "", FIRST)} | {f"after.{role}": first[role] for role in ("text", "autoencoder")}
    LARGER.assemble({**products, **before, "model": Product(root / "product", "")}, root / "model", STORY)
    return root / "model"


def batch() -> ImageBatch:
    data = ScenesSource(tier="one", images=4, val=1).build("train").with_views(LARGER.views())
    return cast(ImageBatch, data.load(range(4), range(4), SIDE, 0, False).to("cpu"))


def test_a_place_is_told_of_the_code_below_it_and_where_it_lies_over_that() -> None:
    shape = TokenShape.of(NETWORK, codes=24, vocabulary=25, context=16, pooled=16, positions=0, small=(16, 2))
    torch.manual_seed(0)
    network = shape.build().small
    codes = torch.randint(16, (3, 2, 4))
    told = network(codes).view(3, 4, 8, 16)
    for y in range(4):
        for x in range(8):
            below = network.layer_norm(network.embeddings(codes[:, y // 2, x // 2]))
            corner = 2 * (y % 2) + x % 2
            weight = network.conv.weight[16 * corner : 16 * corner + 16, :, 0, 0]
            assert torch.allclose(told[:, y, x], below @ weight.T, atol=1e-6)


def test_codes_begin_as_alike_as_their_vectors(products: dict[str, Product]) -> None:
    data = cast(Any, Pictures())
    network = LARGER.build(Context(data=data, val=data, resolution=SIDE, seed=0, total_images=8, products=products)).network
    vectors = torch.nn.functional.one_hot(torch.arange(16)).float()
    vectors[1] = vectors[0]
    network.know(torch.randn(24, 3), vectors)
    assert torch.equal(network.small.embeddings.weight[0], network.small.embeddings.weight[1])
    assert not torch.allclose(network.small.embeddings.weight[0], network.small.embeddings.weight[2])
    assert network.small.embeddings.weight in network.tables()


def test_it_learns_of_the_smaller_pictures_codes(family: TokensFamily) -> None:
    """The same loss of a cache with views as of pictures, and another one where the smaller picture is another."""
    whole, codes = batch(), family.codes_of(batch())
    kept = MomentBatch(mean=codes, std=None, caption=whole.caption, size=whole.size, position=whole.position, views=whole.views)
    turned = replace(whole, views={name: cast(Tensor, view).flip(0) for name, view in (whole.views or {}).items()})
    with torch.no_grad():
        one, other = (float(family.loss(each, Rng(0, range(4)))[0]["codes"]) for each in (whole, turned))
        halves = [float(family.loss(rows(kept, i, i + 2), Rng(0, range(i, i + 2)))[0]["codes"]) for i in (0, 2)]
    assert one == pytest.approx(sum(halves) / 2, rel=1e-5) and one != pytest.approx(other, rel=1e-4)
    small = family._small_codes(2 * cast(Tensor, (whole.views or {})["small:2"]) - 1)
    assert small.shape == (4, 2, 2) and int(small.max()) < 16 and codes.shape == (4, 8, 8)


def test_no_picture_depends_on_its_neighbours(family: TokensFamily) -> None:
    small = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    whole = family.sample(PROMPTS, [3, 4, 5], edits=family.tell({"small:2": small}, {}, (SIDE, SIDE)))
    one = family.tell({"small:2": small[1:2]}, {}, (SIDE, SIDE))
    assert torch.equal(family.sample(PROMPTS[1:2], [4], edits=one)[0], whole[1])
    assert not torch.equal(family.sample(PROMPTS[:1], [3], edits=one)[0], whole[0])  # another picture
    assert not torch.equal(family.sample(PROMPTS[:1], [4], edits=one)[0], whole[1])  # another prompt
    for edits, said in (
        ((), r"given: this model of kind tokens makes a smaller picture larger; give one by --given small:2=FILE"),
        (
            family.tell({"small:2": small[:, :, :8]}, {}, (SIDE, SIDE)),
            "given: small:2 has 16x8 px: this model of kind tokens draws 32x32 of 16x16",
        ),
    ):
        with pytest.raises(UserError, match=said):
            family.sample(PROMPTS[:1], [3], edits=edits)
    with pytest.raises(UserError, match="given: edges: this model of kind tokens reads small:2"):
        family.tell({"edges": torch.zeros(1, 1, 16, 16)}, {}, (SIDE, SIDE))


def test_two_models_are_a_chain(folder: Path, family: TokensFamily) -> None:
    chain = open_finished(folder)
    assert isinstance(chain, Chain) and chain.defaults["size"] == (SIDE, SIDE)
    first = chain.sample(PROMPTS, [3, 4, 5], Wanted(stop_after=1))
    assert first.shape == (3, 16, 16, 3)
    whole = chain.sample(PROMPTS, [3, 4, 5], Wanted(link_steps="3"))
    told = family.tell({"small:2": first.permute(0, 3, 1, 2).float() / 255}, {}, (SIDE, SIDE))
    seeds = [mix(seed, "link", 1) % SEEDS for seed in (3, 4, 5)]
    assert torch.equal(family.sample(PROMPTS, seeds, Wanted(steps=3), edits=told), whole)
    assert torch.equal(chain.sample(PROMPTS[1:2], [4], Wanted(link_steps="3"))[0], whole[1])


def test_what_was_learned_is_continued_with_the_same_codes_alone(
    family: TokensFamily, products: dict[str, Product], tmp_path: Path
) -> None:
    family.save(tmp_path / "product")
    again = built(LARGER, products, init=Product(tmp_path / "product", ""))
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), family.state_dict().values(), strict=True))
    with pytest.raises(UserError, match="trained on the codes of another autoencoder"):
        built(LARGER, {**products, "small": products["autoencoder"]}, init=Product(tmp_path / "product", ""))


def test_the_plan_counts_its_networks(family: TokensFamily) -> None:
    others = {"text": Clip(text=TEXT, vocabulary=600), "autoencoder": VQModel(network=FINE), "small": VQModel(network=SMALL)}
    stage = cast(Any, Train(model="larger", images=8, resolution=SIDE, latents="codes"))
    found = LARGER.footprint(stage, SIDE, others, print)
    assert found.learned == {"transformer": cost.count(family.network)} and found.frozen["small autoencoder"] > 0
    plain_one = replace(LARGER, enlarges=0, small="", after="").footprint(
        stage, SIDE, {n: o for n, o in others.items() if n != "small"}, print
    )
    assert found.extra > plain_one.extra and found.cost.forward > plain_one.cost.forward
    assert LARGER.step_px(others) == 16 and LARGER.inputs()["small"] == "small" and "after" in LARGER.assembled_from()
    assert LARGER.identity()["enlarges"] == 2 and not {"enlarges", "small", "after"} & Tokens().identity().keys()


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"enlarges": 1}, "enlarges: got 1, which is no larger"),
        ({"enlarges": 2, "order": "causal"}, "order: got causal; what is told smaller codes .* set order: masked"),
        ({"after": "tokens"}, "after: got tokens, whose picture is not read; set enlarges"),
        ({"small": "vq"}, "small: got vq, whose picture is not read; set enlarges"),
    ],
)
def test_what_cannot_be_is_refused(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        Tokens(**fields)


def test_places_that_lie_over_parts_of_codes_are_refused_before_any_work() -> None:
    coarse = {"kind": "vq", "network": {"channels": [8, 8, 8, 8, 8], "norm_groups": 4}}  # f16
    fine = {"kind": "vq", "network": {"channels": [8, 8, 8], "norm_groups": 4}}  # f4
    larger = {"kind": "tokens", "autoencoder": "coarse", "small": "fine", "enlarges": 2}
    models = {"text": {"kind": "clip"}, "coarse": coarse, "fine": fine, "larger": larger}
    made = {name: {"kind": "train", "model": name, "images": 8, "resolution": 64} for name in models}
    with pytest.raises(UserError, match="enlarges: got 2; a code of the smaller picture stands for 8 px, one that is drawn for 16"):
        build({"data": {"kind": "scenes"}, "models": models, "stages": made}, Run, "run.yaml")
