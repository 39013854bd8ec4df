"""Words as shells and scripts hand them over: of nobody's home, of another encoding, empty, with a closed standard input."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from finished_model import finished_model

from ldm.__main__ import main
from ldm.config.errors import UserError, out_of_memory
from ldm.config.files import at_home
from ldm.config.schema import build, read
from ldm.data.folder import FolderSource
from ldm.runs import pretrained
from ldm.runs.run import Run
from ldm.training.settings import Train

ROOT = Path(__file__).resolve().parents[2]
NOBODY = "~nobody-has-this-name/x"


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """The one line of a refusal."""
    assert main([*words]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "Traceback" not in said, said
    return said


@pytest.mark.parametrize("option", ["--model", "--lora", "--vae", "--init", "--embedding", "--lora-dir"])
def test_the_home_of_nobody_is_a_file_that_is_not_there(option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = [] if option == "--model" else ["--model", str(finished_model(tmp_path / "model"))]
    assert NOBODY in refused(capsys, "sample", "a ring", option, NOBODY, *model)


def test_a_home_is_found_as_a_shell_finds_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert at_home("~/x") == Path("/home/me/x") and at_home(NOBODY) == Path(NOBODY) and at_home("x/~") == Path("x/~")


@pytest.mark.parametrize("option", ["--size", "--seeds", "--sampler", "--watermark", "--guidance-interval", "--judge", "--backend"])
def test_an_empty_word_is_not_taken_for_none(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    said = refused(capsys, "sample", "a ring", option, "")
    assert f"got an empty text; give {option} a value, or leave it out" in said
    assert option in refused(capsys, "sample", "a ring", f"{option}=")


@pytest.mark.parametrize("words", ["sample X", "sample a --negative X", "animate a --to X", "grid a --x prompt=a,X"])
def test_a_text_of_another_encoding_is_refused(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert r"caf\udce9 is not UTF-8" in refused(capsys, *words.replace("X", "caf\udce9").split())


def test_so_it_is_in_a_configuration(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text("seed: 1\n")
    with pytest.raises(UserError, match=r"data.caption: caf.* is not UTF-8"):
        read(tmp_path / "x.yaml", ["data.caption=caf\udce9"])


def test_a_caption_of_blanks_is_no_caption() -> None:
    with pytest.raises(UserError, match="blanks alone"):
        FolderSource(path="x", caption="  ")


@pytest.mark.slow
def test_a_closed_standard_input_is_said(tmp_path: Path) -> None:
    for words, said in ((["--prompts", "-"], "standard input: closed"), ([], "no prompt: write")):
        command = [sys.executable, "-m", "ldm", "sample", "--model", str(finished_model(tmp_path / "model")), *words]
        done = subprocess.run(
            ["sh", "-c", 'exec "$@" <&-', "sh", *command], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
        )
        assert done.returncode == 2 and said in done.stderr and "Traceback" not in done.stderr


def test_a_library_that_finds_no_room_is_out_of_memory() -> None:
    assert out_of_memory(ImportError("libtorch_cpu.so: failed to map segment from shared object"))
    assert not out_of_memory(ImportError("cannot import name 'x'"))


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"optim": {"kind": "adamw", "betas": [1, 0.9]}}, "optim.betas.0: got 1; it should be less than 1"),
        ({"optim": {"kind": "muon", "momentum": 1}}, "optim.momentum: got 1"),
        ({"optim": {"kind": "prodigy", "betas": [0.9, 1]}}, "optim.betas.1: got 1"),
        ({"optim": {"kind": "schedule_free", "betas": [2, 0.9]}, "ema": 0}, "optim.betas.0: got 2"),
        ({"resolution": 10**9}, "resolution: got 1000000000; it should be less than or equal to 65536"),
        ({"also": [10**9]}, "also.0: got 1000000000"),
    ],
)
def test_what_no_optimiser_and_no_picture_can_be_is_refused_first(fields: dict[str, object], said: str) -> None:
    with pytest.raises(UserError) as error:
        build({"model": "a", "images": 8, "resolution": 8, **fields}, Train, "test")
    assert said in str(error.value)


def test_a_size_that_the_base_model_cannot_have_is_refused_by_its_files(tmp_path: Path) -> None:
    base = finished_model(tmp_path)

    def check(side: int) -> None:
        stage = {"kind": "train", "model": "diffusion", "images": 4, "batch": 2, "resolution": side}
        data = {"kind": "folder", "path": "pictures", "caption": "a ring"}
        run = build(
            {"init": str(base), "data": data, "models": {"diffusion": {"kind": "latent_diffusion"}}, "stages": {"tune": stage}}, Run, "x"
        )
        pretrained.check(run, pretrained.find(run, lambda text: None))

    with pytest.raises(UserError, match=r"stages.tune.resolution: got 33; diffusion needs a multiple of \d"):
        check(33)
    check(32)


def test_lists_of_numbers_are_whole(kl_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for text in (",", "1,,2", "nan", "1,1.0", "1;2"):
        assert f"guidance: got {text!r}; write numbers" in refused(capsys, "evaluate", str(kl_model), "--guidance", text)
