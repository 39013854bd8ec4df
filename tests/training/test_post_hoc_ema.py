"""Post-hoc EMA: an average of any length out of the snapshots of two, against the average itself in float64."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from ldm.__main__ import main
from ldm.config.errors import UserError
from ldm.config.schema import build
from ldm.runs.execution import carry_out
from ldm.runs.run import Run
from ldm.training.loop import Trainer
from ldm.training.post_hoc_ema import (
    LONGEST,
    PostHocEma,
    PowerAverages,
    Snapshots,
    coefficients,
    exponent,
    keep,
    misfit,
    products,
    snapshots,
)
from ldm.training.settings import Train

UNET = "unet/diffusion_pytorch_model.safetensors"


def shares(length: float, updates: int) -> np.ndarray:
    """The exact weight of each update's parameters in a power-function average."""
    power = exponent(length) + 1
    k = np.arange(1, updates + 1, dtype=np.float64)
    return ((k / updates) ** power) - ((k - 1) / updates) ** power


def test_exponents_are_those_of_the_paper() -> None:
    assert exponent(0.05) == pytest.approx(16.97, abs=0.005) and exponent(0.10) == pytest.approx(6.94, abs=0.005)  # table of section 3.1
    for gamma in (0.0, 0.5, 3.0, 40.0):  # eq. 4 and back
        assert exponent((gamma + 1) ** 0.5 / (gamma + 2) / (gamma + 3) ** 0.5) == pytest.approx(gamma, abs=1e-5)
    assert exponent(LONGEST) == pytest.approx(0, abs=1e-6)


def test_inner_products_are_integrals() -> None:
    gamma, times = np.array([16.97, 6.94, 1.5]), np.array([40.0, 100.0, 70.0])
    s = (np.arange(400_000) + 0.5) * 100 / 400_000
    responses = [np.where(s <= t, (g + 1) * s**g / t ** (g + 1), 0) for g, t in zip(gamma, times, strict=True)]
    numeric = np.array([[(a * b).sum() * (s[1] - s[0]) for b in responses] for a in responses])
    assert products((gamma, times), (gamma, times)) == pytest.approx(numeric, rel=1e-4)


def test_an_average_is_the_weighted_sum_of_all_updates() -> None:
    parameter = nn.Parameter(torch.zeros(5))
    averages = PowerAverages([parameter], (0.05, 0.2))
    seen = []
    for step in range(60):
        with torch.no_grad():
            parameter.copy_(torch.from_numpy(np.random.default_rng(step).normal(size=5)))
        averages.update()
        seen.append(parameter.detach().double().numpy().copy())
    for length, [found] in zip(averages.lengths, averages.averages, strict=True):
        assert found.double().numpy() == pytest.approx(shares(length, 60) @ np.stack(seen), abs=1e-6)


@pytest.mark.parametrize(("wanted", "within"), [(0.05, 1e-6), (0.1, 1e-6), (0.03, 0.03), (0.075, 0.003), (0.15, 0.01), (0.2, 0.02)])
def test_any_length_is_made_of_the_snapshots_of_two(tmp_path: Path, wanted: float, within: float) -> None:
    updates, every = 2000, 100
    walk = np.cumsum(np.random.default_rng(0).normal(size=(updates, 64)), 0)  # weights that drift
    for at in range(every, updates + 1, every):
        own = {f"{length}.0": torch.from_numpy(shares(length, at) @ walk[:at]) for length in (0.05, 0.1)}
        keep(tmp_path, at, own, (0.05, 0.1), at)
    made = Snapshots(tmp_path)
    direct = shares(wanted, updates) @ walk
    [found] = made.made(wanted)
    spread = np.linalg.norm(direct - walk[-1])  # by how much averaging moves the weights at all
    assert np.linalg.norm(found.numpy() - direct) < max(within, 1e-9) * spread
    assert made.misfit(wanted) < max(2 * within, 1e-6) and made.images == updates


def test_shares_add_up_and_a_stored_one_is_itself() -> None:
    found = coefficients([0.05, 0.1, 0.05, 0.1], [50, 50, 100, 100], 0.1, 100)
    assert found == pytest.approx([0, 0, 0, 1], abs=1e-9)
    assert coefficients([0.05, 0.1] * 3, [30, 30, 60, 60, 90, 90], 0.17, 90).sum() == pytest.approx(1)
    assert misfit([0.05, 0.1], [100, 100], 0.01, 100) > 0.5  # what cannot be told is not


def test_lengths_that_cannot_be_are_refused(tmp_path: Path) -> None:
    for lengths in ((0.1,), (0.1, 0.1), (0.1, 0.3)):
        with pytest.raises(UserError, match=r"post_hoc_ema.lengths: got"):
            PostHocEma(lengths=lengths)
    keep(tmp_path, 4, {f"{length}.0": torch.zeros(1) for length in (0.05, 0.1)}, (0.05, 0.1), 4)
    with pytest.raises(UserError, match=r"length: got 0.4; sigma_rel lies between 0 and 0.2887"):
        Snapshots(tmp_path).made(0.4)
    (tmp_path / "ema" / "images-000000000004" / "0.1.safetensors").write_bytes(b"x")
    with pytest.raises(UserError, match=r"0.1.safetensors.*remove"):
        Snapshots(tmp_path).made(0.08)


def test_without_it_a_stage_is_the_same_stage() -> None:
    stage = Train(model="a", images=8, resolution=8)
    assert "post_hoc_ema" not in stage.identity()
    assert "post_hoc_ema" in Train(model="a", images=8, resolution=8, post_hoc_ema=PostHocEma()).identity()


def run(base: Path, **fields: Any) -> Run:
    stage = {"kind": "train", "model": "diffusion", "images": 48, "batch": 4, "resolution": 32, "samples": 0, **fields}
    models = {"diffusion": {"kind": "latent_diffusion"}}
    data = {"kind": "scenes", "images": 12, "val": 6}
    return build({"init": str(base), "data": data, "workers": 0, "models": models, "stages": {"tune": stage}}, Run, "test")


ASKED: dict[str, Any] = {"post_hoc_ema": {"lengths": [0.1, 0.2], "every_images": 8}, "save_every_images": 16, "save_beside": False}


@pytest.fixture(scope="module")
def trained(kl_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[list[torch.Tensor]]]:
    """A run with averages, killed once on the way, and the weights after each update."""
    out, seen = tmp_path_factory.mktemp("averages") / "run", []
    real, kept = PowerAverages.update, Trainer._keep_averages
    with pytest.MonkeyPatch.context() as patched:

        def update(self: PowerAverages) -> None:
            real(self)
            del seen[self.updates - 1 :]
            seen.append([p.detach().double().clone() for p in self.parameters])

        def killed(self: Trainer) -> None:
            kept(self)
            if self.step == 6:  # the newest checkpoint is of step 4
                raise KeyboardInterrupt

        patched.setattr(PowerAverages, "update", update)
        with patched.context() as once:
            once.setattr(Trainer, "_keep_averages", killed)
            with pytest.raises(KeyboardInterrupt):
                carry_out(run(kl_model, **ASKED), out)
        assert [path.name[-2:] for path in snapshots(out / "stages/tune")] == ["08", "16", "24"]
        assert carry_out(run(kl_model, **ASKED), out) == 0
    return out, seen


def test_a_killed_stage_leaves_the_same_snapshots(trained: tuple[Path, list[list[torch.Tensor]]]) -> None:
    out, seen = trained
    found = snapshots(out / "stages/tune")
    assert len(seen) == 12 and [int(path.name.partition("-")[2]) for path in found] == [8, 16, 24, 32, 40, 48]
    for path, updates in ((found[2], 6), (found[-1], 12)):
        for length in (0.1, 0.2):
            stored = load_file(path / f"{length}.safetensors")
            for i in range(len(seen[0])):
                direct = sum(share * weights[i] for share, weights in zip(shares(length, updates), seen, strict=False))
                assert torch.allclose(stored[str(i)].double(), torch.as_tensor(direct), atol=1e-6)


@pytest.mark.slow
def test_the_verb_writes_a_model_and_measures(trained: tuple[Path, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, seen = trained
    assert main(["ema", str(out), "--length", "0.1", "--out", str(tmp_path / "model"), "--stage", "tune"]) == 0
    written = load_file(tmp_path / "model" / UNET)
    direct = [sum(share * weights[i] for share, weights in zip(shares(0.1, 12), seen, strict=True)) for i in range(len(seen[0]))]
    wanted = sorted(float(value.sum()) for value in direct)
    assert sorted(float(value.double().sum()) for value in written.values()) == pytest.approx(wanted, abs=1e-3)
    assert main(["ema", str(out), "--sweep", "0.1,0.2", "--n", "1"]) == 0
    said = capsys.readouterr().out
    assert "length 0.1, misfit 0, train" in said and "bind held out" in said
    page = (out / "report.html").read_text()
    assert "EMA length" in page and "loss over the length of the EMA" in page and "bind over the length of the EMA" in page
    assert main(["ema", str(out), "--length", "0.4"]) == 2 and main(["ema", str(out), "--length", "0.1", "--stage", "x"]) == 2
    err = capsys.readouterr().err
    assert "sigma_rel lies between" in err and "stage: got x; there are tune" in err and "Traceback" not in err


@pytest.mark.slow
def test_an_extended_stage_goes_on_with_its_averages(trained: tuple[Path, Any], kl_model: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(trained[0], out)
    assert carry_out(run(kl_model, **{**ASKED, "images": 64}), out, extend=True) == 0
    found = Snapshots(out / "stages/tune")
    assert [meta.images for meta in found.metas] == [8, 16, 24, 32, 40, 48, 56, 64] and [meta.updates for meta in found.metas][-1] == 16
    assert len(snapshots(out / "stages/tune.replaced-1")) == 6
