"""Verbs on the command line: options come from a signature, mistakes are one line, sizes are read strictly."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import pytest
import typer

from ldm.__main__ import VERBS, main
from ldm.cli.command import call
from ldm.config.errors import UserError
from ldm.sampling.request import size_of

seen: dict[str, Any] = {}


def verb(
    word: Annotated[list[str] | None, typer.Argument(help="What to say.")] = None,
    times: Annotated[int, typer.Option(min=1, help="How often.")] = 1,
    out: Annotated[Path | None, typer.Option(help="Where.")] = None,
) -> int:
    """Say something."""
    seen.update(word=word, times=times, out=out)
    return 3 if word == ["three"] else 0


def test_words_become_arguments() -> None:
    assert call(verb, ["a b", "c", "--times", "2", "--out", "x/y"], "ldm verb") == 0
    assert seen == {"word": ["a b", "c"], "times": 2, "out": Path("x/y")}
    assert call(verb, [], "ldm verb") == 0 and not seen["word"]
    assert call(verb, ["three"], "ldm verb") == 3


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--tims", "2"], "(?i)no such option.*--tims"),
        (["--times", "0"], "--times"),
        (["--times", "many"], "--times.*integer"),
        (["--times"], "--times"),
    ],
)
def test_mistakes_are_the_users_and_name_the_help(words: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said) as caught:
        call(verb, words, "ldm verb")
    assert str(caught.value).endswith("(`ldm verb --help` lists all options)") and "\n" not in str(caught.value)


def test_errors_of_the_verb_itself_pass(capsys: pytest.CaptureFixture[str]) -> None:
    def bad() -> int:
        """Fail."""
        raise UserError("size: got 3")

    def broken() -> int:
        """Fail."""
        raise RuntimeError("a bug")

    with pytest.raises(UserError, match=r"^size: got 3$"):
        call(bad, [], "ldm bad")
    with pytest.raises(RuntimeError, match="a bug"):
        call(broken, [], "ldm broken")
    assert capsys.readouterr() == ("", "")


def test_help_lists_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    assert call(verb, ["--help"], "ldm verb") == 0
    said = capsys.readouterr().out
    assert all(word in said for word in ("Say something.", "--times", "How often.", "--out", "What to say."))


def test_arguments_go_by_their_names(capsys: pytest.CaptureFixture[str]) -> None:
    def other(config: Annotated[Path, typer.Argument(help="A file.")]) -> int:
        """Read something."""
        return len(config.parts)

    assert call(verb, ["--help"], "ldm verb") == 0
    said = capsys.readouterr().out
    assert "ldm verb [OPTIONS] [WORD...]" in said and "list[" not in said and "<" not in said
    assert call(other, ["--help"], "ldm other") == 0
    said = capsys.readouterr().out
    assert "ldm other [OPTIONS] CONFIG" in said and "<path>" not in said
    with pytest.raises(UserError, match=r"^Missing argument 'CONFIG': A file \("):
        call(other, [], "ldm other")


def test_sizes() -> None:
    assert size_of("512") == (512, 512) and size_of("640x480") == (480, 640) and size_of("32X64") == (64, 32)
    for text in ("", "x", "0x8", "8x", "8x8x8", "-8x8", "8.5", "8 x 8", "²x8", "9" * 5000):
        with pytest.raises(UserError, match="write WIDTHxHEIGHT in px"):
            size_of(text)


def test_verbs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    said = capsys.readouterr().out
    assert all(name in said and told in said for name, (_, told) in VERBS.items())
    assert main(["sampel"]) == 2
    assert "did you mean sample?" in capsys.readouterr().err
    assert main(["zzz"]) == 2
    assert "there are train, plan, sample" in capsys.readouterr().err
    assert main(["--version"]) == 0 and capsys.readouterr().out.startswith("ldm ")
    assert main(["sample", "--stesp", "3"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("ldm sample: ") and said.count("\n") == 1
