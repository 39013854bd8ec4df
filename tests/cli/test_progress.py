"""What the verbs show while they work: on a terminal, and in a pipe."""

from __future__ import annotations

import io
import sys

import pytest

from ldm.cli.progress import working
from ldm.config.terminal import guarded


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_is_told_what_is_done(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("COLUMNS", "140")
    monkeypatch.setenv("TERM", "xterm")
    with guarded(), working("writing [b]out[/b]\x1b") as tell:
        print("the answer")
        tell("one part\x1b is done")
    said = screen.getvalue()
    assert said.count("writing [b]out[/b]\\u001b") >= 2, "before the line above it, and after"
    assert "one part\\u001b is done\n" in said
    assert said.endswith("\x1b[2K"), "nothing is left of it"
    assert capsys.readouterr().out == "the answer\n" and "the answer" not in said


def test_a_pipe_gets_the_lines_alone(capsys: pytest.CaptureFixture[str]) -> None:
    with working("writing out") as tell:
        tell("one part is done")
    assert capsys.readouterr() == ("", "one part is done\n")
