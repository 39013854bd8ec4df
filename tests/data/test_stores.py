"""Shards in stores: what fails for a while is tried again, what is refused is told at once, and samples are those of the local files."""

from __future__ import annotations

import errno
import logging
import os
import time
from collections.abc import Iterator
from email.utils import formatdate

import numpy as np
import pytest
import torch
from stores import Server, served
from tars import shard

from ldm.cli.data import main as data_verb
from ldm.config.errors import UserError
from ldm.data import remote, storage
from ldm.data.loader import batches, ordered
from ldm.data.order import BlockBatches
from ldm.data.read_ahead import GAP, Place, spans_of
from ldm.data.shard_index import NAME, open_index
from ldm.data.shards import ShardsData, ShardsSource

pytest.importorskip("aiohttp", reason='of the extra "http"')


@pytest.fixture
def store(tmp_path, monkeypatch) -> Iterator[Server]:
    """Three shards of 40 samples behind a web server, with little patience."""
    monkeypatch.setattr(remote, "WAIT_S", 0.01)
    monkeypatch.setenv("LDM_CACHE", str(tmp_path / "cache"))
    for i in range(3):
        shard(tmp_path / "shards", i, 40)
    with served(tmp_path / "shards") as server:
        yield server


def of(path: object, split: str = "train", **options: object) -> ShardsData:
    return ShardsSource(path=str(path), **options).build(split)  # type: ignore[arg-type]


def test_a_store_gives_what_the_folder_gives(store):
    local, far = of(store.folder), of(f"{store.url}/{{00000..00002}}.tar")
    assert far.fingerprint() == local.fingerprint() and len(far) == len(local)
    assert torch.equal(far.load([5, 90], [1, 2], 16, 0, False).image, local.load([5, 90], [1, 2], 16, 0, False).image)
    assert of(f"{store.url}/{{00000..00002}}.tar", "val").fingerprint() == of(store.folder, "val").fingerprint()


@pytest.mark.parametrize(("fault", "much"), [("reset", 0), ("status", 503), ("status", 429), ("status", 500), ("cut", 0.5), ("cut", 0.0)])
def test_what_passes_is_tried_again_and_nothing_is_lost(store, fault, much, caplog):
    local = of(store.folder)
    store.faults = lambda number, method, path: (fault, much) if number % 3 != 2 else None  # two of three
    with caplog.at_level(logging.WARNING):
        far = of(f"{store.url}/{{00000..00002}}.tar")
    assert far.fingerprint() == local.fingerprint()  # every byte of every shard
    index = list(range(0, len(far), 9))
    assert torch.equal(far.load(index, index, 16, 0, False).image, local.load(index, index, 16, 0, False).image)
    assert not far.replaced and "tried again for up to" in caplog.text


@pytest.mark.parametrize(
    ("status", "said"), [(404, "not found"), (410, "410 "), (403, "403 access refused"), (401, "401 not authorised"), (400, "400 ")]
)
def test_what_stays_is_told_at_once(store, status, said):
    far = of(f"{store.url}/{{00000..00002}}.tar")
    before = len(store.asked)
    store.faults = lambda number, method, path: ("status", status)
    with pytest.raises(UserError, match=rf"0000\d\.tar: cannot be read any more \(.*{said}.*every process must see") as told:
        far.load([3], [3], 16, 0, False)
    assert "\n" not in str(told.value) and "tried" not in str(told.value) and len(store.asked) == before + 1
    with pytest.raises(UserError, match=r"00000\.tar (does not exist|cannot be read: .*" + str(status) + ")"):
        of(f"{store.url}/{{00000..00002}}.tar")


def test_patience_ends_with_one_line(store, monkeypatch):
    far = of(f"{store.url}/{{00000..00002}}.tar")
    monkeypatch.setattr(remote, "PATIENCE_S", 0.3)
    store.faults = lambda number, method, path: ("status", 503)
    with pytest.raises(UserError, match=r"cannot be read any more \(503 service unavailable; tried \d+ times in 0 s\)") as told:
        far.load([3], [3], 16, 0, False)
    assert "\n" not in str(told.value) and not far.replaced


def test_a_store_that_asks_to_wait_is_waited_for(store, monkeypatch):
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    date = formatdate(time.time() + 9, usegmt=True)
    for told, least, most in (("7", 7, 7), (date, 7, 9), ("100000", 30, 30), ("soon", 0, 0.02), ("-5", 0, 0.02)):
        store.headers = {"Retry-After": told}
        once = len(store.asked)
        store.faults = lambda number, method, path, once=once: ("status", 503.0) if number == once else None
        slept.clear()
        assert len(remote.read(f"{store.url}/00000.tar", 0, 10)) == 10
        assert least <= max(slept) <= most, told


def test_a_silent_store_is_a_failure_that_passes(store, monkeypatch):
    monkeypatch.setattr(remote, "SILENCE_S", 0.2)  # is of another file system than the one with the usual limits
    answers = iter([("silent", 1.0), ("silent", 1.0), None])
    store.faults = lambda number, method, path: next(answers)
    assert len(remote.read(f"{store.url}/00000.tar", 0, 10)) == 10 and len(store.asked) == 3


def test_a_server_without_ranges_or_lengths_is_refused(store, capsys):
    store.faults = lambda number, method, path: ("no ranges", 0)
    with pytest.raises(OSError, match=r"sends \d+ bytes where 100 are asked for: it knows no Range requests"):
        remote.read(f"{store.url}/00000.tar", 0, 100)
    before = store.sent
    for verb in ("index", "check"):
        with pytest.raises(
            UserError, match=r"^data\.path: http://[^ ]*/00000\.tar cannot be read: the server knows no Range requests"
        ) as told:
            data_verb([verb, f"{store.url}/{{00000..00002}}.tar"])
        assert "\n" not in str(told.value) and not capsys.readouterr().out
    assert all(path == "/00000.tar" for method, path, _ in store.asked if method == "GET") and before < 10**6


def test_whether_a_store_can_be_written_is_tried_before_any_shard_is_read(tmp_path, monkeypatch, capsys):
    import fsspec

    monkeypatch.setenv("LDM_CACHE", str(tmp_path / "cache"))
    memory = fsspec.filesystem("memory")
    memory.pipe("/shelf/0.tar", shard(tmp_path / "shards", 0, 4).read_bytes())
    try:
        with monkeypatch.context() as refusing:
            refusing.setattr(type(memory), "put_file", lambda *words, **more: (_ for _ in ()).throw(PermissionError(13, "Access Denied")))
            with pytest.raises(UserError, match=r"--upload: memory:///shelf/ldm-index\.bin cannot be written \(access refused"):
                data_verb(["index", "memory://shelf", "--upload"])
            assert not capsys.readouterr().out
        assert data_verb(["index", "memory://shelf", "--upload"]) == 0
        assert sorted(memory.find("/shelf")) == ["/shelf/0.tar", f"/shelf/{NAME}"]
    finally:
        memory.rm("/shelf", recursive=True)


def test_a_shard_that_became_shorter_is_told_without_waiting(store):
    far = of(f"{store.url}/{{00000..00002}}.tar")
    file = store.folder / "00000.tar"
    os.truncate(file, 20_000)
    with pytest.raises(UserError, match=r"00000\.tar: cannot be read any more \((it has 20000 bytes|416)"):
        far.load([30], [30], 16, 0, False)
    with pytest.raises(UserError, match=r"00000\.tar: 20000 bytes, but \d+ when it was indexed"):
        of(f"{store.url}/{{00000..00002}}.tar")


def test_no_host_no_scheme_and_no_package_are_one_line(monkeypatch):
    monkeypatch.setattr(remote, "PATIENCE_S", 0.0)
    with pytest.raises(UserError, match=r"cannot be read: connection .*tried 1 times") as told:
        storage.find("http://127.0.0.1:9/{0..1}.tar", ".tar")
    assert "\n" not in str(told.value)
    with pytest.raises(UserError, match=r"nothing://x/a\.tar cannot be opened"):
        storage.find("nothing://x/a.tar", ".tar")


def test_shards_are_looked_at_at_the_same_time(store):
    store.delay_s = 0.05
    for i in range(3, 40):
        os.link(store.folder / "00000.tar", store.folder / f"{i:05d}.tar")
    assert len(storage.find_stats(f"{store.url}/{{00000..00039}}.tar", ".tar")) == 40
    assert store.most > 8 and len(store.asked) == 40


def test_blocks_are_read_by_one_request_each_and_are_the_same_samples(store):
    far, local = of(f"{store.url}/{{00000..00002}}.tar"), of(store.folder)
    order = BlockBatches(0, len(far), 4, [16], 16)
    store.asked.clear()
    steps, each = 64, {"seed": 0, "batch": 4, "order": order, "stop": 64}
    seen = list(batches(far, workers=2, **each))
    assert all(torch.equal(a.image, b.image) and a.caption == b.caption for a, b in zip(seen, batches(local, **each), strict=True))
    loaded = steps * 4
    # A block of 16 is one request, two where it passes a shard's end or the data's; gaps of held-out samples are read along.
    assert len(store.asked) <= 2.2 * loaded / 16 and far._ahead.held == 0
    store.asked.clear()
    for _ in batches(far, workers=2, seed=0, batch=4, resolution=16, stop=16):
        pass
    assert len(store.asked) == 64  # one each without blocks


def test_a_run_goes_on_in_the_middle_of_a_block(store):
    far = of(f"{store.url}/{{00000..00002}}.tar")
    whole = [b.image for b in batches(far, seed=5, batch=4, order=BlockBatches(5, len(far), 4, [16], 16), stop=40, workers=2)]
    for rank in (0, 1):
        rest = batches(far, seed=5, batch=4, order=BlockBatches(5, len(far), 4, [16], 16), start=21, stop=40, rank=(rank, 2))
        assert all(torch.equal(one.image, want[2 * rank : 2 * rank + 2]) for one, want in zip(rest, whole[21:], strict=True))


def test_bits_that_turn_on_their_way_are_asked_for_again(store):
    far, local = of(f"{store.url}/{{00000..00002}}.tar"), of(store.folder)
    far.ahead(list(range(8)))
    far._ahead._of[far._row(0)][0].data.result()
    store.faults = lambda number, method, path: ("turned", 0)
    far.ahead([20, 21])
    far._ahead._of[far._row(20)][0].data.result()
    store.faults = lambda number, method, path: None
    assert torch.equal(far.load([20, 0], [0, 1], 16, 0, False).image, local.load([20, 0], [0, 1], 16, 0, False).image)
    assert not far.replaced


def test_a_sample_that_is_passed_over_is_let_go(store):
    far = of(f"{store.url}/{{00000..00002}}.tar")
    far.replaced[far.name(1)] = "too slow"
    far.ahead([0, 1])
    far.load([0, 1], [0, 1], 16, 0, False)
    assert far._ahead.held == 0


def test_requests_are_as_few_as_gaps_and_lengths_allow():
    near, apart, large = 1000, GAP + 1, 2**24
    places = [Place(0, 0, 0, 100), Place(1, 0, 100 + near, 100), Place(2, 0, 1200 + apart, 100), Place(3, 1, 1300 + apart, 100)]
    spans = spans_of(places[::-1])
    assert [(s.shard, s.start, s.end, s.rows) for s in spans] == [
        (0, 0, 1200, [0, 1]),
        (0, 1200 + apart, 1300 + apart, [2]),
        (1, 1300 + apart, 1400 + apart, [3]),
    ]
    assert [len(s.rows) for s in spans_of([Place(i, 0, i * large, large) for i in range(5)])] == [2, 2, 1]


@pytest.mark.slow
def test_a_slow_store_is_no_slow_sample_and_no_stall(store, monkeypatch):
    far = of(f"{store.url}/{{00000..00002}}.tar", max_seconds=3)
    store.delay_s = 5.0
    assert list(far.load([1], [1], 16, 0, False).caption) == far.all_captions([1])[0] and not far.replaced
    (found,) = next(ordered(iter([[lambda: far.load([2], [2], 16, 0, False)]]), workers=1, stalled_s=3))
    assert list(found.caption) == far.all_captions([2])[0]
    assert not remote.under_way()


def test_the_index_beside_the_shards_serves_another_machine(tmp_path, monkeypatch):
    import fsspec

    memory = fsspec.filesystem("memory")
    for i in range(2):
        memory.pipe(f"/shelf/{i:05d}.tar", shard(tmp_path, i, 6).read_bytes())
    try:
        monkeypatch.setenv("LDM_CACHE", str(tmp_path / "one"))
        assert data_verb(["index", "memory://shelf", "--upload"]) == 0 and memory.exists(f"/shelf/{NAME}")
        monkeypatch.setenv("LDM_CACHE", str(tmp_path / "other"))
        monkeypatch.setattr("ldm.data.shard_index.read_shard", None)  # no shard is read
        assert len(open_index("memory://shelf")) == 12
        monkeypatch.undo()
        monkeypatch.setenv("LDM_CACHE", str(tmp_path / "other"))
        memory.pipe("/shelf/00002.tar", shard(tmp_path, 2, 6).read_bytes())
        assert len(open_index("memory://shelf")) == 18
        memory.pipe(f"/shelf/{NAME}", b"no index" * 100)
        monkeypatch.setenv("LDM_CACHE", str(tmp_path / "third"))
        with pytest.raises(UserError, match="index beside the shards is damaged"):
            open_index("memory://shelf")
    finally:
        memory.rm("/shelf", recursive=True)
    with pytest.raises(UserError, match="--upload: is for shards in a store"):
        data_verb(["index", str(tmp_path), "--upload"])


@pytest.mark.parametrize(
    ("error", "passes"),
    [
        (ConnectionResetError(errno.ECONNRESET, "reset"), True),
        (TimeoutError(), True),
        (OSError(errno.EIO, "Input/output error"), True),
        (OSError(errno.EBUSY, "Please reduce your request rate"), True),
        (FileNotFoundError(errno.ENOENT, "No such key"), False),
        (PermissionError(errno.EACCES, "Access Denied"), False),
        (OSError(errno.EINVAL, "Invalid argument"), False),
        (FileExistsError(errno.EEXIST, "File exists"), False),
        (NotADirectoryError(errno.ENOTDIR, "Not a directory"), False),
        (OSError(errno.ENOSPC, "No space left on device"), False),
        (ValueError("no bucket"), False),
    ],
)
def test_failures_have_a_kind(error, passes):
    found = remote.failure_of(error)
    assert found is not None and found.passes is passes
    assert remote.failure_of(TypeError("a mistake")) is None


def test_what_could_not_be_looked_at_is_not_taken_for_missing(store):
    store.faults = lambda number, method, path: ("status", 503) if number < 4 else None  # fsspec says FileNotFoundError of it
    assert remote.size(f"{store.url}/00000.tar") == (store.folder / "00000.tar").stat().st_size


def test_a_stream_is_the_file(store, monkeypatch):
    monkeypatch.setattr(remote, "CHUNK", 10_000)
    whole = (store.folder / "00000.tar").read_bytes()
    store.faults = lambda number, method, path: ("cut", 0.3) if number % 2 else None
    with remote.stream(f"{store.url}/00000.tar") as stream:
        parts = [stream.read(n) for n in (1, 700, 25_000)]
        assert b"".join(parts) + stream.read() == whole and stream.read(1) == b""
    rng = np.random.default_rng(0)
    for at, count in rng.integers(0, len(whole) // 2, (20, 2)).tolist():
        assert remote.read(f"{store.url}/00000.tar", at, count) == whole[at : at + count]
