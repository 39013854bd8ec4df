"""Files of prompts: plain lines, kohya's flags, JSON; mistakes name their line."""

from __future__ import annotations

import pytest

from ldm.config.errors import UserError
from ldm.sampling.prompt_files import Asked, read_prompts


def test_lines_flags_and_objects() -> None:
    text = """\ufeff# a comment

a red cube
a blue ball, at 10:30 --n ugly, blurry --w 512 --h 768 --d 42 --l 7.5 --s 28
{"prompt": "a fox -- at night", "negative_prompt": "day", "seed": 3, "cfg_scale": 2}
a well-known --d 7
"""
    assert read_prompts(text, "list.txt") == [
        Asked(prompt="a red cube"),
        Asked(prompt="a blue ball, at 10:30", negative="ugly, blurry", width=512, height=768, seed=42, guidance=7.5, steps=28),
        Asked(prompt="a fox -- at night", negative="day", seed=3, guidance=2.0),
        Asked(prompt="a well-known", seed=7),
    ]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("a --x 3", "line 2: --x is no flag"),
        ("a --d three", "--d is 'three'; seed needs a whole number from 0"),
        ("a --w 0", "width needs a whole number from 1"),
        ("a --s 2.5", "steps needs a whole number"),
        ('{"promt": "a"}', "did you mean prompt"),
        ('{"prompt": 3}', "prompt is 3; a text is needed"),
        ('{"seed": 3}', "no prompt"),
        ('{"prompt": "a", "text": "b"}', "twice"),
        ('{"prompt": "a", "seed": true}', "whole number"),
        ('{"prompt": "a", "guidance": NaN}', "guidance needs a number"),
        ("{a}", "not JSON"),
    ],
)
def test_mistakes_name_the_line(line: str, said: str) -> None:
    with pytest.raises(UserError, match=r"list\.txt") as error:
        read_prompts(f"fine\n{line}\n", "list.txt")
    assert "line 2" in str(error.value) and said in str(error.value)


def test_an_empty_file() -> None:
    with pytest.raises(UserError, match="no prompts in it"):
        read_prompts("\n# nothing\n", "list.txt")
