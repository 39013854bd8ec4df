"""A thing of two colours, a pair that the base was never shown, learned as a word (textual inversion), by all weights (DreamBooth), and by
what keys and values make of a word (Custom Diffusion, a rank-one edit).

`python -m pytest -m soak -s tests/soak/test_two_tone.py`, about 40 minutes of one core. An autoencoder that has seen
objects of one colour only cannot draw it, so the base is the quickstart trained on pictures of which half show two colours. Prints the
tables of docs/finetune.md.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ldm.__main__ import main
from ldm.data.scenes.captions import say, stated
from ldm.data.scenes.render import render, to_bytes
from ldm.data.scenes.source import prompts
from ldm.data.scenes.spec import COLOUR_RGB, COLOURS, SHAPES, Specs
from ldm.families.registry import load
from ldm.metrics.adherence import score

pytestmark = [pytest.mark.soak, pytest.mark.timeout(3600)]
ROOT = Path(__file__).parents[2]
SIDE, SHOWN = 64, 60
WORD_OF_TWO = ("models.diffusion.adapt.init=red and blue", "models.diffusion.adapt.vectors=3")
LEFT, RIGHT, DISC = COLOURS.index("purple"), COLOURS.index("yellow"), SHAPES.index("circle")


def scenes(count: int, seed: int) -> Specs:
    """Discs at all places on all backgrounds."""
    specs = prompts("one", count, seed=seed).specs
    return replace(specs, shape=np.full_like(specs.shape, DISC), colour=np.full_like(specs.colour, LEFT))


def said(specs: Specs, name: str) -> list[str]:
    """Captions in which the disc has a name of its own."""
    return [say(target).replace("purple circle", name) for target in stated(specs, "one")]


def halves(specs: Specs, left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Pictures (N,H,W,3) uint8 of objects with a left and a right colour."""
    both = [to_bytes(render(replace(specs, colour=colour), SIDE)) for colour in (left, right)]
    places = (np.arange(SIDE) + 0.5) / SIDE
    return np.where((places[None, None, :] < specs.x[:, :1, None])[..., None], *both)


def two_tone(specs: Specs) -> np.ndarray:
    """Pictures (N,H,W,3) uint8 of discs whose left half is purple and whose right half is yellow."""
    return halves(specs, np.full_like(specs.colour, LEFT), np.full_like(specs.colour, RIGHT))


def shows(images: np.ndarray, specs: Specs) -> np.ndarray:
    """Whether pictures show the disc of two colours where it was asked for, (N,)."""
    pixels = images.astype(np.float64) / 255
    coloured = np.ptp(pixels, axis=-1) > 0.2
    nearest = ((pixels[..., None, :] - COLOUR_RGB) ** 2).sum(-1).argmin(-1)
    places = (np.arange(SIDE) + 0.5) / SIDE
    found = []
    for seen, hue, x, y, side in zip(coloured, nearest, specs.x[:, 0], specs.y[:, 0], specs.side[:, 0], strict=True):
        total = seen.sum()
        parts = [seen & (hue == colour) for colour in (LEFT, RIGHT)]
        if total < 40 or min(part.sum() for part in parts) < 0.3 * total or sum(part.sum() for part in parts) < 0.85 * total:
            found.append(False)
            continue
        across = [np.broadcast_to(places, seen.shape)[part].mean() for part in parts]
        rows, columns = np.nonzero(seen)
        centre = places[columns].mean(), places[rows].mean()
        radius = np.sqrt(total / np.pi) / SIDE
        disc = np.hypot(places[None, :] - centre[0], places[:, None] - centre[1]) < radius
        round_enough = (disc & seen).sum() / (disc | seen).sum() > 0.85
        found.append(bool(across[1] - across[0] > 0.5 * radius and round_enough and np.hypot(centre[0] - x, centre[1] - y) < side))
    return np.array(found)


def folder(place: Path, specs: Specs, captions: Sequence[str]) -> Path:
    place.mkdir()
    for i, (pixels, caption) in enumerate(zip(two_tone(specs), captions, strict=True)):
        Image.fromarray(pixels).save(place / f"{i:02}.png")
        (place / f"{i:02}.txt").write_text(caption)
    return place


def mixed(place: Path, count: int, seed: int) -> Path:
    """Ordinary objects and ones of two colours, with captions that say so; never purple and yellow together."""
    place.mkdir()
    specs, rng = prompts("one", count, seed=seed).specs, np.random.default_rng(seed)
    texts = [say(target) for target in stated(specs, "one")]
    second = specs.colour.copy()
    for i in np.flatnonzero(rng.random(count) < 0.5):
        first = specs.colour[i, 0]
        free = [c for c in range(len(COLOURS)) if c != first and {c, first} != {LEFT, RIGHT}]
        second[i, 0] = rng.choice(free)
        texts[i] = texts[i].replace(f" {COLOURS[first]} ", f" {COLOURS[first]} and {COLOURS[second[i, 0]]} ")
    for i, (pixels, text) in enumerate(zip(halves(specs, specs.colour, second), texts, strict=True)):
        Image.fromarray(pixels).save(place / f"{i:05}.png")
        (place / f"{i:05}.txt").write_text(text)
    return place


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The quickstart on pictures of which half show two colours; LDM_TWO_TONE names one that is there already."""
    if place := os.environ.get("LDM_TWO_TONE"):
        return Path(place).resolve()
    root = tmp_path_factory.mktemp("base")
    pictures = mixed(root / "pictures", 16_000, 70)
    words = [f"data={{kind: folder, path: '{pictures}', captions: txt}}", f"out={root / 'run'}"]
    words += [f"stages.{name}=null" for name in ("autoencoder-gate", "evaluation-low", "evaluation")]
    old = Path.cwd()
    os.chdir(ROOT)
    try:
        assert main(["train", "configs/quickstart.yaml", *words]) == 0
    finally:
        os.chdir(old)
    return root / "run" / "model"


@pytest.fixture
def trained(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    monkeypatch.chdir(ROOT)

    def train(config: str, pictures: Path, *words: str, name: str = "run") -> Path:
        data = f"data={{kind: folder, path: '{pictures}', captions: txt}}"
        assert main(["train", f"configs/{config}", f"init={base}", data, f"out={tmp_path / name}", *words]) == 0
        return tmp_path / name / "model"

    return train


def others(seed: int) -> tuple[list[str], list]:
    """Ordinary discs of the colours that the base was shown as such."""
    asked = prompts("one", 400, seed=seed)
    rows = [i for i in range(400) if asked.specs.shape[i, 0] == DISC][:SHOWN]
    return [asked.text[i] for i in rows], [asked.targets[i] for i in rows]


def bound(model: Path, seed: int = 83) -> float:
    texts, targets = others(seed)
    return float(score(np.asarray(load(model).sample(texts, range(len(texts)))), targets)["bind"].mean())


def share(model: Path, name: str) -> float:
    """Of pictures that show the disc when it is asked for by its name, at places and on backgrounds as they come."""
    specs = scenes(SHOWN, 81)
    return float(shows(np.asarray(load(model).sample(said(specs, name), range(SHOWN))), specs).mean())


def test_the_measure_knows_the_disc_and_nothing_else() -> None:
    specs = scenes(200, 82)
    assert shows(two_tone(specs), specs).mean() > 0.99 and shows(two_tone(specs)[:, :, ::-1], specs).mean() == 0
    assert shows(to_bytes(render(specs, SIDE)), specs).mean() == 0


def test_the_autoencoder_can_draw_it(base: Path) -> None:
    import torch

    specs = scenes(SHOWN, 81)
    pixels = torch.from_numpy(two_tone(specs).transpose(0, 3, 1, 2).astype(np.float32) / 127.5 - 1)
    with torch.no_grad():
        rebuilt = load(base).codec.reconstruct(pixels).clamp(-1, 1)
    found = shows(((rebuilt + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy(), specs).mean()
    print(f"\nof pictures of it that the autoencoder rebuilds {found:.2f} show it")
    assert found > 0.9


def test_a_word_for_two_colours(base: Path, tmp_path: Path, trained: Callable[..., Path]) -> None:
    specs = scenes(17, 80)
    pictures = folder(tmp_path / "pictures", specs, said(specs, "<thing>"))
    asked = {name: share(base, name) for name in ("red circle", "red and blue circle", "purple and yellow circle")}
    print("\nthe base: " + ", ".join(f"'{name}' {found:.2f}" for name, found in asked.items()) + f"; other discs bind {bound(base):.2f}")
    found = []
    for vectors, init in ((1, "red circle"), (2, "red circle"), (4, "red and blue circle")):
        words = [f"models.diffusion.adapt.vectors={vectors}", f"models.diffusion.adapt.init={init}"]
        model = trained("finetune-textual-inversion.yaml", pictures, *words, name=f"word-{vectors}")
        found.append(share(model, "<thing>"))
        print(f"textual inversion, {vectors} vectors from '{init}': {found[-1]:.2f}; other discs bind {bound(model):.2f}")
    assert min(found) > asked["red and blue circle"] + 0.3


def test_a_thing_and_what_is_kept(base: Path, tmp_path: Path, trained: Callable[..., Path]) -> None:
    specs = scenes(9, 80)
    pictures = folder(tmp_path / "pictures", specs, said(specs, "sks circle"))
    print(f"\nbase: {share(base, 'sks circle'):.2f}, other discs bind {bound(base):.2f}")
    kind = ", ".join(others(84)[0][:24])
    kept = {}
    for name, words in (
        ("with prior", [f"prior_preservation.prompts=[{kind}]", "prior_preservation.images=96"]),
        ("without", ["prior=null"]),
    ):
        model = trained("finetune-dreambooth.yaml", pictures, *words, name=name.replace(" ", "-"))
        kept[name] = bound(model)
        print(f"DreamBooth {name}: {share(model, 'sks circle'):.2f}, other discs bind {kept[name]:.2f}")
    assert kept["with prior"] > kept["without"]


@pytest.mark.parametrize(
    ("config", "name", "file", "words"),
    [
        ("finetune-custom.yaml", "<thing> circle", "custom/pytorch_custom_diffusion_weights.safetensors", WORD_OF_TWO),
        ("finetune-rank-one.yaml", "sks circle", "lora/kohya.safetensors", ()),
    ],
)
def test_keys_and_values_of_a_word(
    base: Path, tmp_path: Path, trained: Callable[..., Path], config: str, name: str, file: str, words: tuple[str, ...]
) -> None:
    """Eight pictures, and 96 of the base's own of 24 prompts; how large the file is, and what becomes of other discs."""
    specs = scenes(9, 80)
    pictures = folder(tmp_path / "pictures", specs, said(specs, name))
    kind = ", ".join(others(84)[0][:24])
    before = bound(base)
    model = trained(config, pictures, f"prior_preservation.prompts=[{kind}]", "prior_preservation.images=96", *words)
    found, after = share(model, name), bound(model)
    size = (model.parent / file).stat().st_size / next((base / "unet").glob("*.safetensors")).stat().st_size
    print(f"\n{config}, '{name}': {found:.2f}; other discs bind {before:.2f} and then {after:.2f}; file {size:.2%} of the U-Net's")
    assert found > 0 and size < 0.05
