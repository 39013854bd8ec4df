"""Shards in S3: a real S3 server on this machine (moto's), by the packages that users have."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tars import shard

from ldm.config.errors import UserError
from ldm.data import remote, storage
from ldm.data.loader import batches
from ldm.data.order import BlockBatches
from ldm.data.shard_index import NAME, open_index, upload
from ldm.data.shards import ShardsSource

s3fs = pytest.importorskip("s3fs", reason='of the extra "s3"')
moto = pytest.importorskip("moto.server", reason='moto\'s S3 server is of the extra "test"')


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    """The server's address."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    yield "http://{}:{}".format(*server.get_host_and_port())
    server.stop()


@pytest.fixture
def bucket(endpoint, tmp_path, monkeypatch) -> Iterator[str]:
    """A bucket with two shards of 20 samples, as s3://NAME; the same lie in the folder shards."""
    for name, value in {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    monkeypatch.setenv("LDM_CACHE", str(tmp_path / "cache"))
    s3fs.S3FileSystem.clear_instance_cache()
    files = s3fs.S3FileSystem()
    name = tmp_path.name.lower().replace("_", "-")
    files.mkdir(name)
    for i in range(2):
        files.put_file(str(shard(tmp_path / "shards", i, 20)), f"{name}/set/{i:05d}.tar")
    yield f"s3://{name}"
    files.rm(name, recursive=True)
    s3fs.S3FileSystem.clear_instance_cache()


def test_a_bucket_gives_what_the_folder_gives(bucket, tmp_path):
    local = ShardsSource(path=str(tmp_path / "shards")).build("train")
    for path in (f"{bucket}/set", f"{bucket}/set/*.tar", f"{bucket}/set/{{00000..00001}}.tar"):
        far = ShardsSource(path=path).build("train")
        assert far.fingerprint() == local.fingerprint()
    order = BlockBatches(0, len(far), 2, [16], 8)
    both = (batches(data, seed=0, batch=2, order=order, stop=20, workers=workers) for data, workers in ((far, 2), (local, 0)))
    assert all(torch.equal(one.image, other.image) for one, other in zip(*both, strict=True))


def test_many_of_a_folder_are_listed_and_not_asked_for_one_by_one(bucket, monkeypatch):
    files, path = remote.system(f"{bucket}/set")
    for i in range(100):
        files.pipe(f"{path}/{i:05d}.bin", b"x" * i)
    monkeypatch.setattr(remote, "_size_of", None)
    found = storage.find_stats(f"{bucket}/set/{{00000..00099}}.bin", ".bin")
    assert [stat.bytes for stat in found.values()] == list(range(100))
    monkeypatch.undo()


def test_what_is_not_there_is_told_at_once(bucket, monkeypatch, caplog):
    for path in (f"{bucket}/set/{{00000..00002}}.tar", f"{bucket}-none/a.tar", f"{bucket}/none"):
        with pytest.raises(UserError, match=r"does not exist|no \.tar files at") as told:
            ShardsSource(path=path).build("train")
        assert "\n" not in str(told.value)
    assert "tried again" not in caplog.text
    far = ShardsSource(path=f"{bucket}/set").build("train")
    remote.system(bucket)[0].rm(f"{bucket}/set/00001.tar")
    with pytest.raises(UserError, match=r"set/00001\.tar: cannot be read any more \(.*404 not found"):
        far.load([len(far) - 1], [0], 16, 0, False)


def test_a_lack_of_keys_is_one_line(bucket, monkeypatch, tmp_path):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(UserError, match="AWS_ACCESS_KEY_ID") as told:
        ShardsSource(path=f"{bucket}/set/00000.tar").build("train")
    assert "\n" not in str(told.value)
    monkeypatch.undo()


def test_an_index_is_put_beside_its_shards_and_taken_from_there(bucket, tmp_path, monkeypatch):
    assert upload(open_index(f"{bucket}/set")) == f"{bucket}/set/{NAME}"
    monkeypatch.setenv("LDM_CACHE", str(tmp_path / "other"))
    monkeypatch.setattr("ldm.data.shard_index.read_shard", None)
    assert len(open_index(f"{bucket}/set")) == 40
    assert Path(tmp_path / "other").is_dir()
