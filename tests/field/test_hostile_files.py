"""Weights files from strangers: no code of theirs runs, and they cost no more memory and time than their size can need."""

from __future__ import annotations

import json
import os
import resource
import struct
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from ldm.config.errors import UserError
from ldm.config.files import ROOT, isolated
from ldm.formats import pickles
from ldm.formats.part import load_part, read_safetensors
from ldm.formats.single_file import read_file
from ldm.formats.tensor_file import TENSORS, read_tensors, read_texts
from ldm.text.encoder import TextEncoder
from tests.ends_soon import ends_soon


@pytest.mark.slow
def test_the_child_takes_no_code_from_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model.ckpt beside a torch.py, and beside every other module that the child needs."""
    evil = "open('ran', 'a').write(__name__)\nraise SystemExit(3)\n"
    for name in ("torch", "ldm", "runpy", "json", "zipfile", "safetensors", "sitecustomize", "numpy"):
        (tmp_path / f"{name}.py").write_text(evil)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", ["", str(tmp_path), *sys.path])  # as python -m and PYTHONPATH=. have it
    monkeypatch.setenv("PYTHONPATH", f".:{tmp_path}")
    torch.save({"weight": torch.arange(6.0).view(2, 3)}, "model.ckpt")
    pickles.convert(Path("model.ckpt"), Path("out.safetensors"))
    assert torch.equal(read_tensors(Path("out.safetensors"))[0]["weight"], torch.arange(6.0).view(2, 3))
    assert not Path("ran").exists()


def test_the_child_is_isolated_and_imports_this_package(tmp_path: Path) -> None:
    command = isolated("ldm.config.version")
    command[command.index("ldm.config.version")] = "platform"  # a module whose __main__ prints
    found = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert command[1] == "-I" and found.stdout.strip()
    path = command[4].split(os.pathsep)
    assert str(ROOT) in path and "" not in path and all(map(os.path.isabs, path))


def sparse() -> torch.Tensor:
    return torch.eye(3).to_sparse()


HOSTILE: dict[str, tuple[Any, str]] = {
    "expanded": (torch.zeros(1).expand(10**9), "but the file has"),
    "strided": (torch.zeros(2**18).as_strided((2**18, 2**18), (0, 1)), "but the file has"),
    "negative": (torch.zeros(4).as_strided((2**40,), (0,)), "but the file has"),
    "sparse": (sparse(), "no plain tensor"),
    "meta": (torch.empty(10**12, device="meta"), "no plain tensor|not a checkpoint"),
    "quantised": (torch.quantize_per_tensor(torch.rand(4), 0.1, 0, torch.qint8), "no plain tensor|not a checkpoint"),
    "complex": (torch.zeros(4, dtype=torch.complex64), "no plain tensor"),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_tensors_are_no_more_than_the_file_can_hold(tmp_path: Path, what: str) -> None:
    value, words = HOSTILE[what]
    file = tmp_path / "model.ckpt"
    torch.save({"weight": value}, file)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError, match=words):
        pickles.require_plain(pickles.weights(pickles.read(file))[0], file)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 100_000  # kB


def test_many_names_of_one_storage(tmp_path: Path) -> None:
    one = torch.zeros(2**18)
    tied = {"a": one, "b": one, "c": one.view(2, -1)}
    torch.save(tied, tmp_path / "tied.ckpt")
    pickles.require_plain(pickles.weights(pickles.read(tmp_path / "tied.ckpt"))[0], tmp_path / "tied.ckpt")
    torch.save({f"n{i}": one for i in range(1000)}, tmp_path / "many.ckpt")
    with pytest.raises(UserError, match="but the file has"):
        pickles.require_plain(pickles.weights(pickles.read(tmp_path / "many.ckpt"))[0], tmp_path / "many.ckpt")


def test_a_zip_bomb_is_not_unpacked(tmp_path: Path) -> None:
    file = tmp_path / "bomb.ckpt"
    torch.save({"weight": torch.zeros(2**22)}, tmp_path / "plain.ckpt")
    with zipfile.ZipFile(tmp_path / "plain.ckpt") as plain, zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as packed:
        for entry in plain.infolist():
            packed.writestr(entry.filename, plain.read(entry))
    assert file.stat().st_size < 2**16
    with pytest.raises(UserError, match="unpacks to 16,"):
        pickles.read(file)


@pytest.mark.slow
@pytest.mark.parametrize("calls", [b"cbuiltins\nbytearray\n(J\x00\x00\x00\x7ftR", b"ctorch\nTensor\n(J\x00\x00\x00\x7ftR"])
def test_what_a_pickle_asks_for_beside_tensors_is_bounded(tmp_path: Path, calls: bytes) -> None:
    """2 GB of zeros by a call that torch allows."""
    file = tmp_path / "model.ckpt"
    file.write_bytes(b"\x80\x02" + calls + b".")
    torch.save({}, tmp_path / "like.ckpt")
    with zipfile.ZipFile(tmp_path / "like.ckpt") as like, zipfile.ZipFile(file, "w") as made:
        for entry in like.infolist():
            data = b"\x80\x02" + calls + b"." if entry.filename.endswith("data.pkl") else like.read(entry)
            made.writestr(entry.filename, data)
    # In a process of its own: of several children the system tells the greatest alone, and other tests had some here.
    code = """
import resource, sys
from pathlib import Path
from ldm.config.errors import UserError
from ldm.formats import pickles
try:
    pickles.convert(Path(sys.argv[1]), Path(sys.argv[2]))
except UserError:
    print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""
    done = subprocess.run([sys.executable, "-c", code, file, tmp_path / "out"], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 1_700_000  # kB; torch itself has a third of it


def written(file: Path, header: Any, data: bytes = b"") -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(raw)) + raw + data)
    return file


def of(shape: list[int], start: int = 0, stop: int = 0, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


HEADERS: dict[str, Any] = {
    "2^62 rows of nothing": {"a": of([2**62, 0])},
    "2^62 columns of nothing": {"a": of([0, 2**62])},
    "sides that overflow": {"a": of([2**31, 2**31, 2**31, 0])},
    "a terabyte": {"a": of([2**38], 0, 2**40)},
    "negative": {"a": of([-1, -4], 0, 16)},
    "truth": {"a": of([True], 0, 4)},
    "no whole number": {"a": of([1.0], 0, 4)},
    "digits": b'{"a": {"dtype": "F32", "shape": [' + b"9" * 5000 + b'], "data_offsets": [0, 0]}}',
    "half a character": b'{"\\ud800": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}}',
    "no text": b'{"\xff": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}}',
    "many": b"{" + b",".join(b'"k%d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}' % i for i in range(TENSORS + 1)) + b"}",
    "deep": b"[" * 100_000,
    "texts": {"__metadata__": [1]},
    "nothing said": {"a": {}},
    "overlapping": {"a": of([1], 0, 4), "b": of([1], 0, 4)},
    "a hole": {"a": of([1], 4, 8)},
}


@pytest.mark.parametrize("what", HEADERS)
def test_odd_headers_are_one_line(tmp_path: Path, what: str) -> None:
    file = written(tmp_path / "x.safetensors", HEADERS[what], bytes(8))
    with ends_soon(), pytest.raises(UserError, match=r"x\.safetensors: ") as caught:
        read_safetensors(file)
    str(caught.value).encode()
    assert "\n" not in str(caught.value)


def test_a_sparse_file_larger_than_memory(tmp_path: Path) -> None:
    file = written(tmp_path / "x.safetensors", {"a": of([2**46], 0, 2**46, "U8")})
    try:
        os.truncate(file, file.stat().st_size + 2**46)
    except OSError:
        pytest.skip("the file system has no files of that size")
    with pytest.raises(UserError, match="no memory for a tensor"):
        read_safetensors(file)


def test_half_characters_in_texts_are_replaced(tmp_path: Path) -> None:
    assert read_texts(written(tmp_path / "x.safetensors", b'{"__metadata__": {"a": "\\ud800b"}}')) == {"a": "?b"}


def pipe(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


def device(file: Path) -> None:
    file.unlink()
    file.symlink_to("/dev/zero")


@pytest.mark.parametrize("spoil", [pipe, device])
def test_pipes_and_devices_are_not_read(kl_model: Path, tmp_path: Path, spoil: Any) -> None:
    import shutil

    model = tmp_path / "model"
    shutil.copytree(kl_model, model)
    (model / "manifest.json").unlink()
    (model / "tokenizer" / "vocab.json").unlink()  # read instead where there is no tokenizer.json
    for file, opened in {
        "unet/config.json": lambda: load_part(model / "unet"),
        "unet/diffusion_pytorch_model.safetensors": lambda: load_part(model / "unet"),
        "tokenizer/tokenizer.json": lambda: TextEncoder.load(model),
    }.items():
        spoil(model / file)
        with pytest.raises(UserError):
            opened()
        shutil.copy(kl_model / file, tmp_path / "whole")
        (model / file).unlink()
        shutil.move(tmp_path / "whole", model / file)
    for name in ("x.safetensors", "x.ckpt"):
        (tmp_path / name).touch()
        spoil(tmp_path / name)
        with pytest.raises(UserError, match="not a regular file"):
            read_file(tmp_path / name)
