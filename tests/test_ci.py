"""What CI runs, and that it cannot pass by leaving something out."""

from __future__ import annotations

import re
import runpy
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BROWSER = ROOT / "tests" / "system" / "test_demo_browser.py"


def commands(folder: Path, **scripts: str) -> str:
    """A PATH of stand-ins for programs and of what .ci/run needs of a system; nothing else is found."""
    for name, script in scripts.items():
        (folder / name.replace("_", "-")).write_text(f"#!/bin/bash\n{script}\n")
        (folder / name.replace("_", "-")).chmod(0o755)
    for name in ("bash", "dirname", "mktemp", "rm", "tail", "timeout"):
        (folder / name).symlink_to(shutil.which(name) or name)
    return str(folder)


def ci(path: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([ROOT / ".ci" / "run"], env={"PATH": path}, capture_output=True, text=True, timeout=60)


def test_ci_installs_chromium_at_the_second_attempt(tmp_path: Path) -> None:
    apt = (
        f"cd {tmp_path}; echo $* >> asked; [ $(wc -l < asked) -gt 1 ] || exit 100\n"  # the first call fails
        "printf '#!/bin/bash' > chromium && chmod +x chromium"
    )
    for name in ("wc", "chmod"):
        (tmp_path / name).symlink_to(shutil.which(name) or name)
    found = ci(commands(tmp_path, id="echo 0", apt_get=apt, make="echo made $CI $*; exit 3"))
    assert found.returncode == 3 and found.stdout == "made true test ARGS=--durations=25\n"
    assert found.stderr == "chromium: attempt 1 of 2 to install it with apt-get failed\n"
    assert len((tmp_path / "asked").read_text().splitlines()) == 3  # update fails; update, install


def test_ci_says_what_kept_chromium_out_and_goes_on(tmp_path: Path) -> None:
    found = ci(commands(tmp_path, id="echo 0", apt_get="echo no mirror; exit 100", make="exit 3"))
    assert found.returncode == 3
    assert "attempt 2 of 2" in found.stderr and "no mirror" in found.stderr and "the browser tests will fail" in found.stderr
    (tmp_path / "user").mkdir()
    found = ci(commands(tmp_path / "user", id="echo 1000", make="exit 3"))
    assert found.returncode == 3 and found.stderr.startswith("chromium: not here, and to install it takes root")


def test_browser_tests_fail_in_ci_and_are_skipped_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.delenv("CI", raising=False)
    with pytest.raises(pytest.skip.Exception, match="browser tests need chromium"):
        runpy.run_path(str(BROWSER))
    monkeypatch.setenv("CI", "true")
    with pytest.raises(pytest.fail.Exception, match="CI runs the browser tests, which need chromium"):
        runpy.run_path(str(BROWSER))["fail_in_ci"]()


def test_each_mark_that_is_left_out_has_a_command_of_its_own() -> None:
    told = (ROOT / "Makefile").read_text(encoding="utf-8")
    for mark in ("large", "soak"):
        assert re.search(rf"^test-{mark}: .*\n\t.*pytest .*-m {mark}\b", told, re.MULTILINE)
