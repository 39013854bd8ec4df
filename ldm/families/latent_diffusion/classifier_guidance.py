"""Classifier guidance: a classifier of noisy latents, trained on a latent cache, kept in one file, told by the prompt what to look for."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ldm.config.errors import UserError, first_line
from ldm.data.cached import CachedLatents
from ldm.data.order import shuffled
from ldm.diffusion.batch import MomentBatch
from ldm.diffusion.process import Process
from ldm.diffusion.rng import Rng
from ldm.diffusion.samplers import Denoise
from ldm.families.draws import GuideTraining
from ldm.families.latent_diffusion.edits import towards
from ldm.families.latent_diffusion.engine import Canvas, Edit
from ldm.formats.latent_codec import LatentCodec
from ldm.formats.part import write_whole
from ldm.models.noisy_classifier import NoisyClassifier, NoisyClassifierConfig

KIND = "ldm noisy classifier"  # in a file's header


def says(texts: Sequence[str], words: Sequence[str]) -> Tensor:
    """Which texts have which words in them, whole and in either case, (N,W) bool."""
    found = [[re.search(rf"(?<!\w){re.escape(word)}(?!\w)", text, re.IGNORECASE) is not None for word in words] for text in texts]
    return torch.tensor(found, dtype=torch.bool).reshape(len(texts), len(words))


def train(
    load: Callable[[list[int], list[int]], MomentBatch],
    samples: int,
    process: Process,
    config: NoisyClassifierConfig,
    *,
    images: int,
    batch: int = 128,
    rate: float = 1e-3,
    seed: int = 0,
    device: str | torch.device = "cpu",
    on_images: Callable[[int, float], None] | None = None,
) -> NoisyClassifier:
    """A classifier that learned, at all noise levels of a process, which words captions say of latents (binary cross-entropy).

    Args:
        load: (sample numbers, global positions) to what a latent cache gives.
        images: how many it sees; the rate falls to 0 along half a cosine.
        on_images: told images seen and the loss.
    """
    torch.manual_seed(seed)
    network = config.build().to(device).train()
    optimiser = torch.optim.AdamW(network.parameters(), lr=rate, weight_decay=0.01)
    steps = max(1, images // batch)
    for step in range(steps):
        optimiser.param_groups[0]["lr"] = rate * 0.5 * (1 + math.cos(math.pi * step / steps))
        position = list(range(step * batch, (step + 1) * batch))
        found = load(shuffled(seed, position, samples).tolist(), position)
        rng = Rng(seed, position)
        x0 = found.mean if found.std is None else found.mean + found.std * rng.normal("posterior", found.mean.shape[1:])
        noised = process.noise(x0.to(device), rng)
        wanted = says(found.caption, config.words).to(noised.x)
        loss = F.binary_cross_entropy_with_logits(network(noised.x, noised.t), wanted)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        if on_images is not None:
            on_images((step + 1) * batch, float(loss.detach()))
    return network.eval()


@dataclass(frozen=True)
class Classifier:
    """A finished classifier and whose latents it knows."""

    network: NoisyClassifier
    autoencoder: str  # hash of the one whose latents it was trained on
    process: dict[str, Any]  # the noise it was trained with, as a scheduler's configuration
    hash: str = ""  # SHA-256 of its file

    def save(self, path: Path) -> None:
        """One safetensors file, whole or not at all."""
        from safetensors.torch import save

        about = {"network": self.network.config.to_dict(), "autoencoder": self.autoencoder, "process": self.process}
        state = {name: value.detach().cpu().contiguous() for name, value in self.network.state_dict().items()}
        write_whole(path, save(state, metadata={"kind": KIND, "about": json.dumps(about)}))

    @classmethod
    def load(cls, path: Path, autoencoder: str, process: Process, device: str | torch.device = "cpu") -> Classifier:
        """A file that `save` wrote.

        Raises:
            UserError: if it is none, or was made for another autoencoder's latents or other noise.
        """
        from ldm.formats.tensor_file import read_tensors

        try:
            state, texts = read_tensors(path)
            if texts.get("kind") != KIND:
                raise ValueError("it is not one that ldm classifier wrote")
            about = json.loads(texts["about"])
            values = about["network"]
            config = NoisyClassifierConfig(
                words=tuple(values["words"]),
                latent_channels=values["latent_channels"],
                channels=tuple(values["channels"]),
                grid=values["grid"],
            )
            network = config.build()
            network.load_state_dict(state)
        except OSError as error:
            raise UserError(f"classifier: {path}: {error.strerror or error}") from None
        except (ValueError, KeyError, TypeError, RuntimeError) as error:
            raise UserError(f"classifier: {path}: cannot be read ({first_line(error, 150)}); make it by ldm classifier") from None
        if about["autoencoder"] != autoencoder:
            raise UserError(f"classifier: {path} was trained on another autoencoder's latents; make one of this model by ldm classifier")
        if about["process"] != process.scheduler_config():
            raise UserError(f"classifier: {path} was trained with other noise than this model's; make one of this model by ldm classifier")
        return cls(
            network.to(device).eval().requires_grad_(False), autoencoder, about["process"], hashlib.sha256(path.read_bytes()).hexdigest()
        )

    def edit(self, prompts: Sequence[str], scale: float) -> Edit:
        """Guidance towards the words that each prompt of a call says, of those it knows: log p = sum log sigmoid (see `towards`).

        Raises:
            UserError: for a prompt that says none of them.
        """
        words = self.network.config.words
        wanted = says(prompts, words)
        for prompt, row in zip(prompts, wanted, strict=True):
            if not row.any():
                raise UserError(f"classifier: {prompt[:60]!r} says none of the words that it knows: {', '.join(words)}")

        def guide(denoise: Denoise, canvas: Canvas) -> Denoise:
            own = canvas.own(wanted.float())  # (B,W)

            def log_likelihood(x: Tensor, t: Tensor) -> Tensor:
                with torch.autocast(x.device.type, enabled=False):
                    odds = self.network(x.float(), t)
                return (F.logsigmoid(odds) * own).sum(1)

            inner = towards(log_likelihood, scale).guide
            assert inner is not None
            return inner(denoise, canvas)

        return Edit(guide=guide)


def learn(
    cache: Path,
    codec: LatentCodec,
    process: Process,
    training: GuideTraining,
    device: torch.device,
    on_images: Callable[[int, float], None],
) -> Classifier:
    """A classifier of a latent cache's words, in the latents of `codec` under the noise of `process`.

    Raises:
        UserError: for a cache of another autoencoder, or a word that every caption or none has.
    """
    data = CachedLatents(cache)
    data.require(autoencoder=codec.hash)
    data.require_shapes([])
    said = says([" ".join(captions) for captions in data.all_captions(list(range(len(data))))], training.words)
    for word, count in zip(training.words, said.sum(0).tolist(), strict=True):
        if not 0 < count < len(data):
            raise UserError(f"words: {word!r} is in {'no' if not count else 'every'} caption of {cache}; leave it out")
    network = train(
        lambda index, position: data.load(index, position, data.plan.resolution, training.seed, False),
        len(data),
        process,
        NoisyClassifierConfig(words=training.words, latent_channels=codec.channels),
        images=training.images,
        batch=training.batch,
        rate=training.rate,
        seed=training.seed,
        device=device,
        on_images=on_images,
    )
    return Classifier(network, codec.hash, process.scheduler_config())
