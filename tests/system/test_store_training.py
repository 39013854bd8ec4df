"""Two processes train on shards in a store that fails now and then as on local ones, and end together where a shard is gone."""

from __future__ import annotations

from pathlib import Path

import pytest
import several
import tiny
from stores import Fault, served
from tars import shard

pytest.importorskip("aiohttp", reason='of the extra "http"')
pytestmark = pytest.mark.slow
WORDS = [
    *tiny.only("autoencoder"),
    "stages.autoencoder.images=64",
    "stages.autoencoder.batch=8",
    "stages.autoencoder.shuffle_block=4",
    "stages.autoencoder.save_every_images=8",
    "stages.autoencoder.log_every_steps=1",
]


def data(path: object) -> list[str]:
    return [f"data={{kind: shards, path: '{path}', val_share: 0.2}}"]


def train(out: Path, path: object) -> several.Ended:
    sizes = [word for word in tiny.WORDS if not word.startswith("data.")]
    return several.train(2, *data(path), *WORDS, f"out={out}", sizes=sizes, within_s=200)


def test_a_store_that_fails_now_and_then_changes_no_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LDM_CACHE", str(tmp_path / "cache"))
    for i in range(2):
        shard(tmp_path / "shards", i, 30)
    local = train(tmp_path / "local", tmp_path / "shards")
    assert local.codes == [0, 0], local.said
    kinds: list[Fault] = [("status", 503), ("reset", 0), ("cut", 0.5), ("status", 429)]
    with served(tmp_path / "shards") as server:
        server.faults = lambda number, method, path: kinds[number // 3 % 4] if number % 3 == 0 else None
        far = train(tmp_path / "far", f"{server.url}/{{00000..00001}}.tar")
        assert far.codes == [0, 0], far.said
        assert sum(asked[0] == "GET" for asked in server.asked) > 20
    product = "stages/autoencoder/model/manifest.json"
    assert (tmp_path / "far" / product).read_bytes() == (tmp_path / "local" / product).read_bytes()


def test_no_process_gives_a_shard_up_for_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LDM_CACHE", str(tmp_path / "cache"))
    for i in range(2):
        shard(tmp_path / "shards", i, 30)

    def gone() -> Fault | None:
        """Once there is a checkpoint."""
        return ("status", 404) if list((tmp_path / "run").glob("stages/autoencoder/state/*/manifest.json")) else None

    with served(tmp_path / "shards") as server:
        server.faults = lambda number, method, path: gone() if path.endswith("00001.tar") else None
        ended = train(tmp_path / "run", f"{server.url}/{{00000..00001}}.tar")
        assert ended.codes == [2, 2], ended.said
        assert "00001.tar: cannot be read any more (not found); every process must see the same samples" in "".join(ended.said)
