"""Users' case: LoRA and embedding files of strangers end in bounded time and memory, with a value or one line."""

from __future__ import annotations

import json
import resource
import struct
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ldm.config.errors import UserError
from ldm.formats.embedding_files import read_embedding
from ldm.formats.lora_files import read
from ldm.formats.lora_keys import ENDS, FLAT_PARTS
from ldm.formats.tensor_file import KINDS
from ldm.sampling.adapters import FIELDS, remembered
from tests.ends_soon import ends_soon

BYTES = 2**28
LAYER = "unet.mid_block.attn1.to_q"
NUMBERS = (*range(4), 6, 8, 2**31, 2**62, -1)
PATTERNS = (
    "to_q",
    "(a+)+$",
    "(.*.*)*x",
    "[",
    "([a-z0-9_.]+)+!",
    "^mid.*",
    "(?=a)b",
    "((x{99}){99}){99}",
    "(" * 500,
    "",
    "\\",
    "\ud800",
    "a|b",
)


def stored(path: Path, header: Any, data: bytes = b"") -> Path:
    told = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(told)) + told + data)
    return path


def bounded(reader: Any, path: Any) -> Any:
    """What a reader makes of it, or the line it says; an answer that is late, large or another error fails."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        with ends_soon():
            found = reader(path)
    except UserError as error:
        found = str(error)
        assert "\n" not in found and len(found) < 2000
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < BYTES
    return found


def with_pattern(path: Path, pattern: str, field: str = "alpha_pattern") -> Path:
    header = {"lora_adapter_metadata": json.dumps({f"unet.{field}": {pattern: 3}, "unet.r": 1})}
    tensors = {
        f"{LAYER}.lora_{x}.weight": {"dtype": "F32", "shape": [1, 1], "data_offsets": [4 * i, 4 * i + 4]} for i, x in enumerate("AB")
    }
    return stored(path, {"__metadata__": header, **tensors}, struct.pack("<2f", 1, 2))


@pytest.mark.parametrize("field", ["alpha_pattern", "rank_pattern"])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_patterns_of_strangers(tmp_path: Path, pattern: str, field: str) -> None:
    found = bounded(read, with_pattern(tmp_path / "x.safetensors", pattern, field))
    assert not isinstance(found, str) or "pattern" in found or "says rank 3" in found or "header" in found


def test_a_thousand_patterns_and_a_deep_header(tmp_path: Path) -> None:
    many = json.dumps({"unet.alpha_pattern": {f"(a+)+{i}": 1 for i in range(1000)}})
    for header in (many, "[" * 100_000, '{"unet.alpha_pattern": ' * 20_000):
        found = bounded(read, stored(tmp_path / "x.safetensors", {"__metadata__": {"lora_adapter_metadata": header}}))
        assert "more than 100 regular expressions" in found or "no JSON object" in found


@pytest.mark.parametrize(
    ("shapes", "said"),
    [
        ([[], []], "down of shape []"),
        ([[0, 4], [4, 0]], "down of shape [0, 4]"),
        ([[0, 2**62], [2**62, 0]], "truncated or not a safetensors file"),
        ([[1, 4], [4, 1], [2]], "alpha of shape [2]"),
        ([[1] * 5, [4, 1]], "down of shape"),
    ],
)
def test_odd_shapes(tmp_path: Path, shapes: list[list[int]], said: str) -> None:
    header, data = {}, b""
    for name, shape in zip(("lora_A.weight", "lora_B.weight", "alpha"), shapes, strict=False):
        size = 4
        for side in shape:
            size *= side
        header[f"{LAYER}.{name}"] = {"dtype": "F32", "shape": shape, "data_offsets": [len(data), len(data) + size]}
        data += struct.pack("<f", 1) * (size // 4)
    assert said in bounded(read, stored(tmp_path / "x.safetensors", header, data))


def test_many_tensors_without_numbers(tmp_path: Path) -> None:
    header = b"{" + b",".join(b'"k%d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}' % i for i in range(5_000)) + b"}"
    file = stored(tmp_path / "many.safetensors", header)
    for reader, said in ((read, "no weights of an adapter"), (read_embedding, "5000 tensors")):
        with ends_soon(), pytest.raises(UserError, match=said):
            reader(file)


def test_embeddings_of_small_types_and_of_no_numbers(tmp_path: Path) -> None:
    found = bounded(
        read_embedding, stored(tmp_path / "f8.safetensors", {"a": {"dtype": "F8_E4M3", "shape": [4], "data_offsets": [0, 4]}}, b"\x38" * 4)
    )
    assert found.rows.tolist() == [[1.0] * 4]
    nan = {"a": {"dtype": "F8_E4M3", "shape": [4], "data_offsets": [0, 4]}}
    assert "no finite numbers" in bounded(read_embedding, stored(tmp_path / "nan.safetensors", nan, b"\xff" * 4))
    for shape in ([0], [0, 4], [4, 0], [0, 2**62]):
        empty = {"a": {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]}}
        said = "truncated or not" if 2**62 in shape else "no table of embeddings"
        assert said in bounded(read_embedding, stored(tmp_path / "e.safetensors", empty))


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        '[{"file": ["a"], "hash": "", "weight": 1}]',
        '[{"file": "a", "hash": 1, "weight": 1}]',
        '[{"file": "a", "hash": "", "weight": 1e999}]',
        '[{"file": "a", "hash": "", "weight": true}]',
        '[{"file": "a\\u0000", "hash": "", "weight": 1}]',
        '[{"file": "a", "hash": "", "weight": ' + "9" * 400 + "}]",
        '{"file": "a"}',
        "[1]",
        "null",
        "NaN",
    ],
)
def test_loras_of_a_recipe(text: str) -> None:
    for name in FIELDS:
        with pytest.raises(UserError, match=f"the recipe's {name} cannot be read"):
            remembered({name: text}, name)


KEYS = st.builds(
    lambda head, layer, end: f"{head}{layer}.{end}",
    st.sampled_from(["", "unet.", "base_model.model.", "text_encoder.", "bundle_emb.", *FLAT_PARTS]),
    st.sampled_from(["a", "mid_block.a", "mid_block_a", "a.processor", "", "\x1b[2J", "a" * 2000]),
    st.sampled_from([*ENDS, "to_q_lora.up.weight", "string_to_param.*", "clip_l", "clip_g", "oft_blocks", ""]),
) | st.sampled_from(["emb_params", "clip_l", "clip_g", "<word>", " "])
TENSORS = st.fixed_dictionaries({"dtype": st.sampled_from([*KINDS, "F4", 1]), "shape": st.lists(st.sampled_from(NUMBERS), max_size=5)})
FIELDS_OF_PEFT = tuple(f"unet.{name}" for name in ("r", "lora_alpha", "use_rslora", "alpha_pattern", "rank_pattern", "peft_type"))
JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from([*PATTERNS, *FIELDS_OF_PEFT]), inner, max_size=4),
    max_leaves=8,
)
SAID = st.text(max_size=30) | JSON.map(json.dumps)
TEXTS = st.dictionaries(st.sampled_from(["lora_adapter_metadata", "token", "name"]), SAID, max_size=2)


@st.composite
def files(draw: Any) -> tuple[dict[str, Any], bytes]:
    """A header as safetensors has it, of adapters' keys, with shapes and types that may be odd, and the data that it tells of."""
    header: dict[str, Any] = {}
    place = 0
    for key in draw(st.lists(KEYS, max_size=6, unique=True)):
        told = dict(draw(TENSORS))
        size = KINDS[told["dtype"]].itemsize if told["dtype"] in KINDS else 1
        for side in told["shape"]:
            size *= side
        size = size if 0 <= size < 4096 else draw(st.integers(0, 64))
        header[key], place = {**told, "data_offsets": [place, place + size]}, place + size
    if draw(st.booleans()):
        header["__metadata__"] = draw(TEXTS)
    return header, draw(st.binary(min_size=place, max_size=place)) if place < 4096 else b"\x01" * place


def fuzz(folder: Path, examples: int) -> None:
    path = folder / "fuzz.safetensors"

    @settings(max_examples=examples, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(files(), st.sampled_from([None, 3, 40]))
    def each(made: tuple[dict[str, Any], bytes], cut: int | None) -> None:
        stored(path, *made)
        if cut is not None:
            path.write_bytes(path.read_bytes()[:-cut])
        for reader in (read, read_embedding):
            bounded(reader, path)

    each()


def test_files_at_random(tmp_path: Path) -> None:
    fuzz(tmp_path, 60)


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_ten_thousand_files_at_random(tmp_path: Path) -> None:
    fuzz(tmp_path, 10_000)
