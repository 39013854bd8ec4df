"""What is told of pictures and reaches no network, or reaches it wrongly: said or refused, for drawing and for learning."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from finished_model import told_model
from PIL import Image

from ldm.__main__ import main
from ldm.config.errors import UserError
from ldm.data.dataset import asked
from ldm.data.folder import FolderSource
from ldm.families.latent_diffusion.conditions import Condition
from ldm.families.latent_diffusion.ports import Concat, Cross, Gated

WIDE, HIGH = 48, 32
BOX = {"box": [0.1, 0.1, 0.5, 0.5], "text": "a red circle"}


@pytest.fixture(scope="module")
def model(kl_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    conditions = (
        Condition(view="boxes", port=Gated(most=2)),
        Condition(view="graph", port=Cross(most=1)),
        Condition(view="labels", port=Concat()),
    )
    return told_model(kl_model, conditions, tmp_path_factory.mktemp("told"))


def notes(model: Path, capsys: pytest.CaptureFixture[str], word: str) -> str:
    capsys.readouterr()
    code = main(["sample", "a red circle", "--model", str(model), "--steps", "1", "--out", "drawn", "--given", word])
    assert code in (0, 2)
    return capsys.readouterr().err


def test_what_a_model_is_not_told_is_said(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    views: list[tuple[str, Any, str]] = [
        ("boxes", [BOX] * 3, "boxes.json: 3 boxes, of which the model is told the first 2"),
        ("boxes", [{**BOX, "text": "a red circle " * 9}], "is longer than the model's 16 tokens; the rest is left out"),
        ("boxes", [{**BOX, "text": "a wyxq"}], "wyxq: no text that the text encoder learned from had such a word"),
        ("boxes", [{"box": BOX["box"], "phrase": "a ring"}], "no text: phrase is not read; what is in the box stands in text"),
        ("boxes", {"boxes": [BOX]}, "no boxes: got {'boxes': [{'box'"),
        ("graph", [["red circle", "above", "ring"]] * 2, "graph.json: 2 triples, of which the model is told the first 1"),
    ]
    for view, content, said in views:
        Path(f"{view}.json").write_text(json.dumps(content))
        assert said in notes(model, capsys, f"{view}={view}.json"), said
    Path("boxes.json").write_text(json.dumps([BOX]))
    assert "given" not in notes(model, capsys, "boxes=boxes.json")
    colours = np.full((32, 32, 3), 225, np.uint8)  # as good as white
    colours[8:] = (90, 0, 90)
    Image.fromarray(colours).save("some.png")
    assert "labels=some.png: 75% of it has no class, where the model is told nothing" in notes(model, capsys, "labels=some.png")
    Image.fromarray(colours[8:]).save("none.png")
    said = notes(model, capsys, "labels=none.png")
    assert "no class in it: no pixel has the colour of one, such as black (" in said and "the first pixel has (90, 0, 90)" in said
    Image.fromarray(np.full((32, 32), 0.5, np.float32), "F").save("half.tiff")
    assert "no class numbers: 0.5; whole numbers are needed" in notes(model, capsys, "labels=half.tiff")


def folder(root: Path, boxes: Any = None) -> Path:
    root.mkdir()
    for i in range(3):
        Image.fromarray(np.full((HIGH, WIDE, 3), 60 * i, np.uint8)).save(root / f"{i}.png")
    rows = [{"file_name": f"{i}.png", "text": "t", **({} if boxes is None else {"boxes": boxes})} for i in range(3)]
    (root / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return root


def loaded(root: Path, view: str, **more: Any) -> Any:
    data = asked(FolderSource(path=str(root), val_share=0.0, **more).build("train"), (view,))
    views = data.load(range(3), range(3), 16, 0, False).views
    assert views is not None
    return views[view]


def coco(root: Path, **more: Any) -> Path:
    content: dict[str, Any] = {
        "images": [{"id": 7, "file_name": "0.png"}],
        "categories": [{"id": 3, "name": "dog"}],
        "annotations": [{"image_id": "7", "category_id": 3, "bbox": [12, 8, 12, 8]}],
    }
    content["annotations"][0] |= more
    (root / "coco.json").write_text(json.dumps(content))
    return root


def test_annotations_that_would_be_told_as_nothing_are_refused(tmp_path: Path) -> None:
    given = {"views": {"boxes": "coco.json"}}
    found = loaded(coco(folder(tmp_path / "usual")), "boxes", crop="centre", **given)  # sides are the picture's own where the file has none
    assert found.phrases[0] == ("dog",)
    torch.testing.assert_close(found.box[0, 0], torch.tensor([(12 - 8) / 32, 8 / 32, (24 - 8) / 32, 16 / 32]))
    with pytest.raises(UserError, match=r"coco.json: category_id 9 is none of its categories \(3\)"):
        loaded(coco(folder(tmp_path / "category"), category_id=9), "boxes", **given)
    for name, bbox in (("flat", [1, 1, 0, 5]), ("turned", [9, 9, -5, 5])):
        with pytest.raises(UserError, match="view boxes: nothing is told of any of these 3 pictures"):
            loaded(coco(folder(tmp_path / name), bbox=bbox), "boxes", **given)
    with pytest.raises(UserError, match="view boxes: nothing is told of any of these 3 pictures"):
        loaded(folder(tmp_path / "empty", []), "boxes")
    with pytest.raises(UserError, match=r"such as 0.png: no text: label is not read"):
        loaded(folder(tmp_path / "label", [{"box": [1, 1, 9, 9], "label": "dog"}]), "boxes")
    with pytest.raises(UserError, match=r"such as 0.png: no box: \[1, 1, 99, 9\] px, of a picture of 48x32"):
        loaded(folder(tmp_path / "outside", [{"box": [1, 1, 99, 9], "text": "dog"}]), "boxes")


def test_a_map_of_a_picture_s_name_takes_no_boxes_from_it(tmp_path: Path) -> None:
    root = coco(maps(tmp_path / "both", Image.new("L", (WIDE, HIGH), 1)))
    (root / "deep").mkdir()
    Image.new("RGB", (WIDE, HIGH)).save(root / "deep" / "0.png")
    (root / "deep" / "0.txt").write_text("another of the name")
    rows = [{"file_name": name, "text": "t"} for name in ("0.png", "1.png", "2.png")]
    (root / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = asked(FolderSource(path=str(root), val_share=0.0, views={"boxes": "coco.json"}).build("train"), ("boxes", "labels"))
    views = data.load(range(4), range(4), 16, 0, False).views
    assert views is not None and views["boxes"].there.sum(1).tolist() == [1, 0, 0, 0]  # type: ignore[union-attr]


def maps(root: Path, image: Image.Image, view: str = "labels", palette: str = "") -> Path:
    (folder(root) / view).mkdir()
    for i in range(3):
        image.save(root / view / f"{i}.png")
    if palette:
        (root / view / "palette.csv").write_text(palette)
    return root


def test_class_maps_are_read_as_they_are_meant_or_not_at_all(tmp_path: Path) -> None:
    half = np.zeros((HIGH, WIDE), np.uint8)
    half[:, WIDE // 2 :] = 255
    bits = loaded(maps(tmp_path / "bits", Image.fromarray(half).convert("1")), "labels", crop="centre")
    assert bits[0, 0, 0].tolist() == [0] * 8 + [1] * 8
    grey = Image.merge("LA", (Image.fromarray(half // 255), Image.new("L", (WIDE, HIGH), 255)))
    assert torch.equal(loaded(maps(tmp_path / "alpha", grey, palette="9,9,9,a\n0,0,0,b\n"), "labels", crop="centre"), bits)
    with pytest.raises(UserError, match=r"palette.csv: missing; the one class in these maps is 0, beside 255 where it is unknown"):
        loaded(maps(tmp_path / "mask", Image.fromarray(half)), "labels")
    painted = Image.new("RGB", (WIDE, HIGH), (200, 30, 30))
    with pytest.raises(UserError, match=r"such as 0.png: no class in it: .* sky \(0, 0, 200\); the first pixel has \(200, 30, 30\)"):
        loaded(maps(tmp_path / "wrong", painted, palette="r,g,b,name\n0,0,200,sky\n"), "labels")
    with pytest.raises(UserError, match=r"palette.csv, line 3: '0,0,200,sea' has the colour of class 0"):
        loaded(maps(tmp_path / "twice", painted, palette="r,g,b,name\n0,0,200,sky\n0,0,200,sea\n"), "labels")


def test_maps_of_other_proportions_than_their_picture_are_refused(tmp_path: Path) -> None:
    square = Image.new("RGB", (HIGH, HIGH), (200, 30, 30))
    with pytest.raises(UserError, match=r"such as 0.png: map of other proportions: 32x32 px, of a picture of 48x32"):
        loaded(maps(tmp_path / "square", square, "source"), "source")
    small = square.resize((WIDE // 8 + 1, HIGH // 8))  # rounded
    assert loaded(maps(tmp_path / "small", small, "source"), "source").shape == (3, 3, 16, 16)
    assert loaded(maps(tmp_path / "style", square, "style"), "style").shape == (3, 3, 16, 16)  # shows other things, so it may


def test_pictures_of_a_table_may_be_each_other_s_source(tmp_path: Path) -> None:
    root = folder(tmp_path / "films")
    rows = [{"file_name": f"{i}.png", "text": "t", "source": f"{max(0, i - 1)}.png"} for i in range(3)]
    (root / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert loaded(root, "source")[:, 0, 0, 0].mul(255).round().tolist() == [0, 0, 60]
