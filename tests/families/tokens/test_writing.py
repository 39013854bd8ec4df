"""Token models that write captions and scenes: loss, writing, likelihood, model folders, and what is refused."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, cast

import numpy as np
import pytest
import torch

from ldm.config.errors import UserError
from ldm.data.scenes import marks
from ldm.data.scenes.source import ScenesSource, prompts
from ldm.diffusion.rng import Rng
from ldm.families.autoencoder import measure
from ldm.families.draws import Wanted
from ldm.families.family import Context, Product
from ldm.families.registry import open_finished
from ldm.families.tokens.configuration import TokenDefaults
from ldm.families.tokens.family import Tokens
from ldm.families.tokens.writing import WritingFamily
from ldm.formats.latent_codec import save_codec
from ldm.models.autoencoder import VQConfig
from ldm.models.image_tower import ImageTowerConfig
from ldm.models.token_transformer import Past, TokenTransformerConfig
from ldm.text.encoder import SmallText, TextEncoder, small_clip_text, train_tokenizer
from ldm.text.own_clip import OwnClip
from tests.finished_model import STORY, Pictures

SIDE = 32
VQ = VQConfig(channels=(4, 4, 4, 8), layers=1, norm_groups=4, latent_channels=4, codes=16, middle_attention=False)
SCENES = ScenesSource(tier="T1", images=16, val=4, captions=1)
KINDS = [("image", "caption"), ("codes", "caption"), ("none", "caption"), ("text", "scene"), ("words", "scene")]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def products(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Product]:
    """A CLIP and an autoencoder with random weights."""
    root = tmp_path_factory.mktemp("products")
    torch.manual_seed(0)
    data = SCENES.build("train")
    text = SmallText(width=16, layers=2, heads=2, max_tokens=28)
    tokenizer = train_tokenizer(data.captions(range(16), range(16), 0), 640, text.max_tokens)
    encoder = TextEncoder(small_clip_text(text, tokenizer), tokenizer)
    encoder.save(root / "text")
    tower = ImageTowerConfig(channels=(8, 8, 8), embedding=8).build()
    OwnClip(encoder, torch.nn.Linear(16, 8, bias=False), tower, torch.tensor(2.0), SIDE).save(root / "text" / "clip")
    network = VQ.build().eval()
    torch.nn.init.normal_(network.codebook)
    torch.nn.init.normal_(network.quant_conv.weight, std=2.0)
    save_codec(root / "autoencoder" / "vqvae", network, measure(network, cast(Any, Pictures()), SIDE, 0, CPU, images=8))
    return {name: Product(root / name, name) for name in ("text", "autoencoder")}


def built(reads: str, writes: str, products: dict[str, Product]) -> WritingFamily:
    torch.manual_seed(1)
    network = TokenTransformerConfig(width=16, layers=2, heads=2, size_channels=4)
    defaults = TokenDefaults(guidance=1.0, temperature=0.0, chunk=3)
    config = Tokens(
        reads=cast(Any, reads),
        writes=cast(Any, writes),
        order="causal",
        network=network,
        label_smoothing=0.0,
        caption_dropout=0.0,
        defaults=defaults,
    )
    data, own = cast(Any, Pictures()), {role: products[role] for role in config.inputs()}
    family = config.build(Context(data=data, val=data, resolution=SIDE, seed=0, total_images=8, products=own))
    for name, weight in family.network.named_parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=0.5 if "conv2" in name else 0.3)
    assert isinstance(family, WritingFamily)
    family.config = config  # type: ignore[assignment]
    return family.eval()


@pytest.fixture(scope="module", params=KINDS, ids="-".join)
def family(request: pytest.FixtureRequest, products: dict[str, Product]) -> WritingFamily:
    return built(*request.param, products)


def batch(count: int = 4) -> Any:
    data = SCENES.build("train").with_views(("marks",))
    return data.load(range(count), range(count), SIDE, 0, False)


def write(family: WritingFamily, many: int = 4) -> list[Any]:
    """What it writes of the first scenes."""
    if family.said.writes == "scene":
        return [row.tolist() for row in family.marks_of(batch(4).caption[:many], list(range(many)))]
    image = None if family.said.reads == "none" else batch(4).image[:many]
    return family.captions(image, list(range(many)), Wanted(temperature=1.0))


@torch.no_grad()
def test_the_loss_is_what_each_token_costs_when_they_are_read_one_by_one(family):
    """The oracle goes through the key-value cache, token after token, and knows nothing of a batch's padding."""
    whole = batch()
    written, counts = family._written(whole)
    before, seen = family._before(list(whole.caption), whole), family._seen(list(whole.caption), whole)
    total = 0.0
    for row in range(4):
        own = None if seen is None else (seen[0][row : row + 1], None if seen[1] is None else seen[1][row : row + 1])
        told, past, latest = family._told(own, 1), Past(), before[row : row + 1]
        for token, counted in zip(written[row], counts[row], strict=True):
            logits = family.network.sequence(latest, told, past)[0, -1, family.first : family.first + family.kinds]
            total += float(-logits.log_softmax(0)[token]) * float(counted)
            latest = (token + family.first).view(1, 1)
    terms, gauges = family.loss(whole, Rng(0, range(4)))
    assert float(terms["tokens"]) == pytest.approx(total / 4 / family.length, rel=1e-4)
    assert float(gauges["bits"]) == pytest.approx(total / 4 / math.log(2), rel=1e-4)


def test_nothing_depends_on_its_neighbours_and_a_folder_writes_the_same(family, products, tmp_path):
    whole = write(family)
    assert write(family, 1) == whole[:1] and write(family, 2) == whole[:2] and len(set(map(str, whole))) > 1
    family.save(tmp_path / "product")
    own = {role: products[role] for role in family.config.inputs()}
    family.config.assemble({**own, "model": Product(tmp_path / "product", "")}, tmp_path / "model", STORY)
    again = cast(WritingFamily, open_finished(tmp_path / "model"))
    assert write(again) == whole and again.content_hash
    other = [family.marks_of, family.bits, family.captions]
    for call in other if family.said.writes == "scene" else other[:1]:
        if call != family.marks_of:
            with pytest.raises(UserError, match="this model of kind tokens"):
                call(["a"]) if call == family.bits else call(None, [0])  # type: ignore[operator]
        elif family.said.writes == "caption":
            with pytest.raises(UserError, match="sample: this model of kind tokens writes captions; "):
                family.sample(["a"], [0])


def test_written_scenes_are_scenes_and_are_drawn(products):
    family = built("words", "scene", products)
    texts = prompts("T1", 4).text
    found = family.marks_of(texts, range(4), Wanted(temperature=1.0))
    assert all(marks.allowed(place)[found[:, place]].all() for place in range(4))  # background, relation, and a first shape
    drawn = family.sample(texts, range(4), Wanted(temperature=1.0), size=(48, 48))
    assert drawn.shape == (4, 48, 48, 3) and np.array_equal(
        family.sample(texts[2:3], [2], Wanted(temperature=1.0), size=(48, 48))[0], drawn[2]
    )
    with pytest.raises(UserError, match="size: got 48x32; scenes are drawn as squares"):
        family.sample(texts, range(4), size=(32, 48))
    with pytest.raises(UserError, match="steps: got 3"):
        family.settings(Wanted(steps=3))


@torch.no_grad()
def test_bits_are_those_of_a_distribution(products):
    """Of all sequences that begin alike, the chances of what may come next add up to one; and a caption's bits are its surprisal."""
    family = built("none", "caption", products)
    captions = list(batch().caption)
    ids, counts = family.text.tokens(captions)
    told, found = family._told(None, 4), []
    logits = family.network.sequence(torch.cat([family._before(captions, None), ids[:, :-1] + 1], 1), told)[..., 1:]
    chances = logits.double().softmax(-1)
    assert torch.allclose(chances.sum(-1), torch.ones(()).double())
    for row in range(4):
        chosen = chances[row, torch.arange(ids.shape[1]), ids[row]]
        found.append(float(-(chosen[counts[row]].log2().sum())))
    assert family.bits(captions) == pytest.approx(found, rel=1e-4)
    assert family.bits(captions[2:3]) == [family.bits(captions)[2]]


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"writes": "caption", "order": "causal"}, "reads: got text; what writes caption reads image or codes or none"),
        ({"reads": "image"}, "reads: got image; what writes codes reads text or words"),
        ({"writes": "scene", "reads": "none", "order": "causal"}, "what writes scene reads text or words"),
        ({"writes": "scene"}, "order: a scene is written one token after another, which is causal order"),
        ({"reads": "words"}, "order: what reads words writes one code after another, which is causal order"),
    ],
)
def test_what_cannot_be_is_refused_in_a_line(fields, said):
    with pytest.raises(UserError, match=said):
        Tokens(**fields)


@pytest.mark.slow
def test_a_plan_counts_what_is_built(products):
    """The counted shape of each kind is that of the network which `build` makes, whatever is read and written."""
    from ldm.families.autoencoder import VQ as VQAutoencoder
    from ldm.families.clip import Clip

    text = SmallText(width=16, layers=2, heads=2, max_tokens=28)
    others = {
        "text": Clip(text=text, vocabulary=640, tower=ImageTowerConfig(channels=(8, 8, 8), embedding=8)),
        "autoencoder": VQAutoencoder(network=VQ),
    }
    for reads, writes in KINDS:
        family = built(reads, writes, products)
        own = {role: others[role] for role in family.config.inputs()}
        counted = family.config.counted_shape(own, lambda said: None, SIDE)
        spoken = family.text is not None and len(family.text.tokenizer) != 640  # a tokenizer may find fewer words than it may have
        assert spoken or counted == family.network.shape
        stage = cast(Any, type("Stage", (), {"latents": "", "also": ()})())
        print_of = family.config.footprint(stage, SIDE, own, lambda said: None)
        assert print_of.cost.forward > 0 and sum(print_of.learned.values()) == sum(
            weight.numel() for weight in replace(counted).build().parameters()
        )


def test_a_model_without_an_image_tower_is_refused():
    from ldm.config.schema import build
    from ldm.runs.run import Run

    values = {
        "data": {"kind": "scenes", "tier": "T0"},
        "models": {"text": {"kind": "kl"}, "writer": {"kind": "tokens", "reads": "image", "writes": "caption", "order": "causal"}},
        "stages": {"writer": {"kind": "train", "model": "writer", "resolution": 32, "images": 8, "latents": "a/cache"}},
    }
    with pytest.raises(UserError) as told:
        build(values, Run, "run.yaml")
    assert "models.writer.text: got text, a model of kind kl, which has no image tower; use kind clip" in str(told.value)
    assert "stages.writer.latents: what reads image and writes caption knows no codes; leave it out" in str(told.value)
