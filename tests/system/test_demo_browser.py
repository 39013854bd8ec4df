"""The page in a real browser: people type, draw, paint, cancel and upload."""

from __future__ import annotations

import base64
import importlib.util
import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from demo_server import Served, served, until
from finished_model import SIDE
from layout_boxes import SCRIPT, chromium, opened, problems
from PIL import Image

from ldm.__main__ import main
from ldm.sampling.recipe import Recipe, read_recipe

WANTING = [name for name in ("gradio", "playwright") if importlib.util.find_spec(name) is None] + ["chromium"] * (chromium() is None)
IN_CI = os.environ.get("CI", "").lower() in ("true", "1")
if WANTING and not IN_CI:
    pytest.skip(f"browser tests need {', '.join(WANTING)}", allow_module_level=True)


def fail_in_ci() -> None:
    """In CI a browser test that cannot run has failed: nobody would read that it was skipped."""
    if WANTING:
        pytest.fail(f"CI runs the browser tests, which need {', '.join(WANTING)}; .ci/run installs them", pytrace=False)


@pytest.fixture(scope="module", autouse=True)
def nothing_wanting() -> None:
    fail_in_ci()


@pytest.fixture(scope="module")
def server(kl_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    from ldm.demo.server import Door, catalogue_of
    from ldm.sampling.request import Adapters, Device

    catalogue = catalogue_of(str(kl_model), Door(), Adapters(), Device(device="cpu"))
    catalogue.opened(catalogue.chosen("", (), ""))  # as the command does before it listens
    with served(kl_model, tmp_path_factory.mktemp("files"), catalogue=catalogue) as made:
        yield made


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with opened() as made:
        yield made


class User:
    """Someone with a browser of their own."""

    def __init__(self, browser: Any, server: Served) -> None:
        self.context = browser.new_context(viewport={"width": 1280, "height": 900})
        self.page = self.context.new_page()
        self.page.set_default_timeout(60_000)
        self.problems: list[str] = []
        self.hosts: set[str] = set()
        self.page.on("pageerror", lambda error: self.problems.append(str(error)))
        self.page.on("console", lambda said: self.problems.append(f"{said.text} {said.location}") if said.type == "error" else None)
        self.page.on("request", lambda request: self.hosts.add(request.url.split("/")[2]) if request.url.startswith("http") else None)
        self.come(server)

    def come(self, server: Served) -> None:
        """Open the page."""
        self.page.goto(server.url)
        self.page.wait_for_selector("#ldm-generate")

    def write(self, **fields: object) -> None:
        """Fill in fields by their ids."""
        for name, value in fields.items():
            kind = "textarea" if name in ("prompt", "negative") else "input[type=number]"
            self.page.fill(f"#ldm-{name} {kind}", str(value))

    def start(self, **fields: object) -> None:
        """Press Generate; what the panel said before does not count any more."""
        self.write(**fields)
        self.page.evaluate("document.querySelector('#ldm-live .ldm-live').innerText = ''")
        self.page.click("#ldm-generate")

    def forget(self) -> None:
        """Remove the history."""
        self.page.get_by_role("tab", name="History").click()
        self.page.wait_for_selector("#ldm-history img")
        self.page.wait_for_function("[...document.querySelectorAll('#ldm-history img')].every(one => one.complete)")
        self.page.click("#ldm-forget")
        self.page.wait_for_selector("#ldm-history img", state="detached")

    def draw(self, **fields: object) -> list[bytes]:
        """Press Generate and wait for the pictures: their files."""
        self.start(**fields)
        self.wait(r"pictures? in [\d.]+ s")
        addresses = self.page.eval_on_selector_all("#ldm-pictures .grid-wrap img", "all => all.map(one => one.src)")
        return [self.context.request.get(address).body() for address in addresses]

    def forgive(self) -> None:
        """Forget the problems so far; the browser may tell of the last ones a moment later."""
        self.page.wait_for_timeout(1500)
        self.problems.clear()

    def wait(self, said: str) -> None:
        """Until the panel says something, and Generate is free again."""
        self.page.wait_for_function("said => document.querySelector('#ldm-live').innerText.match(said)", arg=said)
        self.page.wait_for_selector("#ldm-generate:not([disabled])")


@pytest.fixture(scope="module")
def ann(browser: Any, server: Served) -> Iterator[User]:
    yield from visit(browser, server)


@pytest.fixture(scope="module")
def bob(browser: Any, server: Served) -> Iterator[User]:
    yield from visit(browser, server)


def visit(browser: Any, server: Served) -> Iterator[User]:
    user = User(browser, server)
    yield user
    user.context.close()
    assert user.hosts == {f"127.0.0.1:{server.port}"}, "a request to another machine"
    assert not user.problems


def pixels(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def settings(data: bytes, folder: Path) -> Recipe:
    (folder / "got.png").write_bytes(data)
    found = read_recipe(folder / "got.png")
    assert isinstance(found, Recipe)
    return found


DROP = "#ldm-drop input[type=file], #ldm-drop ~ input[type=file], :has(> #ldm-drop) > input[type=file]"


def drop(page: Any, data: bytes, where: str) -> None:
    """Drop a picture on a part of the page."""
    script = """([data, where]) => {
      const bytes = Uint8Array.from(atob(data), one => one.charCodeAt(0)), moved = new DataTransfer()
      moved.items.add(new File([bytes], "dropped.png", {type: "image/png"}))
      for (const type of ["dragover", "drop"])
        document.querySelector(where).dispatchEvent(new DragEvent(type, {dataTransfer: moved, bubbles: true, cancelable: true}))
    }"""
    page.evaluate(script, [base64.b64encode(data).decode(), where])


def test_typing_and_drawing_shows_the_picture_of_sample(ann: User, kl_model: Path, tmp_path: Path) -> None:
    drawn = ann.draw(prompt="a red circle", negative="blurry", many=2, steps=3)
    assert len(drawn) == 2 and settings(drawn[1], tmp_path).seed == settings(drawn[0], tmp_path).seed + 1
    told = settings(drawn[0], tmp_path)
    assert (told.prompt, told.negative, told.steps, str(told.seed)) == (
        "a red circle",
        "blurry",
        3,
        ann.page.input_value("#ldm-seed input"),
    )
    assert main(["sample", "--from", str(tmp_path / "got.png"), "--model", str(kl_model), "--out", str(tmp_path / "out")]) == 0
    assert np.array_equal(pixels((tmp_path / "out" / f"00000_seed{told.seed}.png").read_bytes()), pixels(drawn[0]))
    ann.page.uncheck("#ldm-fresh input")
    ann.page.focus("#ldm-prompt textarea")
    ann.page.evaluate("document.querySelector('#ldm-live .ldm-live').innerText = ''")
    ann.page.keyboard.press("Control+Enter")
    ann.wait("2 pictures in")
    assert ann.page.input_value("#ldm-seed input") == str(told.seed)
    ann.write(many=1)


def test_painting_draws_anew_under_the_paint_alone(ann: User, tmp_path: Path) -> None:
    (before,) = ann.draw(prompt="a red circle")
    assert not ann.page.is_visible("#ldm-editor")
    ann.page.click("#ldm-pictures-go-on")  # which opens the editor, too
    canvas = ann.page.locator("#ldm-editor canvas").first
    ann.page.click("#ldm-editor button[aria-label=Brush]")
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    centre = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    ann.page.mouse.move(*centre)
    ann.page.mouse.down()
    ann.page.mouse.move(centre[0] + 30, centre[1] + 20, steps=5)
    ann.page.mouse.up()
    (after,) = ann.draw(prompt="a blue ring", strength=1)
    links = ann.page.eval_on_selector_all("#ldm-live a", "all => all.map(one => one.href)")
    init, mask = (pixels(ann.context.request.get(link).body()) for link in links)
    new = mask[..., 0] >= 128
    assert 0.02 < new.mean() < 0.9
    assert np.abs(init.astype(int) - pixels(before)).max() <= 1
    assert np.array_equal(pixels(after)[~new], init[~new]) and not np.array_equal(pixels(after)[new], init[new])
    assert settings(after, tmp_path).mask
    ann.page.click("#ldm-editor button[aria-label='Clear canvas']")
    (plain,) = ann.draw()
    assert not settings(plain, tmp_path).init


def test_cancelling_frees_the_place(bob: User, server: Served) -> None:
    bob.start(prompt="a ring", steps=150, many=64)
    bob.page.wait_for_selector("#ldm-live .ldm-bar")
    bob.page.wait_for_selector("#ldm-cancel:not([disabled])")
    bob.page.keyboard.press("Escape")
    bob.wait("Cancelled")
    assert len(bob.draw(many=1, steps=2)) == 1
    bob.start(steps=150, many=64)
    until(lambda: bool(server.studio._queue))
    bob.page.goto("about:blank")  # who leaves waits no more
    until(lambda: not server.studio._queue)
    bob.forgive()  # streams that broke off
    bob.come(server)


def test_two_users_at_once_have_their_own_pictures(ann: User, bob: User, tmp_path: Path) -> None:
    ann.start(prompt="a red circle", many=6, steps=10)
    bob.page.get_by_role("tab", name="Pictures").click()
    (his,) = bob.draw(prompt="a blue ring", many=1, steps=2)
    ann.wait("6 pictures in")
    assert settings(his, tmp_path).prompt == "a blue ring"
    for user, count, prompt in ((ann, 6, "a red circle"), (bob, 1, "a blue ring")):
        user.page.get_by_role("tab", name="History").click()
        user.page.wait_for_selector("#ldm-history img")
        found = user.page.eval_on_selector_all("#ldm-history .grid-wrap img", "all => all.map(one => one.src)")
        own = [settings(user.context.request.get(one).body(), tmp_path).prompt for one in found]
        assert own[:count] == [prompt] * count and (user is ann or "a red circle" not in own)
    bob.forget()
    for user in (ann, bob):
        user.page.get_by_role("tab", name="Pictures").click()


def test_a_file_of_prompts_is_loaded_and_every_line_drawn(browser: Any, server: Served, tmp_path: Path) -> None:
    kim = User(browser, server)
    page = kim.page
    page.click("#ldm-several > button")
    field = "#ldm-lines textarea"

    def load(name: str, data: bytes) -> None:
        (tmp_path / name).write_bytes(data)
        with page.expect_file_chooser() as asked:
            page.click("#ldm-load")
        asked.value.set_files(tmp_path / name)

    load("prompts.txt", b"\xef\xbb\xbfa blue ring --d 5 --s 2\r\na green triangle --d 6 --s 1\r\n")  # as Windows writes it
    page.wait_for_function("area => document.querySelector(area).value.startsWith('a blue ring')", arg=field)
    assert page.input_value(field) == "a blue ring --d 5 --s 2\na green triangle --d 6 --s 1\n"
    told = [settings(data, tmp_path) for data in kim.draw(prompt="of no interest", many=1)]
    assert [(one.prompt, one.seed, one.steps) for one in told] == [("a blue ring", 5, 2), ("a green triangle", 6, 1)]
    load("prompts.json", b'[{"prompt": "a pink cross", "seed": 7, "steps": 1}]')
    page.wait_for_function("area => document.querySelector(area).value.includes('pink')", arg=field)
    assert [settings(data, tmp_path).seed for data in kim.draw()] == [7]
    load("photo.txt", b"\xff\xd8\xff\xe0\x00\x10JFIF" + bytes(range(256)))
    kim.wait("no file of prompts")
    assert "a pink cross" in page.input_value(field), "what was there stays"
    page.fill(field, "")
    assert [settings(data, tmp_path).prompt for data in kim.draw(prompt="a grey star", steps=1)] == ["a grey star"]
    page.context.close()
    assert not kim.problems


def test_a_dropped_picture_fills_in_its_settings(ann: User, bob: User, tmp_path: Path) -> None:
    (drawn,) = ann.draw(prompt="a (green:1.2) ring", steps=7, guidance=3.5, many=1)
    (tmp_path / "drawn.png").write_bytes(drawn)
    drop(bob.page, drawn, "#ldm-pictures")
    bob.wait("settings are filled in")
    assert bob.page.input_value("#ldm-prompt textarea") == "a (green:1.2) ring"
    (again,) = bob.draw()
    assert np.array_equal(pixels(drawn), pixels(again))


def test_a_gigabyte_is_refused_and_the_page_goes_on(ann: User, server: Served, tmp_path: Path) -> None:
    huge = tmp_path / "huge.png"
    with huge.open("wb") as file:
        file.truncate(2**30)
    before = sum(path.stat().st_size for path in server.files.rglob("*") if path.is_file())
    ann.page.set_input_files(DROP, huge)
    ann.page.wait_for_selector("text=/exceeds|too large|maximum/i")
    assert sum(path.stat().st_size for path in server.files.rglob("*") if path.is_file()) == before
    ann.forgive()
    assert len(ann.draw(prompt="a ring", steps=2)) == 1


def test_files_that_are_not_the_users_do_not_come_out(ann: User, server: Served, kl_model: Path) -> None:
    for path in (
        "/etc/passwd",
        str(kl_model / "ldm.json"),
        f"{server.files}/../{kl_model.name}/ldm.json",
        "http://127.0.0.1/",
        "file:///etc/passwd",
    ):
        for door in ("gradio_api/file=", "gradio_api/proxy=", "static/../../..", ""):
            status = ann.page.evaluate("address => fetch(address).then(answer => answer.status)", server.url + door + path)
            assert status in (400, 403, 404), (door, path)
    body = {"data": [{"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}}], "fn_index": 0, "session_hash": "x"}
    assert ann.context.request.post(f"{server.url}gradio_api/queue/join", data=body).status == 404
    ann.forgive()  # the browser reports each 404


def test_a_grid_is_shown(ann: User, server: Served) -> None:
    ann.write(prompt="a red circle", steps=2)
    ann.page.get_by_role("tab", name="Grid").click()
    ann.page.fill("#ldm-across-values input, #ldm-across-values textarea", "1,4")
    ann.page.fill("#ldm-down-values input, #ldm-down-values textarea", "1,2,3")
    ann.page.click("#ldm-draw-grid")
    ann.wait("6 pictures in")
    address = ann.page.get_attribute("#ldm-grid img", "src")
    assert pixels(ann.context.request.get(address).body()).shape[0] > 3 * SIDE


def test_tokens_are_counted_and_examples_fill_in_the_prompt(ann: User, server: Served) -> None:
    ann.come(server)
    ann.write(prompt="a red circle")
    ann.page.wait_for_function("document.querySelector('#ldm-tokens').innerText.match(/^3 of [0-9]+ tokens/)")
    ann.page.click("#ldm-examples button")
    ann.page.wait_for_function("document.querySelector('#ldm-prompt textarea').value === 'a small red circle'")
    ann.page.hover("#ldm-steps")
    assert "Denoising (sampling) steps" in str(ann.page.get_attribute("#ldm-steps", "title"))


def test_delete_takes_the_chosen_picture_and_no_other(browser: Any, server: Served) -> None:
    dan = User(browser, server)
    page = dan.page
    dan.draw(prompt="a red circle", many=3, steps=1)
    page.get_by_role("tab", name="History").click()
    page.wait_for_selector("#ldm-history .grid-wrap img")
    shown = "all => all.map(one => one.src)"
    before = page.eval_on_selector_all("#ldm-history .grid-wrap img", shown)
    page.click("#ldm-delete")
    dan.wait("Choose the picture to delete first")
    assert page.eval_on_selector_all("#ldm-history .grid-wrap img", shown) == before and len(before) == 3
    page.click("#ldm-history .grid-wrap button >> nth=1")
    page.click("#ldm-delete")
    dan.wait("The picture is deleted")
    page.reload()
    page.wait_for_selector("#ldm-generate")
    page.get_by_role("tab", name="History").click()
    page.wait_for_selector("#ldm-history .grid-wrap img")
    names = [[address.rpartition("/")[2] for address in all_] for all_ in (before, page.eval_on_selector_all("#ldm-history img", shown))]
    assert names[1] == [names[0][0], names[0][2]]
    page.context.close()


def test_no_part_is_clipped_or_lies_over_another(browser: Any, server: Served) -> None:
    eve = User(browser, server)  # of her own: she leaves every part open
    page = eve.page
    label = page.locator("#ldm-height [data-testid=block-info]").bounding_box()
    assert label["height"] < 30, "one line"
    page.set_viewport_size({"width": 390, "height": 844})
    examples, pictures = (page.locator(name).bounding_box() for name in ("#ldm-examples", "#ldm-pictures"))
    assert examples["height"] < 100 and pictures["y"] < 700, "examples stand beside each other on a phone, and the picture is in sight"
    eve.draw(prompt="a red circle", many=5, steps=1)
    page.set_viewport_size({"width": 390, "height": 900})
    for tab in ("Grid", "History"):
        page.get_by_role("tab", name=tab).click()
        page.wait_for_timeout(500)
        assert page.evaluate(SCRIPT) == [], tab
    page.get_by_role("tab", name="Pictures").click()
    page.set_viewport_size({"width": 1280, "height": 900})
    for part in ("start", "second", "several", "more"):
        page.click(f"#ldm-{part} > button")
    assert problems(page) == []
    page.set_viewport_size({"width": 390, "height": 844})
    order = [page.locator(name).bounding_box()["y"] for name in ("#ldm-generate", "#ldm-pictures", "#ldm-seed")]
    assert order == sorted(order), "on a phone the picture stands above the settings"
    page.context.close()
