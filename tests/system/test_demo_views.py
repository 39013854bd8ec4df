"""The page's inputs for views in a real browser: people paint classes, drag boxes, load pictures, and get what `ldm sample` draws."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from demo_server import Served, served
from finished_model import SIDE, told_model
from layout_boxes import opened, problems
from PIL import Image
from test_demo_browser import User, fail_in_ci, pixels, settings

from ldm.__main__ import main
from ldm.data.scenes.views import KINDS
from ldm.families.latent_diffusion.conditions import Condition
from ldm.families.latent_diffusion.ports import Concat, Gated


@pytest.fixture(scope="module", autouse=True)
def nothing_wanting() -> None:
    fail_in_ci()


@pytest.fixture(scope="module")
def model(kl_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    ports = {"labels": Concat(), "edges": Concat(), "boxes": Gated(most=4)}
    conditions = tuple(Condition(view=view, port=port) for view, port in ports.items())
    return told_model(kl_model, conditions, tmp_path_factory.mktemp("views"))


@pytest.fixture(scope="module")
def server(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with served(model, tmp_path_factory.mktemp("files")) as made:
        yield made


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with opened() as made:
        yield made


@pytest.fixture
def user(browser: Any, server: Served) -> Iterator[User]:
    found = User(browser, server)
    found.page.uncheck("#ldm-fresh input")
    yield found
    assert not found.problems
    found.context.close()


def told(picture: bytes, folder: Path) -> list[dict[str, Any]]:
    return json.loads(settings(picture, folder).given or "[]")


def replayed(picture: bytes, model: Path, folder: Path, *given: str) -> np.ndarray:
    (folder / "got.png").write_bytes(picture)
    words = ["--from", str(folder / "got.png"), "--model", str(model), "--out", str(folder / "again")]
    assert main(["sample", *words, *given]) == 0
    return np.asarray(Image.open(next((folder / "again").glob("*.png"))))


def test_boxes_are_drawn_with_the_mouse_and_count(user: User, model: Path, tmp_path: Path) -> None:
    (plain,) = user.draw(prompt="a pink ring", steps=2)
    board = user.page.locator("#ldm-view-2 canvas")
    board.scroll_into_view_if_needed()
    box = board.bounding_box()
    at = [(box["x"] + share * box["width"], box["y"] + share * box["height"]) for share in (0.25, 0.75)]
    user.page.mouse.move(*at[1])
    user.page.mouse.down()
    user.page.mouse.move(*at[0], steps=4)
    user.page.mouse.up()
    user.page.keyboard.type("a pink ring")
    line = user.page.input_value("#ldm-view-2-text textarea").split(maxsplit=4)
    assert line[4] == "a pink ring" and np.allclose([float(word) for word in line[:4]], [0.25, 0.25, 0.75, 0.75], atol=0.01)
    assert user.page.evaluate("c => c.getContext('2d').getImageData(0, 0, c.width, c.height).data.some(v => v)", board.element_handle())
    (drawn,) = user.draw(prompt="a pink ring", steps=2)
    assert not np.array_equal(pixels(drawn), pixels(plain))
    (entry,) = told(drawn, tmp_path)
    assert (entry["view"], entry["file"], entry["weight"]) == ("boxes", "boxes.json", 1.0)
    given = [{"box": [float(word) for word in line[:4]], "text": "a pink ring"}]
    (tmp_path / "boxes.json").write_text(json.dumps(given))
    assert np.array_equal(replayed(drawn, model, tmp_path, "--given", f"boxes={tmp_path / 'boxes.json'}"), pixels(drawn))
    user.page.fill("#ldm-view-2-text textarea", "0.5 0.2 0.1")
    user.start(prompt="a pink ring")
    user.wait("boxes: line 1: got '0.5 0.2 0.1'; write left top right bottom words")


def test_classes_are_painted_in_their_colours_and_edges_made_of_a_photo(user: User, model: Path, tmp_path: Path) -> None:
    canvas = user.page.locator("#ldm-view-0-paint canvas").first
    user.page.click("#ldm-view-0-paint button[aria-label=Brush]")
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    centre = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    user.page.mouse.move(*centre)
    user.page.mouse.down()
    user.page.mouse.move(centre[0] + 30, centre[1] + 20, steps=5)
    user.page.mouse.up()
    photo = np.random.default_rng(0).integers(0, 255, (4, 4, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(photo).resize((SIDE, SIDE)).save(stream, "PNG")
    loaded = {"name": "photo.png", "mimeType": "image/png", "buffer": stream.getvalue()}
    user.page.set_input_files("#ldm-view-1-file input[type=file]", files=[loaded])
    user.page.wait_for_selector("#ldm-view-1-file >> text=photo")
    (drawn,) = user.draw(prompt="a pink ring", steps=2)
    first, second = told(drawn, tmp_path)
    assert (first["view"], first["of"]) == ("labels", False) and (second["view"], second["of"]) == ("edges", True)
    page = user.page
    assert problems(page) == []
    chips = page.eval_on_selector_all("#ldm-view-0 .ldm-chip", "all => all.map(one => one.innerText.trim())")
    assert tuple(chips) == KINDS["labels"].names
