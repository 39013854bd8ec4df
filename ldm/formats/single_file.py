"""Single-file checkpoints (CompVis, Stable Diffusion, sgm) converted to a cached model folder."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.config.counts import plural
from ldm.config.errors import UserError
from ldm.config.files import at_home, read_bounded
from ldm.formats import atomic, translator_file
from ldm.formats.compvis import (
    HUGE,
    PREFIX,
    REFINER,
    XL_SCALE,
    Part,
    from_compvis,
    inner,
    text_config,
    unet_config,
    usual_names,
    vae_config,
    with_dots,
)
from ldm.formats.integrity import cache_folder, is_whole
from ldm.formats.part import compare, content_hash, save_part
from ldm.formats.weights_file import read_weights
from ldm.models.autoencoder import KLConfig, VQConfig
from ldm.models.unet import UNetConfig

RECIPE = "ldm.recipe"  # where a file of ours says how it was made
PREDICTIONS = {
    "epsilon": "epsilon",
    "eps": "epsilon",
    "v": "v_prediction",
    "v_prediction": "v_prediction",
    "sample": "sample",
    "x0": "sample",
}
REFUSED = "a refiner of Stable Diffusion XL (one text encoder, an aesthetic score), which is not known here; give the base model"
SIZES = {768: 512, HUGE: 768}  # px, what Stable Diffusion 1 and 2 draw, by the width of their text
ROOTS = ("model", "model_ema", "first_stage_model", "cond_stage_model", "conditioner", "denoiser")  # of the names that such files have
V_MARK, ZERO_SNR_MARK = "v_pred", "ztsnr"  # empty tensors by which files of XL say what their network predicts, and its schedule
BETAS = (0.00085, 0.012)  # Stable Diffusion's


@dataclass(frozen=True)
class CheckpointChoices:
    """Choices for what a checkpoint does not say, or says twice (EMA weights, prediction type, schedule)."""

    ema: bool | None = None  # averaged weights, or those of the last step; null: averaged where the file has both
    prediction: str = ""  # epsilon, v_prediction or sample; empty: what the file, or a YAML beside it, says


def named(name: str) -> tuple[Path, CheckpointChoices] | None:
    """The file that a name such as `sd.ckpt` or `sd.ckpt::ema=no,prediction=v` means; None where it means no file.

    Raises:
        UserError: naming what is said behind `::` and not known.
    """
    path, told, said = name.partition("::")
    file = at_home(path)
    if not file.is_file():
        return None
    choices = CheckpointChoices()
    for word in said.split(",") if told else ():
        field, _, value = word.partition("=")
        if field == "ema" and value in ("yes", "no"):
            choices = replace(choices, ema=value == "yes")
        elif field == "prediction" and value in PREDICTIONS:
            choices = replace(choices, prediction=value)
        else:
            raise UserError(f"{name}: {word!r} is not known; behind :: stand ema=yes, ema=no or prediction={'|'.join(PREDICTIONS)}")
    return file, choices


def open_single(file: Path, choices: CheckpointChoices | None = None, note: Callable[[str], None] = print) -> Path:
    """The model folder of a file: unet/, vae/ or vqvae/, text_encoder/, tokenizer/ and scheduler/, as far as the file has them.

    Args:
        file: .safetensors, or a pickle (.ckpt, .pt), which a process of its own reads.
        note: told what was assumed, one line each.

    Raises:
        UserError: naming the file and the weight that is missing, left over or of another kind.
    """
    choices = choices or CheckpointChoices()
    if choices.prediction and choices.prediction not in PREDICTIONS:
        raise UserError(f"prediction: got {choices.prediction!r}; choose epsilon, v_prediction or sample")
    if not file.is_file():
        raise UserError(f"{file}: no such file")
    sums = [atomic.sha256(path) for path in (file, *_beside(file))]
    key = hashlib.sha256(json.dumps([2, *sums, choices.ema, choices.prediction]).encode()).hexdigest()
    target = cache_folder() / "models" / f"{file.stem}-{key[:24]}"
    if is_whole(target):
        return target
    state, said = read_file(file)
    generator = translator_file.published(state)
    state = usual_names(state)
    if generator is None:
        refuse_others(state, file)

    def write(folder: Path) -> None:
        if generator is not None:
            return translator_file.write_folder(generator, file, folder, note)
        try:
            _write(state, said, file, folder, choices, note)
        except UserError as error:
            raise UserError(str(error) if str(file) in str(error) else f"{file}: {error}") from None

    target.parent.mkdir(parents=True, exist_ok=True)
    atomic.commit(target, write)
    return target


def _beside(file: Path) -> list[Path]:
    """What of a file's neighbours belongs to it: NAME.yaml, and the tokenizer's files in NAME.tokenizer/."""
    own = sorted(file.with_name(f"{file.stem}.tokenizer").glob("*.json"))
    return [path for path in (file.with_suffix(".yaml"), *own) if path.is_file()]


def read_file(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a file and the texts beside them.

    Raises:
        UserError: naming what is missing or damaged.
    """
    return read_weights(file, cache_folder())


def refuse_others(state: Mapping[str, Tensor], file: Path) -> None:
    """Refuse files that are no whole model (LoRA, embeddings, other networks), naming what they are.

    Raises:
        UserError: for an adapter, learned words, or weights under other names.
    """
    names = list(state)
    if any(name.startswith(REFINER) for name in names):
        raise UserError(f"{file}: {REFUSED}")
    if found := next((n for n in names if ".lora_" in n or "lora_unet" in n or "lora_te" in n or ".hada_" in n or ".lokr_" in n), None):
        raise UserError(f"{file}: an adapter (LoRA: {found}), not a model; give its base model, and this with --lora")
    if len(names) <= 2 and all(value.ndim <= 2 for value in state.values()):
        raise UserError(f"{file}: learned words (textual inversion: {', '.join(names)}), not a model; give the model they were learned for")
    if not any(name.startswith((*PREFIX.values(), "model_ema.diffusion_model")) for name in names) and not _bare(state):
        stranger = sorted(names)[0] if names else "nothing"
        if any(name.removeprefix("module.").removeprefix("text.") == "token_embedding.weight" for name in names):
            raise UserError(
                f"{file}: an OpenCLIP ({stranger}), no whole model; models.text.kind=pretrained_text takes it beside its architecture=, "
                "such as ViT-H-14"
            )
        raise UserError(
            f"{file}: holds {stranger} and no names of CompVis' checkpoints; of a diffusers model give the folder that has its config.json"
        )


def _bare(state: Mapping[str, Tensor]) -> Part | None:
    """The part that a file holds alone, under its names without a prefix."""
    if "encoder.down.0.block.0.conv1.weight" in state:
        return "vae"
    return "unet" if "input_blocks.0.0.weight" in state else None


def _write(
    state: dict[str, Tensor], said: Mapping[str, str], file: Path, folder: Path, choices: CheckpointChoices, note: Callable[[str], None]
) -> None:
    """The model folder of a checkpoint."""
    if part := _bare(state):
        state = {PREFIX[part] + name: value for name, value in state.items() if not name.startswith("loss.")}
    recipe = _recipe(said, file)
    known = _yaml(file)
    parts = recipe.get("parts", {})
    state = _averaged(state, choices.ema, note, file)
    if strange := sorted(name for name in state if "." in name and name.partition(".")[0] not in ROOTS):
        left = plural(len(strange), "weight is", "weights are")
        note(f"{file}: {left} of no part that is read here, such as {strange[0]}; it is drawn without")
    unet: UNetConfig | None = None
    if weights := inner("unet", state):
        unet = UNetConfig.from_diffusers(parts["unet"]) if "unet" in parts else unet_config(weights)
        save_part(unet.to_diffusers() | {"sample_size": _side(unet, recipe)}, _whole("unet", unet, state, file), folder / "unet")
    if weights := inner("vae", state):
        _write_vae(weights, recipe, known, state, unet, folder, file)
    _write_text(state, recipe, folder, file)
    if unet is not None:
        schedule = recipe.get("scheduler") or _schedule(state, said, known, unet, choices, note, file)
        (folder / "scheduler").mkdir()
        atomic.write_json(folder / "scheduler" / "scheduler_config.json", schedule)
    if recipe:
        codec = "vqvae" if (folder / "vqvae").is_dir() else "vae"
        record = {name: recipe[name] for name in ("defaults", "scheduler", "story", "ldm_version") if name in recipe}
        atomic.write_json(folder / "ldm.json", record | {"autoencoder": content_hash(folder / codec)})


def _recipe(said: Mapping[str, str], file: Path) -> dict[str, Any]:
    if RECIPE not in said:
        return {}
    try:
        found = json.loads(said[RECIPE])
    except ValueError:
        raise UserError(f"{file}: its {RECIPE} is not JSON; export the model again") from None
    return found if isinstance(found, dict) else {}


def _yaml(file: Path) -> dict[str, Any]:
    """What CompVis' YAML beside a file says of its schedule: parameterization, scale_factor, linear_start, linear_end."""
    path = file.with_suffix(".yaml")
    if not path.is_file():
        return {}
    import yaml

    try:
        values = yaml.safe_load(read_bounded(path, 2**20).decode("utf-8"))
        found = values["model"]["params"]
    except (OSError, yaml.YAMLError, KeyError, TypeError, ValueError, RecursionError):
        raise UserError(f"{path}: no YAML of a CompVis model (model.params); take it away or put the right one there") from None
    return found if isinstance(found, dict) else {}


def _averaged(state: dict[str, Tensor], ema: bool | None, note: Callable[[str], None], file: Path) -> dict[str, Tensor]:
    """The state with the averaged weights of the U-Net in place of its own, where it has them and they are wanted."""
    averaged = {name: value for name, value in state.items() if name.startswith("model_ema.")}
    found = {name: value for name, value in state.items() if name not in averaged}
    own = [name for name in found if name.startswith(PREFIX["unet"])]
    theirs = {name: "model_ema." + name.removeprefix("model.").replace(".", "") for name in own}
    if not averaged:
        if ema is not None and own:
            note(f"{file}: has no averaged weights; ema={'yes' if ema else 'no'} changes nothing")
        return found
    if not own:
        if ema is False:
            raise UserError(f"{file}: holds averaged weights of its unet alone; leave ema=no out")
        note(f"{file}: holds averaged weights of its unet alone; they are used")
        inside = {name.removeprefix("model_ema.diffusion_model"): value for name, value in averaged.items()}
        return found | {PREFIX["unet"] + with_dots(n): v for n, v in inside.items() if not n.startswith("model_ema.")}
    if ema is not False and (missing := [name for name in own if theirs[name] not in averaged]):
        raise UserError(f"{file}: has averaged weights, but none for {missing[0]}; choose the others (ema=False)")
    last = ema is False
    note(f"{file}: holds averaged weights and those of the last step; the {'last' if last else 'averaged'} ones are used")
    return found if last else found | {name: averaged[theirs[name]] for name in own}


def _whole(part: Part, config: Any, state: Mapping[str, Tensor], file: Path) -> dict[str, Tensor]:
    """A part's weights under diffusers' names, all of them and of the right shapes.

    Raises:
        UserError: naming what does not fit.
    """
    found = from_compvis(part, config, state)
    with torch.device("meta"):
        wanted = config.build().state_dict()
    compare(wanted, found, file)
    return found


def _write_vae(
    weights: dict[str, Tensor],
    recipe: Mapping[str, Any],
    known: Mapping[str, Any],
    state: Mapping[str, Tensor],
    unet: UNetConfig | None,
    folder: Path,
    file: Path,
) -> None:
    parts = recipe.get("parts", {})
    said = parts.get("vqvae") or parts.get("vae")
    config: KLConfig | VQConfig
    if said:
        config = VQConfig.from_diffusers(said) if "vqvae" in parts else KLConfig.from_diffusers(said)
    else:
        usual = XL_SCALE if (unet is not None and unet.size_channels) or any(n.startswith("conditioner.") for n in state) else None
        scale = known.get("scale_factor", state.get("scale_factor"))
        config = vae_config(weights, float(scale) if scale is not None else usual)
    name = "vqvae" if isinstance(config, VQConfig) else "vae"
    # The losses of its training are stored beside it in some files, under "loss.".
    own = {n: v for n, v in state.items() if not n.startswith(PREFIX["vae"] + "loss.")}
    save_part(config.to_diffusers(), _whole("vae", config, own, file), folder / name)
    if recipe.get("latents"):
        atomic.write_json(folder / name / "latents.json", recipe["latents"])


def _write_text(state: Mapping[str, Tensor], recipe: Mapping[str, Any], folder: Path, file: Path) -> None:
    """The text encoder and its tokenizer, or of XL both."""
    from ldm.formats.open_clip import open_clip_tokenizer
    from ldm.formats.tokenizer_files import load_tokenizer, save_tokenizer

    alone: tuple[Part, ...] = ("text", "open_clip")
    both: dict[str, Part] = {"text_encoder": "xl_text", "text_encoder_2": "xl_open_clip"}
    there = {name: kind for name, kind in both.items() if inner(kind, state)}
    if kind := next((kind for kind in alone if inner(kind, state)), None):
        there = {"text_encoder": kind}
    elif there and there != both:
        raise UserError(f"{file}: has {PREFIX[min(there.values())]}*, one text encoder of two; copy the whole file again")
    own = file.with_name(f"{file.stem}.tokenizer")
    for name, kind in there.items():
        config = recipe.get("parts", {}).get(name) or text_config(inner(kind, state), kind)
        found = {key: value for key, value in from_compvis(kind, config, state).items() if "visual." not in key}
        _check_text(config, found, kind == "xl_open_clip", file)
        save_part(config, found, folder / name, "model")
        ends = kind in ("text", "xl_text")
        if own.is_dir():
            tokenizer = load_tokenizer(own)
            if name == "text_encoder_2":
                tokenizer.add_special_tokens({"pad_token": str(recipe.get("padding", "!"))})
        else:
            tokenizer = open_clip_tokenizer(padding_ends=ends)
            if len(tokenizer) != config["vocab_size"]:
                raise UserError(f"{file}: its text encoder has {config['vocab_size']} words of its own; put their tokenizer into {own}")
        save_tokenizer(tokenizer, folder / name.replace("text_encoder", "tokenizer"))
    if isinstance(index := recipe.get("index"), dict) and index:
        atomic.write_json(folder / "model_index.json", index)


def _check_text(config: Mapping[str, Any], found: dict[str, Tensor], projects: bool, file: Path) -> None:
    """Refuse a text model whose weights do not fit what their shapes or the file say of it."""
    from ldm.formats.text_folder import PREFIX as TEXT
    from ldm.formats.text_folder import PROJECTION
    from ldm.models.text_tower import TextTower

    with torch.device("meta"):
        tower = TextTower(config)
        wanted = {TEXT + name: value for name, value in tower.state_dict().items()}
        if projects:
            wanted[PROJECTION] = torch.empty(tower.config.projection_dim, tower.config.hidden_size)
    compare(wanted, found, file)


def _side(unet: UNetConfig, recipe: Mapping[str, Any]) -> int:
    """Latent pixels of the side that the model draws."""
    stored = (recipe.get("parts", {}).get("unet") or {}).get("sample_size")
    if isinstance(stored, int):
        return stored
    return 128 if unet.size_channels else SIZES.get(unet.context_width, 256) // 8


def _schedule(
    state: Mapping[str, Tensor],
    said: Mapping[str, str],
    known: Mapping[str, Any],
    unet: UNetConfig,
    choices: CheckpointChoices,
    note: Callable[[str], None],
    file: Path,
) -> dict[str, Any]:
    """The scheduler_config.json of a checkpoint that does not carry one."""
    if strange := next((name for name in state if name.startswith("edm_")), None):
        raise UserError(f"{file}: {strange} marks a network of EDM's noise levels (Karras 2022), which are not known here")
    marked = "v" if V_MARK in state else None
    told = choices.prediction or known.get("parameterization") or said.get("modelspec.prediction_type") or marked
    prediction = PREDICTIONS.get(str(told), "")
    if not prediction:
        prediction = "v_prediction" if unet.context_width == HUGE and unet.linear_projection else "epsilon"
        note(f"{file}: does not say what its unet predicts; {prediction} is assumed (prediction=epsilon or v_prediction says otherwise)")
    betas = state.get("betas")
    count, first, last = 1000, *BETAS
    if betas is not None and betas.ndim == 1 and len(betas) > 1:
        count, first, last = len(betas), float(betas[0]), float(betas[-1])
    first, last = float(known.get("linear_start", first)), float(known.get("linear_end", last))
    straight = betas is not None and abs(float(betas[count // 2]) - (first + last) / 2) < abs(last - first) / 50
    return {
        "_class_name": "DDIMScheduler",
        "num_train_timesteps": int(known.get("timesteps", count)),
        "beta_start": first,
        "beta_end": last,
        "beta_schedule": "linear" if straight else "scaled_linear",
        "prediction_type": prediction,
        "clip_sample": False,
        "set_alpha_to_one": False,
        "steps_offset": 1,
        "timestep_spacing": "leading",
        "rescale_betas_zero_snr": ZERO_SNR_MARK in state,
    }
