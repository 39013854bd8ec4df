"""The model that is exported: its parts as float32 weights under the names of files, and what belongs to them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from ldm.diffusion.process import Process
from ldm.families.codec import Statistics
from ldm.families.finished import load
from ldm.families.latent_diffusion import LatentDiffusionFamily, read_record
from ldm.folder import open_model, read_json
from ldm.models.autoencoder import KLConfig, VQConfig, fold_latent_stats
from ldm.models.unet import UNetConfig
from ldm.text_files import text_part

CARD = "README.md"


@dataclass(frozen=True)
class Part:
    """A network as files keep it."""

    config: dict[str, Any]  # the content of config.json
    state: dict[str, Tensor]  # float32


@dataclass(frozen=True)
class Source:
    """A whole text-to-image model."""

    name: str  # for titles: the run's or folder's
    parts: dict[str, Part]  # unet, vae or vqvae, text_encoder
    network: UNetConfig
    autoencoder: KLConfig | VQConfig
    statistics: Statistics | None  # of a VQ autoencoder's latents, where they were measured; a KL one has them folded in
    tokenizer: Any
    process: Process
    scheduler: dict[str, Any]  # the content of scheduler_config.json
    defaults: dict[str, Any]  # how it wants to be sampled
    story: dict[str, Any]  # how it was made; empty: elsewhere
    card: str  # the model card that came with it; empty: none
    notices: tuple[str, ...]  # what is not taken along
    hash: str

    @property
    def codec(self) -> str:
        """The folder name of its autoencoder."""
        return "vae" if isinstance(self.autoencoder, KLConfig) else "vqvae"

    @property
    def clip(self) -> bool:
        """Whether its text encoder is a CLIP's."""
        return str(self.parts["text_encoder"].config["model_type"]) == "clip_text_model"

    @property
    def inpaints(self) -> bool:
        """Whether its U-Net is told a masked picture besides the latents (Stable Diffusion inpainting: 4 + 4 + 1 channels)."""
        return self.network.in_channels == 2 * self.network.out_channels + 1

    def record(self) -> dict[str, Any]:
        """What a copy must say besides the networks' own configurations, so that it is sampled and told of as this one."""
        from ldm import __version__

        defaults = {**self.defaults, "size": list(self.defaults["size"])}
        offset = {"offset_noise": self.process.offset_noise} if self.process.offset_noise else {}
        return {"defaults": defaults, "scheduler": self.scheduler, **offset, "ldm_version": __version__, "story": self.story}


def read_source(model: str) -> Source:
    """A model by folder, run folder or any other name that `ldm.load` takes, checked as strictly as for sampling.

    Raises:
        UserError: naming what is missing, damaged or does not belong together.
    """
    family = load(model)
    path = Path(model).expanduser()
    root = open_model(path if path.exists() else model).folder
    record = read_record(root)
    autoencoder, state, statistics = _autoencoder(family)
    parts = {
        "unet": Part(_unet_config(family), dict(family.unet.state_dict())),
        "vae" if isinstance(autoencoder, KLConfig) else "vqvae": Part(autoencoder.to_diffusers(), state),
        "text_encoder": Part(*text_part(family.text.model)),
    }
    # As it stands in the folder: how others like to sample it is said there too.
    scheduler = read_json(root / "scheduler" / "scheduler_config.json")
    card = (root / CARD).read_text(encoding="utf-8") if (root / CARD).is_file() and not record else ""
    left = [name for name in ("safety_checker", "feature_extractor", "image_encoder") if (root / name).is_dir()]
    notices = (f"left out, because ldm has no use for it: {', '.join(left)}",) if left else ()
    return Source(
        name=record.get("story", {}).get("name") or _name(path if path.exists() else root), parts=parts, network=family.config.network,
        autoencoder=autoencoder, statistics=statistics, tokenizer=family.text.tokenizer, process=family.process,
        scheduler=scheduler, defaults=family.defaults, story=record.get("story", {}), card=card, notices=notices,
        hash=family.content_hash,
    )  # fmt: skip


def _name(path: Path) -> str:
    path = path.resolve()
    return path.parent.name if path.name == "model" else path.stem


def _unet_config(family: LatentDiffusionFamily) -> dict[str, Any]:
    network = family.config.network
    return replace(network, sample_size=network.sample_size or family.resolution // family.factor).to_diffusers()


def _autoencoder(family: LatentDiffusionFamily) -> tuple[KLConfig | VQConfig, dict[str, Tensor], Statistics | None]:
    """The autoencoder; statistics that were measured are folded into a KL one, and told beside a VQ one."""
    network, statistics = family.codec.network, family.codec.statistics
    config, state = network.config, dict(network.state_dict())
    if not statistics.images:  # its own configuration says it all
        return config, state, None
    if isinstance(config, VQConfig):
        return config, state, statistics
    return *fold_latent_stats(config, state, statistics.mean, statistics.std), None


def with_quant_convolutions(config: KLConfig, state: Mapping[str, Tensor]) -> tuple[KLConfig, dict[str, Tensor]]:
    """The same KL autoencoder with its shift folded into 1x1 convolutions on both sides of the latents, as CompVis' has them.

    Its scaling factor stays. Where nothing is to be done, the weights are the same tensors.
    """
    shift = config.shift_factor or 0.0
    if config.quant_conv and config.post_quant_conv and not shift:
        return replace(config, shift_factor=None), dict(state)
    channels = config.latent_channels
    folded, made = fold_latent_stats(config, state, (shift,) * channels, (1.0,) * channels)
    return replace(folded, scaling_factor=config.scaling_factor), made
