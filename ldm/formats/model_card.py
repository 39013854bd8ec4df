"""Model card (README.md): what a model is, its use, training data and evaluation."""

from __future__ import annotations

import json
import shlex
from typing import Any

PIPELINE = """from diffusers import StableDiffusionPipeline

pipeline = StableDiffusionPipeline.from_pretrained("MODEL", safety_checker=None)
image = pipeline({prompt}, num_inference_steps={steps}, guidance_scale={guidance}).images[0]"""

PARTS = """import json, torch
from diffusers import {scheduler}, UNet2DConditionModel, VQModel
from transformers import CLIPTextModel, CLIPTokenizer

vqvae = VQModel.from_pretrained("MODEL/vqvae")
unet = UNet2DConditionModel.from_pretrained("MODEL/unet")
text_encoder = CLIPTextModel.from_pretrained("MODEL/text_encoder")
tokenizer = CLIPTokenizer.from_pretrained("MODEL/tokenizer")
scheduler = {scheduler}.from_pretrained("MODEL/scheduler")
latents = json.load(open("MODEL/vqvae/latents.json"))
mean, std = (torch.tensor(latents[name]).view(1, -1, 1, 1) for name in ("mean", "std"))

ids = tokenizer(["", {prompt}], padding="max_length", truncation=True, return_tensors="pt").input_ids
with torch.no_grad():
    words = text_encoder(ids).last_hidden_state
    x = torch.randn(1, unet.config.in_channels, unet.config.sample_size, unet.config.sample_size)
    scheduler.set_timesteps({steps})
    for t in scheduler.timesteps:
        without, told = unet(torch.cat([x, x]), t, words).sample.chunk(2)
        x = scheduler.step(without + {guidance} * (told - without), t, x).prev_sample
    image = vqvae.decode(x * std + mean).sample  # (1,3,H,W) in [-1,1]"""


IF = """import torch
from diffusers import IFPipeline

pipeline = IFPipeline.from_pretrained("MODEL")
ids = pipeline.tokenizer(["", {prompt}], padding="max_length", truncation=True, return_tensors="pt").input_ids
with torch.no_grad():
    without, told = pipeline.text_encoder(ids)[0].split(1)
words = {{"prompt_embeds": told, "negative_prompt_embeds": without}}
image = pipeline(**words, num_inference_steps={steps}, guidance_scale={guidance}).images[0]"""


DDPM = """from diffusers import DDPMPipeline

pipeline = DDPMPipeline.from_pretrained("MODEL")  # or DDIMPipeline, which is told use_clipped_model_output=True
image = pipeline(num_inference_steps=1000).images[0]"""

TEMPLATES = {"IFPipeline": IF, "DDPMPipeline": DDPM}  # of pixels, by diffusers' class


def model_card(story: dict[str, Any], record: dict[str, Any], *, vq: bool, pipeline: str, stock: bool = True) -> str:
    """README.md of a model folder, in the form the Hugging Face Hub reads.

    Args:
        story: the run's name, data, stages and a prompt that suits it.
        record: what ldm.json says.
        vq: whether the autoencoder is a VQModel, which no stock pipeline takes.
        pipeline: the name of diffusers' class in model_index.json.
        stock: whether diffusers has these networks.
    """
    defaults = record["defaults"]
    prompt = "" if pipeline == "DDPMPipeline" else story.get("prompt", "a picture")
    known = stock or pipeline in TEMPLATES
    elsewhere = _elsewhere(prompt, record, vq, pipeline) if known else "Its UNet is ldm's own, so no other program opens it."
    width, height = defaults["size"][1], defaults["size"][0]
    stages = "\n".join(f"| {name} | {text} |" for name, text in story.get("stages", {}).items())
    return f"""---
library_name: diffusers
pipeline_tag: text-to-image
tags: [ldm, latent-diffusion, text-to-image]
---

# {story.get("name", "A latent diffusion model")}

A latent text-to-image diffusion model trained with `ldm` on {story.get("data", "its user's data")}. It draws
{width}x{height} px pictures.

## Use

With ldm: `python sample.py {shlex.quote(" ".join(prompt.split()))} --model MODEL`

{elsewhere}

## How it was made

| Stage | |
|---|---|
{stages}

Predicts `{record["scheduler"].get("prediction_type", "flow")}`; sampled by default with {defaults["sampler"]},
{defaults["steps"]} steps, guidance {defaults["guidance"]}. The full configuration is `config.yaml` of the run, and
its measurements are in `metrics.json` there.

## Limits

It knows what its training captions showed and nothing else. It has no safety filter. Its licence is the choice of whoever
trained it, within the rights to the training data.
"""


def _elsewhere(prompt: str, record: dict[str, Any], vq: bool, pipeline: str) -> str:
    defaults = record["defaults"]
    lines = (PARTS if vq else TEMPLATES.get(pipeline, PIPELINE)).format(
        prompt=json.dumps(prompt, ensure_ascii=False),
        steps=defaults["steps"],
        guidance=defaults["guidance"],
        scheduler=record["scheduler"]["_class_name"],
    )
    why = "\n\nStableDiffusionPipeline knows KL autoencoders only; these lines join the parts of a VQ model." if vq else ""
    return f"With diffusers:\n\n```python\n{lines}\n```{why}"
