"""Export as a diffusers pipeline folder in fp32, fp16 or bf16, with variants and sharded weights."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ldm.config.errors import UserError
from ldm.formats.assembly import model_index
from ldm.formats.atomic import write_json, write_tensors
from ldm.formats.export_source import CARD, ExportedModel, ExportedNetwork
from ldm.formats.latent_codec import STATISTICS
from ldm.formats.model_card import model_card
from ldm.formats.model_folder import INDEX, OWN_CLIP, RECORD
from ldm.formats.part import CONFIG, WEIGHTS, content_hash, read_config
from ldm.formats.rounding import DTYPES, Comparison, compared, mapped, rounded, stored_bytes
from ldm.formats.text_folder import TEXT_PARTS
from ldm.formats.tokenizer_files import load_tokenizer, save_tokenizer
from ldm.models.dc_autoencoder import DCConfig
from ldm.models.pixels import PixelsConfig

STEMS = dict.fromkeys(TEXT_PARTS[:2], WEIGHTS[1])  # diffusers' file name for all others


def write_pipeline(
    source: ExportedModel, folder: Path, dtype: str, variant: str, shard_bytes: int, say: Callable[[str], None]
) -> list[Comparison]:
    """Fill an empty folder with a model, read every part back and compare it with its source.

    Args:
        source: the model.
        folder: where to; exists.
        dtype: fp32, fp16 or bf16.
        variant: fp16 for `.fp16` in the names of the weights; empty for none.
        shard_bytes: larger parts are written as several files with an index.
        say: told of each part as it is done.

    Raises:
        UserError: naming the weight that the precision cannot hold, or that was read back different.
    """
    done = []
    for name, part in source.parts.items():
        state = rounded(name, part.state, dtype)
        write_part(_opening(name, part), state, folder / name, STEMS.get(name, WEIGHTS[0]), variant, shard_bytes)
        del state
        done.append(compared(name, part.state, mapped((folder / name).glob("*.safetensors")), dtype, str(folder / name)))
        say(str(done[-1]))
    if source.statistics:
        write_json(folder / source.codec / STATISTICS, source.statistics.to_dict())
    for name, tokenizer in source.tokenizers.items():
        write_tokenizer(tokenizer, source.name, folder / name)
    if source.own_clip:
        shutil.copytree(source.own_clip, folder / OWN_CLIP)
    (folder / "scheduler").mkdir()
    write_json(folder / "scheduler" / "scheduler_config.json", source.scheduler)
    texts = {name: read_config(folder / name) for name in TEXT_PARTS if name in source.parts}
    index = model_index(source.autoencoder, source.scheduler["_class_name"], source.network, texts)
    write_json(folder / INDEX, index | source.index)
    record = {**source.record(), "autoencoder": content_hash(folder / source.codec)}
    write_json(folder / RECORD, record)
    (folder / CARD).write_text(_card(source, record | {"pipeline": index["_class_name"]}, dtype, variant), encoding="utf-8")
    return done


def write_part(config: dict[str, Any], state: Mapping[str, Tensor], folder: Path, stem: str, variant: str, shard_bytes: int) -> None:
    """config.json and the weights of a part in one file, or in several with an index as diffusers and transformers name them."""
    folder.mkdir(parents=True)
    dotted = f".{variant}" if variant else ""
    shards = _shards(state, shard_bytes)
    if len(shards) == 1:
        write_tensors(folder / f"{stem}{dotted}.safetensors", shards[0])
    else:
        where: dict[str, str] = {}
        for number, shard in enumerate(shards, 1):
            file = f"{stem}{dotted}-{number:05d}-of-{len(shards):05d}.safetensors"
            write_tensors(folder / file, shard)
            where |= dict.fromkeys(shard, file)
        index = {"metadata": {"total_size": stored_bytes(state)}, "weight_map": where}
        write_json(folder / f"{stem}.safetensors.index{dotted}.json", index)
    write_json(folder / CONFIG, config)


def _shards(state: Mapping[str, Tensor], limit: int) -> list[dict[str, Tensor]]:
    """The tensors in order, as few at a time as fit the limit; one that is larger stands alone."""
    shards: list[dict[str, Tensor]] = [{}]
    room = limit
    for name, value in state.items():
        size = value.numel() * value.element_size()
        if size > room and shards[-1]:
            shards.append({})
            room = limit
        shards[-1][name] = value
        room -= size
    return shards


def write_tokenizer(tokenizer: Any, name: str, folder: Path) -> None:
    """A model's tokenizer in both layouts, checked to give the same words the same numbers when it is read back.

    Raises:
        UserError: if it does not.
    """
    folder.mkdir()
    save_tokenizer(tokenizer, folder)
    probe = ["", "a red circle!", "Ünïcode — 漢字 <|endoftext|> it's 12345", name]
    back, given = (one(probe, truncation=True).input_ids for one in (load_tokenizer(folder), tokenizer))
    if back != given:
        raise UserError(f"{folder}: the tokenizer came back different; nothing was kept, export again")


def _opening(name: str, part: ExportedNetwork) -> dict[str, Any]:
    """A part's config.json. A text model's asks for float32, which is what diffusers opens the other parts in unless told
    otherwise; transformers would follow the file, and the pipeline would stop at its first step."""
    return {**part.config, "dtype": "float32"} if name in STEMS else part.config


def _card(source: ExportedModel, record: dict[str, Any], dtype: str, variant: str) -> str:
    stock = source.network.stock and source.clip and not isinstance(source.autoencoder, DCConfig | PixelsConfig)
    if source.card:
        return source.card
    if not source.story:
        said = "A latent text-to-image diffusion model that ldm has not trained, only written anew."
        return f"# {source.name}\n\n{said}\n{_copy(dtype, variant)}"
    return model_card(source.story, record, vq=source.codec == "vqvae", pipeline=record["pipeline"], stock=stock) + _copy(dtype, variant)


def _copy(dtype: str, variant: str) -> str:
    kind = str(DTYPES[dtype])
    words = [f'variant="{variant}"'] if variant else []
    words += [f"torch_dtype={kind}"] if dtype != "fp32" else []
    how = f"; give diffusers' `from_pretrained` the words `{', '.join(words)}`" if words else ""
    return f"\n## This copy\n\nIts weights are {kind.removeprefix('torch.')}{how}.\n"
