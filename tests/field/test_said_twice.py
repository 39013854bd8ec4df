"""Words that a shell script makes of its variables: said twice, empty, without end, or a text that begins with a dash."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from ldm.__main__ import main
from ldm.config.errors import UserError
from ldm.config.schema import config, load, said_twice
from ldm.data.folder import FolderSource
from ldm.sampling.prompt_files import Asked
from ldm.sampling.recipe import read_recipe
from ldm.sampling.request import Choice, PromptOptions
from ldm.sampling.requested import MOST, _refuse_too_many
from tests.ends_soon import ends_soon


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["sample", "x", "--lora", ""], "lora: got an empty text"),
        (["sample", "x", "--init="], "init: got an empty text"),
        (["sample", "x", "--out", ""], "out: got an empty text"),
        (["export", "model", "--to", "diffusers", "--out="], "out: got an empty text"),
        (["sample", "-a red thing"], "stands behind --, as in ldm sample --seed 1 -- '-a red thing'"),
    ],
)
def test_nothing_at_all(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["sample", "x", "--seed", "5", "--seed=6"], "seed: given as 5 and as 6; the last counts, 6"),
        (["grid", "x", "--x", "seed=1,2", "--steps", "3", "--steps", "4"], "steps: given as 3 and as 4"),
        (["data", "check", "/nonexistent/data", "--resolution", "64", "--resolution=128"], "resolution: given as 64 and as 128"),
    ],
)
def test_the_last_of_two_values_counts_and_is_told(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*words, *(["--model", "/nonexistent/model"] if words[0] != "data" else [])]) == 2
    assert f"note: {said}" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words", [["--seed", "5", "--seed=5"], ["--lora", "a", "--lora", "b"], ["--negative", ""], ["--", "--seed", "1", "--seed", "2"]]
)
def test_what_is_meant_is_taken(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sample", "x", "--model", "/nonexistent/model", *words]) == 2
    told = capsys.readouterr().err
    assert "/nonexistent/model" in told and "given as" not in told


@config
class Small:
    """Some fields."""

    data: FolderSource


def test_an_empty_path_is_not_the_current_folder(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("data: {kind: folder, path: x}\n")
    with pytest.raises(UserError, match=r"data\.path: got ''; it should be a text that is not empty"):
        load(tmp_path / "c.yaml", ["data.path="], Small)


def test_fields_that_are_said_twice_are_told() -> None:
    assert said_twice(["seed=1", "a.b=2", "seed=2", "a.b=2"]) == ["seed: said twice, as 1 and as 2; the later holds"]


@pytest.mark.parametrize(
    ("choice", "prompts"),
    [(Choice(n=MOST + 1), 1), (Choice(n=2, best=MOST, judge="own"), 1), (Choice(variations=MOST), 1), (Choice(n=MOST // 2), 3)],
)
def test_more_pictures_than_can_be_listed_are_refused(choice: Choice, prompts: int) -> None:
    with pytest.raises(UserError, match="at most 1,048,576"):
        _refuse_too_many(choice, [Asked(prompt="x")] * prompts)


def test_prompts_without_end_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with ends_soon():
        assert main(["sample", "--model", "owner/name", "--prompts", "/dev/zero"]) == 2
    assert "longer than 67,108,864 bytes" in capsys.readouterr().err


def test_prompts_come_through_a_pipe_too(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=(tmp_path / "pipe").write_bytes, args=(b"\xef\xbb\xbfa ring\r\na square\r\n",))
    writer.start()
    assert [one.prompt for one in PromptOptions(prompts=tmp_path / "pipe").read(None)] == ["a ring", "a square"]
    writer.join()


def test_a_pipe_is_no_picture(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    with ends_soon(), pytest.raises(UserError, match="not a regular file"):
        read_recipe(tmp_path / "pipe.png")
