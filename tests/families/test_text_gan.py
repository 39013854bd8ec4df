"""Text-to-image GANs: gradients of the textbook's separate losses, drawing, prompt mixing, truncation, and a folder that opens again."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from ldm.config.errors import UserError
from ldm.config.schema import plain
from ldm.data.scenes.source import ScenesSource
from ldm.diffusion.batch import MomentBatch, Text
from ldm.diffusion.rng import Rng, mix
from ldm.families.autoencoder import KL as KLModel
from ldm.families.autoencoder import measure
from ldm.families.chain import SEEDS, Chain
from ldm.families.clip import Clip
from ldm.families.draws import Wanted
from ldm.families.family import Context, Product
from ldm.families.one_pass import with_sentence
from ldm.families.pixels import PixelAutoencoder
from ldm.families.registry import load, open_finished
from ldm.families.text_gan import SHARPNESS, TextGAN, TextGANDefaults, TextGANFamily, Tower, evenly, others
from ldm.formats.latent_codec import save_codec
from ldm.models import cost
from ldm.models.damsm import DamsmConfig, word_scores
from ldm.models.image_tower import ImageTowerConfig
from ldm.models.style_generator import StyleGeneratorConfig
from ldm.models.text_discriminator import TextDiscriminatorConfig
from ldm.text.encoder import SmallText, TextEncoder, small_clip_text, train_tokenizer
from ldm.text.prompt_syntax import read
from ldm.training.settings import Train
from tests.finished_model import CAPTIONS, KL, STORY, Pictures

SIDE = 32  # 4x4 latents
PROMPTS = ["a small red circle", "a large blue ring", "a small green square"]
CPU = torch.device("cpu")
SMALL = StyleGeneratorConfig(channels=(8,), blocks=2, heads=2, noise=4, style=8)
JUDGE = TextDiscriminatorConfig(channels=(8,), blocks=1, embedding=8)
TEXT = SmallText(width=16, layers=2, heads=2, max_tokens=16)


@pytest.fixture(scope="module")
def products(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Product]:
    """A text encoder and an autoencoder with random weights."""
    root = tmp_path_factory.mktemp("products")
    torch.manual_seed(0)
    tokenizer = train_tokenizer(CAPTIONS, 600, TEXT.max_tokens)
    TextEncoder(small_clip_text(TEXT, tokenizer), tokenizer).save(root / "text")
    network = KL.build().eval()
    save_codec(root / "autoencoder" / "vae", network, measure(network, cast(Any, Pictures()), SIDE, 0, CPU, images=8))
    return {name: Product(root / name, name) for name in ("text", "autoencoder")}


def built(products: dict[str, Product], side: int = SIDE, init: Product | None = None, **fields: Any) -> TextGANFamily:
    torch.manual_seed(1)
    data = cast(Any, Pictures())
    config = TextGAN(**{"generator": SMALL, "discriminator": JUDGE, "defaults": TextGANDefaults(chunk=2), **fields})
    family = config.build(Context(data=data, val=data, resolution=side, seed=0, total_images=8, products=products, init=init))
    for name, weight in family.generator.named_parameters():
        if name.endswith("strength"):  # from the start on there is none
            torch.nn.init.normal_(weight)
    return family


@pytest.fixture(scope="module")
def family(products: dict[str, Product]) -> TextGANFamily:
    return built(products)


def gradients(family: TextGANFamily, loss: Tensor) -> dict[str, Tensor]:
    family.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in family.named_parameters() if p.grad is not None and p.grad.abs().max() > 1e-12}


def player(kind: str, real: Tensor, fake: Tensor) -> Tensor:
    """What the papers' generators descend."""
    if kind == "relativistic":
        return -torch.sigmoid(fake - real).log().mean()
    return {"hinge": -fake, "non_saturating": -torch.sigmoid(fake).log(), "least_squares": (fake - 1) ** 2}[kind].mean()


def judged(kind: str, real: Tensor, fake: Tensor) -> Tensor:
    """What their discriminators descend."""
    if kind == "relativistic":
        return -torch.sigmoid(real - fake).log().mean()
    if kind == "hinge":
        return 0.5 * ((1 - real).clamp_min(0).mean() + (1 + fake).clamp_min(0).mean())
    if kind == "non_saturating":
        return -0.5 * (torch.sigmoid(real).log().mean() + (1 - torch.sigmoid(fake)).log().mean())
    return 0.5 * (((real - 1) ** 2).mean() + (fake**2).mean())


def slope(judge: Any, picture: Tensor, sentence: Tensor) -> Tensor:
    """Half the squared slope of the discriminator at pictures, as R1 has it."""
    at = picture.detach().requires_grad_()
    (found,) = torch.autograd.grad(judge(at, sentence).sum(), at, create_graph=True)
    return 0.5 * (found**2).sum((1, 2, 3)).mean()


@pytest.mark.parametrize("kind", ["relativistic", "hinge", "non_saturating", "least_squares"])
def test_each_player_has_the_gradients_of_its_own_papers_losses(kind: Any, products: dict[str, Product]) -> None:
    fields = {"matching": 0.5, "interpolation": 0.7, "contrastive": 0.3, "r1": 2.0, "r2": 3.0, "slope_share": 0.5}
    fields |= {"diversity": 4.0, "diversity_bound": 0.07}
    family = built(products, loss=kind, **fields).double()
    made, judge, many = family.generator, family.discriminator, 4
    captions = ("a small red circle", "a small red circle", "a large blue ring", "a small green square")
    mean = torch.randn(many, 4, 4, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    text = with_sentence(family.text.encode(list(captions)))
    text = Text(tokens=text.tokens.double(), mask=text.mask, pooled=cast(Tensor, text.pooled).double())
    batch = MomentBatch(mean=mean, std=None, caption=captions, size=torch.zeros(many, 6), position=torch.arange(many), text=text)
    rng = Rng(0, batch.position)
    rng_noise = family.noise_of
    family.noise_of = lambda *args: rng_noise(*args).double()  # type: ignore[method-assign]
    mine = gradients(family, torch.stack(list(family(batch, rng)[0].values())).sum())

    noise, again, sentence, other = (
        rng_noise(rng).double(),
        rng_noise(rng, "text_gan/again").double(),
        cast(Tensor, text.pooled),
        [2, 2, 3, 0],
    )
    fake = made(noise, [text])
    real, unreal = judge(mean, sentence), judge(fake, sentence)
    half = Text(tokens=(text.tokens + text.tokens[other]) / 2, mask=text.mask, pooled=(sentence + sentence[other]) / 2)
    between = judge(made(noise, [half]), cast(Tensor, half.pooled))
    equal = torch.tensor([[True, True, False, False], [True, True, False, False], [False] * 4, [False] * 4])

    def contrast(pictures: Tensor) -> Tensor:
        cosine = F.cosine_similarity(judge.picture_side(pictures)[:, None], judge.text_side(sentence)[None], dim=2)
        logits = (SHARPNESS * cosine).masked_fill(equal & ~torch.eye(4, dtype=torch.bool), -torch.inf)
        return -0.5 * (logits.log_softmax(1).diagonal().mean() + logits.log_softmax(0).diagonal().mean())

    drawing = player(kind, real.detach(), unreal) + 0.3 * contrast(judge.features(fake)) + 0.7 * player(kind, real.detach(), between)
    apart = (fake - made(again, [text])).abs().mean((1, 2, 3)) / (noise - again).abs().mean(1)
    assert (apart > 0.07).any() and (apart < 0.07).any()
    drawing = drawing + 4 * (0.07 - torch.minimum(apart, torch.tensor(0.07))).mean()  # DSGAN (arXiv 1901.09024), eq. 2, from its bound on
    kept = fake.detach()
    judging = judged(kind, real, judge(kept, sentence)) + 0.5 * judged(kind, real, judge(mean, sentence[other]))
    judging = judging + 0.3 * contrast(judge.features(mean))
    judging = judging + 2 * slope(judge, mean[1::2], sentence[1::2]) + 3 * slope(judge, kept[1::2], sentence[1::2])
    for word, loss in (("generator", drawing), ("discriminator", judging)):
        theirs = {name: value for name, value in gradients(family, loss).items() if name.startswith(word)}
        own = {name: value for name, value in mine.items() if name.startswith(word)}
        assert own.keys() == theirs.keys() and own
        assert all(torch.allclose(own[name], value, rtol=1e-6, atol=1e-10) for name, value in theirs.items())


def test_other_words_are_those_of_the_next_other_caption() -> None:
    assert others(["a", "a", "b", "c"]) == [2, 2, 3, 0] and others(["a", "a"]) == [0, 1]
    assert evenly(8, 0.25) == [3, 7] and evenly(4, 0.5) == [1, 3] and evenly(3, 0.1) == [0] and evenly(2, 1.0) == [0, 1]


def test_terms_can_be_left_out(products: dict[str, Product]) -> None:
    batch = Pictures().load([0, 1, 2, 3], [0, 1, 2, 3], SIDE, 0, False)
    bare = built(products, matching=0, contrastive=0, r1=0, r2=0)
    assert set(bare(batch, Rng(0, range(4)))[0]) == {"adversarial", "discriminator"}
    with pytest.raises(UserError, match=r"diversity_bound: diversity is 0, so there is nothing that it could act on; leave it out"):
        TextGAN(diversity_bound=0.2)
    assert "diversity" in TextGAN(diversity=1).identity() and not {"diversity", "diversity_bound"} & set(TextGAN().identity())
    spectral = built(products, discriminator=TextDiscriminatorConfig(channels=(8,), blocks=1, embedding=8, spectral=True))
    for _ in range(12):
        spectral(batch, Rng(0, range(4)))
    assert float(torch.linalg.matrix_norm(spectral.discriminator.joint.weight.detach(), 2)) == pytest.approx(1.0, rel=0.05)


@pytest.fixture(scope="module")
def seeing(products: dict[str, Product], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Product]:
    """The same autoencoder with a whole CLIP, whose image tower has learned at 16 px."""
    root, data = tmp_path_factory.mktemp("clip"), cast(Any, Pictures())
    torch.manual_seed(0)
    clip = Clip(text=TEXT, tower=ImageTowerConfig(channels=(4, 8), embedding=12, grid=2), vocabulary=600)
    clip.build(Context(data=data, val=data, resolution=16, seed=0, total_images=1)).save(root)
    return {**products, "text": Product(root, "clip")}


def test_words_and_places_are_matched_as_attngan_has_it(seeing: dict[str, Product], tmp_path: Path) -> None:
    """Maps of damsm learn from true pictures alone, the generator from what they say of its own; losses are those of eq. 11 to 13."""
    bare = {"matching": 0, "contrastive": 0, "r1": 0, "r2": 0, "loss": "hinge"}
    family = built(seeing, damsm=0.5, matcher=DamsmConfig(embedding=6, grid=2), **bare).double()
    captions = ("a small red circle", "a small red circle", "a large blue ring")
    mean = torch.randn(3, 4, 4, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    text = family.text.encode(list(captions))
    text = Text(tokens=text.tokens.double(), mask=text.mask, pooled=cast(Tensor, text.pooled).double())
    batch = MomentBatch(mean=mean, std=None, caption=captions, size=torch.zeros(3, 6), position=torch.arange(3), text=text)
    rng, own = Rng(0, batch.position), family.noise_of
    for module in family.frozen():
        module.double()
    family.noise_of = lambda rng: own(rng).double()  # type: ignore[method-assign]
    terms, gauges = family(batch, rng)
    mine = gradients(family, torch.stack(list(terms.values())).sum())

    tower = family.frozen()[2]
    assert isinstance(tower, Tower) and tower.resolution == 16
    right = torch.tensor([[1, 0, 1], [0, 1, 1], [1, 1, 1]], dtype=torch.bool)  # equal captions are no wrong ones

    def damsm(latents: Tensor) -> Tensor:
        seen = F.interpolate(family.codec.decode(latents), (16, 16), mode="bicubic", antialias=True)
        places, pictures = family.damsm.pictures(tower.network.seen(seen))
        words, sentences = family.damsm.captions(text.tokens, cast(Tensor, text.pooled))
        found = 0.0
        for score in (word_scores(places, words, text.mask), pictures @ sentences.T):
            odds = (10 * score).exp() * right  # eq. 11
            found = found - (odds.diagonal() / odds.sum(1)).log().mean() - (odds.diagonal() / odds.sum(0)).log().mean()  # eq. 12, 13
        return cast(Tensor, found)

    fake, sentence = family.generator(own(rng).double(), [text]), cast(Tensor, text.pooled)
    assert torch.allclose(terms["damsm"], 0.5 * damsm(mean)) and torch.allclose(gauges["damsm_made"], damsm(fake))
    lessons = {
        "generator": player("hinge", mean, family.discriminator(fake, sentence)) + 0.5 * damsm(fake),
        "discriminator": judged("hinge", family.discriminator(mean, sentence), family.discriminator(fake.detach(), sentence)),
        "damsm": 0.5 * damsm(mean),
    }
    for word, loss in lessons.items():
        theirs = {name: value for name, value in gradients(family, loss).items() if name.startswith(word)}
        found = {name: value for name, value in mine.items() if name.startswith(word)}
        assert found.keys() == theirs.keys() and found
        assert all(torch.allclose(found[name], value, rtol=1e-6, atol=1e-10) for name, value in theirs.items())
    assert [group.name for group in family.parameter_groups()] == ["generator", "discriminator", "damsm"]


def test_what_matches_words_is_kept_and_counted(seeing: dict[str, Product], products: dict[str, Product], tmp_path: Path) -> None:
    family = built(seeing, damsm=1.0)
    found = open_finished(folder_of(family, seeing, tmp_path))
    assert torch.equal(found.sample(PROMPTS, [3, 4, 5]), family.sample(PROMPTS, [3, 4, 5]))
    again = built(seeing, damsm=1.0, init=Product(tmp_path / "product", ""))
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), family.state_dict().values(), strict=True))
    tower = ImageTowerConfig(channels=(4, 8), embedding=12, grid=2)
    others = {"text": Clip(text=TEXT, vocabulary=600, tower=tower), "autoencoder": KLModel(network=KL)}
    stage = cast(Any, Train(model="gan", images=8, resolution=SIDE))
    plain_one, told = (config.footprint(stage, SIDE, others, print) for config in (replace(family.config, damsm=0.0), family.config))
    assert told.learned == {**plain_one.learned, "damsm": cost.count(family.damsm)} and told.passed
    assert told.cost.forward > plain_one.cost.forward and told.frozen["image tower"] > 0
    assert family.config.requires["text"] == "has_tower" and "matcher" in family.config.identity() and "matcher" not in TextGAN().identity()
    with pytest.raises(UserError, match="matcher: damsm is 0"):
        TextGAN(matcher=DamsmConfig(grid=2))
    with pytest.raises(UserError, match="has no clip/, no CLIP of its own run"):
        built(products, damsm=1.0)


def test_a_gaussian_around_the_sentence_stands_in_its_place(products: dict[str, Product]) -> None:
    config = StyleGeneratorConfig(channels=(8,), blocks=1, heads=2, noise=4, style=8, augmentation=6)
    family = built(products, generator=config, kl=2.0)
    batch = Pictures().load([0, 1], [0, 1], SIDE, 0, False)
    mean, logvar = family.generator.gaussian(cast(Tensor, family.text.encode(list(batch.caption)).pooled))
    unit = torch.distributions.Normal(torch.zeros_like(mean), torch.ones_like(mean))
    theirs = torch.distributions.kl_divergence(torch.distributions.Normal(mean, (0.5 * logvar).exp()), unit).sum(1).mean()
    assert torch.allclose(family(batch, Rng(0, range(2)))[0]["kl"], 2 * theirs, rtol=1e-4)
    assert not torch.equal(*family.sample(PROMPTS[:1] * 2, [0, 1]))
    with pytest.raises(UserError, match="kl: got 1, but generator"):
        TextGAN(kl=1.0)


def test_no_picture_depends_on_its_neighbours_and_noise_is_the_seeds(family: TextGANFamily) -> None:
    whole = family.sample(PROMPTS, [3, 4, 5])
    assert torch.equal(family.sample(PROMPTS[1:2], [4])[0], whole[1])
    assert torch.equal(family.sample(PROMPTS[::-1], [5, 4, 3]).flip(0), whole)
    assert not torch.equal(family.sample(PROMPTS[:1], [9])[0], whole[0])
    assert not torch.equal(family.sample(PROMPTS[1:2], [3])[0], whole[0])
    noise = family.noise([3, 4, 5], (SIDE, SIDE))
    assert noise.shape == (3, 4 + 2 * 16) and torch.equal(family.sample(PROMPTS, [0, 0, 0], latents=noise), whole)


def test_truncation_leads_to_one_picture_of_each_prompt(family: TextGANFamily) -> None:
    def drawn(share: float) -> Tensor:
        return family.sample([PROMPTS[0]] * 4, [0, 1, 2, 3], Wanted(truncation=share))

    assert (drawn(0.0) == drawn(0.0)[:1]).all() and torch.equal(drawn(1.0), family.sample([PROMPTS[0]] * 4, [0, 1, 2, 3]))

    def varies(share: float) -> float:
        return float(drawn(share).float().std(0).mean())

    assert 0 < varies(0.3) < varies(0.7) < varies(1.0)


def test_prompt_mixing_tells_the_first_blocks_one_text_and_the_others_another(family: TextGANFamily) -> None:
    a, b = PROMPTS[:2]
    mixed = family.sample([read(f"[{a}:{b}:0.5]")], [3])
    seen = []
    for block in family.generator.blocks:
        block.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[3][0]))
    assert torch.equal(family.sample([read(f"[{a}:{b}:0.5]")], [3]), mixed)
    told = [family.text.encode([one]).tokens[0] for one in (a, b)]
    assert torch.equal(seen[0], told[0]) and torch.equal(seen[1], told[1])
    for block in family.generator.blocks:
        block._forward_pre_hooks.clear()
    assert torch.equal(family.sample([read(f"[{a}:{a}:0.5]")], [3]), family.sample([a], [3]))
    assert not torch.equal(mixed, family.sample([a], [3])) and not torch.equal(mixed, family.sample([b], [3]))


def test_sentences_alone_are_told_where_that_is_asked(products: dict[str, Product]) -> None:
    said = built(products, generator=StyleGeneratorConfig(channels=(8,), blocks=2, heads=2, noise=4, style=8, tells="sentence"))
    assert all(block.attention is None for block in said.generator.blocks)
    text = with_sentence(said.text.encode(PROMPTS))
    words = Text(tokens=torch.zeros_like(text.tokens), mask=text.mask, pooled=text.pooled)
    noise = said.noise([0, 1, 2], (SIDE, SIDE))
    assert torch.equal(said.generator(noise, [text]), said.generator(noise, [words]))
    with pytest.raises(UserError, match="reads sentences, whose words have no weights"):
        said.sample([read("a (red:1.3) ring")])


def test_what_it_cannot_do_is_refused(family: TextGANFamily) -> None:
    for wanted, said in ((Wanted(steps=4), "steps: got 4"), (Wanted(guidance=3.0), "guidance: got 3.0"), (Wanted(top_k=3), "top_k: got 3")):
        with pytest.raises(UserError, match=f"{said}: this model of kind text_gan draws at once"):
            family.sample(PROMPTS[:1], settings=wanted)
    with pytest.raises(UserError, match="size: got 64x32: this model of kind text_gan draws 32x32 alone"):
        family.sample(PROMPTS[:1], size=(32, 64))
    with pytest.raises(UserError, match="negative"):
        family.sample(PROMPTS[:1], negative="blue")
    with pytest.raises(UserError, match="composes no prompts by AND"):
        family.sample([read("a red ring AND a blue ring")])


def folder_of(family: TextGANFamily, products: dict[str, Product], root: Path) -> Path:
    family.save(root / "product")
    family.config.assemble({**products, "model": Product(root / "product", "")}, root / "model", STORY)
    return root / "model"


def test_a_model_folder_draws_the_same_pictures(family: TextGANFamily, products: dict[str, Product], tmp_path: Path) -> None:
    folder = folder_of(family, products, tmp_path)
    found = load(folder)
    assert torch.equal(found.sample(PROMPTS, [3, 4, 5]), family.sample(PROMPTS, [3, 4, 5])) and found.content_hash
    assert "Tiny" in (folder / "README.md").read_text(encoding="utf-8")
    again = built(products, init=Product(tmp_path / "product", ""))
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), family.state_dict().values(), strict=True))
    (folder / "generator" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(UserError, match="generator"):
        open_finished(folder)


def test_it_draws_in_pixels_too(products: dict[str, Product], tmp_path: Path) -> None:
    pixels = PixelAutoencoder()
    pixels.adopt(pixels.find("pixels", print), tmp_path / "pixels")
    given = {**products, "autoencoder": Product(tmp_path / "pixels", "")}
    config = StyleGeneratorConfig(channels=(8, 8), blocks=1, heads=2, noise=4, style=8)
    family = built(given, side=16, generator=config, discriminator=TextDiscriminatorConfig(channels=(8, 8), blocks=1, embedding=8))
    assert family.generator.sides == [8, 16] and family.factor == 2
    family(Pictures().load([0, 1], [0, 1], 16, 0, False), Rng(0, range(2)))
    assert family.sample(PROMPTS, [0, 1, 2]).shape == (3, 16, 16, 3)


@pytest.fixture(scope="module")
def stacked(products: dict[str, Product], tmp_path_factory: pytest.TempPathFactory) -> tuple[TextGANFamily, Path]:
    """A generator that makes 8 px into 16 px, and a folder of it after one that draws the 8 px."""
    root, pixels = tmp_path_factory.mktemp("stacked"), PixelAutoencoder()
    pixels.adopt(pixels.find("pixels", print), root / "pixels")
    given = {**products, "autoencoder": Product(root / "pixels", "")}
    first = built(given, side=8)
    larger = built(given, side=16, enlarges=2, consistency=3.0, after="gan", interpolation=1.0)
    for name, family in (("first", first), ("larger", larger)):
        family.save(root / name)
    before = {"after": Product(root / "first", "", first.config), **{f"after.{role}": product for role, product in given.items()}}
    larger.config.assemble({**given, **before, "model": Product(root / "larger", "")}, root / "model", STORY)
    return larger, root / "model"


def test_a_second_stage_is_told_the_smaller_picture(stacked: tuple[TextGANFamily, Path]) -> None:
    family, config = stacked[0], stacked[0].config
    batch = ScenesSource(tier="one", images=4, val=1).build("train").with_views(config.views()).load(range(4), range(4), 16, 0, False)
    batch, rng = batch.to("cpu"), Rng(0, range(4))
    terms, _ = family.loss(batch, rng)
    small = cast(Tensor, batch.views["small:2"]) * 2 - 1  # type: ignore[index]
    text = with_sentence(family.text.encode(list(batch.caption)))
    told = small + 0.1 * rng.normal("text_gan/shown", (3, 8, 8))
    made = family.generator(family.noise_of(rng), [text], told)
    assert torch.allclose(terms["consistency"], 3 * (F.avg_pool2d(made, 2) - small).abs().mean(), rtol=1e-5)
    judge = [*family.discriminator.parameters()]
    assert not any(g is not None for g in torch.autograd.grad(terms["consistency"], judge, allow_unused=True))
    assert plain(config)["after"] == "gan" and "after" not in config.identity() and "enlarges" not in TextGAN().identity()


def test_no_enlarged_picture_depends_on_its_neighbours(stacked: tuple[TextGANFamily, Path]) -> None:
    family = stacked[0]
    small = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    whole = family.sample(PROMPTS, [3, 4, 5], edits=family.tell({"small:2": small}, {}, (16, 16)))
    one = family.tell({"small:2": small[1:2]}, {}, (16, 16))
    assert torch.equal(family.sample(PROMPTS[1:2], [4], edits=one)[0], whole[1])
    assert not torch.equal(family.sample(PROMPTS[:1], [3], edits=one)[0], whole[0])  # another picture
    with pytest.raises(UserError, match=r"given: this model of kind text_gan makes a smaller picture larger; give one by --given"):
        family.sample(PROMPTS[:1], [3])
    with pytest.raises(UserError, match="given: edges: this model of kind text_gan reads small:2"):
        family.tell({"edges": torch.zeros(1, 1, 16, 16)}, {}, (16, 16))


def test_two_stages_are_a_chain(stacked: tuple[TextGANFamily, Path]) -> None:
    chain = open_finished(stacked[1])
    assert isinstance(chain, Chain) and chain.defaults["size"] == (16, 16)
    first = chain.sample(PROMPTS, [3, 4, 5], Wanted(stop_after=1))
    assert first.shape == (3, 8, 8, 3) and torch.equal(chain.links[0].sample(PROMPTS, [3, 4, 5]), first)
    whole = chain.sample(PROMPTS, [3, 4, 5])
    told = chain.links[1].tell({"small:2": first.permute(0, 3, 1, 2).float() / 255}, {}, (16, 16))
    assert torch.equal(chain.links[1].sample(PROMPTS, [mix(seed, "link", 1) % SEEDS for seed in (3, 4, 5)], edits=told), whole)
    assert torch.equal(chain.sample(PROMPTS[1:2], [4])[0], whole[1])


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"enlarges": 1}, "enlarges: got 1, which is no larger"),
        ({"consistency": 1.0}, "consistency: got 1, but no picture is told; set enlarges"),
        ({"after": "gan"}, "after: got gan, whose picture is not read; set enlarges"),
    ],
)
def test_a_second_stage_that_cannot_be_is_refused(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        TextGAN(**fields)


def test_consistency_of_a_second_stage_is_of_pixels(products: dict[str, Product]) -> None:
    with pytest.raises(UserError, match=r"consistency: compares pixels, but models\.autoencoder makes latents"):
        built(products, enlarges=2, consistency=1.0)


def test_the_plan_counts_its_networks(family: TextGANFamily, products: dict[str, Product]) -> None:
    others = {"text": Clip(text=TEXT, vocabulary=600), "autoencoder": KLModel(network=KL)}
    stage = Train(model="gan", images=8, resolution=SIDE)
    found = family.config.footprint(cast(Any, stage), SIDE, others, print)
    assert found.learned == {"generator": cost.count(family.generator), "discriminator": cost.count(family.discriminator)}
    assert found.cost.forward > 0 and family.config.step_px(others) == 8
    told = replace(family.config, enlarges=2).footprint(cast(Any, stage), SIDE, others, print)
    assert told.learned["generator"] == found.learned["generator"] + 3 * 8 * 9 + 8
