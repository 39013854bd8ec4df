"""Garbage collection while a command starts."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest

from ldm.__main__ import main
from ldm.cli import sample
from ldm.cli.starting import loading


def test_collection_goes_on_when_all_is_loaded_or_something_is_wrong() -> None:
    with loading() as loaded:
        assert not gc.isenabled()
        loaded()
        assert gc.isenabled()
    with pytest.raises(ValueError), loading():
        raise ValueError
    assert gc.isenabled()


def test_who_has_put_it_off_before_is_not_overruled() -> None:
    gc.disable()
    try:
        with loading() as loaded:
            loaded()
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_the_command_draws_with_collection(kl_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    recipes_of = sample.recipes_of
    monkeypatch.setattr(sample, "recipes_of", lambda *args: seen.append(gc.isenabled()) or recipes_of(*args))
    assert main(["sample", "a ring", "--model", str(kl_model), "--steps", "1", "--out", str(tmp_path)]) == 0
    assert seen == [True] and gc.isenabled()
