"""Whole CLIPs, both towers: one folder that transformers' CLIPModel opens, or a text side with a convolutional image tower beside it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ldm.config.errors import UserError
from ldm.config.foreign import short
from ldm.formats.atomic import write_json
from ldm.formats.model_folder import IMAGE_TOWER, OWN_CLIP, own_clip, whole_clip
from ldm.formats.part import AGAIN, CONFIG, load_module, load_weights, read_config, read_json, save_part
from ldm.formats.text_folder import save_text_model, text_part
from ldm.models.image_tower import ImageTower, ImageTowerConfig
from ldm.models.vision_tower import Pixels, TowerNetwork, TowerShape, VisionShape, VisionTower

PREPROCESSING = "preprocessor_config.json"  # as CLIPImageProcessor names it
SCALE, VISION = "logit_scale", ("vision_model.", "visual_projection.")


def save_clip(text: Any, projection: nn.Linear, tower: TowerNetwork, logit_scale: Tensor, resolution: int, folder: Path) -> None:
    """Both towers: with a vision transformer as transformers' CLIPModel, else the text side with image_tower/ below it.

    Args:
        text: the text model.
        projection: of its pooled state.
        logit_scale: log of the inverse temperature.
        resolution: px, of the squares that the tower has learned from.
    """
    if isinstance(tower, ImageTower):
        save_text_model(text, folder, projection)
        said = {**tower.config.to_dict(), "resolution": resolution}
        save_part(said, {**tower.state_dict(), SCALE: logit_scale}, folder / IMAGE_TOWER)
        return
    said, state = text_part(text, projection)
    whole = {
        "model_type": "clip",
        "architectures": ["CLIPModel"],
        "projection_dim": tower.config.projection_dim,
        "text_config": {**said, "architectures": None},
        "vision_config": tower.config.to_dict(),
        "dtype": "float32",
    }
    save_part(whole, {**state, **tower.state_dict(), SCALE: logit_scale}, folder, "model")
    write_json(folder / PREPROCESSING, tower.config.preprocessing())


def save_vision(tower: VisionTower, model: Path, processor: Path) -> None:
    """A vision transformer alone, as transformers' CLIPVisionModelWithProjection and CLIPImageProcessor in a folder each."""
    said = {**tower.config.to_dict(), "architectures": ["CLIPVisionModelWithProjection"], "dtype": "float32"}
    save_part(said, dict(tower.state_dict()), model, "model")
    processor.mkdir(parents=True, exist_ok=True)
    write_json(processor / PREPROCESSING, tower.config.preprocessing())


def tower_shape(clip: Path) -> TowerShape:
    """What builds the image tower of a whole CLIP.

    Raises:
        UserError: naming the field that makes no sense.
    """
    if not whole_clip(clip):
        part = clip / IMAGE_TOWER
        return ImageTowerConfig.from_dict(read_config(part), str(part / CONFIG))
    values, file = read_config(clip), clip / PREPROCESSING
    vision = values.get("vision_config")
    if not isinstance(vision, dict):
        raise UserError(f"{clip / CONFIG}: vision_config is {short(vision)}; an object is needed; {AGAIN}")
    shared = {name: values[name] for name in ("projection_dim",) if name in values}
    pixels = Pixels.from_dict(read_json(file) if file.is_file() else {}, str(file))
    return VisionShape.from_dict({**vision, **shared}, pixels, str(clip / CONFIG))


def load_tower(clip: Path, state: dict[str, Tensor] | None = None) -> tuple[TowerNetwork, Tensor, int]:
    """The image tower of a whole CLIP, frozen, its logit_scale (log of the inverse temperature) and the resolution in px it learned at.

    Args:
        state: the weights of the whole folder, where they are read already.

    Raises:
        UserError: naming what is missing or damaged.
    """
    shape = tower_shape(clip)
    if isinstance(shape, VisionShape):
        state = load_weights(clip) if state is None else state
        scale, where, resolution = state.get(SCALE), clip, shape.image_size
        state = {name: value for name, value in state.items() if name.startswith(VISION) and not name.endswith("position_ids")}
    else:
        where = clip / IMAGE_TOWER
        resolution = read_config(where).get("resolution")  # type: ignore[assignment]
        if type(resolution) is not int or not 0 < resolution < 2**16:
            raise UserError(f"{where / CONFIG}: resolution is {short(resolution)}; a whole number of px from 1 on is needed; {AGAIN}")
        state = load_weights(where)
        scale = state.pop(SCALE, None)
    if scale is None or scale.numel() != 1 or not scale.is_floating_point():
        raise UserError(f"{where}: {SCALE}, one number, is missing; {AGAIN}")
    build: Callable[[], TowerNetwork] = shape.build
    return load_module(build, state, where).float().eval().requires_grad_(False), scale.float(), resolution


def load_own_tower(folder: Path) -> tuple[TowerNetwork, int]:
    """The image tower of the CLIP that lies in a product's or model's folder, frozen, and the resolution in px that it learned at.

    Raises:
        UserError: where there is none.
    """
    if (clip := own_clip(folder)) is None:
        raise UserError(f"{folder}: has no {OWN_CLIP}/, no CLIP of its own run, whose image tower could be read; train text by kind clip")
    tower, _, resolution = load_tower(clip)
    return tower, resolution
