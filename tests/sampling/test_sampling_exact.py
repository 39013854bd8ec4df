"""A picture is a function of (model, prompt, seed, size, settings): bit-equal whatever is drawn with it, and by whom."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from finished_model import CAPTIONS, SIDE

import ldm
from ldm.diffusion.process import SPACINGS
from ldm.diffusion.samplers import SAMPLERS
from ldm.distributed.processes import Processes
from ldm.families.draws import NUMBERS, PRECISIONS, Wanted
from ldm.families.latent_diffusion.engine import PRECISION
from ldm.families.latent_diffusion.family import LatentDiffusionFamily
from ldm.sampling.recipe_values import NAMES
from ldm.sampling.recipe_values import SPACINGS as TOLD

ROOT = Path(__file__).parents[2]
PAIRS = [(CAPTIONS[i % 5], 100 + i) for i in range(8)]


@pytest.fixture(scope="module", params=["kl_model", "vq_model"])
def family(request: pytest.FixtureRequest) -> LatentDiffusionFamily:
    return ldm.load(request.getfixturevalue(request.param))


def drawn(family: LatentDiffusionFamily, pairs: list[tuple[str, int]], sampler: str) -> dict[tuple[str, int], torch.Tensor]:
    images = family.sample(
        [p for p, _ in pairs], [s for _, s in pairs], Wanted(sampler=sampler, steps=3, eta=1.0 if sampler == "ddim" else 0.0)
    )
    return dict(zip(pairs, images, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_batch_sizes_orders_and_neighbours(family: LatentDiffusionFamily, sampler: str) -> None:
    alone = {pair: drawn(family, [pair], sampler)[pair] for pair in PAIRS[:4]}
    for size in (2, 3, 8):
        for start in range(0, 8, size):
            for pair, image in drawn(family, PAIRS[start : start + size], sampler).items():
                assert pair not in alone or torch.equal(image, alone[pair]), (size, pair)
    backwards = drawn(family, PAIRS[::-1], sampler)
    others = drawn(family, [("something else", 7), PAIRS[2], ("", 9), PAIRS[0], ("a (large:1.5) ring", 3)], sampler)
    for found in (backwards, others):
        assert all(torch.equal(found[pair], image) for pair, image in alone.items() if pair in found)


def test_what_is_told_without_torch_is_what_there_is() -> None:
    assert list(NAMES) == list(SAMPLERS) and TOLD == SPACINGS
    assert tuple(PRECISION) == PRECISIONS and {f.name for f in fields(Wanted)} == set(NUMBERS)


def test_processes_share_everything_once() -> None:
    for world in (1, 2, 3, 5):
        for count in (0, 1, 4, 7):
            assert [k for rank in range(world) for k in Processes(rank, world).share(count)] == list(range(count))


@pytest.mark.slow
def test_two_processes_write_the_files_of_one(kl_model: Path, tmp_path: Path) -> None:
    words = ["a red circle", "a blue ring", "a small green square", "--n", "3", "--seed", "4", "--steps", "3", "--sampler", "euler_a"]
    words += ["--model", str(kl_model), "--device", "cpu", "--json"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    several = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no"]
    several += ["--dynamo_backend", "no", "--main_process_port", "0"]
    told = {}
    for name, launcher in (("one", []), ("two", several)):
        out = tmp_path / name
        command = [sys.executable, *launcher, "sample.py", *words, "--out", str(out), "--grid", str(out / "sheet")]
        ran = subprocess.run(command, cwd=ROOT, env=environment, text=True, capture_output=True, timeout=200)
        assert ran.returncode == 0, ran.stderr
        assert ran.stderr.count("9 pictures of") == 1
        told[name] = sorted(line.replace(str(out), "") for line in ran.stdout.splitlines() if line.startswith("{"))
    one, two = ({p.name: p.read_bytes() for p in (tmp_path / name).iterdir()} for name in ("one", "two"))
    assert one.keys() == two.keys() and len(one) == 10
    assert all(one[name] == two[name] for name in one) and told["one"] == told["two"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        ["--help"],
        ["a", "--steps", "many"],
        ["a", "--sampler", "eulr"],
        ["a", "--size", "0x3"],
        ["a", "--model", "/no/such"],
        ["a", "--init", "/no/such.png"],
        ["a", "--best", "3"],
        ["a", "--colour", "red"],
        ["a", "--guidance", "nan"],
        ["a", "--outpaint", "up=3"],
    ],
    ids=lambda words: " ".join(words),
)
@pytest.mark.parametrize("verb", ["sample"])
def test_help_and_mistakes_answer_without_torch(verb: str, words: list[str], tmp_path: Path) -> None:
    code = (
        "import sys; from ldm.__main__ import main; code = main(sys.argv[1:]);print('torch' in sys.modules, 'numpy' in sys.modules, code)"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code, verb, *words],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        text=True,
        capture_output=True,
        timeout=60,
    )
    assert ran.stdout.strip().endswith(f"False False {0 if words == ['--help'] else 2}"), ran.stdout + ran.stderr


@pytest.mark.parametrize("verb", ["grid", "animate", "info"])
def test_help_of_the_other_verbs_does_without_torch(verb: str, tmp_path: Path) -> None:
    code = "import sys; from ldm.__main__ import main; print(main(sys.argv[1:]), 'torch' in sys.modules)"
    ran = subprocess.run(
        [sys.executable, "-c", code, verb, "--help"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        text=True,
        capture_output=True,
        timeout=60,
    )
    assert ran.stdout.strip().endswith("0 False"), ran.stdout + ran.stderr


def test_the_side_is_the_models(family: LatentDiffusionFamily) -> None:
    assert family.sample(["a"], [0], Wanted(steps=1)).shape == (1, SIDE, SIDE, 3)
