"""Chains: seeds by link, stop after a link, steps by link, noise augmentation, folders; IFSuperResolutionPipeline opens a link."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from finished_model import STORY, UNET, Pictures, autoencoder_product, text_product

from ldm.__main__ import main
from ldm.config.errors import UserError
from ldm.config.schema import load
from ldm.data.views import ViewKind
from ldm.diffusion.batch import Cond, Told
from ldm.diffusion.learned_variance import LearnedVariance
from ldm.diffusion.process import Process
from ldm.diffusion.rng import Rng, mix
from ldm.diffusion.schedules import Cosine
from ldm.families.chain import SEEDS, Chain
from ldm.families.draws import Wanted
from ldm.families.family import Context, Product
from ldm.families.latent_diffusion.conditions import Condition, Read, noised
from ldm.families.latent_diffusion.engine import Defaults
from ldm.families.latent_diffusion.family import LatentDiffusion, LatentDiffusionFamily
from ldm.families.latent_diffusion.ports import Concat
from ldm.families.pixels import PixelAutoencoder
from ldm.families.registry import open_finished
from ldm.models.conditioned import NOT_TOLD, Joined
from ldm.runs.run import Run

VIEW = "small:2"
BASE = LatentDiffusion(
    network=UNET,
    process=Process(schedule=Cosine(), target="v"),
    variance=LearnedVariance(),
    defaults=Defaults(steps=3, chunk=2, guidance=2.0, sampler="ddim"),
)
PORT = Concat(noise=0.5, drawn_noise=0.2)
LINK = replace(BASE, after="base", conditions=(Condition(view=VIEW, port=PORT),), defaults=replace(BASE.defaults, steps=2, guidance=1.0))


def link(root: Path, config: LatentDiffusion, side: int) -> LatentDiffusionFamily:
    torch.manual_seed(side)
    pixels = PixelAutoencoder()
    pixels.adopt(pixels.find("pixels", print), root / "autoencoder")
    if not (root / "text").exists():
        text_product(root / "text")
    data = Pictures()
    own = {"autoencoder": Product(root / "autoencoder", ""), "text": Product(root / "text", "")}
    family = config.build(Context(data=data, val=data, resolution=side, seed=0, total_images=1, products=own))
    assert isinstance(family, LatentDiffusionFamily)
    with torch.no_grad():
        for weights in family.denoiser.parameters():
            weights.add_(0.02 * torch.randn_like(weights))
    return family


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("chain")
    for name, config, side in (("base", BASE, 8), ("up", LINK, 16), ("top", replace(LINK, after="up"), 32)):
        link(root, config, side).save(root / name)
    every = {name: Product(root / name, "") for name in ("text", "autoencoder", "base", "up", "top")}
    own = {role: every[role] for role in ("text", "autoencoder")}
    products = {**own, "model": every["top"], "after": replace(every["up"], config=LINK)}
    products |= {f"after.{role}": product for role, product in own.items()} | {"after.after": replace(every["base"], config=BASE)}
    products |= {f"after.after.{role}": product for role, product in own.items()}
    LINK.assemble(products, root / "model", STORY)
    return root / "model"


@pytest.fixture(scope="module")
def chain(model: Path) -> Chain:
    found = open_finished(model)
    assert isinstance(found, Chain) and len(found.links) == 3
    return found


def test_each_link_draws_what_it_would_alone_told_the_picture_before(chain: Chain, model: Path) -> None:
    prompts, seeds = ["a red circle", "a blue ring", "a green square"], [4, 5, 6]
    whole = chain.sample(prompts, seeds)
    assert whole.shape == (3, 32, 32, 3)
    made = open_finished(model / "before" / "before").sample(prompts, seeds)  # the first link as a model of its own
    assert torch.equal(chain.sample(prompts, seeds, Wanted(stop_after=1)), made)
    for k, side in ((1, 16), (2, 32)):
        one = chain.links[k]
        edits = one.tell({VIEW: made.permute(0, 3, 1, 2) / 255}, {}, (side, side))
        made = one.sample(prompts, [mix(seed, "link", k) % SEEDS for seed in seeds], size=(side, side), edits=edits)
    assert torch.equal(whole, made)
    assert torch.equal(chain.sample(prompts[1:2], seeds[1:2])[0], whole[1])  # whatever its neighbours


def test_steps_of_links_and_where_to_stop_are_settings(chain: Chain) -> None:
    settings = chain.settings(Wanted(steps=5))
    assert (settings.steps, settings.link_steps, settings.stop_after, chain.factor) == (5, "2,2", 0, 4 * chain.links[0].factor)
    steps: list[tuple[int, int]] = []
    chain.sample(["a"], [0], Wanted(steps=2, link_steps="3,1", stop_after=2), on_step=lambda done, total: steps.append((done, total)))
    assert len(steps) == 2 + 3 and chain.settings(Wanted(link_steps="3,1", stop_after=3)).stop_after == 0
    with pytest.raises(UserError, match=r"link_steps: got '3'; 2 numbers with commas are needed, such as 2,2"):
        chain.settings(Wanted(link_steps="3"))
    with pytest.raises(UserError, match="stop_after: got 4; this chain has 3 models"):
        chain.settings(Wanted(stop_after=4))
    with pytest.raises(UserError, match="stop_after: got 1: this model of kind latent_diffusion is no chain of models"):
        chain.links[0].settings(Wanted(stop_after=1))
    with pytest.raises(UserError, match="a model draws 8x8 px, but the next is told 16x16 px"):
        Chain([chain.links[0], chain.links[2]])
    with pytest.raises(UserError, match="told the picture before as one view small:N"):
        Chain([chain.links[0], chain.links[0]])
    with pytest.raises(UserError, match="init: this model of kind chain"):
        chain.edits(torch.zeros(1, 32, 32, 3, dtype=torch.uint8))
    with pytest.raises(UserError, match=r"model 2 of the chain: steps: got 9999"):
        chain.sample(["a"], [0], Wanted(link_steps="9999,1"))


def test_a_given_picture_is_enlarged_by_the_last_link_and_what_is_not_asked_is_told(
    chain: Chain, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    edits, said = chain.tell({VIEW: picture}, {}, (32, 32)), []
    made = chain.sample(["a red circle"], [3], Wanted(link_steps="3,1", steps=2), edits=edits, note=said.append)
    alone = chain.links[2].tell({VIEW: picture}, {}, (32, 32))
    assert torch.equal(
        made, chain.links[2].sample(["a red circle"], [mix(3, "link", 2) % SEEDS], Wanted(steps=1), size=(32, 32), edits=alone)
    )
    assert said == ["link_steps: of a model before what is given, which is not asked, so they change nothing"]
    chain.sample(["a red circle"], [3], Wanted(steps=5), edits=edits, note=said.append)
    assert said[1].startswith("steps, guidance and sampler: of a model before what is given")
    words = ["sample", "a red circle", "--model", str(model), "--out", str(tmp_path / "out")]
    assert main([*words, "--stop-after", "1", "--link-steps", "5,2"]) == 0
    assert "link_steps: --stop-after 1 leaves models out, so their steps change nothing" in capsys.readouterr().err
    assert main([*words, "--hires", "2"]) == 2
    assert "hires: this model of kind chain draws no picture anew in part; leave --hires out" in capsys.readouterr().err
    assert main(["info", str(model)]) == 0
    shown = capsys.readouterr().out
    assert f"after the model in {model}/before of kind latent_diffusion, drawn with size [16, 16]" in shown
    assert f"after the model in {model}/before/before of kind latent_diffusion, drawn with size [8, 8]" in shown


def test_a_chain_is_measured_as_any_model(model: Path, chain: Chain, tmp_path: Path) -> None:
    assert all(callable(getattr(chain, name)) for name in chain.able)
    assert main(["evaluate", str(model), "--tier", "one", "--n", "2", "--images", "4", "--json", str(tmp_path / "found.json")]) == 0
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["reconstruction"]["psnr"] > 99  # pixels are their own latents
    assert found["adherence"]["protocol"]["size"] == 32


def test_noise_is_mixed_in_by_the_schedule_and_its_level_is_told() -> None:
    process, many = Process(schedule=Cosine(), target="v"), 4000
    read = Read(Condition(view=VIEW, port=Concat(noise=0.5)), ViewKind(form="map", channels=3, divide=2))
    told = Told(value=torch.full((many, 1, 2, 2), 0.5), strength=torch.ones(many))
    found = noised(read, told, process, Rng(0, range(many)), None)
    assert found.level is not None and float(found.level.min()) >= 0 and 480 < float(found.level.max()) < 500
    alpha, sigma = (c.float() for c in process.alpha_sigma(found.level))
    rest = (found.value[:, 0, 0, 0] - 0.5 * alpha) / sigma
    assert abs(float(rest.mean())) < 0.05 and float(rest.std()) == pytest.approx(1, abs=0.04)
    exact = noised(read, told, process, None, None)
    assert torch.equal(exact.value, told.value) and exact.level is not None and not exact.level.any()
    level = noised(read, told, process, Rng(0, range(many)), 0.25).level
    assert level is not None and (level == 250).all()
    network = Joined(3, levels=True)
    assert network.vector(None, 2).tolist() == [NOT_TOLD] * 2  # type: ignore[union-attr]
    part = Told(value=told.value[:2], strength=torch.tensor([0.0, 1.0]), level=torch.tensor([5.0, 7.0]))
    assert network.vector(part, 2).tolist() == [NOT_TOLD, 7.0]  # type: ignore[union-attr]
    assert Joined(3).vector(part, 2) is None


def test_a_link_opens_in_diffusers_and_predicts_the_same(model: Path, chain: Chain) -> None:
    ours: Any = chain.links[1]
    theirs: Any = diffusers.IFSuperResolutionPipeline.from_pretrained(model / "before")
    x, small, words = torch.randn(1, 3, 16, 16), torch.randn(1, 3, 16, 16), ours.text.encode(["a red circle"])
    told = Told(value=small, strength=torch.ones(1), level=torch.tensor([250.0]))
    with torch.no_grad():
        own = ours.denoiser(x, torch.tensor([700.0]), Cond(text=words, given={VIEW: told}))
        want = theirs.unet(torch.cat([x, small], 1), 700, words.tokens, class_labels=torch.tensor([250.0])).sample
    assert torch.allclose(own, want, atol=1e-5)
    told_words = {"prompt_embeds": words.tokens, "negative_prompt_embeds": ours.text.encode([""]).tokens}
    made = theirs(
        image=torch.zeros(1, 3, 8, 8), height=16, width=16, **told_words, num_inference_steps=2, noise_level=200, output_type="np"
    )
    assert made.images.shape == (1, 16, 16, 3)


def test_an_upscaler_of_latents_opens_in_diffusers_and_draws_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text, autoencoder = text_product(tmp_path / "text"), autoencoder_product(tmp_path / "autoencoder")
    own = {"autoencoder": Product(autoencoder, ""), "text": Product(text, "")}
    condition = Condition(view="small:8", port=Concat(encoder="pixels", noise=0.35, drawn_noise=0.02))
    config = replace(BASE, variance=None, conditions=(condition,), defaults=replace(BASE.defaults, chunk=1))
    torch.manual_seed(0)
    family = config.build(Context(data=Pictures(), val=Pictures(), resolution=32, seed=0, total_images=1, products=own))
    family.save(tmp_path / "up")
    config.assemble({**own, "model": Product(tmp_path / "up", "")}, tmp_path / "model", STORY)
    ours: Any = open_finished(tmp_path / "model")
    theirs: Any = diffusers.StableDiffusionUpscalePipeline.from_pretrained(tmp_path / "model", safety_checker=None)
    small, seed = torch.rand(1, 3, 8, 8), 7
    made = ours.sample(["a red circle"], [seed], size=(64, 64), edits=ours.tell({"small:8": small}, {}, (64, 64)))
    drawn = iter([Rng(0, [seed]).normal("noise small:8", (3, 8, 8)), Rng(0, [seed]).normal("init", (4, 8, 8))])
    monkeypatch.setattr("diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion_upscale.randn_tensor", lambda *a, **k: next(drawn))
    words = {name: ours.text.encode([text]).tokens for name, text in (("prompt_embeds", "a red circle"), ("negative_prompt_embeds", ""))}
    found = theirs(image=2 * small - 1, **words, num_inference_steps=3, guidance_scale=2.0, noise_level=20, output_type="np").images[0]
    assert abs(torch.from_numpy(found) * 255 - made[0].float()).max() <= 1


def test_a_chain_in_a_run_is_checked_before_any_work() -> None:
    for word, said in {
        "models.up32.after=up64": "models.up32.after: up32 after up64 after up32 goes round in a circle",
        "models.up32.after=base": "models.up32.after: 'base' is no entry of models",
        "models.up32.conditions=[]": "diffusion is told as one view small:N, but up32 reads no view",
        "models.up32.network={kind: dit}": "network.kind: got dit, which is told no vector",
        "stages.diffusion-low=null": "stages.evaluation-32: needs a stage before it that trains diffusion",
    }.items():
        with pytest.raises(UserError) as error:
            load(Path("configs/cascade.yaml"), [word, "stages.evaluation=null"], Run)
        assert said in str(error.value)
