"""Benchmark of whole epochs from JPEGs: our latent cache beside train_text_to_image.py, which encodes at every step."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import count as numbers
from pathlib import Path
from typing import Any

import torch

from ldm.cli.benchmarks.loading import TOY, collate, quietly, their_images, write_jpegs
from ldm.cli.benchmarks.models import KL_SD, ModelShape, build_family, counts, distance, moments, small
from ldm.cli.benchmarks.rows import Case, Setup
from ldm.cli.benchmarks.training import DiffusersLoop, trainer
from ldm.data.cache import CacheOptions, write_cache
from ldm.data.cached import CachedLatents
from ldm.data.folder import FolderData, FolderSource
from ldm.data.loader import batches
from ldm.families.latent_diffusion.family import LatentDiffusionFamily

EPOCHS = 3
JPEG = (660, 480)  # px; see loading.PHOTO


def from_jpegs(setup: Setup) -> Iterator[Case]:
    """B4: the autoencoder has Stable Diffusion's size, the UNet is the small one; both sides fp32."""
    shape = small(setup.tiny)
    shape = shape if setup.tiny else replace(shape, autoencoder=KL_SD)
    images = 4 if setup.tiny else 8
    folder = setup.folder / "jpegs"
    write_jpegs(folder, images + 1, *(TOY if setup.tiny else JPEG))  # one is held out
    shape = replace(shape, batch=min(shape.batch, images))
    family = build_family(shape, setup.device)
    ours, theirs = Ours(family, shape, folder, setup), Theirs(family, shape, folder, setup)
    new = numbers()

    def whole() -> None:
        ours.build(setup.folder / f"cache{next(new)}")
        ours.epochs(EPOCHS)

    def check() -> float:
        ours.build(setup.folder / "cache")
        cached = CachedLatents(setup.folder / "cache")
        mine = cached.load(range(images), range(images), shape.pixels, 0, False).mean
        return distance([mine], [theirs.means()])

    error = "relative error of the latents' means"
    notes: dict[str, Any] = {"images": images, "jpegs": TOY if setup.tiny else JPEG, **counts(shape)}
    yield Case(
        name=f"{EPOCHS} epochs of {images}, cache built",
        kind="default",
        ours=whole,
        theirs=lambda: theirs.epochs(EPOCHS),
        check=check,
        tolerance=5e-2,
        error=error,
        per_call=EPOCHS * images,
        notes=notes,
    )
    yield Case(
        name="a later epoch",
        kind="default",
        ours=lambda: ours.epochs(1),
        theirs=lambda: theirs.epochs(1),
        check=check,
        tolerance=5e-2,
        error=error,
        per_call=images,
        notes=notes,
    )


class Ours:
    """The stages encode and diffusion, without the run around them."""

    def __init__(self, family: LatentDiffusionFamily, shape: ModelShape, folder: Path, setup: Setup) -> None:
        self.family, self.shape, self.device = family, shape, setup.device
        self.data: FolderData = FolderSource(path=str(folder), crop="centre", val_share=1e-9).build("train")
        nothing: Any = None
        self.trainer = trainer(family, "fp32", setup.folder, nothing, shape.pixels, shape.batch)
        self.model = self.trainer.processes.wrap(family)
        self.cache: CachedLatents | None = None

    def build(self, folder: Path) -> None:
        """Encode every image once."""

        def encode(image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
            return self.family.codec.moments(image.to(self.device))

        write_cache(folder, self.data, encode, CacheOptions(autoencoder="none", resolution=self.shape.pixels), batch=self.shape.batch)
        self.cache = CachedLatents(folder)

    def epochs(self, epochs: int) -> None:
        """Updates from the cache."""
        assert self.cache is not None
        stop = epochs * len(self.data) // self.shape.batch
        for batch in batches(self.cache, seed=0, batch=self.shape.batch, resolution=self.shape.pixels, stop=stop):
            self.trainer._update(self.model, batch)
            self.trainer.step += 1


class Theirs:
    """The loop over transformed images: autoencoder and text encoder at every step."""

    def __init__(self, family: LatentDiffusionFamily, shape: ModelShape, folder: Path, setup: Setup) -> None:
        from torch.utils.data import DataLoader

        held = set(FolderSource(path=str(folder), crop="centre", val_share=1e-9).build("val").names)
        files = sorted(f.name for f in folder.glob("*.jpg"))
        self.device, self.tokens = setup.device, family.text.tokens
        everything = quietly(lambda: their_images(folder, shape.pixels, setup.folder / "arrow"))
        self.data: Any = quietly(lambda: everything.select([i for i, name in enumerate(files) if name not in held]))
        self.loader: Any = DataLoader(self.data, batch_size=shape.batch, shuffle=True, collate_fn=collate, num_workers=0)
        self.loop = DiffusersLoop(family, moments(shape), "fp32", setup.device, online=True)

    def epochs(self, epochs: int) -> None:
        """Updates from images."""
        for _ in range(epochs):
            for batch in self.loader:
                self.loop.pixels = batch["pixel_values"].to(self.device)
                self.loop.ids = self.tokens(batch["text"])[0].to(self.device)
                self.loop.step()

    def means(self) -> torch.Tensor:
        """The posterior means of all images, as the UNet would be told them."""
        assert self.loop.vae is not None
        with torch.no_grad():
            pixels = torch.stack([self.data[i]["pixel_values"] for i in range(len(self.data))]).to(self.device)
            return (self.loop.vae.encode(pixels).latent_dist.mean * self.loop.vae.config.scaling_factor).cpu()
