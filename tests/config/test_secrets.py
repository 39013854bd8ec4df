"""Nothing secret is told."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from ldm.config.secrets import cleaned, exposed, redacted, secrets
from ldm.config.terminal import hook
from ldm.training.log import LOG, Log

ENVIRONMENT = {
    "WANDB_API_KEY": "f00dfeedf00dfeed",
    "HF_TOKEN": "hf_MARKEDabcdefgh",
    "AWS_SECRET_ACCESS_KEY": "aws/marked+value",
    "DB_PASSWORD": "short",
    "TOKENIZERS_PARALLELISM": "false-not-secret",
    "HOME": "somewhere/else",
    "MONKEY": "banana-split",
    "SSH_AUTH_SOCK": "/tmp",
}


def test_which_variables_are_secret() -> None:
    assert secrets(ENVIRONMENT)[0] == "hf_MARKEDabcdefgh"  # the longest
    assert set(secrets(ENVIRONMENT)) == {"hf_MARKEDabcdefgh", "f00dfeedf00dfeed", "aws/marked+value"}


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("key f00dfeedf00dfeed, token hf_MARKEDabcdefgh", "key ***, token ***"),
        ("s3://user:p%40ss@host/a?b=c", "s3://***@host/a?b=c"),
        ("https://tok_en:@host", "https://tok_en:@host"),
        ("https://:pw@host and http://u:v@w", "https://***@host and http://***@w"),
        ("https://h/x?X-Amz-Signature=abc&part=2", "https://h/x?X-Amz-Signature=***&part=2"),
        ("https://h/x?page=1&access_token=abc", "https://h/x?page=1&access_token=***"),
        ("https://host:8080/a@b 12:30 a@b.c C:\\x", "https://host:8080/a@b 12:30 a@b.c C:\\x"),
        ("plain words: one, two", "plain words: one, two"),
    ],
)
def test_redacted(text: str, told: str) -> None:
    assert redacted(text, ENVIRONMENT) == told
    assert redacted(told, ENVIRONMENT) == told


def test_trees(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_TOKEN", "marked-value")
    tree = {"a": {"b": ["x", "http://u:v@w"]}, "n": 3, "c": "say marked-value", "d": "fine"}
    assert list(exposed(tree)) == ["a.b[1]", "c"]
    assert cleaned(tree) == {"a": {"b": ["x", "http://***@w"]}, "n": 3, "c": "say ***", "d": "fine"}


def test_the_log_and_pythons_last_word(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("MY_TOKEN", "marked-value")
    log = Log(tmp_path)
    log.note("reading http://u:marked@host with marked-value")
    log.record({"error": ["marked-value"]})
    log.close()
    try:
        raise RuntimeError("401 for marked-value")
    except RuntimeError:
        hook(*sys.exc_info())  # type: ignore[arg-type]
    everything = capsys.readouterr().err + (tmp_path / LOG).read_text()
    assert "marked" not in everything and "RuntimeError: 401 for ***" in everything and everything.count("***") == 7
