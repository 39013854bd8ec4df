"""Model folder of a token model: in masked order with a CLIP one that diffusers' AmusedPipeline opens."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ldm.config.version import __version__
from ldm.families.draws import BEFORE, SMALL
from ldm.formats import atomic
from ldm.formats.latent_codec import STATISTICS, LatentCodec, autoencoder_folder, load_codec
from ldm.formats.model_folder import INDEX, OWN_CLIP, RECORD, own_clip, read_record
from ldm.formats.part import content_hash, load_part, save_part
from ldm.formats.text_folder import TEXT_PARTS, load_text_model, save_text_model
from ldm.models.palette import CLASS as PALETTE
from ldm.models.palette import Palette
from ldm.models.text_tower import TextTower
from ldm.models.token_transformer import STOCK

PART, CODEC, SMALL_CODEC = "transformer", "vqvae", "small_vqvae"
LAST = "decoder.conv_out"


def assemble(products: Mapping[str, Path], target: Path, said: Mapping[str, Any], before: Callable[[Path], None] | None = None) -> None:
    """Put a token model, its text encoder and its autoencoder together as a model folder, committed at once.

    AmusedPipeline decodes to [0,1], so the decoder's last convolution is scaled by a half and shifted; it reads a pooled text that is
    projected, and ours is not, so a CLIP is written with the identity as its projection.

    Args:
        products: folders by role: text if it reads any, autoencoder, that of a smaller picture if it reads one, and the trained `model`.
        target: the model folder; replaced when it is there.
        said: what ldm.json says: kind, config, story.
        before: puts the model before it in a chain into a folder; None: there is none.
    """
    text, source = products.get("text"), autoencoder_folder(products["autoencoder"])
    record = read_record(products["model"])

    def write(folder: Path) -> None:
        network, weights = load_part(products["model"] / PART)
        save_part(network, weights, folder / PART)
        config, state = load_part(source)
        if f"{LAST}.weight" in state:
            state |= {f"{LAST}.weight": state[f"{LAST}.weight"] / 2, f"{LAST}.bias": (state[f"{LAST}.bias"] + 1) / 2}
            config |= {"lookup_from_codebook": True}
        save_part(config, state, folder / CODEC)
        if (source / STATISTICS).exists():
            shutil.copy(source / STATISTICS, folder / CODEC)
        if SMALL in products:
            shutil.copytree(autoencoder_folder(products[SMALL]), folder / SMALL_CODEC)
        if before is not None:
            before(folder / BEFORE)
        stock = text is not None and _text(text, folder, network["_class_name"] == STOCK) and f"{LAST}.weight" in state
        (folder / "scheduler").mkdir()
        codes = len(state["quantize.embedding.weight"])
        scheduler = {"_class_name": "AmusedScheduler", "mask_token_id": codes, "masking_schedule": "cosine"}
        atomic.write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
        atomic.write_json(folder / INDEX, _index(stock, config["_class_name"], text is not None))
        atomic.write_json(folder / RECORD, {**record, **said, "autoencoder": content_hash(folder / CODEC), "ldm_version": __version__})
        (folder / "README.md").write_text(_card(said, stock), encoding="utf-8")

    atomic.commit(target, write)


def _text(source: Path, folder: Path, projected: bool) -> bool:
    """Copy a text encoder's parts, a CLIP's `projected` by the identity; whether it is that."""
    model = load_text_model(source / TEXT_PARTS[0]) if not (source / TEXT_PARTS[1]).is_dir() else None
    for name in TEXT_PARTS:
        if (source / name).is_dir():
            shutil.copytree(source / name, folder / name)
    if clip := own_clip(source):
        shutil.copytree(clip, folder / OWN_CLIP)
    if not projected or not isinstance(model, TextTower):
        return False
    width = model.config.hidden_size
    projection = nn.Linear(width, width, bias=False)
    projection.weight.data.copy_(torch.eye(width))
    shutil.rmtree(folder / TEXT_PARTS[0])
    save_text_model(model, folder / TEXT_PARTS[0], projection)
    return True


def assemble_writer(products: Mapping[str, Path], target: Path, said: Mapping[str, Any], keep: Sequence[str]) -> None:
    """Put a model that writes captions or scenes together as a model folder, committed at once; no other program opens it.

    Args:
        products: folders by role: `model`, and where it reads or writes by them text and autoencoder.
        target: the model folder; replaced when it is there.
        said: what ldm.json says: kind, config, story.
        keep: folders of the text encoder's product that belong to it.
    """

    def write(folder: Path) -> None:
        shutil.copytree(products["model"] / PART, folder / PART)
        for name in keep if "text" in products else ():
            if (products["text"] / name).is_dir():
                shutil.copytree(products["text"] / name, folder / name)
        if "autoencoder" in products:
            shutil.copytree(autoencoder_folder(products["autoencoder"]), folder / CODEC)
        atomic.write_json(folder / RECORD, {**read_record(products["model"]), **said, "ldm_version": __version__})

    atomic.commit(target, write)


def codec_of(folder: Path) -> LatentCodec:
    """The autoencoder of such a folder, decoding to [-1,1] again."""
    codec = load_codec(folder / CODEC)
    if isinstance(codec.network, Palette):
        return codec
    with torch.no_grad():
        last = codec.network.get_submodule(LAST)
        assert isinstance(last, nn.Conv2d) and last.bias is not None
        last.weight.mul_(2)
        last.bias.mul_(2).sub_(1)
    return codec


def _index(stock: bool, codec: str, worded: bool) -> dict[str, Any]:
    """model_index.json of an autoencoder of the class `codec`, with a text encoder if it is `worded`."""
    import diffusers

    text = {"tokenizer": ["transformers", "CLIPTokenizer"], "text_encoder": ["transformers", "CLIPTextModelWithProjection"]}
    return {
        "_class_name": "AmusedPipeline" if stock else "DiffusionPipeline",
        "_diffusers_version": diffusers.__version__,
        "vqvae": ["ldm" if codec == PALETTE else "diffusers", codec],
        **(text if worded else {}),
        "transformer": ["diffusers" if stock else "ldm", STOCK if stock else "TokenTransformer"],
        "scheduler": ["diffusers", "AmusedScheduler"],
    }


def _card(said: Mapping[str, Any], stock: bool) -> str:
    """README.md, as the Hugging Face Hub reads it."""
    story, defaults = said["story"], said["config"]["defaults"]
    prompt = story.get("prompt", "a picture")
    lines = f'''With diffusers:

```python
from diffusers import AmusedPipeline

pipeline = AmusedPipeline.from_pretrained("MODEL")
image = pipeline("{prompt}", num_inference_steps={defaults["steps"]}, guidance_scale={defaults["guidance"]},
                 temperature=({defaults["noise"]:g}, 0)).images[0]
```'''
    stages = "\n".join(f"| {name} | {text} |" for name, text in story.get("stages", {}).items())
    return f"""---
library_name: diffusers
pipeline_tag: text-to-image
tags: [ldm, text-to-image, token-transformer]
---

# {story.get("name", "A token model")}

A transformer over the codes of a VQ autoencoder, in {said["config"]["order"]} order, trained with `ldm` on
{story.get("data", "its user's data")}.

## Use

With ldm: `python sample.py "{prompt}" --model MODEL`

{lines if stock else "No other program opens it."}

## How it was made

| Stage | |
|---|---|
{stages}

## Limits

It knows what its training captions showed and nothing else. It has no safety filter. Its licence is the choice of whoever
trained it, within the rights to the training data.
"""
