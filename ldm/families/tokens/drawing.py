"""Drawing of codes: masked order by confidence (MaskGIT), causal order one by one, guidance on logits, temperature, top-k and top-p."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ldm.diffusion.batch import sent
from ldm.diffusion.rng import Rng
from ldm.families.draws import DIRECT, NUMBERS, Draws, Settings, Wanted, steps_taken
from ldm.text.prompt_syntax import Piece, Prompt, literal

Guided = Callable[[Tensor, int], Tensor]  # codes so far and step to guided logits
CHOSEN = ("steps", "guidance", "guidance_from", "guidance_to", "guidance_curve", "precision", "temperature", "top_k", "top_p")


def settings_of(model: Draws, wanted: Wanted, usual: Mapping[str, Any], causal: bool) -> Settings:
    """The numbers of a sampling call, the model's `usual` ones where none are asked for.

    Args:
        causal: whether there is one step for each token, as many as `usual` says.

    Raises:
        UserError: for what a model of tokens has not.
    """
    for name in NUMBERS:
        value = getattr(wanted, name)
        if name not in CHOSEN and value not in (None, "", getattr(DIRECT, name)):
            model.refuse(f"{name}: got {value!r}", "draws codes and has no such setting; leave it out")
    if not model.reads_prompts and wanted.guidance not in (None, 1.0):
        model.refuse(f"guidance: got {wanted.guidance:g}", "reads no prompt that could guide; leave it out")
    own = {name: value for name in CHOSEN if (value := getattr(wanted, name)) not in (None, "")}
    chosen = replace(DIRECT, **{**usual, **own}).checked()
    if causal and chosen.steps != usual["steps"]:
        model.refuse(f"steps: got {chosen.steps}", f"draws one code after another, {usual['steps']} of them; leave it out")
    return chosen


def pieces_of(model: Draws, prompt: str | Prompt, steps: int, weighs: bool) -> tuple[Piece, ...]:
    """The weighted words of a prompt.

    Args:
        weighs: whether the model knows weights of words.

    Raises:
        UserError: for a prompt that changes while it draws, or weights that change nothing.
    """
    read = literal(prompt) if isinstance(prompt, str) else prompt
    if read.end is not None or len(read.parts) > 1 or len({read.at(i, steps) for i in range(steps)}) > 1:
        model.refuse("prompt", "reads neither AND nor words that change while it draws; write plain words, or give --literal")
    pieces = read.parts[0].at(0, steps)
    if not weighs and any(piece.weight != 1 for piece in pieces):
        model.refuse("prompt", "reads words, which have no weights; write plain words, or give --literal")
    return pieces


@dataclass(frozen=True)
class Known:
    """What of pictures stays: their codes, and where new ones are drawn.

    Args:
        codes: (1 or N,h,w) int64.
        new: (1 or N,h,w) bool, True where codes are drawn.
        strength: the share of `new`'s places, in the measure of the mask schedule, that is drawn anew, and of the steps.
        image: (1 or N,H,W,3) uint8, whose pixels outside `mask` come back as they were.
        mask: (1 or N,H,W) bool, True where pixels are new; None: everywhere.
    """

    codes: Tensor
    new: Tensor
    strength: float
    image: Tensor
    mask: Tensor | None

    def rows(self, rows: Sequence[int], rng: Rng) -> tuple[Tensor, Tensor]:
        """Codes and new places (B,h*w) of some pictures; of a strength below 1 a random part of the places."""
        codes, new = (own_rows(value, rows).flatten(1) for value in (self.codes, self.new))
        if self.strength < 1:
            share = math.sin(self.strength * math.pi / 2)  # the mask schedule at the step that drawing begins with
            chance = rng.uniform("tokens/new", (codes.shape[1],))
            chance = chance.float() if codes.device.type == "mps" else chance  # which has no float64
            chance = sent(chance, codes.device).masked_fill(~new, 2.0)
            rank = chance.argsort(1).argsort(1)
            new = new & (rank < (new.sum(1, keepdim=True) * share).round())
        return codes, new

    def paste(self, drawn: Tensor, rows: Sequence[int]) -> Tensor:
        """Pictures (B,H,W,3) uint8 with the known pixels where these stay."""
        return drawn if self.mask is None else torch.where(own_rows(self.mask, rows)[..., None], drawn, own_rows(self.image, rows))


def own_rows(values: Tensor, rows: Sequence[int]) -> Tensor:
    """These pictures' rows of a tensor with one for each, or one for all."""
    return values[list(rows)] if len(values) > 1 else values.expand(len(rows), *values.shape[1:])


def narrowed(logits: Tensor, settings: Settings) -> Tensor:
    """Logits (...,K) over the temperature, -inf for what top-k and top-p leave out; at temperature 0 for all but the likeliest."""
    if settings.temperature == 0:
        best = logits.argmax(-1, keepdim=True)
        return torch.full_like(logits, -math.inf).scatter(-1, best, 0.0)
    logits = logits / settings.temperature
    if 0 < settings.top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(settings.top_k).values[..., -1:], -math.inf)
    if settings.top_p < 1:  # nucleus sampling (Holtzman 2019, arXiv 1904.09751): the least set that reaches p, so always the likeliest
        ordered, place = logits.sort(-1, descending=True)
        chance = ordered.softmax(-1)
        ordered = ordered.masked_fill(chance.cumsum(-1) - chance > settings.top_p, -math.inf)
        logits = torch.empty_like(logits).scatter(-1, place, ordered)
    return logits


def drawn(logits: Tensor, chance: Tensor, settings: Settings) -> Tensor:
    """Codes (B,L) drawn from logits (B,L,K) by uniform numbers (B,L) in [0,1), through the inverse of the cumulative distribution."""
    left = narrowed(logits, settings)
    left = left.cpu() if left.device.type == "mps" else left  # which has no float64
    total = left.double().softmax(-1).cumsum(-1)
    found = torch.searchsorted(total, (sent(chance, total.device) * total[..., -1])[..., None], right=True)
    return found[..., 0].clamp_max(logits.shape[-1] - 1)


def gumbel(chance: Tensor) -> Tensor:
    """Gumbel noise of uniform numbers in [0,1)."""
    return -(-chance.clamp(1e-20).log()).clamp(1e-20).log()


def masked(guided: Guided, codes: Tensor, new: Tensor, hidden: int, settings: Settings, noise: float, first: int, rng: Rng) -> Tensor:
    """Codes (B,L) by MaskGIT's parallel decoding (Chang 2022, arXiv 2202.04200): the surest stay, the others are hidden and drawn again.

    Args:
        guided: logits (B,L,K) of codes (B,L) of which some are hidden.
        codes: (B,L), what is known.
        new: (B,L) bool, where codes are drawn.
        hidden: the number that stands for a hidden code.
        noise: Gumbel noise on the logarithm of confidences at the first step; it falls to 0 at the last.
        first: the step to begin with.
    """
    steps, length = settings.steps, codes.shape[1]
    if first == steps:  # of so small a strength that no step is its own
        return codes
    codes, total = codes.masked_fill(new, hidden), new.sum(1, keepdim=True)
    for i in range(first, steps):
        unknown = codes == hidden
        logits = guided(codes, i).float()
        chosen = torch.where(unknown, drawn(logits, rng.uniform(f"tokens/{i}", (length,)), settings).to(codes), codes)
        if i == steps - 1:
            return chosen
        # As many stay hidden as diffusers' AmusedScheduler has it, in its precision: at least one, and fewer than before.
        ratio = sent(torch.cos(torch.tensor(i + 1) / steps * math.pi / 2), codes.device)
        keep = torch.minimum((total * ratio).floor(), unknown.sum(1, keepdim=True) - 1).clamp_min(1)
        sure = logits.log_softmax(-1).gather(2, chosen[..., None])[..., 0]
        level = noise * (1 - i / max(1, steps - 1))
        sure = sure + level * sent(gumbel(rng.uniform(f"tokens/confidence/{i}", (length,))).to(sure.dtype), sure.device)
        rank = sure.masked_fill(~unknown, math.inf).argsort(1).argsort(1)
        codes = chosen.masked_fill(unknown & (rank < keep), hidden)
    return codes


def causal(guided: Guided, codes: Tensor, new: Tensor, start: int, settings: Settings, rng: Rng, end: int = -1) -> Tensor:
    """Codes (B,L) one after another, each told those before it; the known ones are told as they are.

    Args:
        guided: logits (B,K) of the next code, told the latest one (B,).
        codes: (B,L), what is known.
        new: (B,L) bool, where codes are drawn.
        start: the number that stands before the first.
        end: what stands behind the last one of a row, and fills it; -1: every row is as long as `codes`.
    """
    chance = rng.uniform("tokens/causal", (codes.shape[1],))
    found, last = [], torch.full_like(codes[:, 0], start)
    ended = torch.zeros_like(last, dtype=torch.bool)
    for i in range(codes.shape[1]):
        chosen = drawn(guided(last, i).float()[:, None], chance[:, i : i + 1], settings)[:, 0].to(codes)
        last = torch.where(new[:, i], chosen, codes[:, i])
        found.append(last)
        ended = ended | (last == end)
        if end >= 0 and ended.all():  # pictures end nowhere, and are not asked: a GPU would be waited for
            break
    rest = [torch.full_like(last, end)] * (codes.shape[1] - len(found))
    rows = torch.stack(found + rest, 1)
    return torch.where((rows == end).cumsum(1) > 0, end, rows)


def first_step(settings: Settings, known: Known | None) -> int:
    """The step that drawing begins with: the first, or a later one of a picture that is kept in part."""
    return settings.steps - steps_taken(settings.steps, 1.0 if known is None else known.strength)
