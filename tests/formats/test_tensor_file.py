"""Safetensors files as the library writes them, whole and damaged."""

from __future__ import annotations

import json
import shutil
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from ldm.formats.tensor_file import KINDS, read_tensors, read_texts


@pytest.fixture
def file(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    tensors = {
        str(kind): torch.randint(0, 2, (3, 5)).to(kind) for kind in KINDS.values() if kind not in (torch.uint16, torch.uint32, torch.uint64)
    }
    tensors |= {"number": torch.tensor(3.5), "nothing": torch.zeros(0, 4), "picture": torch.randn(2, 3, 4, 4)}
    save_file(tensors, tmp_path / "a.safetensors", {"format": "pt", "said": "ü"})
    return tmp_path / "a.safetensors"


def test_equals_the_library(file: Path) -> None:
    tensors, texts = read_tensors(file)
    theirs = load_file(file)
    assert texts == {"format": "pt", "said": "ü"} and tensors.keys() == theirs.keys()
    for name, value in tensors.items():
        assert value.dtype == theirs[name].dtype and value.shape == theirs[name].shape
        assert value.reshape(-1).view(torch.uint8).tolist() == theirs[name].reshape(-1).view(torch.uint8).tolist()
        assert value.untyped_storage().nbytes() == value.nbytes and value.data_ptr() % 64 == 0


REPLACED = """
import os, sys
from pathlib import Path
import torch
import ldm
from ldm.families.draws import Wanted

root, rounds = Path(sys.argv[1]), int(sys.argv[2])
files = {file: file.read_bytes() for file in sorted(root.rglob("*.safetensors"))}
assert len(files) == 3, files
expected = None
for round in range(rounds):
    model = ldm.load(root)
    for file, content in files.items():
        if round % 3 == 0:
            os.truncate(file, 0)
        elif round % 3 == 1:
            file.write_bytes(bytes(len(content)))  # in place
        else:
            file.unlink()
    picture = model.sample(["a small red circle"], settings=Wanted(steps=1))
    expected = picture if expected is None else expected
    assert torch.equal(torch.as_tensor(picture), torch.as_tensor(expected)), round
    for file, content in files.items():
        file.write_bytes(content)
print("whole", rounds)
"""


@pytest.mark.slow
def test_whoever_reads_a_model_is_untouched_by_what_becomes_of_its_files(kl_model: Path, tmp_path: Path) -> None:
    shutil.copytree(kl_model, tmp_path / "model")
    # A process of its own: pages of a mapped file that is cut short would end it by a signal.
    ended = subprocess.run([sys.executable, "-c", REPLACED, str(tmp_path / "model"), "50"], capture_output=True, text=True, timeout=240)
    assert (ended.returncode, ended.stdout) == (0, "whole 50\n"), ended.stderr


def test_texts_alone(file: Path) -> None:
    assert read_texts(file) == read_tensors(file)[1]
    file.write_bytes(file.read_bytes()[:20])
    with pytest.raises(ValueError, match="a header of"):
        read_texts(file)


def test_every_cut_is_found(file: Path) -> None:
    data = file.read_bytes()
    for length in range(0, len(data), 7):
        file.write_bytes(data[:length])
        with pytest.raises(ValueError):
            read_tensors(file)
    file.write_bytes(data + b"x")
    with pytest.raises(ValueError, match="1 bytes too many"):
        read_tensors(file)


def packed(header: Any, data: bytes = b"") -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    "data",
    [
        packed([]),
        packed({"a": 3}, b"12345678"),
        packed({"__metadata__": "text"}),
        packed({"a": F32 | {"shape": [0, 10**30]}}),
        struct.pack("<Q", 200_000) + b'{"a":' + b"[" * 199_995,
        packed({"a": F32 | {"shape": [1] * 5000 + [2]}}, bytes(8)),
        packed({"a": F32 | {"dtype": "F31"}}, bytes(8)),
        packed({"a": F32 | {"shape": [3]}}, bytes(8)),
        packed({"a": F32 | {"shape": [10**15]}}, bytes(8)),
        packed({"a": F32 | {"shape": [-1, -2]}}, bytes(8)),
        packed({"a": F32, "b": F32}, bytes(8)),
        packed({"a": F32 | {"data_offsets": [4, 12]}}, bytes(12)),
        struct.pack("<Q", 2**63) + bytes(80),
        b"<!DOCTYPE html><html></html>",
        b"",
    ],
)
def test_headers_that_lie_ask_for_no_memory(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "a").write_bytes(data)
    with pytest.raises(ValueError):
        read_tensors(tmp_path / "a")


@settings(max_examples=150, deadline=None)
@given(place=st.integers(0, 400), bit=st.integers(0, 7))
def test_a_turned_bit_in_the_header_is_an_error_or_a_file_that_the_library_reads(
    tmp_path_factory: pytest.TempPathFactory, place: int, bit: int
) -> None:
    folder = tmp_path_factory.mktemp("flip")
    save_file({"a": torch.ones(3, 2), "b": torch.zeros(4, dtype=torch.int64)}, folder / "a", {"x": "y"})
    data = bytearray((folder / "a").read_bytes())
    data[place % len(data)] ^= 1 << bit
    (folder / "a").write_bytes(data)
    try:
        found = read_tensors(folder / "a")[0]
    except ValueError:
        return
    theirs = load_file(folder / "a")
    assert found.keys() == theirs.keys() and all(torch.equal(found[n].nan_to_num(), theirs[n].nan_to_num()) for n in found)
