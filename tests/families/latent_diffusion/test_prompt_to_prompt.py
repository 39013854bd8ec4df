"""Prompt-to-prompt: which word stands for which, that an equal prompt changes nothing, and that no picture depends on its neighbours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from finished_model import SIDE
from torch import Tensor

from ldm.config.errors import UserError
from ldm.families.draws import Wanted
from ldm.families.latent_diffusion.engine import Edit
from ldm.families.latent_diffusion.family import LatentDiffusionFamily, load
from ldm.families.latent_diffusion.prompt_to_prompt import word_map
from ldm.models.attention_exchange import AttentionExchange
from ldm.models.conditioned import Conditioned
from ldm.models.dit import DiTConfig
from ldm.text.prompt_syntax import read, unweighted

SETTINGS = Wanted(steps=4, sampler="ddim", guidance=3.0)


@pytest.fixture(scope="module")
def family(kl_model: Path) -> LatentDiffusionFamily:
    found = load(kl_model)
    with torch.no_grad():  # of a random network hardly anything depends on the words
        for name, weight in found.denoiser.named_parameters():
            if "attn" in name:
                weight.mul_(4)
    return found


def mapped(family: LatentDiffusionFamily, source: str, target: str) -> tuple[list[list[str]], list[str]]:
    """For each word of the target whose attention it takes, with shares where these are not 1; words with an own one, or a weight."""
    words, own, weights = word_map(family.text, *(read(text).at(0, 1)[0] for text in (source, target)), 1)
    before, after = (family.text.framed([tuple(family.text.words(plain(text)))])[0][0].tolist() for text in (source, target))
    name = family.text.tokenizer.convert_ids_to_tokens
    many = len(family.text.words(plain(target)))
    assert own[1 + many :].sum() == 0 and words[:, 1 + many :].sum() >= 1
    found = []
    for j in range(1, 1 + many):
        share = f"{float(words[:, j].max()):.2f}".rstrip("0").rstrip(".")
        found.append([name(before[i]).removesuffix("</w>") + ("" if share == "1" else share) for i in words[:, j].nonzero().flatten()])
    kept = [name(after[j]).removesuffix("</w>") + f"{float(weights[j]):g}" for j in range(1, 1 + many) if own[j] or weights[j] != 1]
    return found, kept


def plain(text: str) -> str:
    return "".join(piece.text for piece in unweighted(read(text)).at(0, 1)[0])


@pytest.mark.parametrize(
    ("source", "target", "expected", "kept"),
    [
        ("a red ring", "a red ring", [["a"], ["red"], ["ring"]], []),
        ("a red ring", "a blue ring", [["a"], ["red"], ["ring"]], []),  # replace
        ("a ring", "a red ring", [["a"], [], ["ring"]], ["red1"]),  # refine
        ("a red ring", "a ring", [["a"], ["ring"]], []),
        ("a large red ring", "a green ring", [["a"], ["large", "red"], ["ring"]], []),
        ("a green ring", "a large red ring", [["a"], ["green0.5"], ["green0.5"], ["ring"]], []),
        ("a red ring", "a (red:2) ring", [["a"], ["red"], ["ring"]], ["red2"]),  # re-weight
    ],
)
def test_words_that_stand_for_others(
    family: LatentDiffusionFamily, source: str, target: str, expected: list[list[str]], kept: list[str]
) -> None:
    assert mapped(family, source, target) == (expected, kept)


def test_all_of_the_paddings_attention_is_passed_on(family: LatentDiffusionFamily) -> None:
    """Whatever the prompts' lengths: each source token's attention goes to some of the target's, in all as much as there is."""
    for source, target in (("a red ring", "a small blue ring"), ("a small large blue ring", "a ring"), ("", "a ring")):
        words, _, _ = word_map(family.text, *(read(text).at(0, 1)[0] for text in (source, target)), 1)
        real = len(family.text.words(source)) + 2
        assert torch.allclose(words[real:].sum(1), torch.ones(family.text.max_tokens - real))


def latents(family: LatentDiffusionFamily, prompts: list[str], seeds: list[int], *edits: Edit, **wanted: Any) -> Tensor:
    settings = family.settings(Wanted(**{"steps": 4, "sampler": "ddim", "guidance": 3.0, **wanted}))
    with torch.no_grad():
        return family.engine().draw([read(one) for one in prompts], seeds, settings, (SIDE, SIDE), edits=edits)[1]


@pytest.mark.parametrize("sampler", ["ddim", "euler_a", "heun"])
def test_the_same_prompt_gives_the_same_picture(family: LatentDiffusionFamily, sampler: str) -> None:
    edits = family.exchanged(read("a red ring"), 1.0, 1.0)
    own = latents(family, ["a red ring"], [3], sampler=sampler)
    assert torch.allclose(latents(family, ["a red ring"], [3], *edits, sampler=sampler), own, atol=1e-4)
    other = latents(family, ["a blue ring"], [3], *edits, sampler=sampler)
    without = latents(family, ["a blue ring"], [3], sampler=sampler)
    assert (other - own).abs().max() > 1e-3 and (other - without).abs().max() > 1e-3


def test_each_share_does_something_of_its_own(family: LatentDiffusionFamily) -> None:
    drawn = [
        latents(family, ["a blue ring"], [3], *family.exchanged(read("a red circle"), *shares))
        for shares in ((0, 0), (1, 0), (0, 1), (0.5, 0))
    ]
    assert torch.allclose(drawn[0], latents(family, ["a blue ring"], [3]), atol=1e-4)
    assert all((a - b).abs().max() > 1e-4 for i, a in enumerate(drawn) for b in drawn[:i])


def test_a_words_weight_multiplies_its_attention(family: LatentDiffusionFamily) -> None:
    edits = family.exchanged(read("a red ring"), 0.5, 0)
    one, two, changed = (latents(family, [text], [3], *edits) for text in ("a red ring", "a (red:1) ring", "a (red:3) ring"))
    assert torch.equal(one, two) and (one - changed).abs().max() > 1e-3


def test_no_picture_depends_on_its_neighbours(family: LatentDiffusionFamily) -> None:
    edits, prompts = family.exchanged(read("a red ring"), 0.8, 0.4), ["a blue ring", "a small red ring", "a [red:green:0.5] (circle:1.3)"]
    many = max(3, family.defaults["chunk"] + 1)
    whole = latents(family, (prompts * many)[:many], list(range(many)), *edits)
    for i in (0, 2, many - 1):
        assert torch.equal(latents(family, [(prompts * many)[i]], [i], *edits), whole[i : i + 1])


def test_what_watches_and_what_guides_sees_the_pictures_alone(family: LatentDiffusionFamily) -> None:
    seen: list[tuple[tuple[int, ...], Tensor]] = []
    edits = family.exchanged(read("a red ring"), 0.8, 0.4)
    x = latents(family, ["a blue ring"], [3], *edits, *family.watch(lambda rows, i, x0: seen.append((tuple(rows), x0))))
    chunk = family.defaults["chunk"]
    assert [rows for rows, _ in seen] == [(0,) * chunk] * 4 and torch.allclose(seen[-1][1][:1], x, atol=1e-5)


def test_prompts_that_cannot_stand_beside_each_other(family: LatentDiffusionFamily) -> None:
    with pytest.raises(UserError, match="source: attention is exchanged between two prompts without AND"):
        latents(family, ["a ring AND a circle"], [0], *family.exchanged(read("a ring"), 0.8, 0.4))


def test_a_network_that_is_told_views_exchanges_as_its_base_does(family: LatentDiffusionFamily) -> None:
    exchange = AttentionExchange(None, torch.ones(1, 16))
    memory = family.denoiser.remember(family.text.encode(["a ring", "a ring"]))
    assert Conditioned(family.denoiser, {}).exchanging(memory, exchange).exchange is exchange


def test_a_network_that_exchanges_none() -> None:
    network = DiTConfig(in_channels=4, out_channels=4, heads=2, head_width=8, layers=1, context_width=16).build()
    with pytest.raises(UserError, match="source: attention is exchanged in U-Nets, not in"):
        network.exchanging(None, None)  # type: ignore[arg-type]
