"""Drawing by calls: one JSON request or gradio's client give the picture of `ldm sample`, by names of the catalogue alone."""

from __future__ import annotations

import base64
import io
import json
import socket
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from demo_server import Served, ask, served
from finished_model import CAPTIONS, SIDE, token_model
from PIL import Image

from ldm.__main__ import main
from ldm.config.errors import UserError
from ldm.demo.api import PARTS, order_of_call, schema
from ldm.demo.catalogue import Catalogue, Opened, Outfit
from ldm.demo.files import Shelf
from ldm.demo.orders import NAMES
from ldm.demo.page import OF_SOME
from ldm.demo.server import Door, catalogue_of
from ldm.families import registry
from ldm.families.draws import Wanted
from ldm.families.latent_diffusion.family import load
from ldm.formats.lora_files import write
from ldm.models.lora import Lora, Pair
from ldm.sampling.recipe import Recipe, read_recipe, save_picture
from ldm.sampling.request import Adapters, Device

pytest.importorskip("gradio", reason="the page needs gradio")


@pytest.fixture(scope="module")
def loras(kl_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a LoRA of the model, called style."""
    folder = tmp_path_factory.mktemp("loras")
    torch.manual_seed(0)
    pairs = {}
    family = load(kl_model)
    for layer in [n for n, _ in family.denoiser.named_modules() if n.endswith("to_k")]:
        out, inner = family.denoiser.get_submodule(layer).weight.shape  # type: ignore[union-attr, misc]
        pairs[layer] = Pair(torch.randn(2, inner), torch.randn(out, 2), 2.0)
    (file,) = write(Lora(pairs={"unet": pairs}), folder, "kohya")
    file.rename(folder / "style.safetensors")
    return folder


@pytest.fixture(scope="module")
def catalogue(kl_model: Path, loras: Path) -> Catalogue:
    return catalogue_of(str(kl_model), Door(lora_dir=(loras,), keep=2), Adapters(), Device(device="cpu"))


@pytest.fixture(scope="module")
def server(kl_model: Path, catalogue: Catalogue, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with served(kl_model, tmp_path_factory.mktemp("files"), catalogue=catalogue, largest=64) as made:
        yield made


def call(server: Served, values: Any, path: str = "/api/draw") -> tuple[int, Any]:
    body = values if isinstance(values, bytes) else json.dumps(values).encode()
    status, said, _ = ask(server.port, "POST", path, body, {"Content-Type": "application/json"})
    return status, json.loads(said) if said.startswith(b"{") else said


def text_of(image: Image.Image) -> str:
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return base64.b64encode(stream.getvalue()).decode()


def picture() -> Image.Image:
    coarse = np.random.default_rng(0).integers(0, 255, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((40, 40), Image.Resampling.BILINEAR)


CALLS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "plain": ({"prompt": CAPTIONS[0], "seed": 5, "steps": 2, "n": 2}, [CAPTIONS[0], "--seed", "5", "--steps", "2", "--n", "2"]),
    "settings": (
        {"prompt": "a ring", "sampler": "dpmpp_2m", "spacing": "karras", "guidance": 3.5, "hires": 2, "size": "64x32", "literal": True},
        ["a ring", "--sampler", "dpmpp_2m", "--spacing", "karras", "--guidance", "3.5", "--hires", "2", "--size", "64x32", "--literal"],
    ),
    "a LoRA by its tag": ({"prompt": "a ring <lora:style:0.5>", "variations": 2}, ["a ring", "--lora", "LORA:0.5", "--variations", "2"]),
    "a LoRA by its name": ({"prompt": "a ring", "lora": "style:0.5"}, ["a ring", "--lora", "LORA:0.5"]),
    "a file of prompts": ({"prompts": "a ring --d 3\na circle --s 3"}, ["--prompts", "FILE"]),
    "out of a picture": (
        {"prompt": "a ring", "init": text_of(picture()), "strength": 0.5},
        ["a ring", "--init", "INIT", "--strength", "0.5"],
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_call_gives_the_pictures_of_the_command(name: str, server: Served, kl_model: Path, loras: Path, tmp_path: Path) -> None:
    values, words = CALLS[name]
    status, said = call(server, values)
    assert status == 200, said
    picture().save(tmp_path / "init.png")
    (tmp_path / "prompts.txt").write_text(str(values.get("prompts")))
    files = {"LORA:0.5": f"{loras / 'style.safetensors'}:0.5", "INIT": tmp_path / "init.png", "FILE": tmp_path / "prompts.txt"}
    command = ["sample", *(str(files.get(word, word)) for word in words), "--model", str(kl_model), "--device", "cpu"]
    assert main([*command, "--out", str(tmp_path / "out")]) == 0
    drawn = sorted((tmp_path / "out").glob("*.png"))
    assert len(drawn) == len(said["pictures"])
    for path, told in zip(drawn, said["pictures"], strict=True):
        (tmp_path / "got.png").write_bytes(base64.b64decode(told["png"]))
        assert np.array_equal(np.asarray(Image.open(path)), np.asarray(Image.open(tmp_path / "got.png")))
        ours, theirs = read_recipe(tmp_path / "got.png"), read_recipe(path)
        assert isinstance(ours, Recipe) and isinstance(theirs, Recipe)
        assert replace(ours, model=theirs.model) == theirs and told["seed"] == theirs.seed


def test_gradios_client_draws_the_same(server: Served) -> None:
    from gradio_client import Client

    values = {"prompt": CAPTIONS[1], "seed": 7, "steps": 2}
    client = Client(server.url, verbose=False, analytics_enabled=False)
    assert client.predict(values, api_name="/draw")["pictures"] == call(server, values)[1]["pictures"]
    with pytest.raises(Exception, match="steps: got '0'"):
        client.predict({**values, "steps": 0}, api_name="/draw")


def test_a_token_model_has_its_own_settings_on_the_page(tmp_path: Path) -> None:
    folder = token_model(tmp_path)
    with served(folder, tmp_path / "files") as made:
        status, said = call(made, {"prompt": CAPTIONS[0], "top_k": 3, "seed": 4})
        assert status == 200, said
        picture = Image.open(io.BytesIO(base64.b64decode(said["pictures"][0]["png"])))
        family = registry.load(folder)
        assert np.array_equal(np.asarray(picture), family.sample([CAPTIONS[0]], [4], Wanted(top_k=3))[0].numpy())
        _, page, _ = ask(made.port, "GET", "/config")
        shown = {c["props"].get("elem_id"): c["props"].get("visible", True) for c in json.loads(page)["components"]}
        assert [shown[f"ldm-{name}"] for name in ("temperature", "top_k", "top_p", "threshold")] == [True, True, True, False]


def test_every_setting_of_some_models_is_part_of_the_pages_form() -> None:
    assert set(OF_SOME) <= set(NAMES)  # else its control changes nothing


def test_what_can_be_chosen_is_told(server: Served) -> None:
    assert json.loads(ask(server.port, "GET", "/api/models")[1])["loras"] == ["style"]
    told = json.loads(ask(server.port, "GET", "/api/schema")[1])
    assert told == schema() and set(PARTS) and told["properties"]["steps"]["maximum"] == 1000
    assert "karras" in told["properties"]["spacing"]["enum"] and all(one["description"] for one in told["properties"].values())
    known = set(told["properties"])
    assert {"prompt", "init", "from", "lora", "hires_strength"} <= known and not known & {"out", "device", "embedding", "lora_dir", "judge"}


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({}, "prompt: is missing"),
        ([], "a JSON object is needed"),
        ({"promt": "x"}, "is prompt meant"),
        ({"prompt": "x", "steps": 0}, "steps: got '0'; a whole number from 1 to 1000"),
        ({"prompt": "x", "steps": True}, "steps: got"),
        ({"prompt": "x", "guidance": "NaN"}, "guidance: got"),
        ({"prompt": "x", "n": 10**12}, "at most 64"),
        ({"prompt": "x", "size": "8192x8192"}, "at most 64 px"),
        ({"prompt": "x", "size": "33x32"}, "multiples of 8"),
        ({"prompts": "a ring --w 4096 --h 4096"}, "at most 64 px"),
        ({"prompt": "x", "sampler": "eulr"}, "sampler: got 'eulr'; choose one of"),
        ({"prompt": "x", "model": "/etc/passwd"}, "model: no '/etc/passwd' here"),
        ({"prompt": "x <lora:styl:1>"}, "is style meant"),
        ({"prompt": ["x <lora:style:1>", "x"]}, "name other LoRAs"),
        ({"prompt": "x", "lora": "../../etc/passwd"}, "no '../../etc/passwd' here"),
        ({"prompt": "x", "vae": "/etc/passwd"}, "vae: no '/etc/passwd' here"),
        ({"prompt": "x", "init": "/etc/passwd"}, "init: a picture in base64"),
        ({"prompt": "x", "init": base64.b64encode(b"no picture").decode()}, "init: not an image"),
        ({"prompt": "x", "strength": 0.5}, "no picture to start from"),
        ({"prompt": "x", "literal": "yes"}, "true or false"),
        ({"prompt": "x" * 10_001}, "at most 10000 characters"),
        ({"prompt": "x", "out": "/tmp"}, "'out' is not known"),
    ],
)
def test_what_a_call_may_not_say(values: Any, said: str, catalogue: Catalogue) -> None:
    with pytest.raises(UserError) as error:
        order_of_call(catalogue, values, 64)
    assert said in str(error.value) and "/tmp/" not in str(error.value)


def test_calls_are_guarded_as_the_page_is(server: Served) -> None:
    status, said = call(server, {"prompt": "x", "steps": 0})
    assert status == 422 and "steps" in said["error"]
    assert call(server, b"{")[0] == 400 and call(server, {"init": {"path": "/etc/passwd"}})[0] == 404
    with socket.create_connection(("127.0.0.1", server.port), timeout=120) as line:
        line.sendall(f"POST /api/draw HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {2**24 + 1}\r\n\r\n".encode())
        assert line.recv(64).startswith(b"HTTP/1.1 413")
    assert ask(server.port, "POST", "/api/draw", b"{}", {"Origin": "https://evil.example"})[0] == 403
    assert ask(server.port, "GET", "/api/draw")[0] == ask(server.port, "GET", "/api/other")[0] == 404


def test_a_followed_picture_opens_no_file_of_this_machine(catalogue: Catalogue, tmp_path: Path) -> None:
    order = order_of_call(catalogue, {"prompt": "a ring <lora:style:0.5>", "seed": 3}, 64)
    (recipe,) = order.recipes
    pixels = np.zeros((SIDE, SIDE, 3), np.uint8)
    save_picture(tmp_path / "a.png", pixels, recipe)
    again = order_of_call(catalogue, {"from": base64.b64encode((tmp_path / "a.png").read_bytes()).decode()}, 64)
    assert again.recipes == order.recipes
    save_picture(tmp_path / "b.png", pixels, replace(recipe, loras=recipe.loras.replace("style.safetensors", "/etc/passwd")))
    with pytest.raises(UserError, match="no 'passwd' here"):
        order_of_call(catalogue, {"from": base64.b64encode((tmp_path / "b.png").read_bytes()).decode()}, 64)


def test_the_catalogue_finds_runs_and_folders_and_keeps_few_open(tmp_path: Path) -> None:
    for place in ("runs/one/model", "runs/two/model", "more/one", "more/run/model"):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / "model_index.json").write_text("{}")
    (tmp_path / "more" / "single.safetensors").touch()
    (tmp_path / "runs/two/lora").mkdir()
    (tmp_path / "runs/two/lora/kohya.safetensors").touch()
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "sharp.safetensors").touch()
    opened: list[Outfit] = []

    def open_it(outfit: Outfit) -> Opened:
        opened.append(outfit)
        return Opened(None, {})  # type: ignore[arg-type]

    found = Catalogue(
        ("one", str(tmp_path / "runs/one")), open_it, models=(tmp_path / "more",), vaes=(tmp_path / "vae",), runs=tmp_path / "runs"
    )
    assert list(found.models()) == ["one", "two", "one_2", "run", "single"] and list(found.loras()) == ["two"]
    assert found.chosen("two", (), "sharp").vae == str(tmp_path / "vae/sharp.safetensors")
    with pytest.raises(UserError, match="is single meant"):
        found.chosen("singel", (), "")
    first, second = found.chosen("", (), ""), found.chosen("two", (), "")
    for outfit in (first, first, second, first):
        found.opened(outfit)
    assert [Path(one.model).parent.name for one in opened][1:] == ["two", "runs"] and len(opened) == 3


def test_the_doors_folders_are_those_of_the_catalogue(kl_model: Path, tmp_path: Path) -> None:
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "single.safetensors").touch()
    found = catalogue_of(str(kl_model), Door(models=(tmp_path / "more",), vae_dir=(tmp_path / "more",)), Adapters(), Device(device="cpu"))
    assert "single" in found.models() and found.chosen("", (), "single").vae == str(tmp_path / "more/single.safetensors")
    door = Door(gallery=tmp_path / "stays")
    assert door.stays == tmp_path / "stays" and replace(door, no_gallery=True).stays is None


def test_the_gallery_stays_until_it_is_deleted(tmp_path: Path) -> None:
    told = {"negative": "", "steps": 4, "guidance": 1.0, "rescale": 0.0, "sampler": "ddim", "spacing": "trailing"}
    base = Recipe(prompt="p", seed=0, width=SIDE, height=SIDE, model="m", model_hash="h", **told)  # type: ignore[arg-type]
    pixels = np.zeros((SIDE, SIDE, 3), np.uint8)
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
    shelf = Shelf(tmp_path / "a", most=0, gallery=tmp_path / "stays")
    for seed in range(3):
        shelf.keep("ann", replace(base, seed=seed), pixels)
    shelf.sweep()  # what the page holds goes, the gallery does not
    assert [one.recipe.seed for one in shelf.history("ann")] == [2, 1, 0] and shelf.history("bob") == []
    shelf.close()
    again = Shelf(tmp_path / "b", gallery=tmp_path / "stays")
    found = again.history("ann")
    assert [one.recipe.seed for one in found] == [2, 1, 0] and "ann" not in str(found[0].stays)
    again.forget("ann", found[1].path)
    again.forget("bob")
    with zipfile.ZipFile(again.packed("ann")) as archive:
        assert sorted(name[-9:] for name in archive.namelist()) == ["seed0.png", "seed2.png"]
    again.forget("ann")
    assert not list((tmp_path / "stays").rglob("*.png"))
    with pytest.raises(UserError, match="nothing is in it"):
        again.packed("ann")
    again.close()
