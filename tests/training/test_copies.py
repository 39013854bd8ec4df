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
from ldm.training.copies import HELD, Copies, begin, files_below, overlap, wrong

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


def started(root: Path, *names: str, key: str = "k") -> list[str]:
    """What a start of a run says of its copies."""
    root.mkdir(exist_ok=True, parents=True)
    (root / "config.yaml").write_text("name: x\n")
    begin(root, URL)
    copies, said = copied(root)
    for name in names:
        copies.finished(name, key, lambda folder: folder.rename(folder.with_name(f"{folder.name}.replaced-1")))
        if not (root / "stages" / name / "done.json").exists():
            copies.newest(name, key, 2)
    copies.close()
    return said


def done(stage: Path, key: str = "k", weights: bytes = b"w" * 100) -> None:
    """The stage is finished."""
    (stage / "model").mkdir(exist_ok=True)
    (stage / "model" / "weights.safetensors").write_bytes(weights)
    (stage / "done.json").write_text(json.dumps({"key": key}))
    shutil.rmtree(stage / "state", ignore_errors=True)


def names_in(store: Any) -> list[str]:
    """Of the states in the store."""
    return sorted({name.split("/")[0] for name in files_below(f"{URL}/stages/tune/state")})


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
    assert started(other, "text", "tune") == [f"tune: the checkpoint images-000000000012, from {URL}/stages/tune"]
    found = newest_valid(other / "stages" / "tune" / "state", print)
    assert found is not None and torch.equal(found[1]["model"]["w"], load_state(stage / "state" / "images-000000000012")[0]["model"]["w"])
    assert (other / "log.jsonl").read_text() == "{}\n"
    assert started(other, "tune") == []  # it is there already
    assert started(tmp_path / "run", "tune") == []


def test_a_newer_checkpoint_of_the_same_work_is_taken_and_no_other(tmp_path):
    stage = run_folder(tmp_path / "run")
    copies, _ = copied(tmp_path / "run")
    copies.state(state(stage, 12), keep=2)
    copies.close()
    other = tmp_path / "same" / "run"
    state(run_folder(other), 8)
    assert started(other, "tune") == [f"tune: the checkpoint images-000000000012, from {URL}/stages/tune"]
    ahead = tmp_path / "ahead"
    state(run_folder(ahead), 16)
    assert "images-000000000016: copied" in started(ahead, "tune")[0]  # the store lacked it


def test_a_changed_setting_keeps_its_own_checkpoints_and_not_the_former_ones(tmp_path, store):
    former = run_folder(tmp_path / "former", "former")
    copies, _ = copied(tmp_path / "former")
    for images in (1008, 1016):
        copies.state(state(former, images, key="former"), keep=2)
        copies.close()
        copies, _ = copied(tmp_path / "former")
    assert names_in(store) == ["images-000000001008", "images-000000001016"]
    said = started(tmp_path / "new", "tune")
    assert len(said) == 1 and "images-000000001016 and 1 more are of other settings" in said[0] and "not taken" in said[0]
    stage = tmp_path / "new/stages/tune"
    for images in (24, 32, 40):
        copies, _ = copied(tmp_path / "new")
        copies.state(state(stage, images), keep=2)
        copies.close()
    assert names_in(store) == ["images-000000000032", "images-000000000040"]
    shutil.rmtree(tmp_path / "new")
    assert started(tmp_path / "new", "tune") == [f"tune: the checkpoint images-000000000040, from {URL}/stages/tune"]


def test_an_own_checkpoint_wins_against_a_newer_one_of_other_settings(tmp_path, store):
    former = run_folder(tmp_path / "former", "former")
    copies, _ = copied(tmp_path / "former")
    copies.state(state(former, 1016, key="former"), keep=2)
    copies.close()
    stage = run_folder(tmp_path / "run")
    state(stage, 40)
    said = started(tmp_path / "run", "tune")
    assert "1016 is of other settings" in said[0] and "images-000000000040: copied" in said[1]
    assert [path.name for path in stage.glob("state/images-*")] == ["images-000000000040"] == names_in(store)
    shutil.copytree(former / "state/images-000000001016", stage / "state/images-000000001016")  # as an earlier version brought it
    told: list[str] = []
    found = newest_valid(stage / "state", told.append, "k")
    assert found is not None and found[2].images == 40 and "of other settings" in told[0]


def test_a_finished_stage_of_other_settings_hides_no_checkpoint(tmp_path, store):
    stage = run_folder(tmp_path / "former", "former")
    done(stage, "former")
    copies, _ = copied(tmp_path / "former")
    copies.stage(stage)
    copies.close()
    stage = run_folder(tmp_path / "run")
    copies, _ = copied(tmp_path / "run")
    copies.state(state(stage, 40), keep=2)
    copies.close()
    assert started(tmp_path / "other", "tune") == [f"tune: the checkpoint images-000000000040, from {URL}/stages/tune"]
    assert started(tmp_path / "back", "tune", key="former")[-1] == f"tune: finished, from {URL}/stages/tune"
    store.pipe("/bucket/run/stages/tune/model/of-the-former.bin", b"x")
    done(stage, weights=b"new")
    assert "stages/tune: copied to" in started(tmp_path / "run", "tune")[0]  # by the next start, as it was not when it was finished
    assert sorted(files_below(f"{URL}/stages/tune")) == ["done.json", "identity.json", "model/weights.safetensors"]
    assert started(tmp_path / "run", "tune") == []
    said = started(tmp_path / "other", "tune")
    assert said == [f"tune: finished, from {URL}/stages/tune"] and (tmp_path / "other/stages/tune.replaced-1/state").is_dir()
    assert (tmp_path / "other/stages/tune/model/weights.safetensors").read_bytes() == b"new"


def test_a_finished_stage_counts_only_while_all_of_it_is_there(tmp_path, store, monkeypatch):
    stage = run_folder(tmp_path / "run")
    done(stage)
    started(tmp_path / "run", "tune")
    done(stage, "changed", b"changed")
    put = remote.put

    def half(file: Path, url: str, *rest: Any) -> None:
        if url.endswith("weights.safetensors"):
            raise OSError(5, "cut off")
        put(file, url, *rest)

    monkeypatch.setattr(remote, "put", half)
    assert "not copied there (cut off)" in started(tmp_path / "run", "tune", key="changed")[0]
    assert "done.json" not in files_below(f"{URL}/stages/tune")


def test_a_store_that_fails_later_does_not_end_the_run(tmp_path, store, monkeypatch):
    run_folder(tmp_path / "run")
    copies, said = copied(tmp_path / "run")
    copies.newest("tune", "k", 2)
    monkeypatch.setattr(remote, "listed", lambda *words: (_ for _ in ()).throw(OSError(5, "gone")))
    copies.finished("next", "k", print)
    assert said == [f"next: {URL} cannot be read (gone); it begins with what is here"]
    with pytest.raises(UserError, match=r"mirror: memory://bucket/run cannot be used \(gone\)"):
        copied(tmp_path / "run")[0].finished("tune", "k", print)


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("/mnt/store", "give a URL such as s3"),
        ("s3://bucket/run[1]", "for a pattern"),
        ("file:///mnt/*/run", "for a pattern"),
        ("http://host/run", "http cannot be written"),
        ("nothing://x", "nothing is no known protocol"),
        ("s3://bucket/run", ""),
        ("memory://x", ""),
    ],
)
def test_what_is_known_of_a_store_is_told_without_asking_it(url, said):
    assert said in wrong(url) and bool(said) == wrong(url).startswith("mirror: got ")


def test_a_store_and_the_run_folder_do_not_lie_in_each_other(tmp_path):
    out = tmp_path / "runs" / "a"
    for place in (out, out / "store", tmp_path / "runs", out / ".." / "a"):
        assert overlap(f"file://{place}", out).startswith("mirror: ") and "lie in each other" in overlap(f"file://{place}", out)
    assert not overlap(f"file://{tmp_path}/runs/b", out) and not overlap(f"s3://{out}", out) and not overlap(f"file://{out}b", out)


def test_a_finished_stage_is_copied_without_what_it_needed_on_its_way(tmp_path):
    stage = run_folder(tmp_path / "run")
    copies, _ = copied(tmp_path / "run")
    copies.state(state(stage, 4), keep=2)
    copies.close()
    (stage / ".left").write_text("x")
    done(stage)
    copies, said = copied(tmp_path / "run")
    copies.stage(stage)
    copies.close()
    assert sorted(files_below(f"{URL}/stages/tune")) == ["done.json", "identity.json", "model/weights.safetensors"]
    assert "stages/tune: copied to" in said[0]
    other = tmp_path / "other"
    assert started(other, "tune") == [f"tune: finished, from {URL}/stages/tune"]
    assert (other / "stages/tune/model/weights.safetensors").read_bytes() == b"w" * 100 and not list(other.glob("stages/.*"))


def test_what_is_not_whole_in_the_store_does_not_count_and_is_removed(tmp_path, store):
    stage = run_folder(tmp_path / "run")
    copies, _ = copied(tmp_path / "run")
    copies.state(state(stage, 8), keep=1)
    copies.close()
    store.pipe("/bucket/run/stages/tune/state/images-000000000006/model.safetensors", b"half")
    store.pipe("/bucket/run/stages/tune/state/images-000000000010/model.safetensors", b"half")
    other = tmp_path / "other"
    assert started(other, "tune") == [f"tune: the checkpoint images-000000000008, from {URL}/stages/tune"]
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
    with pytest.raises(UserError, match=r"^mirror: nothing://x/config.yaml cannot be opened"):
        begin(tmp_path / "run", "nothing://x")
    monkeypatch.setattr(type(store), "put_file", lambda *words, **more: (_ for _ in ()).throw(PermissionError(13, "Access Denied")))
    with pytest.raises(UserError, match=r"mirror: memory://bucket/run cannot be used \(access refused") as told:
        begin(tmp_path / "run", URL)
    assert "\n" not in str(told.value) and stage.exists()


def test_names_that_lead_out_are_refused(tmp_path, store):
    run_folder(tmp_path / "run")
    store.pipe("/bucket/run/stages/other/done.json", b'{"key": "k"}')
    store.store["/bucket/run/stages/other/../../../../escaped"] = store.store["/bucket/run/stages/other/done.json"]
    with pytest.raises(UserError, match="leads out of the folder"):
        started(tmp_path / "run", "other")
    assert not (tmp_path / "escaped").exists()
