"""Prompt schedule: what the network is told at each step, by prompts that change, several at once, of any length."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ldm.config.errors import UserError
from ldm.diffusion.batch import Cond, Text, where
from ldm.text.encoder import TextEncoder
from ldm.text.prompt_syntax import Piece, Prompt
from ldm.text.weighted import chunks_of, encode

Pieces = tuple[Piece, ...]
MAX_CHUNKS = 16  # of one prompt; what is beyond is not read


@dataclass(frozen=True)
class PromptShape:
    """What of a prompt decides the shape of the network's calls: pictures of equal shape are drawn together."""

    parts: int  # prompts that AND joins
    chunks: int  # calls of the text encoder
    plain: bool  # one part of guidance weight 1, so that without guidance the empty prompt is not asked


def shape_of(encoder: TextEncoder, prompt: Prompt, negative: Prompt, steps: int) -> PromptShape:
    """The shape of a prompt with its negative over `steps` steps.

    Raises:
        UserError: if the prompt is on the way to one with more or fewer parts.
    """
    every = (prompt, negative) if prompt.end is None else (prompt, prompt.end, negative)
    if prompt.end is not None and len(prompt.end.parts) != len(prompt.parts):
        counts = f"{len(prompt.parts)} and {len(prompt.end.parts)}"
        raise UserError(f"to: the prompts have {counts} parts joined by AND; both need as many")
    texts = {pieces for step in range(max(1, steps)) for one in every for pieces in one.at(step, steps)}
    chunks = min(MAX_CHUNKS, max(len(chunks_of(encoder, pieces)) for pieces in texts))
    return PromptShape(len(prompt.parts), chunks, len(prompt.parts) == 1 and prompt.parts[0].weight == 1)


@dataclass
class PromptSchedule:
    """The conditions of a chunk of B pictures, step after step.

    Args:
        prompts: B of equal shape.
        negatives: B; what AND joins there is read as one text after another.
        about: every picture's condition, from its text, and whether that is the prompts'; the negative ones' stands for no prompt.
        clip_skip: the text encoder's layer that is read, from the last one.
    """

    encoder: TextEncoder
    prompts: Sequence[Prompt]
    negatives: Sequence[Prompt]
    shape: PromptShape
    steps: int
    about: Callable[[Text, bool], Cond]
    clip_skip: int = 1
    _made: dict[tuple[tuple[Pieces, ...], tuple[Pieces, ...]], Cond] = field(default_factory=dict)
    _none: dict[tuple[Pieces, ...], Cond] = field(default_factory=dict)

    def weights(self) -> Tensor:
        """Of every part's guidance, (parts,B)."""
        return torch.tensor([[prompt.parts[k].weight for prompt in self.prompts] for k in range(self.shape.parts)])

    def told(self, step: int) -> tuple[Cond, ...]:
        """At a step, the negative prompts and then every part's; the very same objects where nothing changes."""
        step = max(0, min(step, self.steps - 1))
        without = [tuple(piece for part in one.at(step, self.steps) for piece in part) for one in self.negatives]
        now = [prompt.at(step, self.steps) for prompt in self.prompts]
        ends = [(prompt.end or prompt).at(step, self.steps) for prompt in self.prompts]
        parts = [[tuple(texts[k] for texts in all_of) for all_of in (now, ends)] for k in range(self.shape.parts)]
        return (self._negative(tuple(without)), *(self._cond(begin, end) for begin, end in parts))

    def _negative(self, without: tuple[Pieces, ...]) -> Cond:
        """Of negative prompts; where there is none, of what the encoder takes for none."""
        if without not in self._none:
            text = encode(self.encoder, without, self.shape.chunks, self.clip_skip)
            if self.encoder.zeros:
                told = torch.tensor([any(piece.text.strip() for piece in pieces) for pieces in without], device=text.tokens.device)
                text = where(told, text, self.encoder.unprompted(text))
            self._none[without] = self.about(text, False)
        return self._none[without]

    def _cond(self, begin: tuple[Pieces, ...], end: tuple[Pieces, ...]) -> Cond:
        if (begin, end) not in self._made:
            text = encode(self.encoder, begin, self.shape.chunks, self.clip_skip)
            if begin != end:
                share = torch.tensor([prompt.share for prompt in self.prompts])
                text = between(text, encode(self.encoder, end, self.shape.chunks, self.clip_skip), share)
            self._made[begin, end] = self.about(text, True)
        return self._made[begin, end]


def between(begin: Text, end: Text, share: Tensor) -> Text:
    """Texts (B) whose states are on the straight way from one to the other; to the bit at its ends.

    Args:
        share: (B,) from 0 to 1.
    """
    share = share.to(begin.tokens)
    pooled = None
    if begin.pooled is not None and end.pooled is not None:
        pooled = torch.lerp(begin.pooled, end.pooled, share[:, None].to(begin.pooled))
    inner = (share > 0) & (share < 1)
    mask = torch.where(inner[:, None], begin.mask | end.mask, torch.where((share < 1)[:, None], begin.mask, end.mask))
    return Text(tokens=torch.lerp(begin.tokens, end.tokens, share[:, None, None]), mask=mask, pooled=pooled)
