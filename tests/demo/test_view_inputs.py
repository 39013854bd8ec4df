"""What is painted, written and loaded on the page becomes the files that `ldm sample --given` reads; calls of the API say the same."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from demo_server import ask, served
from finished_model import SIDE, told_model
from PIL import Image

from ldm.__main__ import main
from ldm.config.errors import UserError
from ldm.data.scenes.views import KINDS
from ldm.data.view_files import map_view, words_view
from ldm.data.views import kind_of
from ldm.demo.view_inputs import painted_view, told_by, written
from ldm.diffusion.batch import Boxes, Graph
from ldm.families.latent_diffusion.conditions import Condition
from ldm.families.latent_diffusion.ports import Concat, Gated

EDGES, LABELS, BOXES = kind_of({}, "edges"), KINDS["labels"], KINDS["boxes"]


def layer(colour: tuple[int, int, int], rows: slice, size: int = 8) -> Image.Image:
    values = np.zeros((size, size, 4), np.uint8)
    values[rows] = (*colour, 255)
    return Image.fromarray(values)


def image_of(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)))


def test_paint_becomes_classes_by_the_nearest_colour_and_bare_places_are_of_none() -> None:
    made = painted_view(LABELS, {"background": None, "layers": [layer(LABELS.colours[3], slice(0, 4))]}, of=False)
    assert made is not None and not made[1]
    found = map_view(made[0], LABELS, (8, 8))
    assert (found[0, :4] == 3).all() and (found[0, 4:] == -1).all()


def test_paint_of_any_colour_is_a_line_and_a_loaded_picture_may_be_what_it_is_made_of() -> None:
    lines = layer((255, 0, 0), slice(2, 3))
    made = painted_view(EDGES, {"layers": [lines]}, of=True)
    assert made is not None and not made[1]
    values = image_of(made[0])
    assert (values[2] == 255).all() and values.sum() == 255 * 8
    photo = Image.fromarray(np.full((8, 8, 3), 90, np.uint8))
    itself, made_of_it = (painted_view(EDGES, {"background": photo, "layers": []}, of=of) for of in (False, True))
    assert itself is not None and made_of_it == (itself[0], True) and not itself[1]
    both = painted_view(EDGES, {"background": photo, "layers": [lines]}, of=False)
    assert both is not None and set(np.unique(image_of(both[0]))) == {90, 255}
    assert painted_view(EDGES, {"background": None, "layers": [Image.new("RGBA", (8, 8))]}, of=False) is None


def test_lines_of_boxes_and_triples_are_read_and_wrong_ones_named() -> None:
    boxes = words_view(written("boxes", BOXES, "0.1 0.2 0.5 0.6 a red ring\n\n0.5, 0.5, 1, 1 two words"), BOXES)
    assert isinstance(boxes, Boxes) and boxes.phrases == (("a red ring", "two words"),)
    graph = words_view(written("graph", KINDS["graph"], "red ring | left of | green square"), KINDS["graph"])
    assert isinstance(graph, Graph) and graph.triples == ((("red ring", "left of", "green square"),),)
    for kind, text in ((BOXES, "0.1 0.2 0.5"), (BOXES, "a b c d e"), (KINDS["graph"], "red ring left of")):
        with pytest.raises(UserError, match=r"line 1: got .*; write"):
            written("it", kind, text)
    with pytest.raises(UserError, match="edges: got the weight 'x'"):
        told_by({"edges": EDGES}, [(None, "", None, "x", False)])


@pytest.fixture(scope="module")
def model(kl_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    conditions = (Condition(view="edges", port=Concat()), Condition(view="boxes", port=Gated(most=4)))
    return told_model(kl_model, conditions, tmp_path_factory.mktemp("views"))


def test_a_call_tells_of_views_and_gets_the_picture_of_sample(model: Path, tmp_path: Path) -> None:
    stream = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 2, (SIDE, SIDE), dtype=np.uint8) * 255).save(stream, "PNG")
    boxes = [{"box": [0.1, 0.1, 0.6, 0.6], "text": "a pink ring"}]
    values: dict[str, Any] = {"prompt": "a pink ring", "steps": 2, "seed": 5}
    given = {"edges": {"file": base64.b64encode(stream.getvalue()).decode(), "weight": 0.5}, "boxes": boxes}
    with served(model, tmp_path / "files") as server:

        def call(values: Any) -> tuple[int, Any]:
            status, said, _ = ask(server.port, "POST", "/api/draw", json.dumps(values).encode(), {"Content-Type": "application/json"})
            return status, json.loads(said)

        status, said = call({**values, "given": given})
        assert status == 200, said
        (found,) = said["pictures"]
        assert [(one["view"], one["weight"], one["file"]) for one in json.loads(found["recipe"]["given"])] == [
            ("edges", 0.5, "edges.png"),
            ("boxes", 1.0, "boxes.json"),
        ]
        assert call(values)[1]["pictures"][0]["png"] != found["png"]
        for wrong, said_of_it in (
            ({"given": {"depth": boxes}}, "given: this model reads no view 'depth'; it reads edges, boxes"),
            ({"given": {"boxes": [{"box": [1, 2]}]}}, "no box: "),
            ({"given": {"edges": "%%"}}, "given: edges: a picture in base64 is needed"),
            ({"given": {"edges": {"weight": 1}}}, "given: edges: file is missing"),
            ({"given": {"edges": {"file": boxes, "weight": 99}}}, "a number from 0 to 10"),
            ({"given": ["edges=/etc/hostname"]}, "given: got "),
            ({"prompts": "a ring --given edges=/etc/hostname"}, "views are not read here"),
        ):
            status, answer = call({**values, **wrong} if "given" in wrong else {**wrong, "steps": 2})
            assert status == 422 and said_of_it in answer["error"], answer
            assert str(tmp_path) not in answer["error"] and "ldm-demo" not in answer["error"]
    (tmp_path / "edges.png").write_bytes(stream.getvalue())
    (tmp_path / "boxes.json").write_text(json.dumps(boxes))
    words = ["--given", f"edges={tmp_path / 'edges.png'}@0.5", "--given", f"boxes={tmp_path / 'boxes.json'}"]
    out = str(tmp_path / "out")
    assert main(["sample", "a pink ring", "--steps", "2", "--seed", "5", "--model", str(model), "--out", out, *words]) == 0
    again = np.asarray(Image.open(next((tmp_path / "out").glob("*.png"))))
    assert np.array_equal(image_of(base64.b64decode(found["png"])), again)
