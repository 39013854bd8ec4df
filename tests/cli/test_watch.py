"""Looking at a run: what the terminal shows while it trains, after it failed, and when it is finished."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from ldm.__main__ import main
from ldm.cli.watch import BARS, spark


def run_of(folder: Path, *lines: dict[str, Any], done: bool = False) -> Path:
    stages = {"diffusion": {"kind": "train", "model": "diffusion", "images": 1000}}
    folder.mkdir()
    (folder / "config.yaml").write_text(yaml.safe_dump({"name": "mine", "stages": stages}))
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if done:
        (folder / "stages" / "diffusion").mkdir(parents=True)
        (folder / "stages" / "diffusion" / "done.json").write_text(json.dumps({"kind": "train", "images": 1000, "seconds": 75}))
    return folder


def step(images: int, loss: float) -> dict[str, Any]:
    return {
        "stage": "diffusion",
        "step": images // 10,
        "images": images,
        "loss": loss,
        "terms": {"denoising": loss},
        "gauges": {"error": loss},
        "images_per_s": 50.0,
        "seconds": images / 50,
    }


def test_a_run_that_trains_shows_curves_time_left_pictures_and_notes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = run_of(tmp_path / "run", {"note": "hello"}, *(step(100 * i, 1 / i) for i in range(1, 5)))
    (run / "stages/diffusion/samples").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(run / "stages/diffusion/samples/000000400.png")
    assert main(["watch", str(run), "--once"]) == 0
    said = capsys.readouterr().out
    assert "mine: unfinished" in said and "400 of 1,000 images (40%)" in said and "12 s left" in said
    assert spark([1, 1 / 2, 1 / 3, 1 / 4], 60) in said and "images/s" in said and "error" in said
    assert "000000400.png" in said and "hello" in said and "FAILED" not in said
    assert "mine" in (run / "report.html").read_text()


def test_it_ends_with_the_run_and_shows_why_one_failed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["watch", str(run_of(tmp_path / "whole", step(1000, 0.5), done=True))]) == 0  # without --once
    said = capsys.readouterr().out
    assert "mine: finished" in said and "finished   ," not in said
    broken = run_of(tmp_path / "broken", step(100, 0.5), {"failed": "rank 1 is gone"})
    assert main(["watch", str(broken), "--once"]) == 0
    assert capsys.readouterr().out.strip().endswith("FAILED: rank 1 is gone")
    again = run_of(tmp_path / "again", {"failed": "rank 1 is gone"}, {"launch": {}}, step(100, 0.5))
    assert main(["watch", str(again), "--once"]) == 0
    assert "FAILED" not in capsys.readouterr().out


def test_what_is_no_run_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["watch", str(tmp_path / "none"), "--once"]) == 2
    assert "no such folder; a run folder is needed" in capsys.readouterr().err


def test_curves_keep_their_ends_and_their_order() -> None:
    assert spark([0, 1, 2, 3, 4, 5, 6, 7], 8) == BARS
    assert spark([3.0], 5) == spark([2.0, 2.0], 1) == BARS[0]
    assert len(spark(list(range(1000)), 40)) == 40 and list(spark(list(range(1000)), 40)) == sorted(spark(list(range(1000)), 40))
