"""Curation of a table of links or pictures: filters, removal of duplicates, a split, and an account of every row that went."""

from __future__ import annotations

import glob
import json
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from ldm.config.counts import plural
from ldm.config.errors import UserError
from ldm.data import remote
from ldm.data.curation.rules import Curation, Rule, RuleError, literal, rules_of
from ldm.data.curation.store import SCHEME, store
from ldm.data.fields import ALIASES, column_of
from ldm.data.storage import expand, is_url, matching
from ldm.data.tables import damage, unfit

AUDIT = "audit.json"
_PART = 2**40  # rows of one file at most; a row's number is file * _PART + row


# The subsets of Stable Diffusion's recipe (model card of v1: 170 M examples of at least 1024x1024; original size at least 512x512,
# estimated aesthetics above 5.0, estimated watermark probability below 0.5).
SUBSETS = {
    "laion-high-resolution": Curation(min_side=1024),
    "improved-aesthetics": Curation(min_side=512, min_aesthetic=5.0, max_watermark=0.5),
}


@dataclass
class Audit:
    """Curation audit: rows read, removed by each rule, and kept."""

    files: list[str]
    columns: dict[str, str]  # our names for the columns that were found
    asked: dict[str, Any]
    rows: int = 0
    rules: list[dict[str, Any]] = field(default_factory=list)  # rule, removed, alone (would have been), unknown, examples
    kept: int = 0
    train: int = 0
    val: int = 0
    seconds: float = 0.0
    peak_mb: float = 0.0  # of this process


def curate(inputs: Sequence[str], out: Path, asked: Curation, *, examples: int = 5, memory_mb: int = 1024, threads: int = 2) -> Audit:
    """Write `out`/train.parquet (and val.parquet) with the rows that pass, all their columns as they were, and audit.json.

    Rows are judged in the order of the rules, and each counts for the first that removes it. Of equal rows the first one stays,
    in the order of files and rows. The result depends on the rows and on what is asked, not on threads or memory.

    Args:
        inputs: parquet files, folders of them, patterns, or URLs.
        memory_mb: what the database may use; it goes on on the disk.

    Raises:
        UserError: if duckdb is missing, a table is damaged or lacks a column that a rule asks for, or no row passes; then
            audit.json is written, and the tables of an earlier curation stay.
    """
    started = time.monotonic()
    files = files_of(inputs)
    if not (audit := judged(files, out, asked, examples=examples, memory_mb=memory_mb, threads=threads)).rows:
        raise UserError(f"{', '.join(files[:3])}: the table has no rows")
    return accounted(audit, out, started)


def accounted(audit: Audit, out: Path, started: float) -> Audit:
    """Write audit.json of a curation that began at a time of the monotonic clock.

    Raises:
        UserError: if no row was kept.
    """
    audit.seconds = round(time.monotonic() - started, 2)
    audit.peak_mb = round(_peak_mb(), 1)
    (out / AUDIT).write_text(json.dumps(asdict(audit), indent=1, ensure_ascii=False, default=str), encoding="utf-8")
    if audit.kept == 0:
        worst = sorted(audit.rules, key=lambda rule: -rule["removed"])[:3]
        counts = ((rule["removed"], rule["rule"], rule["unknown"] == audit.rows) for rule in worst if rule["removed"])
        said = ", ".join(f"{removed:,} by {name}" + " (unknown)" * unknown for removed, name, unknown in counts)
        raise UserError(
            f"none of {plural(audit.rows, 'row')} passes: {said}; relax these rules, {out / AUDIT} has examples of what they removed"
        )
    return audit


def judged(files: list[str], out: Path, asked: Curation, *, examples: int, memory_mb: int, threads: int) -> Audit:
    """Write the tables of the rows that pass, where some do; no audit.json."""
    out.mkdir(parents=True, exist_ok=True)
    with _database(out, memory_mb, threads, files) as database, _told(files):
        _check_patterns(database, asked)
        columns = _columns(database, files)
        rules = rules_of(asked, columns, _removal(database, asked.remove, columns))
        audit = Audit(files, columns, {k: v for k, v in asdict(asked).items() if v != asdict(Curation())[k]})
        database.execute(f"CREATE VIEW rows AS SELECT *, {_number(files)} AS ldm_row FROM {_read(files)}")
        for name in asked.unique + (("phash",) if asked.near >= 0 else ()):
            if name not in columns:
                raise UserError(f"a rule asks for {name}, but the table has no such column; it has {', '.join(_all(database))}")
        sql = {name: _typed(name, column) for name, column in columns.items()}
        judged = " ".join(f"WHEN {rule.removes} THEN {n}" for n, rule in enumerate(rules))
        verdict = f"CASE {judged} ELSE -1 END" if rules else "-1"
        database.execute(f"CREATE VIEW typed AS SELECT ldm_row, {', '.join(f'{v} AS {k}' for k, v in sql.items())} FROM rows")
        database.execute(f"CREATE VIEW judged AS SELECT *, {verdict} AS verdict FROM typed")
        _count(database, rules, audit, examples)
        _duplicates(database, asked, audit, examples)
        _write(database, out, asked, audit)
    return audit


def write_empty(files: list[str], target: Path) -> None:
    """A table without rows that has all columns of some tables, of the types that they have together."""
    with _database(target.parent, 256, 1, files) as database, _told(files):
        every = f"SELECT * EXCLUDE (ldm_file, file_row_number) FROM {_read(files)} LIMIT 0"
        database.execute(f"COPY ({every}) TO {literal(str(target))} (FORMAT parquet)")


def files_of(inputs: Sequence[str]) -> list[str]:
    """The tables that files, folders, patterns and URLs mean, in order."""
    found: list[str] = []
    for item in inputs:
        for name in expand(os.path.expanduser(item)):
            place = Path(name)
            if is_url(name):
                found += _below(name)
            elif place.is_dir():
                found += sorted(str(p) for p in place.rglob("*.parquet") if not p.name.startswith((".", "ldm-index")))
            elif place.is_file():
                found.append(name)
            else:
                matched = sorted(matching(name)) if glob.has_magic(name) else []
                if not matched:
                    raise UserError(f"{name}: no such file; give parquet files or a folder of them")
                found += matched
    if not found:
        raise UserError(f"{', '.join(inputs)}: no parquet files here; give parquet files or a folder of them")
    return list(dict.fromkeys(found))


def _below(url: str) -> list[str]:
    """A table in a store, those that a star means, or all below a folder.

    Raises:
        UserError: if the store refuses, or nothing is there.
    """
    if wrong := remote.lacking(url):
        raise wrong
    if url.endswith(".parquet") and not glob.has_magic(url):
        return [url]
    try:
        return sorted(remote.listed(url, ".parquet"))
    except OSError as error:
        raise UserError(f"{url}: cannot be listed ({error.strerror or error}); name the tables themselves") from None


@contextmanager
def _database(out: Path, memory_mb: int, threads: int, files: Sequence[str]) -> Iterator[Any]:
    try:
        import duckdb
    except ImportError:
        raise UserError("ldm data curate needs duckdb: python -m pip install duckdb") from None
    folder = Path(tempfile.mkdtemp(prefix=".curate-", dir=out))
    database = duckdb.connect(str(folder / "work.duckdb"))
    try:
        database.execute(f"SET memory_limit='{memory_mb}MB'; SET threads={threads}; SET temp_directory={literal(str(folder))}")
        database.execute("SET preserve_insertion_order=true; SET enable_progress_bar=false")
        if any(map(is_url, files)):
            database.register_filesystem(store())
        yield database
    finally:
        database.close()
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _told(files: list[str]) -> Iterator[None]:
    import duckdb

    try:
        yield
    except RuleError as error:
        raise UserError(str(error)) from None
    except duckdb.OutOfMemoryException:
        raise UserError(
            "the tables need more memory than the database may use, even with the disk's help; raise --memory-mb or lower --threads"
            " (a column of very long texts does this: keep the columns that are needed)"
        ) from None
    except duckdb.Error as error:
        if said := damage(files):
            raise UserError(f"{said}; write it again or leave it out") from None
        said = " ".join(str(error).split()).partition(" LINE 1:")[0].rpartition("Error: ")[2][:300]
        named = next((f"{f}: " for f in files if f in said), "")
        raise UserError(f"{named}the table cannot be used ({said})") from None


def _check_patterns(database: Any, asked: Curation) -> None:
    import duckdb

    for name, pattern in (("match", asked.match), ("reject", asked.reject)):
        try:
            database.execute(f"SELECT regexp_matches('', {literal(pattern)})").fetchone()
        except duckdb.Error as error:
            raise UserError(f"{name}: {pattern!r} is no regular expression of RE2 ({str(error).rpartition('Error: ')[2][:200]})") from None


def _read(files: list[str]) -> str:
    named = ", ".join(literal(_named(file) if is_url(file) else glob.escape(file)) for file in files)
    return f"read_parquet([{named}], union_by_name=true, filename='ldm_file', file_row_number=true)"


def _number(files: list[str]) -> str:
    names = ", ".join(literal(_named(file)) for file in files)
    return f"(list_position([{names}], ldm_file) - 1) * {_PART} + file_row_number"


def _named(file: str) -> str:
    """A file as the database opens it and calls it: a URL by requests of our own."""
    return f"{SCHEME}{file}" if is_url(file) else file


def _all(database: Any) -> list[str]:
    return [row[0] for row in database.execute("DESCRIBE rows").fetchall() if row[0] not in ("ldm_row", "ldm_file", "file_row_number")]


def _columns(database: Any, files: list[str]) -> dict[str, str]:
    found = _types(database, files)
    named = {name: column_of(name, found) for name in ALIASES}
    columns = {name: column for name, column in named.items() if column is not None}
    if wrong := unfit(found, columns, _NUMBERS):
        column, wanted = wrong
        alone = ((file, _types(database, [file])) for file in files)
        file, kind = next(((f, kinds[column]) for f, kinds in alone if unfit(kinds, columns, _NUMBERS)), (files[0], found[column]))
        raise UserError(f"{file}: column {column} holds {kind}, not {wanted}; convert it, rename it or leave the file out")
    return columns


def _types(database: Any, files: list[str]) -> dict[str, str]:
    return {row[0]: row[1] for row in database.execute(f"DESCRIBE SELECT * FROM {_read(files)}").fetchall()}


_NUMBERS = ("width", "height", "similarity", "unsafe", "watermark", "aesthetic")


def _typed(name: str, column: str) -> str:
    """SQL of a column as what it means, whatever its type; what cannot be read is unknown."""
    quoted = '"' + column.replace('"', '""') + '"'
    if name in _NUMBERS:
        number = f"TRY_CAST({quoted} AS DOUBLE)"
        return f"CASE WHEN isfinite({number}) THEN {number} END"
    if name == "phash":
        text = f"CAST({quoted} AS VARCHAR)"
        return f"COALESCE(TRY_CAST(CASE WHEN length({text}) = 16 THEN '0x' || {text} END AS UBIGINT), TRY_CAST({text} AS UBIGINT))"
    return f"TRY_CAST({quoted} AS VARCHAR)"


def _removal(database: Any, lists: Sequence[Path], columns: dict[str, str]) -> list[str]:
    """Tables of values to be removed, one per column that a list names; a plain text file may hold links, hashes or keys."""
    wanted = {name: columns[name] for name in ("url", "hash", "sha256", "key") if name in columns}
    if lists and not wanted:
        raise UserError("removal lists need a column url, hash, sha256 or key in the table")
    for name in wanted if lists else ():
        database.execute(f"CREATE TABLE removed_{name} (value VARCHAR)")
    for path in lists:
        if not path.is_file():
            raise UserError(f"{path}: no such removal list")
        if path.suffix not in (".parquet", ".csv"):
            lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
            values = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
            for name in wanted:
                _insert(database, name, values)
            continue
        quoted = literal(glob.escape(str(path)))
        reader = f"read_parquet({quoted})" if path.suffix == ".parquet" else f"read_csv({quoted}, all_varchar=true)"
        there = [row[0] for row in database.execute(f"DESCRIBE SELECT * FROM {reader}").fetchall()]
        known = {name: column_of(name, there) for name in wanted}
        if not any(known.values()):
            raise UserError(f"{path}: none of its columns ({', '.join(there)}) is among {', '.join(wanted)}")
        for name, column in known.items():
            if column is not None:
                database.execute(f"INSERT INTO removed_{name} SELECT {_typed(name, column)} FROM {reader}")
    return list(wanted) if lists else []


def _insert(database: Any, name: str, values: list[str]) -> None:
    import pyarrow as pa

    database.register("values_given", pa.table({"value": pa.array(values, pa.string())}))
    database.execute(f"INSERT INTO removed_{name} SELECT value FROM values_given")
    database.unregister("values_given")


def _count(database: Any, rules: list[Rule], audit: Audit, examples: int) -> None:
    sums = "".join(f", count_if({rule.removes}), count_if({rule.unknown})" for rule in rules)
    audit.rows, *counts = database.execute(f"SELECT count(*){sums} FROM judged").fetchone()
    chosen = f"min(ldm_row, {examples})" if examples else "[]"
    groups = database.execute(f"SELECT verdict, count(*), {chosen} FROM judged GROUP BY verdict").fetchall()
    removed = {verdict: (count, ids) for verdict, count, ids in groups}
    for n, rule in enumerate(rules):
        count, ids = removed.get(n, (0, []))
        alone, unknown = counts[2 * n : 2 * n + 2]
        shown = _rows(database, ids)
        audit.rules.append({"rule": rule.name, "removed": count, "alone": alone, "unknown": unknown, "examples": shown})


def _rows(database: Any, ids: Sequence[int]) -> list[dict[str, Any]]:
    """Some rows as plain values, by what we know of them."""
    if not ids:
        return []
    chosen = ", ".join(map(str, ids))
    found = database.execute(f"SELECT * EXCLUDE (ldm_row) FROM typed WHERE ldm_row IN ({chosen}) ORDER BY ldm_row")
    names = [entry[0] for entry in found.description]
    rows = ({k: v for k, v in zip(names, row, strict=True) if v is not None} for row in found.fetchall())
    return [{k: (v[:200] if isinstance(v, str) else v) for k, v in row.items()} for row in rows]


def _duplicates(database: Any, asked: Curation, audit: Audit, examples: int) -> None:
    """The table `gone` of rows that repeat an earlier one."""
    database.execute("CREATE TABLE gone (ldm_row BIGINT)")
    kept = "SELECT ldm_row{} FROM judged WHERE verdict = -1 AND ldm_row NOT IN (SELECT ldm_row FROM gone)"
    for name in asked.unique:
        value = "lower(trim(caption))" if name == "caption" else name
        # 128 bits stand for the value: texts need not be kept, and two that differ are not taken for equal.
        database.execute(
            f"CREATE OR REPLACE TEMP TABLE keyed AS SELECT ldm_row, md5_number(CAST({value} AS VARCHAR)) AS k FROM judged "
            f"WHERE verdict = -1 AND {value} IS NOT NULL AND ldm_row NOT IN (SELECT ldm_row FROM gone)"
        )
        database.execute("CREATE OR REPLACE TEMP TABLE firsts AS SELECT k, min(ldm_row) AS first FROM keyed GROUP BY k HAVING count(*) > 1")
        database.execute("CREATE OR REPLACE TEMP TABLE found AS SELECT ldm_row FROM keyed JOIN firsts USING (k) WHERE ldm_row <> first")
        _gone(database, f"same {name}", audit, examples)
    if asked.near >= 0:
        rows = database.execute(kept.format(", phash") + " AND phash IS NOT NULL ORDER BY ldm_row").fetchnumpy()
        import pyarrow as pa

        from ldm.data.curation.hashes import near_duplicates

        twice = rows["ldm_row"][near_duplicates(rows["phash"], asked.near)]
        database.register("near_rows", pa.table({"ldm_row": pa.array(twice, pa.int64())}))
        database.execute("CREATE OR REPLACE TEMP TABLE found AS SELECT ldm_row FROM near_rows")
        database.unregister("near_rows")
        _gone(database, f"near-duplicate (phash within {asked.near} bits)", audit, examples)
    for table in ("keyed", "firsts", "found"):
        database.execute(f"DROP TABLE IF EXISTS {table}")


def _gone(database: Any, rule: str, audit: Audit, examples: int) -> None:
    chosen = f"min(ldm_row, {examples})" if examples else "[]"
    count, ids = database.execute(f"SELECT count(*), {chosen} FROM found").fetchone()
    database.execute("INSERT INTO gone SELECT ldm_row FROM found")
    audit.rules.append({"rule": rule, "removed": count, "alone": None, "unknown": 0, "examples": _rows(database, ids or [])})


def _write(database: Any, out: Path, asked: Curation, audit: Audit) -> None:
    passed = "verdict = -1 AND ldm_row NOT IN (SELECT ldm_row FROM gone)"
    link = next((name for name in ("url", "key", "sha256", "hash") if name in audit.columns), None)
    identity = f"COALESCE({link}, CAST(ldm_row AS VARCHAR))" if link else "CAST(ldm_row AS VARCHAR)"
    # md5, as the database's own hash may change from version to version.
    place = f"CAST(md5_number_lower('{asked.seed}/' || {identity}) AS DOUBLE) / 18446744073709551616.0"
    database.execute(f"CREATE TEMP TABLE passed AS SELECT ldm_row, {place} < {asked.val_share} AS val FROM judged WHERE {passed}")
    audit.val, audit.kept = database.execute("SELECT COALESCE(count_if(val), 0), count(*) FROM passed").fetchone()
    audit.train = audit.kept - audit.val
    if not audit.kept:
        return
    for name, which in (("train", "NOT val"), ("val", "val")):
        target, temporary = out / f"{name}.parquet", out / f".{name}.parquet.partial"
        if name == "val" and asked.val_share == 0:
            target.unlink(missing_ok=True)
            continue
        database.execute(
            # Sorted, as a join keeps no order when it runs on several threads.
            f"COPY (SELECT rows.* EXCLUDE (ldm_row, ldm_file, file_row_number) FROM rows SEMI JOIN "
            f"(SELECT ldm_row FROM passed WHERE {which}) AS chosen ON rows.ldm_row = chosen.ldm_row ORDER BY rows.ldm_row) "
            f"TO {literal(str(temporary))} (FORMAT parquet, COMPRESSION zstd)"
        )
        temporary.replace(target)


def _peak_mb() -> float:
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


def lines(audit: Audit) -> list[str]:
    """The audit for a terminal."""
    named = ", ".join(f"{k} ({v})" if k != v else k for k, v in audit.columns.items())
    said = [f"{plural(audit.rows, 'row')} in {plural(len(audit.files), 'file')}; columns: {named or 'none that is known'}"]
    for rule in audit.rules:
        alone = f", {rule['alone']:,} alone" if rule["alone"] is not None else ""
        unknown = f", {rule['unknown']:,} of them unknown" if rule["unknown"] else ""
        said.append(f"  {rule['removed']:>12,}  {rule['rule']}{alone}{unknown}")
        if rule["examples"]:
            shown = rule["examples"][0]
            said.append(" " * 16 + "; ".join(f"{k} {re.sub(r'[^ -~]', '?', str(v))[:70]}" for k, v in shown.items())[:200])
    said.append(f"  {audit.kept:>12,}  kept ({audit.kept / audit.rows:.1%}): {audit.train:,} train, {audit.val:,} val")
    said.append(f"{audit.seconds:.1f} s, at most {audit.peak_mb:,.0f} MB")
    return said


def with_subset(name: str, asked: Curation) -> Curation:
    """What is asked, over what a named subset asks.

    Raises:
        UserError: for a name that is none.
    """
    if name not in SUBSETS:
        raise UserError(f"--subset: got {name!r}; there are {', '.join(SUBSETS)}")
    default = Curation()
    return replace(SUBSETS[name], **{k: v for k, v in vars(asked).items() if v != getattr(default, k)})
