"""Prompts that change, join and go on for long: each means its notation, and no picture depends on its neighbours' prompts."""

from __future__ import annotations

import pytest
import torch
from finished_model import finished_model
from torch import Tensor

from ldm.families.draws import Wanted
from ldm.families.latent_diffusion.family import LatentDiffusionFamily, load
from ldm.text.prompt_syntax import literal, read

A, B = "a small red circle", "a large blue ring"
LONG = " ".join([A, B] * 5)


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> LatentDiffusionFamily:
    torch.manual_seed(0)
    return load(finished_model(tmp_path_factory.mktemp("script") / "model"))


def draw(family: LatentDiffusionFamily, *prompts: str, guidance: float = 3.0, negative: str = "", steps: int = 4) -> Tensor:
    """Latents, which show what eight bits hide."""
    settings = family.settings(Wanted(steps=steps, guidance=guidance, sampler="ddim"))
    size = family.defaults["size"]
    seeds = [7] * len(prompts)
    return family.engine().draw([read(p) for p in prompts], seeds, settings, size, negative=read(negative))[1]


def test_notation_that_changes_nothing(family: LatentDiffusionFamily) -> None:
    plain = draw(family, A)
    for same in (f"({A}:1)", f"[{A}:{B}:99]", f"[{B}:{A}:0]", f"[{A}|{A}]"):
        assert torch.equal(draw(family, same), plain), same
    engine, size = family.engine(), family.defaults["size"]
    settings = family.settings(Wanted(steps=4, guidance=3.0, sampler="ddim"))
    assert torch.equal(engine.draw([A], [7], settings, size)[1], plain)
    assert torch.equal(engine.draw([literal("(a:2)")], [7], settings, size)[1], engine.draw(["(a:2)"], [7], settings, size)[1])


def test_notation_that_changes_something(family: LatentDiffusionFamily) -> None:
    pictures = [draw(family, text) for text in (A, B, f"[{A}:{B}:0.5]", f"[{A}|{B}]", f"({A}:1.5)", f"{A} AND {B}", f"{A} BREAK {B}")]
    for i, one in enumerate(pictures):
        assert all(not torch.equal(one, other) for other in pictures[:i])


def test_half_of_the_steps_are_the_first_prompt(family: LatentDiffusionFamily) -> None:
    """With one step in two, a switch is seen by the second step alone: the first step's result is the first prompt's."""
    seen: list[Tensor] = []
    settings, size = family.settings(Wanted(steps=2, guidance=3.0, sampler="ddim")), family.defaults["size"]
    from ldm.families.latent_diffusion.engine import Edit

    def watch(x: Tensor, i: int, canvas: object) -> Tensor:
        seen.append(x.clone())
        return x

    for text in (A, f"[{A}:{B}:1]"):
        family.engine().draw([read(text)], [7], settings, size, edits=[Edit(after_step=watch)])
    first, second = seen[: len(seen) // 2], seen[len(seen) // 2 :]
    assert torch.equal(first[0], second[0]) and not torch.equal(first[-1], second[-1])


def test_joined_prompts_weigh_their_guidance(family: LatentDiffusionFamily) -> None:
    assert torch.allclose(draw(family, f"{A} AND {B} :0"), draw(family, A), atol=1e-4)
    assert torch.allclose(draw(family, f"{A} :0.5 AND {A} :0.5"), draw(family, A), atol=1e-4)
    assert torch.allclose(draw(family, f"{A} AND {A}"), draw(family, A, guidance=6.0), atol=1e-4)


def test_pictures_do_not_depend_on_their_neighbours(family: LatentDiffusionFamily) -> None:
    prompts = [A, LONG, f"{A} AND {B}", f"[{A}:{B}:0.5]", B, f"({B}:1.3)", LONG + A]
    together = draw(family, *prompts, negative="[a|the] ring")
    for prompt, own in zip(prompts, together, strict=True):
        assert torch.equal(draw(family, prompt, negative="[a|the] ring")[0], own), prompt


def test_long_prompts_are_read_to_their_end(family: LatentDiffusionFamily) -> None:
    assert not torch.equal(draw(family, LONG + " " + A), draw(family, LONG + " " + B))
