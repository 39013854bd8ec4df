"""Prompt-to-prompt (Hertz 2022, arXiv 2208.01626): a picture keeps its layout, for it looks where the picture of another prompt looks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from difflib import SequenceMatcher
from typing import TypeVar

import torch
from torch import Tensor

from ldm.config.errors import UserError
from ldm.diffusion.samplers import Denoise
from ldm.families.draws import steps_taken
from ldm.families.latent_diffusion.prompt_schedule import Pieces, PromptShape, shape_of
from ldm.models.attention_exchange import AttentionExchange
from ldm.text.encoder import TextEncoder
from ldm.text.prompt_syntax import Prompt, unweighted
from ldm.text.weighted import chunks_of

T = TypeVar("T")
PLACES = 32 * 32  # self-attention over more places is never exchanged: it decides on texture, not on layout (the paper's code)


@dataclass(frozen=True)
class Exchange:
    """A prompt that is drawn beside every picture, from the same noise, and whose attention is taken.

    A word that both prompts have takes the source's attention to it (refine), and one in the place of another that one's (replace); one
    that the source has nothing for keeps its own. A word's weight in the prompt's notation multiplies its attention (re-weight).

    Args:
        cross: the share of the steps, from the first on, in which words take attention.
        inward: and in which places do, of each other (self-attention).
    """

    source: Prompt
    cross: float
    inward: float

    def shape(self, encoder: TextEncoder, prompt: Prompt, negative: Prompt, steps: int) -> PromptShape:
        """What `shape_of` says of a prompt, with room for the source.

        Raises:
            UserError: for prompts of which no word stands beside another one.
        """
        if prompt.end is not None or len(prompt.parts) > 1 or len(self.source.parts) > 1:
            raise UserError("source: attention is exchanged between two prompts without AND and --to; leave these, or --source, out")
        found, other = (shape_of(encoder, one, negative, steps) for one in (prompt, self.source))
        return replace(found, chunks=max(found.chunks, other.chunks))

    def between(self, encoder: TextEncoder, prompts: Sequence[Prompt], shape: PromptShape, steps: int) -> ExchangeSchedule:
        """What B pictures of `prompts` take at each of `steps`."""
        return ExchangeSchedule(self, encoder, tuple(prompts), shape.chunks, steps)


class ExchangeSchedule:
    """The exchanges of a chunk of B pictures, step after step; 2 B rows are drawn, the sources first."""

    def __init__(self, exchange: Exchange, encoder: TextEncoder, prompts: tuple[Prompt, ...], chunks: int, steps: int) -> None:
        self.exchange, self.encoder, self.chunks, self.steps = exchange, encoder, chunks, steps
        self.meant = prompts
        self.prompts = [exchange.source] * len(prompts) + [unweighted(prompt) for prompt in prompts]
        self._maps: dict[tuple[Pieces, Pieces], tuple[Tensor, Tensor, Tensor]] = {}

    def at(self, i: int) -> AttentionExchange | None:
        """What is taken at step i; None: nothing."""
        cross = i < steps_taken(self.steps, self.exchange.cross)
        inward = i < steps_taken(self.steps, self.exchange.inward)
        (source,) = self.exchange.source.at(i, self.steps)
        maps = [self._map(source, one.at(i, self.steps)[0]) for one in self.meant]
        words, own, weights = (torch.stack(rows) for rows in zip(*maps, strict=True))
        if not cross and not inward and bool((weights == 1).all()):
            return None
        places = PLACES if inward else 0
        if not cross:
            return AttentionExchange(None, weights, places)
        return AttentionExchange(words * weights[:, None], own * weights, places)

    def _map(self, source: Pieces, target: Pieces) -> tuple[Tensor, Tensor, Tensor]:
        if (source, target) not in self._maps:
            self._maps[source, target] = word_map(self.encoder, source, target, self.chunks)
        return self._maps[source, target]


def word_map(encoder: TextEncoder, source: Pieces, target: Pieces, chunks: int) -> tuple[Tensor, Tensor, Tensor]:
    """Which token of a source's text stands for which of a target's: words (S,S), own (S,) and weights (S,) of an `AttentionExchange`.

    Equal tokens in equal order stand for each other; a stretch in the place of another shares its attention evenly; what is new keeps its
    own. Padding stands for padding, since states there say what the whole prompt says.
    """
    found = [chunks_of(encoder, pieces)[:chunks] for pieces in (source, target)]
    ids, real, weights = [], [], torch.ones(chunks, encoder.max_tokens)
    for one in found:
        rows, told = encoder.framed([chunk.ids for chunk in one] + [()] * (chunks - len(one)))
        ids.append(rows.flatten().tolist())
        real.append(told.flatten())
    for row, chunk in zip(weights, found[1], strict=False):
        row[encoder.words_start : encoder.words_start + len(chunk.weights)] = torch.tensor(chunk.weights)
    (a, b), (a_pads, b_pads) = ([one.nonzero().flatten().tolist() for one in mask] for mask in (real, [~one for one in real]))
    words, own = torch.zeros(len(ids[0]), len(ids[0])), torch.zeros(len(ids[0]))
    matcher = SequenceMatcher(None, [ids[0][i] for i in a], [ids[1][j] for j in b], autojunk=False)
    for kind, first, last, begin, end in matcher.get_opcodes():
        if kind == "equal":
            words[a[first:last], b[begin:end]] = 1
        elif kind == "insert":
            own[b[begin:end]] = 1
        elif kind == "replace":
            words[torch.tensor(a[first:last])[:, None], torch.tensor(b[begin:end])] = 1 / (end - begin)
    for k, j in enumerate(b_pads):
        if a_pads:
            last = len(a_pads) - 1
            words[a_pads[min(k, last)], j] = 1 if k < last else 1 / (len(b_pads) - last)
        else:
            own[j] = 1
    if b_pads and len(a_pads) > len(b_pads):
        words[a_pads[len(b_pads) :], b_pads[-1]] = 1
    return words, own, weights.flatten()


def of_targets(guide: Callable[[Denoise, T], Denoise], denoise: Denoise, canvas: T) -> Denoise:
    """A denoiser of 2B rows whose second half a guide has changed, which asks the denoiser that it is given once and about x itself."""
    told: list[Tensor] = [torch.empty(0)]
    changed = guide(lambda x, i: told[0], canvas)

    def both(x: Tensor, i: int) -> Tensor:
        first, told[0] = denoise(x, i).chunk(2)
        return torch.cat([first, changed(x[len(first) :], i)])

    return both
