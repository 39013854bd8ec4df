"""Conditions by every port, codes, pixels and links of a chain, stopped in the middle: each ends with the bits of a run that was not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from systems import SYSTEMS, run_of

from ldm.__main__ import main
from ldm.config.errors import UserError
from ldm.families.family import Family


@pytest.mark.parametrize("system", SYSTEMS)
def test_a_stopped_run_ends_with_the_bits_of_one_that_was_not(
    system: str, kl_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(run_of(system, kl_model), sort_keys=False))

    def train(name: str) -> int:
        return main(["train", str(file), f"out={tmp_path / name}"])

    assert train("whole") == 0
    done = json.loads((tmp_path / "whole" / "stages" / "last" / "done.json").read_text())
    with monkeypatch.context() as patched:
        own = Family.progress

        def ends(self: Family, images: int) -> None:
            if images >= 16 and (tmp_path / "stopped" / "stages" / "last").is_dir():
                raise UserError("stopped here")
            own(self, images)

        patched.setattr(Family, "progress", ends)
        assert train("stopped") == 2
    capsys.readouterr()
    assert train("stopped") == 0
    assert "going on from" in capsys.readouterr().err
    again = json.loads((tmp_path / "stopped" / "stages" / "last" / "done.json").read_text())
    assert again["product"] == done["product"] and done["product"]
