"""The bench verb: benchmarks of ldm and its peers side by side on this machine, with what the figures depend on."""

from __future__ import annotations

import difflib
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import typer

from ldm.cli.benchmarks.rows import ROWS, Row, Setup, Size
from ldm.cli.command import call
from ldm.config.errors import UserError
from ldm.distributed.environment import keep_blocks

Option = typer.Option
GPU = ("B5", "B6", "B9", "B10", "B20")  # rows of the first hour on a CUDA GPU


def main(words: Sequence[str]) -> int:
    """`ldm bench [ROW ...]`: the exit code, 1 when a row failed."""
    return call(bench, words, "ldm bench")


def bench(
    rows: Annotated[
        list[str] | None, typer.Argument(metavar="[ROW ...]", help="Rows such as B1 b14; gpu: B5 B6 B9 B10 B20; default: all.")
    ] = None,
    against: Annotated[str, Option(help="diffusers: each row's peer, in turn with ours; none: ours alone.")] = "diffusers",
    json_file: Annotated[Path | None, Option("--json", help="Also write everything to this file.")] = None,
    list_only: Annotated[bool, Option("--list", help="Say what would run here and about how long, and stop.")] = False,
    rounds: Annotated[int, Option(min=1, max=1000, help="Pairs of measurements per case.")] = 7,
    threads: Annotated[int, Option(min=1, max=1024, help="Of torch, on a CPU. More than one: wall time, for an idle machine.")] = 1,
    size: Annotated[str, Option(help="small: the sizes that the rows name; tiny: toy shapes, to see that it runs.")] = "small",
    device: Annotated[str, Option(help="cuda or cpu; default: the best there is.")] = "",
) -> int:
    """Measure ldm against its peers: same process, weights, seeds, dtype and threads, in turn; results must agree."""
    for name, value, allowed in (
        ("against", against, ("diffusers", "none")),
        ("size", size, ("small", "tiny")),
        ("device", device, ("", "cuda", "cpu")),
    ):
        if value not in allowed:
            raise UserError(f"--{name}: got {value!r}; choose one of {', '.join(word for word in allowed if word)}")
    if json_file is not None and not list_only and not json_file.absolute().parent.is_dir():
        raise UserError(f"--json: {json_file.parent} is not a folder; make it, or name another file")
    chosen = choose(rows or [])
    device = device or ("cuda" if _has_cuda(ask_torch=not list_only) else "cpu")
    print("\n".join(plan(chosen, device, cast(Size, size), rounds)), flush=True)
    if list_only:
        return 0
    keep_blocks()
    setup = Setup(device=device, size=cast(Size, size), threads=threads, folder=Path())
    record = run(chosen, setup, rounds, alone=against == "none")
    if json_file is not None:
        json_file.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        print(f"written: {json_file}")
    return 1 if any(row["status"] == "failed" for row in record["rows"]) else 0


def choose(words: Sequence[str]) -> list[Row]:
    """The rows of these names, of `gpu` those that need one, all where there are none.

    Raises:
        UserError: for a name that no row has.
    """
    known = {row.id: row for row in ROWS}
    words = [each for word in words for each in (GPU if word.lower() == "gpu" else (word,))]
    for word in words:
        if word.upper() not in known:
            near = difflib.get_close_matches(word.upper(), known, 1)
            hint = f"did you mean {near[0]}?" if near else ""
            raise UserError(f"{word}: no such row; {hint or 'ldm bench --list shows them'}")
    return [known[name] for name in dict.fromkeys(word.upper() for word in words)] or list(ROWS)


def plan(rows: Sequence[Row], device: str, size: Size, rounds: int) -> list[str]:
    """What would be run, about how long it takes, and why the rest is not."""
    said, total = [], 0.0
    for row in rows:
        reason = row.why_not(device, size)
        seconds = row.seconds * (rounds + 1.5)  # the check, the warm-up
        about = "skipped" if reason else "seconds" if size == "tiny" else _about(seconds)
        total += 0 if reason else seconds
        said.append(f"{row.id:<4} {about:<9} {row.title}; against {row.peer}" + (f" [{reason}]" if reason else ""))
    if size != "tiny":
        said.append(f"all of it: {_about(total)} on one core of a fast server, or on a GPU; {rounds} rounds")
    return said


def _about(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"


def _has_cuda(ask_torch: bool) -> bool:
    """Whether there is a CUDA GPU: what torch says, or for a mere list what the system shows."""
    if not ask_torch:
        return Path("/dev/nvidiactl").exists()
    import torch

    return torch.cuda.is_available()


def run(rows: Sequence[Row], setup: Setup, rounds: int, alone: bool = False) -> dict[str, Any]:
    """Measure and print row by row; the whole record."""
    told = {"HF_HUB_OFFLINE": "1"} | ({"ACCELERATE_USE_CPU": "true"} if setup.device == "cpu" else {})
    before = {name: os.environ.get(name) for name in told}
    os.environ.update(told)
    try:
        return _measured(rows, setup, rounds, alone)
    finally:  # or whatever runs later in this process would stay on the CPU
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _measured(rows: Sequence[Row], setup: Setup, rounds: int, alone: bool) -> dict[str, Any]:
    import torch

    from ldm.cli.benchmarks.machine import describe, peak

    if setup.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device: got cuda, but torch finds no CUDA GPU here; write --device cpu")
    torch.set_num_threads(setup.threads)
    record: dict[str, Any] = {"machine": describe(setup.device, setup.threads), "size": setup.size, "rounds": rounds}
    record["peak_gflops"] = peak(setup)
    machine = record["machine"]
    print(
        f"\n{machine['device']} ({machine['processor']}), {machine['threads']} of {machine['cores']} cores, load {machine['load']}, "
        f"commit {machine['commit'] or 'unknown'}\npeak GFLOP/s: "
        + ", ".join(f"{name.replace('_', ' ')} {value:g}" for name, value in record["peak_gflops"].items())
        + f"\n{'':<5}{'case':<44}{'ours':>12}{'theirs':>12}  ratio (quartiles) [interval]",
        flush=True,
    )
    record["rows"] = [_row(row, setup, rounds, alone) for row in rows]
    return record


def _row(row: Row, setup: Setup, rounds: int, alone: bool) -> dict[str, Any]:
    """One row, which never keeps the next one from running."""
    from ldm.cli.benchmarks.measure import compare

    made: dict[str, Any] = {"id": row.id, "title": row.title, "peer": row.peer, "goal": row.goal, "status": "passed", "cases": []}
    if reason := row.why_not(setup.device, setup.size):
        print(f"{row.id:<5}skipped: {reason}", flush=True)
        return made | {"status": "skipped", "reason": reason}
    where: Literal["cpu"] | str = "cpu" if row.where == "cpu" else setup.device
    with tempfile.TemporaryDirectory(prefix="ldm-bench-") as folder:
        try:
            for case in row.cases(replace(setup, device=where, folder=Path(folder))):
                result = compare(case, replace(setup, device=where), rounds, alone=alone)
                made["cases"].append(result.to_dict())
                print(line(row.id, made["cases"][-1]), flush=True)
        except Exception as error:  # of any library, on any machine: told, and the next row is measured
            reason = f"{type(error).__name__}: {error}"
            print(f"{row.id:<5}FAILED: {reason}", file=sys.stderr, flush=True)
            return made | {"status": "failed", "reason": reason}
    if any(case["status"] == "failed" for case in made["cases"]):
        made["status"] = "failed"
    return made


def line(row: str, case: dict[str, Any]) -> str:
    """One case for a reader."""
    if case["status"] == "failed":
        return f"{row:<5}{case['name']:<44}FAILED: {case['reason']}"
    sides = [_figure(case, case[side]) if case[side] else "-" for side in ("ours_spread", "theirs_spread")]
    said = f"{row:<5}{case['name']:<44}{sides[0]:>12}{sides[1]:>12}"
    if ratio := case.get("ratio"):
        low, high = ratio["interval"]
        said += f"  {ratio['median']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f}) [{low:.2f} to {high:.2f}, {ratio['coverage']:.0%}]"
    return f"{said}  {case['kind']}, {case['error_of']} {case['error']:.1e}"


def _figure(case: dict[str, Any], spread: dict[str, float]) -> str:
    """A median with its unit: bytes, seconds of slow calls, a rate of quick ones."""
    value = spread["median"]
    if case["clock"] == "returned bytes":
        return f"{value / 1e9:.2f} GB"
    if value / case["per_call"] > 0.2:
        return f"{value / case['per_call']:.2f} s"
    rate = case["per_call"] / max(value, 1e-12)
    return f"{rate:,.0f}/s" if rate >= 100 else f"{1000 * value / case['per_call']:.1f} ms"
