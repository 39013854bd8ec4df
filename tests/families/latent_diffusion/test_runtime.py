"""How finished models run: the same pictures whatever is chosen."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from finished_model import SIDE, finished_model
from PIL import Image

import ldm
from ldm.__main__ import main
from ldm.config.errors import UserError
from ldm.families.draws import Running, Wanted
from ldm.families.latent_diffusion import family as loading
from ldm.models.attention import get_attention, set_attention
from ldm.models.inference import FoldedUpsample, FusedAttention, check_compiler

PROMPTS = ["a red circle", "a blue ring", "a green square"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finished_model(tmp_path_factory.mktemp("running"))


@pytest.fixture(autouse=True)
def the_kernel_stays() -> Any:
    before = get_attention()
    yield
    set_attention(before)


def drawn(family: Any, precision: str = "fp32", **more: Any) -> torch.Tensor:
    return family.sample(PROMPTS, [1, 2, 3], Wanted(precision=precision), **more).int()


def test_a_model_that_is_ready_draws_what_it_drew_before(model: Path) -> None:
    plain, fast = loading.load(model), ldm.load(model)
    assert {FusedAttention, FoldedUpsample} & {type(part) for part in fast.denoiser.modules()}
    assert (drawn(plain) - drawn(fast)).abs().max() <= 1


def test_weights_that_are_cast_once_draw_the_same_to_the_bit(model: Path) -> None:
    cast = loading.load(model)
    cast.ready(model, Running(), "bf16")
    assert cast.denoiser.conv_in.weight.dtype == torch.bfloat16
    assert torch.equal(drawn(cast, "bf16"), drawn(ldm.load(model), "bf16"))


@pytest.mark.parametrize("kind", ["sdpa", "plain", "sliced"])
def test_every_kernel_draws_the_same(model: Path, kind: Any) -> None:
    wanted = drawn(ldm.load(model))
    family = ldm.load(model, running=Running(attention=kind))
    assert get_attention() == kind
    assert (drawn(family) - wanted).abs().max() <= 1


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_with_little_memory_one_part_at_a_time_has_weights(model: Path, precision: str) -> None:
    wanted = drawn(ldm.load(model), precision)
    family = loading.load(model, low_memory=True)
    family.ready(model, Running(low_memory=True), precision)
    parts: dict[str, Any] = {"text": family.text.model, "unet": family.denoiser, "codec": family.codec.network}

    def filled() -> set[str]:
        return {name for name, part in parts.items() if any(weight.numel() for weight in part.parameters())}

    assert filled() == set()
    seen = []
    assert torch.equal(drawn(family, precision, on_step=lambda *_: seen.append(filled())), wanted)
    assert all(one == {"unet"} for one in seen) and seen and filled() == {"codec"}
    image = torch.randint(0, 256, (1, SIDE, SIDE, 3), dtype=torch.uint8)
    edits = family.edits(image, strength=0.5)
    assert drawn(family, precision, edits=edits).shape == wanted.shape


def test_on_a_gpu_weights_wait_in_the_machines_memory(model: Path) -> None:
    from ldm.families.latent_diffusion.offload import Offload

    loaded = []

    def load() -> torch.nn.Module:
        torch.manual_seed(0)
        loaded.append(1)
        return torch.nn.Linear(2, 2)

    a, b = load(), load()
    kept = a.weight.clone()
    turns = Offload({a: load, b: load}, keep=True)
    for part in (a, b, a, a, b):
        turns(part)
        assert torch.equal(part.weight, kept)
    assert len(loaded) == 4


def test_pictures_are_the_same_with_any_tile(model: Path) -> None:
    whole = drawn(ldm.load(model, running=Running(tile=0)))
    assert (drawn(ldm.load(model, running=Running(tile=16))) - whole).abs().max() <= 1


def test_without_a_compiler_compiling_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(UserError, match="compile: no C\\+\\+ compiler here"):
        check_compiler(torch.device("cpu"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="compile: triton is missing"):
        check_compiler(torch.device("cuda"))
    with pytest.raises(UserError, match="does not compile for mps"):
        check_compiler(torch.device("mps"))


@pytest.mark.slow
def test_a_compiled_network_draws_the_same(model: Path) -> None:
    wanted = drawn(ldm.load(model))
    assert (drawn(ldm.load(model, running=Running(compiled=True))) - wanted).abs().max() <= 1


def test_the_command_takes_all_of_it(model: Path, tmp_path: Path, capsys: Any) -> None:
    base = ["sample", "a red circle", "--model", str(model), "--out"]
    assert main([*base, str(tmp_path / "a")]) == 0
    assert main([*base, str(tmp_path / "b"), "--low-memory", "--tile", "16", "--attention", "sdpa"]) == 0
    a, b = (np.asarray(Image.open(tmp_path / name / "00000_seed0.png")).astype(int) for name in "ab")
    assert np.abs(a - b).max() <= 1
    capsys.readouterr()
    assert main([*base, str(tmp_path / "c"), "--attention", "flash"]) == 2
    assert "attention: 'flash' is unknown; choose one of auto, sdpa" in capsys.readouterr().err
