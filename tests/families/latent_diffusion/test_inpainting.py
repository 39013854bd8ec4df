"""Learning to paint into pictures: masks, what the U-Net is told, a widened base, and the whole way to a picture."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from finished_model import SIDE, UNET, Pictures
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ldm.__main__ import main
from ldm.config.errors import UserError
from ldm.diffusion.batch import Cond, Text
from ldm.diffusion.rng import Rng
from ldm.families.latent_diffusion.edits import fill
from ldm.families.latent_diffusion.family import load
from ldm.families.latent_diffusion.inpainting import Inpainting, masks, told
from ldm.formats.latent_codec import load_codec


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**40), st.integers(8, 70), st.integers(8, 70), st.integers(0, 3), st.integers(1, 3))
def test_masks_depend_on_the_address_alone_and_are_never_empty(seed: int, height: int, width: int, rectangles: int, strokes: int) -> None:
    asked = Inpainting(rectangles=rectangles, strokes=strokes)
    together = masks(asked, Rng(seed, range(6)), (height, width))
    assert together.shape == (6, height, width) and together.flatten(1).any(1).all()
    assert all(torch.equal(masks(asked, Rng(seed, [i]), (height, width))[0], together[i]) for i in (5, 0))


def test_a_quarter_covers_everything_and_the_rest_some() -> None:
    found = masks(Inpainting(), Rng(0, range(2000)), (32, 32))
    whole = found.flatten(1).all(1).float().mean()
    nothing_drawn = 0.3**6  # no rectangle and no stroke: all is new, too
    assert abs(float(whole) - (0.25 + 0.75 * nothing_drawn)) < 0.03
    part = found[~found.flatten(1).all(1)].float().mean()
    assert 0.15 < float(part) < 0.6
    assert masks(Inpainting(full=1.0), Rng(0, range(9)), (8, 8)).all()
    only = masks(Inpainting(full=0, strokes=0, rectangles=1), Rng(0, range(200)), (64, 64))
    for mask in only[~only.flatten(1).all(1)]:  # one rectangle is its own bounding box
        rows, columns = mask.any(1), mask.any(0)
        assert int(mask.sum()) == int(rows.sum()) * int(columns.sum())


def test_it_is_told_what_drawing_tells(kl_model: Path) -> None:
    codec = load_codec(kl_model / "vae")
    pixels = torch.randint(0, 256, (3, SIDE, SIDE, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    mask = masks(Inpainting(full=0.0), Rng(1, range(3)), (SIDE, SIDE))
    ours = told(codec, pixels.permute(0, 3, 1, 2).float() / 127.5 - 1, mask)

    class Canvas:
        own = staticmethod(lambda values: values)

    condition = fill(codec, pixels, mask).condition
    assert condition is not None
    theirs = condition(Cond(), Canvas()).image
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("coordinates", [False, True])
def test_a_widened_base_computes_what_it_did(coordinates: bool) -> None:
    torch.manual_seed(0)
    config = replace(UNET, in_channels=4, out_channels=4, coordinates=coordinates)
    base = config.build().eval()
    wide = base.widened(9).eval()
    x, t = torch.randn(2, 4, 8, 8), torch.tensor([0.3, 0.7])
    text = Text(tokens=torch.randn(2, 5, config.context_width), mask=torch.ones(2, 5, dtype=torch.bool))
    with torch.no_grad():
        plain = base(x, t, Cond(text=text))
        # Up to the order of sums, which a kernel may choose by the number of channels.
        torch.testing.assert_close(wide(x, t, Cond(text=text, image=torch.zeros(2, 5, 8, 8))), plain, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(wide(x, t, Cond(text=text, image=100 * torch.randn(2, 5, 8, 8))), plain, rtol=1e-5, atol=1e-6)


def configuration(folder: Path, model: Path, *more: str) -> Path:
    pictures = folder / "pictures"
    pictures.mkdir(exist_ok=True)
    batch = Pictures().load(range(12), range(12), SIDE, 0, False)
    for i, (image, caption) in enumerate(zip(batch.image, batch.caption, strict=True)):
        Image.fromarray(((image.permute(1, 2, 0) + 1) * 127.5).to(torch.uint8).numpy()).save(pictures / f"{i}.png")
        (pictures / f"{i}.txt").write_text(caption)
    file = folder / "paint.yaml"
    lines = [
        f"init: {model}",
        f"data: {{kind: folder, path: {pictures}}}",
        f"out: {folder / 'run'}",
        "workers: 0",
        "models: {diffusion: {kind: latent_diffusion, inpaint: {}}}",
        "stages:",
        f"  paint: {{kind: train, model: diffusion, resolution: {SIDE}, images: 24, batch: 8, samples: 2}}",
        "  export: {kind: export}",
    ]
    file.write_text("\n".join([*lines, *more]) + "\n")
    return file


@pytest.mark.slow
def test_the_whole_way_to_a_picture_and_into_diffusers(kl_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = configuration(tmp_path, kl_model)
    assert main(["train", str(file)]) == 0
    run = tmp_path / "run"
    model = load(run / "model")
    assert model.config.network.in_channels == 9
    learned = model.denoiser.conv_in.weight[:, 4:9]
    assert float(learned.detach().abs().max()) > 0  # the new weights have learned
    assert json.loads((run / "model/model_index.json").read_text())["_class_name"] == "StableDiffusionInpaintPipeline"
    from diffusers import StableDiffusionInpaintPipeline

    pipeline = StableDiffusionInpaintPipeline.from_pretrained(run / "model")
    assert pipeline.unet.config.in_channels == 9
    # Into a picture, whose bytes stay where the mask is black; and from a prompt alone.
    mask = np.zeros((SIDE, SIDE), np.uint8)
    mask[:16] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    words = ["--model", str(run), "--steps", "2", "--out", str(tmp_path / "drawn")]
    into = ["--init", str(tmp_path / "pictures/0.png"), "--mask", str(tmp_path / "mask.png")]
    assert main(["sample", "a small red circle", *words, *into]) == 0
    assert main(["sample", "a small red circle", *words]) == 0
    drawn, original = (np.asarray(Image.open(path)) for path in (tmp_path / "drawn/00000_seed0.png", tmp_path / "pictures/0.png"))
    assert np.array_equal(drawn[16:], original[16:]) and not np.array_equal(drawn[:16], original[:16])
    # What it made can be continued as what it is, and only so.
    capsys.readouterr()
    again = ["train", str(file), f"init={run}", f"out={tmp_path / 'again'}"]
    assert main([*again, "models.diffusion.inpaint=null"]) == 2
    assert "made for inpainting; set models.diffusion.inpaint={}" in capsys.readouterr().err
    assert main(again) == 0


def test_what_cannot_be_is_refused(kl_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = configuration(tmp_path, kl_model)
    assert main(["train", str(file), "stages.paint.latents=./somewhere"]) == 2
    assert "models.diffusion.inpaint hides parts of pictures" in capsys.readouterr().err
    others = [
        f"models.text={{kind: pretrained_text, path: {kl_model}}}",
        f"models.autoencoder={{kind: pretrained_autoencoder, path: {kl_model}}}",
    ]
    assert main(["train", str(file), "init=", *others, "models.diffusion.network=sd1-inpaint", "models.diffusion.inpaint=null"]) == 2
    assert "has 9 input channels, as for inpainting; set models.diffusion.inpaint={} too" in capsys.readouterr().err
    with pytest.raises(UserError, match="nothing would be new"):
        Inpainting(rectangles=0, strokes=0)
