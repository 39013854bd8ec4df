import sys
from types import ModuleType

import pytest
import torch
from torch import Tensor

from ldm.config.errors import UserError
from ldm.models import attention as module
from ldm.models.attention import attention, get_attention, set_attention


@pytest.fixture(autouse=True)
def restore():
    before = get_attention()
    yield
    set_attention(before)


def oracle(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    scores = torch.einsum("bhld,bhsd->bhls", q, k) / q.shape[-1] ** 0.5
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return torch.einsum("bhls,bhsd->bhld", scores.softmax(-1), v)


def draw(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def inputs(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    return draw(2, 3, 7, 8, dtype=dtype), draw(2, 3, 5, 8, dtype=dtype, seed=1), draw(2, 3, 5, 8, dtype=dtype, seed=2)


def padding() -> Tensor:
    mask = torch.ones(2, 1, 1, 5, dtype=torch.bool)
    mask[0, ..., 3:] = False
    return mask


def fake_xformers(monkeypatch: pytest.MonkeyPatch) -> list[Tensor | None]:
    """Puts a stand-in with xformers' layout (B,L,heads,D) and additive bias in its place; returns the biases it saw."""
    seen: list[Tensor | None] = []

    def memory_efficient_attention(q, k, v, attn_bias=None):
        seen.append(attn_bias)
        scores = torch.einsum("blhd,bshd->bhls", q, k) / q.shape[-1] ** 0.5
        if attn_bias is not None:
            assert attn_bias.stride(-2) % 8 == 0
            scores = scores + attn_bias
        return torch.einsum("bhls,bshd->blhd", scores.softmax(-1), v)

    ops = ModuleType("xformers.ops")
    ops.memory_efficient_attention = memory_efficient_attention
    monkeypatch.setitem(sys.modules, "xformers", ModuleType("xformers"))
    monkeypatch.setitem(sys.modules, "xformers.ops", ops)
    return seen


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("kind", ["auto", "sdpa", "plain", "sliced", "xformers"])
def test_every_kernel_is_softmax_attention(kind, masked, monkeypatch):
    fake_xformers(monkeypatch)
    monkeypatch.setattr(module, "SLICE_BYTES", 2 * 2 * 3 * 5 * 8)  # two queries at a time
    mask = padding() if masked else None
    q, k, v = (x.requires_grad_() for x in inputs())
    weights = draw(2, 3, 7, 8, seed=3)
    out = attention(q, k, v, mask, kind=kind)
    expected = oracle(q, k, v, mask)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    slopes = torch.autograd.grad((out * weights).sum(), (q, k, v))
    for slope, wanted in zip(slopes, torch.autograd.grad((expected * weights).sum(), (q, k, v)), strict=True):
        torch.testing.assert_close(slope, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", ["plain", "sdpa", "sliced"])
def test_hidden_keys_have_no_influence(kind):
    q, k, v = inputs()
    changed_k, changed_v = k.clone(), v.clone()
    changed_k[0, :, 3:], changed_v[0, :, 3:] = 50.0, -50.0
    before, after = attention(q, k, v, padding(), kind=kind), attention(q, changed_k, changed_v, padding(), kind=kind)
    assert torch.equal(before, after)


def test_a_mask_may_differ_for_every_query():
    q, k, v = inputs()
    mask = torch.ones(2, 3, 7, 5, dtype=torch.bool).tril(1)
    for kind in ("plain", "sliced", "sdpa"):
        torch.testing.assert_close(attention(q, k, v, mask, kind=kind), oracle(q, k, v, mask), rtol=1e-12, atol=1e-12)


def test_plain_in_bfloat16_is_as_exact_as_bfloat16():
    q, k, v = inputs(torch.bfloat16)
    exact = oracle(q.double(), k.double(), v.double())
    error = (attention(q, k, v, kind="plain").double() - exact).abs().max()
    assert error < 0.02 * exact.abs().max() + 0.01


@pytest.mark.parametrize(
    ("dtype", "length", "head", "grad", "plain"),
    [
        (torch.bfloat16, 64, 64, True, True),  # the small U-Nets' training step
        (torch.bfloat16, 16, 32, False, True),
        (torch.bfloat16, 1024, 16, True, False),
        (torch.bfloat16, 4096, 64, True, False),
        (torch.float32, 256, 64, True, False),
        (torch.float16, 64, 64, True, False),
    ],
)
def test_auto_takes_the_plain_path_where_it_was_measured_to_be_faster(dtype, length, head, grad, plain, monkeypatch):
    used = []
    monkeypatch.setattr(module, "_plain", lambda q, k, v, mask: used.append("plain") or q)
    monkeypatch.setattr(module.F, "scaled_dot_product_attention", lambda q, k, v, attn_mask: used.append("sdpa") or q)
    q = torch.zeros(1, 1, length, head, dtype=dtype, requires_grad=grad)
    attention(q, q, q)
    assert used == ["plain" if plain else "sdpa"]


def test_the_chosen_kernel_serves_calls_that_name_none(monkeypatch):
    monkeypatch.setattr(module, "_sliced", lambda q, k, v, mask: torch.full_like(q, 7))
    set_attention("sliced")
    assert get_attention() == "sliced"
    assert (attention(*inputs()) == 7).all()


def test_an_unknown_kernel_is_refused_by_name():
    with pytest.raises(UserError, match="'flash' is unknown; choose one of auto, sdpa, plain, xformers, sliced"):
        set_attention("flash")


def test_xformers_that_is_not_installed_is_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "xformers", None)
    monkeypatch.setitem(sys.modules, "xformers.ops", None)
    with pytest.raises(UserError, match="xformers cannot be imported"):
        set_attention("xformers")
    assert get_attention() == "auto"


def test_xformers_that_does_not_run_here_is_refused(monkeypatch):
    fake_xformers(monkeypatch)

    def refuse(*args, **kwargs):
        raise NotImplementedError("No operator found\nsecond line")

    sys.modules["xformers.ops"].memory_efficient_attention = refuse
    with pytest.raises(UserError, match=r"does not run on cpu \(No operator found\); choose sdpa"):
        set_attention("xformers")


def test_xformers_that_runs_is_taken(monkeypatch):
    seen = fake_xformers(monkeypatch)
    set_attention("xformers")
    attention(*inputs(), padding())
    assert len(seen) == 2 and seen[1] is not None
