"""Examples in the help of verbs are commands of the pages, which run there."""

from __future__ import annotations

import shlex

import pytest
from test_docs_commands import OURS, PAGES

from ldm.__main__ import VERBS, main
from ldm.cli.examples import EXAMPLES


def test_every_verb_has_one() -> None:
    assert {verb.split()[0] for verb in EXAMPLES} == set(VERBS) - {"train"}  # whose help begins with its own


def test_they_stand_in_pages() -> None:
    said = {shlex.join(words) for _, words, _ in OURS}
    pages = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
    examples = [one for found in EXAMPLES.values() for one in found]
    assert [one for one in examples if shlex.join(shlex.split(one)) not in said and f"ldm {one}" not in pages] == []


@pytest.mark.parametrize("words", [["sample"], ["data", "check"], ["export"]], ids=" ".join)
def test_help_ends_with_them_and_says_no_type_in_brackets(
    words: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert main([*words, "--help"]) == 0
    said = capsys.readouterr().out
    assert all(f" ldm {one}" in said for one in EXAMPLES[" ".join(words)])
    assert "<bool>" not in said and "<int range>" not in said and "<str>" not in said and "list[" not in said
