"""Which stage reads what, where a run has several models of a kind."""

from __future__ import annotations

from typing import Any

import pytest

from ldm.config.errors import UserError
from ldm.config.schema import build
from ldm.runs.execution import data_lines
from ldm.runs.run import Read, Run


def run_of(*trained: str, **more: Any) -> Run:
    """Two denoisers on one autoencoder; stages `s0`, `s1`, ... train what is named, then an export."""
    stages = {f"s{i}": {"kind": "train", "model": name, "resolution": 64, "images": 8} for i, name in enumerate(trained)}
    models = {
        "text": {"kind": "clip"},
        "small": {"kind": "kl"},
        **{name: {"kind": "latent_diffusion", "autoencoder": "small"} for name in ("first", "second")},
    }
    return build({"data": {"kind": "scenes"}, "models": models, "stages": stages | {"out": {"kind": "export"}}} | more, Run, "run")


@pytest.mark.parametrize(
    ("trained", "exported"),
    [(("first",), "s2"), (("first", "second"), "s3"), (("first", "second", "first"), "s4"), (("second", "first", "small"), "s3")],
)
def test_the_export_is_of_the_last_stage_that_trained_what_can_be_exported(trained: tuple[str, ...], exported: str) -> None:
    run = run_of("text", "small", *trained)
    assert run.measured("out") == exported and run.reads("out")["model"] == Read(stage=exported)


def test_a_model_goes_on_from_its_own_last_stage_alone() -> None:
    run = run_of("text", "small", "first", "second", "first")
    assert run.reads("s4") == {"text": Read(stage="s0"), "autoencoder": Read(stage="s1"), "init": Read(stage="s2")}
    assert "init" not in run.reads("s3")


def test_what_a_base_brings_along_is_read_where_the_run_names_none() -> None:
    models = {"painter": {"kind": "latent_diffusion"}}
    stages = {"tune": {"kind": "train", "model": "painter", "resolution": 64, "images": 8}}
    run = run_of(init="owner/name", models=models, stages=stages)
    assert run.reads("tune") == {"text": Read(model="text"), "autoencoder": Read(model="autoencoder"), "init": Read(model="painter")}


def test_a_model_that_nothing_has_made_is_named() -> None:
    with pytest.raises(UserError, match=r"stages.s0: needs a stage before it that trains small \(kind: train, model: small\)"):
        run_of("first")


def test_the_console_names_what_data_tell_in_words() -> None:
    told = {"kind": "folder", "images": 1500, "images_in_both_parts": 1600, "of_its_kind": 4, "fingerprint": "a", "captions_from": "auto"}
    assert list(data_lines({**told, "rejected": {"no caption": 2}, "rejected_files": ["x.png: no caption"]})) == [
        "data: kind folder, images 1,500, with the held-out ones 1,600, prior pictures 4, captions from auto",
        "left out: 2 no caption",
        "  x.png: no caption",
    ]
