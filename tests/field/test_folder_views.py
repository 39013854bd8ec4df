"""Views of a user's own folder: maps beside pictures, pairs, columns of a table, COCO annotations; they lie where their picture does."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from ldm.__main__ import main
from ldm.config.errors import UserError
from ldm.data.dataset import asked, draw_flips
from ldm.data.folder import FolderSource
from ldm.data.view_files import part_of, words_view
from ldm.data.views import ViewKind, mirrored_view
from ldm.diffusion.batch import Boxes, ImageBatch, Points

WIDE, HIGH = 48, 32


def picture(seed: int, wide: int = WIDE) -> np.ndarray:
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((wide, HIGH), Image.Resampling.BILINEAR))


def folder(root: Path, names: tuple[str, ...] = ("a", "b", "c")) -> Path:
    for i, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture(i)).save(root / f"{name}.png")
        (root / f"{name}.txt").write_text(f"picture {i}")
    return root


def load(source: FolderSource, names: tuple[str, ...], count: int = 3, flip: bool = False, side: int = 16, seed: int = 0) -> ImageBatch:
    data = asked(source.build("train"), names)
    return data.load(range(count), range(count), side, seed, flip)


def of(batch: ImageBatch, name: str) -> Tensor:
    assert batch.views is not None
    found = batch.views[name]
    assert isinstance(found, Tensor)
    return found


def test_maps_beside_pictures_are_cropped_and_turned_with_them(tmp_path: Path) -> None:
    root = folder(tmp_path, ("a", "sub/b", "c"))
    for i, name in enumerate(("a", "sub/b", "c")):
        (root / "source" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture(i)).save(root / "source" / f"{name}.png")  # the picture itself: what is cut must be the same
        (root / "labels").mkdir(exist_ok=True)
        Image.fromarray((picture(i)[..., 0] > 128).astype(np.uint8)).save(root / "labels" / f"{name.rpartition('/')[2]}.png")
    data = FolderSource(path=str(root), val_share=0.0).build("train")
    assert data.names == ["a.png", "c.png", "sub/b.png"] and data.describe()["with_source"] == 3
    assert data.views()["labels"].channels == 2
    for seed in range(6):
        batch = load(data.source, ("source", "labels", "grey"), flip=True, seed=seed)
        image = (batch.image + 1) / 2
        assert (of(batch, "source") - image).abs().max() < 0.06  # bilinear beside bicubic
        agree = (of(batch, "labels")[:, 0] == (image[:, 0] > 128 / 255)).float().mean()
        assert agree > 0.9
    plain = FolderSource(path=str(root), val_share=0.0).build("train")
    before = asked(plain, ("source",)).fingerprint()
    Image.fromarray(picture(9)).save(root / "source" / "a.png")
    assert asked(FolderSource(path=str(root), val_share=0.0).build("train"), ("source",)).fingerprint() != before
    assert plain.fingerprint() == FolderSource(path=str(root), val_share=0.0).build("train").fingerprint()


def test_pairs_side_by_side_and_in_two_folders_are_one_data_set(tmp_path: Path) -> None:
    for i in range(3):
        left, right = picture(i), picture(10 + i)
        for place, values in (("ab", np.concatenate([left, right], 1)), ("two/A/train", left), ("two/B/train", right)):
            (tmp_path / place).mkdir(parents=True, exist_ok=True)
            Image.fromarray(values).save(tmp_path / place / f"{i}.png")
    beside = load(FolderSource(path=str(tmp_path / "ab"), layout="ab", captions="none", val_share=0.0), ("source",), flip=True)
    apart = load(FolderSource(path=str(tmp_path / "two"), layout="A_B", captions="none", val_share=0.0), ("source",), flip=True)
    assert torch.equal(beside.image, apart.image) and torch.equal(of(beside, "source"), of(apart, "source"))
    assert beside.caption == ("", "", "") and not torch.allclose(of(beside, "source"), (beside.image + 1) / 2, atol=0.1)
    assert torch.equal(beside.size, apart.size)


def test_boxes_and_triples_of_a_table_follow_crop_and_mirror(tmp_path: Path) -> None:
    white = np.zeros((HIGH, WIDE, 3), np.uint8)
    white[8:24, 12:20] = 255
    Image.fromarray(white).save(tmp_path / "x.png")
    boxes = [{"box": [12, 8, 20, 24], "text": "white"}]
    rows = {"file_name": "x.png", "text": "t", "boxes": boxes, "triples": [["white", "on", "black"]], "source": "flickr", "points": 3}
    (tmp_path / "metadata.jsonl").write_text(json.dumps(rows))
    source = FolderSource(path=str(tmp_path), val_share=0.0)
    flips = draw_flips(0, range(12), True)
    assert {True, False} <= set(flips)
    data = asked(source.build("train"), ("boxes", "graph"))
    for p in range(12):
        batch = data.load([0], [p], 32, 0, True)
        assert batch.views is not None
        found, graph = batch.views["boxes"], batch.views["graph"]
        assert isinstance(found, Boxes) and graph.triples == ((("white", "on", "black"),),)  # type: ignore[union-attr]
        columns = (batch.image[0, 0] > 0).any(0).nonzero()
        if found.box.shape[1]:
            assert found.phrases == (("white",),)
            wanted = torch.tensor([float(columns.min()) / 32, 8 / 32, float(columns.max() + 1) / 32, 24 / 32])
            torch.testing.assert_close(found.box[0, 0], wanted, atol=1.1 / 32, rtol=0)
    # The same in shares; a column of the name of a view that means something else is none.
    rows["boxes"] = [{"box": [0.25, 0.25, 20 / 48, 0.75], "text": "white"}]
    (tmp_path / "metadata.jsonl").write_text(json.dumps(rows))
    again = asked(source.build("train"), ("boxes",)).load([0], [0], 32, 0, False)
    first = data.load([0], [0], 32, 0, False)
    assert torch.allclose(again.views["boxes"].box, first.views["boxes"].box)  # type: ignore[index,union-attr]
    with pytest.raises(UserError, match=r"view points: what is told of 1 picture cannot be read, such as x.png: no points"):
        asked(source.build("train"), ("points",))
    with pytest.raises(UserError, match=r"view 'source': this data does not offer it"):
        asked(source.build("train"), ("source",))


def test_coco_annotations_give_boxes_and_points(tmp_path: Path) -> None:
    root = folder(tmp_path / "pictures")
    content = {
        "images": [
            {"id": 7, "file_name": "a.png", "width": WIDE * 2, "height": HIGH * 2},
            {"id": 8, "file_name": "b.png", "width": WIDE, "height": HIGH},
        ],
        "categories": [{"id": 3, "name": "dog", "keypoints": ["nose", "tail"]}],
        "annotations": [
            {"image_id": 7, "category_id": 3, "bbox": [24, 16, 24, 32], "keypoints": [48, 32, 2, 0, 0, 0]},
            {"image_id": 7, "category_id": 3, "bbox": [0, 0, 10, 10], "iscrowd": 1},
        ],
    }
    (root / "instances.json").write_text(json.dumps(content))
    views = {"boxes": "instances.json", "points": "instances.json"}
    source = FolderSource(path=str(root), val_share=0.0, crop="centre", views=views)
    assert source.build("train").names == ["a.png", "b.png"]  # c stands not in the file, so it has no points
    assert source.build("train").describe()["rejected"] == {"no points": 1}
    batch = load(source, ("boxes", "points"), count=2, side=HIGH)
    assert batch.views is not None
    boxes, points = batch.views["boxes"], batch.views["points"]
    assert isinstance(boxes, Boxes) and boxes.phrases == (("dog",), ("",)) and boxes.there.tolist() == [[True], [False]]
    # 48x32 px, of which the middle 32 are seen: x 12..24 px of it are 4..16 of these.
    torch.testing.assert_close(boxes.box[0, 0], torch.tensor([4 / 32, 8 / 32, 16 / 32, 24 / 32]))
    assert isinstance(points, Points) and points.there.tolist() == [[True], [False]]
    torch.testing.assert_close(points.point[0, 0], torch.tensor([0.5, 0.5]))


@pytest.mark.parametrize("flip", [False, True])
def test_what_a_view_does_not_show_is_left_out(flip: bool) -> None:
    boxes = words_view([{"box": [0, 0, 0.5, 1], "text": "l"}, {"box": [0.75, 0, 1, 1], "text": "r"}], ViewKind(form="boxes"))
    points = words_view([{"point": [0.1, 0.5], "name": "p"}, {"point": [0.9, 0.5], "name": "p"}], ViewKind(form="points", names=("p",)))
    size = (10, 20, 0, 0, 10, 10)  # the left half, of what is seen
    shown, seen = part_of(boxes, size, flip), part_of(points, size, flip)
    assert isinstance(shown, Boxes) and isinstance(seen, Points)
    assert shown.phrases == ((("r",) if flip else ("l",)),) and seen.point.shape == (1, 1, 2)
    assert shown.box[0, 0].tolist() == ([0.0, 0.0, 0.5, 1.0] if flip else [0.0, 0.0, 1.0, 1.0])
    whole = (10, 20, 0, 0, 10, 20)
    turned = part_of(boxes, whole, True)
    assert isinstance(turned, Boxes) and torch.equal(turned.box, mirrored_view(boxes).box)  # type: ignore[union-attr]


def test_classes_are_named_by_a_palette(tmp_path: Path) -> None:
    root = folder(tmp_path)
    (root / "labels").mkdir()
    for name in "abc":
        painted = np.zeros((HIGH, WIDE, 3), np.uint8)
        painted[:, :24], painted[:, 24:] = (120, 120, 120), (6, 230, 230)
        Image.fromarray(painted).save(root / "labels" / f"{name}.png")
    source = FolderSource(path=str(root), val_share=0.0, crop="centre")
    with pytest.raises(UserError, match=r"palette.csv: missing; these maps are in colours"):
        asked(source.build("train"), ("labels",))
    (root / "labels" / "palette.csv").write_text("r,g,b,name\n120,120,120,wall\n180,120,120,building\n6,230,230,sky\n")
    kind = source.build("train").views()["labels"]
    assert kind.names == ("wall", "building", "sky")
    labels = of(load(source, ("labels",), side=HIGH), "labels")
    assert labels[0, 0, 0].tolist() == [0] * 16 + [2] * 16
    (root / "labels" / "palette.csv").write_text("120,120,wall\n")
    with pytest.raises(UserError, match=r"palette.csv, line 1: got '120,120,wall'"):
        source.build("train").views()


def test_what_is_missing_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = folder(tmp_path)
    (root / "depth").mkdir()
    for name in "ac":
        Image.fromarray(picture(0)[..., 0]).save(root / "depth" / f"{name}.png")
    source = FolderSource(path=str(root), val_share=0.0)
    with pytest.raises(UserError, match=r"view depth: 1 of 3 pictures has none, such as b.png; add them, or set data.views.depth=depth"):
        asked(source.build("train"), ("depth",))
    strict = FolderSource(path=str(root), val_share=0.0, views={"depth": "depth"})
    assert asked(strict.build("train"), ("depth",)) and strict.build("train").describe()["rejected"] == {"no depth": 1}
    assert FolderSource(path=str(root), val_share=0.0, views={"edges": "auto"}).build("train").names == ["a.png", "b.png", "c.png"]
    for views, message in (({"depth": "none"}, "data.views.depth: no pictures in"), ({"dept": "x"}, "data.views.dept: no such view")):
        with pytest.raises(UserError, match=message):
            FolderSource(path=str(root), views=views).build("train")
    (root / "depth" / "a.png").write_bytes(b"broken")
    data = asked(strict.build("train"), ("depth",))
    assert data.load([0], [0], 16, 0, False).caption == ("picture 2",)  # replaced, as a picture would be
    Image.fromarray(picture(0)[..., 0]).save(root / "depth" / "a.png")
    assert main(["data", "check", str(root), "--decode", "0", "--html", str(tmp_path / "page.html")]) == 0
    said = capsys.readouterr().out
    assert "view depth: of 2 pictures, missing of 1, such as b.png" in said
    assert (tmp_path / "page.html").read_text().count('alt="depth"') >= 1


def test_latents_are_kept_with_views_by_the_command(kl_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from ldm.data.cached import CachedLatents

    root = folder(tmp_path / "pictures")
    words = [
        "data",
        "encode",
        str(root),
        "--model",
        str(kl_model),
        "--out",
        str(tmp_path / "cache"),
        "--resolution",
        "16",
        "--workers",
        "0",
    ]
    assert main([*words, "--views", "grey", "--views", "small:4", "--flip"]) == 0
    cache = CachedLatents(tmp_path / "cache").with_views(("grey", "small:4"))
    flips = draw_flips(0, range(12), True)
    upright, turned = (cache.load([0], [flips.index(side)], 16, 0, True).to("cpu") for side in (False, True))
    assert torch.equal(of_moments(upright, "grey").flip(-1), of_moments(turned, "grey"))
    assert of_moments(upright, "small:4").shape == (1, 3, 4, 4)
    capsys.readouterr()
    assert main([*words, "--views", "labels"]) == 2
    assert "view 'labels': this data does not offer it" in capsys.readouterr().err


def of_moments(batch: object, name: str) -> Tensor:
    found = batch.views[name]  # type: ignore[attr-defined]
    assert isinstance(found, Tensor)
    return found
