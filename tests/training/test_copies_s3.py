"""A run's copies in S3: a real S3 server on this machine (moto's), by the package that users have."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from ldm.config.errors import UserError
from ldm.data import remote
from ldm.training.checkpoint import Meta, newest_valid, save_state
from ldm.training.copies import Copies, begin, files_below

s3fs = pytest.importorskip("s3fs", reason='of the extra "s3"')
moto = pytest.importorskip("moto.server", reason='moto\'s S3 server is of the extra "test"')


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """An empty bucket, as s3://NAME."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    endpoint = "http://{}:{}".format(*server.get_host_and_port())
    told = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1", "AWS_ENDPOINT_URL": endpoint}
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(remote, "WAIT_S", 0.01)
    monkeypatch.setattr(remote, "PATIENCE_S", 2.0)
    s3fs.S3FileSystem.clear_instance_cache()
    files = s3fs.S3FileSystem()
    files.makedirs("runs", exist_ok=True)
    yield "s3://runs"
    files.rm("runs", recursive=True)  # which the next server would still have
    s3fs.S3FileSystem.clear_instance_cache()
    server.stop()


def test_a_run_is_copied_into_a_bucket_and_goes_on_from_there(bucket: str, tmp_path: Path) -> None:
    url, said = f"{bucket}/sd1", []  # type: ignore[var-annotated]
    here, elsewhere = tmp_path / "here", tmp_path / "elsewhere"
    stage = here / "stages" / "tune"
    stage.mkdir(parents=True)
    (here / "config.yaml").write_text("name: x\n")
    (here / "log.jsonl").write_text("{}\n")
    (stage / "identity.json").write_text(json.dumps({"key": "k"}))
    begin(here, url)
    copies = Copies(here, url, said.append)
    for images in (4, 8, 12):
        weights = {"model": {"w": torch.full((1000,), float(images))}}
        copies.state(save_state(stage / "state", images, weights, Meta(key="k", step=images, images=images), 9), keep=1)
        copies.close()
        copies = Copies(here, url, said.append)
    assert {name.split("/")[0] for name in files_below(f"{url}/stages/tune/state")} == {"images-000000000012"}, "keep counts there too"
    elsewhere.mkdir()
    (elsewhere / "config.yaml").write_text("name: x\n")
    begin(elsewhere, url)
    other = Copies(elsewhere, url, said.append)
    other.finished("tune", "k", lambda folder: None)
    other.newest("tune", "k", 1)
    other.close()
    found = newest_valid(elsewhere / "stages" / "tune" / "state", print)
    assert found is not None and torch.equal(found[1]["model"]["w"], torch.full((1000,), 12.0))
    assert said[3:] == [f"tune: the checkpoint images-000000000012, from {url}/stages/tune"]


def test_a_bucket_that_is_not_there_is_refused_before_any_work(bucket: str, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("name: x\n")
    with pytest.raises(UserError, match=r"mirror: s3://nowhere/x cannot be used \(.*\); correct it"):
        begin(tmp_path, "s3://nowhere/x")
    assert not s3fs.S3FileSystem(skip_instance_cache=True).exists("nowhere"), "nor is it made"
