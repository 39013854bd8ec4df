"""A LoRA or a word that a model was made with is not applied to it a second time; its base takes it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from finished_model import STORY, Pictures

from ldm.config.errors import UserError
from ldm.families.family import Context, Product
from ldm.families.latent_diffusion.family import LatentDiffusion
from ldm.families.latent_diffusion.fine_tuning import LowRank, TextualInversion
from ldm.families.registry import open_finished
from ldm.formats.assembly import assemble
from ldm.sampling.adapters import add

BOTH = LowRank(rank=2, alpha=2, text_rank=2, targets=("to_q", "conv1"))
WORD = TextualInversion(token="<thing>", init="red circle", vectors=2)


def tuned(base: Path, adapt: Any, folder: Path) -> tuple[Path, list[Path]]:
    """A model that was fine-tuned from a base, and the files of what it learned."""
    products = {"text": Product(base, "t"), "autoencoder": Product(base, "a")}
    context = Context(data=Pictures(), val=Pictures(), resolution=32, seed=0, total_images=8, products=products, init=Product(base, "base"))
    LatentDiffusion(adapt=adapt).continued(base).build(context).save(folder / "product")
    text = folder / "product" if isinstance(adapt, TextualInversion) else base
    assemble(text, base, folder / "product", folder / "model", STORY)
    kept = [file for name in ("lora", "embedding") for file in (folder / "product" / name).rglob("*.safetensors")]
    return folder / "model", kept


def told(model: Path, *words: str) -> list[str]:
    loras, embeddings = [word for word in words if "/lora/" in word], [word for word in words if "/embedding/" in word]
    notes: list[str] = []
    add(open_finished(model), loras, embeddings, {}, notes.append)
    return notes


@pytest.mark.slow
@pytest.mark.parametrize("adapt", [BOTH, WORD], ids=["lora", "embedding"])
def test_what_a_model_was_made_with_is_refused(adapt: Any, kl_model: Path, tmp_path: Path) -> None:
    model, kept = tuned(kl_model, adapt, tmp_path)
    assert kept and json.loads((model / "ldm.json").read_text())["base"] == "base"
    for file in kept:
        with pytest.raises(UserError, match="the model was made with it and has it already; leave it out, or give its base by --model"):
            told(model, f"{file}:0.8" if "lora" in file.parts else str(file))
    assert not [line for line in told(kl_model, str(kept[0])) if "changes nothing" not in line]  # it has not learned


def test_another_lora_of_the_same_base_is_taken(kl_model: Path, tmp_path: Path) -> None:
    model, _ = tuned(kl_model, BOTH, tmp_path / "one")
    _, others = tuned(kl_model, LowRank(rank=3, targets=("to_k",)), tmp_path / "other")
    assert not [line for line in told(model, str(others[0])) if "changes nothing" not in line]
