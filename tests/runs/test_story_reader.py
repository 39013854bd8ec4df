"""A run folder that is looked at again: what is new of its log is read, and the story is that of a fresh look."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from ldm.runs.run_record import MOST, StoryReader, read_story
from ldm.training import log


def line(images: int, stage: str = "a", **more: Any) -> bytes:
    said = {"stage": stage, "step": images, "images": images, "loss": 1.0 + images % 2, "seconds": images / 10, "terms": {"mse": 1.0}}
    return json.dumps(said | more).encode() + b"\n"


def test_each_look_reads_what_is_new_and_tells_what_a_fresh_one_tells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "stages" / "a").mkdir(parents=True)
    file, reader, parsed = tmp_path / log.LOG, StoryReader(tmp_path), []
    own = log._parsed
    monkeypatch.setattr(log, "_parsed", lambda raw: parsed.append(raw) or own(raw))  # type: ignore[func-returns-value]
    pieces = [
        line(1) + line(2) + b"not json\n",
        line(3)[:20],  # only begun
        line(3)[20:] + line(4, "b") + json.dumps({"failed": "a wire"}).encode() + b"\n",
        line(4)[:-1],  # whole, but for the end of the line
        b"\n" + json.dumps({"note": "went on", "launch": {}}).encode() + b"\n" + line(3, alarm="odd"),
    ]
    said = ["", "", "a wire", "", ""]
    for piece, failed in zip(pieces, said, strict=True):
        with file.open("ab") as stream:
            stream.write(piece)
        parsed.clear()
        story = reader.read()
        assert sum(len(raw) for raw in parsed) <= len(piece) + 20
        assert story == read_story(tmp_path) and story.failed == failed
    (stage,) = story.stages
    assert [step.images for step in stage.steps] == [1, 2, 3, 3, 4] and stage.alarms == ("odd",)
    assert story.damaged == [f"{file}: 1 damaged line"] and list(story.notes) == ["went on"]


@pytest.mark.parametrize("how", ["shorter", "replaced", "gone"])
def test_another_log_in_its_place_is_read_from_its_beginning(how: str, tmp_path: Path) -> None:
    (tmp_path / "stages" / "a").mkdir(parents=True)
    file, reader = tmp_path / log.LOG, StoryReader(tmp_path)
    file.write_bytes(b"".join(line(i) for i in range(1, 9)))
    assert [step.images for step in reader.read().stages[0].steps] == list(range(1, 9))
    if how == "shorter":
        os.truncate(file, len(line(1)) * 3)
    elif how == "replaced":
        file.rename(tmp_path / "old")
        file.write_bytes(b"".join(line(i) for i in range(5, 20)))
    else:
        file.unlink()
    story = reader.read()
    assert story == read_story(tmp_path)
    assert [step.images for step in story.stages[0].steps] == {"shorter": [1, 2, 3], "replaced": list(range(5, 20)), "gone": []}[how]


def test_of_many_steps_two_beside_each_other_count_as_one(tmp_path: Path) -> None:
    (tmp_path / "stages" / "a").mkdir(parents=True)
    (tmp_path / log.LOG).write_bytes(b"".join(line(i) for i in range(1, 2 * MOST + 2)))
    (stage,) = read_story(tmp_path).stages
    assert MOST <= len(stage.steps) <= 2 * MOST and stage.images == 2 * MOST + 1
    assert stage.steps[0].values["loss"] == 1.5 and stage.steps[0].images == 2 and stage.steps[0].terms == {"mse": 1.0}
    assert stage.seconds == pytest.approx((2 * MOST + 1) / 10)


def test_a_curve_of_very_many_steps_covers_all_of_the_run_evenly(tmp_path: Path) -> None:
    (tmp_path / "stages" / "a").mkdir(parents=True)
    count = 9 * MOST + 77
    (tmp_path / log.LOG).write_bytes(b"".join(line(i, loss=float(i), terms={"mse": 1.0} if i > MOST else {}) for i in range(1, count + 1)))
    steps = read_story(tmp_path).stages[0].steps
    assert MOST <= len(steps) <= 2 * MOST
    width = steps[0].images
    assert [step.images for step in steps] == [*(width * i for i in range(1, len(steps))), count]
    assert [step.values["loss"] for step in steps[:-1]] == [width * i - (width - 1) / 2 for i in range(1, len(steps))]
    assert steps[0].terms == {} and all(step.terms == {"mse": 1.0} for step in steps[-MOST // 2 :])
    assert steps[9].values["seconds"] == steps[9].images / 10  # what only grows is not averaged
