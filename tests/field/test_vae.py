"""`--vae`: another autoencoder draws what it draws in diffusers' pipeline, is checked, and is in the recipe."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from ldm.__main__ import main
from ldm.config.errors import UserError
from ldm.formats.compvis import to_compvis
from ldm.formats.latent_codec import LatentCodec, Statistics, load_codec
from ldm.formats.part import save_part
from ldm.models.autoencoder import KLConfig, fold_latent_stats
from ldm.sampling.recipe import Recipe, read_recipe

# Under CompVis' names nothing says how many groups the norms have: 32, as in Stable Diffusion.
KL = KLConfig(channels=(32, 32, 32, 32), layers=1, latent_channels=4, scaling_factor=0.18215)


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same other autoencoder as a folder and as files; and one with more channels."""
    folder = tmp_path_factory.mktemp("vae")
    torch.manual_seed(5)
    network = KL.build()
    save_part(KL.to_diffusers(), dict(network.state_dict()), folder / "other")
    state = {name.removeprefix("first_stage_model."): value for name, value in to_compvis("vae", KL, network.state_dict()).items()}
    save_file({name: value.contiguous().clone() for name, value in state.items()}, folder / "other.safetensors")
    torch.save({"state_dict": {**state, "loss.logvar": torch.zeros(1)}, "epoch": 3}, folder / "other.pt")
    wide = replace(KL, latent_channels=8)
    save_part(wide.to_diffusers(), dict(wide.build().state_dict()), folder / "wide")
    return folder


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LDM_CACHE", str(tmp_path / "cache"))


def test_latents_are_decoded_as_by_the_other_network(kl_model: Path, others: Path) -> None:
    import diffusers

    from ldm.families.registry import open_finished

    model, told = open_finished(kl_model), list[str]()
    x0 = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        own = model.decode(x0)
        model.take_autoencoder(others / "other", told.append)
        codec = load_codec(kl_model / "vae")
        wanted = diffusers.AutoencoderKL.from_pretrained(others / "other").decode(x0 * codec.std + codec.mean).sample
        assert torch.allclose(model.decode(x0), wanted, atol=1e-5) and not torch.allclose(own, wanted, atol=1e-2)
    assert len(told) == 1 and "other latents than the model's" in told[0]
    with pytest.raises(UserError, match="channels"):
        model.take_autoencoder(others / "wide", told.append)


@pytest.mark.parametrize("name", ["shifted", "by channel", "half a model's"])
def test_the_scale_is_that_on_which_latents_are_the_models(kl_model: Path, tmp_path: Path, name: str) -> None:
    """The model's weights hold its statistics; the file has the weights from before, and states them, or states what is not so."""
    from ldm.families.registry import open_finished

    model, told = open_finished(kl_model), list[str]()
    x0 = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    config, state = load_codec(kl_model / "vae").network.config, dict(load_codec(kl_model / "vae").network.state_dict())
    assert isinstance(config, KLConfig)
    model._frozen = (unscaled(load_codec(kl_model / "vae")), model._frozen[1])
    with torch.no_grad():
        own = model.decode(x0)
        spread = (0.5, 0.5, 0.5, 0.5) if name == "shifted" else (0.5, 0.7, 1.1, 2.0)
        mean = (0.4, 0.4, 0.4, 0.4) if name == "shifted" else (0.4, -0.2, 0.1, 0.9)
        if name == "half a model's":  # states a scale that is nobody's, as files do whose makers left the default
            stated = replace(config, scaling_factor=3.0)
        else:  # latents of the file are mean + spread times the model's
            back = [-m / s for m, s in zip(mean, spread, strict=True)]
            config, state = fold_latent_stats(config, state, back, [1 / s for s in spread])
            stated = replace(config, scaling_factor=1.0, latents_mean=mean, latents_std=spread)
            if name == "shifted":
                stated = replace(config, scaling_factor=1 / spread[0], shift_factor=mean[0])
        save_part(stated.to_diffusers(), state, tmp_path / "vae")
        model.take_autoencoder(tmp_path / "vae", told.append)
        torch.testing.assert_close(model.decode(x0), own, rtol=1e-3, atol=1e-3)
    assert not told


def unscaled(codec: LatentCodec) -> LatentCodec:
    """An autoencoder on the scale of its weights, as where they hold the statistics."""
    return LatentCodec(codec.network, Statistics((0.0,) * codec.channels, (1.0,) * codec.channels, 0, 0))


@pytest.mark.slow
def test_folder_and_files_draw_the_same_and_are_followed(
    kl_model: Path, others: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["sample", "a small red circle", "--model", str(kl_model), "--steps", "1", "--out"]
    found = {}
    for name in ("", "other", "other.safetensors", "other.pt"):
        out = tmp_path / f"o{name}"
        assert main([*words, str(out), *(["--vae", str(others / name)] if name else [])]) == 0
        found[name] = np.asarray(Image.open(out / "00000_seed0.png"))
    assert (found["other"] == found["other.safetensors"]).all() and (found["other"] == found["other.pt"]).all()
    assert (found["other"] != found[""]).any()
    made = read_recipe(tmp_path / "oother.pt" / "00000_seed0.png")
    assert isinstance(made, Recipe)
    [told] = json.loads(made.vae)
    assert told["file"] == "other.pt" and len(told["hash"]) == 64
    again = [*words[:1], *words[2:], str(tmp_path / "again"), "--from", str(tmp_path / "oother.pt" / "00000_seed0.png")]
    capsys.readouterr()
    assert main(again) == 2 and "give it by --vae" in capsys.readouterr().err
    assert main([*again, "--vae", str(others / "other.pt")]) == 0 and "differ" not in capsys.readouterr().err
    assert (np.asarray(Image.open(tmp_path / "again" / "00000_seed0.png")) == found["other"]).all()


def test_what_does_not_fit_is_one_line(kl_model: Path, others: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["sample", "a", "--model", str(kl_model), "--out", str(tmp_path / "o"), "--vae"]
    (tmp_path / "text.safetensors").write_text("no weights")
    for file, said in (
        (others / "wide", "its latents have 8 channels"),
        (tmp_path / "none.pt", "No such file"),
        (tmp_path / "text.safetensors", "text.safetensors"),
        (kl_model / "unet", "no autoencoder here"),
    ):
        assert main([*words, str(file)]) == 2
        told = capsys.readouterr().err
        assert said in told and len([line for line in told.splitlines() if not line.startswith("note:")]) == 1, told
    assert main([*words, str(others / "other"), "--low-memory"]) == 2
    assert "low_memory" in capsys.readouterr().err
