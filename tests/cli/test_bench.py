"""The harness on made-up rows, and every row of the table end to end with toy shapes; no timing is asserted."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ldm.cli import bench
from ldm.cli.benchmarks import rows as table
from ldm.cli.benchmarks.measure import Spread, compare, sign_interval
from ldm.cli.benchmarks.rows import ROWS, Case, Row, Setup
from ldm.config.errors import UserError

QUICK = ("B1", "B2", "B14")  # rows that stand for the others where those are left out
RUN = [row.id for row in ROWS if not row.missing]


class Stopwatch:
    """A clock whose time the sides themselves advance, and the order in which they were called."""

    def __init__(self) -> None:
        self.now, self.order = 0.0, ""

    def side(self, name: str, *seconds: float) -> Callable[[], None]:
        left = list(seconds)

        def call() -> None:
            self.order += name
            self.now += left.pop(0) if len(left) > 1 else left[0]

        return call

    def measure(self, call: Callable[[], Any], repeats: int) -> float:
        start = self.now
        for _ in range(repeats):
            call()
        return self.now - start


def case(**fields: Any) -> Case:
    usual: dict[str, Any] = {
        "name": "sums",
        "kind": "equal",
        "ours": lambda: None,
        "theirs": lambda: None,
        "check": lambda: 0.0,
        "tolerance": 1e-6,
        "error": "difference",
    }
    return Case(**(usual | fields))


@pytest.fixture
def setup(tmp_path: Path) -> Setup:
    return Setup(size="tiny", folder=tmp_path)


def run(made: Case, setup: Setup, watch: Stopwatch, rounds: int, **more: Any) -> Any:
    return compare(made, setup, rounds, clock=("a stopwatch", watch.measure), **more)


def test_the_sides_are_called_in_turn_after_one_call_each(setup: Setup) -> None:
    watch = Stopwatch()
    run(case(ours=watch.side("a", 1), theirs=watch.side("b", 2)), setup, watch, 4)
    assert watch.order == "ab" + "abbaabba"


def test_ratios_are_of_pairs_and_spread_by_quartiles(setup: Setup) -> None:
    watch = Stopwatch()
    result = run(case(ours=watch.side("a", 9, 1, 1, 2, 2, 4), theirs=watch.side("b", 9, 3, 2, 8, 2, 4)), setup, watch, 5)
    assert result.ours == [1, 1, 2, 2, 4] and result.theirs == [3, 2, 8, 2, 4]
    assert result.ratios == [3, 2, 4, 1, 1]
    told = result.to_dict()
    assert (told["ratio"]["median"], told["ratio"]["low"], told["ratio"]["high"]) == (2, 1, 3)
    assert told["ratio"]["interval"] == [1, 4] and told["ratio"]["coverage"] == 1 - 2 / 2**5


def test_short_work_is_repeated(tmp_path: Path) -> None:
    watch = Stopwatch()
    result = run(case(ours=watch.side("a", 0.03), theirs=watch.side("b", 0.2)), Setup(folder=tmp_path), watch, 2)
    assert result.repeats == [4, 1]
    assert result.ours == pytest.approx([0.03, 0.03])


def test_results_that_differ_fail_and_are_not_timed(setup: Setup) -> None:
    watch = Stopwatch()
    for error in (2e-6, math.nan):
        result = run(case(ours=watch.side("a", 1), theirs=watch.side("b", 1), check=lambda error=error: error), setup, watch, 3)
        assert result.status == "failed" and "difference" in result.reason and watch.order == ""
        json.dumps(result.to_dict(), allow_nan=False)


def test_ours_alone_and_against_a_published_rate(setup: Setup) -> None:
    watch = Stopwatch()
    alone = run(case(ours=watch.side("a", 1), theirs=watch.side("b", 2)), setup, watch, 2, alone=True)
    assert alone.theirs == [] and alone.ratios == [] and "ratio" not in alone.to_dict() and "b" not in watch.order
    record = run(case(ours=watch.side("a", 2), theirs=None, per_call=64, published=16.0), setup, watch, 2)
    assert record.ratios == [2.0, 2.0]


def test_calls_may_measure_themselves(setup: Setup) -> None:
    watch = Stopwatch()
    result = run(case(ours=lambda: 5, theirs=lambda: 10, returned="bytes"), setup, watch, 3)
    assert result.ours == [5, 5, 5] and result.ratios == [2, 2, 2] and result.clock == "returned bytes"


@pytest.mark.parametrize("n", [1, 2, 5, 6, 7, 9, 20, 101])
def test_the_sign_interval_is_the_narrowest_exact_one(n: int) -> None:
    values = [float(i) for i in range(n)]
    low, high, covered = sign_interval(values)
    below = round(low)
    assert high == n - 1 - below
    assert covered == pytest.approx(1 - 2 * sum(math.comb(n, k) for k in range(below + 1)) / 2**n, abs=1e-12)
    assert covered >= 0.95 or below == 0
    if below + 1 <= (n - 1) // 2:
        assert 1 - 2 * sum(math.comb(n, k) for k in range(below + 2)) / 2**n < 0.95


def test_the_spread_of_one_value_is_the_value() -> None:
    assert Spread.of([3.0]) == Spread(3.0, 3.0, 3.0)


def made_up(cases: Callable[[Setup], Iterator[Case]], monkeypatch: pytest.MonkeyPatch, **fields: Any) -> Row:
    monkeypatch.setattr(Row, "cases", lambda self, setup: cases(setup))
    usual: dict[str, Any] = {
        "id": "X1",
        "title": "made up",
        "peer": "nobody",
        "goal": "",
        "where": "cpu",
        "seconds": 1,
        "prepare": "",
        "needs": (),
    }
    return Row(**(usual | fields))


def test_the_record_and_the_exit_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def cases(setup: Setup) -> Iterator[Case]:
        yield case(name="good", ours=lambda: sum(range(1000)), theirs=lambda: sum(range(2000)), notes={"width": 3})
        yield case(name="bad", check=lambda: 1.0)

    row = made_up(cases, monkeypatch)
    monkeypatch.setattr(bench, "ROWS", (row, made_up(cases, monkeypatch, id="X2", where="cuda")))
    file = tmp_path / "record.json"
    words = ["--json", str(file), "--rounds", "3", "--device", "cpu"]
    monkeypatch.setattr("ldm.cli.benchmarks.machine.peak", lambda setup: {"matmul_fp32": 1.0})
    assert bench.main(words) == 1
    told = json.loads(file.read_text())
    assert told["machine"]["threads"] == 1 and told["machine"]["packages"]["torch"] and "commit" in told["machine"]
    assert told["machine"]["cores"] and told["machine"]["processor"] and told["peak_gflops"] == {"matmul_fp32": 1.0}
    first, second = told["rows"]
    assert first["status"] == "failed" and [c["status"] for c in first["cases"]] == ["passed", "failed"]
    good = first["cases"][0]
    assert len(good["ours"]) == len(good["theirs"]) == 3 and good["error"] == 0 and good["notes"]["width"] == 3
    assert {"median", "low", "high", "interval", "coverage"} == set(good["ratio"]) and good["clock"] == "CPU time, one thread"
    assert second["status"] == "skipped" and second["reason"] == "needs a CUDA GPU"
    said = capsys.readouterr().out
    assert "skipped: needs a CUDA GPU" in said and "FAILED: difference: 1.00e+00" in said and "peak GFLOP/s: matmul fp32 1" in said


def test_a_row_that_breaks_is_told_and_the_next_one_runs(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    def cases(setup: Setup) -> Iterator[Case]:
        yield case()
        raise ValueError("no such thing")

    monkeypatch.setattr("ldm.cli.benchmarks.machine.peak", lambda setup: {})
    before = dict(os.environ)
    told = bench.run([made_up(cases, monkeypatch)] * 2, setup, 1)
    assert dict(os.environ) == before, "a later verb of this process may have the accelerator"
    assert [row["reason"] for row in told["rows"]] == ["ValueError: no such thing"] * 2
    assert len(told["rows"][0]["cases"]) == 1 and told["rows"][0]["status"] == "failed"


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    found = table.importlib.util.find_spec
    monkeypatch.setattr(table.importlib.util, "find_spec", lambda name: None if name == "datasets" else found(name))
    said = {row.id: row.why_not("cpu", "small") for row in ROWS}
    assert said["B15"] == "needs datasets, which is not installed" and said["B14"] == ""


def test_one_word_is_the_first_hour_on_a_gpu() -> None:
    chosen = bench.choose(["gpu"])
    assert [row.id for row in chosen] == list(bench.GPU) and all(row.where == "cuda" and not row.missing for row in chosen)
    assert [row.id for row in bench.choose(["b1", "GPU", "B5"])] == ["B1", *bench.GPU]
    assert sum(row.seconds * (3 + 1.5) for row in chosen) < 600, "three rounds, in ten minutes"


def test_a_list_costs_no_torch_and_names_every_row() -> None:
    code = "import sys; from ldm.__main__ import main; main(['bench', '--list']); print('torch' in sys.modules)"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.splitlines()
    assert said[-1] == "False"
    assert [text.split()[0] for text in said[: len(ROWS)]] == [f"B{i}" for i in range(1, 27)]
    assert all(("skipped" in text) == ("[" in text) for text in said[: len(ROWS)])


@pytest.mark.parametrize(
    "words, told",
    [
        (["B41"], "B41: no such row; did you mean"),
        (["xyz"], "ldm bench --list shows them"),
        (["--size", "big"], "choose one of small, tiny"),
        (["--against", "me"], "diffusers, none"),
        (["--device", "tpu"], "cuda, cpu"),
        (["--json", "/nowhere/x.json"], "is not a folder"),
        (["--rounds", "0"], "--rounds"),
        (["--threads", "0"], "--threads"),
    ],
)
def test_mistakes_are_one_line(words: list[str], told: str) -> None:
    with pytest.raises(UserError, match=told):
        bench.main(words)


def test_more_threads_mean_wall_time(tmp_path: Path) -> None:
    result = compare(case(), Setup(size="tiny", threads=2, folder=tmp_path), 1)
    assert result.clock == "wall time, 2 threads"


def parameters() -> Iterator[Any]:
    for name in RUN:
        yield pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow])


@pytest.mark.parametrize("name", list(parameters()))
def test_every_row_runs_and_agrees(name: str, tmp_path: Path) -> None:
    file = tmp_path / "record.json"
    assert bench.main([name, "--size", "tiny", "--rounds", "1", "--device", "cpu", "--json", str(file)]) == 0
    (row,) = json.loads(file.read_text())["rows"]
    assert row["status"] == "passed" and row["cases"]
    for told in row["cases"]:
        assert told["error"] <= told["tolerance"] and told["ours"][0] > 0
        assert (told["kind"] == "record") == (told["theirs"] == [])


def test_ours_alone_needs_no_turn_of_the_peer(tmp_path: Path) -> None:
    file = tmp_path / "record.json"
    assert bench.main(["b14", "--against", "none", "--size", "tiny", "--rounds", "2", "--json", str(file)]) == 0
    (told,) = json.loads(file.read_text())["rows"][0]["cases"]
    assert len(told["ours"]) == 2 and told["theirs"] == [] and "ratio" not in told
