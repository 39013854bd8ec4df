"""Prompt files of other programs: every flag is read or refused by its line, and no seed is changed."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ldm.config.errors import UserError
from ldm.sampling.jobs import Common, recipes
from ldm.sampling.prompt_files import Asked, read_prompts
from ldm.sampling.request import PromptOptions

LINES: list[tuple[str, dict[str, Any]]] = [
    ('a blue ring --negative_prompt "blurry, low" --cfg_scale 7', {"prompt": "a blue ring", "negative": "blurry, low", "guidance": 7}),
    ("--prompt 'a ring' --steps=3 --seed 5", {"prompt": "a ring", "steps": 3, "seed": 5}),
    ('--prompt "a --w 3 ring" --width 512', {"prompt": "a --w 3 ring", "width": 512}),
    ('a ring --negative-prompt "say \\"no\\"" twice', {"prompt": "a ring", "negative": 'say "no" twice'}),
    ('a ring --n "as it stands" --d 9007199254740992', {"prompt": "a ring", "negative": '"as it stands"', "seed": 2**53}),
    ("a ring \u2014 red \u2014n \u2014ring b", {"prompt": "a ring \u2014 red \u2014n \u2014ring b"}),
    ("a -- b --> c --- d -n e", {"prompt": "a -- b --> c --- d -n e"}),
    ("a\u2028b\x0bc\x85d", {"prompt": "a\u2028b\x0bc\x85d"}),
    ("[V] dog", {"prompt": "[V] dog"}),
    ('[{"prompt": "a", "seed": 3}]', {"prompt": "a", "seed": 3}),
    ('["a"]', {"prompt": "a"}),
]
REFUSED = [
    ('a --sampler_name "Euler a"', "--sampler_name is no flag"),
    ("a --Negative_prompt b", "--Negative_prompt is no flag"),
    ("a --restore-faces", "--restore-faces is no flag"),
    ("a --7 b", "--7 is no flag"),
    ("a ring \u2014steps 3", "\u2014steps begins with a dash that an editor made of two; write --steps"),
    ("a ring \u2013cfg_scale=3", "write --cfg_scale"),
    ("a ring \u2014s 3", "\u2014s begins with a dash that an editor made of two; write --s"),
    ("a ring \u2013\u2013steps 3", "write --steps"),
    ("a ring \u2212\u2212d 3", "write --d"),
    ("```", "a fence of Markdown"),
    ("a --n b --negative_prompt c", "--negative_prompt says negative, which stands there twice"),
    ("--n b", "no prompt"),
    ("a --d 9007199254740993", "--d is '9007199254740993'; seed needs a whole number from 0 to 9007199254740992"),
    ("a --s 1001", "--s is '1001'; steps needs a whole number from 1 to 1000"),
    ("a --w 100000", "--w is '100000'; width needs"),
    ('{"prompt": "a", "seed": 1e300}', "seed is '1e\\+300'"),
    ('{"prompt": "a", "seed": 1, "seed": 2}', "seed says seed, which stands there twice"),
    ('{"prompt": ' + "[" * 100_000, "not JSON"),
]


@pytest.mark.parametrize(("line", "fields"), LINES)
def test_a_line_says(line: str, fields: dict[str, Any]) -> None:
    assert read_prompts(line, "list.txt") == [Asked(**fields)]


@pytest.mark.parametrize(("line", "said"), REFUSED)
def test_a_line_is_refused_by_its_number(line: str, said: str) -> None:
    with pytest.raises(UserError, match=rf"list\.txt, line 2: .*{said}"):
        read_prompts(f"a red circle\r\n{line}", "list.txt")


OTHER_FORMS = {
    "csv": ("prompt,negative\na cat,bad", "'prompt,negative' are the columns of a table"),
    "csv of others": ('"id";"caption"\n1;a cat', "are the columns of a table"),
    "tsv": ("seed\tprompt\n1\ta cat", "are the columns of a table"),
    "yaml": ("- a cat\n- a dog", "every line begins as an entry of a list ('- a cat')"),
    "yaml by name": ("prompts:\n  - a cat\n  - a dog", "every line begins as an entry of a list"),
    "markdown": ("* a cat\n* a dog\n", "every line begins as an entry of a list"),
    "numbered": ("1. a cat\n2. a dog\n\n3. a cow", "every line begins as an entry of a list"),
    "toml": ('[prompt]\nwidth = 512\n[[prompt.subset]]\nprompt = "a cat"', "'[prompt]' begins a section of TOML"),
    "fence": ("```text\na cat\n```", "a fence of Markdown"),
}


@pytest.mark.parametrize("name", OTHER_FORMS)
def test_other_forms_are_known_by_what_they_hold(name: str) -> None:
    text, said = OTHER_FORMS[name]
    with pytest.raises(UserError, match=rf"list\.txt, line 1: .*{re.escape(said)}"):
        read_prompts(text, "list.txt")


@pytest.mark.parametrize(
    "text", ["- a cat", "- a cat\na dog", "2. a cat\n1. a dog", "[cat]\na dog", "prompt engineering, a robot", "a cat, a dog\nprompt, b"]
)
def test_prompts_that_only_look_alike_stay(text: str) -> None:
    assert [one.prompt for one in read_prompts(text, "list.txt")] == text.split("\n")


@pytest.mark.parametrize("torn", ['[{"prompt": "a cat"}', '["a cat",\n"a dog"', '\ufeff [\n{"prompt": "a",}]'])
def test_a_torn_list_is_no_prompt(torn: str) -> None:
    with pytest.raises(UserError, match=r"list\.json: a JSON list that is torn or mistyped"):
        read_prompts(torn, "list.json")


@pytest.mark.parametrize("name", ["a.yaml", "a.YML", "a.toml", "a.csv", "a.tsv", "a.parquet"])
def test_files_of_another_form_are_no_prompts(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("prompt: a cat\n")
    with pytest.raises(UserError, match=rf"{name}: \.\w+ is not read; write a prompt a line, or JSON"):
        PromptOptions(prompts=tmp_path / name).read(None)


def test_a_list_of_anything_else_is_refused() -> None:
    with pytest.raises(UserError, match=r"list\.txt: a list of texts and of objects is needed"):
        read_prompts('["a",\n 3]', "list.txt")
    assert [one.prompt for one in read_prompts('[\n "a",\n {"text": "b"}\n]', "list.txt")] == ["a", "b"]


@settings(max_examples=80, deadline=None)
@given(st.text(st.sampled_from("a-nwd \"'\\=[{}]:,5_\n\u2028"), max_size=40))
def test_any_text_is_read_or_refused(text: str) -> None:
    try:
        found = read_prompts(text, "list.txt")
    except UserError as error:
        assert str(error).startswith("list.txt")
    else:
        assert found and not any(re.search(r"(^|\s)--[a-z0-9]", one.prompt) for one in found if '"' not in text and "'" not in text)


def test_seeds_that_would_lead_too_far() -> None:
    class Family:
        defaults: dict[str, Any] = {"size": (64, 64)}  # noqa: RUF012

        def settings(self, wanted: Any) -> Any:
            from ldm.families.draws import DIRECT

            return DIRECT

    with pytest.raises(UserError, match="seed: 9007199254740990 and 3 more lead beyond 9007199254740992"):
        recipes(Family(), [Asked(prompt="a")], Common(seed=2**53 - 2, n=4))  # type: ignore[arg-type]


@pytest.mark.parametrize("form", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be"])
def test_files_of_windows_are_read(form: str, tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_bytes("a caf\u00e9\r\na ring --d 5\r\n".encode(form))
    assert PromptOptions(prompts=tmp_path / "x.txt").read(None) == [Asked(prompt="a caf\u00e9"), Asked(prompt="a ring", seed=5)]
