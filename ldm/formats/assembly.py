"""Assembly of the finished model: a diffusers pipeline folder from the products of training stages."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ldm.config.errors import UserError
from ldm.config.version import __version__
from ldm.formats import atomic
from ldm.formats.denoiser_folder import denoiser_folder
from ldm.formats.latent_codec import KINDS, STATISTICS, Codec, Statistics, autoencoder_folder, read_codec
from ldm.formats.model_card import model_card
from ldm.formats.model_folder import INDEX, OWN_CLIP, RECORD, own_clip
from ldm.formats.part import content_hash, load_part, read_config, read_json, save_part
from ldm.formats.text_folder import TEXT_PARTS
from ldm.models.autoencoder import KLConfig, VQConfig, fold_latent_stats
from ldm.models.dc_autoencoder import DCConfig
from ldm.models.denoiser import DenoiserConfig, config_of
from ldm.models.pixels import PixelsConfig


def assemble(
    text: Path | None,
    autoencoder: Path,
    diffusion: Path,
    target: Path,
    story: dict[str, Any],
    beside: Callable[[Path], None] = lambda folder: None,
) -> None:
    """Put the products of three stages together as a model folder, committed at once.

    A KL autoencoder's latent statistics are folded into its quant convolutions, so that its latents have unit variance
    with a scaling factor of 1 and any diffusers pipeline may use it; one from elsewhere keeps its own scaling factor. A VQ
    autoencoder keeps its statistics in latents.json.

    Args:
        text: holds text_encoder/ and tokenizer/; of a run's own CLIP also clip/, with which pictures are scored. None: no text is read.
        autoencoder: holds vae/ or vqvae/ with its latent statistics.
        diffusion: holds unet/ or transformer/, and ldm.json.
        target: the model folder; replaced when it is there.
        story: what the model card tells besides: name, data, stages, metrics.
        beside: writes what else lies in the folder.

    Raises:
        UserError: if the UNet was trained on another autoencoder.
    """
    record = json.loads((diffusion / RECORD).read_text())
    source = autoencoder_folder(autoencoder)
    codec, statistics = read_codec(source)
    part = "vqvae" if isinstance(codec, VQConfig) else "vae"  # a given one may lie in any folder
    if record["autoencoder"] != content_hash(source):
        raise UserError(f"{diffusion}: this UNet was trained on the latents of another autoencoder than {source}")

    def write(folder: Path) -> None:
        words = diffusion if (diffusion / "text_encoder").is_dir() else text  # one that has learned beside the UNet
        for name in TEXT_PARTS:
            if words is not None and (words / name).is_dir():
                shutil.copytree(words / name, folder / name)
        if text is not None and (clip := own_clip(text)):  # as it was trained: a text encoder that has learned since no longer fits it
            shutil.copytree(clip, folder / OWN_CLIP)
        if isinstance(codec, KLConfig):
            _fold(codec, statistics, source, folder / part, (record.get("pipeline") or {}).get("scaling_factor", 1.0))
        else:
            config, state = load_part(source)
            save_part(config, state, folder / part)
            if (source / STATISTICS).exists():
                shutil.copy(source / STATISTICS, folder / part)
        size = tuple(record["defaults"]["size"])
        config, state = load_part(denoiser_folder(diffusion))
        network = config_of(config)
        save_part({**config, "sample_size": size[0] // codec.factor}, state, folder / network.folder)
        (folder / "scheduler").mkdir()
        _write(folder / "scheduler" / "scheduler_config.json", record["scheduler"])
        told = record.get("pipeline")
        for name in told["parts"] if told else ():  # of the conditions
            shutil.copytree(diffusion / name, folder / name)
        for name, values in (told or {}).get("schedulers", {}).items():
            (folder / name).mkdir()
            _write(folder / name / "scheduler_config.json", values)
        texts = {name: read_config(folder / name) for name in TEXT_PARTS[:2] if (folder / name).is_dir()}
        index = model_index(codec, record["scheduler"]["_class_name"], network, texts, told)
        # Of a pair, what the network is told without a prompt.
        zeros = read_json(words / INDEX) if words is not None and (words / INDEX).is_file() else {}
        _write(folder / INDEX, index | zeros)
        if NOISING in index:
            shutil.copytree(folder / "scheduler", folder / NOISING)
        own = content_hash(folder / part)
        _write(folder / RECORD, {**record, "autoencoder": own, "ldm_version": __version__, "story": story})
        card = model_card(
            story,
            record,
            vq=part == "vqvae",
            pipeline=index["_class_name"],
            stock=network.stock and not isinstance(codec, DCConfig | PixelsConfig),
        )
        (folder / "README.md").write_text(card, encoding="utf-8")
        beside(folder)

    atomic.commit(target, write)


def _fold(made: KLConfig, statistics: Statistics, source: Path, target: Path, scale: float = 1.0) -> None:
    """Write the autoencoder so that `scale` times its latents have unit variance; with a scale of 1 one from elsewhere as it is."""
    config, state = load_part(source)
    if scale == 1 and not (
        statistics.images or made.shift_factor or made.latents_mean
    ):  # another's: its scaling factor, which all pipelines read
        save_part(config, state, target)
        return
    folded, state = fold_latent_stats(made, state, statistics.mean, tuple(std * scale for std in statistics.std))
    save_part({**folded.to_diffusers(), "scaling_factor": scale, "shift_factor": None}, state, target)


PLAIN = "plain"  # what the pipelines of a model are called whose conditions are loaded into them apart
NOISING = "image_noising_scheduler"  # of IFSuperResolutionPipeline: by what noise is mixed into the smaller picture
TOKENIZERS = {"clip": "CLIPTokenizer", "t5": "T5Tokenizer", "gemma": "GemmaTokenizer", "qwen": "Qwen2Tokenizer"}  # of text models


def model_index(
    autoencoder: Codec, scheduler: str, network: DenoiserConfig, texts: Mapping[str, dict[str, Any]], told: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """model_index.json: which class of which library opens each part, and which pipeline joins them.

    Args:
        autoencoder: its configuration.
        scheduler: the class name.
        network: the denoising network's configuration.
        texts: the text encoder's config.json, or of a pair both, by their folders.
        told: of a network with conditions, `parts`, the classes of their networks by folder, and `name`, what their pipelines are
            called: StableDiffusion...Pipeline (PLAIN: nothing more); empty: none tells them all; `schedulers`, those of further ones;
            `said`, further fields, and `without`, those that they have not; and `scaling_factor`, the one that these pipelines presume.
    """
    import diffusers

    absent: list[None] = [None, None]
    if not network.context_width:
        return _wordless(autoencoder, scheduler, network)
    clip, pair = texts["text_encoder"]["model_type"] == "clip_text_model", len(texts) == 2
    inpaints = not told and network.in_channels == 2 * network.out_channels + 1
    named = f"StableDiffusion{'XL' if pair else ''}{'Inpaint' if inpaints else ''}Pipeline"
    kind = texts["text_encoder"]["model_type"]
    tokenizer = next(found for name, found in TOKENIZERS.items() if kind.startswith(name))
    index: dict[str, Any] = {
        "_class_name": named,
        "_diffusers_version": diffusers.__version__,
        "scheduler": ["diffusers", scheduler],
        **{name: ["transformers", text["architectures"][0]] for name, text in texts.items()},
        **{name: ["transformers", tokenizer] for name in TEXT_PARTS[2 : 2 + len(texts)]},
        network.folder: ["diffusers" if network.stock else "ldm", network.to_diffusers()["_class_name"]],
        "vae": ["diffusers", next(name for name, kind in KINDS.items() if isinstance(autoencoder, kind))],
        "feature_extractor": absent,
        "image_encoder": absent,
    }
    index |= {"add_watermarker": False} if pair else {"safety_checker": absent, "requires_safety_checker": False}
    if told:
        plain = told["name"] == PLAIN  # its parts are loaded apart
        index |= {name: ["diffusers" if kind else "ldm", kind or "ConditionNetwork"] for name, kind in told["parts"].items() if not plain}
        index = {name: value for name, value in index.items() if name not in told.get("without", ())}
        index |= {name: ["diffusers", values["_class_name"]] for name, values in told.get("schedulers", {}).items()} | told.get("said", {})
        name = "" if plain else told["name"]
        index["_class_name"] = named.replace("Pipeline", f"{name}Pipeline") if told["name"] else "DiffusionPipeline"
    if not clip or network.folder != "unet" or pair != network.reads_size or isinstance(autoencoder, DCConfig):
        # No stock pipeline hides the padding from a T5, has such networks, or tells sizes and the text of two encoders apart.
        index["_class_name"] = "DiffusionPipeline"
    if isinstance(autoencoder, PixelsConfig):
        return _of_pixels(index, autoencoder, network)
    if isinstance(autoencoder, VQConfig):
        # No stock pipeline joins these parts; the card shows the lines that do.
        index["_class_name"] = "DiffusionPipeline"
        index["vqvae"] = index.pop("vae")
    return index


def _as_usual(autoencoder: Codec) -> bool:
    """Whether it is pixels as diffusers' pipelines take them."""
    return type(autoencoder) is PixelsConfig and autoencoder.scaling_factor == 1


def _wordless(autoencoder: Codec, scheduler: str, network: DenoiserConfig) -> dict[str, Any]:
    """The same of a network that reads no text: in pixels DDPMPipeline, which DDIMPipeline opens, too."""
    import diffusers

    fits = _as_usual(autoencoder) and network.in_channels == 3 and scheduler == "DDPMScheduler"
    return {
        "_class_name": "DDPMPipeline" if fits else "DiffusionPipeline",
        "_diffusers_version": diffusers.__version__,
        "scheduler": ["diffusers", scheduler],
        network.folder: ["diffusers", network.to_diffusers()["_class_name"]],
    }


def _of_pixels(index: dict[str, Any], pixels: PixelsConfig, network: DenoiserConfig) -> dict[str, Any]:
    """The same of a model in pixels: IFPipeline, which splits a variance off what the network says, and knows the usual scale alone."""
    ways, leveled = (network.in_channels, network.out_channels), getattr(network, "class_embedding", "none")
    enlarges = ways == (6, 6) and leveled == "timestep"
    fits = (
        network.stock
        and (enlarges or (ways == (3, 6) and leveled == "none"))
        and _as_usual(pixels)
        and index["scheduler"][1] == "DDPMScheduler"
    )
    found = {name: value for name, value in index.items() if name not in ("vae", "image_encoder", "requires_safety_checker")}
    absent: list[None] = [None, None]
    own = {"watermarker": absent, "requires_safety_checker": False}
    if not fits:
        return found | {"_class_name": "DiffusionPipeline"}
    if enlarges:  # told a smaller picture, and how much noise is in it
        own |= {NOISING: index["scheduler"]}
    return found | {"_class_name": "IFSuperResolutionPipeline" if enlarges else "IFPipeline", **own}


def _write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2))
