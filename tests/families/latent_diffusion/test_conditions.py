"""Conditions: nothing changes before the first step, each may be left out, and a model with them is saved, opened and continued."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from finished_model import SIDE, UNET
from PIL import Image

from ldm.__main__ import main
from ldm.data.dataset import asked, offered
from ldm.data.scenes.source import ScenesSource
from ldm.diffusion.rng import Rng
from ldm.families.draws import Wanted
from ldm.families.family import Context, Product
from ldm.families.latent_diffusion.conditions import Condition
from ldm.families.latent_diffusion.family import LatentDiffusion, LatentDiffusionFamily, load
from ldm.families.latent_diffusion.ports import Concat, as_map
from ldm.models.conditioned import base_of

GREY, LABELS, SMALL = (Condition(view=view, port=Concat()) for view in ("grey", "labels", "small:8"))  # type: ignore[arg-type]
DATA = ScenesSource(tier="one", images=8, val=4)


def begun(model: Path, *conditions: Condition, **fields: object) -> LatentDiffusionFamily:
    config = LatentDiffusion(network=UNET, conditions=conditions, **fields)  # type: ignore[arg-type]
    data = asked(DATA.build("train"), config.views())
    products = {name: Product(model, "") for name in ("text", "autoencoder")}
    context = Context(data=data, val=data, resolution=SIDE, seed=0, total_images=8, products=products, init=Product(model, ""))
    built = config.continued(model).build(context)
    assert isinstance(built, LatentDiffusionFamily)
    return built.eval()


@pytest.mark.parametrize("told", [[GREY], [LABELS], [SMALL, GREY]], ids=["grey", "labels", "small and grey"])
def test_fresh_conditions_leave_the_base_as_it_is_to_the_bit(kl_model: Path, told: list[Condition]) -> None:
    base, family = load(kl_model), begun(kl_model, *told)
    data = asked(DATA.build("train"), family.config.views())
    batch = data.load(range(3), range(3), SIDE, 0, False)
    assert batch.views is not None
    plain = base.sample(["a red ring"] * 3, size=(SIDE, SIDE))
    edits = family.tell(batch.views, {}, (SIDE, SIDE))
    assert torch.equal(family.sample(["a red ring"] * 3, size=(SIDE, SIDE), edits=edits), plain)
    assert torch.equal(family.sample(["a red ring"] * 3, size=(SIDE, SIDE)), plain)  # and told nothing


def test_each_condition_is_dropped_by_itself_and_its_strength_counts(kl_model: Path) -> None:
    torch.manual_seed(0)
    family = begun(kl_model, replace(GREY, drop=0.5), replace(LABELS, drop=0.25))
    with torch.no_grad():
        base_of(family.denoiser).conv_in.weight.normal_(0, 0.1)
    data = asked(DATA.build("train"), family.config.views())
    batch = data.load([0] * 4, range(4), SIDE, 0, False)
    latents = family.encode(batch, Rng(0, range(4)))
    rng = Rng(3, range(4))
    given = family._given(batch, latents, rng).cond.given
    assert given is not None
    for name, share in (("grey", 0.5), ("labels", 0.25)):
        assert given[name].strength.tolist() == (rng.uniform(f"told {name}") >= share).float().tolist()
    assert given["grey"].strength.tolist() != given["labels"].strength.tolist()
    many = Rng(0, range(4000)).uniform("told grey")
    assert abs(float((many < 0.5).float().mean()) - 0.5) < 0.03
    views = {name: batch.views[name][:1] for name in ("grey", "labels")}  # type: ignore[index]

    def drawn(names: list[str], **strength: float) -> torch.Tensor:
        return family.sample(["a"], size=(SIDE, SIDE), edits=family.tell({n: views[n] for n in names}, strength, (SIDE, SIDE)))

    nothing, both = family.sample(["a"], size=(SIDE, SIDE)), drawn(["grey", "labels"])
    assert torch.equal(drawn(["grey", "labels"], grey=0.0), drawn(["labels"]))
    assert torch.equal(drawn(["grey"], grey=0.0), nothing)
    assert not any(torch.equal(a, b) for a, b in ((nothing, both), (both, drawn(["grey"])), (drawn(["grey"]), drawn(["grey"], grey=0.5))))
    # Of several pictures each its own, whatever its neighbours.
    own = family.tell(batch.views | {"grey": torch.cat([views["grey"].roll(i, -1) for i in range(4)])}, {}, (SIDE, SIDE))  # type: ignore[operator]
    several = family.sample(["a"] * 4, [0] * 4, size=(SIDE, SIDE), edits=own)
    assert torch.equal(several[:1], both) and not torch.equal(several[1], several[0])


def test_classes_that_are_unknown_are_no_class() -> None:
    kind = offered(DATA.build("train"), ["labels"])["labels"]
    found = as_map(torch.tensor([[[[0, 10, -1]]]], dtype=torch.int16), kind)
    assert found.sum(1).flatten().tolist() == [1, 1, 0] and found[0, 10, 0, 1] == 1


def configuration(folder: Path, model: Path, condition: str) -> Path:
    file = folder / "told.yaml"
    lines = [
        f"init: {model}",
        "data: {kind: scenes, tier: one, images: 16, val: 4}",
        f"out: {folder / 'run'}",
        "workers: 0",
        f"models: {{diffusion: {{kind: latent_diffusion, conditions: [{condition}]}}}}",
        "stages:",
        f"  latents: {{kind: encode, resolution: {SIDE}}}",
        f"  told: {{kind: train, model: diffusion, latents: latents, resolution: {SIDE}, images: 16, batch: 8, samples: 2}}",
        "  export: {kind: export}",
    ]
    file.write_text("\n".join(lines) + "\n")
    return file


@pytest.mark.slow
def test_from_cached_views_to_a_pipeline_of_diffusers(kl_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = configuration(tmp_path, kl_model, "{view: source, port: concat}")
    assert main(["train", str(file)]) == 0
    run = tmp_path / "run"
    model = load(run / "model")
    assert model.told["source"].channels == 3 and model.config.network.in_channels == 8
    assert float(base_of(model.denoiser).conv_in.weight[:, 4:].detach().abs().max()) > 0  # the new weights have learned
    assert json.loads((run / "model/model_index.json").read_text())["_class_name"] == "StableDiffusionInstructPix2PixPipeline"
    from diffusers import StableDiffusionInstructPix2PixPipeline

    pipeline = StableDiffusionInstructPix2PixPipeline.from_pretrained(run / "model")
    pipeline.set_progress_bar_config(disable=True)
    picture = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
    noise = model.noise([0], (SIDE, SIDE))
    ours = model.sample(
        ["a red ring"],
        size=(SIDE, SIDE),
        latents=noise,
        edits=model.tell({"source": torch.from_numpy(picture).permute(2, 0, 1)[None].float() / 255}, {}, (SIDE, SIDE)),
    )
    d = model.defaults
    theirs = pipeline("a red ring", image=Image.fromarray(picture), latents=noise, num_inference_steps=d["steps"],
                      guidance_scale=d["guidance"], image_guidance_scale=1.0, output_type="np").images  # fmt: skip
    assert theirs.shape == (1, SIDE, SIDE, 3)
    # Guidance of the picture at 1 is ours: told with and without the prompt.
    if d["sampler"] == "ddim":
        assert abs(theirs[0] * 255 - ours[0].numpy()).max() <= 2
    # It goes on as what it is, with further conditions behind, and not as another.
    capsys.readouterr()
    again = ["train", str(file), f"init={run}", f"out={tmp_path / 'again'}"]
    assert main([*again, "models.diffusion.conditions=[{view: grey, port: concat}]"]) == 2
    assert "was trained with the conditions [{view: source, port: concat}]; name these first" in capsys.readouterr().err
    assert main([*again, "models.diffusion.conditions=[{view: source, port: concat}, {view: edges, port: concat}]"]) == 0
    assert load(tmp_path / "again/model").config.network.in_channels == 12


def test_a_small_picture_beside_latents_of_its_size_opens_as_an_upscaler(kl_model: Path, tmp_path: Path) -> None:
    file = configuration(tmp_path, kl_model, "{view: 'small:8', port: {kind: concat, encoder: pixels}}")
    assert main(["train", str(file), "stages.told.samples=0"]) == 0
    model = load(tmp_path / "run/model")
    assert model.config.network.in_channels == 7
    from diffusers import StableDiffusionUpscalePipeline

    pipeline = StableDiffusionUpscalePipeline.from_pretrained(tmp_path / "run/model")
    pipeline.set_progress_bar_config(disable=True)
    side, large = 8, (64, 64)  # it takes sides that are multiples of 8
    picture = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)
    told = torch.from_numpy(picture).permute(2, 0, 1)[None].float() / 255
    noise = model.noise([0], large)
    edits = model.tell({"small:8": told}, {}, large)
    ours = model.sample(["a red ring"], latents=noise, size=large, edits=edits, settings=Wanted(sampler="ddim"))
    from diffusers import DDIMScheduler

    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    d = model.defaults
    theirs = pipeline("a red ring", image=2 * told - 1, latents=noise, num_inference_steps=d["steps"], noise_level=0,
                      guidance_scale=d["guidance"], output_type="np").images  # fmt: skip
    assert abs(theirs[0] * 255 - ours[0].numpy()).mean() <= 3  # it noises the picture a little, even at level 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("[{view: mask3, port: concat}]", "view 'mask3': this data does not offer it; it has boxes, depth, edges"),
        ("[{view: boxes, port: concat}]", "view boxes is of form boxes; port concat takes map, classes"),
        ("[{view: grey, port: concat}, {view: grey, port: concat}]", "the view grey is told twice"),
        ("[{view: grey, port: canny}]", "got 'canny'"),
        ("[{view: 'small:4', port: {kind: concat, encoder: pixels}}]", "small:4 beside an autoencoder that makes pictures 8 times smaller"),
    ],
)
def test_what_cannot_be_is_refused(kl_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: str, message: str) -> None:
    file = configuration(tmp_path, kl_model, "{view: source, port: concat}")
    assert main(["train", str(file), f"models.diffusion.conditions={words}"]) == 2
    assert message in capsys.readouterr().err


def test_learn_new_needs_a_base_and_what_is_new(kl_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = configuration(tmp_path, kl_model, "{view: source, port: concat}")
    assert main(["train", str(file), "models.diffusion.learn=new"]) == 2
    assert "port concat changes the base's own first layer; set learn=all" in capsys.readouterr().err
    assert main(["train", str(file), "models.diffusion.learn=new", "models.diffusion.conditions=[]"]) == 2
    assert "there are no conditions that bring something new" in capsys.readouterr().err
