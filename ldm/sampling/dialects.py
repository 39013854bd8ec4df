"""Dialects: how programs name what they write into their pictures, value by value."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Dialect:
    """How a program names what it writes.

    Args:
        program: its name.
        names: our field by the name there; besides them `sampler`, `spacing`, `model`, `loras`, `clip_skip`, `size` and `init`.
        idle: names of what changes no picture here.
        first_skip: what the program calls reading the text encoder's last layer, from which it counts on.
        marks: what in a prompt has another meaning here, and what it is.
    """

    program: str
    names: Mapping[str, str]
    idle: frozenset[str] = frozenset()
    first_skip: int = 1
    marks: tuple[str, str] = ("", "")


INVOKE = Dialect(
    "InvokeAI",
    {
        "positive_prompt": "prompt",
        "negative_prompt": "negative",
        "steps": "steps",
        "cfg_scale": "guidance",
        "cfg_rescale_multiplier": "rescale",
        "seed": "seed",
        "width": "width",
        "height": "height",
        "scheduler": "sampler",
        "model": "model",
        "loras": "loras",
        "clip_skip": "clip_skip",
        "strength": "init",
    },
    frozenset({"app_version", "rand_device", "generation_mode", "type", "_canvas_objects"}),
    first_skip=0,
    marks=(r"[\w)][+-]{2,}|\)[+-]|\.(?:and|blend|swap)\(", "weights of InvokeAI's notation (++, .and()), which are words here"),
)
NOVEL = Dialect(
    "NovelAI",
    {
        "prompt": "prompt",
        "uc": "negative",
        "steps": "steps",
        "scale": "guidance",
        "cfg_rescale": "rescale",
        "seed": "seed",
        "width": "width",
        "height": "height",
        "sampler": "sampler",
        "noise_schedule": "spacing",
    },
    frozenset({"n_samples", "signed_hash", "request_type", "version", "params_version", "legacy", "legacy_v3_extend", "hide_debug_overlay"})
    | {"dynamic_thresholding_percentile", "dynamic_thresholding_mimic_scale", "uncond_scale", "v4_prompt", "v4_negative_prompt"}
    | {"strength", "noise"},
    marks=(r"[{}\[\]]", "brackets, by which a word weighs 1.05 times more or less there"),
)
FOOOCUS = Dialect(
    "Fooocus",
    {
        "prompt": "prompt",
        "negative_prompt": "negative",
        "steps": "steps",
        "guidance_scale": "guidance",
        "seed": "seed",
        "resolution": "size",
        "sampler": "sampler",
        "scheduler": "spacing",
        "base_model": "model",
        "loras": "loras",
        "clip_skip": "clip_skip",
    },
    frozenset({"version", "base_model_hash", "full_prompt", "full_negative_prompt", "created_by", "metadata_scheme", "lora_combined"}),
)
SWARM = Dialect(
    "SwarmUI",
    {
        "prompt": "prompt",
        "negativeprompt": "negative",
        "steps": "steps",
        "cfgscale": "guidance",
        "seed": "seed",
        "width": "width",
        "height": "height",
        "sampler": "sampler",
        "scheduler": "spacing",
        "model": "model",
        "clipstopatlayer": "clip_skip",
        "initimagecreativity": "init",
    },
    frozenset({"swarm_version", "aspectratio", "images", "date", "generation_time", "sidelength"}),
)
EASY = Dialect(
    "Easy Diffusion",
    {
        "prompt": "prompt",
        "negative_prompt": "negative",
        "num_inference_steps": "steps",
        "guidance_scale": "guidance",
        "seed": "seed",
        "width": "width",
        "height": "height",
        "sampler_name": "sampler",
        "use_stable_diffusion_model": "model",
        "prompt_strength": "init",
    },
)
INVOKE_2 = Dialect(
    "InvokeAI 2",
    {
        "prompt": "prompt",
        "negative": "negative",
        "steps": "steps",
        "cfg_scale": "guidance",
        "seed": "seed",
        "width": "width",
        "height": "height",
        "sampler": "sampler",
        "model_weights": "model",
        "strength": "init",
    },
    frozenset({"app_id", "app_version", "model", "model_id", "model_hash", "type", "orig_hash", "mask_hash", "init_image_path", "variant"}),
    marks=INVOKE.marks,
)
DREAM = {  # the letters of InvokeAI 2's command line, as its own names
    **{"s": "steps", "S": "seed", "W": "width", "H": "height", "C": "cfg_scale", "A": "sampler", "f": "strength", "n": "type"},
    **{"G": "face restoration", "U": "upscaling", "I": "init_image_path", "M": "mask", "v": "variation", "V": "variations"},
}
DRAW_THINGS = Dialect(
    "Draw Things",
    {
        "c": "prompt",
        "uc": "negative",
        "steps": "steps",
        "scale": "guidance",
        "seed": "seed",
        "size": "size",
        "sampler": "sampler",
        "model": "model",
        "lora": "loras",
        "clip_skip": "clip_skip",
    },
    # Tiles and blurs of masks that it writes always; sizes that an XL model is told are told of every other model, too.
    frozenset({"seed_mode", "mask_blur", "mask_blur_outset", "profile", "v2", "original_size", "target_size", "negative_original_size"})
    | {"decoding_tile_width", "decoding_tile_height", "decoding_tile_overlap", "diffusion_tile_width", "diffusion_tile_height"}
    | {"diffusion_tile_overlap", "tiled_decoding", "first_stage_size", "second_stage_strength", "refiner_start", "preserve_original"},
)
RUINED = Dialect(
    "RuinedFooocus",
    {
        "Prompt": "prompt",
        "Negative": "negative",
        "steps": "steps",
        "cfg": "guidance",
        "seed": "seed",
        "width": "width",
        "height": "height",
        "sampler_name": "sampler",
        "scheduler": "spacing",
        "base_model_name": "model",
        "loras": "loras",
        "clip_skip": "clip_skip",
        "denoise": "init",
    },
    frozenset({"software", "base_model_hash", "start_step", "switch"}),
)
KOHYA = Dialect(
    "kohya's gen_img",
    {"prompt": "prompt", "negative-prompt": "negative", "steps": "steps", "scale": "guidance", "seed": "seed", "sampler": "sampler"},
    frozenset({"raw-prompt", "original-height", "original-width", "original-height-negative", "original-width-negative"}),
)
