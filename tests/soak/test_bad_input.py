"""Bad input in numbers: pictures, shards and weights changed at random, and pickles that would run programs.

`python -m pytest -m soak -s tests/soak/test_bad_input.py`; the figures stand in docs/reliability.md.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import subprocess
import sys
import zipfile
import zlib
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tars import painted, shard

from ldm.config.errors import UserError
from ldm.data.images import MAX_PIXELS, Rejected, probe, view
from ldm.data.shards import ShardsSource
from ldm.formats.single_file import open_single
from ldm.formats.tensor_file import read_tensors

pytestmark = [pytest.mark.soak, pytest.mark.timeout(3600)]
KINDS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")


def pictures() -> dict[str, list[bytes]]:
    """A few of each kind: plain, grey, with alpha, 16 bits, progressive, animated, with EXIF."""
    found: dict[str, list[bytes]] = {}
    coarse = np.random.default_rng(0).integers(0, 256, (5, 6, 4), dtype=np.uint8)
    whole = Image.fromarray(coarse, "RGBA").resize((70, 50), Image.Resampling.BICUBIC)
    for kind in KINDS:
        forms: list[tuple[Image.Image, dict[str, Any]]] = [(whole.convert("RGB"), {}), (whole.convert("L"), {})]
        if kind in ("PNG", "WEBP", "TIFF", "AVIF"):
            forms.append((whole, {}))
        if kind == "PNG":
            forms.append((Image.fromarray(np.arange(3500, dtype=np.uint16).reshape(50, 70) * 18), {}))
            forms.append((whole.convert("P"), {"transparency": 0}))
        if kind == "JPEG":
            forms += [(whole.convert("RGB"), {"progressive": True, "exif": Image.Exif()}), (whole.convert("CMYK"), {})]
        if kind in ("PNG", "WEBP", "GIF"):
            forms.append((whole.convert("RGB"), {"save_all": True, "append_images": [whole.convert("RGB").rotate(90)]}))
        for image, options in forms:
            out = io.BytesIO()
            image.save(out, kind, **options)
            found.setdefault(kind, []).append(out.getvalue())
    return found


def mutated(rng: np.random.Generator, data: bytes, others: list[bytes]) -> bytes:
    """Cut, bits turned, or spliced with another file."""
    way, size = rng.integers(0, 3), len(data)
    if way == 0:
        return data[: rng.integers(0, size)]
    if way == 1:
        bad = np.frombuffer(data, np.uint8).copy()
        places = rng.integers(0, size, rng.integers(1, 12))
        bad[places] ^= rng.integers(1, 256, len(places)).astype(np.uint8)
        return bad.tobytes()
    other = others[rng.integers(0, len(others))]
    return data[: rng.integers(0, size)] + other[rng.integers(0, len(other)) :]


def test_pictures_changed_at_random_are_decoded_or_refused() -> None:
    rng, found, made = np.random.default_rng(1), Counter[tuple[str, str]](), pictures()
    everything = [data for files in made.values() for data in files]
    for number in range(10_000):
        kind = KINDS[number % len(KINDS)]
        data = mutated(rng, made[kind][rng.integers(0, len(made[kind]))], everything)
        try:
            probe(data, 2**22)
            assert view(data, 32, max_pixels=2**22).pixels.shape == (32, 32, 3)
            found[kind, "decoded"] += 1
        except Rejected as error:
            found[kind, "refused"] += 1
            assert error.reason
    print("\n" + ", ".join(f"{kind} {found[kind, 'decoded']} decoded {found[kind, 'refused']} refused" for kind in KINDS))
    assert found.total() == 10_000


def test_no_changed_picture_of_a_shard_is_taken_for_what_it_was(tmp_path: Path) -> None:
    rng, file = np.random.default_rng(2), shard(tmp_path, 0, 12)
    data, before = ShardsSource(path=str(tmp_path), val_share=0.01).build("train"), file.stat()
    whole, refused = file.read_bytes(), 0
    for _ in range(2000):
        number = int(rng.integers(0, len(data)))
        good = data.read(number)
        place = whole.index(good) + int(rng.integers(0, len(good)))
        file.write_bytes(whole[:place] + bytes([whole[place] ^ (1 << int(rng.integers(0, 8)))]) + whole[place + 1 :])
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))  # size and time say that nothing has changed
        with pytest.raises(Rejected):
            data.read(number)
        refused += 1
        file.write_bytes(whole)
    print(f"\n{refused} of 2000 refused by the index's hash")


CHILD = """
import sys, numpy, torch
from pathlib import Path
from ldm.data.images import Rejected, probe, view

def peak():
    return int(next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")).split()[1]) // 1024

data = open(sys.argv[1], "rb").read()
view(open(sys.argv[2], "rb").read(), 32)  # what any decoding loads
before, said = peak(), []
for look in (probe, lambda data: view(data, 256)):
    try:
        look(data)
        said.append("taken")
    except Rejected as error:
        said.append(error.reason)
print("|".join(said), peak() - before)
"""


def png(width: int, height: int, bits: int, colour: int, rows: bool = True) -> bytes:
    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    packer, row = zlib.compressobj(9), bytes(1 + -(-width * bits * {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour] // 8))
    body = b"".join(packer.compress(row) for _ in range(height if rows else 3)) + packer.flush()
    palette = chunk(b"PLTE", bytes(768)) + chunk(b"tRNS", bytes(256)) if colour == 3 else b""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + palette + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def test_bombs_are_refused_by_their_headers(tmp_path: Path) -> None:
    (tmp_path / "good").write_bytes(painted(0))

    def saved(kind: str, mode: str, side: int, **options: Any) -> bytes:
        out = io.BytesIO()
        Image.new(mode, (side, side)).save(out, kind, **options)
        return out.getvalue()

    most, third = int(MAX_PIXELS**0.5), int((MAX_PIXELS // 4) ** 0.5)
    refused = {
        "1-bit PNG, 50,000 px": png(50_000, 50_000, 1, 0),
        "RGBA PNG, 12,000 px": png(12_000, 12_000, 8, 6),
        "a PNG that says 2 G px": png(2**31 - 1, 1, 8, 2, False),
        "JPEG, 16,000 px": saved("JPEG", "L", 16_000, quality=1),
        "WebP, 10,000 px": saved("WEBP", "RGB", 10_000, method=0),
    }
    taken = {
        "1-bit PNG": png(most, most, 1, 0),
        "palette with alpha": png(most, most, 8, 3),
        "RGBA": png(most, most, 8, 6),
        "16-bit grey": png(most, most, 16, 0),
        "GIF": saved("GIF", "P", most),
        "progressive JPEG": saved("JPEG", "RGB", int((MAX_PIXELS // 2) ** 0.5), progressive=True, subsampling=0),
        "TIFF": saved("TIFF", "RGB", most, compression="tiff_deflate"),
        "WebP": saved("WEBP", "RGBA", third, method=0),
        "AVIF": saved("AVIF", "RGBA", third, speed=10),
    }
    print()
    for name, data in {**refused, **taken}.items():
        (tmp_path / "bomb").write_bytes(data)
        words = [sys.executable, "-c", CHILD, str(tmp_path / "bomb"), str(tmp_path / "good")]
        done = subprocess.run(words, capture_output=True, text=True, check=True, timeout=300)
        said, grown = done.stdout.split("\n")[0].rsplit(" ", 1)
        print(f"{name}, {len(data):,} bytes: {said}, {grown} MiB")
        assert said == ("taken|taken" if name in taken else "too many pixels|too many pixels"), name
        assert int(grown) <= 256, name


def test_safetensors_changed_at_random_are_read_as_the_library_reads_them_or_refused(tmp_path: Path) -> None:
    from safetensors.torch import load, save

    rng, found = np.random.default_rng(3), Counter[str]()
    good = save({"a.weight": torch.randn(40, 30), "b": torch.arange(9), "c": torch.zeros(0, 3)}, {"format": "pt", "note": "ü"})
    length = struct.unpack("<Q", good[:8])[0]
    head: dict[str, Any] = json.loads(good[8 : 8 + length])
    strange = [3, -1, 2**63, None, "x", [], {}, [-1], [10**30], [2**32, 2**32], [0, 10**30], {"a": 1}, True, 1.5, "F8_E8M0", [1] * 5000]
    for number in range(10_000):
        if number % 2:
            data = bytearray(good)
            for place in rng.integers(0, 8 + length, rng.integers(1, 4)).tolist():
                data[place] = int(rng.integers(0, 256))
            changed = bytes(data)
        else:  # a header that is JSON and lies
            new: dict[str, Any] = json.loads(json.dumps(head))
            name = list(new)[rng.integers(0, len(new))]
            value = strange[rng.integers(0, len(strange))]
            if name != "__metadata__" and rng.random() < 0.8:
                new[name][("dtype", "shape", "data_offsets")[rng.integers(0, 3)]] = value
            else:
                new[name] = value
            text = json.dumps(new).encode()
            changed = struct.pack("<Q", len(text)) + text + good[8 + length :]
        (tmp_path / "a.safetensors").write_bytes(changed)
        try:
            tensors = read_tensors(tmp_path / "a.safetensors")[0]
        except ValueError:
            found["refused"] += 1
            continue
        assert sum(t.nbytes for t in tensors.values()) <= 2 * len(changed)
        try:
            theirs = load(changed)
        except Exception:
            found["read, and not by the library"] += 1
            continue
        same = tensors.keys() == theirs.keys() and all(torch.equal(tensors[n].nan_to_num(), theirs[n].nan_to_num()) for n in theirs)
        found["read as the library does" if same else "read otherwise"] += 1
    print(f"\n{dict(found)}")
    assert found["read otherwise"] == 0 and found.total() == 10_000


class Call:
    """What pickles as a call."""

    def __init__(self, function: Any, *words: Any) -> None:
        self.function, self.words = function, words

    def __reduce__(self) -> Any:
        return self.function, self.words


class Build:
    """What pickles as a call of an object's __setstate__."""

    def __init__(self, state: Any) -> None:
        self.state = state

    def __reduce__(self) -> Any:
        return Build.__new__, (Build,), self.state


def payloads(mark: Path) -> list[tuple[str, Any]]:
    touch = f"open({str(mark)!r}, 'w').close()"
    calls = [
        Call(exec, touch),
        Call(eval, touch),
        Call(os.system, f"touch {mark}"),
        Call(Path.touch, mark),
        Call(open, str(mark), "w"),
        Call(subprocess.Popen, ["touch", str(mark)]),
        Call(__import__, "antigravity"),
        Call(compile, touch, "x", "exec"),
    ]
    weights = {"w": torch.zeros(2)}
    shapes = [
        lambda evil: evil,
        lambda evil: {"state_dict": weights, "x": evil},
        lambda evil: {"state_dict": {**weights, "x": evil}},
        lambda evil: [[[(evil,)]]],
        lambda evil: Build({"a": evil}),
    ]
    return [(type(made).__name__, made) for call in calls for shape in shapes for made in [shape(call)]]


def packed(kind: str, value: Any, file: Path) -> None:
    """As torch's zip, its old form, a bare pickle, a zip whose directory is damaged, and a zip with other names."""
    if kind == "zip":
        torch.save(value, file)
    elif kind == "old":
        torch.save(value, file, _use_new_zipfile_serialization=False)
    elif kind == "bare":
        file.write_bytes(pickle.dumps(value))
    elif kind == "damaged":
        torch.save(value, file)
        data = bytearray(file.read_bytes())
        data[-30] ^= 255
        file.write_bytes(bytes(data))
    else:
        with zipfile.ZipFile(file, "w") as made:
            made.writestr("archive/data.pkl", pickle.dumps(value))
            made.writestr("archive/version", "3\n")


def test_no_pickle_runs_a_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    mark, found = tmp_path / "mark", Counter[str]()
    suffixes = (".ckpt", ".pt", ".pth", ".bin", ".safetensors")
    for number, (_, value) in enumerate(payloads(mark)):
        for n, kind in enumerate(("zip", "old", "bare", "damaged", "names")):
            file = tmp_path / f"{number}-{kind}{suffixes[(number + n) % len(suffixes)]}"
            packed(kind, value, file)
            mark.unlink(missing_ok=True)
            with pytest.raises(UserError) as error:
                open_single(file, note=lambda said: None)
            assert not mark.exists(), file
            said = str(error.value)
            found["would call" if "would call" in said else "not weights"] += 1
            assert str(file) in said and "\n" not in said
            file.unlink()
    print(f"\n{found.total()} payloads, none ran: {dict(found)}")
    assert found.total() == 200
