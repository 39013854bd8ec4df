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

from ldm.data.scenes.captions import Target, say
from ldm.data.scenes.checker import read
from ldm.data.scenes.render import render, to_bytes
from ldm.data.scenes.source import prompts
from ldm.families.latent_diffusion.family import LatentDiffusionFamily
from ldm.families.registry import load
from ldm.metrics.adherence import score

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
