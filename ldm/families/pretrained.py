"""Pretrained text encoders and autoencoders, used as they are."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, Literal

import torch

from ldm.config.errors import UserError
from ldm.config.files import at_home
from ldm.config.schema import Count, PathGiven, Positive, config, plain
from ldm.families.family import Found, ModelConfig, Product
from ldm.formats.integrity import check
from ldm.formats.latent_codec import Codec, LatentCodec, autoencoder_folder, codec_config, load_codec
from ldm.formats.model_folder import OWN_CLIP, hub_folder, own_clip, whole_of
from ldm.formats.open_clip import architectures, check_architecture
from ldm.formats.part import PARTS, content_hash, read_config, read_json
from ldm.formats.single_file import named, open_single
from ldm.models import cost
from ldm.models.autoencoder import KLConfig, VQConfig
from ldm.models.cost import Cost, TextShape
from ldm.models.palette import PaletteConfig
from ldm.models.vision_tower import TowerShape, VisionShape
from ldm.text.pretrained import (
    OpenClipShape,
    both_towers,
    load_clip,
    load_pretrained,
    open_clip_folder,
    text_folder,
    text_hash,
    vision_shape,
)

HALF, FLOAT = 2, 4  # bytes
SIZES = 6  # numbers of ImageBatch.size
# Text encoders by the width of their states, where the files are not here to tell.
BIG = TextShape("OpenCLIP ViT-bigG/14", 1280, 32)
PUBLISHED = {
    768: TextShape("CLIP ViT-L/14", 768, 12),
    1024: TextShape("OpenCLIP ViT-H/14 without its last layer", 1024, 23),
    2048: TextShape("CLIP ViT-L/14 and OpenCLIP ViT-bigG/14", 768, 12, second=BIG),
}
PUBLISHED_TOWER = VisionShape(
    hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, patch_size=14, projection_dim=768
)


@config
class PretrainedText(ModelConfig):
    """A text encoder from a folder or from the Hugging Face Hub, used as it is."""

    kind: Literal["pretrained_text"] = "pretrained_text"
    path: PathGiven  # a model folder, the folder of a CLIP, T5 or OpenCLIP, or its name on the hub as owner/name
    architecture: str = ""  # OpenCLIP's name for it, such as ViT-H-14, where path is a file of its weights; empty: the folder says it
    max_tokens: Positive = 77  # longer captions are cut; CLIP has no more than 77
    skip_last: Count = 0  # CLIP's layers left out at the end; 1 as in Stable Diffusion 2

    adopts = True
    encodes_text = True

    def __post_init__(self) -> None:
        if self.architecture:
            check_architecture(self.architecture)

    @property
    def has_tower(self) -> bool:
        """Whether its files are of both towers of a CLIP; where they are not here yet, `found_for` sees. A single file's are not read."""
        if self.architecture:
            return False
        folder = folder_here(self.path)
        return both_towers(folder) is not None if folder else not single_file(self.path)

    def elsewhere(self) -> str:
        """Its path."""
        return self.path

    def find(self, path: str, note: Callable[[str], None]) -> Found:
        """The text encoder's folder, and a hash of its files and of how they are read."""
        if self.architecture:
            folder = open_clip_folder(path, self.architecture)
        else:
            folder = text_folder(str(model_folder(path, [], note)) if named(path) else path)
        said = f"{text_hash(folder)} {self.max_tokens} {self.skip_last}"
        return Found(path, folder, hashlib.sha256(said.encode()).hexdigest())

    def adopt(self, found: Found, target: Path) -> None:
        """text_encoder/ and tokenizer/, cut to the layers and tokens that are used; of a pair also the second's; the CLIP of its run."""
        load_pretrained(str(found.folder), self.max_tokens, self.skip_last).save(target)
        if clip := own_clip(found.folder):
            check(clip)
            shutil.copytree(clip, target / OWN_CLIP)
        elif found.tower is not None:
            load_clip(found.tower).save(target / OWN_CLIP)

    def found_for(self, found: Found, asked: Mapping[str, str]) -> Found:
        """With the CLIP whose image tower is read."""
        if "has_tower" not in asked:
            return found
        if (clip := both_towers(found.folder)) is None:
            raise UserError(f"{asked['has_tower']}: {self.path} has no image tower; use kind clip, or a CLIP of both towers")
        vision_shape(clip)  # or why it is none that is known here
        return replace(found, tower=clip, hash=hashlib.sha256(f"{found.hash} {content_hash(clip)}".encode()).hexdigest())

    def identity(self) -> dict[str, Any]:
        """As it is said; an architecture only where one is."""
        return {name: value for name, value in plain(self).items() if (name, value) != ("architecture", "")}

    def parameters(self, others: Mapping[str, ModelConfig], note: Callable[[str], None], width: int = 768) -> int:
        """Of the text encoder, as far as it is used."""
        return self.text_shape(note, width).parameters

    def text_shape(self, note: Callable[[str], None], width: int = 768) -> TextShape:
        """From its config.json; where that is not here, the published encoder of that width."""
        if self.architecture:  # its weights are not looked at
            told = _open_clip_shape(self.architecture, read_json(architectures()[self.architecture])["text_cfg"])
            return replace(told, layers=told.layers - self.skip_last, tokens=min(self.max_tokens, told.positions))
        folder = local_folder(self.path)
        files = config_files(folder, "text_encoder")
        found = next((shape for file in files if (shape := _clip_shape(file)) is not None), None)
        if found is not None and (folder / "text_encoder_2" / "config.json").is_file():
            found = replace(found, second=_clip_shape(folder / "text_encoder_2" / "config.json"))
        if found is None:
            found = PUBLISHED.get(width, PUBLISHED[768])
            note(f"text encoder {self.path}: its config.json is not here; counted as {found.name}")
        else:
            found = replace(found, layers=found.layers - self.skip_last)
        return replace(found, tokens=min(self.max_tokens, found.positions), embedding=_embedding(folder))

    def image_tower(self, side: int, note: Callable[[str], None]) -> TowerShape:
        """From its files; where they are not here, that of CLIP ViT-L/14."""
        folder = local_folder(self.path)
        if not folder.is_dir():
            note(f"image tower of {self.path}: its config.json is not here; counted as CLIP ViT-L/14")
            return PUBLISHED_TOWER
        if (clip := both_towers(folder)) is None:
            self.cannot(f"embed pictures here; {folder} is no CLIP of both towers; use kind clip")
        return vision_shape(clip)


@config
class PretrainedAutoencoder(ModelConfig):
    """An autoencoder from elsewhere, used as it is."""

    kind: Literal["pretrained_autoencoder"] = "pretrained_autoencoder"
    path: PathGiven  # a model folder, its vae or vqvae, a file in CompVis' naming, or a name on the hub as owner/name

    answers = frozenset({"reconstruct"})
    encodes = True

    @property
    def has_codes(self) -> bool:
        """Whether its files are of a VQ; where they are not here yet, `found_for` sees."""
        folder = folder_here(self.path)
        file = None if folder is None else next(config_files(folder, "vae", "vqvae"), None)
        return file is None or isinstance(codec_config(read_json(file), file.parent), VQConfig | PaletteConfig)

    def found_for(self, found: Found, asked: Mapping[str, str]) -> Found:
        """Itself, if it has the codes that are read."""
        folder = autoencoder_folder(found.folder)
        if "has_codes" in asked and not isinstance(codec_config(read_config(folder), folder), VQConfig | PaletteConfig):
            raise UserError(f"{asked['has_codes']}: {self.path} has no codebook; use kind vq, or a VQ autoencoder")
        return found

    def elsewhere(self) -> str:
        """Its path."""
        return self.path

    def counted(self, base: str, note: Callable[[str], None]) -> ModelConfig:
        """Itself, of the files at `base`."""
        return replace(self, path=base) if base else self

    def step_px(self, others: Mapping[str, ModelConfig]) -> int:
        """Its downsampling factor; of files that are not here, or not open yet, 1."""
        return 1 if folder_here(self.path) is None else self.latent_network(lambda text: None).factor

    def find(self, path: str, note: Callable[[str], None]) -> Found:
        """The autoencoder's folder."""
        return found_autoencoder(path, note)

    def parameters(self, others: Mapping[str, ModelConfig], note: Callable[[str], None], width: int = 768) -> int:
        """Of encoder and decoder."""
        with torch.device("meta"):
            return cost.count(self.latent_network(note).build())

    def latent_network(self, note: Callable[[str], None]) -> Codec:
        """From its config.json; where that is not here, Stable Diffusion's."""
        file = next(config_files(local_folder(self.path), "vae", "vqvae"), None)
        if file is None:
            note(f"autoencoder {self.path}: its config.json is not here; counted as kl-f8")
            return KLConfig()
        values = read_json(file)
        return codec_config(values, file.parent)

    def encoding(self, side: int, note: Callable[[str], None]) -> tuple[Cost, int]:
        """Of the encoder, and the bytes of a cached image."""
        return encoding_of(self.latent_network(note), side)

    def encoder(self, product: Path, device: torch.device) -> LatentCodec:
        """The frozen autoencoder with its latent statistics."""
        return load_codec(autoencoder_folder(product)).to(device)

    def measured(self, products: Mapping[str, Product], scratch: Path, story: Mapping[str, Any], device: torch.device) -> LatentCodec:
        """The frozen autoencoder, which reconstructs."""
        return self.encoder(products["model"].folder, device)


def found_autoencoder(path: str, note: Callable[[str], None]) -> Found:
    """The autoencoder at a path or hub name.

    Raises:
        UserError: naming what is missing or damaged.
    """
    folder = model_folder(path, [f"{part}/*" for part in PARTS] + ["*"], note)
    return Found(path, folder, content_hash(autoencoder_folder(folder)))


def encoding_of(network: Codec, side: int) -> tuple[Cost, int]:
    """What encoding one image of `side` x `side` px costs, and the bytes it leaves in a latent cache: mean, deviation, six sizes."""
    _, encode, _ = cost.autoencoder(network, side, side)
    small = side // network.factor
    moments = 2 if isinstance(network, KLConfig) else 1
    return encode, HALF * network.latent_width * small**2 * moments + FLOAT * SIZES


def model_folder(path: str, patterns: list[str], note: Callable[[str], None]) -> Path:
    """The folder of a model by folder, run folder, single file or hub name; `patterns` say which files are wanted of the hub's."""
    folder = at_home(path)
    if file := named(path):
        return open_single(*file, note=note)
    if not folder.is_dir():
        folder = hub_folder(path, patterns)
    whole = any((folder / part).is_dir() for part in PARTS)
    return whole_of(folder / "model" if (folder / "model").is_dir() and not whole else folder)


def local_folder(path: str) -> Path:
    """Where a model from elsewhere lies, if it is on this machine."""
    folder = at_home(path)
    if file := named(path):
        return open_single(*file, note=lambda text: None)
    return folder / "model" if (folder / "model").is_dir() else folder


def single_file(path: str) -> bool:
    """Whether a path is a file's in CompVis' naming."""
    try:
        return named(path) is not None
    except OSError:  # no name of a file, say too long for one: looking for it says so
        return False


def folder_here(path: str) -> Path | None:
    """The folder of a model from elsewhere, if it is one on this machine; single files are not opened."""
    try:
        folder = None if single_file(path) else local_folder(path)
        return folder if folder is not None and folder.is_dir() else None
    except OSError:
        return None


def config_files(folder: Path, *parts: str) -> Iterator[Path]:
    """The config.json of a part's own folder, or of the part in a model's folder."""
    yield from (file for file in (*(folder / part / "config.json" for part in parts), folder / "config.json") if file.is_file())


def _embedding(folder: Path) -> int:
    """Width of the space that a text encoder shares with pictures; 0: it shares none, or the image tower is none that is known here."""
    try:
        return vision_shape(clip).embedding if (clip := both_towers(folder)) else 0
    except UserError:  # who reads it is told why
        return 0


def _open_clip_shape(name: str, text: Mapping[str, Any]) -> TextShape:
    shape = OpenClipShape(**{f.name: text[f.name] for f in fields(OpenClipShape) if f.name in text})
    inner = int(shape.width * shape.mlp_ratio)
    return TextShape(name, shape.width, shape.layers, shape.context_length, shape.vocab_size, shape.context_length, inner)


def _clip_shape(file: Path) -> TextShape | None:
    values = read_json(file)
    if isinstance(text := values.get("model_cfg", {}).get("text_cfg") if isinstance(values.get("model_cfg"), dict) else None, dict):
        return _open_clip_shape(file.parent.name, text)
    values = values.get("text_config", values)
    names = ("hidden_size", "num_hidden_layers", "max_position_embeddings", "vocab_size", "intermediate_size")
    if not all(isinstance(values.get(name), int) for name in names):
        return None
    width, layers, positions, vocabulary, inner = (int(values[name]) for name in names)
    projected = values.get("projection_dim")
    return TextShape(
        file.parent.name, width, layers, positions, vocabulary, positions, inner, projected if isinstance(projected, int) else 0
    )
