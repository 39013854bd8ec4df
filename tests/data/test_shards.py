"""Tar shards become a data set by position; what is damaged in them is counted and named, and nothing is lost in silence."""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import pickle
import tarfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from tars import packed, painted, sample, shard

from ldm.config.errors import UserError
from ldm.data import shard_index, storage
from ldm.data.images import view
from ldm.data.index_file import IndexFile
from ldm.data.photos import held_out
from ldm.data.shard_index import NAME, OLDER, Entry, Index, open_index
from ldm.data.shard_reader import COLUMNS, place_in_split, read_shard
from ldm.data.shards import ShardsData, ShardsSource
from ldm.data.tar import Damage, Member, SkippedMember, members


def build(path: object, split: str = "train", **options: object) -> ShardsData:
    return ShardsSource(path=str(path), **options).build(split)  # type: ignore[arg-type]


def entries(index: Index) -> list[Entry]:
    return [index.entry(row) for row in range(len(index))]


def read(data: bytes) -> list[Member | SkippedMember | Damage]:
    return list(members(io.BytesIO(data), 10**6))


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_are_as_the_standard_library_sees_them(form):
    names = ["a.jpg", "b/" * 30 + "long-" * 9 + ".txt", "empty.json"]
    if form != tarfile.USTAR_FORMAT:
        names += ["é" * 60 + ".jpg", "very " * 60 + ".txt"]
    contents = [(name, bytes([i]) * (511 + i) * (i != 2)) for i, name in enumerate(names)]
    data = packed(contents, form)
    found = read(data)
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        assert [(m.name, m.offset, m.size) for m in found] == [(m.name, m.offset_data, m.size) for m in tar]
    assert [(m.name, m.data) for m in found] == contents


def test_what_is_no_file_is_skipped_and_nothing_reaches_the_disk(tmp_path, monkeypatch):
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE):
            info = tarfile.TarInfo("odd.jpg")
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
        for i, key in enumerate(("../../up", "/absolute/path", "k" * 10_000, "plain", "C:\\drive")):
            for name, data in sample(key, i):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    inside = tmp_path / "deep" / "deeper"
    inside.mkdir(parents=True)
    monkeypatch.chdir(inside)
    Path("odd.tar").write_bytes(out.getvalue())
    data = build("odd.tar", val_share=0.2)
    assert data.total == 5 and data.rejected == {"not a file": 4}
    data.load(range(len(data)), range(len(data)), 16, 0, False)
    assert sorted(p.name for p in tmp_path.rglob("*") if p.is_file()) == [NAME, "odd.tar"]


def test_shards_keep_the_contract_and_read_like_the_files_they_hold(tmp_path):
    shard(tmp_path, 0, 9), shard(tmp_path, 1, 8)
    parts = [build(tmp_path, split, val_share=0.2) for split in ("train", "val")]
    assert sum(map(len, parts)) == 17 and not {*map(parts[0].name, range(len(parts[0])))} & {*map(parts[1].name, range(len(parts[1])))}
    data = parts[0]
    batch = data.load([0, 3, 3], [7, 8, 9], 32, 1, True)
    for row, (i, p) in enumerate(((0, 7), (3, 8), (3, 9))):
        alone = data.load([i], [p], 32, 1, True)
        assert torch.equal(alone.image[0], batch.image[row]) and torch.equal(alone.size[0], batch.size[row])
    assert list(batch.caption) == data.captions([0, 3, 3], [7, 8, 9], 1)
    for i in range(len(data)):
        name, key = data.name(i).split("/")
        number = int(key[:5]) * 1000 + int(key[5:])
        assert name == f"{key[:5]}.tar" and data.all_captions([i]) == [[f"picture {number}"]]
        assert data.read(i) == painted(number, (40 + number % 5, 36), ("JPEG", "PNG", "WEBP")[int(key[5:]) % 3])
    plain = view(data.read(0), 16).pixels
    got = build(tmp_path, val_share=0.2, crop="centre").load([0], [0], 16, 0, False).image[0]
    assert np.array_equal(((got + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).numpy(), plain)
    json.dumps(data.describe())


def test_the_index_is_built_once_and_read_ever_after(tmp_path, monkeypatch):
    shard(tmp_path, 0, 5)
    first = build(tmp_path)
    assert (tmp_path / NAME).is_file()
    seen: list[str] = []
    monkeypatch.setattr("ldm.data.shard_index.read_shard", lambda path, name, now: seen.append(name))
    again = build(tmp_path)
    assert again.fingerprint() == first.fingerprint() and not seen
    monkeypatch.undo()
    shard(tmp_path, 1, 5)
    assert build(tmp_path).total == 10 and build(tmp_path).fingerprint() != first.fingerprint()
    only = build(tmp_path / "{00001..00001}.tar")  # a part of what the index knows
    assert only.total == 5 and {only.name(i)[:5] for i in range(4)} == {"00001"}
    assert len(IndexFile(tmp_path / NAME)) == 10


def test_the_index_lies_in_the_cache_where_the_folder_cannot_be_written(tmp_path, monkeypatch):
    shard(tmp_path / "shards", 0, 4)
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    monkeypatch.setenv("LDM_CACHE", str(tmp_path / "cache"))
    build(tmp_path / "shards")
    assert not (tmp_path / "shards" / NAME).exists() and len(list((tmp_path / "cache").glob("index-*.bin"))) == 1
    mine = tmp_path / "own.index"
    build(tmp_path / "shards", index=str(mine))
    assert mine.is_file()


def test_a_damaged_index_is_refused(tmp_path):
    shard(tmp_path, 0, 5)
    open_index(str(tmp_path))
    file = tmp_path / NAME
    whole = file.read_bytes()
    wrong = 0
    there = entries(open_index(str(tmp_path)))
    for at in range(0, len(whole), max(1, len(whole) // 150)):
        file.unlink()  # a new file, as another program would write it: this one is mapped
        file.write_bytes(whole[:at] + bytes([whole[at] ^ 16]) + whole[at + 1 :])
        try:
            found = entries(open_index(str(tmp_path)))
        except UserError as error:
            assert "remove it" in str(error)
            wrong += 1
        else:
            assert found == there
    file.unlink()
    file.write_bytes(whole[:-20])
    with pytest.raises(UserError, match=r"ldm-index\.bin: the index of .* is damaged"):
        build(tmp_path)
    assert wrong > 120  # the others are room between columns


def test_brace_ranges_and_urls(tmp_path):
    import fsspec

    for i in range(3):
        shard(tmp_path, i, 4)
    pattern = tmp_path / "{00000..00002}.tar"
    assert storage.expand("a{08..11}.{x,y}")[::3] == ["a08.x", "a09.y", "a11.x"] and storage.expand("no{braces}") == ["no{braces}"]
    with pytest.raises(UserError, match="must count upwards"):
        storage.expand("{3..1}")
    with pytest.raises(UserError, match="stands for 1000000000000 names"):
        storage.expand("{0..999999}{0..999999}")
    local = build(pattern)
    memory = fsspec.filesystem("memory")
    for file in tmp_path.glob("*.tar"):
        memory.pipe(f"/bucket/{file.name}", file.read_bytes())
    try:
        for path in ("memory://bucket/{00000..00002}.tar", "memory://bucket", "memory://bucket/*.tar"):
            remote = build(path, index=str(tmp_path / "remote.bin"))
            assert len(remote) == len(local) and remote.fingerprint() == local.fingerprint()
            assert torch.equal(remote.load([2], [5], 16, 0, False).image, local.load([2], [5], 16, 0, False).image)
        with pytest.raises(UserError, match=r"00003\.tar does not exist"):
            build("memory://bucket/{00000..00003}.tar")
    finally:
        memory.rm("/bucket", recursive=True)
    with pytest.raises(UserError, match=r"00003\.tar does not exist"):
        build(tmp_path / "{00000..00003}.tar")
    with pytest.raises(UserError, match=r"nothing://x/a\.tar cannot be opened"):
        build("nothing://x/a.tar")
    (tmp_path / "bare").mkdir()
    with pytest.raises(UserError, match=r"no \.tar files at .*bare"):
        build(tmp_path / "bare")


def test_img2dataset_tables_bring_sizes_scores_and_the_count(tmp_path):
    told = {"caption": "unused", "original_width": 900, "original_height": 700, "width": 40, "height": 36}
    file = shard(tmp_path, 0, 4, **told)
    keys = [f"00000{i:04d}" for i in range(6)]
    status = ["success"] * 5 + ["failed_to_download"]
    rows = {"key": keys, "status": status, "AESTHETIC_SCORE": [5.5] * 6, "pwatermark": [0.1] * 6, "caption": ["x"] * 6}
    pq.write_table(pa.table(rows), file.with_suffix(".parquet"))
    data = build(tmp_path)
    assert data.total == 4 and data.rejected == {"listed but missing": 1}
    fields = data.fields()
    assert set(fields.width.tolist()) == {900} and set(fields.height.tolist()) == {700}
    assert np.allclose(fields.aesthetic, 5.5) and np.allclose(fields.watermark, 0.1) and data.index.shards[0].listed == 5
    shard(tmp_path, 1, 4)
    (tmp_path / "00001_stats.json").write_text(json.dumps({"count": 9, "successes": 6}))
    assert build(tmp_path).rejected == {"listed but missing": 3}
    assert np.isnan(build(tmp_path / "00001.tar").fields().aesthetic).all()


def test_odd_samples_have_a_counted_reason_and_never_another_ones_caption(tmp_path):
    pictures = [s for i in range(12) for s in sample(f"good{i:02d}", i)]
    odd = [
        *sample("photo.v2", 20),
        ("UPPER.JPG", painted(21)),
        ("UPPER.TXT", b"picture 21"),  # fine
        ("late.txt", b"picture 22"),
        *pictures,
        ("late.jpg", painted(22)),  # unordered: fine
        *sample("twice", 23),
        *sample("other", 24),
        *sample("twice", 25),  # far duplicate
        *sample("near", 26)[:1],
        *sample("near", 27),
        ("both.jpg", painted(28)),
        ("both.png", painted(29, kind="PNG")),
        ("both.txt", b"picture 28"),
        ("mute.jpg", painted(30)),
        ("blank.jpg", painted(31)),
        ("blank.txt", b" \n"),
        ("words.txt", b"picture 32"),
        ("latin.jpg", painted(33)),
        ("latin.txt", b"caf\xe9"),
        ("phone.heic", b"ftypheic"),
        ("phone.txt", b"picture 34"),
        ("page.jpg", b"<html>"),
        ("page.txt", b"picture 35"),
        ("label.cls", b"3"),
        ("only.jpg", painted(36)),
        ("only.json", b'{"caption": "picture 36"}'),
        ("number.jpg", painted(37)),
        ("number.json", b'{"caption": 5}'),
        ("broken.jpg", painted(38)),
        ("broken.txt", b"picture 38"),
        ("broken.json", b"{"),
    ]
    (tmp_path / "odd.tar").write_bytes(packed(odd))
    parts = [build(tmp_path, split, max_bad=0.5) for split in ("train", "val")]
    found = {d.name(i).removeprefix("odd.tar/"): (d.read(i), d.all_captions([i])[0]) for d in parts for i in range(len(d))}
    assert set(found) == {f"good{i:02d}" for i in range(12)} | {"photo.v2", "UPPER", "late", "other", "only", "broken"}
    for key, (data, captions) in found.items():
        number = int(captions[0].removeprefix("picture "))
        assert data in (painted(number), painted(number, (40 + number % 5, 36))), key
    assert parts[0].rejected == {
        "duplicate key": 3,
        "no caption": 2,
        "empty caption": 1,
        "no image": 1,
        "caption not UTF-8": 1,
        "format not supported": 1,
        "not an image": 1,
    }
    assert parts[0].index.shards[0].other == {".cls": 1}


def outcome(folder: Path, originals: dict[str, tuple[bytes, list[str]]]) -> str:
    """What became of the samples of a damaged shard: `refused`, `reported`, `harmless`, or `silent`, which must not be."""
    try:
        data = build(folder, max_bad=1.0, val_share=0.01)
        other = build(folder, "val", max_bad=1.0, val_share=0.01)
    except UserError:
        return "refused"
    found = {d.name(i): (d.all_captions([i])[0], d, i) for d in (data, other) for i in range(len(d))}
    told = bool(data.rejected.total()) or any(s.damage for s in data.index.shards)
    if set(found) != set(originals) and not told:
        return "silent"
    for name, (_, d, i) in found.items():
        if name not in originals:
            continue
        try:
            now = d.read(i)
        except Exception:
            told = True
            continue
        if now != originals[name][0] and any(now == before for before, _ in originals.values()):
            return "silent"  # another sample's picture
    lost = len(originals) - len(found)
    return "reported" if told else "silent" if lost else "harmless"


def mutations(whole: bytes, count: int, seed: int) -> list[bytes]:
    """Half of them cut off, half with one bit turned, at places all over the file."""
    rng = np.random.default_rng(seed)
    cuts = [whole[: int(at)] for at in rng.integers(0, len(whole), count // 2)]
    flips = []
    for bit in rng.integers(0, len(whole) * 8, count - count // 2).tolist():
        changed = bytearray(whole)
        changed[bit // 8] ^= 1 << bit % 8
        flips.append(bytes(changed))
    return cuts + flips


@pytest.mark.slow
@pytest.mark.parametrize("count", [300, pytest.param(2000, marks=pytest.mark.soak)])
@pytest.mark.parametrize("indexed", [True, False])
def test_no_cut_and_no_turned_bit_loses_a_sample_in_silence(tmp_path, count, indexed, caplog):
    caplog.set_level(logging.CRITICAL)
    file = tmp_path / "00000.tar"
    file.write_bytes(packed(m for i in range(6) for m in sample(f"k{i}", i, "png" if i % 2 else "jpg")))
    parts = [build(tmp_path, split, val_share=0.01) for split in ("train", "val")]
    originals = {d.name(i): (d.read(i), d.all_captions([i])[0]) for d in parts for i in range(len(d))}
    assert len(originals) == 6
    results = Counter[str]()
    for changed in mutations(file.read_bytes(), count, 5):
        file.write_bytes(changed)
        if not indexed:
            (tmp_path / NAME).unlink(missing_ok=True)
        results[outcome(tmp_path, originals)] += 1
    print(dict(results))
    assert results["silent"] == 0 and results.total() == count
    assert results["refused"] + results["reported"] > count // 2  # every cut, and more


def test_a_shard_that_changes_or_vanishes_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "WAIT_S", 0.01)
    for i in range(3):
        shard(tmp_path, i, 8)
    data = build(tmp_path, max_bad=0.5)
    mine = [i for i in range(len(data)) if data.name(i).startswith("00001")]
    data.load([mine[-1] + 1], [0], 16, 0, False)
    (tmp_path / "00001.tar").unlink()
    with pytest.raises(UserError, match=r"00001\.tar: cannot be read any more \(No such file or directory\); every process must see"):
        data.load([mine[0] - 1, mine[0]], [0, 1], 16, 0, False)
    assert not data.replaced  # or this process alone would see other samples from here on
    whole = (tmp_path / "00002.tar").read_bytes()
    (tmp_path / "00002.tar").write_bytes(whole[: len(whole) // 2])
    last = len(data) - 1  # cut off: what every process sees is replaced
    assert data.name(last).startswith("00002") and list(data.load([last], [0], 16, 0, False).caption) == data.all_captions([0])[0]
    assert "changed since it was indexed" in data.replaced[data.name(last)]
    with pytest.raises(UserError, match=r"00002\.tar: \d+ bytes, but \d+ when it was indexed with 8 samples.*ldm data index"):
        build(tmp_path / "{00002,00000}.tar")
    told = []
    index = open_index(str(tmp_path), renew=True, on_shard=lambda record, number, count: told.append((record.name, record.damage)))
    assert [name for name, _ in told] == ["00002.tar"] and "cut off" in told[0][1][0] and len(index) < 24
    with pytest.raises(UserError, match=r"00000\.tar: its bytes are not those"):
        flipped = bytearray((tmp_path / "00000.tar").read_bytes())
        flipped[700] ^= 1
        (tmp_path / "00000.tar").write_bytes(flipped)
        open_index(str(tmp_path), verify=True)


def test_compressed_and_foreign_archives_are_refused(tmp_path):
    import gzip

    (tmp_path / "a.tar").write_bytes(gzip.compress(packed(sample("a", 0))))
    with pytest.raises(UserError, match=r"a\.tar: a compressed archive has no addresses"):
        build(tmp_path)
    (tmp_path / "a.tar").write_bytes(b"not a tar at all" * 100)
    with pytest.raises(UserError, match="0 usable samples in 1 shard"):
        build(tmp_path)
    (tmp_path / "a.tar").write_bytes(b"")
    assert "an empty file" in str(open_index(str(tmp_path), renew=True).shards[0].damage)


def test_a_zeroed_stretch_hides_nothing():
    contents = [m for i in range(5) for m in sample(f"k{i}", i)]
    whole = packed(contents, tarfile.USTAR_FORMAT, 0)
    sound = read(whole)
    start = sound[2].offset - 512
    stretch = whole[:start] + b"\0" * 2048 + whole[start + 2048 :]
    found = read(stretch)
    names = [m.name for m in found if isinstance(m, Member)]
    assert names[:2] == ["k0.jpg", "k0.txt"] and names[-4:] == ["k3.jpg", "k3.txt", "k4.jpg", "k4.txt"]
    assert any(isinstance(m, Damage) for m in found)


def test_many_reads_leave_no_descriptor_open(tmp_path):
    for i in range(70):
        shard(tmp_path, i, 2)
    data = build(tmp_path)
    before = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else 0
    for _ in range(3):
        for i in range(len(data)):
            data.read(i)
    if before:
        assert len(os.listdir("/proc/self/fd")) <= before + storage._OPEN + 1
        del data
        assert len(os.listdir("/proc/self/fd")) <= before + 1


def older_index(folder: Path) -> Path:
    """An index as versions before format 3 kept it."""
    kinds = [pa.int64(), pa.int64(), pa.uint64(), *[pa.int32()] * 4, *[pa.float32()] * 2]
    fields = [pa.field("shard", pa.int32()), pa.field("key", pa.large_string()), *map(pa.field, COLUMNS[1:-1], kinds)]
    schema = pa.schema([*fields, pa.field("captions", pa.large_list(pa.large_string()))])
    found = [read_shard(str(file), file.name, storage.stat(str(file))) for file in sorted(folder.glob("*.tar"))]
    records = [{name: value for name, value in asdict(record).items() if name != "captions"} for record, _ in found]
    shards = json.dumps(records)
    about = {"ldm.format": "2", "ldm.shards": shards, "ldm.sum": hashlib.sha256(shards.encode()).hexdigest()}
    rows = [{"shard": [n] * len(columns["key"]), **columns} for n, (_, columns) in enumerate(found)]
    table = pa.concat_tables([pa.table(row, schema=schema) for row in rows]).replace_schema_metadata(about)
    pq.write_table(table, folder / OLDER, write_page_checksum=True)
    return folder / OLDER


def test_an_index_of_an_older_version_serves_without_reading_shards(tmp_path, monkeypatch):
    for i in range(3):
        shard(tmp_path, i, 6, original_width=900, original_height=700)
    new = build(tmp_path)
    there = entries(new.index)
    (tmp_path / NAME).unlink()
    older = older_index(tmp_path)
    own = tmp_path / "own.parquet"
    own.write_bytes(older.read_bytes())
    monkeypatch.setattr("ldm.data.shard_index.read_shard", lambda path, name, now: pytest.fail("a shard was read"))
    for options in ({}, {"index": str(own)}):
        again = build(tmp_path, **options)
        assert entries(again.index) == there and again.fingerprint() == new.fingerprint()
        assert again.describe() == new.describe() and again.fields().width.tolist() == [900] * len(again)
    damaged = older.read_bytes()
    (tmp_path / NAME).unlink()
    older.write_bytes(damaged[:-30])
    with pytest.raises(UserError, match=r"ldm-index\.parquet: the index of .* is damaged"):
        build(tmp_path)


@pytest.mark.parametrize(("share", "min_side"), [(0.0, 32), (0.02, 32), (0.3, 41), (0.7, 32), (1.0, 32), (1e-9, 43), (0.5, 44)])
def test_parts_are_those_that_names_decide_whatever_the_index_keeps_of_them(tmp_path, share, min_side, monkeypatch):
    monkeypatch.setattr("ldm.data.shards._ROWS", 7)
    for i in range(2):
        (tmp_path / f"s{i}.tar").write_bytes(packed([("a.jpg", painted(i, (50 + i, 60))), ("a.txt", b"a"), *many(i)]))
    parts = {split: build(tmp_path, split, val_share=share, min_side=min_side, max_pixels=2990) for split in ("train", "val")}
    index = parts["train"].index
    height, width = (index.column(name).astype(int) for name in ("height", "width"))
    usable = [row for row in range(len(index)) if min(height[row], width[row]) >= min_side and height[row] * width[row] <= 2990]
    names = [f"s{int(index.shard_of(row))}/{index.entry(row).key}" for row in usable]
    out = held_out(names, share)
    for split, data in parts.items():
        wanted = [name.replace("/", ".tar/") for name, here in zip(names, out.tolist(), strict=True) if here == (split == "val")]
        assert [data.name(i) for i in range(len(data))] == wanted
        assert [data._kept.before(int(row)) for row in data._kept.rows()] == list(range(len(data)))
    assert parts["train"].total == len(usable) and parts["train"].rejected["too many pixels"] == 2


def many(number: int) -> list[tuple[str, bytes]]:
    pictures = [(f"n{number}k{i}", painted(i, (44 + i, 36 + i % 9), "PNG")) for i in range(14)]
    return [member for key, data in pictures for member in ((f"{key}.png", data), (f"{key}.txt", b"words"))]


def test_an_undecided_half_of_a_hash_is_decided_by_the_name(tmp_path):
    shard(tmp_path, 0, 9)
    index = build(tmp_path).index
    names = [f"00000/{index.entry(row).key}" for row in range(9)]
    for name in names:
        place = place_in_split(*name.split("/")) / 2**64
        for share in (place, float(np.nextafter(place, 1))):  # only the lower half of the hash tells it from the place
            data = build(tmp_path, "val", val_share=share)
            wanted = {name for name, out in zip(names, held_out(names, share).tolist(), strict=True) if out}
            assert {data.name(i).replace(".tar", "") for i in range(len(data))} == wanted


def test_a_stopped_index_goes_on_and_calls_at_once_share_the_work(tmp_path, monkeypatch):
    for i in range(6):
        shard(tmp_path, i, 3)
    read: list[str] = []
    real = shard_index.read_shard

    def three(path: str, name: str, now: storage.Stat) -> object:
        if len(read) == 3:
            raise UserError("stopped")
        read.append(name)
        return real(path, name, now)

    monkeypatch.setattr(shard_index, "READERS", 1)
    monkeypatch.setattr(shard_index, "read_shard", three)
    with pytest.raises(UserError, match="stopped"):
        open_index(str(tmp_path))
    assert not (tmp_path / NAME).exists() and len(read) == 3
    again: list[str] = []
    monkeypatch.setattr(shard_index, "read_shard", lambda path, name, now: (again.append(name), real(path, name, now))[1])
    told: list[int] = []
    index = open_index(str(tmp_path), on_shard=lambda record, number, count: told.append(count))
    # A thread of the stopped call may still have been on its way to a shard.
    assert len(index) == 18 and not set(read) & set(again) and len(set(again)) == 3 and told == [6] * 6
    assert not list(tmp_path.glob(".ldm-index*"))
    whole = (tmp_path / NAME).read_bytes()
    (tmp_path / NAME).unlink()
    with ThreadPoolExecutor(3) as pool:  # as of several machines
        found = list(pool.map(lambda _: entries(open_index(str(tmp_path))), range(3)))
    assert found[0] == found[1] == found[2] == entries(index) and (tmp_path / NAME).read_bytes() == whole


def test_an_index_takes_the_room_that_its_values_need(tmp_path):
    shard(tmp_path / "plain", 0, 40)
    told = {"original_width": 70000, "original_height": 300, "aesthetic_score": 5.5, "pwatermark": 0.5}
    for i in range(4):
        shard(tmp_path / "told", i, 40, **told | {"pwatermark": i / 10, "aesthetic_score": i})
    plain, all_told = (build(tmp_path / name).index for name in ("plain", "told"))
    assert plain.file.row_bytes <= 24 and all_told.file.row_bytes <= 40
    assert pickle.loads(pickle.dumps(all_told)).entry(50) == all_told.entry(50)
    assert build(tmp_path / "told").fields().width.tolist() == [70000] * len(build(tmp_path / "told"))
