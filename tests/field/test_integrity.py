"""A model whose files are not as they were written is refused, however it is opened."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from ldm.config.errors import UserError
from ldm.families.latent_diffusion.family import LatentDiffusion
from ldm.families.pretrained import PretrainedAutoencoder, PretrainedText
from ldm.families.registry import exported, load
from ldm.formats import atomic, integrity
from ldm.formats.denoiser_folder import load_denoiser
from ldm.formats.latent_codec import load_codec
from ldm.formats.part import content_hash
from ldm.text.encoder import TextEncoder
from ldm.text.own_clip import OwnClip

FILES = (
    "unet/diffusion_pytorch_model.safetensors",
    "unet/config.json",
    "vae/diffusion_pytorch_model.safetensors",
    "text_encoder/model.safetensors",
    "tokenizer/vocab.json",
    "scheduler/scheduler_config.json",
    "ldm.json",
)


def turn(file: Path) -> None:
    """Turn one bit, in JSON one that leaves it readable."""
    data = bytearray(file.read_bytes())
    place = data.rindex(b"1") if file.suffix == ".json" else len(data) - 5
    data[place] ^= 2
    file.write_bytes(data)


@pytest.fixture
def model(own_clip_model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(own_clip_model, tmp_path / "model"))


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_one_turned_bit_is_refused(model: Path, name: str) -> None:
    load(model)
    turn(model / name)
    with pytest.raises(UserError, match=r"bytes differ from what .*manifest\.json says"):
        load(model)
    (model / "manifest.json").unlink()  # as the line says, where the change is meant
    if not name.startswith("vae/"):  # a network of pictures' latents knows its autoencoder
        load(model)


WAYS: dict[str, tuple[str, Callable[[Path], object]]] = {
    "export": ("unet/diffusion_pytorch_model.safetensors", lambda m: exported(str(m))),
    "denoiser": ("unet/diffusion_pytorch_model.safetensors", load_denoiser),
    "codec": ("vae/diffusion_pytorch_model.safetensors", lambda m: load_codec(m / "vae")),
    "text": ("text_encoder/model.safetensors", TextEncoder.load),
    "tokenizer": ("tokenizer/merges.txt", TextEncoder.load),
    "clip": ("clip/image_tower/diffusion_pytorch_model.safetensors", lambda m: OwnClip.load(m / "clip")),
    "base of a run": ("ldm.json", lambda m: LatentDiffusion().find(str(m), print)),
    "pretrained text": ("text_encoder/model.safetensors", lambda m: PretrainedText(path=str(m)).find(str(m), print)),
    "pretrained autoencoder": ("vae/config.json", lambda m: PretrainedAutoencoder(path=str(m)).find(str(m), print)),
    "its own CLIP": ("clip/model.safetensors", lambda m: _adopted(m)),
}


def _adopted(model: Path) -> None:
    text = PretrainedText(path=str(model))
    text.adopt(text.find(str(model), print), model.parent / "adopted")


@pytest.mark.parametrize("way", WAYS)
def test_every_way_to_open_it(model: Path, way: str) -> None:
    name, opened = WAYS[way]
    opened(model)
    turn(model / name)
    with pytest.raises(UserError, match="bytes differ"):
        opened(model)


def test_what_the_manifest_lists_and_is_gone(model: Path) -> None:
    (model / "clip" / "image_tower" / "config.json").unlink()
    with pytest.raises(UserError, match=r"image_tower/config\.json is missing, which manifest\.json lists"):
        load(model)


def test_what_counts(model: Path) -> None:
    """Cards, pictures and files beside it may change; another program's manifest says nothing."""
    (model / "README.md").write_text("my model")
    (model / "preview.png").write_bytes(b"")
    load(model)
    (model / "manifest.json").write_text('{"name": "a page", "icons": []}')
    turn(model / "ldm.json")
    load(model)


@pytest.mark.parametrize("text", ["{", "[" * 100_000, '{"../x": "%s"}' % ("0" * 64), '{"a": 1, "b": "%s"}' % ("0" * 64)])
def test_a_damaged_manifest(model: Path, text: str) -> None:
    (model / "manifest.json").write_text(text)
    with pytest.raises(UserError, match=r"manifest\.json"):
        load(model)


def test_each_state_of_a_file_is_hashed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[Path] = []
    true = integrity.sha256
    monkeypatch.setattr(integrity, "sha256", lambda file: hashed.append(file) or true(file))
    monkeypatch.setattr(integrity, "SETTLED_S", -1.0)
    monkeypatch.setenv("LDM_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "model" / "large.safetensors"
    file.parent.mkdir()
    file.write_bytes(bytes(integrity.LARGE))
    first = content_hash(file.parent)
    assert content_hash(file.parent) == first and hashed == [file]
    integrity._known.cache_clear()  # another process
    assert content_hash(file.parent) == first and hashed == [file]
    stamp = file.stat()
    turn(file)
    os.utime(file, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))  # the change time tells
    assert content_hash(file.parent) != first and hashed == [file, file]
    (tmp_path / "cache" / "checksums.json").write_text("[")
    integrity._known.cache_clear()
    assert content_hash(file.parent) != first and len(hashed) == 3


def test_a_file_that_has_just_changed_is_not_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LDM_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "large.safetensors"
    file.write_bytes(bytes(integrity.LARGE))
    integrity.checksums([file])
    assert not (tmp_path / "cache" / "checksums.json").exists()


def test_a_product_is_read_again_only_where_a_file_of_it_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    product = tmp_path / "model"
    atomic.commit(product, lambda folder: [(folder / name).write_text(name) for name in ("a.json", "b.json")])  # type: ignore[arg-type,return-value]
    read: list[str] = []
    own = atomic.sha256
    monkeypatch.setattr(atomic, "sha256", lambda path: read.append(path.name) or own(path))
    expected = atomic.folder_hash(product)
    read.clear()
    assert integrity.folder_hash(product) == expected and read == ["a.json", "b.json"]
    assert integrity.folder_hash(product) == expected and len(read) == 4, "it is too new to be remembered"
    monkeypatch.setattr(integrity, "SETTLED_S", -1.0)
    for _ in range(3):
        assert integrity.folder_hash(product) == expected and len(read) == 6
    (product / "b.json").write_text("c")
    with pytest.raises(atomic.Damaged, match=r"b\.json: its bytes differ"):
        integrity.folder_hash(product)
    (product / "b.json").unlink()
    with pytest.raises(atomic.Damaged, match=r"missing or unexpected files: b\.json"):
        integrity.folder_hash(product)
