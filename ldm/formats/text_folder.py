"""Text encoders and tokenizers (CLIP, T5) in transformers' layout, read and written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ldm.config.errors import UserError
from ldm.formats.part import AGAIN, load_module, load_part, read_json, save_part, write_whole
from ldm.models.text_tower import TextTower

PROJECTING = "CLIPTextModelWithProjection"
PROJECTION = "text_projection.weight"
T5_FIELDS = (
    "vocab_size",
    "d_model",
    "d_kv",
    "d_ff",
    "num_layers",
    "num_heads",
    "relative_attention_num_buckets",
    "relative_attention_max_distance",
    "layer_norm_epsilon",
    "feed_forward_proj",
    "eos_token_id",
    "pad_token_id",
)


def load_text_model(part: Path) -> Any:
    """The frozen CLIPTextModel or T5EncoderModel in a folder; of a whole CLIP or T5 its text encoder.

    Only named fields of config.json are read, and weights from safetensors alone, so that a stranger's folder is data.

    Raises:
        UserError: naming what is missing, damaged or something else.
    """
    values, state = load_part(part)
    kind = (values.get("architectures") or ["CLIPTextModel"])[0]
    try:
        if kind in ("CLIPTextModel", PROJECTING, "CLIPModel"):
            model = load_module(lambda: TextTower(values.get("text_config", values)), tower_state(state), part)
        elif kind in ("T5EncoderModel", "T5ForConditionalGeneration", "T5Model"):
            model = load_module(_t5(values), _t5_state(state), part)
        else:
            raise UserError(f"{part}: a CLIPTextModel or T5EncoderModel was expected, but its config.json says {kind}")
    except UserError:
        raise
    except Exception as error:  # of transformers, on numbers that make no sense
        raise UserError(f"{part / 'config.json'}: describes no {kind} ({first_line(error)}); {AGAIN}") from None
    return model.float().eval().requires_grad_(False)


def _t5(values: dict[str, Any]) -> Any:
    from transformers import T5Config, T5EncoderModel

    return lambda: T5EncoderModel(T5Config(**{name: values[name] for name in T5_FIELDS if name in values}))


PREFIX = "text_model."  # of a CLIP text model's weights in files; `TextTower` leaves it out


def tower_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A text model's weights, out of a whole CLIP's too, under the names of `TextTower`."""
    if any(name.startswith(PREFIX) for name in state):
        state = {name.removeprefix(PREFIX): value for name, value in state.items() if name.startswith(PREFIX)}
    return {name: value for name, value in state.items() if not name.endswith("position_ids")}


def _t5_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    names = ("shared.weight", "encoder.embed_tokens.weight")  # one table under two names
    table = next((state[name] for name in names if name in state), None)
    found = {name: value for name, value in state.items() if name.startswith("encoder.")}
    return found if table is None else {**found, **dict.fromkeys(names, table)}


def load_text_projection(part: Path) -> nn.Linear:
    """The projection of a CLIPTextModelWithProjection's pooled state into the space shared with images, frozen, (B,D) to (B,E).

    Raises:
        UserError: naming what is missing or damaged.
    """
    values, state = load_part(part)
    sides = (values.get("hidden_size", 512), values.get("projection_dim", 512))
    found = {name.removeprefix("text_projection."): value for name, value in state.items() if name == PROJECTION}
    return load_module(lambda: nn.Linear(*sides, bias=False), found, part).eval().requires_grad_(False)


def save_text_model(model: Any, part: Path, projection: nn.Linear | None = None) -> None:
    """Write a CLIPTextModel or T5EncoderModel as any version of transformers reads it; with a projection, a CLIPTextModelWithProjection."""
    config, state = text_part(model)
    if projection is not None:
        config = {**config, "architectures": [PROJECTING], "projection_dim": projection.out_features}
        state = {**state, PROJECTION: projection.weight}
    save_part(config, state, part, "model")


def text_part(model: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """config.json and the weights of a CLIPTextModel or T5EncoderModel as any version of transformers reads them."""
    name = "T5EncoderModel" if model.config.model_type == "t5" else "CLIPTextModel"
    config = {**json.loads(model.config.to_json_string()), "architectures": [name]}
    state = dict(model.state_dict())
    if config["model_type"] == "t5":
        del state["encoder.embed_tokens.weight"]  # the same table as shared.weight
    else:
        state = {PREFIX + name.removeprefix(PREFIX): value for name, value in state.items()}
    return config, state


def load_tokenizer(part: Path) -> Any:
    """The tokenizer in a folder: CLIP's byte pairs, or T5's pieces.

    Raises:
        UserError: naming what is missing or damaged.
    """
    from transformers import CLIPTokenizer
    from transformers import T5TokenizerFast as T5Tokenizer  # type: ignore[attr-defined]

    if not part.is_dir():
        raise UserError(f"{part}: no such folder; {AGAIN}")
    files = {name: part / name for name in ("tokenizer.json", "vocab.json", "merges.txt", "spiece.model")}
    clip, pieces = files["vocab.json"].is_file() and files["merges.txt"].is_file(), files["spiece.model"].is_file()
    if not (clip or pieces or files["tokenizer.json"].is_file()):
        raise UserError(f"{part}: no tokenizer.json here, nor vocab.json with merges.txt; {AGAIN}")
    with quiet():
        try:
            if clip or (not pieces and read_json(files["tokenizer.json"])["model"]["type"] == "BPE"):
                return CLIPTokenizer.from_pretrained(part, local_files_only=True)
            return T5Tokenizer.from_pretrained(part, local_files_only=True)
        except UserError:
            raise
        except Exception as error:  # of transformers, tokenizers and the file system
            raise UserError(f"{part}: cannot be loaded ({first_line(error)}); {AGAIN}") from None


def save_tokenizer(tokenizer: Any, part: Path) -> None:
    """Write a tokenizer as transformers reads it; byte pairs also as vocab.json and merges.txt, which older programs want."""
    tokenizer.save_pretrained(part)
    bpe = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    if bpe["type"] != "BPE":
        return
    write_whole(part / "vocab.json", json.dumps(bpe["vocab"], ensure_ascii=False).encode())
    lines = ["#version: 0.2", *(pair if isinstance(pair, str) else " ".join(pair) for pair in bpe["merges"])]
    write_whole(part / "merges.txt", ("\n".join(lines) + "\n").encode())


class quiet:
    """Within it transformers shows no progress bars and no advice."""

    def __enter__(self) -> None:
        from transformers.utils import logging

        self.level = logging.get_verbosity()
        logging.set_verbosity_error()
        logging.disable_progress_bar()

    def __exit__(self, *problem: object) -> None:
        from transformers.utils import logging

        logging.set_verbosity(self.level)
        logging.enable_progress_bar()


def first_line(error: BaseException) -> str:
    """What an exception says first, at most 200 characters of it."""
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__


SPECIAL = ("<|startoftext|>", "<|endoftext|>")
