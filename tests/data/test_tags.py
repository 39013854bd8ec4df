"""Captions in training: tags shuffled and left out by position, fixed words around, weights, and more than 75 tokens."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from tars import painted, shard

from ldm.config.errors import UserError
from ldm.data.caption_tables import times
from ldm.data.dataset import draw_captions
from ldm.data.folder import FolderData, FolderSource
from ldm.data.photos import held_out
from ldm.data.shards import ShardsSource
from ldm.data.sources import affixes
from ldm.data.tags import TaggedSamples, Tags, affixed, varied

CAPTION = "sks dog, grass, blue sky, ball"


def folder(root: Path, count: int = 4, caption: str = CAPTION) -> str:
    root.mkdir(exist_ok=True)
    for i in range(count):
        (root / f"{i}.jpg").write_bytes(painted(i))
        (root / f"{i}.txt").write_text(caption)
    return str(root)


def build(path: str, **options: object) -> FolderData:
    return FolderSource(path=path, val_share=0, **options).build("train")


def test_tags_are_shuffled_and_kept_by_position_alone(tmp_path):
    data = build(folder(tmp_path / "a"))
    tagged = TaggedSamples(data, Tags(shuffle=True, keep=1))
    said = tagged.captions([0] * 200, range(200), 5)
    assert all(text.startswith("sks dog, ") and sorted(text.split(", ")) == sorted(CAPTION.split(", ")) for text in said)
    counts = Counter(said)
    assert len(counts) == 6 and min(counts.values()) > 15  # every order of three tags, about as often
    alone = tagged.load([0], [77], 32, 5, False)
    together = tagged.load([1, 0, 2], [3, 77, 4], 32, 5, False)
    assert alone.caption[0] == together.caption[1] == said[77] and torch.equal(alone.image[0], together.image[1])
    assert tagged.captions([0] * 200, range(200), 6) != said
    assert tagged.all_captions([0]) == [[CAPTION]] and tagged.fingerprint() == data.fingerprint()


def test_tags_are_left_out_by_their_share(tmp_path):
    tagged = TaggedSamples(build(folder(tmp_path / "a")), Tags(keep=1, dropout=0.25))
    said = [text.split(", ") for text in tagged.captions([0] * 2000, range(2000), 0)]
    for tag in ("grass", "blue sky", "ball"):
        assert abs(sum(tag in words for words in said) / 2000 - 0.75) < 0.03
    assert all(words[0] == "sks dog" for words in said) and ["sks dog", "grass", "ball"] in said


def test_what_is_no_list_of_tags_stays_as_it_is():
    draws = np.array([0.9, 0.1])
    assert varied("a photo of a dog", Tags(shuffle=True, dropout=1.0), draws, draws) == "a photo of a dog"
    assert varied("a;b", Tags(shuffle=True, separator=";"), draws, draws) == "b; a"
    assert varied("a, b", Tags(dropout=1.0), draws, draws) == ""
    with pytest.raises(UserError, match="separator"):
        Tags(separator="")


def test_prefix_and_suffix_are_no_tags(tmp_path):
    path = folder(tmp_path / "a")
    data = build(path, prefix="sks style,", suffix=", 4k")
    assert data.all_captions([0]) == [[f"sks style, {CAPTION}, 4k"]]
    assert data.fingerprint() != build(path).fingerprint()
    source = FolderSource(path=path, prefix="sks style,", suffix=", 4k")
    tagged = TaggedSamples(data, Tags(shuffle=True, dropout=0.5), affixes(source))
    for text in tagged.captions([0] * 50, range(50), 1):
        assert text.startswith("sks style,") and text.endswith("4k") and set(text.split(", ")[1:-1]) <= set(CAPTION.split(", "))
    assert affixed("a dog", "photo of", "on grass") == "photo of a dog on grass" and affixed("x", "", "") == "x"
    shard(tmp_path / "s", 0, 3)
    assert ShardsSource(path=str(tmp_path / "s"), val_share=0, prefix="p").build("train").all_captions([0]) == [["p picture 0"]]


def test_captions_are_drawn_by_their_weights(tmp_path):
    for i in range(2):
        (tmp_path / f"{i}.jpg").write_bytes(painted(i))
    rows = [
        {"file_name": "0.jpg", "text": ["long", "short"], "caption_weight": [0.7, 0.3]},
        {"file_name": "1.jpg", "text": "a", "caption_weight": 3},
        {"file_name": "1.jpg", "text": "b"},
        {"file_name": "1.jpg", "text": "c", "caption_weight": "many"},
    ]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = build(str(tmp_path))
    said = Counter(draw_captions(data.all_captions([0] * 4000), range(4000), 0))
    assert abs(said["long"] / 4000 - 0.7) < 0.03 and set(said) == {"long", "short"}
    assert Counter(data.all_captions([1])[0]) == {"a": 3, "b": 1, "c": 1} and data.describe()["captions"] == 5
    assert [r.reason for r in data.rejected] == ["bad caption weight"]
    assert times([1.0, 1.0]) == [1, 1] and times([2, 1, 1]) == [2, 1, 1] and times([1e9, 1]) == [100, 1]


def test_one_picture_is_a_data_set_and_nothing_need_be_held_out(tmp_path):
    path = folder(tmp_path / "one", 1)
    assert len(FolderSource(path=path).build("train")) == 1 and len(FolderSource(path=path).build("val")) == 0
    many = folder(tmp_path / "many", 9)
    assert len(FolderSource(path=many, val_share=0).build("train")) == 9 and len(FolderSource(path=many, val_share=0).build("val")) == 0
    shard(tmp_path / "s", 0, 1)
    for split, count in (("train", 1), ("val", 0)):
        data = ShardsSource(path=str(tmp_path / "s")).build(split)  # type: ignore[arg-type]
        assert len(data) == count and data.describe()["images"] == count and len(data.sizes()) == count
    assert not held_out(["a"], 0.5).any() and not held_out(["a", "b"], 0.0).any() and held_out(["a", "b"], 1e-9).sum() == 1


@pytest.mark.parametrize(
    ("tags", "captions", "said"),
    [
        (Tags(shuffle=True, keep=99), ["a, b, c", "d"], "no caption has more than keep=99 tags"),
        (Tags(shuffle=True), ["a cat", "a dog"], "no caption has more than keep=0 tags with ',' between them"),
        (Tags(shuffle=True, keep=1), ["a, b"], "no caption has more than keep=1 tags"),  # one that is left has no other place
        (Tags(dropout=0.5, keep=2), ["a, b"], "no caption has more than keep=2 tags"),
        (Tags(shuffle=True, separator=";"), ["a, b"], "with ';' between them"),
        (Tags(dropout=1.0, keep=1), ["a, b"], "dropout=1 leaves out every tag behind the first 1"),
        (Tags(shuffle=True, keep=1), ["a", "a, b, c"], ""),
        (Tags(dropout=0.5), ["a, b"], ""),
        (Tags(shuffle=True), [], ""),
    ],
)
def test_tags_that_change_nothing_are_told(tags: Tags, captions: list[str], said: str) -> None:
    assert said in tags.idle(captions) if said else not tags.idle(captions)
