"""diffusers' own Stable Diffusion, 1 and XL, of tiny random parts, beside ours of the same weights."""

from __future__ import annotations

import types
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from finished_model import Pictures, text_product
from torch import Tensor

from ldm.data.pictures import to_uint8
from ldm.diffusion.process import Process
from ldm.diffusion.rng import Rng
from ldm.families.draws import Wanted
from ldm.families.latent_diffusion.family import LatentDiffusionFamily, load

SIDE, FACTOR = 32, 4  # px
PROMPTS, NEGATIVE = ["a small red circle", "a large blue ring"], "a green square"
XL_KINDS = {
    "text": (diffusers.StableDiffusionXLPipeline, "pipeline_stable_diffusion_xl"),
    "image": (diffusers.StableDiffusionXLImg2ImgPipeline, "pipeline_stable_diffusion_xl_img2img"),
    "inpaint": (diffusers.StableDiffusionXLInpaintPipeline, "pipeline_stable_diffusion_xl_inpaint"),
}
KINDS = {
    "text": (diffusers.StableDiffusionPipeline, "pipeline_stable_diffusion"),
    "image": (diffusers.StableDiffusionImg2ImgPipeline, "pipeline_stable_diffusion_img2img"),
    "inpaint": (diffusers.StableDiffusionInpaintPipeline, "pipeline_stable_diffusion_inpaint"),
}


def pipeline_folder(folder: Path, channels: int = 4, target: Any = "epsilon") -> Path:
    """A whole Stable Diffusion folder that diffusers wrote."""
    from transformers import CLIPTextModel, CLIPTokenizer

    text_product(folder / "text")
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(
        in_channels=channels,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        layers_per_block=1,
        cross_attention_dim=32,
        attention_head_dim=2,
        sample_size=SIDE // FACTOR,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 8, 8),
        norm_num_groups=4,
        layers_per_block=1,
        sample_size=SIDE,
        latent_channels=4,
        scaling_factor=0.25,  # and so 1 / scaling_factor, are exact in float32
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
    )
    values = Process(target=target).scheduler_config()
    scheduler = getattr(diffusers, values["_class_name"]).from_config(values)
    parts = {
        "vae": vae,
        "unet": unet,
        "scheduler": scheduler,
        "text_encoder": CLIPTextModel.from_pretrained(folder / "text" / "text_encoder"),
        "tokenizer": CLIPTokenizer.from_pretrained(folder / "text" / "tokenizer"),
    }
    made = diffusers.StableDiffusionPipeline(**parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    made.save_pretrained(folder / "model")
    return folder / "model"


def xl_folder(folder: Path, channels: int = 4, zeros: bool = True) -> Path:
    """A whole Stable Diffusion XL folder that diffusers wrote: text towers of 64 and 128, which no shape makes alike."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    text_product(folder / "text")
    tokenizer = CLIPTokenizer.from_pretrained(folder / "text" / "tokenizer")
    other = CLIPTokenizer.from_pretrained(folder / "text" / "tokenizer")
    other.pad_token = "!"
    torch.manual_seed(0)

    def tower(cls: Any, width: int, act: str, padding: int) -> Any:
        return cls(
            CLIPTextConfig(
                vocab_size=len(tokenizer),
                hidden_size=width,
                intermediate_size=2 * width,
                num_hidden_layers=2,
                num_attention_heads=width // 64,
                max_position_embeddings=tokenizer.model_max_length,
                projection_dim=width,
                hidden_act=act,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=padding,
            )
        )

    unet = diffusers.UNet2DConditionModel(
        in_channels=channels,
        block_out_channels=(64, 128),
        layers_per_block=1,
        cross_attention_dim=192,
        attention_head_dim=(1, 2),
        transformer_layers_per_block=(1, 2),
        use_linear_projection=True,
        sample_size=SIDE // FACTOR,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=6 * 256 + 128,
    )
    vae = diffusers.AutoencoderKL(
        block_out_channels=(32, 32, 32),
        layers_per_block=1,
        sample_size=SIDE,
        latent_channels=4,
        scaling_factor=0.25,
        force_upcast=True,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
    )
    values = Process().scheduler_config()
    made = diffusers.StableDiffusionXLPipeline(
        vae=vae,
        unet=unet,
        scheduler=getattr(diffusers, values["_class_name"]).from_config(values),
        text_encoder=tower(CLIPTextModel, 64, "quick_gelu", tokenizer.pad_token_id),
        text_encoder_2=tower(CLIPTextModelWithProjection, 128, "gelu", other.pad_token_id),
        tokenizer=tokenizer,
        tokenizer_2=other,
        force_zeros_for_empty_prompt=zeros,
        add_watermarker=False,
    )
    made.save_pretrained(folder / "model")
    return folder / "model"


class Pair:
    """One Stable Diffusion, opened by diffusers and by us, in one precision."""

    def __init__(self, folder: Path, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.family: LatentDiffusionFamily = load(folder)
        for module in (self.family, *self.family.frozen()):
            module.to(dtype)
        self.made = diffusers.DiffusionPipeline.from_pretrained(folder, safety_checker=None, local_files_only=True).to(dtype)
        self.xl = "text_encoder_2" in self.made.components
        self.made.vae.register_to_config(force_upcast=False)  # it would take float64 for a half type

    def theirs(self, kind: str, scheduler: Any, monkeypatch: pytest.MonkeyPatch, noise: Tensor, **words: Any) -> Tensor:
        """Clean latents of diffusers' pipeline, from our noise: `noise` at the start, ours step by step."""
        pipeline_class, module = (XL_KINDS if self.xl else KINDS)[kind]
        parts: dict[str, Any] = {name: self.made.components[name] for name in ("vae", "text_encoder", "tokenizer", "unet")}
        if self.xl:
            parts |= {name: self.made.components[name] for name in ("text_encoder_2", "tokenizer_2")}
            parts |= {"force_zeros_for_empty_prompt": self.made.config.force_zeros_for_empty_prompt, "add_watermarker": False}
        else:
            parts |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        pipeline = pipeline_class(**parts, scheduler=scheduler)
        pipeline.set_progress_bar_config(disable=True)
        place = f"diffusers.pipelines.stable_diffusion{'_xl' if self.xl else ''}.{module}"
        monkeypatch.setattr(f"{place}.randn_tensor", lambda *_, **__: noise)
        if kind != "text":  # the likeliest latents, not drawn ones
            monkeypatch.setattr(f"{place}.retrieve_latents", lambda out, **_: out.latent_dist.mode())
        if hasattr(__import__(type(scheduler).__module__, fromlist=["x"]), "randn_tensor"):
            monkeypatch.setattr(f"{type(scheduler).__module__}.randn_tensor", Fed(seeds(len(noise))))
        with torch.no_grad():
            avoided = {"negative_prompt": [NEGATIVE] * len(PROMPTS), **words}
            return pipeline(PROMPTS, output_type="latent", **avoided).images

    def ours(self, noise: Tensor, edits: Any = (), negative: str = NEGATIVE, **words: Any) -> Tensor:
        """Clean latents of our engine."""
        own = seeds(len(noise))
        with torch.no_grad():
            settings = self.family.settings(Wanted(**words))
            return self.family.engine().draw(PROMPTS, own, settings, (SIDE, SIDE), negative=negative, latents=noise, edits=edits)[1]

    def pictures(self, ours: Tensor, theirs: Tensor) -> tuple[Tensor, Tensor]:
        """Both sides' latents as images."""
        with torch.no_grad():
            return self.family.codec.decode(ours), self.made.vae.decode(theirs / 0.25, return_dict=False)[0]


class Fed:
    """Hands diffusers the noise that our samplers draw, step by step."""

    def __init__(self, positions: list[int]) -> None:
        self.rng, self.step = Rng(0, positions), 0

    def __call__(self, shape: Any, dtype: Any = None, **_: Any) -> Tensor:
        self.step += 1
        return self.rng.normal(f"step{self.step - 1}", shape[1:]).to(dtype)


class Wide:
    """A module whose float32 is float64: diffusers' schedulers round to float32 in many places; so they do not."""

    def __init__(self, module: types.ModuleType) -> None:
        self._module = module

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, "float64" if name == "float32" else name)


def scheduler_of(kind: Any, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, target: Any = "epsilon", **changes: Any) -> Any:
    """A diffusers scheduler of Stable Diffusion's process; in float64, its code computes in float64 all through."""
    if dtype == torch.float64:
        place = __import__(kind.__module__, fromlist=["x"])
        monkeypatch.setattr(place, "torch", Wide(torch))
        monkeypatch.setattr(place, "np", Wide(np))
    values = {**Process(target=target).scheduler_config(), **changes}
    values.pop("_class_name")
    return kind.from_config(values)


def seeds(count: int) -> list[int]:
    return list(range(7, 7 + count))


def start_noise(dtype: torch.dtype) -> Tensor:
    return Rng(0, seeds(len(PROMPTS))).normal("init", (4, SIDE // FACTOR, SIDE // FACTOR)).to(dtype)


def bytes_of_pictures(count: int = 2) -> Tensor:
    return to_uint8(Pictures(count).load(range(count), range(count), SIDE, 0, False).image)


def as_image(pixels: Tensor, dtype: torch.dtype) -> Tensor:
    return pixels.permute(0, 3, 1, 2).to(dtype) / 127.5 - 1
