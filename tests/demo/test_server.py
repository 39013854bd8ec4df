"""The page without a browser: its verb, what it draws beside `sample.py`, and what it refuses."""

from __future__ import annotations

import asyncio
import html
import io
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from demo_server import ask, until
from finished_model import CAPTIONS, SIDE
from PIL import Image, PngImagePlugin

from ldm.__main__ import main
from ldm.demo.files import Shelf
from ldm.demo.orders import NAMES, Form, blank, check_upload, fill_in, read_form
from ldm.demo.studio import Studio
from ldm.families.registry import load
from ldm.sampling.recipe import Recipe, read_recipe

pytest.importorskip("gradio", reason="the page needs gradio")

MADE = {"prompt": "p", "negative": "", "seed": 0, "steps": 4, "guidance": 1.0, "rescale": 0.0, "sampler": "ddim", "spacing": "trailing"}
MADE |= {"width": SIDE, "height": SIDE, "model": "m", "model_hash": "h"}


@pytest.fixture(scope="module")
def page(kl_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    from ldm.demo.page import Page, load_gradio

    load_gradio()
    shelf = Shelf(tmp_path_factory.mktemp("shelf"))
    with Studio(load(kl_model)) as studio:
        yield Page(studio, shelf, "tiny", 256)
    shelf.close()


ANN: Any = SimpleNamespace(cookies={"ldm_user": "a" * 22}, session_hash="tab")


def picture(seed: int = 0, side: int = SIDE) -> Image.Image:
    coarse = np.random.default_rng(seed).integers(0, 255, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((side, side), Image.Resampling.BILINEAR)


def paint(side: int = SIDE) -> Image.Image:
    made = Image.new("RGBA", (side, side))
    made.paste((255, 0, 90, 255), (4, 4, side // 2, side // 2))
    return made


def generated(page: Any, form: Form, editor: Any = None, fresh: bool = False) -> tuple[str, list[Path], list[Any]]:
    """The last panel, the pictures' files, and everything that was told meanwhile."""

    async def through() -> list[Any]:
        return [told async for told in page.generate(ANN, fresh, editor, *[getattr(form, name) for name in NAMES])]

    told = asyncio.run(through())
    return told[-1][0], [Path(path) for path in told[-1][5]], told


FORMS: dict[str, dict[str, Any]] = {
    "plain": {"prompt": CAPTIONS[0], "seed": 5},
    "several": {
        "prompt": f"({CAPTIONS[1]}:1.3) AND a ring",
        "pictures": 3,
        "negative": 'blurry, "bad"',
        "sampler": "euler_a",
        "seed": 2**40,
    },
    "everything": {
        "prompt": "a [red] ring",
        "notation": False,
        "sampler": "ddim",
        "eta": 0.5,
        "rescale": 0.3,
        "guidance_from": 0.1,
        "guidance_to": 0.9,
        "guidance_curve": "linear",
        "spacing": "leading",
        "hires": 2.0,
        "hires_strength": 0.4,
        "width": 64,
        "height": 32,
        "precision": "bf16",
    },
    "out of a picture": {"prompt": CAPTIONS[2], "strength": 0.6, "pictures": 2},
    "under paint": {"prompt": CAPTIONS[3], "strength": 0.9, "sampler": "dpmpp_2m"},
}


@pytest.mark.parametrize("name", FORMS)
def test_the_command_beside_a_picture_draws_it_again_to_the_byte(name: str, page: Any, kl_model: Path, tmp_path: Path) -> None:
    form = replace(blank(page.family), **FORMS[name])
    editor = {"background": picture(1, 40), "layers": [paint(40)] if name == "under paint" else [Image.new("RGBA", (40, 40))]}
    said, paths, _ = generated(page, form, editor if name in ("out of a picture", "under paint") else None)
    words = shlex.split(html.unescape(re.search(r"<pre[^>]*>(.*)</pre>", said, re.S)[1]))  # type: ignore[index]
    words[words.index("--model") + 1] = str(kl_model)
    for link in re.findall(r'href="/gradio_api/file=([^"]*)"', said):
        words = [link if word == Path(link).name else word for word in words]
    assert main([*words[1:], "--out", str(tmp_path)]) == 0
    again = sorted(tmp_path.glob("0*.png"))
    assert len(again) == len(paths) == form.pictures
    for one, two in zip(paths, again, strict=True):
        assert np.array_equal(np.asarray(Image.open(one)), np.asarray(Image.open(two)))
        ours, theirs = read_recipe(one), read_recipe(two)
        assert isinstance(ours, Recipe) and isinstance(theirs, Recipe) and replace(ours, model=theirs.model) == theirs


def test_what_a_picture_says_fills_in_the_form_that_draws_it(page: Any) -> None:
    form = replace(blank(page.family), **FORMS["everything"])
    _, (path,), _ = generated(page, form)
    said, *values, fresh = page.read(str(path))
    assert "filled in" in said and fresh is False
    assert page.form(values) == replace(form, spacing="leading")
    _, (again,), _ = generated(page, page.form(values))
    assert np.array_equal(np.asarray(Image.open(path)), np.asarray(Image.open(again)))


def test_a_fresh_seed_is_told_and_differs(page: Any) -> None:
    form = replace(blank(page.family), prompt="a ring")
    seeds = [next(told[2] for told in generated(page, form, fresh=True)[2]) for _ in range(3)]
    assert len(set(seeds)) == 3 and all(0 <= seed < 2**32 for seed in seeds)


def test_an_empty_prompt_is_told_before_anything_is_drawn(page: Any) -> None:
    panel, paths, told = generated(page, replace(blank(page.family), prompt=""))
    assert "an empty prompt" in told[0][0] and told[0][1] == [] and "an empty prompt" in panel and len(paths) == 1


def sheet_of(page: Any, form: Form, x: tuple[str, str], y: tuple[str, str], editor: Any = None) -> tuple[str, Any]:
    """The last panel and the table's file."""

    async def through() -> list[Any]:
        told = page.grid(ANN, *x, *y, editor, *[getattr(form, name) for name in NAMES])
        return [one async for one in told]

    return asyncio.run(through())[-1][:2]  # type: ignore[return-value]


def test_a_grid_is_the_table_that_the_command_draws(page: Any, kl_model: Path, tmp_path: Path) -> None:
    form = replace(blank(page.family), prompt="a red circle", seed=3, sampler="euler_a", pictures=5)
    for number, (x, y) in enumerate(((("prompt", "red, green"), ("steps", "2,3")), (("sampler", "ddim,plms"), ("", "")))):
        said, path = sheet_of(page, form, x, y)
        assert f"{4 - 2 * number} pictures" in said
        words = [word for name, axis in (("--x", x), ("--y", y)) if axis[0] for word in (name, "=".join(axis))]
        fixed = ["--seed", "3", "--sampler", "euler_a", "--model", str(kl_model), "--out", str(tmp_path / f"{number}.png")]
        assert main(["grid", "a red circle", *words, *fixed]) == 0
        assert np.array_equal(np.asarray(Image.open(path)), np.asarray(Image.open(tmp_path / f"{number}.png")))
    said, path = sheet_of(page, form, ("", ""), ("strength", "0.2,0.9"), {"background": picture(1), "layers": []})
    assert "2 pictures" in said and Image.open(path).height > 2 * SIDE


@pytest.mark.parametrize(
    ("x", "y", "said"),
    [
        (("steps", "x"), ("", ""), "steps is &#x27;x&#x27;"),
        (("colour", "1"), ("", ""), "one of guidance"),
        (("seed", ",".join(map(str, range(65)))), ("", ""), "65 pictures; at most 64"),
        (("prompt", "cat,dog"), ("", ""), "is not in"),
        (("steps", "1"), ("steps", "2"), "each its own setting"),
        (("strength", "0,1"), ("", ""), "without a picture"),
        (("", ""), ("hires_strength", "0,1"), "drawn at once"),
    ],
)
def test_grids_that_cannot_be(x: tuple[str, str], y: tuple[str, str], said: str, page: Any) -> None:
    assert said in sheet_of(page, replace(blank(page.family), prompt="a ring"), x, y)[0]


def test_whoever_leaves_frees_the_place(page: Any) -> None:
    form = replace(blank(page.family), prompt="a ring", steps=1000)

    async def leave(how: str) -> None:
        told = page.generate(ANN, False, None, *[getattr(form, name) for name in NAMES])
        await anext(told)
        (job,) = page.jobs["tab"]
        if how == "gone":
            await told.aclose()
        else:
            (page.cancel if how == "cancelled" else page.leave)(ANN)
            last = [one async for one in told][-1]
            assert "Cancelled" in last[0]
        assert job.state == "cancelled"

    for how in ("gone", "cancelled", "left"):
        asyncio.run(leave(how))
    said, paths, _ = generated(page, replace(form, steps=2))
    assert len(paths) == 1 and "1 picture in" in said


def test_mistakes_are_told_and_escaped(page: Any) -> None:
    form = blank(page.family)
    for wrong, said in (({"steps": 5000}, "steps: got"), ({"width": 33}, "multiples of 8"), ({"sampler": "<script>"}, "&lt;script&gt;")):
        panel, _, told = generated_or_not(page, replace(form, **wrong))
        assert said in panel and "<script>" not in panel and len(told) == 1
    panel, _, _ = generated_or_not(page, form, {"background": None, "layers": [paint()]})
    assert "no picture under it" in panel


def generated_or_not(page: Any, form: Form, editor: Any = None) -> tuple[str, list[Any], list[Any]]:
    async def through() -> list[Any]:
        return [told async for told in page.generate(ANN, False, editor, *[getattr(form, name) for name in NAMES])]

    told = asyncio.run(through())
    return told[-1][0], told[-1][1], told


@pytest.mark.parametrize(
    "values",
    [
        {"steps": 0},
        {"steps": 2.5},
        {"steps": "ten"},
        {"steps": True},
        {"guidance": float("nan")},
        {"guidance": float("inf")},
        {"seed": -1},
        {"seed": 2**54},
        {"width": 0},
        {"height": 10**9},
        {"pictures": 65},
        {"strength": 1.5},
        {"eta": [1]},
        {"prompt": 3},
        {"prompt": "x" * 10_001},
        {"notation": "yes"},
        {"guidance_from": -1},
        {"hires": 0},
        {"sampler": {"a": 1}},
    ],
)
def test_what_a_client_may_not_send(values: dict[str, Any], page: Any) -> None:
    with pytest.raises(ValueError, match=next(iter(values))):
        read_form(values, 256, blank(page.family))


def test_forms_take_what_fits(page: Any) -> None:
    found = read_form({"steps": 7.0, "prompt": "a\0b\ud800", "guidance": 3, "eta": None}, 256, blank(page.family))
    assert (found.steps, found.prompt, found.guidance, found.eta) == (7, "a b?", 3.0, 0.0)


def test_other_programs_pictures_are_read_as_far_as_they_fit(page: Any, tmp_path: Path) -> None:
    chunks = PngImagePlugin.PngInfo()
    text = "a <b>cat</b>\nNegative prompt: dog\nSteps: 9, Sampler: DPM++ 2M Karras, CFG scale: 7, Seed: 4, Size: 4096x64, Model: x"
    chunks.add_text("parameters", text)
    picture().save(tmp_path / "theirs.png", pnginfo=chunks)
    said, *values, _ = page.read(str(tmp_path / "theirs.png"))
    form = page.form(values)
    assert (form.prompt, form.negative, form.steps, form.sampler, form.spacing) == ("a <b>cat</b>", "dog", 9, "dpmpp_2m", "karras")
    assert "width: got" in said and form.width == SIDE and form.height == 64
    picture().save(tmp_path / "none.png")
    for path, words in ((tmp_path / "none.png", "carries no recipe"), (tmp_path / "gone.png", "gone"), (None, "choose a picture first")):
        assert words in page.read(str(path) if path else None)[0]


def test_settings_that_the_page_lacks_are_told(page: Any) -> None:
    base = Recipe(**{**MADE, "model": "other"})
    _, notes = fill_in(blank(page.family), replace(base, variation=0.5, init="f" * 64), page.catalogue, page.family.content_hash, 256)
    assert ["made by the model other" in notes[0], "drawn out of another picture" in notes[1], "variation" in notes[2]] == [True] * 3
    _, notes = fill_in(blank(page.family), replace(base, crop="8,0", original_size="64x64"), page.catalogue, page.family.content_hash, 256)
    assert "It also used original_size, crop, which this page does not have" in notes[-1]


def test_uploads_are_refused_by_length_and_header(tmp_path: Path) -> None:
    for data, said in ((b"GIF89a" + bytes(99), "not an image"), (bytes(2**25 + 1), "at most 32 MB"), (_bomb(), "too many pixels")):
        with pytest.raises(ValueError, match=f"init: .*{said}"):
            check_upload("init", data)


def _bomb() -> bytes:
    stream = io.BytesIO()
    Image.new("1", (20_000, 20_000)).save(stream, "PNG")
    return stream.getvalue()


def test_the_shelf_is_bounded_and_forgets(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path, most=4000)
    recipe = Recipe(**MADE)
    for seed in range(8):
        shelf.keep("ann", replace(recipe, seed=seed), np.asarray(picture(seed)))
        time.sleep(0.002)
    assert [one.recipe.seed for one in shelf.history("ann")] == [7, 6, 5, 4, 3, 2, 1, 0] and shelf.history("bob") == []
    shelf.sweep()
    left = shelf.history("ann")
    assert sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()) <= 4000 and left and left[0].recipe.seed == 7
    shelf.forget("ann")
    assert shelf.history("ann") == [] and not list(tmp_path.rglob("*.png"))
    shelf.close()


# The verb


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--host", "0.0.0.0"], "lets other machines in; give --token"),
        (["--host", "0.0.0.0", "--token", "short"], "at least 12"),
        (["--token", "short"], "at least 12"),
        (["no/such/model"], "no such folder"),
        (["--port", "70000"], "port"),
    ],
)
def test_mistakes_at_the_door(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", *words]) == 2
    assert said in capsys.readouterr().err


def test_without_gradio_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert main(["demo", "owner/model"]) == 2
    assert capsys.readouterr().err == "ldm demo: demo: gradio is not installed; python -m pip install gradio\n"


def test_a_taken_port_is_told(kl_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert main(["demo", str(kl_model), "--port", str(taken.getsockname()[1])]) == 2
    assert "choose another --port" in capsys.readouterr().err


def test_the_verb_opens_the_page_that_its_options_name(kl_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import uvicorn

    run, found = uvicorn.Server.run, dict[str, Any]()

    def briefly(self: Any, sockets: list[socket.socket]) -> None:
        thread = threading.Thread(target=run, args=(self, sockets))
        thread.start()
        until(lambda: self.started)
        port = sockets[0].getsockname()[1]
        found["closed"] = ask(port, "GET", "/config")[0]
        found["config"] = json.loads(ask(port, "GET", "/config", headers={"Authorization": "Bearer out-of-the-environment"})[1])
        self.should_exit = True
        thread.join()

    monkeypatch.setattr(uvicorn.Server, "run", briefly)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("LDM_DEMO_TOKEN", "out-of-the-environment")
    assert main(["demo", str(kl_model), "--port", "0", "--device", "cpu", "--precision", "bf16", "--low-memory", "--max-size", "64"]) == 0
    parts = {part["props"].get("elem_id"): part["props"] for part in found["config"]["components"]}
    assert found["closed"] == 401 and parts["ldm-width"]["maximum"] == 64
    assert parts["ldm-precision"]["value"] == "bf16" and len(parts["ldm-precision"]["choices"]) == 1
    assert not list(tmp_path.glob("ldm-demo-*"))


@pytest.mark.slow
def test_an_interrupt_ends_the_verb_and_leaves_nothing(kl_model: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "ldm", "demo", str(kl_model), "--port", "0"]
    listening = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # a shell's background jobs ignore interrupts
    own = {**os.environ, "TMPDIR": str(tmp_path)}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=own, preexec_fn=listening) as process:
        assert process.stderr is not None
        port = int(re.search(r"http://127.0.0.1:(\d+)/", process.stderr.readline())[1])  # type: ignore[index]
        until(lambda: ask(port, "GET", "/config")[0] == 200, 60)
        process.send_signal(signal.SIGINT)
        assert process.wait(120) == 130
    assert not list(tmp_path.glob("ldm-demo-*"))


def test_an_early_prompt_is_counted_although_the_page_asks_for_its_own_at_first(page: Any) -> None:
    from ldm.demo.layout import build

    (counting,) = [one for one in build(page).fns.values() if one.name == "tokens"]  # one event: no answer passes another
    assert len(counting.targets) == 4 and counting.trigger_mode == "always_last"
