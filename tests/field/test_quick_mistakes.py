"""Mistakes in a configuration are told before torch is loaded, in the words that torch's own classes would give."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from ldm.cli.train import validated
from ldm.config import stand_ins
from ldm.config.errors import UserError
from ldm.config.schema import read

ROOT = Path(__file__).parents[2]
QUICKSTART = "configs/quickstart.yaml"
MISTAKES = [
    "batch=4",
    "stages.diffusion-low.btch=4",
    "stages.diffusion-low.batch=0",
    "seed=many",
    "models.autoencoder.kind=vqq",
    "models.diffusion.adapt={kind: lora, rnk: 4}",
    "data={kind: folder}",
    "data.path=pictures",
    "data.pairs=[cyan elephant]",
    "stages.diffusion-low.resolution=33",
    "stages.diffusion-high.latents=latents-hgh",
    "stages.more={kind: train, model: difusion, images: 64, resolution: 32}",
    "stages.more={kind: train, model: diffusion, images: 64, resolution: 32, latents: none}",
    "stages.evaluation.require={shapes.bnd: 0.5}",
    "models.diffusion.unet=sd9",
    "out=https://me:secret@example.org/runs",
]
ASKED = """
import contextlib, io, json, sys
from ldm.__main__ import main
answers = []
for word in json.load(sys.stdin):
    with contextlib.redirect_stderr(io.StringIO()) as said, contextlib.redirect_stdout(io.StringIO()):
        code = main(["train", *word.split("|")])
    answers.append((code, said.getvalue(), "torch" in sys.modules))
print(json.dumps(answers))
"""


def asked(*words: str) -> list[tuple[int, str, bool]]:
    """Exit code, what was said, and whether torch was loaded, of calls in one fresh process."""
    done = subprocess.run([sys.executable, "-c", ASKED], input=json.dumps(words), capture_output=True, text=True, cwd=ROOT, check=True)
    return [tuple(one) for one in json.loads(done.stdout)]


@pytest.mark.slow
def test_mistakes_are_told_without_torch_and_in_the_same_words() -> None:
    for word, (code, said, loaded) in zip(MISTAKES, asked(*(f"{QUICKSTART}|{word}" for word in MISTAKES)), strict=True):
        with pytest.raises(UserError) as real:
            validated(read(ROOT / QUICKSTART, [word]), Path(QUICKSTART))
        assert (code, said) == (2, f"ldm train: {real.value}\n".replace("secret@", "")), word
        assert not loaded, word


@pytest.mark.slow
def test_help_and_parts_that_are_not_there_need_no_torch() -> None:
    (code, said, loaded), whole = asked(f"{QUICKSTART}|--help|stages.difusion-low", f"{QUICKSTART}|--help")
    assert code == 2 and "did you mean stages.diffusion-low" in said and not loaded
    assert whole == (0, "", False)


@pytest.mark.slow
def test_data_that_is_not_there_needs_no_torch() -> None:
    parts = "data={kind: several, parts: [{source: {kind: folder, path: configs}}, {source: {kind: folder, path: nowhere}}]}"
    for code, said, loaded in asked("configs/folder.yaml|data.path=nowhere", f"configs/folder.yaml|{parts}"):
        assert (code, loaded) == (2, False)
        assert said == "ldm train: data.path: nowhere is not a folder; give the folder that holds your images\n"


def test_what_only_the_packages_themselves_can_do_is_done_with_them(monkeypatch: pytest.MonkeyPatch) -> None:
    def work() -> str:
        import colorsys

        return str(colorsys.rgb_to_hsv(1, 0, 0))

    def mistaken() -> str:
        raise UserError("a mistake")

    monkeypatch.delitem(sys.modules, "torch", raising=False)  # as in a fresh process
    monkeypatch.setattr(stand_ins, "HEAVY", ("colorsys",))
    assert stand_ins.told(lambda: "import colorsys") == "import colorsys"
    with pytest.raises(UserError, match="a mistake"):
        stand_ins.told(mistaken)
    assert stand_ins.told(work) == "(0.0, 1.0, 1)" == work()


@pytest.mark.parametrize("use", ["module.zeros(3)", "bool(module.cuda)", "list(module.shapes)", "module.pi + 1"])
def test_a_stand_in_works_for_nobody_but_an_import(use: str) -> None:
    module = stand_ins._Finder().create_module(stand_ins.importlib.machinery.ModuleSpec("torch", None))
    with pytest.raises(stand_ins.Needed):
        eval(use, {"module": module})
