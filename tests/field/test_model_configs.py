"""Configurations in model folders: what is out of range is one line with file, field and value, before memory or time is spent."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from finished_model import KL, UNET, VQ
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ldm.config.errors import UserError, first_line
from ldm.diffusion.process import Process
from ldm.families.latent_diffusion.folder import defaults_of, process_of
from ldm.formats import integrity, pickles
from ldm.formats.clip_folder import load_tower
from ldm.formats.denoiser_folder import read_denoiser
from ldm.formats.latent_codec import Statistics, read_codec
from ldm.formats.model_folder import read_record
from ldm.formats.part import read_safetensors
from ldm.formats.text_folder import text_builder
from ldm.formats.tokenizer_files import load_tokenizer
from ldm.models.autoencoder import KLConfig, VQConfig
from ldm.models.unet import UNetConfig
from tests.ends_soon import ends_soon

CLIP = {"architectures": ["CLIPTextModel"], "hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2, "intermediate_size": 64}
T5 = {"architectures": ["T5EncoderModel"], "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "vocab_size": 100}
SCHEDULER = Process().scheduler_config()
RECORD = {"kind": "latent_diffusion", "autoencoder": "0" * 64, "defaults": {"size": [32, 32], "steps": 4}, "story": {}, "offset_noise": 0.1}
TOWER = {"_class_name": "ImageTower", "channels": [8, 16], "embedding": 24, "grid": 2, "resolution": 32}
VISION = {"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2, "intermediate_size": 64, "image_size": 32, "patch_size": 8}
WHOLE = {"architectures": ["CLIPModel"], "model_type": "clip", "projection_dim": 24, "text_config": CLIP, "vision_config": VISION}
LATENTS = {"mean": [0.0, 0.1], "std": [1.0, 0.5], "images": 12, "resolution": 32}
TOKENIZER = {"model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2, "<|endoftext|>": 3, "<|startoftext|>": 4}, "merges": ["a b"]}}


def record(folder: Path) -> None:
    defaults_of(read_record(folder), folder)


def whole(folder: Path) -> Path:
    """A whole CLIP, whose vision_config the folder's config.json is, if there is one."""
    file = folder / "config.json"
    own = file.read_text() if file.exists() else json.dumps(VISION)  # as it stands: json writes nothing as deeply nested as it reads
    file.write_text(json.dumps({**WHOLE, "vision_config": "OWN"}).replace('"OWN"', own))
    return folder


# What reads a file of a model folder: its name, a content that makes sense, and the reader of the folder.
READERS: dict[str, tuple[str, dict[str, Any], Callable[[Path], object]]] = {
    "unet": ("unet/config.json", UNET.to_diffusers(), read_denoiser),
    "vae": ("config.json", KL.to_diffusers(), read_codec),
    "vqvae": ("config.json", VQ.to_diffusers(), read_codec),
    "clip": ("config.json", CLIP, text_builder),
    "whole clip": ("config.json", {"architectures": ["CLIPModel"], "text_config": CLIP}, text_builder),
    "t5": ("config.json", T5, text_builder),
    "scheduler": ("scheduler/scheduler_config.json", SCHEDULER, process_of),
    "record": ("ldm.json", RECORD, record),
    "image tower": ("image_tower/config.json", TOWER, load_tower),
    "vision": ("config.json", VISION, lambda folder: load_tower(whole(folder))),
    "pixels": ("preprocessor_config.json", {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}, lambda folder: load_tower(whole(folder))),
    "latents": ("latents.json", LATENTS, lambda folder: Statistics.read(folder / "latents.json", 2)),
    "tokenizer": ("tokenizer.json", TOKENIZER, load_tokenizer),
    "manifest": ("manifest.json", {"config.json": "0" * 64}, integrity.check),
}


def write(folder: Path, reader: str, values: Any) -> Callable[[], object]:
    name, _, read = READERS[reader]
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(json.dumps(values))
    return lambda: read(folder)


CASES = [
    ("unet", "block_out_channels", [10**9] * 3),
    ("unet", "block_out_channels", [-32, 32]),
    ("unet", "block_out_channels", ["a", "b"]),
    ("unet", "block_out_channels", None),
    ("unet", "block_out_channels", []),
    ("unet", "layers_per_block", 10**6),
    ("unet", "layers_per_block", 10**9),
    ("unet", "layers_per_block", [1, "x"]),
    ("unet", "transformer_layers_per_block", 10**9),
    ("unet", "norm_num_groups", 0),
    ("unet", "norm_num_groups", 5),
    ("unet", "norm_eps", 0),
    ("unet", "attention_head_dim", "x"),
    ("unet", "attention_head_dim", 3),
    ("unet", "out_channels", 2.5),
    ("unet", "cross_attention_dim", [[1]]),
    ("unet", "mid_block_type", ["plain"]),
    ("unet", "down_block_types", None),
    ("unet", "up_block_types", 7),
    ("unet", "_class_name", ["UNet2DConditionModel"]),
    ("unet", "addition_embed_type", []),
    ("vae", "latent_channels", 10**9),
    ("vae", "layers_per_block", 1000),
    ("vae", "scaling_factor", "x"),
    ("vae", "scaling_factor", 0),
    ("vae", "shift_factor", [1]),
    ("vae", "down_block_types", ["DownEncoderBlock2D"]),
    ("vae", "norm_num_groups", 0),
    ("vqvae", "num_vq_embeddings", 10**12),
    ("vqvae", "norm_type", "batch"),
    ("clip", "num_hidden_layers", 10**9),
    ("clip", "num_attention_heads", 5),
    ("clip", "hidden_act", "swish"),
    ("clip", "max_position_embeddings", -1),
    ("clip", "eos_token_id", {}),
    ("t5", "num_layers", 10**9),
    ("t5", "relative_attention_num_buckets", 1),
    ("t5", "feed_forward_proj", "gated-evil"),
    ("scheduler", "num_train_timesteps", 10**12),
    ("scheduler", "beta_start", "x"),
    ("scheduler", "beta_end", 3),
    ("scheduler", "prediction_type", []),
    ("record", "kind", []),
    ("record", "story", "once"),
    ("image tower", "channels", [10**9]),
    ("image tower", "resolution", 0),
    ("vision", "num_attention_heads", 5),
    ("vision", "image_size", 4),
    ("vision", "patch_size", 0),
    ("vision", "num_channels", 4),
    ("vision", "num_hidden_layers", 10**9),
    ("vision", "hidden_act", "swish"),
    ("pixels", "image_mean", [0.5]),
    ("pixels", "image_std", [0.5, 0.5, 0]),
    ("pixels", "image_std", "half"),
    ("latents", "images", 1e999),
]


@pytest.mark.parametrize(("reader", "field", "value"), CASES)
def test_a_field_out_of_range_is_named(tmp_path: Path, reader: str, field: str, value: Any) -> None:
    name, values, _ = READERS[reader]
    read = write(tmp_path, reader, {**values, field: value})
    with ends_soon(), pytest.raises(UserError) as caught:
        read()
    said = str(caught.value)
    assert str(tmp_path / name) in said and "\n" not in said
    assert field in said or reader == "latents"


def test_a_network_of_too_many_blocks_is_not_built(tmp_path: Path) -> None:
    read = write(tmp_path, "unet", {**UNET.to_diffusers(), "layers_per_block": 200, "transformer_layers_per_block": 200})
    with pytest.raises(UserError, match="more than 1024 blocks"):
        read()


def test_what_makes_sense_is_read(tmp_path: Path) -> None:
    for reader in ("unet", "vae", "vqvae", "clip", "t5", "scheduler", "record", "tokenizer"):
        folder = tmp_path / reader
        folder.mkdir()
        write(folder, reader, READERS[reader][1])()


ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from([0, -1, 1, 2.5, 10**9, 2**63, 10**400, 1e308, float("nan"), float("inf"), "", "x", "\ud800", "1e9", [], {}]),
    st.integers(),
    st.floats(),
    st.text(max_size=8),
)
VALUES = st.recursive(
    ODD, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=3), max_leaves=6
)


@st.composite
def changed(draw: st.DrawFn) -> tuple[str, Any]:
    """A reader, and its content with one to three fields changed, at any depth."""
    reader = draw(st.sampled_from(sorted(READERS)))
    return reader, _changed(draw, READERS[reader][1])


def _changed(draw: st.DrawFn, values: Any) -> Any:
    values = dict(values)
    for name in draw(st.lists(st.sampled_from(sorted(values)), min_size=1, max_size=3)):
        deeper = isinstance(values[name], dict) and values[name] and draw(st.booleans())
        values[name] = _changed(draw, values[name]) if deeper else draw(VALUES)
    return draw(VALUES) if draw(st.integers(0, 20)) == 0 else values


def one_line(read: Callable[[], object]) -> None:
    """A value or one line, soon."""
    with ends_soon():
        try:
            read()
        except UserError as error:
            assert "\n" not in str(error).strip()
            str(error).encode()


def fuzz_configs(folder: Path, examples: int) -> None:
    @settings(max_examples=examples, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(changed())
    def run(case: tuple[str, Any]) -> None:
        inside = folder / case[0]
        inside.mkdir(exist_ok=True)
        one_line(write(inside, *case))

    run()


HEADER = json.dumps({"a": {"dtype": "F32", "shape": [2, 1], "data_offsets": [0, 8]}, "__metadata__": {"format": "pt"}}).encode()
FILE = len(HEADER).to_bytes(8, "little") + HEADER + bytes(8)


def fuzz_bytes(folder: Path, name: str, whole: bytes, read: Callable[[Path], object], examples: int) -> None:
    @settings(max_examples=examples, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(st.lists(st.tuples(st.integers(0, len(whole) - 1), st.integers(0, 255)), max_size=4), st.integers(0, len(whole)), st.booleans())
    def run(changes: list[tuple[int, int]], cut: int, cuts: bool) -> None:
        data = bytearray(whole)
        for place, value in changes:
            data[place] = value
        (folder / name).write_bytes(data[:cut] if cuts else data)
        one_line(lambda: read(folder / name))

    run()


def checkpoint(folder: Path) -> bytes:
    import torch

    torch.save({"state_dict": {"a": torch.zeros(2, 2), "b": torch.ones(3)}, "step": 3, "name": "x"}, folder / "whole.ckpt")
    return (folder / "whole.ckpt").read_bytes()


def read_pickle(file: Path) -> None:
    pickles.require_plain(pickles.weights(pickles.read(file))[0], file)


@pytest.mark.parametrize("value", [None, [], 0, "x", True, {}])
@pytest.mark.parametrize("config", [KLConfig, VQConfig])
def test_the_field_that_is_wrong_is_named(config: Any, value: Any) -> None:
    with pytest.raises(UserError, match="block_out_channels is ") as told:
        config.from_diffusers({"block_out_channels": value, "down_block_types": ["DownEncoderBlock2D"] * 2})
    assert "down_block_types is" not in str(told.value)


def test_levels_that_do_not_fit_are_told_by_diffusers_names() -> None:
    levels = {"down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"], "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"]}
    with pytest.raises(UserError, match="down_block_types has 2 entries for the 4 levels of block_out_channels"):
        UNetConfig.from_diffusers({"block_out_channels": None, **levels})


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"latents_mean": [0.0] * 3, "latents_std": [1.0] * 4}, "latents_mean has 3 numbers; it needs 4, one for each of latent_channels"),
        ({"latents_mean": [0.0] * 4}, "latents_mean stands without latents_std"),
        ({"latents_std": [1.0] * 4}, "latents_std stands without latents_mean"),
        ({"latents_mean": [0.0] * 4, "latents_std": [1.0] * 4, "shift_factor": 0.1}, "shift_factor .0.1. are both subtracted"),
    ],
)
def test_statistics_of_latents_say_which_rule_they_break(more: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        KLConfig.from_diffusers({"block_out_channels": [64], "down_block_types": ["DownEncoderBlock2D"], **more})


def test_readers_end_with_a_value_or_one_line(tmp_path: Path) -> None:
    fuzz_configs(tmp_path, 150)
    fuzz_bytes(tmp_path, "x.safetensors", FILE, read_safetensors, 100)
    fuzz_bytes(tmp_path, "x.ckpt", checkpoint(tmp_path), read_pickle, 40)


def test_a_checkpoint_that_ends_within_its_pickle(tmp_path: Path) -> None:
    """Found by the soak: torch's EOFError says nothing, so there is no first line of it."""
    import zipfile

    checkpoint(tmp_path)
    with zipfile.ZipFile(tmp_path / "whole.ckpt") as whole, zipfile.ZipFile(tmp_path / "x.ckpt", "w") as cut:
        for name in whole.namelist():
            cut.writestr(name, whole.read(name)[:-1] if name.endswith(".pkl") else whole.read(name))
    with pytest.raises(UserError, match=r"x\.ckpt: not a checkpoint that torch can read \(EOFError\)"):
        read_pickle(tmp_path / "x.ckpt")
    data = bytearray((tmp_path / "whole.ckpt").read_bytes())
    data[data.rindex(b"whole/")] = 128  # a name in the list at its end, which is marked as UTF-8
    (tmp_path / "x.ckpt").write_bytes(data)
    one_line(lambda: read_pickle(tmp_path / "x.ckpt"))
    assert [first_line(error) for error in (MemoryError(), ValueError("  a\nb"), ValueError("x" * 900))] == ["MemoryError", "a", "x" * 200]


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_readers_end_with_a_value_or_one_line_over_ten_thousand_inputs_each(tmp_path: Path) -> None:
    fuzz_configs(tmp_path, 10_000 * len(READERS))
    fuzz_bytes(tmp_path, "x.safetensors", FILE, read_safetensors, 10_000)
    fuzz_bytes(tmp_path, "x.ckpt", checkpoint(tmp_path), read_pickle, 10_000)
