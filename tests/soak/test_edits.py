"""What edits change and what they keep, by the exact checker, with the quickstart's model.

`python -m pytest -m soak -s tests/soak/test_edits.py`, after `make quickstart`; LDM_RUNS names another folder than runs/. Prints the
figures of docs/edit.md.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from ldm.__main__ import main
from ldm.data.scenes.captions import Phrase, Target, say
from ldm.data.scenes.checker import colours, read
from ldm.data.scenes.render import render, to_bytes
from ldm.data.scenes.source import prompts
from ldm.data.scenes.spec import CELLS, SHAPES, Specs
from ldm.families.draws import OWN, VideoEdit, Wanted
from ldm.families.latent_diffusion.family import LatentDiffusionFamily
from ldm.families.registry import load
from ldm.metrics.adherence import score
from ldm.text.prompt_syntax import literal
from ldm.text.prompt_syntax import read as prompt

pytestmark = [pytest.mark.soak, pytest.mark.timeout(3600)]
RUNS = Path(os.environ.get("LDM_RUNS", "runs"))
SIDE, COUNT = 64, 32
KEPT = ("shape", "cell", "count", "tone")
COLOURS = 8


@pytest.fixture(scope="module")
def model() -> LatentDiffusionFamily:
    if not (RUNS / "quickstart" / "model").is_dir():
        pytest.skip(f"no {RUNS}/quickstart")
    return load(RUNS / "quickstart" / "model")


def recoloured(target: Target) -> Target:
    (phrase,) = target.phrases
    return replace(target, phrases=(replace(phrase, colour=(phrase.colour + 3) % COLOURS),))


def test_one_colour_word_by_image_to_image(model: LatentDiffusionFamily) -> None:
    asked = prompts("one", 2 * COUNT, seed=77)
    drawn = model.sample(list(asked.text), range(2 * COUNT))
    right = [i for i, fine in enumerate(score(drawn.numpy(), asked.targets)["strict"]) if fine == 1][:COUNT]
    pictures, targets = drawn[right], [recoloured(asked.targets[i]) for i in right]
    far, new, others = [], [], []
    for strength in (0.2, 0.4, 0.6, 0.8, 0.9):
        edited = model.sample(
            [say(target) for target in targets], range(1000, 1000 + len(right)), edits=model.edits(pictures, strength=strength)
        )
        scores = {name: float(np.nanmean(values)) for name, values in score(edited.numpy(), targets).items() if name in (*KEPT, "colour")}
        kept = float(np.mean([scores[name] for name in KEPT]))
        far.append(float((edited.float() - pictures.float()).abs().mean()))
        told = f"colour {scores['colour']:.3f}, kept {kept:.3f}, distance {far[-1]:.1f}"
        print(f"\n{len(right)} pictures, strength {strength}: {told}", end="")
        new.append(scores["colour"])
        others.append(kept)
    assert far == sorted(far) and max(new[-2:]) > 0.85 and min(others[-2:]) >= 0.9


@pytest.mark.parametrize("fact", ["colour", "shape"])
def test_one_word_by_inversion_and_by_prompt_to_prompt(model: LatentDiffusionFamily, fact: str) -> None:
    """The word's fact, the other facts, and how much of the object's outline and of the ground stays; LDM_EDITS says how many pictures."""
    many = int(os.environ.get("LDM_EDITS", COUNT))
    asked = prompts("one", 2 * COUNT, seed=77)
    drawn = model.sample(list(asked.text[: many + 8]), range(many + 8))
    right = [i for i, fine in enumerate(score(drawn.numpy(), asked.targets[: many + 8])["strict"]) if fine == 1][:many]
    before, plain = drawn[right], Wanted(guidance=1.0)
    targets = [reworded(asked.targets[i], fact) for i in right]

    def changed(real: bool, cross: float, inward: float) -> tuple[float, float]:
        found = []
        for place, (i, target) in enumerate(zip(right, targets, strict=True)):
            source, picture = literal(asked.text[i]), before[place : place + 1]
            edits = model.inverted(picture, source, model.settings(plain), 1.0) if real else ()
            edits += model.exchanged(source, cross, inward) if cross or inward else ()
            found.append(model.sample([say(target)], [i], plain if real else OWN, edits=edits))
        made = torch.cat(found)
        graded = score(made.numpy(), targets)
        kept = float(np.mean([np.nanmean(graded[name]) for name in ("colour", "shape", "cell", "tone") if name != fact]))
        (one, other), new = (outline(images) for images in (before, made)), float(np.nanmean(graded[fact]))
        same = float(((one & other).sum((1, 2)) / (one | other).sum((1, 2)).clamp(min=1)).mean())
        way = f"{'inverted' if real else 'drawn'}, cross {cross:g}, self {inward:g}"
        print(f"\n{fact}, {len(right)} pictures, {way}: new {new:.3f}, kept {kept:.3f}, outline {same:.3f}", end="")
        return new, kept

    changed(False, 0, 0)
    new, kept = changed(False, 0.8, 0.4)
    changed(True, 0, 0)
    changed(True, 0.8, 0.4)
    assert new >= 0.9 and kept >= 0.95


def reworded(target: Target, fact: str) -> Target:
    """With the word for a fact changed to the third after it."""
    (phrase,) = target.phrases
    return replace(target, phrases=(replace(phrase, **{fact: (getattr(phrase, fact) + 3) % {"colour": 8, "shape": 6}[fact]}),))


def outline(images: torch.Tensor) -> torch.Tensor:
    """Where pictures (N,H,W,3) differ from their border, (N,H,W) bool."""
    values = images.float()
    border = torch.cat([values[:, 0], values[:, -1], values[:, :, 0], values[:, :, -1]], 1).median(1).values
    return (values - border[:, None, None]).abs().amax(-1) > 50


def test_one_of_two_objects_by_inpainting(model: LatentDiffusionFamily) -> None:
    """Two scenes side by side, an object in each half; the right one's colour and shape are asked to be another's."""
    scenes = prompts("one", 400, seed=5)
    x, tone = scenes.specs.x[:, 0], scenes.specs.tone
    pairs: list[tuple[int, int]] = []
    for k in range(3):
        left, right = (np.flatnonzero(side & (tone == k)) for side in (x < 0.28, x > 0.72))
        pairs += list(zip(left.tolist(), right.tolist(), strict=False))
    pairs = pairs[:COUNT]
    images, half = to_bytes(render(scenes.specs, SIDE)), SIDE // 2
    both = torch.from_numpy(np.stack([np.concatenate([images[a][:, :half], images[b][:, half:]], axis=1) for a, b in pairs]))
    new = torch.zeros(len(pairs), SIDE, SIDE, dtype=torch.bool)
    new[:, :, half:] = True
    targets = []
    for row, (_, b) in enumerate(pairs):
        (other,) = scenes.targets[pairs[(row + 1) % len(pairs)][1]].phrases
        (own,) = scenes.targets[b].phrases
        targets.append(replace(scenes.targets[b], phrases=(replace(own, colour=other.colour, shape=other.shape),)))
    drawn = model.sample([say(target) for target in targets], range(len(pairs)), edits=model.edits(both, new))
    found, before = read(drawn.numpy()), read(both.numpy())
    kept, colour, shape = [], [], []
    for i, target in enumerate(targets):
        one, was = (
            next(((r.colour[k], r.shape[k], r.size[k], r.cell[k]) for k in range(*r.objects(i).indices(len(r.x))) if r.x[k] < 0.45), None)
            for r in (found, before)
        )
        kept.append(one is not None and one == was)
        there = [k for k in range(*found.objects(i).indices(len(found.x))) if found.x[k] >= 0.45]
        (phrase,) = target.phrases
        colour.append(len(there) == 1 and found.colour[there[0]] == phrase.colour)
        shape.append(len(there) == 1 and found.shape[there[0]] == phrase.shape)
    both_right = np.mean(np.logical_and(colour, shape))
    print(
        f"\n{len(pairs)} pictures: other object as it was {np.mean(kept):.3f}, new colour {np.mean(colour):.3f}, "
        f"new shape {np.mean(shape):.3f}, both {both_right:.3f}"
    )
    assert torch.equal(drawn[~new], both[~new]) and np.mean(kept) >= 0.95 and np.mean(colour) >= 0.7


def test_a_classifier_leads_where_the_network_is_told_nothing(model: LatentDiffusionFamily, tmp_path: Path) -> None:
    """Guidance 0 leaves the prompt to the classifier alone; LDM_CLASSIFIER names one of the six shapes that is there already."""
    file = Path(os.environ.get("LDM_CLASSIFIER", tmp_path / "shapes.safetensors"))
    if not file.exists():
        latents, base = tmp_path / "latents", str(RUNS / "quickstart" / "model")
        config = str(Path(__file__).parents[2] / "configs" / "quickstart.yaml")
        assert main(["data", "encode", config, "--model", base, "--out", str(latents), "--resolution", "64", "--images", "8000"]) == 0
        words = ["--words", ",".join(SHAPES), "--images", "100000", "--out", str(file)]
        assert main(["classifier", str(latents), "--model", base, *words]) == 0
    guide, asked = model.guide(file), [shape for shape in range(len(SHAPES)) for _ in range(8)]
    texts, targets = [f"a {SHAPES[shape]}" for shape in asked], [Target((Phrase(shape=shape),)) for shape in asked]
    found = {}
    for guidance in (0.0, 1.0):
        for scale in (0.0, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0):
            edits = (guide.edit(texts, scale),) if scale else ()
            images = model.sample(texts, range(len(texts)), Wanted(guidance=guidance), edits=edits).numpy()
            graded = score(images, targets)
            found[guidance, scale] = float(graded["shape"].mean())
            told = f"shape {found[guidance, scale]:.3f}, one object {graded['count'].mean():.3f}"
            print(f"\n{len(texts)} prompts, guidance {guidance:g}, classifier {scale:g}: {told}", end="")
    assert found[0.0, 0.0] < 0.2 and np.mean([found[0.0, scale] for scale in (8.0, 16.0, 32.0)]) > found[0.0, 0.0] + 0.05


def moving(frames: int) -> tuple[Specs, Target]:
    """A ring that crosses the middle of the picture from left to right, and what its frames show whatever the place."""
    asked = prompts("one", 400, seed=5)
    row = next(
        i
        for i in range(400)
        if asked.targets[i].objects[0].cell == CELLS.index("center") and asked.specs.shape[i, 0] == SHAPES.index("ring")
    )
    still = asked.specs.take(np.full(frames, row))
    (phrase,) = asked.targets[row].phrases
    return replace(still, x=np.linspace(0.25, 0.75, frames)[:, None]), replace(asked.targets[row], phrases=(replace(phrase, cell=-1),))


def steadiness(frames: np.ndarray) -> float:
    """Peak signal-to-noise ratio (dB) of the background of each frame beside the one before."""
    values, ground = frames.astype(np.float64) / 255, colours(frames) < 0
    found = []
    for a, b, first, second in zip(values, values[1:], ground, ground[1:], strict=False):
        both = np.repeat(np.repeat(first & second, values.shape[1] // ground.shape[1], 0), values.shape[2] // ground.shape[2], 1)
        found.append(-10 * np.log10(max(float(((a - b)[both] ** 2).mean()), 1e-10)))
    return float(np.mean(found))


def test_a_clip_drawn_frame_by_frame_and_in_shuffled_sheets(model: LatentDiffusionFamily) -> None:
    """Of 16 frames: whether they show the new colour, and how steady the background is; the quickstart's model cannot draw sheets."""
    specs, target = moving(16)
    frames, new = torch.from_numpy(to_bytes(render(specs, SIDE))), recoloured(target)
    settings, found = model.settings(OWN), {}
    print(f"\n16 frames themselves: background {steadiness(frames.numpy()):.1f} dB", end="")
    for strength in (0.7, 0.9):
        apart = model.sample([say(new)] * 16, range(16), edits=model.edits(frames, strength=strength))
        made = {"each with noise of its own": apart}
        for cells in (1, 2):
            clip = VideoEdit(prompt=prompt(say(new)), negative=prompt(""), cells=cells, strength=strength, source=None, seed=0)
            made[f"cells {cells}"] = model.restyle(frames, clip, settings, print)
        for name, images in made.items():
            bind, steady = float(score(images.numpy(), [new] * 16)["bind"].mean()), steadiness(images.numpy())
            found[strength, name] = bind
            print(f"\nstrength {strength:g}, {name}: bind {bind:.3f}, background {steady:.1f} dB", end="")
    assert found[0.9, "cells 1"] >= 0.8
