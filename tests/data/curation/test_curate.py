"""Curation agrees with a plain loop over the rows, whatever the table's variant; every row that goes is accounted for."""

from __future__ import annotations

import hashlib
import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ldm.__main__ import main
from ldm.config.errors import UserError
from ldm.data.curation.curate import AUDIT, SUBSETS, Audit, Curation, curate, lines, with_subset
from ldm.data.curation.hashes import near_duplicates
from ldm.data.curation.spread import curate_spread, on_ray

ROWS = 600


def raw(seed: int = 0, rows: int = ROWS) -> dict[str, list[object]]:
    """What the rows are, before any variant's names and types; None where a row does not tell."""
    rng = np.random.default_rng(seed)

    def number(low: float, high: float) -> list[object]:
        return [None if rng.random() < 0.05 else float(v) for v in rng.uniform(low, high, rows)]

    kinds, lengths = rng.integers(0, 2000, rows), rng.integers(0, 30, rows)
    pairs = zip(kinds.tolist(), lengths.tolist(), strict=True)
    words = [f"picture {k % 250} of a {'logo' if k % 7 == 0 else 'house'} {'x' * n}" for k, n in pairs]
    return {
        "url": [f"https://example.org/{i}.jpg" for i in rng.integers(0, 500, rows)],
        "text": words,
        "width": [int(v) for v in rng.integers(1, 2000, rows)],
        "height": [int(v) for v in rng.integers(1, 2000, rows)],
        "similarity": number(0, 0.5),
        "language": [("en", "de", None)[i % 3] for i in range(rows)],
        "unsafe": number(0, 1),
        "watermark": number(0, 1),
        "aesthetic": number(3, 8),
        "hash": [int(v) for v in rng.integers(0, 450, rows)],
        "phash": [int(v) for v in rng.integers(0, 2**63, rows)],
    }


VARIANTS = {
    "base": {"URL": "url", "TEXT": "text", "HEIGHT": "height", "WIDTH": "width", "LANGUAGE": "language", "similarity": "similarity"},
    "joined": {
        "URL": "url",
        "TEXT": "text",
        "WIDTH": "width",
        "HEIGHT": "height",
        "similarity": "similarity",
        "LANGUAGE": "language",
        "hash": "hash",
        "punsafe": "unsafe",
        "pwatermark": "watermark",
    },
    "aesthetic": {
        "URL": "url",
        "TEXT": "text",
        "WIDTH": "width",
        "HEIGHT": "height",
        "similarity": "similarity",
        "hash": "hash",
        "punsafe": "unsafe",
        "pwatermark": "watermark",
        "aesthetic": "aesthetic",
    },
    "art": {
        "URL": "url",
        "TEXT": "text",
        "WIDTH": "width",
        "HEIGHT": "height",
        "similarity": "similarity",
        "punsafe": "unsafe",
        "pwatermark": "watermark",
        "AESTHETIC_SCORE": "aesthetic",
        "hash": "hash",
        "LANGUAGE": "language",
    },
}


def write(folder: Path, data: dict[str, list[object]], variant: str, files: int = 2) -> Path:
    """As LAION's tables are: the types of a column differ from file to file."""
    folder.mkdir(parents=True, exist_ok=True)
    names = VARIANTS[variant]
    count = len(data["url"])
    for f in range(files):
        part = slice(f * count // files, (f + 1) * count // files)
        columns = {}
        for column, name in names.items():
            kind = {"width": (pa.int32(), pa.float64())[f % 2], "height": (pa.float64(), pa.int64())[f % 2]}.get(name)
            columns[column] = pa.array(data[name][part], kind)
        columns["__index_level_0__"] = pa.array(range(part.start, part.stop))
        pq.write_table(pa.table(columns), folder / f"{f}.parquet")
    return folder


def plain(data: dict[str, list[object]], keeps: list[object], unique: tuple[str, ...] = ()) -> tuple[list[int], list[int]]:
    """The rows that pass, and how many each rule removed, by a loop."""
    removed = [0] * (len(keeps) + len(unique))
    passed = []
    for i in range(len(data["url"])):
        row = {name: values[i] for name, values in data.items()}
        wrong = next((n for n, keep in enumerate(keeps) if not keep(row)), None)  # type: ignore[operator]
        if wrong is None:
            passed.append(i)
        else:
            removed[wrong] += 1
    for n, name in enumerate(unique):
        seen, still = set(), []
        for i in passed:
            value = data[{"caption": "text"}.get(name, name)][i]
            value = value.strip().lower() if name == "caption" else value  # type: ignore[attr-defined]
            (removed.__setitem__(len(keeps) + n, removed[len(keeps) + n] + 1) if value in seen else still.append(i))
            seen.add(value)
        passed = still
    return passed, removed


def ids(out: Path, name: str = "train") -> list[int]:
    return pq.read_table(out / f"{name}.parquet")["__index_level_0__"].to_pylist()


RULES = {
    "base": (
        Curation(min_side=300, max_aspect=2.5, min_similarity=0.1, languages=("EN",), unique=("url", "caption")),
        [
            lambda r: min(r["width"], r["height"]) >= 300,
            lambda r: max(r["width"], r["height"]) <= 2.5 * min(r["width"], r["height"]),
            lambda r: r["similarity"] is not None and r["similarity"] > 0.1,
            lambda r: r["language"] == "en",
        ],
    ),
    "joined": (
        Curation(min_pixels=200_000, max_watermark=0.8, max_unsafe=0.5, reject="logo", unique=("hash",)),
        [
            lambda r: r["width"] * r["height"] >= 200_000,
            lambda r: r["watermark"] is not None and r["watermark"] < 0.8,
            lambda r: r["unsafe"] is not None and r["unsafe"] < 0.5,
            lambda r: "logo" not in r["text"],
        ],
    ),
    "aesthetic": (
        Curation(min_aesthetic=5.0, min_caption=25, max_caption=45, match=r"\d of a h"),
        [
            lambda r: r["aesthetic"] is not None and r["aesthetic"] > 5,
            lambda r: len(r["text"].strip()) >= 25,
            lambda r: len(r["text"].strip()) <= 45,
            lambda r: re.search(r"\d of a h", r["text"]),
        ],
    ),
    "art": (
        with_subset("improved-aesthetics", Curation(unique=("url", "hash"))),
        [
            lambda r: min(r["width"], r["height"]) >= 512,
            lambda r: r["aesthetic"] is not None and r["aesthetic"] > 5,
            lambda r: r["watermark"] is not None and r["watermark"] < 0.5,
        ],
    ),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_rules_agree_with_a_plain_loop_in_every_variant(tmp_path, variant):
    data = raw(3)
    asked, keeps = RULES[variant]
    audit = curate([str(write(tmp_path / "in", data, variant))], tmp_path / "out", asked)
    passed, removed = plain(data, keeps, asked.unique)
    assert ids(tmp_path / "out") == passed
    assert [rule["removed"] for rule in audit.rules] == removed
    assert audit.rows == ROWS == audit.kept + sum(removed) and audit.kept == len(passed)
    table = pq.read_table(tmp_path / "out" / "train.parquet")
    assert set(VARIANTS[variant]) <= set(table.column_names) and "ldm_row" not in table.column_names
    again = json.loads((tmp_path / "out" / AUDIT).read_text())
    assert again["kept"] == audit.kept and len(again["rules"][0]["examples"]) == 5
    assert not list((tmp_path / "out").glob(".curate-*"))
    assert f"{audit.kept:,}  kept" in "\n".join(lines(audit))


def test_what_each_rule_would_remove_alone_and_what_it_does_not_know(tmp_path):
    data = raw(5)
    audit = curate([str(write(tmp_path / "in", data, "art"))], tmp_path / "out", Curation(min_side=900, min_aesthetic=5.0))
    first, second = audit.rules
    assert second["unknown"] == sum(v is None for v in data["aesthetic"])
    assert second["alone"] == sum(v is None or v <= 5 for v in data["aesthetic"]) > second["removed"]
    assert first["alone"] == first["removed"] and min(first["examples"][0][k] for k in ("width", "height")) < 900


def test_the_result_depends_on_neither_threads_nor_memory(tmp_path):
    source = str(write(tmp_path / "in", raw(7, 20_000), "art", files=5))
    asked = Curation(min_side=64, unique=("url", "caption"), val_share=0.1, seed=4)
    tables = []
    for name, threads, memory in (("a", 1, 1024), ("b", 2, 1024), ("c", 4, 100)):
        audit = curate([source], tmp_path / name, asked, threads=threads, memory_mb=memory)
        tables.append((ids(tmp_path / name), ids(tmp_path / name, "val"), audit.rules))
    assert tables[0] == tables[1] == tables[2]
    train, val, _ = tables[0]
    assert 0.05 < len(val) / (len(train) + len(val)) < 0.15 and not set(train) & set(val)


def test_the_split_follows_the_link_and_the_seed(tmp_path):
    data = raw(9)
    source = str(write(tmp_path / "in", data, "base"))
    curate([source], tmp_path / "a", Curation(val_share=0.2))
    held_out = {data["url"][i] for i in ids(tmp_path / "a", "val")}
    assert held_out and not held_out & {data["url"][i] for i in ids(tmp_path / "a")}
    place = {u: int.from_bytes(hashlib.md5(f"0/{u}".encode()).digest()[8:], "little") / 2**64 for u in data["url"]}
    assert held_out == {u for u, p in place.items() if p < 0.2}
    curate([source], tmp_path / "b", Curation(val_share=0.2, seed=1))
    assert ids(tmp_path / "b", "val") != ids(tmp_path / "a", "val")
    curate([source], tmp_path / "a", Curation())
    assert not (tmp_path / "a" / "val.parquet").exists()


def test_removal_lists_by_link_hash_and_key(tmp_path):
    data = raw(11)
    source = str(write(tmp_path / "in", data, "joined"))
    links, hashes, both = set(data["url"][:40]), set(data["hash"][100:130]), set(data["url"][200:210])
    (tmp_path / "links.txt").write_text("# asked by their owners\n" + "\n".join(map(str, links)) + "\n\n")
    pq.write_table(pa.table({"hash": list(hashes)}), tmp_path / "hashes.parquet")
    (tmp_path / "more.csv").write_text("URL,why\n" + "\n".join(f"{u},gone" for u in both))
    asked = Curation(remove=tuple(tmp_path / n for n in ("links.txt", "hashes.parquet", "more.csv")))
    audit = curate([source], tmp_path / "out", asked)
    assert ids(tmp_path / "out") == [i for i in range(ROWS) if data["url"][i] not in links | both and data["hash"][i] not in hashes]
    assert {r["rule"] for r in audit.rules} == {"url on a removal list", "hash on a removal list"}
    (tmp_path / "odd.csv").write_text("name\nx\n")
    with pytest.raises(UserError, match=r"odd\.csv: none of its columns \(name\) is among url, hash"):
        curate([source], tmp_path / "out", Curation(remove=(tmp_path / "odd.csv",)))
    with pytest.raises(UserError, match="no such removal list"):
        curate([source], tmp_path / "out", Curation(remove=(tmp_path / "none.txt",)))


@pytest.mark.parametrize("bits", [0, 1, 3, 8])
def test_near_duplicates_agree_with_all_pairs(bits):
    rng = np.random.default_rng(bits)
    hashes = rng.integers(0, 2**63, 400, dtype=np.uint64)
    for i in range(100, 400):  # chains and clusters
        if rng.random() < 0.6:
            hashes[i] = hashes[rng.integers(0, i)]
            for bit in rng.integers(0, 64, rng.integers(0, 5)).tolist():
                hashes[i] ^= np.uint64(1 << bit)
    expected: list[bool] = []
    stay: list[int] = []
    for value in hashes.tolist():
        expected.append(any((value ^ other).bit_count() <= bits for other in stay))
        if not expected[-1]:
            stay.append(value)
    assert near_duplicates(hashes, bits).tolist() == expected
    assert near_duplicates(hashes[:0], bits).tolist() == []


def test_near_duplicates_by_column_as_number_or_text(tmp_path):
    phash = [0xFFFF000000000001, 0xFFFF000000000003, 12, 0xFFFF000000000001, None]
    for name, values in (("n", pa.array(phash, pa.uint64())), ("t", [None if v is None else f"{v:016x}" for v in phash])):
        pq.write_table(pa.table({"url": list("abcde"), "phash": values, "__index_level_0__": range(5)}), tmp_path / f"{name}.parquet")
        audit = curate([str(tmp_path / f"{name}.parquet")], tmp_path / name, Curation(near=1))
        assert ids(tmp_path / name) == [0, 2, 4] and audit.rules[-1]["removed"] == 2
        curate([str(tmp_path / f"{name}.parquet")], tmp_path / name, Curation(unique=("phash",)))
        assert ids(tmp_path / name) == [0, 1, 2, 4]


def test_subsets_are_the_recipes_and_can_be_tightened():
    assert set(SUBSETS) == {"laion-high-resolution", "improved-aesthetics"}
    assert SUBSETS["laion-high-resolution"].min_side == 1024
    stricter = with_subset("improved-aesthetics", Curation(min_aesthetic=6.0))
    assert (stricter.min_side, stricter.min_aesthetic, stricter.max_watermark) == (512, 6.0, 0.5)
    with pytest.raises(UserError, match="got 'art'; there are laion-high-resolution, improved-aesthetics"):
        with_subset("art", Curation())


def test_bad_tables_are_named_with_their_column(tmp_path):
    def says(pattern: str, *names: str, **asked: object) -> None:
        with pytest.raises(UserError, match=pattern) as error:
            curate([str(tmp_path / n) for n in names], tmp_path / "out", Curation(**asked))  # type: ignore[arg-type]
        assert "\n" not in str(error.value)

    folder = write(tmp_path / "in", raw(), "base")
    says(r"aesthetic > 5: the table has no column aesthetic; it has URL, TEXT, WIDTH, HEIGHT", "in", min_aesthetic=5.0)
    says("a rule asks for phash, but the table has no such column", "in", near=2)
    says(r"nothing\.parquet: no such file", "nothing.parquet")
    (tmp_path / "bare").mkdir()
    says("no parquet files here", "bare")
    whole = (folder / "0.parquet").read_bytes()
    (tmp_path / "cut.parquet").write_bytes(whole[: len(whole) // 2])
    says(r"cut\.parquet: not a whole parquet file", "in/1.parquet", "cut.parquet")
    says(r"match: '\*' is no regular expression of RE2 \(no argument", "in", match="*")
    pq.write_table(pa.table({"URL": pa.array([], pa.string())}), tmp_path / "none.parquet")
    says("the table has no rows", "none.parquet")


def test_numbers_of_any_type_are_read_and_what_is_none_is_unknown(tmp_path):
    width = ["900", "y", "", "1e3", "nan", "inf", None]
    rows = {"url": list("abcdefg"), "width": width, "HEIGHT": [900] * 7, "__index_level_0__": range(7)}
    pq.write_table(pa.table(rows), tmp_path / "t.parquet")
    audit = curate([str(tmp_path / "t.parquet")], tmp_path / "out", Curation(min_side=512))
    assert ids(tmp_path / "out") == [0, 3] and audit.rules[0]["unknown"] == 5


def test_tables_with_different_columns_go_together(tmp_path):
    pq.write_table(pa.table({"url": ["a", "b"], "aesthetic": [6.0, 4.0], "__index_level_0__": [0, 1]}), tmp_path / "0.parquet")
    pq.write_table(pa.table({"url": ["c"], "extra": [1], "__index_level_0__": [2]}), tmp_path / "1.parquet")
    audit = curate([str(tmp_path)], tmp_path / "out", Curation(min_aesthetic=5.0))
    assert ids(tmp_path / "out") == [0] and audit.rules[0]["unknown"] == 1
    assert isinstance(audit, Audit) and set(audit.columns) == {"url", "aesthetic"}


def test_tables_in_a_store_that_fails_give_what_those_on_a_disk_give(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("aiohttp", reason='of the extra "http"')
    from stores import served

    from ldm.data import remote

    monkeypatch.setattr(remote, "WAIT_S", 0.01)
    folder = write(tmp_path / "in", raw(), "art", files=2)
    asked = Curation(min_side=64, unique=("url",), val_share=0.1)
    here = curate([str(folder)], tmp_path / "here", asked)
    with served(folder) as server:
        server.faults = lambda number, method, path: None if number % 3 == 2 else ("status", 503)
        there = curate([f"{server.url}/{i}.parquet" for i in range(2)], tmp_path / "there", asked)
        assert len(server.asked) > 6 and there.files[0] == f"{server.url}/0.parquet"
        server.faults = lambda number, method, path: ("status", 403)
        with pytest.raises(UserError, match=r"0\.parquet.*(403|refused)"):
            curate([f"{server.url}/0.parquet"], tmp_path / "refused", asked)
    for name in ("train", "val"):
        assert ids(tmp_path / "here", name) == ids(tmp_path / "there", name)
    assert here.rules == there.rules


EVERYTHING = Curation(
    min_side=300, max_aspect=2.5, max_unsafe=0.9, min_caption=12, reject="logo", unique=("url", "caption"), near=1, val_share=0.2, seed=5
)


def account(audit: Audit) -> Audit:
    """What does not depend on who works."""
    return replace(audit, seconds=0.0, peak_mb=0.0)


def contents(file: Path) -> tuple[list[str], list[pa.DataType], list[dict[str, Any]]]:
    """Names, types and rows of a table."""
    table = pq.read_table(file)
    return table.schema.names, table.schema.types, table.to_pylist()


def one_after_the_other(task: Any, files: list[str]) -> list[Audit]:
    return [task(number, file) for number, file in enumerate(files)]


def hashed(folder: Path, files: int) -> Path:
    """Tables with perceptual hashes, of which the last has one column less and the first none that passes."""
    table = write(folder, raw(), "joined", files)
    hashes = np.array(raw()["phash"], np.uint64)
    for f in range(files):
        part = pq.read_table(table / f"{f}.parquet")
        mine = hashes[f * ROWS // files : f * ROWS // files + len(part)] & np.uint64(0xFFF)  # few bits, so that many are near
        part = part.append_column("phash", pa.array(mine, pa.uint64()))
        if f == 0:
            part = part.set_column(part.schema.get_field_index("HEIGHT"), "HEIGHT", pa.array([1.0] * len(part)))
        pq.write_table(part.drop(["LANGUAGE"]) if f == files - 1 else part, table / f"{f}.parquet")
    return table


def test_tables_judged_apart_give_the_same_rows_and_account(tmp_path: Path) -> None:
    table = hashed(tmp_path / "tables", 4)
    whole = curate([str(table)], tmp_path / "whole", EVERYTHING)
    spread = curate_spread([str(table)], tmp_path / "spread", EVERYTHING, one_after_the_other)
    assert 0 < whole.val < whole.kept and whole.rules[0]["removed"] and whole.rules[-1]["removed"]
    assert account(spread) == account(whole)
    for name in ("train", "val"):
        assert contents(tmp_path / "spread" / f"{name}.parquet") == contents(tmp_path / "whole" / f"{name}.parquet")
    assert sorted(path.name for path in (tmp_path / "spread").iterdir()) == ["audit.json", "train.parquet", "val.parquet"]


def test_what_no_table_knows_alone_is_refused(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["a", "b"]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match="--val-share: on several workers rows are told apart by a column url, key"):
        curate_spread([str(tmp_path)], tmp_path / "out", Curation(val_share=0.5), one_after_the_other)
    with pytest.raises(UserError, match=r"none of 2 rows passes: 2 by caption >= 9 characters"):
        curate_spread([str(tmp_path)], tmp_path / "out", Curation(min_caption=9), one_after_the_other)
    with pytest.raises(UserError, match="--out must be a folder that all machines share"):
        curate_spread(
            [str(tmp_path)], tmp_path / "out", Curation(), lambda task, files: elsewhere(one_after_the_other(task, files), tmp_path)
        )


def elsewhere(found: list[Audit], folder: Path) -> list[Audit]:
    """As if what the workers wrote lay on their own disks."""
    for path in folder.glob("out/.curate-*/*/train.parquet"):
        path.unlink()
    return found


def test_without_ray_the_option_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pq.write_table(pa.table({"text": ["a", "b"]}), tmp_path / "a.parquet")
    monkeypatch.setitem(sys.modules, "ray", None)
    assert main(["data", "curate", str(tmp_path), "--out", str(tmp_path / "out"), "--ray", "local"]) == 2
    assert '--ray needs ray: python -m pip install "ray>=2.40"' in capsys.readouterr().err


@pytest.mark.slow
def test_rays_workers_judge_alike(tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="ray is an extra")
    import ray

    table = hashed(tmp_path / "tables", 3)
    whole = curate([str(table)], tmp_path / "whole", EVERYTHING)
    try:
        spread = curate_spread([str(table)], tmp_path / "spread", EVERYTHING, on_ray("local", 1), threads=1)
        assert account(spread) == account(whole)
        assert contents(tmp_path / "spread/train.parquet") == contents(tmp_path / "whole/train.parquet")
        with pytest.raises(UserError, match="aesthetic > 5: the table has no column aesthetic"):
            curate_spread([str(table)], tmp_path / "spread", Curation(min_aesthetic=5.0), on_ray("local", 1), threads=1)
    finally:
        ray.shutdown()
