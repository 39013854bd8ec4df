"""Curation spread over machines: the same rules, table by table, on Ray's workers; duplicates and the split in one place."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from ldm.config.errors import UserError, first_line
from ldm.data.curation.curate import Audit, accounted, files_of, judged, write_empty
from ldm.data.curation.rules import Curation

LINKS = ("url", "key", "sha256", "hash")  # what a row may be known by, wherever it lies
Sift = Callable[[int, str], Audit]


def curate_spread(
    inputs: Sequence[str],
    out: Path,
    asked: Curation,
    workers: Callable[[Sift, list[str]], list[Audit]],
    *,
    examples: int = 5,
    memory_mb: int = 1024,
    threads: int = 2,
) -> Audit:
    """As `curate`, with the same tables and the same account; rules that judge a row by itself are applied to each table apart.

    Args:
        workers: calls a function for each table's number and name, anywhere, and gives what it returns in their order. The folder
            `out` is the same one there.
        memory_mb: what the database may use, of each call and of what follows.

    Raises:
        UserError: as `curate`; also where the split would go by a row's place, which no single table knows.
    """
    started = time.monotonic()
    files = files_of(inputs)
    out.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=".curate-", dir=out.resolve()))
    try:
        empty = folder / "columns.parquet"
        write_empty(files, empty)
        alone = replace(asked, unique=(), near=-1, val_share=0.0)
        common = {"examples": examples, "memory_mb": memory_mb, "threads": threads}
        parts = workers(partial(sift, str(empty), folder, alone, common), files)
        written = [str(folder / f"{number}" / "train.parquet") for number, part in enumerate(parts) if part.kept]
        if unseen := [path for path in written if not Path(path).is_file()]:
            raise UserError(f"{unseen[0]}: a worker wrote it, but it is not here; --out must be a folder that all machines share")
        if asked.val_share and not set(LINKS) & set(parts[0].columns):
            raise UserError(f"--val-share: on several workers rows are told apart by a column {', '.join(LINKS)}; the table has none")
        rest = Curation(unique=asked.unique, near=asked.near, val_share=asked.val_share, seed=asked.seed)
        last = judged([str(empty), *written], out, rest, **common)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    whole = replace(last, files=files, asked=parts[0].asked | last.asked, rows=sum(part.rows for part in parts))
    whole.rules = [_together([part.rules[n] for part in parts], examples) for n in range(len(parts[0].rules))] + last.rules
    if not whole.rows:
        raise UserError(f"{', '.join(files[:3])}: the table has no rows")
    return accounted(whole, out, started)


def sift(empty: str, folder: Path, asked: Curation, common: dict[str, int], number: int, file: str) -> Audit:
    """What passes of one table, beside a table that has all columns of all."""
    return judged([empty, file], folder / f"{number}", asked, **common)


def _together(rules: list[dict[str, Any]], examples: int) -> dict[str, Any]:
    """One rule's account of all tables."""
    counts = {name: sum(rule[name] for rule in rules) for name in ("removed", "alone", "unknown")}
    return {"rule": rules[0]["rule"], **counts, "examples": [one for rule in rules for one in rule["examples"]][:examples]}


def on_ray(address: str, threads: int) -> Callable[[Sift, list[str]], list[Audit]]:
    """Ray's workers: of a cluster at that address, `auto` for the one that this machine belongs to, or `local` for processes here.

    Raises:
        UserError: if ray is not installed, or no cluster is there.
    """
    try:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        import ray
    except ImportError:
        raise UserError('--ray needs ray: python -m pip install "ray>=2.40"') from None

    def run(task: Sift, files: list[str]) -> list[Audit]:
        if not ray.is_initialized():
            try:
                ray.init(address=address, log_to_driver=False, include_dashboard=False if address == "local" else None)
            except (ConnectionError, ValueError) as error:
                raise UserError(f"--ray {address}: no cluster is there ({first_line(error, 160)})") from None

        @ray.remote(num_cpus=threads)
        def judge(number: int, file: str) -> Audit:
            return task(number, file)

        try:
            return list(ray.get([judge.remote(number, file) for number, file in enumerate(files)]))
        except ray.exceptions.RayTaskError as error:
            raise (error.cause if isinstance(error.cause, UserError) else error) from None

    return run
