"""ldm data encode: the cache of a folder, whole after kills and by several processes, and training that reads it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file

from ldm.__main__ import main
from ldm.config.errors import UserError
from ldm.data import cache
from ldm.data.cached import CachedLatents
from ldm.data.folder import FolderSource
from ldm.formats.latent_codec import load_codec
from ldm.text.encoder import TextEncoder

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photographs")
    for number in range(14):
        Image.linear_gradient("L").resize((40 + number, 36)).rotate(20 * number).convert("RGB").save(folder / f"{number:02}.png")
        (folder / f"{number:02}.txt").write_text(f"a small {'red' if number % 2 else 'blue'} circle")
    return folder


def encode(photographs: Path, model: Path, out: Path, *words: str) -> int:
    return main(["data", "encode", str(photographs), "--model", str(model), "--out", str(out), "--resolution", "32", *words])


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_latents_and_text_states_are_those_of_the_networks(photographs: Path, kl_model: Path, tmp_path: Path, capsys) -> None:
    assert encode(photographs, kl_model, tmp_path / "cache", "--text", "--flip", "--shard", "5", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    seen = FolderSource(path=str(photographs)).build("train")
    assert told["images"] == len(seen) and told["resolution"] == 32 and told["flip"]
    cache, codec, text = CachedLatents(tmp_path / "cache"), load_codec(kl_model / "vae"), TextEncoder.load(kl_model)
    index = [0, 3, 7]
    found, images = cache.load(index, index, 32, 0, False), seen.load(index, index, 32, 0, False)
    mean, std = codec.moments(images.image)
    assert std is not None and found.std is not None and found.text is not None
    torch.testing.assert_close(found.mean, mean, rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(found.std, std, rtol=2e-3, atol=2e-3)
    own = text.encode(list(images.caption))
    torch.testing.assert_close(found.text.tokens, own.tokens, rtol=2e-3, atol=2e-3)
    assert torch.equal(found.text.mask, own.mask)
    cache.require_text(text.encode)
    with pytest.raises(UserError, match="another text encoder's"):
        cache.require_text(lambda captions: TextEncoder.encode(text, [f"other {caption}" for caption in captions]))


def test_parts_in_any_order_and_stopped_anywhere_make_the_cache_of_one_call(
    photographs: Path, kl_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert encode(photographs, kl_model, tmp_path / "whole", "--shard", "3") == 0
    out, order = tmp_path / "parts", []
    capsys.readouterr()
    for part in ("2/3", "0/3"):
        assert encode(photographs, kl_model, out, "--shard", "3", "--part", part, "--json") == 0
        order.append(json.loads(capsys.readouterr().out)["missing"])
        assert not (out / "manifest.json").exists()  # nobody reads it before it is whole
    assert order == sorted(order, reverse=True) and order[-1] > 0
    commit = cache.commit

    def killed(target: Path, write: object) -> None:
        (target.with_name(f".{target.name}.partial")).mkdir()
        raise KeyboardInterrupt

    monkeypatch.setattr(cache, "commit", killed)
    assert encode(photographs, kl_model, out, "--shard", "3", "--part", "1/3") == 130
    monkeypatch.setattr(cache, "commit", commit)
    assert encode(photographs, kl_model, out, "--shard", "3", "--part", "1/3") == 0
    assert "latents of" in capsys.readouterr().out and files(out) == files(tmp_path / "whole")
    kept = {path: path.stat().st_mtime_ns for path in out.glob("shard-*/*")}
    assert encode(photographs, kl_model, out, "--shard", "3", "--part", "0/3") == 0  # queued again after all were done
    assert {path: path.stat().st_mtime_ns for path in out.glob("shard-*/*")} == kept and files(out) == files(tmp_path / "whole")
    capsys.readouterr()
    assert encode(photographs, kl_model, out, "--shard", "3", "--part", "0/3", "--seed", "1") == 2
    assert "holds a cache of another " in capsys.readouterr().err
    for wrong in ("3/3", "1", "a/b", "-1/2", "1/0"):
        assert encode(photographs, kl_model, out, f"--part={wrong}") == 2
        assert "--part: got" in capsys.readouterr().err


def test_parts_that_end_at_the_same_time_both_seal(
    photographs: Path, kl_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert encode(photographs, kl_model, tmp_path, "--shard", "5") == 0
    whole, write = files(tmp_path), cache.write_json

    def late(path: Path, value: object) -> None:
        write(path, value)
        raise FileNotFoundError(path)  # the other has renamed what both were writing

    monkeypatch.setattr(cache, "write_json", late)
    cache.seal(tmp_path)
    assert files(tmp_path) == whole


@pytest.mark.slow
def test_a_restart_goes_on_and_several_processes_write_the_same_files(photographs: Path, kl_model: Path, tmp_path: Path) -> None:
    assert encode(photographs, kl_model, tmp_path / "whole", "--shard", "4") == 0
    whole = files(tmp_path / "whole")
    # A kill between two shards and within one leaves finished shards and a partial folder.
    for name in ("shard-000001", "shard-000003"):
        for path in (tmp_path / "whole" / name).iterdir():
            path.unlink()
        (tmp_path / "whole" / name).rmdir()
    (tmp_path / "whole" / "manifest.json").unlink(missing_ok=True)
    kept = (tmp_path / "whole" / "shard-000000").stat().st_mtime_ns
    assert encode(photographs, kl_model, tmp_path / "whole", "--shard", "4") == 0
    assert files(tmp_path / "whole") == whole and (tmp_path / "whole" / "shard-000000").stat().st_mtime_ns == kept
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        "-m",
        "ldm",
        "data",
        "encode",
        str(photographs),
        "--model",
        str(kl_model),
        "--out",
        str(tmp_path / "two"),
        "--resolution",
        "32",
        "--shard",
        "4",
        "--device",
        "cpu",
    ]
    ended = subprocess.run(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr
    assert files(tmp_path / "two") == whole


def train(photographs: Path, model: Path, cache: Path, out: Path, *words: str) -> int:
    config = out.with_suffix(".yaml")
    config.write_text(
        f"init: {model}\ndata: {{kind: folder, path: {photographs}}}\nout: {out}\nworkers: 0\n"
        "models: {diffusion: {kind: latent_diffusion}}\nstages:\n"
        f"  tune: {{kind: train, model: diffusion, resolution: 32, images: 24, batch: 8, samples: 0, latents: {cache}}}\n"
    )
    return main(["train", str(config), *words])


def test_training_reads_it_and_refuses_anothers(photographs: Path, kl_model: Path, vq_model: Path, tmp_path: Path, capsys) -> None:
    assert encode(photographs, kl_model, tmp_path / "cache", "--text") == 0
    assert train(photographs, kl_model, tmp_path / "cache", tmp_path / "run") == 0
    assert load_file(tmp_path / "run/stages/tune/model/unet/diffusion_pytorch_model.safetensors")
    capsys.readouterr()
    assert train(photographs, kl_model, tmp_path / "cache", tmp_path / "again", "stages.tune.resolution=16") == 2
    assert "resolution 32, not 16" in capsys.readouterr().err
    assert train(photographs, vq_model, tmp_path / "cache", tmp_path / "other") == 2
    assert "made with autoencoder" in capsys.readouterr().err
    assert train(photographs, kl_model, tmp_path / "none", tmp_path / "nothing") == 2
    assert "no finished latent cache here" in capsys.readouterr().err


def test_training_in_buckets_reads_latents_in_buckets(photographs: Path, kl_model: Path, tmp_path: Path, capsys) -> None:
    Image.new("RGB", (80, 40)).save(photographs / "wide.png")
    (photographs / "wide.txt").write_text("a wide black picture")
    try:
        assert encode(photographs, kl_model, tmp_path / "cache", "--buckets", "--bucket-step", "16", "--max-aspect", "3", "--json") == 0
        assert [16, 48] in json.loads(capsys.readouterr().out)["shapes"]
        cache, same = tmp_path / "cache", "stages.tune.buckets={step: 16, max_aspect: 3}"
        assert train(photographs, kl_model, cache, tmp_path / "run", same) == 0
        capsys.readouterr()
        assert train(photographs, kl_model, cache, tmp_path / "squares") == 2
        assert "48x16, not squares" in capsys.readouterr().err
        assert train(photographs, kl_model, cache, tmp_path / "others", "stages.tune.buckets={step: 8}") == 2
        assert "48x16, not 24x40, 32x32, 40x24; encode again with buckets, or set the stage's buckets alike" in capsys.readouterr().err
    finally:
        for name in ("wide.png", "wide.txt"):
            (photographs / name).unlink()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--buckets", "--bucket-step", "12"], "buckets.step: got 12; the autoencoder needs a multiple of 8"),
        (["--buckets", "--max-aspect", "0.5"], "max-aspect"),
        (["--resolution", "33"], "multiple of 8"),
        (["--model", "/no/such"], "no such folder"),
        (["--images", "-1"], "images"),
    ],
)
def test_mistakes_are_one_line(words: list[str], expected: str, photographs: Path, kl_model: Path, tmp_path: Path, capsys) -> None:
    assert encode(photographs, kl_model, tmp_path / "cache", *words) == 2
    said = capsys.readouterr().err
    assert expected in said and "Traceback" not in said
    assert not (tmp_path / "cache").exists()


def test_several_captions_have_no_one_state(kl_model: Path, tmp_path: Path, capsys) -> None:
    Image.new("RGB", (40, 40)).save(tmp_path / "a.png")
    Image.new("RGB", (41, 40)).save(tmp_path / "b.png")
    rows = [{"file_name": name, "text": ["one", "two"]} for name in ("a.png", "b.png")]
    (tmp_path / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert encode(tmp_path, kl_model, tmp_path / "cache", "--text") == 2
    assert "has 2 captions" in capsys.readouterr().err
