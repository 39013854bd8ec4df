"""A run goes on from its copies where its folder is gone, and ends with the bits of one that was never stopped."""

from __future__ import annotations

import shutil
import signal
import time
from pathlib import Path

import pytest
import tiny

pytestmark = pytest.mark.slow
WORDS = [
    *tiny.only("text", "autoencoder"),
    "stages.autoencoder.images=160",
    "stages.autoencoder.save_every_images=32",
    "stages.autoencoder.log_every_steps=1",
]


def weights(out: Path) -> list[bytes]:
    return [(out / "stages" / stage / "model" / "manifest.json").read_bytes() for stage in ("text", "autoencoder")]


def test_a_run_goes_on_without_its_folder(tmp_path: Path) -> None:
    whole, out, mirror = tmp_path / "whole", tmp_path / "run", tmp_path / "store"
    tiny.train(f"out={whole}", *WORDS)
    words = [*WORDS, f"out={out}", f"mirror=file://{mirror}"]
    process = tiny.start(*words)
    until = time.monotonic() + 90
    while time.monotonic() < until and process.poll() is None and not list(mirror.glob("stages/autoencoder/state/*/manifest.json")):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert list(mirror.glob("stages/autoencoder/state/*/manifest.json")) and (mirror / "stages/text/done.json").exists()
    shutil.rmtree(out)
    said = tiny.train(*words)
    assert "text: finished, from file://" in said and "text: done already" in said, said
    assert "autoencoder: the checkpoint images-" in said and "autoencoder: going on from" in said, said
    assert weights(out) == weights(whole)
    assert (mirror / "stages/autoencoder/done.json").exists() and not (mirror / "stages/autoencoder/state").exists()
    assert "done already" in tiny.train(*words, f"out={tmp_path / 'third'}")
    assert weights(tmp_path / "third") == weights(whole)


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("{out}", "give a URL such as s3://bucket/NAME"),
        ("file://{out}/store", "lie in each other"),
        ("http://127.0.0.1:9/run", "http cannot be written"),
        ("nothing://x", "nothing is no known protocol"),
    ],
)
def test_what_no_mirror_can_be_is_refused_before_any_work(tmp_path: Path, capsys: pytest.CaptureFixture[str], url: str, said: str) -> None:
    from ldm.__main__ import main

    words = ["train", "configs/quickstart.yaml", f"out={tmp_path}", f"mirror={url.format(out=tmp_path)}"]
    for more in ([], ["--plan"]):
        assert main([*words, *more]) == 2
        assert (told := capsys.readouterr().err).count("mirror: ") == 1 and said in told, told
    assert not list(tmp_path.iterdir())
