"""Views given to a model that reads them: files of maps, classes and boxes, weights, recipes and their replay, and clear refusals."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from finished_model import SIDE, told_model
from PIL import Image

from ldm.__main__ import main
from ldm.config.errors import UserError
from ldm.data.images import Rejected
from ldm.data.scenes.views import KINDS
from ldm.data.view_files import map_view, words_view
from ldm.data.views import ViewKind, kind_of
from ldm.diffusion.batch import Boxes, Graph, Points
from ldm.families.latent_diffusion.conditions import Condition
from ldm.families.latent_diffusion.ports import Concat
from ldm.sampling.given import Given, parse

LABELS, GREY = KINDS["labels"], kind_of({}, "grey")


def png(values: np.ndarray, mode: str | None = None, palette: list[int] | None = None) -> bytes:
    image = Image.fromarray(values, mode)
    if palette is not None:
        image.putpalette(palette)
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()


@pytest.fixture(scope="module")
def model(kl_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that is told grey, labels and a small picture, with weights that listen to them."""
    conditions = tuple(Condition(view=view, port=Concat()) for view in ("grey", "labels", "small:8"))
    return told_model(kl_model, conditions, tmp_path_factory.mktemp("told"))


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    rng = np.random.default_rng(0)
    (tmp_path / "g.png").write_bytes(png(rng.integers(0, 256, (SIDE, SIDE), dtype=np.uint8)))
    (tmp_path / "l.png").write_bytes(png(rng.integers(0, 11, (SIDE, SIDE), dtype=np.uint8)))
    (tmp_path / "photo.png").write_bytes(png(rng.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def drawn(model: Path, out: str, *words: str) -> np.ndarray:
    assert (
        main(["sample", *(() if "--from" in words else ("a red ring",)), "--model", str(model), "--steps", "2", "--out", out, *words]) == 0
    )
    return np.asarray(Image.open(sorted(Path(out).glob("*.png"))[-1]))


@pytest.mark.slow
def test_views_count_by_weight_and_their_recipes_replay(model: Path, files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain, grey = drawn(model, "a"), drawn(model, "b", "--given", "grey=g.png")
    both = drawn(model, "c", "--given", "grey=g.png@0.5", "--given", "labels=l.png")
    assert not np.array_equal(plain, grey) and not np.array_equal(grey, both)
    assert np.array_equal(drawn(model, "d", "--given", "grey=g.png@0"), plain)
    again = ["--from", str(next(Path("c").glob("*.png")))]
    assert np.array_equal(drawn(model, "e", *again), both)
    told = json.loads(_recipe("c")["given"])
    assert [(one["view"], one["file"], one["weight"]) for one in told] == [("grey", "g.png", 0.5), ("labels", "l.png", 1.0)]
    # The file that is no longer the same is refused, one that is gone is named.
    capsys.readouterr()
    (files / "l.png").write_bytes(png(np.zeros((SIDE, SIDE), np.uint8)))
    assert main(["sample", *again, "--model", str(model), "--out", "f"]) == 2
    assert "l.png is not the file that the picture was drawn with; give that by --given labels=FILE" in capsys.readouterr().err
    (files / "l.png").unlink()
    assert main(["sample", *again, "--model", str(model), "--out", "f"]) == 2
    assert "labels=l.png: no such file: this picture was drawn with it" in capsys.readouterr().err
    # A view may be made of a picture, and lines of a prompt file have their own.
    of = drawn(model, "g", "--given", "grey=of:photo.png")
    Image.open("photo.png").convert("L").save("same.png")
    assert abs(drawn(model, "h", "--given", "grey=same.png").astype(int) - of).max() <= 3  # Pillow cuts where we round
    lines = ['{"prompt": "a red ring", "given": {"grey": "g.png"}}', "a red ring --given grey=same.png", "a red ring"]
    (files / "lines.txt").write_text("\n".join(lines))
    assert main(["sample", "--prompts", "lines.txt", "--model", str(model), "--steps", "2", "--out", "i"]) == 0
    first, second, third = (np.asarray(Image.open(path)) for path in sorted(Path("i").glob("*.png")))
    assert np.array_equal(first, grey) and np.array_equal(third, plain) and not np.array_equal(second, first)


def _recipe(folder: str) -> dict[str, str]:
    from dataclasses import asdict

    from ldm.sampling.recipe import Recipe, read_recipe

    found = read_recipe(next(Path(folder).glob("*.png")))
    assert isinstance(found, Recipe)
    return asdict(found)


@pytest.mark.slow
def test_what_a_model_is_told_is_shown_and_what_it_is_not_is_refused(
    model: Path, kl_model: Path, files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["info", str(model)]) == 0
    said = capsys.readouterr().out
    assert "is told grey (map) by port concat: ldm sample --given grey=FILE" in said
    assert "is told labels (11 classes: black, gray, white, red" in said
    (files / "wide.png").write_bytes(png(np.full((SIDE, SIDE), 12, np.uint8)))
    (files / "no.png").write_text("no picture")
    wrong = {
        "edges=g.png": "this model reads no view 'edges'; it reads grey, labels, small:8",
        "grey": "VIEW=FILE, VIEW=FILE@WEIGHT",
        "grey=none.png": "grey=none.png: no such file",
        "grey=g.png@-1": "a weight from 0 to 10",
        "grey=no.png": "grey=no.png: not an image",
        "labels=wide.png": "labels=wide.png: unknown class: number 12; there are 11",
        "labels=of:photo.png": "no labels can be made of a picture: only edges",
    }
    for words, message in wrong.items():
        assert main(["sample", "a", "--model", str(model), "--given", words]) == 2
        assert message in capsys.readouterr().err
    assert main(["sample", "a", "--model", str(kl_model), "--given", "grey=g.png"]) == 2
    assert "this model reads no views of pictures" in capsys.readouterr().err
    assert main(["sample", "a", "--model", str(model), "--given", "grey=g.png", "--given", "grey=l.png"]) == 2
    assert "grey is told twice, by g.png and l.png" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("word", "given"),
    [
        ("edges=e.png", Given("edges", "e.png")),
        ("small:4=s.png@0.5", Given("small:4", "s.png", 0.5)),
        ("grey=me@home.png", Given("grey", "me@home.png")),
        ("grey=of:a=b.png@2", Given("grey", "a=b.png", 2.0, True)),
    ],
)
def test_words_are_read(word: str, given: Given) -> None:
    assert parse(word) == given


@pytest.mark.parametrize("word", ["", "=", "edges", "edges=", "=e.png", "edges=of:", "e=f@nan", "e=f@11"])
def test_other_words_are_refused(word: str) -> None:
    with pytest.raises(UserError, match="given"):
        parse(word)


def test_class_maps_are_read_by_number_or_by_colour() -> None:
    numbers = np.random.default_rng(1).integers(0, 11, (9, 7), dtype=np.uint8)
    numbers[0, 0] = 255
    wanted = numbers.astype(np.int16)
    wanted[0, 0] = -1
    colours = np.array([*LABELS.colours, *[(255, 0, 255)] * 245], np.uint8)
    painted = colours[numbers]
    painted[0, 0] = (255, 0, 255)
    forms = {
        "numbers": png(numbers),
        "numbers with a palette of other colours": png(numbers, "P", [7, 99, 3] * 256),
        "colours": png(painted),
        "colours, compressed a little": png((painted.astype(int) + [3, -2, 4]).clip(0, 255).astype(np.uint8)),
        "16 bit": png(np.where(numbers == 255, 255, numbers).astype(np.uint16)),
    }
    for name, data in forms.items():
        assert np.array_equal(map_view(data, LABELS, (9, 7))[0], wanted), name
    few = Image.fromarray(painted).convert("P", palette=Image.Palette.ADAPTIVE, colors=16)
    stream = io.BytesIO()
    few.save(stream, "PNG")
    found = map_view(stream.getvalue(), LABELS, (9, 7))[0]
    assert (found[1:] == wanted[1:]).mean() > 0.9
    with pytest.raises(Rejected, match="mode RGB; a picture of class numbers"):
        map_view(forms["colours"], ViewKind(form="classes", channels=11), (9, 7))
    large = map_view(png(np.repeat(np.repeat(numbers, 3, 0), 3, 1)), LABELS, (9, 7))
    assert np.array_equal(large[0], wanted)


def test_a_map_of_another_size_lies_where_its_picture_does() -> None:
    rng = np.random.default_rng(2)
    whole = rng.integers(0, 256, (40, 60), dtype=np.uint8)
    size = (40, 60, 0, 7, 20, 20)  # of a view: 20x20 px cut at (0, 7) of 20x30
    upright = map_view(png(whole), GREY, size)
    turned = map_view(png(whole[:, ::-1].copy()), GREY, size, flip=True)
    assert upright.shape == (1, 20, 20) and np.array_equal(upright, turned)
    doubled = map_view(png(np.repeat(np.repeat(whole, 2, 0), 2, 1)), GREY, size)
    assert abs(doubled.astype(int) - upright).mean() < 12
    small = map_view(png(np.repeat(whole[..., None], 3, 2)), kind_of({}, "small:4"), (40, 60))
    means = whole.reshape(10, 4, 15, 4).mean((1, 3))
    assert small.shape == (3, 10, 15) and abs(small[0] - means).max() <= 1


def test_boxes_points_and_graphs_are_read() -> None:
    boxes = words_view('[{"box": [0.1, 0.2, 0.5, 0.6], "text": "a red circle"}]', KINDS["boxes"])
    assert (
        isinstance(boxes, Boxes)
        and boxes.phrases == (("a red circle",),)
        and boxes.box.tolist()[0][0] == pytest.approx([0.1, 0.2, 0.5, 0.6])
    )
    assert isinstance(words_view("[]", KINDS["boxes"]), Boxes)
    points = words_view('[{"point": [0.5, 1], "name": "bottom"}]', KINDS["points"])
    assert isinstance(points, Points) and points.part.tolist() == [[3]]
    graph = words_view('[["red circle", "left of", "blue ring"]]', KINDS["graph"])
    assert isinstance(graph, Graph) and graph.triples == ((("red circle", "left of", "blue ring"),),)
    wrong = {
        "boxes": [
            "{}",
            "[1]",
            "x",
            '[{"box": [1, 2, 3]}]',
            '[{"box": [10, 20, 30, 40]}]',
            '[{"box": [0.5, 0, 0.4, 1]}]',
            '[{"box": [0,0,1,1], "text": 3}]',
        ],
        "points": ['[{"point": [0.5]}]', '[{"point": [0.5, 0.5], "name": "nose"}]', '[{"point": [true, 0]}]'],
        "graph": ['[["a", "b"]]', '["abc"]'],
    }
    for view, texts in wrong.items():
        for text in texts:
            with pytest.raises(Rejected):
                words_view(text, KINDS[view])


@pytest.mark.slow
def test_tables_and_films_are_told_of_views_too(model: Path, files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = ["a red ring", "--model", str(model), "--steps", "2", "--seed", "3"]
    plain, told = drawn(model, "plain", "--seed", "3"), drawn(model, "told", "--seed", "3", "--given", "grey=g.png@0.7")
    assert main(["grid", *base, "--x", "seed=3,4", "--given", "grey=g.png@0.7", "--pictures", "cells"]) == 0
    first, second = sorted(Path("cells").glob("*.png"))
    assert np.array_equal(np.asarray(Image.open(first)), told) and not np.array_equal(told, plain)
    assert main(["grid", "--from", str(second), "--model", str(model), "--x", "seed=3,4", "--out", "again.png", "--pictures", "again"]) == 0
    assert np.array_equal(np.asarray(Image.open(sorted(Path("again").glob("*.png"))[0])), told)
    film = [
        "animate",
        *base,
        "--to",
        "a green ring",
        "--frames",
        "2",
        "--sampler",
        "ddim",
        "--given",
        "grey=g.png@0.7",
        "--pictures",
        "film",
    ]
    assert main(film) == 0
    alone = drawn(model, "alone", "--seed", "3", "--sampler", "ddim", "--given", "grey=g.png@0.7")
    assert np.array_equal(np.asarray(Image.open(sorted(Path("film").glob("*.png"))[0])), alone)
    capsys.readouterr()
    assert main(["animate", *base, "--clip", "photo.png", "--out", "clip.webp", "--given", "grey=g.png"]) == 2
    assert "given: views are of one picture" in capsys.readouterr().err
