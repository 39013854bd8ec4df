"""Scaled dot-product attention: the one place that picks a kernel."""

from __future__ import annotations

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.config.errors import UserError

Kind = Literal["auto", "sdpa", "plain", "xformers", "sliced"]

SLICE_BYTES = 64 * 2**20  # the scores that "sliced" holds at a time

_kind: Kind = "auto"


def set_attention(kind: Kind, device: torch.device | str = "cpu") -> None:
    """Choose the kernel of every later call that names none.

    Raises:
        UserError: for an unknown name, or for xformers where a tiny call on `device` does not run.
    """
    global _kind
    if kind not in get_args(Kind):
        raise UserError(f"attention: {kind!r} is unknown; choose one of {', '.join(get_args(Kind))}")
    if kind == "xformers":
        _probe_xformers(torch.device(device))
    _kind = kind


def get_attention() -> Kind:
    """The kernel that calls use when they name none."""
    return _kind


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, kind: Kind | None = None) -> Tensor:
    """softmax(q kᵀ / √D) v.

    Args:
        q: (B,heads,L,D).
        k: (B,heads,S,D).
        v: (B,heads,S,D).
        mask: bool, broadcastable to (B,heads,L,S), False where a key is hidden.
        kind: the kernel; by default the one that `set_attention` chose.

    Returns:
        (B,heads,L,D).
    """
    kind = kind or _kind
    if kind == "auto":
        kind = "plain" if _plain_is_faster(q, k, v) else "sdpa"
    if kind == "sdpa":
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    if kind == "plain":
        return _plain(q, k, v, mask)
    if kind == "sliced":
        return _sliced(q, k, v, mask)
    return _xformers(q, k, v, mask)


def _plain_is_faster(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether materialised scores beat the fused CPU kernel.

    Time of SDPA / time of plain, inference | training, on one AVX512-bf16 core (EPYC), torch 2.15, 128 channels in all:

    bf16    self-attention, L = S                                    24 keys, L =
    head    16           64           256          1024              16           64           256          1024
    16      1.3 | 2.2    1.5 | 8.6    0.9 | 2.2    0.4 | 0.6         1.2 | 8.5    1.0 | 5.5    0.9 | 3.4    0.8 | 1.6
    32      1.3 | 9.0    1.6 | 6.7    1.3 | 2.3    1.3 | 1.5         1.1 | 7.8    1.0 | 4.9    0.9 | 3.0    0.8 | 1.3
    64      1.3 | 7.7    1.4 | 4.2    1.6 | 2.3    1.5 | 1.7         1.1 | 6.6    0.9 | 4.0    0.9 | 2.6    0.8 | 1.3

    fp32
    16      1.1 | 1.2    0.8 | 0.9    0.6 | 0.7    0.2 | 0.4         1.5 | 1.6    1.5 | 1.5    1.2 | 1.9    1.4 | 1.3
    32      1.0 | 1.4    0.8 | 1.0    0.7 | 0.9    0.3 | 0.5         1.1 | 1.3    1.3 | 1.3    1.3 | 1.4    1.2 | 1.1
    64      0.9 | 0.8    0.9 | 1.0    0.8 | 1.0    0.8 | 1.0         0.9 | 1.0    1.1 | 1.1    1.1 | 1.1    1.1 | 1.1
    """
    if q.device.type != "cpu":
        return False
    queries, keys, head = q.shape[-2], k.shape[-2], q.shape[-1]
    if queries * keys > 1024 * 1024:  # not measured, and the scores would fill the memory
        return False
    if q.dtype == torch.float32:
        return keys <= 32 and (head <= 32 or queries > keys)
    if q.dtype != torch.bfloat16:
        return False
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        return head >= 32 or keys <= 256
    return queries <= 64 or (head >= 32 and keys >= 64)


def _plain(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    batch, heads, queries, head = q.shape
    q, k, v = (x.reshape(batch * heads, x.shape[2], head) for x in (q, k, v))
    nothing = q.new_empty(1, 1, 1)  # beta = 0: never read; alpha scales inside the product
    scores = torch.baddbmm(nothing, q, k.transpose(1, 2), beta=0, alpha=head**-0.5)  # (B*heads,L,S)
    if mask is not None:
        hidden = ~mask.expand(batch, heads, queries, k.shape[1]).reshape(scores.shape)
        scores = scores.masked_fill(hidden, float("-inf"))
    out = torch.bmm(torch.softmax(scores, dim=-1).to(v.dtype), v)  # CUDA autocast leaves softmax in float32
    return out.view(batch, heads, queries, head)


def _sliced(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Plain attention over as many queries at a time as keep the scores below SLICE_BYTES."""
    row_bytes = q.shape[0] * q.shape[1] * k.shape[2] * q.element_size()
    step = max(1, SLICE_BYTES // row_bytes)
    if mask is not None:
        mask = mask.expand(q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    parts = [_plain(q[:, :, i : i + step], k, v, None if mask is None else mask[:, :, i : i + step]) for i in range(0, q.shape[2], step)]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


def _xformers(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    from xformers.ops import memory_efficient_attention  # (B,L,heads,D)

    bias = None
    if mask is not None:
        # xformers reads the bias in blocks of eight keys, so its rows must start on multiples of eight.
        shape = (q.shape[0], q.shape[1], q.shape[2], k.shape[2])
        bias = q.new_zeros(*shape[:3], -(-shape[3] // 8) * 8)[..., : shape[3]]
        bias.masked_fill_(~mask.expand(shape), float("-inf"))
    out = memory_efficient_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_bias=bias)
    return out.transpose(1, 2)


def _probe_xformers(device: torch.device) -> None:
    dtype = torch.float32 if device.type == "cpu" else torch.float16
    x = torch.zeros(1, 1, 16, 32, device=device, dtype=dtype)
    try:
        _xformers(x, x, x, None)
    except ImportError as error:
        raise UserError(f"attention: xformers cannot be imported ({error}); install it or choose sdpa") from error
    except Exception as error:  # kernels refuse with many types
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(f"attention: xformers does not run on {device} ({reason[0]}); choose sdpa") from error
