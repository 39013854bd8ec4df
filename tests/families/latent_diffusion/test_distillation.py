"""Latent consistency distillation: its loss on Gaussian data, whole runs of it, and what diffusers makes of the model."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from finished_model import UNET, finished_model
from pipelines import pipeline_folder
from torch import Tensor

from ldm.cli.train import main
from ldm.config.errors import UserError
from ldm.diffusion.batch import Cond, LatentBatch, Text
from ldm.diffusion.process import Process
from ldm.diffusion.rng import Rng
from ldm.diffusion.schedules import Cosine, Flow
from ldm.families.draws import Wanted
from ldm.families.latent_diffusion.distillation import Consistency, errors
from ldm.families.latent_diffusion.family import LatentDiffusionFamily, load
from ldm.formats.lora_files import read
from ldm.formats.part import read_json
from ldm.models.backbone import Denoiser

SPREAD = 0.5  # the standard deviation of the data
PROCESSES = [Process(), Process(schedule=Cosine(), target="v"), Process(schedule=Flow(), target="flow")]


class Exact(Denoiser):
    """A network that says x0 of Gaussian data: its posterior mean, or where the ODE of a given guidance ends."""

    def __init__(self, process: Process, answers: Any) -> None:
        super().__init__(UNET)
        self.process, self.answers = process, answers

    def forward(self, x: Tensor, t: Tensor, cond: Cond, memory: Any = None, step: Any = None) -> Tensor:
        """The output that says the answer."""
        alpha, sigma = (v.view(-1, 1, 1, 1).to(x) for v in self.process.alpha_sigma(t))
        x0 = self.answers(x, alpha, sigma)
        p, q = self.process.x0_from(torch.zeros_like(x), x, t), self.process.x0_from(torch.ones_like(x), x, t)
        return (x0 - p) / (q - p)


def posterior_mean(x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    return SPREAD**2 * alpha / (SPREAD**2 * alpha**2 + sigma**2) * x


def end_of_the_ode(x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    return SPREAD / (SPREAD**2 * alpha**2 + sigma**2).sqrt() * x


@pytest.mark.parametrize("process", PROCESSES)
def test_what_draws_gaussian_data_in_one_step_has_nearly_no_loss(process):
    n = 256
    position = torch.arange(n)
    told = Cond(text=Text(tokens=torch.zeros(n, 1, 4), mask=torch.ones(n, 1, dtype=torch.bool)))
    latents = LatentBatch(x0=SPREAD * torch.randn(n, 2, 4, 4, generator=torch.Generator().manual_seed(0)), cond=told, position=position)
    teacher = Exact(process, posterior_mean)
    found = {
        name: float(errors(Consistency(guidance=(1, 4)), Exact(process, answers), teacher, process, latents, told, Rng(0, position)).mean())
        for name, answers in (("ends", end_of_the_ode), ("means", posterior_mean))
    }
    assert found["ends"] < 0.25 * found["means"]
    assert found["ends"] < 0.02  # of data of spread 0.5: DDIM's own error over one of 50 levels


RUN = """
init: {base}
data: {{kind: scenes, tier: one, images: 16, val: 2, captions: 1}}
models: {{diffusion: {{kind: latent_diffusion, distill: {distill}{more}}}}}
stages:
  latents: {{kind: encode, resolution: 32}}
  few: {{kind: train, model: diffusion, latents: latents, resolution: 32, images: 16, batch: 8, samples: 0, optim: {{lr: 1e-2}}{stage}}}
  export: {{kind: export}}
"""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finished_model(tmp_path_factory.mktemp("base"))


def run(folder: Path, base: Path, distill: str, more: str = "", stage: str = "") -> Path:
    file = folder / "few.yaml"
    file.write_text(RUN.format(base=base, distill=distill, more=more, stage=stage))
    assert main([str(file), f"out={folder / 'run'}"]) == 0
    return folder / "run" / "model"


def test_a_distilled_model_draws_in_four_steps_and_diffusers_draws_the_same(base, tmp_path):
    import diffusers

    folder = run(tmp_path, base, "{guidance: [1, 5], channels: 8}")
    family = load(folder)
    assert isinstance(family, LatentDiffusionFamily)
    chosen = family.settings()
    assert (chosen.steps, chosen.sampler, chosen.guidance) == (4, "lcm", 3)
    assert read_json(folder / "scheduler" / "scheduler_config.json")["_class_name"] == "LCMScheduler"
    weight = family.denoiser.state_dict()["time_embedding.cond_proj.weight"]
    assert weight.abs().max() > 0, "it has learned to listen to the scale"
    one, other = (family.sample(["a red ring"], [0], Wanted(guidance=g)) for g in (1.0, 5.0))
    assert not torch.equal(one, other)

    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    assert type(pipeline.scheduler) is diffusers.LCMScheduler
    noise = family.noise([7], (32, 32))
    theirs = pipeline(
        "a red ring", latents=noise.clone(), num_inference_steps=1, guidance_scale=4.0, output_type="pt", height=32, width=32
    ).images
    ours = family.sample(["a red ring"], [7], Wanted(guidance=4.0, steps=1))
    assert (ours.permute(0, 3, 1, 2).float() / 255 - theirs).abs().max() < 0.02


def test_a_latent_consistency_model_of_others_is_drawn_as_such(tmp_path):
    folder = pipeline_folder(tmp_path)
    file = folder / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps({**read_json(file), "_class_name": "LCMScheduler"}))
    chosen = load(folder).settings()
    assert (chosen.steps, chosen.sampler, chosen.guidance) == (4, "lcm", 1)


def test_a_lora_is_distilled_beside_a_base_that_stays(base, tmp_path):
    folder = run(tmp_path, base, "{guidance: [3, 3]}", ", adapt: {kind: lora, rank: 2}")
    family = load(folder)
    chosen = family.settings()
    assert (chosen.steps, chosen.sampler, chosen.guidance) == (4, "lcm", 1)
    file = next(folder.parent.rglob("lora/*.safetensors"))
    plain = load(base)
    before = plain.sample(["a red ring"], [0])
    plain.adapt([(read(str(file)), 1.0)], [])
    assert not torch.equal(plain.sample(["a red ring"], [0]), before)


@pytest.mark.parametrize(
    ("distill", "more", "stage", "message"),
    [
        ("{guidance: [5, 1]}", "", "", "the lower scale comes first"),
        ("{channels: 7}", "", "", "sines and cosines need an even number"),
        ("{}", ", adapt: {kind: lora}", "", "adapters are not told the guidance scale"),
        ("{}", ", process: {weighting: {kind: min_snr}}", "", "process.weighting: has no effect with models.diffusion.distill"),
        ("{}", "", ", caption_dropout: 0.2", "caption_dropout: models.diffusion.distill drops no captions"),
        ("{}", "", ", held_out: 100", "has no loss by noise level"),
    ],
)
def test_what_a_distillation_cannot_have_is_refused(base, tmp_path, distill, more, stage, message):
    file = tmp_path / "few.yaml"
    file.write_text(RUN.format(base=base, distill=distill, more=more, stage=stage))
    with pytest.raises(UserError, match=re.escape(message)):
        main([str(file), f"out={tmp_path / 'run'}"])


def test_settings_that_a_told_network_does_not_read_are_refused_or_said(tmp_path):
    network = UNET.build().told_guidance(8).config
    family = load(finished_model(tmp_path, network=network))
    with pytest.raises(UserError, match="is told one guidance scale for all steps"):
        family.sample(["a ring"], settings=Wanted(guidance_curve="linear"))
    said: list[str] = []
    family.sample(["a ring"], settings=Wanted(sampler="ddim", steps=2), negative="blue", note=said.append)
    assert [line.split(":")[0] for line in said] == ["negative", "sampler"]
