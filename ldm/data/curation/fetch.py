"""Download of a URL table's pictures by img2dataset, run in an environment of its own, and a check of its shards."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ldm.config.counts import plural
from ldm.config.errors import UserError, first_line
from ldm.config.options import option

NAMES = {  # columns by what they hold, as LAION's tables call them in letters of any case; the first that is there counts
    "url": ("url", "image_url", "link"),
    "caption": ("caption", "text", "top_caption"),
}
KEPT = ("aesthetic", "aesthetic_score", "aesthetics_score", "pwatermark", "punsafe", "similarity", "phash", "language")
HASHES = ("sha256", "md5")  # of the pictures' files, where the table tells them
MISSING = (
    "fetch: img2dataset is not here. It needs libraries of other versions than ldm, so give it an environment of its own:"
    " python -m venv fetch && fetch/bin/pip install img2dataset, and name it by --img2dataset fetch/bin/img2dataset"
)


GUARD_S = 60.0  # until the program's guard stands
NO_GUARD = (
    "fetch: {} takes no guard against links that lead into this machine and its network (it is no Python program that heeds PYTHONPATH);"
    " install img2dataset into an environment of its own and name that"
)


@dataclass(frozen=True)
class Columns:
    """Columns of a URL table."""

    url: str
    caption: str | None
    kept: tuple[str, ...]  # that go along to the pictures
    hash: str | None


@dataclass(frozen=True)
class DownloadOptions:
    """Downloading: how img2dataset is to fetch, under its own names where they differ."""

    size: int = option(512, "px; larger pictures are made so large on the shorter side.", low=16)
    processes: int = option(1, "Of the program.", low=1)
    threads: int = option(32, "Downloads at a time in each.", low=1)
    shard: int = option(10_000, "Links of a shard.", low=1)
    timeout: int = option(10, "Seconds for a link.", low=1)
    retries: int = option(1, "More tries for a link.", low=0)
    seconds: int = option(60, "Seconds for a link in all, redirects and slow answers included.", low=1)
    max_mb: int = option(64, "MiB of an answer; a longer one is refused.", low=1)
    allow_private: bool = option(False, "Also fetch from this machine and its own network; else links that lead there are refused.")
    distributor: str = option("multiprocessing", "multiprocessing, or on a cluster pyspark or ray (with --allow-private).")


@dataclass
class DownloadReport:
    """Download report: pictures, failed links by reason, damaged shards."""

    folder: str
    links: int = 0
    pictures: int = 0
    shards: int = 0
    reasons: dict[str, int] = field(default_factory=dict)  # why links gave no picture, by their number
    failed: str = ""  # the table of these links; empty: none
    wrong: list[str] = field(default_factory=list)  # shards that do not hold what they promise

    def lines(self) -> list[str]:
        """For a terminal."""
        said = [f"{plural(self.pictures, 'picture')} of {plural(self.links, 'link')} in {plural(self.shards, 'shard')}: {self.folder}"]
        said += [f"  {count:>9,}  {reason}" for reason, count in self.reasons.items()]
        if self.failed:
            said.append(f"  the links that gave none: {self.failed}")
        return said + [f"  damaged: {line}" for line in self.wrong]


def columns_of(table: Path) -> Columns:
    """What a table of links calls its columns.

    Raises:
        UserError: if it is no parquet file, or has no links.
    """
    import pyarrow.parquet as parquet

    file = next(iter(sorted(table.glob("*.parquet"))), None) if table.is_dir() else table
    if file is None or not file.is_file():
        raise UserError(f"fetch: {table}: no such table; give a parquet file or a folder of them, as ldm data curate writes")
    try:
        there = parquet.read_schema(file).names
    except Exception as error:  # pyarrow raises many kinds on what is no parquet
        raise UserError(f"fetch: {file}: no parquet table ({first_line(error, 100)})") from None
    small = {name.lower(): name for name in reversed(there)}
    url, caption = (next((small[name] for name in names if name in small), None) for names in NAMES.values())
    if url is None:
        raise UserError(f"fetch: {file}: no column of links ({', '.join(NAMES['url'])}); it has {', '.join(there)}")
    return Columns(url, caption, tuple(small[n] for n in KEPT if n in small), next((n for n in HASHES if n in there), None))


def command_of(given: str) -> str:
    """The program that fetches.

    Raises:
        UserError: saying how to install it, if it is not there.
    """
    found = shutil.which(given or "img2dataset")
    if found is None:
        raise UserError(MISSING if not given else f"fetch: {given}: no such program. {MISSING.removeprefix('fetch: ')}")
    return found


def words_of(table: Path, out: Path, columns: Columns, options: DownloadOptions) -> list[str]:
    """Command line options of img2dataset: shards of pictures no larger than asked, what has been fetched left alone."""
    said: dict[str, Any] = {
        "url_list": table,
        "input_format": "parquet",
        "url_col": columns.url,
        "output_format": "webdataset",
        "output_folder": out,
        "resize_mode": "keep_ratio",
        "resize_only_if_bigger": True,
        "incremental_mode": "incremental",
        "enable_wandb": False,
        "compute_hash": columns.hash or "sha256",
        "image_size": options.size,
        "processes_count": options.processes,
        "thread_count": options.threads,
        "number_sample_per_shard": options.shard,
        "timeout": options.timeout,
        "retries": options.retries,
        "distributor": options.distributor,
    }
    if columns.caption:
        said["caption_col"] = columns.caption
    if columns.kept:
        said["save_additional_columns"] = json.dumps(list(columns.kept))
    if columns.hash:
        said["verify_hash"] = json.dumps([columns.hash, columns.hash])
    return [word for name, value in said.items() for word in (f"--{name}", str(value))]


def guarded(options: DownloadOptions, mark: Path) -> dict[str, str]:
    """The environment in which the program fetches by http(s) from public addresses alone, in bounded time and size a link.

    Args:
        mark: a file that is written once the guard stands.
    """
    rules = {"private": options.allow_private, "seconds": options.seconds, "bytes": options.max_mb * 2**20, "mark": str(mark.absolute())}
    paths = [str(Path(__file__).parents[1] / "link_guard"), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "LDM_LINK_GUARD": json.dumps(rules)}


def run(command: Sequence[str], out: Path, options: DownloadOptions, tell: Callable[[str], None], every_s: float = 5.0) -> None:
    """Run the download, reporting progress from time to time.

    Raises:
        UserError: with its last words, if it fails, or if it takes no guard, which its workers on other machines do not have either.
    """
    if options.distributor != "multiprocessing" and not options.allow_private:
        raise UserError(
            f"--distributor {options.distributor}: links that lead into the machines' own network cannot be refused there;"
            " give --allow-private too, if the table is one that you trust"
        )
    log = out.parent / f"{out.name}.fetch.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    started, last = time.monotonic(), ""
    mark = out.parent / f".{out.name}.guard"
    mark.unlink(missing_ok=True)
    with (
        log.open("w", encoding="utf-8") as file,
        subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=guarded(options, mark)) as process,
    ):
        try:
            while not mark.exists() and process.poll() is None:
                if time.monotonic() - started > GUARD_S:
                    raise UserError(NO_GUARD.format(Path(command[0]).name))
                time.sleep(0.05)
            while process.poll() is None:
                try:
                    process.wait(every_s)
                except subprocess.TimeoutExpired:
                    done = stats(out)
                    said = f"{plural(sum(s['successes'] for s in done), 'picture')} in {plural(len(done), 'shard')}"
                    if said != last:
                        rate = sum(s["count"] for s in done) / max(1e-9, time.monotonic() - started)
                        tell(f"{said}, {rate:,.0f} links/s")
                        last = said
        except BaseException:
            process.terminate()
            raise
        finally:
            guarded_was = mark.exists()
            mark.unlink(missing_ok=True)
    if not guarded_was and not process.returncode:
        raise UserError(NO_GUARD.format(Path(command[0]).name))
    if process.returncode:
        words = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        last = words[-1] if words else "no word"
        raise UserError(f"fetch: {Path(command[0]).name} failed ({process.returncode}): {last}; all of it: {log}")


def stats(out: Path) -> list[dict[str, Any]]:
    """What the program says of its finished shards."""
    found = []
    for path in sorted(out.glob("*_stats.json")):
        try:
            values = json.loads(path.read_text())
            name = path.name.removesuffix("_stats.json")
            found.append({"name": name, "count": int(values["count"]), "successes": int(values["successes"])})
        except (OSError, ValueError, KeyError, TypeError):
            continue  # being written
    return found


def look(out: Path) -> DownloadReport:
    """Count what came, write the links that gave nothing to OUT.failed.parquet, and compare shards with what is said of them.

    Raises:
        UserError: if not one picture came.
    """
    import pyarrow as arrow
    import pyarrow.parquet as parquet

    from ldm.data.shard_index import open_index

    done = stats(out)
    found = DownloadReport(str(out), links=sum(s["count"] for s in done), pictures=sum(s["successes"] for s in done), shards=len(done))
    if not found.pictures:
        raise UserError(f"fetch: no picture came of {found.links:,} links; {_reasons_text(out)}")
    rows: list[dict[str, Any]] = []
    for shard in done:
        for row in parquet.read_table(out / f"{shard['name']}.parquet").to_pylist():
            if row.get("status") != "success":
                rows.append({"url": row.get("url"), "status": row.get("status"), "error": row.get("error_message")})
    found.reasons = dict(Counter(_reason(row) for row in rows).most_common(20))
    if rows:
        found.failed = str(out.parent / f"{out.name}.failed.parquet")
        parquet.write_table(arrow.Table.from_pylist(rows), found.failed)
    counted = {Path(record.name).stem: record for record in open_index(str(out), renew=True).shards}
    for shard in done:
        record = counted.get(shard["name"])
        if record is None:
            found.wrong.append(f"{shard['name']}.tar is missing")
        elif record.damage or record.samples + sum(record.rejected.values()) < shard["successes"]:
            found.wrong.append(
                f"{record.name}: {plural(record.samples, 'sample')} of {shard['successes']} that were told; remove it and fetch again"
            )
    return found


def _reason(row: dict[str, Any]) -> str:
    return str(row["error"] or row["status"] or "no reason told").splitlines()[0][:120]


def _reasons_text(out: Path) -> str:
    found: Counter[str] = Counter()
    for path in out.glob("*_stats.json"):
        try:
            found.update({str(k): int(v) for k, v in json.loads(path.read_text()).get("status_dict", {}).items()})
        except (OSError, ValueError):
            continue
    return ", ".join(f"{count} {reason}" for reason, count in found.most_common(4)) or "see its log"
