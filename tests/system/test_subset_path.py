"""docs/finetune.md followed from a table of links: curated, fetched, checked, encoded; a LoRA learned, sampled and opened in diffusers."""

from __future__ import annotations

import json
import shutil
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pyarrow as arrow
import pyarrow.parquet as parquet
import pytest
from PIL import Image
from pipelines import pipeline_folder
from tars import painted

from ldm.__main__ import main

ROOT = Path(__file__).parents[2]


class Pictures(BaseHTTPRequestHandler):
    """/N.jpg is picture N; every seventh link is dead."""

    def do_GET(self) -> None:
        """Answer."""
        number = int(self.path.strip("/").removesuffix(".jpg"))
        if number % 7 == 0:
            self.send_error(404)
            return
        data = painted(number, (48, 40))
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing."""


def table(file: Path, server: str) -> None:
    """Forty links as LAION's tables have them: some too small, ugly, marked, unsafe or there twice."""
    numbers = [*range(36), 3, 4, 5, 6]
    rows = {
        "URL": [f"{server}/{n}.jpg" for n in numbers],
        "TEXT": [f"picture {n}" for n in numbers],
        "WIDTH": [300 if n == 8 else 900 for n in numbers],
        "HEIGHT": [700] * 40,
        "AESTHETIC_SCORE": [4.0 if n == 9 else 6.0 for n in numbers],
        "pwatermark": [0.9 if n == 10 else 0.1 for n in numbers],
        "punsafe": [0.8 if n == 11 else 0.0 for n in numbers],
    }
    parquet.write_table(arrow.table(rows), file)


def test_from_a_table_of_links_to_a_lora_in_diffusers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from diffusers import StableDiffusionPipeline

    monkeypatch.chdir(tmp_path)
    shutil.copytree(ROOT / "configs", "configs")
    pipeline_folder(Path("base"))
    Path("laion").mkdir()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Pictures)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    table(Path("laion/0.parquet"), f"http://127.0.0.1:{server.server_port}")
    program = Path("img2dataset")
    program.write_text(f'#!/bin/sh\nexec {sys.executable} {ROOT / "tests" / "data" / "downloader.py"} "$@"\n')
    program.chmod(0o755)

    rules = ["--subset", "improved-aesthetics", "--max-unsafe", "0.5", "--unique", "url"]
    assert main(["data", "curate", "laion/0.parquet", "--out", "curated", *rules, "--json"]) == 0
    audit = json.loads(capsys.readouterr().out)
    assert [rule["removed"] for rule in audit["rules"]] == [1, 1, 1, 1, 4] and audit["kept"] == 32

    fetch = ["data", "fetch", "curated/train.parquet", "--out", "shards", "--img2dataset", "./img2dataset", "--shard", "12", "--json"]
    fetch += ["--allow-private"]  # the links lead to a server of this machine
    assert main(fetch) == 0
    server.shutdown()
    told = json.loads(capsys.readouterr().out)
    assert told["links"] == 32 and told["pictures"] == 26 and not told["wrong"]  # 0, 7, 14 ... are dead

    assert main(["data", "check", "shards", "--resolution", "32", "--html", "shards.html", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["images"] == 26 and Path("shards.html").stat().st_size > 10_000

    assert main(["data", "encode", "shards", "--model", "base/model", "--resolution", "32", "--out", "latents-32"]) == 0
    assert "25 pictures" in capsys.readouterr().out

    words = ["init=base/model", "data={kind: shards, path: shards}", "stages.evaluation=null", "stages.latents.resolution=32"]
    lora = {"resolution": 32, "images": 16, "batch": 4, "samples": 0, "optim.warmup_images": 0}
    words += [f"stages.lora.{name}={value}" for name, value in lora.items()]
    assert main(["train", "configs/finetune-lora.yaml", *words, "name=mine", "models.diffusion.adapt.targets=[to_k,conv1]"]) == 0
    kohya = Path("runs/mine/lora/kohya.safetensors")
    draw = ["picture 3", "--steps", "2", "--device", "cpu", "--size", "32x32"]
    assert main(["sample", *draw, "--model", "runs/mine", "--out", "merged"]) == 0
    assert main(["sample", *draw, "--model", "base/model", "--lora", str(kohya), "--out", "added"]) == 0
    merged, added = (np.asarray(Image.open(next(Path(name).glob("*.png")))) for name in ("merged", "added"))
    assert (merged == added).all()
    pipeline = StableDiffusionPipeline.from_pretrained("base/model")
    before = len(pipeline.unet.state_dict())
    pipeline.load_lora_weights("runs/mine/lora")
    assert len(pipeline.unet.state_dict()) > before
