"""The doctor finds what is missing, broken or scarce, and says how to mend it."""

from __future__ import annotations

import json
import re
import shutil
import sys
import tomllib
from collections import namedtuple
from pathlib import Path

import pytest

from ldm.__main__ import main
from ldm.cli import doctor

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two packages instead of all."""
    monkeypatch.setattr(doctor, "NEEDED", {"torch": "everything", "yaml": "configuration"})
    monkeypatch.setattr(doctor, "OPTIONAL", {"surely_absent": "nothing"})


def test_the_packages_are_those_of_the_project() -> None:
    import importlib

    fresh = importlib.reload(doctor)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    required = {re.split(r"[<>=;\[ ]", text)[0].lower() for text in project["dependencies"]}
    assert {fresh.DISTRIBUTIONS.get(name, name).lower() for name in fresh.NEEDED} == required
    extras = {k: {re.split(r"[<>=;\[ ]", t)[0] for t in v} for k, v in project["optional-dependencies"].items() if k != "test"}
    optional = {fresh.DISTRIBUTIONS.get(name, name) for name in fresh.OPTIONAL}
    assert all(packages & optional for packages in extras.values())  # one of each extra
    assert optional <= set().union(*extras.values())


def test_a_sound_machine(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "LEAST_DISK_GB", 0)
    monkeypatch.setattr(doctor, "LEAST_MEMORY_GB", 0)
    assert main(["doctor", "--json", "--out", str(tmp_path / "runs")]) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found) == {
        "ldm",
        "python",
        "platform",
        "packages",
        "devices",
        "cores",
        "threads",
        "memory_gb",
        "disk_gb",
        "variables",
        "problems",
        "notes",
    }
    assert found["packages"]["torch"] == sys.modules["torch"].__version__.split("+")[0] or "+" in found["packages"]["torch"]
    assert found["packages"]["surely_absent"] == "not installed" and found["problems"] == []
    assert found["cores"] >= 1 and found["threads"] >= 1 and found["disk_gb"] > 0 and found["devices"][-1].startswith(("cpu", "mps"))
    assert not (tmp_path / "runs").exists()
    assert main(["doctor", "--out", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert said.startswith("ldm ") and said.endswith("nothing stands in the way\n") and "surely_absent" in said


def test_packages_that_do_not_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_one.py").write_text("raise RuntimeError('operator torchvision::nms does not exist\\nand more')")
    (tmp_path / "needs_one.py").write_text("import surely_absent_too")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert doctor.probe("broken_one") == ("does not load (RuntimeError: operator torchvision::nms does not exist)", False)
    assert doctor.probe("needs_one") == ("needs surely_absent_too, which is not installed", False)
    assert doctor.probe("surely_absent") == ("not installed", False)
    monkeypatch.setattr(doctor, "NEEDED", {"torch": "everything", "surely_absent": "this", "broken_one": "that"})
    monkeypatch.setattr(doctor, "OPTIONAL", {"needs_one": "more", "also_absent": "less"})
    problems = doctor.look_around(tmp_path).problems
    assert "surely_absent (for this): not installed; install it with: python -m pip install -U surely_absent" in problems
    assert any(p.startswith("broken_one (for that): does not load") for p in problems)
    assert any(p.startswith("needs_one (optional, for more): needs surely_absent_too") for p in problems)
    assert not any("also_absent" in p for p in problems)


def test_scarce_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10, 9, 1.5e9))
    monkeypatch.setattr(doctor, "free_memory_gb", lambda: 0.7)
    (tmp_path / "file").write_text("")
    assert main(["doctor", "--out", str(tmp_path / "a" / "b")]) == 1
    said = capsys.readouterr().out
    assert f"problem: {tmp_path}: 1.5 GB free, and a quickstart takes up to 4; name another folder with out=DIR" in said
    assert "problem: 0.7 GB of memory free" in said and said.endswith("2 problems found\n")
    assert "is a file" in doctor.look_around(tmp_path / "file" / "x").problems[0]


def test_memory_is_that_of_the_container_where_it_is_less(monkeypatch: pytest.MonkeyPatch) -> None:
    said = {
        "/proc/meminfo": "MemTotal: 9 kB\nMemAvailable:   8000000 kB\n",
        "/sys/fs/cgroup/memory.max": "5000000000\n",
        "/sys/fs/cgroup/memory.current": "1000000000\n",
    }
    monkeypatch.setattr(Path, "read_text", lambda self: said[str(self)])
    assert doctor.free_memory_gb() == 4.0
    said["/sys/fs/cgroup/memory.max"] = "max\n"
    assert doctor.free_memory_gb() == 8.2


def test_a_forgotten_launch_file_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    assert not doctor.look_around(tmp_path).notes
    (tmp_path / "accelerate").mkdir()
    (tmp_path / "accelerate" / "default_config.yaml").write_text("")
    assert doctor.look_around(tmp_path).notes == [f"accelerate launch without --config_file uses {tmp_path}/accelerate/default_config.yaml"]
