"""Prior preservation: two data sets in fixed shares, pictures that the base draws once, and the whole command."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from finished_model import SIDE, Pictures
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ldm.__main__ import main
from ldm.config.errors import UserError
from ldm.data.concatenation import Mixture
from ldm.data.loader import batches
from ldm.families.registry import load
from ldm.runs.prior_preservation import PriorPreservation, draw


class Named(Pictures):
    """Pictures whose captions say whose they are."""

    mirrors = True

    def __init__(self, name: str, count: int) -> None:
        super().__init__(count)
        self.name = name

    def captions(self, index, position, seed):  # type: ignore[no-untyped-def]
        """One caption for each."""
        return [f"{self.name} {i}" for i in index]


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 12), st.integers(1, 40), st.floats(0.1, 4.0))
def test_shares_are_as_asked_and_all_samples_come(new: int, kind: int, weight: float) -> None:
    share = PriorPreservation(prompts=("x",), weight=weight).share
    mixed = Mixture(Named("new", new), Named("kind", kind), share)
    captions = mixed.captions(range(len(mixed)), range(len(mixed)), 0)
    assert {f"new {i}" for i in range(new)} | {f"kind {i}" for i in range(kind)} == set(captions)
    found = sum(caption.startswith("kind") for caption in captions)
    assert abs(found - share * len(mixed)) <= 1
    for name, count in (("new", new), ("kind", kind)):
        times = [captions.count(f"{name} {i}") for i in range(count)]
        assert max(times) - min(times) <= 1


def test_a_batch_is_its_samples_in_its_order() -> None:
    mixed = Mixture(Named("new", 3), Named("kind", 9), 0.5)
    index, position = [17, 0, 9, 5, 12], [4, 8, 15, 16, 23]
    together = mixed.load(index, position, 16, 0, False)
    assert together.caption == tuple(mixed.captions(index, position, 0)) and together.position.tolist() == position
    for row, (i, at) in enumerate(zip(index, position, strict=True)):
        alone = mixed.load([i], [at], 16, 0, False)
        assert torch.equal(alone.image[0], together.image[row]) and alone.caption[0] == together.caption[row]
    assert mixed.origin(0) == "picture 0" and len(mixed.fingerprint()) == 64
    assert mixed.fingerprint() != Mixture(Named("new", 3), Named("kind", 9), 0.4).fingerprint()
    assert len(list(batches(mixed, seed=0, batch=6, resolution=16, stop=4))) == 4


def test_pictures_are_drawn_once_and_those_that_are_missing_again(kl_model: Path, tmp_path: Path) -> None:
    prior, said = PriorPreservation(prompts=("a small red circle", "a large blue ring"), images=5), []
    draw(prior, str(kl_model), tmp_path, "cpu", said.append)
    files = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert len(files) == 10 and (tmp_path / "00003.txt").read_text() == "a large blue ring"
    model = load(kl_model)
    alone = model.sample(["a large blue ring"], [3])[0].numpy()
    assert np.array_equal(np.asarray(Image.open(tmp_path / "00003.png")), alone)
    (tmp_path / "00003.png").unlink()
    (tmp_path / "00004.txt").write_text("something else")
    draw(prior, str(kl_model), tmp_path, "cpu", said.append)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == files and "drawing 2 of 5" in said[-2]
    count = len(said)
    draw(prior, str(kl_model), tmp_path, "cpu", said.append)
    assert len(said) == count


def test_as_a_command_with_one_caption_for_all(kl_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pictures = tmp_path / "toy"
    pictures.mkdir()
    for i in range(4):
        Image.new("RGB", (SIDE, SIDE + i), (60 * i, 0, 90)).save(pictures / f"{i}.png")
    file = tmp_path / "toy.yaml"
    file.write_text(
        "\n".join(
            [
                f"init: {kl_model}",
                f"data: {{kind: folder, path: {pictures}, caption: a small red toy}}",
                f"out: {tmp_path / 'run'}",
                "workers: 0",
                "prior_preservation: {prompts: [a small red circle], images: 4}",
                "models: {diffusion: {kind: latent_diffusion}}",
                "stages:",
                f"  tune: {{kind: train, model: diffusion, resolution: {SIDE}, images: 16, batch: 4, samples: 1}}",
                "  export: {kind: export}",
            ]
        )
        + "\n"
    )
    assert main(["train", str(file), "--plan"]) == 0
    assert "of prior_preservation.prompts 4 pictures will be drawn first" in capsys.readouterr().out
    assert main(["train", str(file)]) == 0
    assert (
        len(list((tmp_path / "run/pretrained/prior_preservation").glob("*.png"))) == 4
        and (tmp_path / "run/model/model_index.json").is_file()
    )
    capsys.readouterr()
    assert main(["train", str(file), "--plan"]) == 0
    assert "skip  tune" in capsys.readouterr().out
    assert main(["train", str(file), "prior_preservation.prompts=[]"]) == 2 and "give one of them" in capsys.readouterr().err
    assert main(["train", str(file), "init="]) == 2 and "prior_preservation.prompts: the base model draws them" in capsys.readouterr().err


def test_one_of_prompts_and_path() -> None:
    for wrong in ({}, {"prompts": ("a",), "path": "b"}):
        with pytest.raises(UserError, match="give one of them"):
            PriorPreservation(**wrong)  # type: ignore[arg-type]
    assert PriorPreservation(path="x", weight=3.0).share == 0.75
