"""Users' case: the web UI's embeddings, .pt and .bin, are read safely, and mean what they mean there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from ldm.config.errors import UserError
from ldm.formats.embedding_files import read_embedding
from ldm.formats.pickles import read, weights

ROWS = torch.arange(6.0).view(2, 3)
WEB_UI: dict[str, Any] = {"string_to_token": {"*": 265}, "name": "inner", "step": 500, "sd_checkpoint": None, "sd_checkpoint_name": None}


def of_web_ui(legacy: bool = False) -> dict[str, Any]:
    words = nn.ParameterDict({"*": nn.Parameter(ROWS)}) if legacy else {"*": ROWS}
    return {**WEB_UI, "string_to_param": words}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "content", "word"),
    [
        ("bad-hands.pt", of_web_ui(), "bad-hands"),
        ("old.pt", of_web_ui(legacy=True), "old"),
        ("learned_embeds.bin", {"<cat>": ROWS}, "<cat>"),
        ("one.bin", {"<cat>": ROWS[0]}, "<cat>"),
    ],
)
def test_pickles_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, content: Any, word: str) -> None:
    if name != "bad-hands.pt":  # that one by a child, which takes seconds
        monkeypatch.setattr("ldm.formats.weights_file.convert", lambda source, target: save_file(weights(read(source))[0], target))
    torch.save(content, tmp_path / name)
    for path in (tmp_path / name, tmp_path) if name == "learned_embeds.bin" else (tmp_path / name,):
        found = read_embedding(path)
        assert found.token == word and torch.equal(found.rows, ROWS[: 1 if name == "one.bin" else 2]) and found.second is None


@pytest.mark.parametrize(
    ("state", "said"),
    [
        ({"clip_g": ROWS}, "has clip_g, of the second text encoder, but not clip_l"),
        ({"clip_l": ROWS, "clip_g": ROWS[:1].clone()}, "clip_l has 2 vectors and clip_g 1"),
        ({"a": ROWS, "b": 2 * ROWS}, "2 tensors"),
        ({"a b\n": ROWS}, "printable characters"),
        ({"a": ROWS[None]}, r"shape \[1, 2, 3\] is no table"),
        ({"a": ROWS.int()}, "no table"),
        ({"a": torch.zeros(1001, 1)}, "no table"),
    ],
)
def test_what_is_no_embedding_is_refused(tmp_path: Path, state: dict[str, Any], said: str) -> None:
    save_file(state, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match=said):
        read_embedding(tmp_path / "x.safetensors")
    save_file({"clip_l": ROWS, "clip_g": 2 * ROWS}, tmp_path / "xl.safetensors")
    found = read_embedding(tmp_path / "xl.safetensors")
    assert found.token == "xl" and found.second is not None and torch.equal(found.second, 2 * found.rows)
