"""Chains of models: each draws what the next is told (cascaded diffusion, Ho 2021, arXiv 2106.15282; Imagen; unCLIP)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import lcm
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from ldm.config.errors import UserError
from ldm.data.views import parted
from ldm.diffusion.rng import mix
from ldm.families.draws import AFTER, BEFORE, OWN, Draws, Running, SamplingCall, Settings, Wanted
from ldm.formats.model_folder import root_of

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from ldm.data.views import ViewKind
    from ldm.diffusion.batch import View, Views
    from ldm.text.prompt_syntax import Prompt

SEEDS = 2**53


@dataclass(frozen=True)
class ForLink:
    """Edits of one link of a chain."""

    link: int
    edits: tuple[Any, ...]
    begins: bool  # whether they tell it what the link before would have


class Chain(Draws):
    """Models in order, as one that draws. The first that draws pictures leads: guidance, sampler and steps that are asked for are its own.

    Picture i of link k is drawn with the seed mix(seed, "link", k), the leading one's with the seed itself, so that it is the picture which
    that model draws alone. Where a link is given what the one before would draw for it, the chain begins there.

    Args:
        links: at least two; all but the first read a view of what the one before draws (`Draws.hands`).

    Raises:
        UserError: where a link reads no such view, or another size of it than the one before draws.
    """

    kind = "chain"

    def __init__(self, links: Sequence[Draws]) -> None:
        self.links = tuple(links)
        self.content_hash = links[-1].content_hash
        self.views: list[tuple[str, int]] = []  # of all links but the first: the view's name, and how many times it is smaller
        for before, link in zip(links, links[1:], strict=False):
            found = [(name, kind) for name, kind in link.told.items() if parted(name)[0] == before.hands]
            if len(found) != 1:
                told = "a prior's embedding" if not before.draws_pictures else "the picture before as one view small:N"
                raise UserError(f"chain: a model is told {told}, but this one reads {list(link.told)}")
            name, kind = found[0]
            sides = [side // kind.divide for side in link.defaults["size"]]
            if kind.form == "map" and sides != list(before.defaults["size"]):
                drawn, wanted = ("x".join(map(str, s)) for s in (before.defaults["size"], sides))
                raise UserError(f"chain: a model draws {drawn} px, but the next is told {wanted} px ({name}); make them equal")
            self.views.append((name, kind.divide))
        self.leads = next(k for k, link in enumerate(self.links) if link.draws_pictures)
        self.able = self.links[-1].able & {"sample", "reconstruct"}

    @property
    def lead(self) -> Draws:
        """The first that draws pictures."""
        return self.links[self.leads]

    @property
    def others(self) -> list[Draws]:
        """All links but the leading one."""
        return [link for k, link in enumerate(self.links) if k != self.leads]

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
        """The leading link's, at the last one's size."""
        return {**self.lead.defaults, "size": self.links[-1].defaults["size"]}

    def settings(self, wanted: Wanted = OWN) -> Settings:
        """The leading link's numbers, and the steps of the others."""
        first = self.lead.settings(replace(wanted, link_steps=None, stop_after=None))
        many, last = len(self.links), wanted.stop_after or len(self.links)
        if not 1 <= last <= many:
            raise UserError(f"stop_after: got {last}; this chain has {many} models")
        if last <= self.leads:
            raise UserError(f"stop_after: got {last}; the first models of this chain draw embeddings, no pictures; give {self.leads + 1}")
        steps = [link.settings().steps for link in self.others]
        if wanted.link_steps:
            said = [int(word) if word.strip().isdecimal() else 0 for word in wanted.link_steps.split(",")]
            if len(said) != len(steps) or min(said) < 1:
                raise UserError(
                    f"link_steps: got {wanted.link_steps!r}; {len(steps)} numbers with commas are needed, such as {_joined(steps)}"
                )
            steps = [link.settings(Wanted(steps=count)).steps for link, count in zip(self.others, said, strict=True)]
        return replace(first, link_steps=_joined(steps), stop_after=last if last < many else 0)

    def reconstruct(self, image: Tensor) -> Tensor:
        """Pictures (B,3,H,W) in [-1,1] after the last link's autoencoder, which none that it draws is better than."""
        found: Tensor = cast(Any, self.links[-1]).reconstruct(image)
        return found

    @property
    def _readers(self) -> dict[str, int]:
        """Which link reads each view; of several the last, so that a picture that is given is enlarged by it."""
        return {name: k for k, link in enumerate(self.links) for name in link.told}

    @property
    def told(self) -> dict[str, ViewKind]:
        """The views that links read."""
        return {name: self.links[k].told[name] for name, k in self._readers.items()}

    def tell(self, given: Views, strength: Mapping[str, float], size: tuple[int, int]) -> tuple[ForLink, ...]:
        """What `sample` is told of views, each for the link that reads it."""
        sizes, found = self._sizes(size), []
        for k, link in enumerate(self.links):
            own = {name: view for name, view in given.items() if self._readers.get(name) == k}
            if own:
                begins = k > 0 and self.views[k - 1][0] in own
                found.append(ForLink(k, link.tell(own, strength, sizes[k]), begins))
        return tuple(found)

    def unheard(self, name: str, view: View) -> Iterator[str]:
        """As the link says that reads it."""
        yield from self.links[self._readers[name]].unheard(name, view)

    def _sizes(self, size: tuple[int, int]) -> list[tuple[int, int]]:
        """Of all links' pictures, of the size of the last one's."""
        sizes = [size]
        for _, by in reversed(self.views):
            sizes.insert(0, (sizes[0][0] // by, sizes[0][1] // by))
        return sizes

    def draw(self, call: SamplingCall) -> Tensor:
        """One picture for each (prompt, seed); with `stop_after` those of an earlier link, which are smaller.

        Args:
            call: `size` is of the last link's pictures, `latents` the leading link's noise; `edits` its own, and what `tell` gave.
        """
        chosen, settings, note, on_step = self.settings(call.settings), call.settings, call.note, call.on_step
        last, sizes = chosen.stop_after or len(self.links), self._sizes(call.size)
        told = [edit for edit in call.edits if isinstance(edit, ForLink)]
        own = {k: tuple(e for edit in told if edit.link == k for e in edit.edits) for k in range(len(self.links))}
        own[self.leads] = (*(edit for edit in call.edits if not isinstance(edit, ForLink)), *own[self.leads])
        begin = max((edit.link for edit in told if edit.begins), default=0)
        if begin >= last or any(own[k] for k in range(begin)):
            raise UserError(
                f"given: {self.views[begin - 1][0]} is what the models before draw, so these are not asked; leave out what is for them"
            )
        many = iter(int(word) for word in chosen.link_steps.split(","))
        steps = [None if k == self.leads else next(many) for k in range(len(self.links))]

        own_steps = [k for k in range(begin) if k != self.leads and steps[k] != self.links[k].settings().steps]
        if note is not None and (own_steps or (begin > self.leads and not self._usual(chosen))):
            what = "link_steps" if own_steps else "steps, guidance and sampler"
            note(f"{what}: of a model before what is given, which is not asked, so they change nothing")

        def drawn(k: int, before: Tensor | None, hands: bool) -> Tensor:
            link, leads = self.links[k], k == self.leads
            wanted = replace(settings, link_steps=None, stop_after=None) if leads else Wanted(steps=steps[k], precision=settings.precision)
            asked = replace(
                call,
                seeds=call.seeds if leads else [mix(seed, "link", k) % SEEDS for seed in call.seeds],
                settings=wanted,
                size=sizes[k],
                latents=call.latents if leads else None,
                edits=(*own[k], *(link.tell({self.views[k - 1][0]: before}, {}, sizes[k]) if before is not None else ())),
                on_step=None if on_step is None else lambda done, of: on_step((k - begin) * of + done, (last - begin) * of),
            )
            return link.hand(asked) if hands else link.draw(asked)

        def of_link(k: int, before: Tensor | None, hands: bool) -> Tensor:
            try:
                return drawn(k, before, hands)
            except UserError as error:
                if k == self.leads:
                    raise
                raise UserError(f"model {k + 1} of the chain: {error}") from None

        made: Tensor | None = None
        for k in range(begin, last - 1):
            made = of_link(k, made, hands=True)
        return of_link(last - 1, made, hands=False)

    def _usual(self, chosen: Settings) -> bool:
        """Whether nothing is asked of the leading link."""
        same = self.settings()
        return replace(chosen, link_steps=same.link_steps, stop_after=same.stop_after, precision=same.precision) == same

    def noise(self, seeds: Sequence[int], size: tuple[int, int]) -> Tensor:
        """The leading link's."""
        return self.lead.noise(seeds, self._sizes(size)[self.leads])

    def overlong(self, prompt: Prompt) -> str:
        """As the leading link says."""
        return self.lead.overlong(prompt)

    def says(self, prompt: str, word: str) -> bool:
        """As the leading link says."""
        return self.lead.says(prompt, word)

    def untaught(self, prompt: str) -> list[str]:
        """As the leading link says."""
        return self.lead.untaught(prompt)

    def tokens(self, prompt: Prompt) -> tuple[int, int] | None:
        """As the leading link says."""
        return self.lead.tokens(prompt)

    def unknown(self, prompt: str) -> list[str]:
        """As the leading link says."""
        return self.lead.unknown(prompt)

    def misspelt(self, prompt: str) -> dict[str, str]:
        """As the leading link says."""
        return self.lead.misspelt(prompt)

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
