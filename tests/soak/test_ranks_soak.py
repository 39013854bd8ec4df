"""One of two processes killed at a step, again and again: the other ends and says so, and the next start goes on."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
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
    print(
        f"\n{RUNS * KILLS} kills of one of two processes: named every time, the other gone after at most {slowest:.1f} s,"
        f" {RUNS} of {RUNS} trainings end with the same bits"
    )
    assert slowest < 10


def test_all_ten_ways_to_share_a_batch_of_eight(tmp_path: Path) -> None:
    """Processes x passes x samples of a pass: to the bit for equal passes, and else up to the order of sums."""
    found: dict[tuple[int, int], dict[str, Any]] = {}
    losses: dict[tuple[int, int], list[float]] = {}
    for micro in (1, 2, 4, 8):
        for world in (world for world in (1, 2, 4, 8) if world * micro <= 8):
            out = tmp_path / f"{world}x{micro}"
            words = [
                *WORDS,
                "models.autoencoder.adversarial.weight=0",
                "stages.autoencoder.exact=true",
                f"stages.autoencoder.micro_batch={micro}",
            ]
            ended = several.train(world, *words, f"out={out}", within_s=240)
            assert ended.codes == [0] * world, ended.said
            found[world, micro] = load_file(out / PRODUCT)
            lines = map(json.loads, (out / "log.jsonl").read_text().splitlines())
            losses[world, micro] = [line["loss"] for line in lines if "loss" in line]
            assert all((found[1, micro][name] == value).all() for name, value in found[world, micro].items())
    assert len(found) == 10 and all(len(values) == 6 for values in losses.values())
    apart = max(abs(a - b) / abs(b) for values in losses.values() for a, b in zip(values, losses[1, 8], strict=True))
    weights = max(float(abs(value - found[1, 8][name]).max()) for each in found.values() for name, value in each.items())
    print(f"\n{len(found)} ways to share a batch: losses at most {apart:.1e} apart, weights {weights:.1e}; equal passes: the same bits")
    assert apart < 1e-4
