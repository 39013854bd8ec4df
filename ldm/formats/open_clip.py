"""OpenCLIP conversion: its towers and tokenizer as transformers' CLIPTextModel, CLIPVisionModelWithProjection and CLIPTokenizer."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torch import Tensor

from ldm.config.errors import UserError
from ldm.config.foreign import short
from ldm.formats.text_folder import SPECIAL

RENAMED = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
    "attn.out_proj": "self_attn.out_proj",
}


def architectures() -> dict[str, Path]:
    """OpenCLIP's architectures by name, each with its configuration, found without an import; none: it is not installed."""
    found = find_spec("open_clip")
    folders = [] if found is None else found.submodule_search_locations or []
    return {file.stem: file for folder in folders for file in sorted(Path(folder, "model_configs").glob("*.json"))}


def check_architecture(name: str) -> None:
    """Refuse a name that OpenCLIP has not.

    Raises:
        UserError: with those that are nearest.
    """
    known = architectures()
    if name not in known:
        letters = {each.casefold(): each for each in known}
        near = [letters[each] for each in difflib.get_close_matches(name.casefold().replace("/", "-"), letters)]
        meant = f"; did you mean {' or '.join(near)}?" if near else ""
        raise UserError(f"architecture: {short(name)} is none of OpenCLIP's{meant}")


def from_open_clip(state: dict[str, Tensor], layers: int) -> dict[str, Tensor]:
    """An OpenCLIP text tower's weights under a CLIPTextModel's names; the image tower's are left out."""
    outer = {
        "token_embedding.weight": "embeddings.token_embedding.weight",
        "positional_embedding": "embeddings.position_embedding.weight",
        "ln_final.weight": "final_layer_norm.weight",
        "ln_final.bias": "final_layer_norm.bias",
    }
    return {new: state[old] for old, new in outer.items() if old in state} | _blocks(state, layers, "", "")


def tower_size(state: Mapping[str, Tensor]) -> dict[str, int]:
    """What the weights of an OpenCLIP tell of its text tower, by the names of its text_cfg; what they do not tell is left out."""
    found: dict[str, int] = {}
    for name, sides in (("token_embedding.weight", ("vocab_size", "width")), ("positional_embedding", ("context_length", "width"))):
        value = next((state[prefix + name] for prefix in ("", "text.") if prefix + name in state), None)
        if value is not None and value.ndim == 2:
            found |= dict(zip(sides, value.shape, strict=True))
    numbers = [int(told[1]) for name in state if (told := re.match(r"(?:text\.)?transformer\.resblocks\.(\d{1,4})\.", name))]
    return found | ({"layers": max(numbers) + 1} if numbers else {})


def vision_from_open_clip(state: dict[str, Tensor], layers: int) -> dict[str, Tensor]:
    """An OpenCLIP image tower's weights under a CLIPVisionModelWithProjection's names; the text tower's are left out."""
    inner = "vision_model."
    outer = {
        "class_embedding": f"{inner}embeddings.class_embedding",
        "conv1.weight": f"{inner}embeddings.patch_embedding.weight",
        "positional_embedding": f"{inner}embeddings.position_embedding.weight",
        **{f"ln_pre.{kind}": f"{inner}pre_layrnorm.{kind}" for kind in ("weight", "bias")},
        **{f"ln_post.{kind}": f"{inner}post_layernorm.{kind}" for kind in ("weight", "bias")},
    }
    found = {new: state[f"visual.{old}"] for old, new in outer.items() if f"visual.{old}" in state}
    if "visual.proj" in state:
        found["visual_projection.weight"] = state["visual.proj"].T
    return found | _blocks(state, layers, "visual.", inner)


def _blocks(state: dict[str, Tensor], layers: int, theirs: str, ours: str) -> dict[str, Tensor]:
    """The blocks of a tower whose weights have the prefix `theirs`, under the names of transformers with the prefix `ours`."""
    found = {}
    for layer in range(layers):
        old, new = f"{theirs}transformer.resblocks.{layer}.", f"{ours}encoder.layers.{layer}."
        for kind in ("weight", "bias"):
            for name, renamed in RENAMED.items():
                if f"{old}{name}.{kind}" in state:
                    found[f"{new}{renamed}.{kind}"] = state[f"{old}{name}.{kind}"]
            joined = state.get(f"{old}attn.in_proj_{kind}")
            if joined is not None:
                for name, part in zip("qkv", joined.chunk(3), strict=True):
                    found[f"{new}self_attn.{name}_proj.{kind}"] = part
    return found


def open_clip_tokenizer(padding_ends: bool = False) -> Any:
    """OpenCLIP's own tokenizer, which has the words of OpenAI's CLIP, as CLIPTokenizer.

    Args:
        padding_ends: pad with end tokens as OpenAI's CLIP and Stable Diffusion 1, not with the token of `!`, number 0, as
            OpenCLIP and Stable Diffusion 2.
    """
    from open_clip.tokenizer import SimpleTokenizer
    from transformers import CLIPTokenizer

    theirs = SimpleTokenizer()
    named = {"<start_of_text>": SPECIAL[0], "<end_of_text>": SPECIAL[1]}
    vocab = {named.get(word, word): number for word, number in theirs.encoder.items()}
    padding = SPECIAL[1] if padding_ends else "!"
    return CLIPTokenizer(vocab=vocab, merges=list(theirs.bpe_ranks), model_max_length=77, pad_token=padding)
