"""Token models: loss, drawing, inpainting, and a folder that diffusers' AmusedPipeline draws the same pictures of."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from ldm.config.errors import UserError
from ldm.diffusion.rng import Rng
from ldm.families.autoencoder import measure
from ldm.families.draws import DIRECT, Wanted
from ldm.families.family import Context, Product
from ldm.families.registry import load, open_finished
from ldm.families.tokens.configuration import TokenDefaults
from ldm.families.tokens.drawing import causal, drawn, masked, narrowed
from ldm.families.tokens.family import Tokens, TokensFamily
from ldm.formats.latent_codec import save_codec
from ldm.models.autoencoder import VQConfig
from ldm.models.token_transformer import TokenTransformerConfig
from ldm.text.encoder import SmallText, TextEncoder, small_clip_text, train_tokenizer
from ldm.text.prompt_syntax import read
from tests.finished_model import CAPTIONS, STORY, Pictures

SIDE, CODES = 32, 16  # 4x4 codes
VQ = VQConfig(channels=(4, 4, 4, 8), layers=1, norm_groups=4, latent_channels=4, codes=CODES, middle_attention=False)
NETWORK = TokenTransformerConfig(width=16, layers=1, heads=2, size_channels=4)
PROMPTS = ["a small red circle", "a large blue ring", "a small green square"]
CPU = torch.device("cpu")


def config(order: str) -> Tokens:
    """Of masked or causal order, or causal with the words in the sequence."""
    blocks, reads = 2 if order == "masked" else None, cast(Any, "words" if order == "words" else "text")
    defaults = TokenDefaults(steps=4, guidance=3.0, chunk=2)
    return Tokens(
        order=cast(Any, "causal" if order == "words" else order),
        reads=reads,
        network=replace(NETWORK, res_blocks=blocks),
        defaults=defaults,
    )


@pytest.fixture(scope="module")
def products(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Product]:
    """A text encoder and an autoencoder with random weights."""
    root = tmp_path_factory.mktemp("products")
    torch.manual_seed(0)
    tokenizer = train_tokenizer(CAPTIONS, 600, 16)
    TextEncoder(small_clip_text(SmallText(width=16, layers=2, heads=2, max_tokens=16), tokenizer), tokenizer).save(root / "text")
    network = VQ.build().eval()
    torch.nn.init.normal_(network.codebook)
    torch.nn.init.normal_(network.quant_conv.weight, std=2.0)
    save_codec(root / "autoencoder" / "vqvae", network, measure(network, cast(Any, Pictures()), SIDE, 0, CPU, images=8))
    return {name: Product(root / name, name) for name in ("text", "autoencoder")}


def built(order: str, products: dict[str, Product]) -> TokensFamily:
    torch.manual_seed(1)
    data = cast(Any, Pictures())
    family = config(order).build(Context(data=data, val=data, resolution=SIDE, seed=0, total_images=8, products=products))
    for name, weight in family.network.named_parameters():
        if weight.dim() > 1:  # far from the start, where all places are nearly equally sure
            torch.nn.init.normal_(weight, std=0.5 if "conv2" in name else 0.3)
    return family


@pytest.fixture(scope="module", params=["masked", "causal", "words"])
def family(request: pytest.FixtureRequest, products: dict[str, Product]) -> TokensFamily:
    return built(request.param, products)


def folder_of(family: TokensFamily, products: dict[str, Product], root: Path) -> Path:
    family.save(root / "product")
    family.config.assemble({**products, "model": Product(root / "product", "")}, root / "model", STORY)
    return root / "model"


def batch() -> Any:
    return Pictures().load([0, 1, 2, 3], [0, 1, 2, 3], SIDE, 0, False)


def test_the_loss_is_the_cross_entropy_of_what_is_hidden(family):
    """With equal logits each code costs log K, whatever is smoothed; masked order counts those of the cosine's share alone."""
    family.network.eval()
    weight = family.network.mlm_layer.conv2.weight
    before = weight.detach().clone()
    with torch.no_grad():
        weight.zero_()
        loss = family.loss(batch(), Rng(0, range(4)))[0]["codes"]
        weight.copy_(before)
    share = torch.cos(Rng(0, range(4)).uniform("mask_share") * math.pi / 2)
    count = (16 * share).ceil() if family.config.order == "masked" else torch.full((4,), 16.0)
    share = 7 / 8 if family.config.reads == "words" else 1
    assert float(loss) == pytest.approx(share * float(count.mean()) / 16 * math.log(CODES), rel=1e-5)


def test_a_loss_depends_on_its_own_samples_and_reads_codes_from_a_cache(family):
    from ldm.diffusion.batch import MomentBatch, rows

    whole, codes = batch(), family.codes_of(batch())
    kept = MomentBatch(mean=codes, std=None, caption=whole.caption, size=whole.size, position=whole.position)
    with torch.no_grad():
        one = family.loss(whole, Rng(0, range(4)))[0]
        halves = [family.loss(rows(kept, i, i + 2), Rng(0, range(i, i + 2)))[0] for i in (0, 2)]
    assert ("words" in one) == (family.config.reads == "words")
    for name, value in one.items():
        assert torch.allclose(value, torch.stack([half[name] for half in halves]).mean(), rtol=1e-5)


def test_no_picture_depends_on_its_neighbours(family):
    whole = family.sample(PROMPTS, [3, 4, 5])
    assert torch.equal(family.sample(PROMPTS[1:2], [4])[0], whole[1]) and torch.equal(
        family.sample(PROMPTS[::-1], [5, 4, 3]).flip(0), whole
    )
    assert not torch.equal(family.sample(PROMPTS[:1], [9])[0], whole[0])
    assert not torch.equal(family.sample(["a large blue ring"], [3])[0], whole[0])


def test_inpainting_keeps_codes_and_bytes_outside(family):
    image = ((batch().image.permute(0, 2, 3, 1) + 1) * 127.5).byte()[:2]
    mask = torch.zeros(2, SIDE, SIDE, dtype=torch.bool)
    mask[0, :10], mask[1, :, 20:] = True, True
    known = family.edits(image, mask)[0]
    assert known.new[0].sum() == 8 and known.new[1].sum() == 8  # of codes that have a pixel in the mask
    made = family.sample(PROMPTS[:2], [0, 1], edits=(known,))
    assert torch.equal(made[~mask], image[~mask]) and not torch.equal(made[mask], image[mask])
    told, before = family._told([family._pieces(p, 4) for p in PROMPTS[:2]], (), family.settings(), (SIDE, SIDE))
    codes, new = known.rows((0, 1), Rng(0, [0, 1]))
    found = family._draw(told, before, codes.view(2, 4, 4), new, family.settings(), 0, Rng(0, [0, 1]), lambda step: None)
    assert torch.equal(found[~new], codes[~new]) and (found < CODES).all()
    nothing = family.edits(image, None, 0.0)
    assert torch.equal(family.sample(PROMPTS[:2], [0, 1], edits=nothing), family.sample(PROMPTS[1:], [5, 6], edits=nothing))
    part = family.edits(image, None, 0.5)[0].rows((0, 1), Rng(0, [0, 1]))[1]
    assert (part.sum(1) == round(16 * math.sin(math.pi / 4))).all()


def test_prompts_are_weighted_and_what_is_not_read_is_refused(family):
    plain = family.sample([read("a small red circle")], [0])
    assert torch.equal(plain, family.sample(PROMPTS[:1], [0]))
    if family.config.reads == "text":
        told = [family._told([family._pieces(read(t), 4)] * 2, (), family.settings(), (32, 32))[0] for t in ("red", "(red:1.5)")]
        assert not torch.equal(*[cast(Tensor, one.states) for one in told])
    else:
        with pytest.raises(UserError, match="reads words, which have no weights"):
            family.sample([read("(red:1.5)")], [0])
    for text in ("red AND blue", "[red:blue:0.5] circle", "[red|blue] circle"):
        with pytest.raises(UserError, match="reads neither AND nor words that change"):
            family.sample([read(text)], [0])
    for wanted in (Wanted(sampler="ddim"), Wanted(eta=0.5), Wanted(rescale=0.5), Wanted(clip_skip=2)):
        with pytest.raises(UserError, match="kind tokens draws codes and has no such setting"):
            family.settings(wanted)
    with pytest.raises(UserError, match="guidance_curve: got 'round'"):
        family.settings(Wanted(guidance_curve="round"))
    with pytest.raises(UserError, match="size: got 36x32; both must be multiples of 8"):
        family.sample(PROMPTS[:1], [0], size=(32, 36))
    if family.config.order == "causal":
        assert family.settings().steps == 16
        with pytest.raises(UserError, match="steps: got 4: this model of kind tokens draws one code after another"):
            family.settings(Wanted(steps=4))
        with pytest.raises(UserError, match="causal order has positions for 32x32 alone"):
            family.sample(PROMPTS[:1], [0], size=(32, 40))
    else:
        assert family.sample(PROMPTS[:1], [0], size=(32, 40)).shape == (1, 32, 40, 3)
        assert family.sample(PROMPTS[:1], [0], Wanted(steps=16)).shape == (1, 32, 32, 3)
        with pytest.raises(UserError, match="steps: got 17; a picture of 32x32 px has 16 codes"):
            family.sample(PROMPTS[:1], [0], Wanted(steps=17))


@pytest.mark.parametrize("order", ["causal", "words"])
def test_a_cached_causal_picture_is_the_one_without_a_cache(order, products):
    family = built(order, products)
    chosen = family.settings(Wanted(guidance=2.0))
    told, before = family._told([family._pieces(p, 16) for p in PROMPTS[:2]], (), chosen, (SIDE, SIDE))
    codes = torch.full((2, 16), CODES)
    cached = family._draw(told, before, codes.view(2, 4, 4), codes == CODES, chosen, 0, Rng(0, [0, 1]), lambda step: None)
    ids: list[Tensor] = []

    def again(last: Tensor, i: int) -> Tensor:
        ids.extend([last] if i else [])
        stream = torch.cat([before, *([torch.stack(ids, 1).repeat(2, 1)] if ids else [])], 1)
        with_prompt, without = family.network.sequence(stream, told)[:, -1, :CODES].chunk(2)
        return without + 2.0 * (with_prompt - without)

    with torch.no_grad():
        assert torch.equal(causal(again, codes, codes == CODES, CODES, chosen, Rng(0, [0, 1])), cached)


@pytest.mark.parametrize("order", ["masked", "causal", "words"])
def test_a_folder_draws_what_the_family_drew(order, products, tmp_path):
    family = built(order, products)
    folder = folder_of(family, products, tmp_path)
    opened = load(folder)
    assert (opened.sample(PROMPTS, [0, 1, 2]).int() - family.sample(PROMPTS, [0, 1, 2]).int()).abs().max() <= 1
    assert opened.content_hash and opened.defaults["size"] == (SIDE, SIDE)


def test_amused_pipeline_draws_the_same_picture(products, tmp_path, monkeypatch):
    """Its codes are drawn by multinomial; here both take the likeliest, without noise on confidences."""
    from diffusers import AmusedPipeline

    family = built("masked", products)
    pipeline = AmusedPipeline.from_pretrained(folder_of(family, products, tmp_path))
    pipeline.set_progress_bar_config(disable=True)
    monkeypatch.setattr(torch, "multinomial", lambda chance, n, generator=None: chance.argmax(-1, keepdim=True))
    opened = cast(TokensFamily, open_finished(tmp_path / "model"))
    opened.config = replace(opened.config, defaults=replace(opened.config.defaults, noise=0.0))
    theirs = pipeline(PROMPTS, num_inference_steps=4, guidance_scale=3.0, temperature=(0, 0), output_type="np").images
    ours = opened.sample(PROMPTS, [0, 1, 2], Wanted(temperature=0.0))
    assert len(ours.flatten(1).unique(dim=0)) == 3
    assert abs(theirs * 255 - ours.numpy()).max() < 0.51


def test_each_step_hides_what_amused_scheduler_hides(monkeypatch):
    """As many codes stay hidden at every step as diffusers' scheduler keeps, of a whole map and of a part."""
    from diffusers import AmusedScheduler

    monkeypatch.setattr(torch, "multinomial", lambda chance, n, generator=None: chance.argmax(-1, keepdim=True))
    for steps, new in ((12, 16), (3, 16), (8, 5), (5, 1)):
        start = torch.arange(16)[None] % 3
        unknown = torch.arange(16)[None] < new
        seen: list[Tensor] = []

        def logits(codes: Tensor, i: int, seen: list[Tensor] = seen) -> Tensor:
            seen.append(codes)
            return torch.randn(1, 16, 3, generator=torch.Generator().manual_seed(i))

        settings = replace(DIRECT, steps=steps, temperature=0.0)
        found = masked(logits, start, unknown, 3, settings, 0.0, 0, Rng(0, [0]))
        scheduler, codes = AmusedScheduler(mask_token_id=3), start.masked_fill(unknown, 3)
        scheduler.set_timesteps(steps, (0, 0))
        for i, t in enumerate(scheduler.timesteps):
            assert torch.equal(codes, seen[i])
            told = logits(codes, i, [])
            codes = scheduler.step(told, t, codes, starting_mask_ratio=new / 16).prev_sample
        assert torch.equal(codes, found)


def test_codes_are_drawn_as_often_as_they_are_likely():
    chance = torch.tensor([0.5, 0.3, 0.15, 0.05])
    logits = (chance.log() + 7).expand(1, 20000, 4)
    uniform = Rng(0, [0]).uniform("u", (20000,))

    def shares(**said: Any) -> list[float]:
        found = drawn(logits, uniform, replace(DIRECT, **said))
        return [round(float(share), 2) for share in found[0].bincount(minlength=4) / 20000]

    assert shares() == pytest.approx(chance.tolist(), abs=0.011)
    assert shares(top_k=2) == pytest.approx([0.625, 0.375, 0, 0], abs=0.011)
    assert shares(top_p=0.6) == pytest.approx([0.625, 0.375, 0, 0], abs=0.011) and shares(top_p=0.0) == [1, 0, 0, 0]
    assert shares(temperature=0.0) == [1, 0, 0, 0]
    squares = chance**2 / (chance**2).sum()
    assert shares(temperature=0.5) == pytest.approx(squares.tolist(), abs=0.011)
    assert narrowed(logits[:, :1], replace(DIRECT, top_k=9)).isfinite().all()
    ends = drawn(logits[:, :2], torch.tensor([[0.0, 1 - 2**-53]], dtype=torch.float64), DIRECT)
    assert ends.tolist() == [[0, 3]]
