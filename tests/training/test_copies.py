"""Checkpoints and finished stages are copied into a store, whole or not at all, and brought to a machine that lacks them."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch

from ldm.config.errors import UserError
from ldm.data import remote
from ldm.training.checkpoint import Meta, load_state, newest_valid, save_state
from ldm.training.copies import HELD, Copies, begin, files_below

URL = "memory://bucket/run"


@pytest.fixture(autouse=True)
def store(monkeypatch) -> Iterator[Any]:
    monkeypatch.setattr(remote, "WAIT_S", 0.01)
    monkeypatch.setattr(remote, "PATIENCE_S", 0.2)
    memory = fsspec.filesystem("memory")
    yield memory
    memory.store.clear()
    memory.pseudo_dirs[:] = [""]


def run_folder(root: Path, key: str = "k") -> Path:
    stage = root / "stages" / "tune"
    stage.mkdir(parents=True)
    (root / "config.yaml").write_text("name: x\n")
    (root / "log.jsonl").write_text("{}\n")
    (stage / "identity.json").write_text(json.dumps({"key": key}))
    return stage


def state(stage: Path, images: int, keep: int = 2, key: str = "k") -> Path:
    torch.manual_seed(images)
    return save_state(stage / "state", images, {"model": {"w": torch.randn(1000)}}, Meta(key=key, step=images, images=images), keep)


def copied(root: Path) -> tuple[Copies, list[str]]:
    said: list[str] = []
    return Copies(root, URL, said.append), said


def test_a_checkpoint_is_copied_and_taken_up_elsewhere(tmp_path, store):
    stage = run_folder(tmp_path / "run")
    for images in (4, 8, 12):
        copies, _ = copied(tmp_path / "run")
        copies.state(state(stage, images), keep=2)
        copies.close()
    assert sorted({name.split("/")[0] for name in files_below(f"{URL}/stages/tune/state")}) == [
        "images-000000000008",
        "images-000000000012",
    ]
    assert not list(stage.glob(f"state/{HELD}*"))
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.yaml").write_text("name: x\n")
    assert begin(other, URL, ["text", "tune"]) == [f"tune: the checkpoint images-000000000012, from {URL}/stages/tune"]
    found = newest_valid(other / "stages" / "tune" / "state", print)
    assert found is not None and torch.equal(found[1]["model"]["w"], load_state(stage / "state" / "images-000000000012")[0]["model"]["w"])
    assert (other / "stages/tune/identity.json").read_bytes() == (stage / "identity.json").read_bytes()
    assert (other / "log.jsonl").read_text() == "{}\n"
    assert begin(other, URL, ["tune"]) == []  # it is there already
    assert begin(tmp_path / "run", URL, ["tune"]) == []


def test_a_newer_checkpoint_of_the_same_work_is_taken_and_no_other(tmp_path):
    stage = run_folder(tmp_path / "run")
    copies, _ = copied(tmp_path / "run")
    copies.state(state(stage, 12), keep=2)
    copies.close()
    for key, taken in (("k", True), ("of other settings", False)):
        other = tmp_path / key / "run"
        state(run_folder(other, key), 8, key=key)
        assert bool(begin(other, URL, ["tune"])) is taken
        assert (other / "stages/tune/state/images-000000000012").exists() is taken
    ahead = tmp_path / "ahead"
    state(run_folder(ahead), 16)
    assert begin(ahead, URL, ["tune"]) == []


def test_a_finished_stage_is_copied_without_what_it_needed_on_its_way(tmp_path):
    stage = run_folder(tmp_path / "run")
    copies, _ = copied(tmp_path / "run")
    copies.state(state(stage, 4), keep=2)
    copies.close()
    (stage / "model").mkdir()
    (stage / "model" / "weights.safetensors").write_bytes(b"w" * 100)
    (stage / ".left").write_text("x")
    (stage / "done.json").write_text("{}")
    copies, said = copied(tmp_path / "run")
    copies.stage(stage)
    copies.close()
    assert sorted(files_below(f"{URL}/stages/tune")) == ["done.json", "identity.json", "model/weights.safetensors"]
    assert "stages/tune: copied to" in said[0]
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.yaml").write_text("name: x\n")
    assert begin(other, URL, ["tune"]) == [f"tune: finished, from {URL}/stages/tune"]
    assert (other / "stages/tune/model/weights.safetensors").read_bytes() == b"w" * 100 and not list(other.glob("stages/.*"))


def test_what_is_not_whole_in_the_store_does_not_count_and_is_removed(tmp_path, store):
    stage = run_folder(tmp_path / "run")
    copies, _ = copied(tmp_path / "run")
    copies.state(state(stage, 8), keep=1)
    copies.close()
    store.pipe("/bucket/run/stages/tune/state/images-000000000006/model.safetensors", b"half")
    store.pipe("/bucket/run/stages/tune/state/images-000000000010/model.safetensors", b"half")
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.yaml").write_text("name: x\n")
    assert begin(other, URL, ["tune"]) == [f"tune: the checkpoint images-000000000008, from {URL}/stages/tune"]
    copies, _ = copied(tmp_path / "run")
    copies.state(state(stage, 12), keep=1)
    copies.close()
    assert sorted({name.split("/")[0] for name in files_below(f"{URL}/stages/tune/state")}) == ["images-000000000012"]


def test_the_manifest_comes_last(tmp_path, monkeypatch):
    stage, order = run_folder(tmp_path / "run"), []
    put = remote.put
    monkeypatch.setattr(remote, "put", lambda file, url, *rest: (put(file, url, *rest), order.append(url))[0])
    copies, _ = copied(tmp_path / "run")
    copies.state(state(stage, 4), keep=2)
    copies.close()
    inside = [url for url in order if "images-" in url]
    assert inside[-1].endswith("manifest.json") and len(inside) == 3


def test_a_store_that_fails_stops_nothing_and_is_told(tmp_path, store, monkeypatch):
    stage = run_folder(tmp_path / "run")
    copies, said = copied(tmp_path / "run")

    def refused(*words: object, **more: object) -> None:
        raise PermissionError(13, "Access Denied")

    monkeypatch.setattr(type(store), "put_file", refused)
    copies.state(state(stage, 4), keep=2)
    copies.close()
    assert len(said) == 1 and "state/images-000000000004: not copied there (access refused" in said[0] and "training goes on" in said[0]
    monkeypatch.undo()
    copies, said = copied(tmp_path / "run")
    copies.state(state(stage, 8), keep=2)
    copies.close()
    assert "copied to" in said[0]


def test_a_checkpoint_stays_until_it_is_copied_and_one_that_waits_gives_way(tmp_path, monkeypatch):
    stage, go, put = run_folder(tmp_path / "run"), threading.Event(), remote.put

    def slow(*words: Any) -> None:
        go.wait(10)
        put(*words)

    monkeypatch.setattr(remote, "put", slow)
    copies, said = copied(tmp_path / "run")
    for images in (4, 8, 12, 16):
        copies.state(state(stage, images, keep=1), keep=2)
    assert [path.name for path in stage.glob("state/images-*")] == ["images-000000000016"]
    go.set()
    copies.close()
    assert [line.partition(":")[0].rpartition("-")[2] for line in said] == ["000000000004", "000000000016"]
    go.clear()
    copies, said = copied(tmp_path / "run")
    copies.state(state(stage, 20, keep=1), keep=2)
    shutil.rmtree(stage / "state")  # the stage is finished
    go.set()
    copies.close()
    assert said == []


def test_a_store_that_cannot_be_used_is_refused_before_any_work(tmp_path, store, monkeypatch):
    stage = run_folder(tmp_path / "run")
    with pytest.raises(UserError, match=r"mirror: nothing://x|nothing://x/config.yaml cannot be opened"):
        begin(tmp_path / "run", "nothing://x", ["tune"])
    monkeypatch.setattr(type(store), "put_file", lambda *words, **more: (_ for _ in ()).throw(PermissionError(13, "Access Denied")))
    with pytest.raises(UserError, match=r"mirror: memory://bucket/run cannot be used \(access refused") as told:
        begin(tmp_path / "run", URL, ["tune"])
    assert "\n" not in str(told.value) and stage.exists()


def test_names_that_lead_out_are_refused(tmp_path, store):
    run_folder(tmp_path / "run")
    store.pipe("/bucket/run/stages/other/done.json", b"{}")
    store.store["/bucket/run/stages/other/../../../../escaped"] = store.store["/bucket/run/stages/other/done.json"]
    with pytest.raises(UserError, match="leads out of the folder"):
        begin(tmp_path / "run", URL, ["other"])
    assert not (tmp_path / "escaped").exists()
