"""Text-to-image, image-to-image and inpainting, whole, against diffusers' pipelines on the same weights and noise; XL's too.

The largest error of the pictures and of the clean latents, in units of the largest where that is above 1, is at most 1e-5 in
float32 and 1e-12 in float64. (The latents of random networks reach 60, where float32 has no 1e-5.) For float64, diffusers' schedulers
run with their float32 widened (see `pipelines.Wide`): as they are, they round x and the table. On trailing grids diffusers'
Euler starts from sigma times the noise, ours from sqrt(1 + sigma^2), as both do on leading ones: there, theirs is told to
do so too. Their DDPM adds noise of deviation 1e-10 in the last step, where it clamps a variance of 0: there 1e-9 is the
limit. Left out, and compared elsewhere or not at all:

- heun: diffusers' works on x/alpha (tests/diffusion/test_samplers.py compares it there);
- Karras' spacing: ours tells the network a float32 t, Euler in float64 a float64 one, DPM-Solver and UniPC a whole one;
- leading spacing of DPM-Solver and UniPC, which theirs lay out in one part more than there are steps;
- plms with an image: diffusers drops the first of two evaluations that PNDM asks for when the first steps are left out;
- unipc that blends: diffusers' corrector takes back what was put in place after the step, ours puts it there again.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from pipelines import FACTOR, SIDE, Pair, as_image, bytes_of_pictures, pipeline_folder, scheduler_of, start_noise, xl_folder
from torch import Tensor

LIMIT = {torch.float32: 1e-5, torch.float64: 1e-12}
DTYPES = pytest.mark.parametrize("dtype", LIMIT, ids=["float32", "float64"])
EULERS = (diffusers.EulerDiscreteScheduler, diffusers.EulerAncestralDiscreteScheduler)
CLAMPED = 1e-9
STEPS, SCALE = 5, 4.0
SAMPLERS: dict[str, tuple[Any, str, dict[str, Any], dict[str, Any]]] = {  # ours, theirs, its options, the call's
    "ddpm": (diffusers.DDPMScheduler, "trailing", {}, {}),
    "ddpm-leading": (diffusers.DDPMScheduler, "leading", {}, {}),
    "ddim": (diffusers.DDIMScheduler, "trailing", {}, {}),
    "ddim-leading": (diffusers.DDIMScheduler, "leading", {}, {}),
    "ddim-eta": (diffusers.DDIMScheduler, "trailing", {}, {"eta": 0.6}),
    "plms": (diffusers.PNDMScheduler, "trailing", {"skip_prk_steps": True}, {}),
    "plms-leading": (diffusers.PNDMScheduler, "leading", {"skip_prk_steps": True}, {}),
    "euler": (diffusers.EulerDiscreteScheduler, "trailing", {}, {}),
    "euler-leading": (diffusers.EulerDiscreteScheduler, "leading", {}, {}),
    "euler_a": (diffusers.EulerAncestralDiscreteScheduler, "trailing", {}, {}),
    "euler_a-leading": (diffusers.EulerAncestralDiscreteScheduler, "leading", {}, {}),
    "dpmpp_2m": (diffusers.DPMSolverMultistepScheduler, "trailing", {}, {}),
    "dpmpp_2m_sde": (diffusers.DPMSolverMultistepScheduler, "trailing", {"algorithm_type": "sde-dpmsolver++"}, {}),
    "unipc": (diffusers.UniPCMultistepScheduler, "trailing", {}, {}),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("pipelines")
    return {
        "epsilon": pipeline_folder(root / "epsilon"),
        "v": pipeline_folder(root / "v", target="v"),
        "inpaint": pipeline_folder(root / "inpaint", channels=9),
    }


@pytest.fixture(scope="module")
def pairs(folders: dict[str, Path]) -> dict[tuple[str, torch.dtype], Pair]:
    return {(name, dtype): Pair(folder, dtype) for name, folder in folders.items() for dtype in LIMIT}


def check(pair: Pair, ours: Tensor, theirs: Tensor, limit: float) -> None:
    assert ours.dtype == theirs.dtype == pair.dtype
    images = pair.pictures(ours, theirs)
    errors = [float((a - b).abs().max() / b.abs().max().clamp(min=1)) for a, b in ((ours, theirs), images)]
    assert max(errors) <= limit, errors
    assert images[0].std() > 0.05


def both(pair: Pair, monkeypatch: pytest.MonkeyPatch, name: str, kind: str, target: str = "epsilon", edits: Any = (), **words: Any) -> None:
    theirs, spacing, options, call = SAMPLERS[name]
    made = scheduler_of(theirs, pair.dtype, monkeypatch, target, timestep_spacing=spacing, **options)
    if theirs in EULERS:
        monkeypatch.setattr(theirs, "init_noise_sigma", property(lambda made: (1 + made.sigmas.max() ** 2) ** 0.5))
    noise = start_noise(pair.dtype)
    told = {"num_inference_steps": STEPS, "guidance_scale": SCALE, **call, **words}
    expected = pair.theirs(kind, made, monkeypatch, noise, **told)
    monkeypatch.undo()
    found = pair.ours(noise, edits, steps=STEPS, guidance=SCALE, sampler=name.split("-")[0], spacing=spacing, **call)
    check(pair, found, expected, max(LIMIT[pair.dtype], CLAMPED if theirs is diffusers.DDPMScheduler else 0))


@pytest.mark.slow
@DTYPES
@pytest.mark.parametrize("name", SAMPLERS)
def test_text_to_image(pairs: Any, monkeypatch: pytest.MonkeyPatch, name: str, dtype: torch.dtype) -> None:
    both(pairs["epsilon", dtype], monkeypatch, name, "text", latents=start_noise(dtype))


@DTYPES
@pytest.mark.parametrize("name", ["ddim", "ddpm", "euler", "dpmpp_2m", "unipc"])
def test_text_to_image_with_v(pairs: Any, monkeypatch: pytest.MonkeyPatch, name: str, dtype: torch.dtype) -> None:
    both(pairs["v", dtype], monkeypatch, name, "text", "v", latents=start_noise(dtype))


@DTYPES
@pytest.mark.parametrize(("name", "strength"), [("ddim", 0.3), *((name, 0.8) for name in SAMPLERS if "plms" not in name)])
def test_image_to_image(pairs: Any, monkeypatch: pytest.MonkeyPatch, name: str, strength: float, dtype: torch.dtype) -> None:
    pair, pixels = pairs["epsilon", dtype], bytes_of_pictures()
    edits = pair.family.edits(pixels, strength=strength)
    both(pair, monkeypatch, name, "image", edits=edits, image=as_image(pixels, dtype), strength=strength)


def black_and_white() -> Tensor:
    """A picture that is the same in float32, to which the pipeline for inpainting rounds it."""
    return (bytes_of_pictures(1) > 127) * torch.tensor(255, dtype=torch.uint8)


def some_mask(cells: bool) -> Tensor:
    """(1,H,W), of whole latent pixels or not."""
    mask = torch.rand(1, 1, SIDE // FACTOR, SIDE // FACTOR, generator=torch.Generator().manual_seed(3)) < 0.4
    mask = mask.repeat_interleave(FACTOR, 2).repeat_interleave(FACTOR, 3)[:, 0]
    return mask if cells else mask.roll((1, 2), (1, 2))


@pytest.mark.slow
@DTYPES
@pytest.mark.parametrize("strength", [0.6, 1.0])
@pytest.mark.parametrize("name", ["ddpm", "ddim-leading", "ddim-eta", "euler", "euler_a", "dpmpp_2m", "dpmpp_2m_sde"])
def test_inpainting_by_blending(pairs: Any, monkeypatch: pytest.MonkeyPatch, name: str, strength: float, dtype: torch.dtype) -> None:
    pair, pixels, mask = pairs["epsilon", dtype], black_and_white(), some_mask(cells=True)
    edits = pair.family.edits(pixels, mask, strength)
    image, hidden = as_image(pixels, dtype), mask[:, None].to(dtype)
    both(pair, monkeypatch, name, "inpaint", edits=edits, image=image, mask_image=hidden, strength=strength, height=SIDE, width=SIDE)


@pytest.mark.slow
@DTYPES
@pytest.mark.parametrize("strength", [0.6, 1.0])
@pytest.mark.parametrize("name", ["ddim", "ddpm", "euler_a", "dpmpp_2m", "unipc"])
def test_inpainting_by_a_unet_that_is_told_the_mask(
    pairs: Any, monkeypatch: pytest.MonkeyPatch, name: str, strength: float, dtype: torch.dtype
) -> None:
    pair, pixels, mask = pairs["inpaint", dtype], black_and_white(), some_mask(cells=False)
    edits = pair.family.edits(pixels, mask, strength)
    image, hidden = as_image(pixels, dtype), mask[:, None].to(dtype)
    both(pair, monkeypatch, name, "inpaint", edits=edits, image=image, mask_image=hidden, strength=strength, height=SIDE, width=SIDE)


# Stable Diffusion XL: besides, the negative prompt that is none (zeros, where the model says so), and what is told of sizes.

SIZES = {"original_size": "48x40", "crop": "3,5", "target_size": "30x34"}
THEIRS = {"original_size": (40, 48), "crops_coords_top_left": (5, 3), "target_size": (34, 30)}


@pytest.fixture(scope="module")
def xl_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("xl")
    return {"base": xl_folder(root / "base"), "told": xl_folder(root / "told", zeros=False), "inpaint": xl_folder(root / "inpaint", 9)}


@pytest.fixture(scope="module")
def xl_pairs(xl_folders: dict[str, Path]) -> dict[tuple[str, torch.dtype], Pair]:
    return {(name, dtype): Pair(folder, dtype) for name, folder in xl_folders.items() for dtype in LIMIT}


@pytest.mark.slow
@DTYPES
@pytest.mark.parametrize("name", ["ddim", "ddim-leading", "euler", "dpmpp_2m"])
def test_xl_text_to_image(xl_pairs: Any, monkeypatch: pytest.MonkeyPatch, name: str, dtype: torch.dtype) -> None:
    both(xl_pairs["base", dtype], monkeypatch, name, "text", latents=start_noise(dtype), height=SIDE, width=SIDE)


@DTYPES
@pytest.mark.parametrize("model", ["base", "told"])
def test_xl_no_negative_prompt(xl_pairs: Any, monkeypatch: pytest.MonkeyPatch, model: str, dtype: torch.dtype) -> None:
    pair, noise = xl_pairs[model, dtype], start_noise(dtype)
    made = scheduler_of(diffusers.DDIMScheduler, dtype, monkeypatch, timestep_spacing="trailing")
    words = {"num_inference_steps": STEPS, "guidance_scale": 4.0, "negative_prompt": None, "height": SIDE, "width": SIDE}
    theirs = pair.theirs("text", made, monkeypatch, noise, latents=noise, **words)
    monkeypatch.undo()
    ours = pair.ours(noise, negative="", steps=STEPS, guidance=4.0, sampler="ddim", spacing="trailing")
    check(pair, ours, theirs, LIMIT[dtype])


@pytest.mark.slow
@DTYPES
@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_xl_sizes(xl_pairs: Any, monkeypatch: pytest.MonkeyPatch, guidance: float, dtype: torch.dtype) -> None:
    pair, noise = xl_pairs["base", dtype], start_noise(dtype)
    made = scheduler_of(diffusers.DDIMScheduler, dtype, monkeypatch, timestep_spacing="trailing")
    words = {"num_inference_steps": STEPS, "guidance_scale": guidance, "height": SIDE, "width": SIDE, **THEIRS}
    theirs = pair.theirs("text", made, monkeypatch, noise, latents=noise, **words)
    monkeypatch.undo()
    told = {"steps": STEPS, "guidance": guidance, "sampler": "ddim", "spacing": "trailing"}
    check(pair, pair.ours(noise, **told, **SIZES), theirs, LIMIT[dtype])
    assert not torch.equal(pair.ours(noise, **told), pair.ours(noise, **told, crop="7,0"))


@pytest.mark.slow
@DTYPES
@pytest.mark.parametrize(("name", "strength"), [("ddim", 0.3), ("ddim", 0.8), ("euler", 0.8), ("dpmpp_2m", 0.8)])
def test_xl_image_to_image(xl_pairs: Any, monkeypatch: pytest.MonkeyPatch, name: str, strength: float, dtype: torch.dtype) -> None:
    pair, pixels = xl_pairs["base", dtype], bytes_of_pictures()
    edits = pair.family.edits(pixels, strength=strength)
    both(pair, monkeypatch, name, "image", edits=edits, image=as_image(pixels, dtype), strength=strength)


@pytest.mark.slow
@DTYPES
@pytest.mark.parametrize("strength", [0.6, 1.0])
@pytest.mark.parametrize(("model", "name"), [("base", "ddim"), ("base", "euler"), ("inpaint", "ddim"), ("inpaint", "dpmpp_2m")])
def test_xl_inpainting(xl_pairs: Any, monkeypatch: pytest.MonkeyPatch, model: str, name: str, strength: float, dtype: torch.dtype) -> None:
    pair, pixels, mask = xl_pairs[model, dtype], black_and_white(), some_mask(cells=model == "base")
    edits = pair.family.edits(pixels, mask, strength)
    image, hidden = as_image(pixels, dtype), mask[:, None].to(dtype)
    both(pair, monkeypatch, name, "inpaint", edits=edits, image=image, mask_image=hidden, strength=strength, height=SIDE, width=SIDE)
