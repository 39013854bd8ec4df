"""Diffusion without text: UNet2DModel's network, a folder that DDPMPipeline and DDIMPipeline draw the same of, and theirs drawn here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from finished_model import STORY, Pictures

from ldm.__main__ import main
from ldm.config.errors import UserError
from ldm.diffusion.batch import Cond
from ldm.diffusion.process import Process
from ldm.diffusion.rng import Rng
from ldm.diffusion.schedules import Linear
from ldm.families.draws import Wanted
from ldm.families.family import Context, Product
from ldm.families.latent_diffusion.engine import Defaults
from ldm.families.latent_diffusion.family import LatentDiffusion, LatentDiffusionFamily
from ldm.families.pixels import PixelAutoencoder
from ldm.families.registry import load, open_finished
from ldm.models.unet import UNetConfig

SIDE = 16
SHAPES: dict[str, dict[str, Any]] = {
    "usual": {
        "block_out_channels": (16, 32, 32),
        "layers_per_block": 1,
        "attention_head_dim": 8,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    },
    "google/ddpm": {  # heads as wide as the level, padding at the end, sines first
        "block_out_channels": (16, 32),
        "layers_per_block": 2,
        "attention_head_dim": None,
        "down_block_types": ("AttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "AttnUpBlock2D"),
        "downsample_padding": 0,
        "flip_sin_to_cos": False,
        "freq_shift": 1,
        "norm_eps": 1e-6,
    },
}
CONFIG = LatentDiffusion(
    text="",
    network=UNetConfig(channels=(16, 32), layers=1, attention=(False, True), heads=(2, 4), norm_groups=8, context_width=0),
    process=Process(schedule=Linear(), target="epsilon"),
    defaults=Defaults(steps=4, chunk=2, sampler="ddim"),
)


def theirs(name: str) -> Any:
    torch.manual_seed(0)
    made = diffusers.UNet2DModel(**SHAPES[name], norm_num_groups=8, sample_size=SIDE).eval()
    for weight in made.parameters():
        torch.nn.init.normal_(weight, std=0.2)
    return made


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that was assembled here, of a network with large weights."""
    root = tmp_path_factory.mktemp("unconditional")
    pixels = PixelAutoencoder()
    pixels.adopt(pixels.find("pixels", print), root / "autoencoder")
    given = {"autoencoder": Product(root / "autoencoder", "")}
    torch.manual_seed(0)
    data: Any = Pictures()
    family = CONFIG.build(Context(data=data, val=data, resolution=SIDE, seed=0, total_images=1, products=given))
    assert isinstance(family, LatentDiffusionFamily)
    terms, _ = family.loss(data.load([0, 1], [0, 1], SIDE, 0, False), Rng(0, [0, 1]))
    terms["denoising"].backward()
    assert all(weight.grad is not None for weight in family.denoiser.parameters())
    family.save(root / "diffusion")
    CONFIG.assemble({**given, "model": Product(root / "diffusion", "")}, root / "model", STORY)
    return root / "model"


@pytest.mark.parametrize("name", SHAPES)
def test_the_network_is_unet_2d_model_in_float64(name: str) -> None:
    other = theirs(name).double()
    values = dict(other.config) | {"_class_name": "UNet2DModel"}
    config = UNetConfig.from_diffusers(values)
    ours = config.build().double().eval()
    ours.load_state_dict(other.state_dict())
    x, t = torch.randn(2, 3, SIDE, SIDE).double(), torch.tensor([3.0, 700.0]).double()
    with torch.no_grad():
        wanted = other(x, t).sample
        assert (ours(x, t, Cond()) - wanted).abs().max() < 1e-12 * wanted.abs().max()
        assert (ours.for_inference()(x, t, Cond()) - wanted).abs().max() < 1e-12 * wanted.abs().max()
    written = config.to_diffusers()
    assert written == json.loads(json.dumps({key: values[key] for key in written})) and set(other.config) - set(written) <= {
        "_use_default_values"
    }


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_their_pipelines_open_the_folder_and_draw_the_same(model: Path, sampler: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert json.loads((model / "model_index.json").read_text())["_class_name"] == "DDPMPipeline"
    kind = diffusers.DDIMPipeline if sampler == "ddim" else diffusers.DDPMPipeline
    pipeline: Any = kind.from_pretrained(model)
    assert isinstance(pipeline.unet, diffusers.UNet2DModel)
    pipeline.unet.double()
    family: Any = open_finished(model).double()
    x = torch.randn(1, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rng = Rng(0, [7])
    noises = [x, *(rng.normal(f"step{i}", (3, SIDE, SIDE)).double() for i in range(3))]
    drawn = iter([*noises, torch.zeros_like(x)])
    for module in (f"pipelines.{sampler}.pipeline_{sampler}", "schedulers.scheduling_ddpm"):
        monkeypatch.setattr(f"diffusers.{module}.randn_tensor", lambda *a, **k: next(drawn))
    how = {"use_clipped_model_output": True} if sampler == "ddim" else {}  # which the noise that is left agrees with, as here
    wanted = pipeline(num_inference_steps=4, output_type="np", **how).images[0]
    spacing = pipeline.scheduler.config.timestep_spacing
    ours = family.sample([""], [7], Wanted(steps=4, sampler=sampler, spacing=spacing), latents=x)[0]
    assert (torch.from_numpy(wanted) * 255 - ours.double()).abs().max() <= 0.5 + 1e-6  # bytes of the same numbers
    settings = family.settings(Wanted(steps=4, sampler=sampler, spacing=spacing))
    exact = family.engine().draw([""], [7], settings, (SIDE, SIDE), latents=x)[1][0]
    assert (torch.from_numpy(wanted).permute(2, 0, 1) - (exact / 2 + 0.5).clamp(0, 1)).abs().max() < 1e-6  # they keep float32 coefficients


@pytest.mark.parametrize("name", SHAPES)
def test_a_folder_of_theirs_draws_here(name: str, tmp_path: Path) -> None:
    scheduler = diffusers.DDPMScheduler(variance_type="fixed_large")
    diffusers.DDPMPipeline(theirs(name), scheduler).save_pretrained(tmp_path / "ddpm")
    family = load(tmp_path / "ddpm")
    assert family.defaults["size"] == (SIDE, SIDE) and not family.reads_prompts and family.settings().guidance == 1
    whole = family.sample(["", "", ""], [1, 2, 3], Wanted(steps=3))
    assert whole.shape == (3, SIDE, SIDE, 3) and not torch.equal(whole[0], whole[1])
    assert torch.equal(family.sample([""], [2], Wanted(steps=3))[0], whole[1])
    image, mask = torch.zeros(1, SIDE, SIDE, 3, dtype=torch.uint8), torch.zeros(1, SIDE, SIDE, dtype=torch.bool)
    mask[:, 8:] = True
    kept = family.sample([""], [1], Wanted(steps=3), edits=family.edits(image, mask))
    assert not kept[0, :8].any() and kept[0, 8:].any()


def test_what_reads_no_text_says_so_in_a_line(model: Path) -> None:
    family = open_finished(model)
    with pytest.raises(UserError, match=r"guidance: got 3: this model of kind latent_diffusion reads no prompt that could guide"):
        family.settings(Wanted(guidance=3.0))
    with pytest.raises(UserError, match="clip_skip: got 2, but this model reads no text"):
        family.settings(Wanted(clip_skip=2))
    for words, said in (
        ({"depth": 2}, "depth: got 2"),
        ({"heads": 3}, "heads 3 does not divide"),
        ({"middle": "none"}, "middle: got none"),
    ):
        with pytest.raises(UserError, match=said):
            UNetConfig(channels=(16, 32), layers=1, attention=(False, True), norm_groups=8, context_width=0, **{"heads": (2, 4), **words})
    with pytest.raises(UserError, match="padded_at_end is of networks that read no text"):
        UNetConfig(padded_at_end=True)


def test_whether_prompts_are_followed_is_not_measured(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "found.json"
    code, said = (
        main(["evaluate", str(model), "--tier", "one", "--images", "4", "--steps", "1", "--json", str(out)]),
        capsys.readouterr().err,
    )
    assert code == 0 and "reads no words: whether it follows prompts is not measured" in said, said
    found = json.loads(out.read_text())
    assert "frechet" in found and "adherence" not in found
    assert main(["evaluate", str(model), "--n", "4", "--images", "4"]) == 2
    assert "n: is of prompts, and" in capsys.readouterr().err
    stage = "{kind: evaluate, of: diffusion, metrics: [{kind: adherence, tier: one, prompts: 4}]}"
    assert main(["train", "configs/ddpm.yaml", f"stages.evaluation={stage}", "--plan", f"out={tmp_path / 'run'}"]) == 2
    assert (
        "stages.evaluation.metrics: adherence asks whether words are followed, and models.diffusion reads none" in capsys.readouterr().err
    )
