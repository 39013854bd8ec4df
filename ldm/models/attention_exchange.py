"""Attention exchange (prompt-to-prompt, Hertz 2022, arXiv 2208.01626): pictures that look where others look, while both are drawn."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ldm.diffusion.batch import Movable

Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]  # (q, k, v, mask) -> out


@dataclass(frozen=True, slots=True)
class AttentionExchange(Movable):
    """What the last B rows of a network's batch, the targets, take of the attention of the B rows before them, their sources.

    Of a target's token j the attention is sum_i A_source[:, i] words[i, j] + A_target[:, j] own[j]. As the values stand behind
    the attention in a product, no map of it is made: it is two calls of whatever kernel there is, with values that are mixed first.
    """

    words: Tensor | None  # (B,S,S) of the text's tokens, source by target; None: no map of the source's is taken
    own: Tensor  # (B,S)
    places: int = 0  # self-attention of at most so many places is the source's

    def to_text(self, attend: Attend, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """Cross-attention: q (N,heads,L,D), k and v (N,heads,S,D), mask (N,1,1,S) -> (N,heads,L,D)."""
        many = len(self.own)
        theirs, heard = slice(-2 * many, -many), self.own.to(v)[:, None, :, None] * v[-many:]
        out = attend(q, k, torch.cat([v[:-many], heard]), mask)
        if self.words is None:
            return out
        mixed = self.words.to(v)[:, None] @ v[-many:]  # (B,heads,S,D)
        taken = attend(q[theirs], k[theirs], mixed, None if mask is None else mask[theirs])
        return torch.cat([out[:-many], out[-many:] + taken])

    def to_places(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Queries and keys of self-attention, (N,heads,L,D) each."""
        many = len(self.own)
        if q.shape[2] > self.places:
            return q, k
        return torch.cat([q[:-many], q[-2 * many : -many]]), torch.cat([k[:-many], k[-2 * many : -many]])
