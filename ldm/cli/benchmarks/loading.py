"""Benchmarks of data loading: JPEG files and cached latents, beside datasets with the usual transforms."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ldm.cli.benchmarks.models import CAPTIONS
from ldm.cli.benchmarks.rows import Case, Setup
from ldm.data.cache import CacheOptions, write_cache
from ldm.data.cached import CachedLatents
from ldm.data.folder import FolderSource
from ldm.data.loader import batches
from ldm.diffusion.batch import ImageBatch

LEVELS = 1.5  # of 255: two good resize filters differ by less
PHOTO, TOY = (1032, 768), (96, 64)  # px; resized, an even number of columns is cut off, so that both sides' centres coincide


def write_jpegs(folder: Path, count: int, width: int, height: int) -> None:
    """Smooth coloured noise with some grain, quality 90, each with its caption in a .txt file."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for i in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)).astype(np.float32)
        grain = rng.normal(0, 4, (height, width, 1))
        image = Image.fromarray((smooth + grain).clip(0, 255).astype(np.uint8))
        image.save(folder / f"{i:04d}.jpg", quality=90)
        (folder / f"{i:04d}.txt").write_text(CAPTIONS[i % len(CAPTIONS)])


def their_images(folder: Path, pixels: int, store: Path, random_crop: bool = False) -> Any:
    """A datasets.Dataset of the JPEGs' bytes with the transforms of train_text_to_image.py, set on the fly.

    Resizing is bicubic, as ours is.
    """
    from datasets import Dataset, Features, Value
    from datasets import Image as ImageColumn
    from torchvision import transforms

    files = sorted(folder.glob("*.jpg"))
    rows = {"image": [{"bytes": f.read_bytes(), "path": None} for f in files], "text": [f.with_suffix(".txt").read_text() for f in files]}
    Dataset.from_dict(rows, features=Features({"image": ImageColumn(), "text": Value("string")})).save_to_disk(str(store))
    steps = transforms.Compose(
        [
            transforms.Resize(pixels, interpolation=transforms.InterpolationMode.BICUBIC),
            transforms.RandomCrop(pixels) if random_crop else transforms.CenterCrop(pixels),
            transforms.ToTensor(),
            transforms.Normalize([0.5], [0.5]),
        ]
    )

    def prepare(examples: dict[str, list[Any]]) -> dict[str, list[Any]]:
        return {**examples, "pixel_values": [steps(image.convert("RGB")) for image in examples["image"]]}

    return Dataset.load_from_disk(str(store)).with_transform(prepare)


def collate(examples: list[dict[str, Any]]) -> dict[str, Any]:
    """As in train_text_to_image.py."""
    pixels = torch.stack([example["pixel_values"] for example in examples]).to(memory_format=torch.contiguous_format).float()
    return {"pixel_values": pixels, "text": [example["text"] for example in examples]}


def quietly(call: Callable[[], Any]) -> Any:
    """The call's result, without the progress bars of datasets."""
    from datasets.utils.logging import disable_progress_bar, enable_progress_bar

    disable_progress_bar()
    try:
        return call()
    finally:
        enable_progress_bar()


def from_jpegs(setup: Setup) -> Iterator[Case]:
    """B15."""
    count, batch = (4, 2) if setup.tiny else (32, 16)
    folder = setup.folder / "jpegs"
    write_jpegs(folder, count + 1, *(TOY if setup.tiny else PHOTO))  # one is held out
    for pixels in (32,) if setup.tiny else (256, 512):
        yield _images(folder, pixels, batch, setup.folder / f"arrow{pixels}")


def _images(folder: Path, pixels: int, batch: int, store: Path) -> Case:
    from torch.utils.data import DataLoader

    data = FolderSource(path=str(folder), crop="centre", val_share=1e-9).build("train")
    held = {Path(name).stem for name in FolderSource(path=str(folder), crop="centre", val_share=1e-9).build("val").names}
    theirs = quietly(lambda: their_images(folder, pixels, store))
    kept = [i for i, f in enumerate(sorted(folder.glob("*.jpg"))) if f.stem not in held]
    theirs = quietly(lambda: theirs.select(kept))
    loader: Any = DataLoader(theirs, batch_size=batch, shuffle=True, collate_fn=collate, num_workers=0)
    epoch = len(data) // batch

    def our_side() -> None:
        for seen in batches(data, seed=0, batch=batch, resolution=pixels, stop=epoch):
            seen.to("cpu")  # numbers, as theirs are

    def their_side() -> None:
        for _ in islice(loader, epoch):
            pass

    def check() -> float:
        index = list(range(min(4, len(data))))
        ours: ImageBatch = data.load(index, index, pixels, 0, False)
        expected = torch.stack([theirs[i]["pixel_values"] for i in index])
        return float((ours.image - expected).abs().mean() * 127.5)

    return Case(
        name=f"JPEGs to {pixels} px, batch {batch}, no workers",
        kind="equal",
        ours=our_side,
        theirs=their_side,
        check=check,
        tolerance=LEVELS,
        error="mean difference in levels of 255",
        per_call=epoch * batch,
    )


class _Blank:
    """Pictures of one colour each, which the stand-in for an autoencoder turns into noise."""

    mirrors = True

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def load(self, index: Any, position: Any, resolution: int, seed: int, flip: bool) -> ImageBatch:
        image = torch.tensor([float(i) for i in index]).view(-1, 1, 1, 1).expand(-1, 3, 1, 1)
        size = torch.tensor([[resolution, resolution, 0, 0, resolution, resolution]] * len(index)).float()
        caption = tuple(self.captions(index, position, seed))
        return ImageBatch(image=image, caption=caption, size=size, position=torch.tensor(list(position)))

    def captions(self, index: Any, position: Any, seed: int) -> list[str]:
        return [CAPTIONS[i % len(CAPTIONS)] for i in index]

    def all_captions(self, index: Any) -> list[list[str]]:
        return [[caption] for caption in self.captions(index, index, 0)]

    def origin(self, index: int) -> str:
        return str(index)

    def describe(self) -> dict[str, object]:
        return {}

    def fingerprint(self) -> str:
        return str(self.count)


def cached(setup: Setup) -> Iterator[Case]:
    """B16."""
    from datasets import Array3D, Dataset, Features, Value
    from torch.utils.data import DataLoader

    count, batch, shape = (8, 4, (4, 4, 4)) if setup.tiny else (4096, 64, (4, 32, 32))

    def encode(image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        drawn = [torch.randn(2, *shape, generator=torch.Generator().manual_seed(int(i))) for i in image[:, 0, 0, 0]]
        mean, std = torch.stack(drawn).unbind(1)
        return mean, std.abs()

    source: Any = _Blank(count)
    write_cache(setup.folder / "cache", source, encode, CacheOptions(autoencoder="none", resolution=8 * shape[1]), batch=batch)
    ours = CachedLatents(setup.folder / "cache")
    everything = ours.load(range(count), range(count), 8 * shape[1], 0, False)
    assert everything.std is not None
    column = Array3D(shape=shape, dtype="float16")
    rows = {"mean": everything.mean.half().numpy(), "std": everything.std.half().numpy(), "text": list(everything.caption)}
    features = Features({"mean": column, "std": column, "text": Value("string")})
    quietly(lambda: Dataset.from_dict(rows, features=features).save_to_disk(str(setup.folder / "arrow")))
    theirs = Dataset.load_from_disk(str(setup.folder / "arrow")).with_format("torch")
    loader: Any = DataLoader(theirs, batch_size=batch, shuffle=True, num_workers=0)  # type: ignore[arg-type]
    epoch = count // batch

    def our_side() -> None:
        for _ in batches(ours, seed=0, batch=batch, resolution=8 * shape[1], stop=epoch):
            pass

    def their_side() -> None:
        for found in islice(loader, epoch):
            found["mean"].float(), found["std"].float()

    def check() -> float:
        index = [0, count // 2, count - 1]
        mine, found = ours.load(index, index, 8 * shape[1], 0, False), theirs[index]
        assert mine.std is not None
        same = list(mine.caption) == list(found["text"])
        return max(float((mine.mean - found["mean"].float()).abs().max()), float((mine.std - found["std"].float()).abs().max()), 1.0 - same)

    yield Case(
        name=f"{'x'.join(map(str, shape))}, mean and deviation, batch {batch}",
        kind="equal",
        ours=our_side,
        theirs=their_side,
        check=check,
        tolerance=0.0,
        error="largest difference",
        per_call=epoch * batch,
        notes={"images": count},
    )
