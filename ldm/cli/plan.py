"""The plan verb: dry run of a configuration with cost estimate, at any number of processes and samples."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ldm.cli.command import call
from ldm.cli.progress import PLANNING, working
from ldm.cli.train import validated
from ldm.config.errors import UserError
from ldm.config.stand_ins import told
from ldm.config.terminal import shown

if TYPE_CHECKING:
    from ldm.runs.plan import RunPlan
    from ldm.runs.simulation import Simulated

Option = typer.Option
IMPORTS_S = 15.0  # of a start, until networks are made
SHARD_IMAGES = 10_000  # of a tar shard, as img2dataset makes them


def main(words: Sequence[str]) -> int:
    """`ldm plan CONFIG [key=value ...]`: the exit code."""
    return call(plan, words, "ldm plan")


def plan(
    config: Annotated[Path, typer.Argument(help="A YAML file, or the config.yaml of a run folder.")],
    words: Annotated[list[str] | None, typer.Argument(metavar="[key=value ...]", help="Fields that are otherwise.")] = None,
    processes: Annotated[int | None, Option(min=1, help="How many share the work; default: as many as this launch has.")] = None,
    device: Annotated[str, Option(help="A graphics card that this machine need not have, such as h200, a100-40gb, 4090.")] = "",
    nodes: Annotated[int | None, Option(min=1, help="With --device, in place of --processes: machines of --gpus cards.")] = None,
    gpus: Annotated[int | None, Option(min=1, help="With --nodes: cards of each machine; default: 8.")] = None,
    samples: Annotated[str, Option(help="How many samples the data would have, such as 2e9; default: as many as it has.")] = "",
    tflops: Annotated[float, Option(min=0, help="What a process does, 10^12 operations a second; default: assumed.")] = 0.0,
    peak: Annotated[float, Option(min=0, help="In place of --tflops and --device: the most a device does; 989 for an H100 in bf16.")] = 0.0,
    mfu: Annotated[float | None, Option(min=0.01, max=1, help="The share of --peak or --device that is reached; default: 0.35.")] = None,
    price: Annotated[float, Option(min=0, help="Of a device for an hour, in any money.")] = 0.0,
    disk: Annotated[float, Option(min=0.001, help="What storage writes and reads, GB a second.")] = 1.0,
    extend: Annotated[bool, Option("--extend", help="As train's: go on from the state of stages with other settings.")] = False,
    as_json: Annotated[bool, Option("--json", help="Print one JSON object.")] = False,
) -> int:
    """Say what a run would do, why, and what it would cost; try its order of samples out. Nothing is trained or written."""
    from ldm.config.schema import build, configuration, read, said_twice

    for line in said_twice(words or []):
        print(f"note: {shown(line)}", file=sys.stderr)
    count = _count(samples)
    if tflops and peak:
        raise UserError("tflops: not together with --peak, which gives the same by --mfu")
    if device and (tflops or peak):
        raise UserError("device: says how fast it is; leave --tflops and --peak out, or --device")
    if mfu is not None and not peak and not device:
        raise UserError("mfu: is a share of --peak or --device, and changes nothing without; give one of them, too")
    if nodes and (processes or not device):
        raise UserError("nodes: machines of a --device, in place of --processes; " + ("leave one out" if processes else "give --device"))
    if gpus and not nodes:
        raise UserError("gpus: cards of each of --nodes; give --nodes, too, or --processes")
    config = configuration(config)
    values = read(config, words or [])
    told(partial(validated, values, config))
    with working(PLANNING):
        from ldm.runs.plan import as_json as plain
        from ldm.runs.plan import make, show
        from ldm.runs.run import Run, place
        from ldm.runs.simulation import simulate
        from ldm.training.throughput import card

        run, out = place(build(values, Run, str(config)), config)
        share = 0.35 if mfu is None else mfu
        chosen = card(device) if device else None
        work = processes or (nodes or 0) * (gpus or 8)
        found = make(run, out, processes=work, tflops=tflops or peak * share, samples=count, extend=extend, card=chosen, mfu=share)
        trained = [stage for stage in found.stages if stage.kind == "train"]
        tried: dict[tuple[int, int], Simulated] = {}
        for stage in trained:
            if stage.samples and not stage.buckets:
                tried.setdefault((stage.samples, stage.batch), simulate(stage.samples, stage.batch, found.processes, run.seed))
    costs = list(_costs(found, disk, price))
    if as_json:
        extra = {"order": [asdict(each) | {"right": each.right} for each in tried.values()], "costs": costs}
        print(json.dumps({**json.loads(plain(found)), **extra}, indent=2))
    else:
        print(show(found))
        for one in costs:
            print(_cost_line(one))
        for each in tried.values():
            print("\n".join(each.lines()))
    return 0 if all(each.right for each in tried.values()) else 1


def _count(text: str) -> int:
    """A number of samples.

    Raises:
        UserError: for anything else.
    """
    if not text:
        return 0
    try:
        number = float(text.replace("_", ""))
    except ValueError:
        number = 0.0
    if not 1 <= number <= 2**50 or number != int(number):
        raise UserError(f"samples: got {text!r}; a whole number of samples such as 2e9 is needed")
    return int(number)


def _costs(found: RunPlan, disk: float, price: float) -> Iterator[dict[str, Any]]:
    """Of each stage that would run: device hours, their price, checkpoints and restarts, shards."""
    for stage in found.stages:
        if stage.skip or stage.kind not in ("train", "encode"):
            continue
        hours = stage.seconds * found.processes / 3600
        save = stage.checkpoint_bytes / (disk * 1e9)
        yield {
            "stage": stage.name,
            "device_hours": hours,
            "price": hours * price,
            "checkpoint_bytes": stage.checkpoint_bytes,
            "save_seconds": save,
            "restart_seconds": IMPORTS_S + save if stage.kind == "train" else IMPORTS_S,
            "data_shards": -(-stage.samples // SHARD_IMAGES),
            "cache_bytes": stage.cache_bytes,
        }


def _cost_line(one: dict[str, Any]) -> str:
    from ldm.runs.plan import size_of

    price = f", {one['price']:,.0f} at the price given" if one["price"] else ""
    said = f"{one['stage']}: {one['device_hours']:,.1f} device hours{price}"
    if one["checkpoint_bytes"]:
        said += f"; a checkpoint of {size_of(one['checkpoint_bytes'])} takes {one['save_seconds']:,.1f} s to write"
        said += f", a restart about {one['restart_seconds']:,.0f} s"
    return said + (f"; {one['data_shards']:,} tar shards of {SHARD_IMAGES:,}" if one["data_shards"] else "")
