"""Chains of models: each draws what the next is told as its view `small:N` (cascaded diffusion, Ho 2021, arXiv 2106.15282; Imagen)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from math import lcm
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.config.errors import UserError
from ldm.data.views import parted
from ldm.diffusion.rng import mix
from ldm.families.draws import AFTER, OWN, Draws, Running, Settings, Wanted
from ldm.formats.model_folder import root_of

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from ldm.text.prompt_syntax import Prompt

BEFORE = "before"  # in a model folder: the model whose pictures it is told
SEEDS = 2**53


class Chain(Draws):
    """Models in order, as one that draws. Prompts, guidance, sampler and steps are the first one's; later ones keep to their own.

    Picture i of link k is drawn with the seed mix(seed, "link", k), the first link's with the seed itself, so that it is the picture which
    that model draws alone.

    Args:
        links: at least two; all but the first read a view `small:N`.

    Raises:
        UserError: where a link reads no such view, or another size of it than the one before draws.
    """

    kind = "chain"

    def __init__(self, links: Sequence[Draws]) -> None:
        self.links = tuple(links)
        self.content_hash = links[-1].content_hash
        self.views: list[tuple[str, int]] = []  # of all links but the first: the view's name, and how many times it is smaller
        for before, link in zip(links, links[1:], strict=False):
            found = [(name, kind.divide) for name, kind in link.told.items() if parted(name)[0] == "small"]
            if len(found) != 1:
                raise UserError(f"chain: a model is told the picture before as one view small:N, but this one reads {list(link.told)}")
            sides = [side // found[0][1] for side in link.defaults["size"]]
            if sides != list(before.defaults["size"]):
                drawn, wanted = ("x".join(map(str, s)) for s in (before.defaults["size"], sides))
                raise UserError(f"chain: a model draws {drawn} px, but the next is told {wanted} px ({found[0][0]}); make them equal")
            self.views += found

    def parameters(self) -> Iterator[nn.Parameter]:
        """Of all links."""
        for link in self.links:
            yield from link.parameters()

    @property
    def device(self) -> torch.device:
        """Where the last link lies."""
        return self.links[-1].device

    @property
    def factor(self) -> int:
        """Sides that every link can draw at its size."""
        found = self.links[0].factor
        for link, (_, by) in zip(self.links[1:], self.views, strict=True):
            found = lcm(found * by, link.factor)
        return found

    @property
    def defaults(self) -> dict[str, Any]:
        """The first link's, at the last one's size."""
        return {**self.links[0].defaults, "size": self.links[-1].defaults["size"]}

    def settings(self, wanted: Wanted = OWN) -> Settings:
        """The first link's numbers, and the steps of the others."""
        first = self.links[0].settings(replace(wanted, link_steps=None, stop_after=None))
        many, last = len(self.links), wanted.stop_after or len(self.links)
        if not 1 <= last <= many:
            raise UserError(f"stop_after: got {last}; this chain has {many} models")
        steps = [link.settings().steps for link in self.links[1:]]
        if wanted.link_steps:
            said = [int(word) if word.strip().isdecimal() else 0 for word in wanted.link_steps.split(",")]
            if len(said) != len(steps) or min(said) < 1:
                raise UserError(
                    f"link_steps: got {wanted.link_steps!r}; {len(steps)} numbers with commas are needed, such as {_joined(steps)}"
                )
            steps = [link.settings(Wanted(steps=count)).steps for link, count in zip(self.links[1:], said, strict=True)]
        return replace(first, link_steps=_joined(steps), stop_after=last if last < many else 0)

    def sample(
        self,
        prompts: Sequence[str | Prompt],
        seeds: Sequence[int] | None = None,
        settings: Wanted = OWN,
        *,
        size: tuple[int, int] | None = None,
        negative: str | Prompt = "",
        latents: Tensor | None = None,
        edits: Sequence[Any] = (),
        on_step: Callable[[int, int], None] | None = None,
        note: Callable[[str], None] | None = None,
    ) -> Tensor:
        """One picture for each (prompt, seed); with `stop_after` those of an earlier link, which are smaller.

        Args:
            size: of the last link's pictures.
            latents: the first link's noise.
            edits: of the first link.
        """
        chosen, seeds = self.settings(settings), list(range(len(prompts)) if seeds is None else seeds)
        last = chosen.stop_after or len(self.links)
        sizes = [size or self.defaults["size"]]
        for _, by in reversed(self.views):
            sizes.insert(0, (sizes[0][0] // by, sizes[0][1] // by))

        def in_link(k: int) -> Callable[[int, int], None] | None:
            return None if on_step is None else lambda done, steps: on_step(k * steps + done, last * steps)

        own = replace(settings, link_steps=None, stop_after=None)
        steps = [int(word) for word in chosen.link_steps.split(",")]
        made = self.links[0].sample(
            prompts, seeds, own, size=sizes[0], negative=negative, latents=latents, edits=edits, on_step=in_link(0), note=note
        )
        for k, link in enumerate(self.links[1:last], 1):
            view = made.permute(0, 3, 1, 2).float() / 255
            told = link.tell({self.views[k - 1][0]: view}, {}, sizes[k])
            wanted = Wanted(steps=steps[k - 1], precision=settings.precision)
            others = [mix(seed, "link", k) % SEEDS for seed in seeds]
            made = link.sample(prompts, others, wanted, size=sizes[k], negative=negative, edits=told, on_step=in_link(k), note=note)
        return made

    def noise(self, seeds: Sequence[int], size: tuple[int, int]) -> Tensor:
        """The first link's."""
        for _, by in self.views:
            size = (size[0] // by, size[1] // by)
        return self.links[0].noise(seeds, size)

    def overlong(self, prompt: Prompt) -> str:
        """As the first link says."""
        return self.links[0].overlong(prompt)

    def says(self, prompt: str, word: str) -> bool:
        """As the first link says."""
        return self.links[0].says(prompt, word)

    def tokens(self, prompt: Prompt) -> tuple[int, int] | None:
        """As the first link says."""
        return self.links[0].tokens(prompt)

    def unknown(self, prompt: str) -> list[str]:
        """As the first link says."""
        return self.links[0].unknown(prompt)

    def ready(self, folder: Path, running: Running, precision: str) -> None:
        """All links."""
        root = root_of(folder)
        for k, link in enumerate(self.links):
            link.ready(root.joinpath(*[BEFORE] * (len(self.links) - 1 - k)), running, precision)


def _joined(steps: Sequence[int]) -> str:
    return ",".join(map(str, steps))


def chained(before: Draws, own: Draws) -> Chain:
    """A model behind the one, or the chain, whose pictures it is told."""
    return Chain([*(before.links if isinstance(before, Chain) else [before]), own])


def within(products: Mapping[str, Any]) -> dict[str, Any]:
    """Of what a link is assembled from, by role, what the model before is assembled from."""
    inner = {role.removeprefix(f"{AFTER}."): product for role, product in products.items() if role.startswith(f"{AFTER}.")}
    return inner | {"model": products[AFTER]}
