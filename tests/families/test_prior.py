"""Priors and their decoders: diffusers' network and pipeline, batch independence, chains given an embedding, sums of embeddings."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from finished_model import STORY, TEXT, UNET, Pictures, autoencoder_product
from PIL import Image
from torch.nn import functional as F
from transformers import CLIPVisionModelWithProjection

from ldm.__main__ import main
from ldm.config.errors import UserError
from ldm.config.schema import load
from ldm.data.dataset import asked
from ldm.data.scenes.source import ScenesSource
from ldm.diffusion.batch import Cond, Mixed, Text, Told
from ldm.diffusion.process import Process
from ldm.diffusion.rng import Rng
from ldm.diffusion.schedules import Cosine
from ldm.families.chain import Chain
from ldm.families.clip import Clip
from ldm.families.draws import SamplingCall, Wanted
from ldm.families.family import Context, Product
from ldm.families.latent_diffusion.conditions import Condition
from ldm.families.latent_diffusion.engine import Defaults
from ldm.families.latent_diffusion.family import LatentDiffusion, LatentDiffusionFamily
from ldm.families.latent_diffusion.ports import Cross, Port, Vector, embedded
from ldm.families.prior import Prior, PriorFamily
from ldm.families.registry import open_finished
from ldm.formats.part import read_json
from ldm.models.conditioned import Conditioned
from ldm.models.image_tower import ImageTowerConfig
from ldm.models.prior_transformer import OWN, PriorShape, PriorTransformerConfig
from ldm.models.vision_tower import VisionTowerConfig
from ldm.runs.run import Run

SIDE = 32
SHAPE = PriorShape(head_width=8, heads=2, layers=2, embedding=12, states=12, tokens=5)
PRIOR = Prior(
    network=PriorTransformerConfig(head_width=8, heads=2, layers=1), defaults=Defaults(steps=3, guidance=2.0, sampler="ddpm", chunk=2)
)
DECODER = LatentDiffusion(
    network=UNET,
    process=Process(schedule=Cosine(), target="v"),
    after="prior",
    conditions=(Condition(view="embedding", port=Vector()),),
    defaults=Defaults(steps=2, chunk=2, guidance=2.0, sampler="ddim"),
)
WORDS = ["a red circle", "a small blue ring", "a green square"]


def of(words: list[str], seeds: list[int]) -> SamplingCall:
    return SamplingCall(prompts=words, seeds=seeds, size=(SIDE, SIDE))


def context(products: dict[str, Product]) -> Context:
    data = asked(ScenesSource(tier="one", images=4, val=4).build("train"), ("embedding",))
    return Context(data=data, val=data, resolution=SIDE, seed=0, total_images=1, products=products)


def shaken(family: Any) -> Any:
    with torch.no_grad():
        for weights in family.parameters():
            weights.add_(0.05 * torch.randn_like(weights))
    return family.eval()


@pytest.fixture(scope="module")
def products(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Product]:
    root = tmp_path_factory.mktemp("unclip")
    torch.manual_seed(0)
    tower = VisionTowerConfig(patch=8, width=TEXT.width, layers=2, heads=2)
    Clip(text=TEXT, tower=tower, vocabulary=560).build(context({})).save(root / "text")
    autoencoder_product(root / "autoencoder")
    found = {name: Product(root / name, "") for name in ("text", "autoencoder")}
    shaken(PRIOR.build(context(found))).save(root / "prior")
    shaken(DECODER.build(context(found))).save(root / "decoder")
    return found | {name: Product(root / name, "") for name in ("prior", "decoder")}


@pytest.fixture(scope="module")
def model(products: dict[str, Product], tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("chain") / "model"
    own = {role: products[role] for role in ("text", "autoencoder")}
    before = {"after": replace(products["prior"], config=PRIOR), "after.text": products["text"]}
    DECODER.assemble({**own, **before, "model": products["decoder"]}, root, STORY)
    return root


@pytest.fixture(scope="module")
def chain(model: Path) -> Chain:
    found = open_finished(model)
    assert isinstance(found, Chain) and len(found.links) == 2
    return found


@pytest.fixture(scope="module")
def prior(chain: Chain) -> PriorFamily:
    found = chain.links[0]
    assert isinstance(found, PriorFamily)
    return found


@pytest.fixture(scope="module")
def decoder(chain: Chain) -> LatentDiffusionFamily:
    found = chain.links[1]
    assert isinstance(found, LatentDiffusionFamily)
    return found


@pytest.fixture(scope="module")
def pictures() -> torch.Tensor:
    return torch.rand(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(3))


def test_the_network_is_diffusers_in_float64() -> None:
    torch.manual_seed(0)
    own = SHAPE.build().double().eval()
    theirs = diffusers.PriorTransformer(**{k: v for k, v in SHAPE.to_diffusers().items() if not k.startswith("_")}).double().eval()
    theirs.load_state_dict(own.state_dict(), strict=True)
    x, t, states, pooled = torch.randn(3, 12), torch.tensor([3, 500, 999]), torch.randn(3, 5, 12), torch.randn(3, 12)
    x, states, pooled = x.double(), states.double(), pooled.double()
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 1, 1]]).bool()
    with torch.no_grad():
        found, wanted = own(x, t, Text(tokens=states, mask=mask, pooled=pooled)), theirs(x, t, pooled, states, mask)[0]
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)
    assert PriorShape.from_diffusers({**theirs.config, "_class_name": "PriorTransformer"}, "config.json") == SHAPE
    wider = replace(SHAPE, states=20)
    assert wider.to_diffusers()["_class_name"] == OWN and PriorShape.from_diffusers(wider.to_diffusers(), "x") == wider
    with pytest.raises(UserError, match="added_emb_type is None"):
        PriorShape.from_diffusers({**SHAPE.to_diffusers(), "added_emb_type": None}, "config.json")


def test_a_loss_is_the_error_of_the_clean_embedding(prior: PriorFamily) -> None:
    data = context({}).data
    batch, rng = data.load([0, 1, 2], [0, 1, 2], SIDE, 0, False).to("cpu"), Rng(0, [0, 1, 2])
    x0 = prior.embedded(batch)
    torch.testing.assert_close(x0.square().mean(1), torch.ones(3))
    told = prior.clip.read([c if u >= 0.1 else "" for c, u in zip(batch.caption, rng.uniform("caption_dropout").tolist(), strict=True)])
    noised = prior.config.process.noise(x0, rng)
    assert torch.equal(noised.target, x0)  # the sample itself is predicted
    with torch.no_grad():
        wanted = F.mse_loss(prior.network(noised.x, noised.t, told), x0)
        terms, _ = prior.loss(batch, rng)
    torch.testing.assert_close(terms["denoising"], wanted)
    said = prior.finish(context({}))
    assert set(said) == {"cosine", "text_cosine", "other_cosine", "cosine_of"} and -1 <= said["cosine"] <= 1


def test_nothing_drawn_depends_on_its_neighbours(chain: Chain, prior: PriorFamily) -> None:
    together, images = prior.hand(of(WORDS, [5, 6, 7])), chain.sample(WORDS, [5, 6, 7])
    for i, seed in enumerate([5, 6, 7]):
        assert torch.equal(prior.hand(of([WORDS[i]], [seed]))[0], together[i])
        assert torch.equal(chain.sample([WORDS[i]], [seed])[0], images[i])
    assert not torch.equal(together[0], prior.hand(of([WORDS[0]], [6]))[0])


def test_a_chain_draws_what_its_links_draw(
    chain: Chain, prior: PriorFamily, decoder: LatentDiffusionFamily, pictures: torch.Tensor
) -> None:
    from ldm.families.chain import SEEDS, mix

    seeds = [5, 6, 7]
    told = prior.hand(of(WORDS, [mix(seed, "link", 0) % SEEDS for seed in seeds]))
    edits = decoder.tell({"embedding": told}, {}, (SIDE, SIDE))
    assert torch.equal(chain.sample(WORDS, seeds), decoder.sample(WORDS, seeds, edits=edits))
    given = chain.tell({"embedding": pictures[:1]}, {}, (SIDE, SIDE))  # then the prior is not asked
    alone = decoder.tell({"embedding": pictures[:1]}, {}, (SIDE, SIDE))
    assert torch.equal(chain.sample(["", ""], [1, 2], edits=given), decoder.sample(["", ""], [1, 2], edits=alone))
    assert chain.settings().link_steps == "3" and chain.settings().steps == 2  # the decoder leads
    assert not torch.equal(chain.sample(WORDS, seeds, Wanted(link_steps="2")), chain.sample(WORDS, seeds))
    with pytest.raises(UserError, match="stop_after: got 1; the first models of this chain draw embeddings, no pictures; give 2"):
        chain.settings(Wanted(stop_after=1))
    with pytest.raises(UserError, match="draws embeddings, which no eye can see"):
        prior.sample(WORDS)


@pytest.mark.parametrize("port", [Vector(), Cross()], ids=["vector", "cross"])
def test_a_fresh_port_leaves_the_base_as_it_is(products: dict[str, Product], tmp_path: Path, pictures: torch.Tensor, port: Port) -> None:
    own = {role: products[role] for role in ("text", "autoencoder")}
    base = replace(DECODER, conditions=(), after="")
    shaken(base.build(context(own))).save(tmp_path)
    told = replace(DECODER, conditions=(Condition(view="embedding", port=port),))
    fresh = told.build(replace(context(own), init=Product(tmp_path, "")))
    plain = base.build(replace(context(own), init=Product(tmp_path, "")))
    assert isinstance(fresh, LatentDiffusionFamily) and isinstance(plain, LatentDiffusionFamily)
    edits = fresh.tell({"embedding": pictures}, {}, (SIDE, SIDE))
    size = (SIDE, SIDE)
    batch = replace(Pictures().load([0, 1], [0, 1], SIDE, 0, False), views={"embedding": pictures[:2]})
    latents = plain.encode(batch, Rng(0, batch.position))
    x, t = latents.x0, torch.tensor([0.3, 0.7])
    with torch.no_grad():
        assert torch.equal(fresh.denoiser(x, t, fresh._given(batch, latents, None).cond), plain.denoiser(x, t, latents.cond))
    # Drawing embeds a step's time once where it is the same for all prompts; a sum of more rows may be taken in another order.
    drawn = [family.sample(WORDS[:2], size=size, edits=own).int() for family, own in ((fresh, edits), (plain, ()))]
    assert (drawn[0] - drawn[1]).abs().max() <= 1


def test_guidance_goes_away_from_neither_prompt_nor_embedding(decoder: LatentDiffusionFamily, pictures: torch.Tensor) -> None:
    edits = decoder.tell({"embedding": pictures[:1]}, {}, (SIDE, SIDE))
    weak, strong = (decoder.sample([""], [1], Wanted(guidance=scale), edits=edits) for scale in (1.0, 9.0))
    assert not torch.equal(weak, strong)  # without the embedding left out there would be nothing to guide


def test_embeddings_are_summed(decoder: LatentDiffusionFamily, pictures: torch.Tensor) -> None:
    frozen, clip = decoder._views_by, decoder.clip
    assert clip is not None
    seen, said = clip.embed_images(2 * pictures - 1), clip.embed_captions(WORDS[:2])
    mixed = Mixed(image=pictures[None], words=((WORDS[0], WORDS[1]),), weight=torch.tensor([[0.5, 0.5, 1.0, -1.0]]))
    wanted = F.normalize(0.5 * seen[0] + 0.5 * seen[1] + said[0] - said[1], dim=0) * TEXT.width**0.5
    torch.testing.assert_close(embedded(mixed, frozen)[0], wanted)
    torch.testing.assert_close(embedded(pictures, frozen), TEXT.width**0.5 * seen)


def test_stable_unclip_pipeline_opens_a_decoder_with_its_prior(model: Path, prior: PriorFamily, decoder: LatentDiffusionFamily) -> None:
    found = diffusers.StableUnCLIPPipeline.from_pretrained(model)
    found.set_progress_bar_config(disable=True)
    text = prior.clip.read(WORDS)
    states, mask, pooled = text.tokens, text.mask, text.pooled
    theirs = found._encode_prior_prompt(WORDS, torch.device("cpu"), 1, False)
    for one, other in zip((pooled, states, mask), theirs, strict=True):
        assert one is not None
        torch.testing.assert_close(one.float(), other.float(), rtol=0, atol=1e-5)
    x, t = torch.randn(3, TEXT.width), torch.tensor([1, 500, 999])
    with torch.no_grad():
        torch.testing.assert_close(found.prior(x, t, pooled, states, mask)[0], prior.network(x, t, text), rtol=0, atol=1e-5)
        level = found.noise_image_embeddings(x, noise_level=0, noise=torch.zeros_like(x))
        told = decoder.tell({"embedding": x}, {}, (SIDE, SIDE))
    torch.testing.assert_close(F.normalize(level[:, : TEXT.width], dim=1), F.normalize(x, dim=1))
    assert level.shape == (3, 2 * TEXT.width) and told
    image = found("a red circle", num_inference_steps=2, prior_num_inference_steps=2, output_type="np").images
    assert image.shape == (1, SIDE, SIDE, 3)
    assert found.unet.config.projection_class_embeddings_input_dim == 2 * TEXT.width


def test_stable_unclip_img2img_pipeline_draws_the_same_variation(
    model: Path, decoder: LatentDiffusionFamily, pictures: torch.Tensor, caplog: pytest.LogCaptureFixture
) -> None:
    pipeline = diffusers.StableUnCLIPImg2ImgPipeline.from_pretrained(model)
    assert not [line for line in caplog.records if line.name.startswith(("transformers", "diffusers"))]
    pipeline.scheduler = diffusers.DDIMScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    eight = (pictures[:1] * 255).round()
    picture = Image.fromarray(eight[0].permute(1, 2, 0).byte().numpy())
    noise, wanted = decoder.noise([0], (SIDE, SIDE)), Wanted(sampler="ddim", steps=4, guidance=3.0)
    for words in WORDS[0], "":
        edits = decoder.tell({"embedding": eight / 255}, {}, (SIDE, SIDE))
        ours = decoder.sample([words], [0], wanted, size=(SIDE, SIDE), latents=noise, edits=edits)
        asked = {"latents": noise, "num_inference_steps": 4, "guidance_scale": 3.0, "output_type": "np"}
        theirs = pipeline(picture, words, **asked).images
        assert abs(theirs[0] * 255 - ours[0].numpy()).max() <= 2
    assert not torch.equal(ours, decoder.sample([""], [0], wanted, size=(SIDE, SIDE), latents=noise))

    levels = diffusers.DDPMScheduler.from_config(pipeline.scheduler.config).alphas_cumprod
    torch.testing.assert_close(pipeline.image_noising_scheduler.alphas_cumprod[1:], levels[1:], rtol=1e-4, atol=1e-7)
    assert pipeline.image_noising_scheduler.alphas_cumprod[0] == 1  # what is told without noise has none


def test_a_convolutional_tower_has_no_pipeline_of_variations(products: dict[str, Product], tmp_path: Path) -> None:
    tower = ImageTowerConfig(channels=(8, 8), embedding=TEXT.width, grid=2)
    Clip(text=TEXT, tower=tower, vocabulary=560).build(context({})).save(tmp_path / "text")
    text = Product(tmp_path / "text", "")
    before = {"after": replace(products["prior"], config=PRIOR), "after.text": text}
    own, root = {"text": text, "autoencoder": products["autoencoder"]}, tmp_path / "model"
    DECODER.assemble({**own, **before, "model": products["decoder"]}, root, STORY)
    said = read_json(root / "model_index.json")
    assert said["_class_name"] == "StableUnCLIPPipeline" and "image_encoder" not in said and not (root / "image_encoder").exists()
    assert isinstance(open_finished(root), Chain)


def test_an_ip_adapter_is_loaded_by_diffusers_and_draws_the_same(
    products: dict[str, Product], tmp_path: Path, pictures: torch.Tensor
) -> None:
    own = {role: products[role] for role in ("text", "autoencoder")}
    base = replace(DECODER, conditions=(), after="")
    shaken(base.build(context(own))).save(tmp_path / "base")
    config = replace(base, conditions=(Condition(view="embedding", port=Cross()),), learn="new")
    family = config.build(replace(context(own), init=Product(tmp_path / "base", "")))
    assert isinstance(family, LatentDiffusionFamily) and isinstance(family.denoiser, Conditioned)
    assert all(not weight.requires_grad for weight in family.base.parameters())
    shaken(family.denoiser.networks).train()
    family.save(tmp_path / "learned")
    config.assemble({**own, "model": Product(tmp_path / "learned", "")}, tmp_path / "model", STORY)
    model = open_finished(tmp_path / "model")
    assert isinstance(model, LatentDiffusionFamily) and model.clip is not None

    pipeline = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "model", safety_checker=None)
    assert isinstance(pipeline, diffusers.StableDiffusionPipeline)
    file = {"subfolder": "ip_adapter", "weight_name": "diffusion_pytorch_model.safetensors", "image_encoder_folder": None}
    pipeline.load_ip_adapter(str(tmp_path / "model"), **file)
    pipeline.set_ip_adapter_scale(0.7)
    pipeline.scheduler = diffusers.DDIMScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    embedding = model.clip.embedded(2 * pictures[:1] - 1)
    noise, wanted = model.noise([0], (SIDE, SIDE)), Wanted(sampler="ddim", steps=4, guidance=3.0)
    edits = model.tell({"embedding": pictures[:1]}, {"embedding": 0.7}, (SIDE, SIDE))
    ours = model.sample(WORDS[:1], [0], wanted, size=(SIDE, SIDE), latents=noise, edits=edits)
    both = [torch.cat([torch.zeros_like(embedding), embedding])[:, None]]  # without the prompt it is told zeros
    more = {"latents": noise, "num_inference_steps": 4, "guidance_scale": 3.0, "output_type": "np", "ip_adapter_image_embeds": both}
    theirs = pipeline(WORDS[0], **more).images
    assert abs(theirs[0] * 255 - ours[0].numpy()).max() <= 2
    assert not torch.equal(ours, model.sample(WORDS[:1], [0], wanted, size=(SIDE, SIDE), latents=noise))
    vision = CLIPVisionModelWithProjection.from_pretrained(tmp_path / "model" / "clip")
    with torch.no_grad():  # which a pipeline may be given as its image_encoder
        torch.testing.assert_close(vision(2 * pictures[:1] - 1).image_embeds, embedding, rtol=1e-4, atol=1e-4)

    x, t, text = torch.randn(2, 4, 4, 4).double(), torch.tensor([3, 700]), torch.randn(2, TEXT.max_tokens, TEXT.width).double()
    pipeline.unet.double().eval()
    model.denoiser.double().eval()
    told = Told(value=embedding.double().expand(2, -1), strength=torch.full((2,), 0.7).double())
    cond = Cond(text=Text(tokens=text, mask=torch.ones(2, TEXT.max_tokens).bool()), given={"embedding": told})
    with torch.no_grad():
        wanted64 = pipeline.unet(x, t, text, added_cond_kwargs={"image_embeds": [told.value[:, None]]}).sample
        torch.testing.assert_close(model.denoiser(x, t, cond), wanted64, rtol=1e-6, atol=1e-7)


def test_what_does_not_fit_is_told_before_any_work() -> None:
    for word, said in {
        "models.diffusion.conditions=[]": "models.diffusion.after: prior is told as one view embedding, but diffusion reads no view",
        "models.prior.text=autoencoder": "models.prior.text: got autoencoder, a model of kind kl, which has no image tower; use kind clip",
        'models.diffusion.conditions=[{view: embedding, port: vector}, {view: "small:2", port: {kind: concat, noise: 0.1}}]': "one vector",
    }.items():
        with pytest.raises(UserError) as error:
            load(Path("configs/dalle2.yaml"), [word], Run)
        assert said in str(error.value)


def test_embeddings_need_the_image_side_of_a_clip(products: dict[str, Product], kl_model: Path) -> None:
    for config in (PRIOR, DECODER):
        with pytest.raises(UserError, match="has no image side"):
            config.build(context({**products, "text": Product(kl_model, "")}))


def test_a_prior_alone_opens_and_says_that_nothing_is_measured_of_it(
    products: dict[str, Product], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    PRIOR.assemble({"text": products["text"], "model": products["prior"]}, tmp_path / "model", STORY)
    assert main(["evaluate", str(tmp_path / "model")]) == 2
    assert "a model of kind prior has nothing that is measured here" in capsys.readouterr().err
