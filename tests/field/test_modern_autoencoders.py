"""Autoencoders of today are read as they are: per-channel statistics, shifts, 16 and 32 channels, no quant convolutions, AutoencoderDC."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from finished_model import STORY, diffusion_product, text_product
from torch import Tensor

from ldm.config.errors import UserError
from ldm.diffusion.process import Process
from ldm.families.draws import Running, Wanted
from ldm.families.latent_diffusion.family import load
from ldm.families.pretrained import PretrainedAutoencoder
from ldm.formats.assembly import assemble
from ldm.formats.latent_codec import LatentCodec, load_codec
from ldm.formats.pipeline_folder import write_pipeline

DOWN, UP = "DownEncoderBlock2D", "UpDecoderBlock2D"
F8 = {
    "block_out_channels": (8, 8, 8, 16),
    "down_block_types": (DOWN,) * 4,
    "up_block_types": (UP,) * 4,
    "norm_num_groups": 4,
    "layers_per_block": 1,
}
F8C16 = {**F8, "latent_channels": 16, "use_quant_conv": False, "use_post_quant_conv": False}
STATED = {"latents_mean": [0.1 * i - 0.2 for i in range(4)], "latents_std": [0.5 + 0.3 * i for i in range(4)]}
DC = {
    "latent_channels": 32,
    "attention_head_dim": 4,
    "encoder_block_types": ("ResBlock", "ResBlock", "EfficientViTBlock"),
    "decoder_block_types": ("ResBlock", "ResBlock", "EfficientViTBlock"),
    "encoder_block_out_channels": (8, 16, 32),
    "decoder_block_out_channels": (8, 16, 32),
    "encoder_layers_per_block": (1, 1, 1),
    "decoder_layers_per_block": (1, 1, 1),
    "encoder_qkv_multiscales": ((), (), (5,)),
    "decoder_qkv_multiscales": ((), (), (5,)),
    "decoder_norm_types": ("batch_norm", "rms_norm", "rms_norm"),
    "decoder_act_fns": ("relu", "silu", "silu"),
    "scaling_factor": 0.41407,
}
# Of Stable Diffusion 3 and Flux, of an XL with statistics of each channel, and of Sana.
PEERS: dict[str, tuple[str, dict[str, Any]]] = {
    "sd3": ("AutoencoderKL", {**F8C16, "scaling_factor": 1.5305, "shift_factor": 0.0609, "force_upcast": True}),
    "flux": ("AutoencoderKL", {**F8C16, "scaling_factor": 0.3611, "shift_factor": 0.1159, "mid_block_add_attention": True}),
    "32 channels": ("AutoencoderKL", {**F8C16, "latent_channels": 32, "scaling_factor": 0.5}),
    "stated": ("AutoencoderKL", {**F8, "latent_channels": 4, "scaling_factor": 0.5, **STATED}),
    "dc": ("AutoencoderDC", DC),
}
IMAGE = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)


@pytest.fixture(scope="module")
def peers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Any, Path]]:
    """Each peer of diffusers with random weights, and the folder that it wrote."""
    import diffusers

    found = {}
    for name, (kind, values) in PEERS.items():
        torch.manual_seed(1)
        folder = tmp_path_factory.mktemp("peer") / "vae"
        made = getattr(diffusers, kind)(**values).eval()
        made.save_pretrained(folder)
        found[name] = made.double(), folder
    return found


def normalised(peer: Any, image: Tensor) -> Tensor:
    """Latents as diffusers' pipelines give them to the network: XL's where statistics are stated, Stable Diffusion 3's with a shift."""
    said = peer.config
    if type(peer).__name__ == "AutoencoderDC":
        return peer.encode(image).latent * said.scaling_factor
    z = peer.encode(image).latent_dist.mode()
    if said.latents_mean is not None:
        mean, std = (torch.tensor(value, dtype=z.dtype).view(1, -1, 1, 1) for value in (said.latents_mean, said.latents_std))
        return (z - mean) * said.scaling_factor / std
    return (z - (said.shift_factor or 0.0)) * said.scaling_factor


def pictures(peer: Any, latent: Tensor) -> Tensor:
    """Images as diffusers' pipelines decode such latents."""
    said = peer.config
    mean, std = getattr(said, "latents_mean", None), getattr(said, "latents_std", None)
    if mean is not None:
        shift, scale = (torch.tensor(value, dtype=latent.dtype).view(1, -1, 1, 1) for value in (mean, std))
        return peer.decode(latent * scale / said.scaling_factor + shift).sample
    return peer.decode(latent / said.scaling_factor + (getattr(said, "shift_factor", None) or 0.0)).sample


def exact(folder: Path) -> LatentCodec:
    codec = load_codec(folder).double()
    for name in ("mean", "std"):  # stored in float32
        setattr(codec, name, torch.tensor(getattr(codec.statistics, name), dtype=torch.float64).view(1, -1, 1, 1))
    return codec


@pytest.mark.parametrize("name", PEERS)
def test_latents_and_pictures_are_those_of_diffusers(peers: dict[str, tuple[Any, Path]], name: str) -> None:
    peer, folder = peers[name]
    codec = exact(folder)
    with torch.no_grad():
        latent = normalised(peer, IMAGE.double())
        torch.testing.assert_close(codec.moments(IMAGE.double())[0], latent, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(codec.decode(latent), pictures(peer, latent), rtol=1e-10, atol=1e-10)
    known = PretrainedAutoencoder(path=str(folder)).latent_network(print)
    assert (codec.channels, codec.factor) == (known.latent_width, known.factor) == latent.shape[1:2] + (32 // latent.shape[2],)


def test_the_cost_of_a_dc_is_counted(peers: dict[str, tuple[Any, Path]]) -> None:
    cost, stored = PretrainedAutoencoder(path=str(peers["dc"][1])).encoding(32, print)
    assert cost.forward > 0 and stored == 2 * 32 * 8**2 + 4 * 6  # latents in half precision, and six sizes


@pytest.mark.parametrize("name", ["sd3", "stated", "dc"])
def test_a_model_on_it_is_written_and_opens_again(peers: dict[str, tuple[Any, Path]], tmp_path: Path, name: str) -> None:
    """In a folder of a pipeline that knows a scaling factor alone, shifts and statistics are in the weights."""
    import diffusers

    from ldm.families.registry import exported

    peer, folder = peers[name]
    text = text_product(tmp_path / "text")
    diffusion = diffusion_product(tmp_path / "diffusion", text, folder, Process())
    assemble(text, folder, diffusion, tmp_path / "model", STORY)
    family = load(tmp_path / "model")
    with torch.no_grad():
        latent = normalised(peer, IMAGE.double()).float()
        expected = pictures(peer, latent.double()).float()
    torch.testing.assert_close(family.decode(latent), expected, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        family.ready(tmp_path / "model", Running(), "fp32")
        torch.testing.assert_close(family.decode(latent), expected, rtol=1e-4, atol=1e-4)
    drawn = family.sample(["a red ring"], [0], Wanted(steps=2))
    assert drawn.shape == (1, 32, 32, 3)
    (tmp_path / "copy").mkdir()
    write_pipeline(exported(str(tmp_path / "model")), tmp_path / "copy", "fp32", "", 2**40, lambda said: None)
    assert torch.equal(
        load(tmp_path / "copy").sample(["a red ring"], [0], Wanted(steps=2)),
        load(tmp_path / "model").sample(["a red ring"], [0], Wanted(steps=2)),
    )
    opened = getattr(diffusers, type(peer).__name__).from_pretrained(tmp_path / "copy" / "vae")
    with torch.no_grad():
        torch.testing.assert_close(opened.decode(latent / opened.config.scaling_factor).sample, expected, rtol=1e-4, atol=1e-4)
    index = json.loads((tmp_path / "copy" / "model_index.json").read_text())
    assert index["vae"] == ["diffusers", type(peer).__name__]
    assert index["_class_name"] == ("DiffusionPipeline" if name == "dc" else "StableDiffusionPipeline")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sd3", "stated", "dc"])
def test_a_diffusion_model_trains_on_its_latents(peers: dict[str, tuple[Any, Path]], kl_model: Path, tmp_path: Path, name: str) -> None:
    from ldm.__main__ import main

    peer, folder = peers[name]
    channels = peer.config.latent_channels
    run = {
        "data": {"kind": "scenes", "tier": "one", "images": 16, "val": 4},
        "out": str(tmp_path / "run"),
        "workers": 0,
        "models": {
            "text": {"kind": "pretrained_text", "path": str(kl_model)},
            "autoencoder": {"kind": "pretrained_autoencoder", "path": str(folder)},
            "diffusion": {
                "kind": "latent_diffusion",
                "network": {"channels": [16, 32], "layers": 1, "attention": [False, True], "heads": 2, "norm_groups": 8},
                "process": {"target": "flow", "schedule": {"kind": "flow"}},
            },
        },
        "stages": {
            "latents": {"kind": "encode", "resolution": 32},
            "train": {
                "kind": "train",
                "model": "diffusion",
                "latents": "latents",
                "resolution": 32,
                "images": 16,
                "batch": 8,
                "samples": 2,
            },
            "export": {"kind": "export"},
        },
    }
    (tmp_path / "run.yaml").write_text(json.dumps(run))
    assert main(["train", str(tmp_path / "run.yaml")]) == 0
    model = tmp_path / "run" / "model"
    family = load(model)
    with torch.no_grad():
        latent = normalised(peer, IMAGE.double())
        torch.testing.assert_close(family.decode(latent.float()), pictures(peer, latent).float(), rtol=1e-3, atol=1e-3)
    assert family.denoiser.config.in_channels == channels
    assert main(["sample", "a blue ring", "--model", str(model), "--steps", "2", "--out", str(tmp_path / "drawn")]) == 0
    [picture] = (tmp_path / "drawn").glob("*.png")
    assert picture.stat().st_size > 100


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"encoder_layers_per_block": [10**9] * 3}, "more than 1024 blocks"),
        ({"encoder_block_types": ["Evil"] * 3}, "encoder_block_types"),
        ({"decoder_act_fns": ["relu"]}, "decoder_act_fns has 1 entries for the 3 levels"),
        ({"encoder_block_out_channels": [10**9] * 3}, "encoder_block_out_channels is 1000000000"),
        ({"scaling_factor": 0}, "scaling_factor"),
        ({"colour": "red"}, "colour"),
        ({"latent_channels": 5}, "latent_channels 5 does not divide 32"),
        ({"attention_head_dim": 5}, "attention_head_dim 5 does not divide 32"),
    ],
)
def test_a_dc_that_makes_no_sense_is_one_line(
    peers: dict[str, tuple[Any, Path]], tmp_path: Path, change: dict[str, Any], words: str
) -> None:
    values = json.loads((peers["dc"][1] / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**values, **change}))
    with pytest.raises(UserError, match=words) as caught:
        load_codec(tmp_path)
    assert str(tmp_path / "config.json") in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("change", [{"latents_std": None}, {"latents_mean": [0.0]}, {"latents_std": [0.0] * 4}, {"shift_factor": 0.1}])
def test_statistics_that_make_no_sense_are_one_line(peers: dict[str, tuple[Any, Path]], tmp_path: Path, change: dict[str, Any]) -> None:
    values = json.loads((peers["stated"][1] / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**values, **change}))
    with pytest.raises(UserError, match="latents_") as caught:
        load_codec(tmp_path)
    assert str(tmp_path / "config.json") in str(caught.value) and "\n" not in str(caught.value)
