"""Files that are given as weights and are something else: one line says what they are and what would help."""

from __future__ import annotations

import gzip
import io
import pickle
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save, save_file

from ldm.config.errors import UserError
from ldm.formats.embedding_files import read_embedding
from ldm.formats.lora_files import read
from ldm.formats.signature import instead, is_pickle
from ldm.formats.single_file import read_file
from ldm.formats.weights_file import read_weights


def zipped(name: str) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr(name, b"x" * 50)
    return out.getvalue()


def tarred() -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        info = tarfile.TarInfo("lora.safetensors")
        info.size = 4
        archive.addfile(info, io.BytesIO(b"abcd"))
    return out.getvalue()


def picture() -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (8, 8)).save(out, "PNG")
    return out.getvalue()


def array(write: Callable[[io.BytesIO], None]) -> bytes:
    out = io.BytesIO()
    write(out)
    return out.getvalue()


WORDS = {"lora_unet_x.lora_up.weight": [1.0]}
OTHERS = {
    "web page": (b"\n<!DOCTYPE html><title>Sign in</title>", "a web page, not weights; the download needs another address or a log-in"),
    "lfs": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n",
        "only a Git LFS pointer, not the weights; run `git lfs",
    ),
    "json": (b'{"error":"Entry not found"}', "JSON, not weights"),
    "text": (b"the weights are at https://example.com/x\n", "a text that begins with 'the weights are at"),
    "empty": (b"", "empty; copy it again"),
    "zeros": (b"\0" * 5000, "nothing but zeros"),
    "gzip": (gzip.compress(b"x" * 99), "a gzip archive; unpack it"),
    "7z": (b"7z\xbc\xaf\x27\x1c" + b"\0" * 99, "a 7-Zip archive; unpack it"),
    "rar": (b"Rar!\x1a\x07\x01\0" + b"\0" * 99, "a RAR archive; unpack it"),
    "tar": (tarred(), "a tar archive; unpack it"),
    "zip": (zipped("lora.safetensors"), "an archive of 1 file, such as 'lora.safetensors', and no checkpoint of torch's; unpack it"),
    "gguf": (b"GGUF\x03\0\0\0" + b"\0" * 99, "a GGUF file"),
    "hdf5": (b"\x89HDF\r\n\x1a\n" + b"\0" * 99, "an HDF5 file"),
    "onnx": (b"\x08\x07\x12\x07pytorch" + b"\0" * 99, "an ONNX graph"),
    "picture": (picture(), "a picture; it holds no weights"),
    "npy": (array(lambda out: np.save(out, np.ones(3))), "a NumPy array without names"),
    "npz": (array(lambda out: np.savez(out, a=np.ones(3))), "an archive of 1 file, such as 'a.npy'"),
    **{f"protocol {p}": (pickle.dumps(WORDS, p), "a pickle of protocol 0 or 1, which torch does not write") for p in (0, 1)},
    **{f"protocol {p}": (pickle.dumps(WORDS, p), "a pickle that torch.save did not write") for p in (2, 3)},
    **{f"protocol {p}": (pickle.dumps(WORDS, p), "pickled with a protocol that is not read safely") for p in (4, 5)},
    "code": (b"cos\nsystem\n(S'echo'\ntR.", "a pickle of protocol 0 or 1"),
    "cut": (save({"a": torch.ones(9)})[:-5], "truncated or not a safetensors file"),
    "short": (b"\x10\0\0", "truncated or not a safetensors file"),
}


@pytest.mark.parametrize("name", [name for name in OTHERS if name[:8] != "protocol" or name[-1] in "01"])
def test_it_is_said_what_a_file_is(name: str, tmp_path: Path) -> None:
    """LoRA, learned words and checkpoints are read by one function."""
    data, words = OTHERS[name]
    file = tmp_path / "x.safetensors"
    file.write_bytes(data)
    for given in (lambda: read(file), lambda: read_embedding(file), lambda: read_file(file)) if name != "zip" else (lambda: read(file),):
        with pytest.raises(UserError) as told:
            given()
        assert words in str(told.value) and str(file) in str(told.value) and "\n" not in str(told.value)


@pytest.mark.slow
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_pickles_of_others_are_named(protocol: int, tmp_path: Path) -> None:
    data, words = OTHERS[f"protocol {protocol}"]
    file = tmp_path / "x.pt"
    file.write_bytes(data)
    with pytest.raises(UserError, match=words):
        read(file)


@pytest.mark.parametrize("ending", [".safetensors", ".ckpt"])
def test_content_counts_and_not_the_ending(ending: str, tmp_path: Path) -> None:
    weights = {"model.diffusion_model.x": torch.ones(3)}
    plain, pickled = tmp_path / f"plain{ending}", tmp_path / f"pickled{ending}"
    save_file(weights, plain)
    torch.save(weights, pickled, _use_new_zipfile_serialization=False)
    assert not is_pickle(plain) and is_pickle(pickled)
    for one in (plain, pickled):
        assert torch.equal(read_file(one)[0]["model.diffusion_model.x"], torch.ones(3))


def test_a_header_as_long_as_a_pickles_first_bytes_is_read(tmp_path: Path) -> None:
    """Its length is written as 80 02 00 .. 00, with which pickles begin, too."""
    file, pad = tmp_path / "x.safetensors", ""
    while len(data := save({"a": torch.ones(1)}, {"pad": pad})) and int.from_bytes(data[:8], "little") != 0x0280:
        pad += "x"
        assert len(pad) < 1000
    file.write_bytes(data)
    assert data[:2] == b"\x80\x02" and torch.equal(read_weights(file)[0]["a"], torch.ones(1))


def test_noise_is_nothing_that_is_known(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(bytes(range(9, 0, -1)) * 30)
    assert instead(tmp_path / "x") == ""
