"""Text encoders that others have trained: of a Stable Diffusion, a CLIP or T5 of transformers, or an OpenCLIP."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from ldm.config import Count, Positive, config
from ldm.errors import UserError
from ldm.folder import hub_folder, load_module, read_json, read_safetensors
from ldm.models.text_tower import TextTower
from ldm.text import SPECIAL, TextEncoder
from ldm.text_files import load_text_model, load_tokenizer, tower_state

OPEN_CLIP = "open_clip_config.json"
WORDS = ["*.json", "merges.txt", "spiece.model"]  # on the hub: configurations and vocabularies


@config
class PretrainedText:
    """A text encoder from a folder or from the Hugging Face Hub, used as it is."""

    kind: Literal["pretrained"] = "pretrained"
    path: str  # a model folder, the folder of a CLIP, T5 or OpenCLIP, or its name on the hub as owner/name
    max_tokens: Positive = 77  # longer captions are cut; CLIP has no more than 77
    skip_last: Count = 0  # CLIP's layers left out at the end; 1 as in Stable Diffusion 2

    def build(self) -> TextEncoder:
        """The encoder, frozen.

        Raises:
            UserError: naming what is missing, damaged or of another kind.
        """
        folder = text_folder(self.path)
        if (folder / "text_encoder").is_dir():
            encoder = TextEncoder.load(folder)
        elif (folder / OPEN_CLIP).is_file() and not (folder / "config.json").is_file():
            encoder = load_open_clip(folder)
        else:
            encoder = TextEncoder(load_text_model(folder), load_tokenizer(folder))
        if self.skip_last:
            _skip_last(encoder.model, self.skip_last)
        encoder.tokenizer.model_max_length = min(self.max_tokens, encoder.max_tokens)
        return encoder


def text_folder(path: str) -> Path:
    """Where a text encoder lies: a model's folder, a run's model, the encoder's own folder, or the hub's copy.

    Raises:
        UserError: if it is none of them.
    """
    folder = Path(path).expanduser()
    if not folder.is_dir():
        return _fetch(path)
    return folder / "model" if (folder / "model" / "text_encoder").is_dir() else folder


def _fetch(name: str) -> Path:
    folder = hub_folder(name, WORDS)
    if (folder / "text_encoder").is_dir():
        return hub_folder(name, ["text_encoder/*", "tokenizer/*"])
    weights = "model*.safetensors" if (folder / "config.json").is_file() else "open_clip*.safetensors"
    return hub_folder(name, [*WORDS, weights])


def _skip_last(model: Any, layers: int) -> None:
    if model.config.model_type == "t5":
        raise UserError(f"skip_last: got {layers}, but T5 is read after its last layer; write skip_last=0")
    if layers >= model.config.num_hidden_layers:
        raise UserError(f"skip_last: got {layers}, but this text encoder has only {model.config.num_hidden_layers} layers")
    model.config.num_hidden_layers -= layers
    encoder: Any = model.get_submodule("encoder")
    encoder.layers = encoder.layers[: model.config.num_hidden_layers]


def load_open_clip(folder: Path) -> TextEncoder:
    """An OpenCLIP's text tower as a CLIPTextModel: the same function, so a model folder with it opens in diffusers.

    Raises:
        UserError: naming what is missing, damaged or cannot be said in a CLIPTextModel.
    """
    values = read_json(folder / OPEN_CLIP).get("model_cfg")
    text = values.get("text_cfg") if isinstance(values, dict) else None
    if not isinstance(values, dict) or not isinstance(text, dict):
        raise UserError(f"{folder / OPEN_CLIP}: no model_cfg with a text_cfg in it; copy the whole folder again")
    known = {"context_length", "vocab_size", "width", "heads", "layers", "mlp_ratio"}
    usual = {"pool_type": "argmax", "proj_type": "linear", "pad_id": 0, "output_tokens": True}
    foreign = [name for name, value in text.items() if name not in known and value not in (None, False, usual.get(name))]
    if foreign:
        raise UserError(f"{folder / OPEN_CLIP}: text_cfg.{foreign[0]} is not supported; only CLIP's own text towers are")
    width, layers = int(text.get("width", 512)), int(text.get("layers", 12))
    tokenizer = load_tokenizer(folder) if (folder / "vocab.json").is_file() else open_clip_tokenizer()
    made = dict(
        vocab_size=int(text.get("vocab_size", 49408)), hidden_size=width, num_hidden_layers=layers,
        intermediate_size=int(width * text.get("mlp_ratio", 4)), num_attention_heads=int(text.get("heads", 8)),
        max_position_embeddings=int(text.get("context_length", 77)), projection_dim=int(values.get("embed_dim", width)),
        hidden_act="quick_gelu" if values.get("quick_gelu") else "gelu", bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    state = from_open_clip(_weights(folder), layers)
    model = load_module(lambda: TextTower(made), tower_state(state), folder)
    return TextEncoder(model.float().eval().requires_grad_(False), tokenizer)


def _weights(folder: Path) -> dict[str, Tensor]:
    files = sorted(folder.glob("open_clip*.safetensors"))
    if not files:
        raise UserError(f"{folder}: no open_clip_model.safetensors here; pickled weights (.bin, .pt) are not read, convert them")
    state = read_safetensors(files[0])
    if any(name.startswith("text.transformer.") for name in state):  # OpenCLIP's towers apart
        return {name.removeprefix("text."): value for name, value in state.items() if name.startswith("text.")}
    return state


RENAMED = {
    "ln_1": "layer_norm1", "ln_2": "layer_norm2", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2",
    "attn.out_proj": "self_attn.out_proj",
}  # fmt: skip


def from_open_clip(state: dict[str, Tensor], layers: int) -> dict[str, Tensor]:
    """An OpenCLIP text tower's weights under a CLIPTextModel's names; the image tower's are left out."""
    outer = {
        "token_embedding.weight": "embeddings.token_embedding.weight",
        "positional_embedding": "embeddings.position_embedding.weight",
        "ln_final.weight": "final_layer_norm.weight",
        "ln_final.bias": "final_layer_norm.bias",
    }
    found = {new: state[old] for old, new in outer.items() if old in state}
    for layer in range(layers):
        old, new = f"transformer.resblocks.{layer}.", f"encoder.layers.{layer}."
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
