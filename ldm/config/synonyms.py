"""Words of other programs: what their options and fields are called here."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable

# Options of sampling programs (diffusers' scripts, web UI, ComfyUI), by what is left of them without dashes.
OPTIONS = {
    "width": "--size WIDTHxHEIGHT",
    "height": "--size WIDTHxHEIGHT",
    "resolution": "--size",
    "cfg": "--guidance",
    "cfg_scale": "--guidance",
    "scale": "--guidance",
    "guidance_scale": "--guidance",
    "negative_prompt": "--negative",
    "denoising_strength": "--strength",
    "denoise": "--strength",
    "init_image": "--init",
    "init_img": "--init",
    "image": "--init",
    "num_images": "--n",
    "n_samples": "--n",
    "num_images_per_prompt": "--n",
    "num_inference_steps": "--steps",
    "sampling_steps": "--steps",
    "scheduler": "--sampler",
    "sampling_method": "--sampler",
    "ckpt": "--model",
    "checkpoint": "--model",
    "pretrained_model_name_or_path": "--model",
    "output": "--out",
    "output_dir": "--out",
    "outdir": "--out",
    "prompt": "the prompt itself, in quotation marks",
    "prompt_file": "--prompts",
    "from_file": "--prompts",
    "textual_inversion": "--embedding",
    "batch_size": "--batch",
    "half": "--precision fp16",
    "fp16": "--precision fp16",
    "listen": "--host 0.0.0.0 --token",
    "o": "--out",
    "m": "--model",
}
# Verbs of other programs, and what people call them.
VERBS = {
    **dict.fromkeys(("generate", "draw", "txt2img", "img2img", "infer", "inference", "predict"), "sample"),
    **dict.fromkeys(("ui", "gui", "web", "webui", "serve", "server", "app"), "demo"),
    **dict.fromkeys(("finetune", "fine-tune", "lora", "dreambooth", "fit", "run"), "train"),
    **dict.fromkeys(("resume", "continue"), "train, with the words of before: it goes on from the last checkpoint"),
    **dict.fromkeys(("eval", "test", "validate"), "evaluate"),
    **dict.fromkeys(("convert", "save"), "export"),
    **dict.fromkeys(("check", "index", "encode", "curate", "fetch", "hash"), "data"),
}
# Fields of training programs.
FIELDS = {
    "batch_size": "batch",
    "train_batch_size": "batch",
    "learning_rate": "lr",
    "epochs": "images",
    "epoch": "images",
    "num_epochs": "images",
    "num_train_epochs": "images",
    "max_train_epochs": "images",
    "max_train_steps": "images",
    "steps": "images",
    "max_steps": "images",
    "mixed_precision": "precision",
    "lr_scheduler": "schedule",
    "network_dim": "rank",
    "network_alpha": "alpha",
    "gradient_checkpointing": "checkpointing",
    "gradient_accumulation_steps": "micro_batch",
    "save_every_n_steps": "save_every_images",
    "num_workers": "workers",
    "report_to": "tracker",
    "log_with": "tracker",
    "output_dir": "out",
    "output_name": "name",
    "pretrained_model_name_or_path": "init",
    "train_data_dir": "data.path",
    "instance_data_dir": "data.path",
    "instance_prompt": "data.caption",
    "unet_lr": "optim.lr",
    "text_encoder_lr": "adapt.text_lr",
    "train_text_encoder": "adapt.text_rank",
    "network_train_unet_only": "adapt.text_rank",
    "network_weights": "adapt.init",
    "optimizer_type": "optim.kind",
    "optimizer": "optim.kind",
    "use_8bit_adam": "optim.kind",
    "lr_warmup_steps": "warmup_images",
    "max_grad_norm": "clip",
    "use_ema": "ema",
    "snr_gamma": "weighting.gamma",
    "min_snr_gamma": "weighting.gamma",
    "noise_offset": "offset_noise",
    "cache_latents": "latents",
    "enable_bucket": "buckets",
    "random_flip": "flip",
    "flip_aug": "flip",
    "shuffle_caption": "tags.shuffle",
    "keep_tokens": "tags.keep",
    "caption_tag_dropout_rate": "tags.dropout",
    "caption_dropout_rate": "caption_dropout",
    "max_token_length": "caption_chunks",
    **dict.fromkeys(("reg_data_dir", "class_data_dir"), "prior_preservation.path"),
    "class_prompt": "prior_preservation.prompts",
    "num_class_images": "prior_preservation.images",
    "prior_loss_weight": "prior_preservation.weight",
    **dict.fromkeys(("save_every_n_epochs", "checkpointing_steps"), "save_every_images"),
    **dict.fromkeys(("sample_prompts", "validation_prompt", "validation_prompts"), "prompts"),
    **dict.fromkeys(("sample_every_n_steps", "sample_every_n_epochs", "validation_epochs"), "sample_every_images"),
    **dict.fromkeys(("max_data_loader_n_workers", "dataloader_num_workers"), "workers"),
    "image_dir": "data.path",
    "caption_prefix": "data.prefix",
    "caption_suffix": "data.suffix",
    "alpha_mask": "data.masks",
    **dict.fromkeys(("r", "dim", "lora_rank", "network_rank"), "rank"),
    "lora_alpha": "alpha",
    "target_modules": "targets",
    **dict.fromkeys(("algo", "algorithm", "use_dora", "dora", "dora_wd", "weight_decompose", "network_module"), "method"),
}
# And what other programs must be told and this one needs not.
NEEDLESS = {
    **dict.fromkeys(
        ("device", "gpu", "gpus", "cuda", "num_processes", "n_gpu"),
        "nothing needs to be said: a GPU is used where there is one, several with accelerate launch",
    ),
    **dict.fromkeys(
        ("resume", "resume_from_checkpoint", "resume_from", "save_state", "continue"),
        "nothing needs to be said: the same command goes on from the last checkpoint",
    ),
    **dict.fromkeys(
        ("xformers", "sdpa", "enable_xformers_memory_efficient_attention"), "nothing needs to be said: attention is torch's fused one"
    ),
    **dict.fromkeys(
        ("v_parameterization", "prediction_type"),
        "nothing needs to be said: the base tells it; of a file that does not, init=FILE::prediction=v does",
    ),
}
COUNTED = {
    "images": ", which counts pictures seen: epochs times pictures, or steps times batch",
    "warmup_images": ", which counts pictures: steps times batch",
    "method": ": lora, dora, loha or lokr",
}


def option_meant(message: str, known: Collection[str]) -> str:
    """What an unknown option is called here, as the end of a message that names it; empty where nobody knows."""
    found = re.search(r"(?<![\w-])--?([\w-]+)", message)
    meant = OPTIONS.get(found[1].replace("-", "_").lower(), "") if found else ""
    if found and not found[0].startswith("--") and f"--{found[1]}" in known:
        meant = f"--{found[1]}"
    return f"; here that is {meant}" if meant and (not meant.startswith("--") or meant.split()[0] in set(known)) else ""


def field_meant(name: str, paths: Iterable[str]) -> str:
    """Where a field that does not stand here stands, under this or its own name, as the end of a message; empty where nobody knows.

    Args:
        name: as it was written.
        paths: of all fields, such as stages.NAME.batch.
    """
    if name in NEEDLESS:
        return f"; {NEEDLESS[name]}"
    place = place_of(name, paths)
    return f"; that is {place}{COUNTED.get(place.rpartition('.')[2], '')}" if place else ""


def place_of(name: str, paths: Iterable[str]) -> str:
    """The path of a field by the name that it has here or in another program; of several the first of a stage, of none an empty text.

    Arguments as `field_meant`'s.
    """
    meant = FIELDS.get(name, name)
    places = [path for path in paths if (path == meant or path.endswith(f".{meant}")) and "[]" not in path]
    places.sort(key=lambda path: (not path.startswith("stages."), path.count("."), len(path)))
    return places[0] if places else ""
