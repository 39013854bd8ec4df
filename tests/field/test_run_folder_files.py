"""Files of a run folder that are damaged: told in one line with their name and the fix, or left out of a report and counted."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ldm.cli.watch import lines as watched
from ldm.config.errors import UserError
from ldm.config.schema import build
from ldm.data.cached import CachedLatents
from ldm.formats import atomic, records
from ldm.runs import execution
from ldm.runs.keys import Finished, differences, finished, key_of
from ldm.runs.report import render
from ldm.runs.run_folder import check_version, is_stage_name
from ldm.runs.run_record import read_story
from ldm.training import checkpoint
from ldm.training.alarms import Alarms
from ldm.training.checkpoint import Meta
from ldm.training.log import LOG, Log, read, read_counted
from ldm.training.settings import Train

STEP: dict[str, Any] = {
    "stage": "a",
    "step": 1,
    "images": 8,
    "loss": 1.0,
    "terms": {"mse": 1.0},
    "gauges": {"grad_norm_model": 0.5},
    "lr": 1e-3,
    "images_per_s": 9.0,
    "seconds": 2.0,
    "time": 1.0,
}
DONE: dict[str, Any] = {
    "stage": "a",
    "kind": "evaluate",
    "key": "k",
    "identity": {"settings": {"images": 8}},
    "inputs": {"model": "h"},
    "product": "",
    "result": {"adherence": {"seen": {"bind": 0.5}, "intervals": {"2.5": {"seen": {"bind": {"mean": 0.5, "low": 0.4, "high": 0.6}}}}}},
    "seconds": 3.0,
    "images": 8,
    "carried": "",
    "version": "0.2.0",
}
META: dict[str, Any] = {"key": "k", "step": 2, "images": 8, "ema_updates": 2, "scaler": {"scale": 65536.0, "growth_interval": 2000}}
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.sampled_from([10**400, -1, 2**63, 1e308, float("nan"), float("inf"), "\ud800", "a/../b", "x" * 300, "\x1b[2J", "²", "9" * 5000]),
    st.floats(),
    st.text(max_size=9),
)
ANY = st.recursive(
    SCALARS, lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=6), inner, max_size=3)), max_leaves=6
)
DEEP = b"[" * 100_000


@st.composite
def damaged(draw: st.DrawFn, whole: dict[str, Any]) -> bytes:
    """Bytes of a record: with a value replaced anywhere in it, cut, spliced, nested without end, or anything at all."""
    way = draw(st.sampled_from(["value", "value", "value", "cut", "bytes", "any", "deep"]))
    if way == "value":
        made = copy.deepcopy(whole)
        place: Any = made
        while True:
            name = draw(st.sampled_from(sorted(place)))
            if not isinstance(place[name], dict) or not place[name] or draw(st.booleans()):
                break
            place = place[name]
        place[name] = draw(ANY)
        return json.dumps(made).encode()
    text = json.dumps(whole).encode()
    if way == "cut":
        return text[: draw(st.integers(0, len(text)))]
    if way == "bytes":
        at = draw(st.integers(0, len(text)))
        return text[:at] + draw(st.binary(min_size=1, max_size=4)) + text[at + 1 :]
    return json.dumps(draw(ANY)).encode() if way == "any" else b'{"stage": "a", "terms": ' + DEEP


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("run")
    (made / "stages" / "a" / "samples").mkdir(parents=True)
    return made


def line(value: dict[str, Any]) -> bytes:
    return json.dumps(value).encode() + b"\n"


# The readers, each given damaged bytes: a value or one line, whatever they are


def start_and_report(folder: Path, raw: bytes) -> None:
    """What a start and a report do with a log."""
    whole = line(STEP)
    (folder / LOG).write_bytes(whole + raw.replace(b"\n", b" ") + b"\n" + line({**STEP, "step": 2, "stage": "b"}))
    kept, odd = read_counted(folder / LOG)
    assert len(kept) + odd == 3 - (not raw.strip()) and [one for one in kept if one.get("step") == 2]
    log = Log(folder, console=False)
    with log.stage("a", 24, 8):
        pass
    assert isinstance(log.seconds_before("a"), float)
    Alarms(lambda images: 1.0, 8, before=log.steps("a")).look(16, {"mse": 1.0}, {}, 1e-3)
    log.close()
    story = read_story(folder)
    "\n".join([*watched(story, folder / "report.html"), render(story)]).encode()


def judge_and_report(folder: Path, raw: bytes) -> None:
    """What a start and a report do with a finished stage."""
    file = folder / "stages" / "a" / "done.json"
    file.write_bytes(raw)
    try:
        check_version(folder)
        done = finished(file.parent)
    except UserError as error:
        assert str(folder) in str(error) and "\n" not in str(error)
    else:
        assert isinstance(done, Finished)
        assert done.images >= 0 and done.seconds >= 0 and isinstance(execution._headline(done.result), str)
    story = read_story(folder)
    "\n".join([*watched(story, folder / "report.html"), render(story)]).encode()
    file.unlink()


def make_room(folder: Path, raw: bytes) -> None:
    """What a start does with the work of an interrupted one."""
    stage = folder / "stages" / "work"
    stage.mkdir(exist_ok=True)
    (stage / execution.IDENTITY).write_bytes(raw)
    notes: list[str] = []
    made: Any = SimpleNamespace(log=SimpleNamespace(note=notes.append), extend=False)
    execution.Execution._make_room(made, "work", stage, {"settings": {"kind": "train", "images": 16, "batch": 8, "ema": 0.9}}, None)
    assert all("\n" not in note for note in notes)
    for left in folder.glob("stages/work.replaced-*"):
        (left / execution.IDENTITY).unlink()
        left.rmdir()


def configuration(folder: Path, raw: bytes) -> None:
    """A configuration that a report reads."""
    (folder / "config.yaml").write_bytes(b"name: r\nstages:\n  a: " + raw.replace(b"\n", b" "))
    "\n".join([*watched(read_story(folder), folder / "report.html"), render(read_story(folder))]).encode()
    (folder / "config.yaml").unlink()


def prompts(folder: Path, raw: bytes) -> None:
    """The prompts of pictures that a report shows."""
    (folder / "stages" / "a" / "samples" / "prompts.json").write_bytes(raw)
    render(read_story(folder)).encode()
    (folder / "stages" / "a" / "samples" / "prompts.json").unlink()


def state(folder: Path, raw: bytes) -> None:
    """A checkpoint whose sums are right."""
    target = folder / "state" / "images-000000000008"

    def write(inner: Path) -> None:
        atomic.write_tensors(inner / "model.safetensors", {"w": torch.zeros(2)})
        (inner / "meta.json").write_bytes(raw)

    atomic.commit(target, write)
    told: list[str] = []
    found = checkpoint.newest_valid(folder / "state", told.append)
    assert (found is not None and found[2].step >= 0) or (len(told) == 1 and "meta.json" in told[0])


def manifest(folder: Path, raw: bytes) -> None:
    """A manifest of sums."""
    target = folder / "sums"
    target.mkdir(exist_ok=True)
    (target / "weights").touch()
    (target / atomic.MANIFEST).write_bytes(raw)
    with pytest.raises(atomic.Damaged):
        atomic.verify(target)


def cache(folder: Path, raw: bytes) -> None:
    """The plan of a latent cache."""
    (folder / "cache").mkdir(exist_ok=True)
    (folder / "cache" / "cache.json").write_bytes(raw)
    with suppress(UserError):
        assert len(CachedLatents(folder / "cache")) == 0


PLAN = {
    "autoencoder": "a",
    "normalisation": {},
    "data": "d",
    "images": 8,
    "resolution": 8,
    "seed": 0,
    "flip": False,
    "mirrors": True,
    "shard_images": 4,
    "shapes": [],
}
READERS = [
    (start_and_report, STEP),
    (judge_and_report, DONE),
    (make_room, {"key": "k", "settings": {"kind": "train", "images": 8}}),
    (configuration, {"kind": "train", "images": 8, "require": {"x": 1}}),
    (prompts, {"": ["a", "b"], "adherence-seen-64": ["c"]}),
    (state, META),
    (manifest, {"gone": "0" * 64}),
    (cache, PLAN),
]
ids = [reader.__name__ for reader, _ in READERS]


def fuzz(reader: Any, whole: dict[str, Any], folder: Path, count: int) -> None:
    quiet = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]

    @settings(max_examples=count, deadline=None, suppress_health_check=quiet, database=None, derandomize=True)
    @given(raw=damaged(whole))
    def one(raw: bytes) -> None:
        reader(folder, raw)

    one()


@pytest.mark.slow
@pytest.mark.parametrize(("reader", "whole"), READERS, ids=ids)
def test_damaged_bytes_give_a_value_or_one_line(reader: Any, whole: dict[str, Any], folder: Path) -> None:
    fuzz(reader, whole, folder, 30)


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("reader", "whole"), READERS, ids=ids)
def test_ten_thousand_damaged_bytes(reader: Any, whole: dict[str, Any], folder: Path) -> None:
    fuzz(reader, whole, folder, 10_000)


# The right values


CASES = [
    b'{"stage": ["a"], "step": 1, "images": 8, "seconds": 1.0}',
    b'{"stage": "a", "terms": ' + DEEP,
    b'{"stage": "a", "images": "8", "step": 2}',
]


@pytest.mark.parametrize("odd", CASES, ids=["unhashable", "deep", "text-for-number"])
def test_an_odd_line_is_skipped_and_counted(odd: bytes, tmp_path: Path) -> None:
    """Cases fault-03: a start and a report go on without it, and say how many there were."""
    (tmp_path / LOG).write_bytes(line(STEP) + odd + b"\n" + line({**STEP, "step": 2, "images": 16, "seconds": 5.0}))
    log = Log(tmp_path, console=False)
    assert log.seconds_before("a") == 5.0
    with log.stage("a", 24, 8):
        pass
    log.close()
    assert [one["step"] for one in read(tmp_path / LOG) if "step" in one] == [1]  # what is beyond image 8 is cut
    assert any("1 damaged line" in one.get("note", "") for one in read(tmp_path / LOG))
    assert odd + b"\n" in (tmp_path / LOG).read_bytes()  # nothing is thrown away
    assert "1 damaged line" in render(read_story(tmp_path))


@pytest.mark.parametrize("huge", [2.25e254, -1e300, 1e308, 5e-324, 1e99, 1e-99])
def test_numbers_beyond_what_axes_reckon_with_are_left_out(huge: float, folder: Path) -> None:
    """Found by the soak: a logged speed of 1e254 ended a report in an OverflowError."""
    start_and_report(folder, json.dumps({**STEP, "images_per_s": huge, "terms": {"mse": huge}, "loss": huge}).encode())


def test_a_line_that_is_being_written_is_not_damage(tmp_path: Path) -> None:
    (tmp_path / LOG).write_bytes(line(STEP) + line(STEP)[:20])
    assert read_counted(tmp_path / LOG) == ([STEP], 0)


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        (b"[]", "a JSON object was expected, got list"),
        (b"{", "not readable JSON"),
        (DEEP, "more than 64 levels"),
        (json.dumps({**DONE, "seconds": "long"}).encode(), "seconds"),
        (json.dumps({**DONE, "images": -1}).encode(), "images"),
    ],
)
def test_a_damaged_result_is_refused_with_its_name_and_the_fix(raw: bytes, said: str, tmp_path: Path) -> None:
    (tmp_path / "done.json").write_bytes(raw)
    with pytest.raises(UserError) as told:
        finished(tmp_path)
    assert said in str(told.value) and f"move {tmp_path} away" in str(told.value) and "done.json" in str(told.value)
    assert "\n" not in str(told.value)


def test_a_product_that_changed_is_refused_and_not_trained_anew(tmp_path: Path) -> None:
    atomic.commit(tmp_path / "model", lambda inner: (inner / "weights").write_text("1") and None)
    done = {**DONE, "product": atomic.folder_hash(tmp_path / "model")}
    (tmp_path / "done.json").write_text(json.dumps(done))
    assert finished(tmp_path) is not None
    (tmp_path / "model" / "weights").write_text("2")
    with pytest.raises(UserError, match=r"model/weights: its bytes differ from the manifest; put it back .*or move"):
        finished(tmp_path)


def test_checkpoints_say_whose_they_are_where_the_identity_is_damaged(tmp_path: Path) -> None:
    """An interrupted stage goes on from its checkpoint instead of being put aside."""
    stage = tmp_path / "stages" / "a"
    stage.mkdir(parents=True)
    own: dict[str, Any] = {"settings": {"kind": "train", "images": 16}}
    checkpoint.save_state(stage / "state", 8, {"model": {"w": torch.ones(2)}}, Meta(**{**META, "key": key_of(own)}), 2)
    notes: list[str] = []
    made: Any = SimpleNamespace(log=SimpleNamespace(note=notes.append), extend=False)
    for wanted, stays in ((own, True), ({"settings": {"kind": "train", "images": 8}}, False)):
        (stage / execution.IDENTITY).write_bytes(b"{")
        execution.Execution._make_room(made, "a", stage, wanted, None)
        assert stage.is_dir() is stays
    assert "identity.json: not readable JSON" in notes[0]


def test_only_whole_checkpoints_count_as_checkpoints(tmp_path: Path) -> None:
    """A folder of another name never takes a checkpoint's place among those that are kept."""
    for name in ("images-zzz", "images-999"):
        (tmp_path / "state" / name).mkdir(parents=True)
    for step in (1, 2, 3):
        checkpoint.save_state(tmp_path / "state", 8 * step, {"model": {"w": torch.ones(2)}}, Meta(**{**META, "step": step}), 2)
    assert [path.name for path in checkpoint.states(tmp_path / "state")] == ["images-000000000024", "images-000000000016"]


def test_records_are_plain_and_bounded() -> None:
    assert records.parse(b'{"a": "\\ud83d\\ude00 \\ud800"}') == {"a": "\U0001f600 ?"}
    assert records.parse(b"[" * 60 + b"]" * 60) and records.parse(b"[[], [], []]" + b" " * 9)
    for raw in (b"[" * 70 + b"]" * 70, DEEP, b"\xff", b"1" * 5000, b"{]", b""):
        with pytest.raises(ValueError):
            records.parse(raw)


def test_a_line_ends_where_its_line_feed_stands(tmp_path: Path) -> None:
    (tmp_path / LOG).write_bytes(b"\x00\r" + line(STEP))
    assert read_counted(tmp_path / LOG) == ([], 1)


def test_differences_are_one_line() -> None:
    assert differences({"a\nb": "x\ny"}, {}) == ["a\\nb: x\\ny -> None"]


def test_a_list_that_is_too_short_is_told() -> None:
    with pytest.raises(UserError, match=r"optim: optim\.betas\.1: required, but not given"):
        build({"model": "a", "images": 8, "resolution": 8, "optim": {"betas": [0.9]}}, Train, "optim")


def names() -> Iterator[Any]:
    yield from [
        ("a", True),
        ("a-1_b", True),
        ("", False),
        ("..", False),
        ("a/b", False),
        ("a\0b", False),
        ("x" * 101, False),
        ("-a", False),
    ]


@pytest.mark.parametrize(("name", "good"), list(names()))
def test_a_stage_s_name_is_a_folder_s(name: str, good: bool, folder: Path) -> None:
    assert is_stage_name(name) is good
    (folder / "config.yaml").write_text("stages: " + json.dumps({name: {"kind": "train"}}))
    assert (name in [stage.name for stage in read_story(folder).stages]) is (good or name == "a")
    (folder / "config.yaml").unlink()
