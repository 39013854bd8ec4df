"""pix2pix and CycleGAN from their configurations to pictures: stopped, resumed to the bit, measured, exported, drawn from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ldm.__main__ import main
from ldm.config.errors import UserError
from ldm.families.translator import TranslatorFamily

ROOT = Path(__file__).parents[2]
SMALL = ["stages.translator.images=32", "stages.translator.save_every_images=8", "stages.translator.save_beside=false"]
SMALL += [
    "stages.evaluation.metrics=[{kind: translation, images: 6}]",
    "stages.translator.batch=4",
    "models.translator.discriminator.channels=4",
]
OF = {
    "pix2pix": ["data.images=16", "data.val=6", "models.translator.generator.channels=4"],
    "cyclegan": ["data.a.images=16", "data.a.val=6", "data.b.images=8", "data.b.val=6", "models.translator.generator.channels=4"],
}


@pytest.mark.parametrize("system", list(OF))
def test_a_translator_is_trained_resumed_measured_exported_and_draws(
    system: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["train", f"configs/{system}.yaml", *SMALL, *OF[system]]
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert main([*words, f"out={whole}"]) == 0
    with monkeypatch.context() as patched:
        own = TranslatorFamily.progress

        def ends(self: Any, images: int) -> None:
            if images >= 20:
                raise UserError("stopped here")
            own(self, images)

        patched.setattr(TranslatorFamily, "progress", ends)
        assert main([*words, f"out={stopped}"]) == 2
    assert main([*words, f"out={stopped}"]) == 0
    assert "going on from" in capsys.readouterr().err
    product = Path("stages/translator/model/manifest.json")
    assert (whole / product).read_bytes() == (stopped / product).read_bytes()

    found = json.loads((whole / "metrics.json").read_text())["evaluations"]["evaluation"]["translation"]
    wanted = {"frechet", "bind", "bg"} | ({"psnr", "l1", "label_iou", "held_out"} if system == "pix2pix" else set())
    assert wanted <= found.keys()
    assert "translation" in (whole / "report.html").read_text(encoding="utf-8")

    assert main(["info", str(whole)]) == 0 and f"of kind {system}" in capsys.readouterr().out
    Image.fromarray(np.full((64, 64, 3), (255, 0, 0), np.uint8)).save(tmp_path / "in.png")
    drawing = ["sample", "night" if system == "cyclegan" else "", "--init", str(tmp_path / "in.png"), "--model", str(whole)]
    assert main([*drawing, "--out", str(tmp_path / "drawn")]) == 0
    [made] = (tmp_path / "drawn").glob("*.png")
    assert main(["sample", "--from", str(made), *drawing[2:], "--out", str(tmp_path / "again")]) == 0
    [again] = (tmp_path / "again").glob("*.png")
    assert np.array_equal(np.asarray(Image.open(made)), np.asarray(Image.open(again)))
    assert main(["export", str(whole), "--to", "published", "--out", str(tmp_path / "published")]) == 0
    names = ["latest_net_G.pth"] if system == "pix2pix" else ["latest_net_G_A.pth", "latest_net_G_B.pth"]
    assert sorted(path.name for path in (tmp_path / "published").glob("*.pth")) == names
    assert main(["export", str(whole), "--to", "published", "--out", str(tmp_path / "a.pth")]) == 2
    assert "published is a folder" in capsys.readouterr().err
