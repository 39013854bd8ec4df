"""Exchange of attention against maps that are written out, as the paper has them."""

from __future__ import annotations

import torch
from torch import Tensor

from ldm.models.attention_exchange import AttentionExchange
from ldm.models.transformer import CrossAttention, Memory

PAIRS, PLACES, TOKENS, WIDTH = 2, 9, 5, 16


def layer(inward: bool) -> CrossAttention:
    torch.manual_seed(0)
    return CrossAttention(WIDTH, WIDTH, 2, False, looks_inward=inward).double()


def maps(net: CrossAttention, x: Tensor, source: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Attention maps (N,heads,L,S) and values (N,heads,S,D)."""
    q = net.to_q(x).unflatten(2, (2, -1)).transpose(1, 2)
    k, v = net.keys_values(source)
    scores = q @ k.transpose(2, 3) * (WIDTH // 2) ** -0.5
    return torch.softmax(scores if mask is None else scores.masked_fill(~mask, -torch.inf), dim=-1), v


def out_of(net: CrossAttention, attention: Tensor, v: Tensor) -> Tensor:
    found: Tensor = net.to_out[0]((attention @ v).transpose(1, 2).flatten(2))
    return found


def batch() -> tuple[Tensor, Tensor, Tensor]:
    """x, text states and masks of a batch with unprompted rows before the pairs, as guidance has it."""
    rows = 4 * PAIRS
    mask = torch.rand(rows, 1, 1, TOKENS) > 0.3
    mask[..., 0] = True
    return torch.randn(rows, PLACES, WIDTH).double(), torch.randn(rows, TOKENS, WIDTH).double(), mask


def test_words_take_the_sources_maps() -> None:
    net = layer(False)
    x, text, mask = batch()
    words, own = torch.rand(PAIRS, TOKENS, TOKENS).double(), torch.rand(PAIRS, TOKENS).double()
    attention, v = maps(net, x, text, mask)
    taken = attention[-2 * PAIRS : -PAIRS] @ words[:, None] + attention[-PAIRS:] * own[:, None, None]
    expected = out_of(net, torch.cat([attention[:-PAIRS], taken]), v)
    for memory in (Memory(text, mask), Memory(text, mask, {net: net.keys_values(text)})):
        assert torch.allclose(net(x, memory, AttentionExchange(words, own)), expected, atol=1e-12)


def test_re_weighting_alone_multiplies_own_maps() -> None:
    net = layer(False)
    x, text, mask = batch()
    own = torch.rand(PAIRS, TOKENS).double()
    attention, v = maps(net, x, text, mask)
    expected = out_of(net, torch.cat([attention[:-PAIRS], attention[-PAIRS:] * own[:, None, None]]), v)
    assert torch.allclose(net(x, Memory(text, mask), AttentionExchange(None, own)), expected, atol=1e-12)


def test_places_take_the_sources_maps_where_there_are_few() -> None:
    net = layer(True)
    x, _, _ = batch()
    attention, v = maps(net, x, x)
    taken = torch.cat([attention[:-PAIRS], attention[-2 * PAIRS : -PAIRS]])
    own = torch.ones(PAIRS, TOKENS)
    assert torch.allclose(net(x, None, AttentionExchange(None, own, PLACES)), out_of(net, taken, v), atol=1e-12)
    assert torch.equal(net(x, None, AttentionExchange(None, own, PLACES - 1)), net(x, None))
