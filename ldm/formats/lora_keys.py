"""Names of an adapter's weights in files: peft's, diffusers', kohya's, LyCORIS' and OneTrainer's keys, and layers under sgm's names."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, NamedTuple

from ldm.config.errors import UserError
from ldm.formats.compvis import PREFIX, to_compvis
from ldm.models.lora import TEXT_PREFIX, Part, flat, flat_prefix
from ldm.models.unet import UNetConfig

PARTS: dict[str, Part] = {
    "unet": "unet",
    "transformer": "unet",
    "diffusion_model": "unet",
    "text_encoder": "text_encoder",
    "text_encoder_2": "text_encoder_2",
}
FLAT_PARTS: dict[str, Part] = {  # the longer ones first
    "lora_unet_": "unet",
    "lora_transformer_": "unet",
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
    "lora_te_": "text_encoder",
}
BUNDLED = "bundle_emb."  # of an embedding that OneTrainer puts into the file: bundle_emb.WORD.KEY, with the keys of an embedding's file
ENDS = {  # of a key, after the layer's name: what the weight is to its layer
    "lora_A.weight": "down",
    "lora_B.weight": "up",
    "lora_B.bias": "up_bias",
    "lora_A.default.weight": "down",
    "lora_B.default.weight": "up",
    "lora_B.default.bias": "up_bias",
    "lora_magnitude_vector": "peft_magnitude",
    "lora_magnitude_vector.weight": "peft_magnitude",
    "lora_magnitude_vector.default": "peft_magnitude",
    "lora_magnitude_vector.default.weight": "peft_magnitude",
    "lora.down.weight": "down",
    "lora.up.weight": "up",
    "lora_linear_layer.down.weight": "down",
    "lora_linear_layer.up.weight": "up",
    "lora_down.weight": "down",
    "lora_up.weight": "up",
    "lora_mid.weight": "mid",
    "alpha": "alpha",
    "dora_scale": "magnitude",
    "diff": "diff",
    "diff_b": "bias",
    "w_norm": "diff",
    "b_norm": "bias",
    **{name: name for name in ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2")},
    **{name: name for name in ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")},
}
PROCESSOR = re.compile(r"(to_q|to_k|to_v|to_out)_lora\.(down|up)\.weight")  # diffusers' of 2023, after LAYER.processor.
CUSTOM = re.compile(r"(to_k|to_v)_custom_diffusion\.weight")  # Custom Diffusion's, likewise
TEXT_STARTS = (TEXT_PREFIX, flat_prefix(), "encoder.", "encoder_layers", "embeddings", "final_layer_norm", "text_projection")
LONGEST = 1000  # characters of a key


class Place(NamedTuple):
    """Where a weight belongs."""

    part: Part
    layer: str  # dotted or flat, without the text model's prefix
    role: str  # one of ENDS' values
    written: str  # the layer as the file has it, which patterns are matched against


def place_of(key: str, usual: Part | None = None) -> Place | None:
    """Where the weight of a key belongs; None: in no adapter that is known here.

    Args:
        usual: the part of keys that do not name one; None: as the layer's name says.
    """
    words = key.split(".") if len(key) <= LONGEST else []
    for count in range(min(4, len(words) - 1), 0, -1):
        if role := ENDS.get(".".join(words[-count:])):
            return _placed(".".join(words[:-count]), role, usual)
    head, marked, end = key.partition(".processor.")
    if words and marked and (found := PROCESSOR.fullmatch(end)):
        return _placed(f"{head}.{found[1].replace('to_out', 'to_out.0')}", found[2], usual)
    if words and marked and (found := CUSTOM.fullmatch(end)):
        return _placed(f"{head}.{found[1]}", "whole", usual)
    return None


def _placed(head: str, role: str, usual: Part | None) -> Place | None:
    if prefix := next((prefix for prefix in FLAT_PARTS if head.startswith(prefix)), None):
        written = head.removeprefix(prefix)
        return Place(FLAT_PARTS[prefix], written.removeprefix(flat_prefix()), role, written)
    first, _, rest = head.removeprefix("base_model.model.").partition(".")
    part = PARTS.get(first) if rest else None
    written = (rest if part else head).removeprefix("base_model.model.").removeprefix("lycoris_")
    if part is None:
        part = usual or ("text_encoder" if written.startswith(TEXT_STARTS) else "unet")
    layer = written.removeprefix(TEXT_PREFIX)
    return Place(part, layer, role, written) if layer else None


def sgm_names(config: Any, layers: Iterable[str]) -> dict[str, str]:
    """The layers of a U-Net by their flat names in sgm's (CompVis') code: `middle_block_1_transformer_blocks_0_attn1_to_q`, ...

    Args:
        config: of the denoising network; for another one than a U-Net there are none.
        layers: dotted names.
    """
    if not isinstance(config, UNetConfig):
        return {}
    found = {}
    for layer in layers:
        try:
            [theirs] = to_compvis("unet", config, {f"{layer}.weight": None})  # type: ignore[dict-item]
        except UserError:  # one that their code has no name for
            continue
        found[flat(theirs.removeprefix(PREFIX["unet"]).removesuffix(".weight"))] = layer
    return found
