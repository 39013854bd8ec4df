"""A tracker whose server does not answer: half a minute of its own waiting, none of the run's."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny

from ldm.training.log import LOG, read

pytestmark = pytest.mark.soak


def test_a_run_needs_no_server_and_tells_no_secret(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    done = tiny.start_marked(tmp_path / "run", "tracker=wandb", "stages.text.log_every_steps=1", WANDB_MODE="online")
    said = done.stdout + done.stderr
    assert done.returncode == 0 and said.count("tracker: wandb did not") == 1, said
    assert len([line for line in read(tmp_path / "run" / LOG) if "step" in line]) == 4
    assert tiny.MARK not in said.lower() and not tiny.marked_files(tmp_path / "run")
