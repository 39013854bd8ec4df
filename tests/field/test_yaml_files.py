"""Configuration files of strangers: devices, pipes, chains of bases, odd tags; each ends soon, in one line."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ldm.config.errors import UserError
from ldm.config.schema import read
from ldm.config.yaml_reader import parse

TAGS = [
    ("!!bool maybe", "maybe is neither true nor false"),
    ("!!timestamp 99999-99-99", "could not determine a constructor"),
    ('!!binary "x"', "could not determine a constructor"),
    ("!!set {a}", "could not determine a constructor"),
    ("!!omap [a]", "could not determine a constructor"),
    ("!!python/object/apply:os.system [x]", "could not determine a constructor"),
    ("!mine x", "could not determine a constructor"),
    ("!!int []", "expected a scalar node"),
    ("!!float x", "x is no number"),
    ("{<<: {b: 1}}", "<< takes over no fields here"),
    ('"\\ud800"', "half a character"),
]


@pytest.mark.parametrize(("value", "said"), TAGS)
def test_tags(value: str, said: str) -> None:
    with pytest.raises(UserError, match=f"run.yaml: .*{said}"):
        parse(f"a: {value}", "run.yaml")


@pytest.mark.parametrize("base", ["/dev/zero", "pipe", "folder", '"a\\0b"', "big.yaml", "half.yaml", '"\\ud800"', "[a]"])
def test_a_base_that_is_no_file(tmp_path: Path, base: str) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "half.yaml").write_bytes(b"a: \xff")
    with (tmp_path / "big.yaml").open("wb") as file:
        file.truncate(2**33)  # of holes
    (tmp_path / "run.yaml").write_text(f"base: {base}")
    with pytest.raises(UserError) as raised:
        read(tmp_path / "run.yaml", [])
    assert "\n" not in str(raised.value) and str(tmp_path) in str(raised.value)


def test_a_device_as_configuration() -> None:
    with pytest.raises(UserError, match="/dev/zero: "):
        read(Path("/dev/zero"), [])


def test_chains_of_bases(tmp_path: Path) -> None:
    for i in range(2001):
        (tmp_path / f"{i}.yaml").write_text(f"base: {i + 1}.yaml\nseed: {i}" if i < 2000 else "seed: 3")
    with pytest.raises(UserError, match=r"0\.yaml: more than 20 files, each the base of the next"):
        read(tmp_path / "0.yaml", [])
    assert read(tmp_path / "1985.yaml", []) == {"seed": 1985}


@settings(max_examples=150, deadline=None)
@given(st.text(st.sampled_from("ab:{}[],!&*|>-?#\"'%@`~<= \n\t\\0123.e_x\ud800\u2028\x85"), max_size=60))
def test_any_text_is_read_or_refused(text: str) -> None:
    try:
        parse(text, "run.yaml")
    except UserError as error:
        assert str(error).startswith("run.yaml")


@pytest.mark.soak
def test_ten_thousand_texts() -> None:
    chance = random.Random(0)
    start = Path(__file__).parents[2].joinpath("configs", "quickstart.yaml").read_text()
    for _ in range(10_000):
        text = list(start)
        for _ in range(chance.choice((1, 3, 10))):
            i = chance.randrange(len(text))
            text[i : i + chance.choice((0, 1, 40))] = chance.choice(
                ["!!bool ", "!!x ", "&a ", "*a", "{", "[", "\t", ": ", "\x00", "\ud800", "- ", "'"]
            )
        try:
            parse("".join(text), "run.yaml")
        except UserError as error:
            assert str(error).startswith("run.yaml")
