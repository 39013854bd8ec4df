"""One of two processes killed at a step, again and again: the other ends and says so, and the next start goes on."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "system"))

import several
from safetensors.numpy import load_file
from test_exact import PRODUCT, WORDS

pytestmark = pytest.mark.soak
RUNS, KILLS = 4, 5


def test_twenty_kills_of_one_of_two(tmp_path: Path) -> None:
    words = [*WORDS, "stages.autoencoder.images=160", "stages.autoencoder.save_every_images=8"]
    whole = several.train(2, *words, f"out={tmp_path / 'whole'}")
    assert whole.codes == [0, 0], whole.said
    expected = load_file(tmp_path / "whole" / PRODUCT)
    draw, slowest = random.Random(0), 0.0
    for run in range(RUNS):
        out = tmp_path / str(run)
        for step in sorted(draw.sample(range(1, 20), KILLS)):
            rank = draw.randrange(2)
            ended = several.train(2, *words, f"out={out}", fault=f"kill:{rank}:{step}")
            assert ended.codes[rank] == -9 and ended.codes[1 - rank] == 1, ended.said
            assert f"rank {rank} is gone" in ended.said[1 - rank] and f"step {step}" in ended.said[1 - rank], ended.said
            slowest = max(slowest, ended.seconds)
        last = several.train(2, *words, f"out={out}")
        assert last.codes == [0, 0], last.said
        found = load_file(out / PRODUCT)
        assert found.keys() == expected.keys() and all((found[name] == value).all() for name, value in expected.items())
    print(f"\n{RUNS * KILLS} kills of one of two processes: named every time, the other gone after at most {slowest:.1f} s,"
          f" {RUNS} of {RUNS} trainings end with the same bits")  # fmt: skip
    assert slowest < 10
