"""Each system on a user's folder, as docs/own_pictures.md has it: a small folder of that form tells all that the system reads."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ldm.config.schema import load
from ldm.data.dataset import asked
from ldm.runs.run import Run

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "own_pictures.md").read_text(encoding="utf-8")
FILES = dict(re.findall(r"```yaml\n# (\S+)\n(.*?)```", PAGE, re.DOTALL))
BASES = {line.removeprefix("base: ") for text in FILES.values() for line in text.splitlines() if line.startswith("base: ")}
SCENES_ALONE = {"text2scene.yaml"}
OF_PHOTOS = {
    "folder.yaml",
    "emoji.yaml",
    "sd1.yaml",
    "quickstart.yaml",
    "scenes-t0.yaml",
    "scenes-t1.yaml",
}  # read folders themselves, or are the scenes


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The configurations, and the folders that the page names, with eight small pictures each."""
    root = tmp_path_factory.mktemp("own")
    shutil.copytree(ROOT / "configs", root / "configs")
    for name, text in FILES.items():
        (root / "configs" / name).write_text(text, encoding="utf-8")
    photos, rows, images, boxes = root / "photos", [], [], []
    (photos / "labels").mkdir(parents=True)
    (photos / "labels" / "palette.csv").write_text("r,g,b,name\n0,0,0,night\n250,250,250,day\n")
    for i in range(8):
        picture = np.random.default_rng(i).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        for folder in (
            "photos",
            "pairs/A/train",
            "pairs/B/train",
            *(f"horse2zebra/{part}{side}" for part in ("train", "test") for side in "AB"),
        ):
            (root / folder).mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture).save(root / folder / f"{i}.png")
        Image.fromarray(np.full((64, 64, 3), 250 * (i % 2), np.uint8)).save(photos / "labels" / f"{i}.png")
        rows.append({"file_name": f"{i}.png", "text": "a dog beside a cat", "triples": [["dog", "beside", "cat"]]})
        images.append({"id": i, "file_name": f"{i}.png", "width": 64, "height": 64})
        boxes.append({"id": i, "image_id": i, "category_id": 1, "bbox": [8, 8, 32, 32]})
    (photos / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    coco = {"images": images, "annotations": boxes, "categories": [{"id": 1, "name": "dog"}]}
    (photos / "instances.json").write_text(json.dumps(coco))
    return root


def test_every_system_of_the_scenes_stands_on_the_page() -> None:
    systems = {file.name for file in (ROOT / "configs").glob("*.yaml") if not file.name.startswith(("finetune-", "autoencoder-"))}
    assert systems - SCENES_ALONE - OF_PHOTOS == BASES - OF_PHOTOS
    assert "configs/text2scene.yaml` has no such form" in PAGE


@pytest.mark.parametrize("name", FILES)
def test_a_folder_tells_what_the_system_reads(name: str, place: Path, own_clip_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    text = FILES[name]
    assert len(text.splitlines()) < 40
    run = load(Path("configs") / name, [f"init={own_clip_model}"] if "init: " in text else [], Run)
    for model in run.models.values():
        data = asked(run.data.build("train"), model.views())
        batch = data.load([0, 1], [0, 1], 64, 0, False)
        assert batch.image.shape == (2, 3, 64, 64) and set(model.views()) <= set(batch.views or {})
