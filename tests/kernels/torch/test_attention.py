from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mixtral.kernels import reference
from mixtral.kernels.torch import attention as sdpa
from tests.kernels.compare import compare

LENGTHS = [[1], [5], [4, 4, 4], [3, 1, 8], [0, 3], [3, 0, 0, 2], [0]]


def _ends(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)


def _qkv(tokens: int, heads: int, groups: int, width: int) -> list[Tensor]:
    return [torch.randn(tokens, n, width) for n in (heads, groups, groups)]


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("window", [None, 1, 3, 100])
@pytest.mark.parametrize("heads, groups", [(1, 1), (6, 2)])
def test_attention(lengths: list[int], window: int | None, heads: int, groups: int, dtype: torch.dtype) -> None:
    ends = _ends(lengths)
    compare(
        lambda q, k, v: sdpa.attention(q, k, v, ends, window),
        lambda q, k, v: reference.attention(q, k, v, ends, window),
        _qkv(sum(lengths), heads, groups, 6),
        dtype,
    )


@pytest.mark.parametrize("window", [None, 3])
def test_numerical_gradients(window: int | None) -> None:
    qkv = [t.double().requires_grad_() for t in _qkv(5, 2, 1, 2)]
    assert torch.autograd.gradcheck(lambda q, k, v: sdpa.attention(q, k, v, _ends([5]), window), qkv)


@pytest.mark.parametrize("attention", [reference.attention, sdpa.attention])
@pytest.mark.parametrize("window", [1, 3])
def test_a_token_sees_the_window_and_nothing_else(attention: object, window: int) -> None:
    """By the gradient: token 6 of the second sequence reads positions 6 - window + 1 .. 6 of that sequence alone."""
    q, k, v = _qkv(12, 2, 1, 4)
    v.requires_grad_()
    out = attention(q, k, v, _ends([4, 8]), window)  # type: ignore[operator]
    (grad,) = torch.autograd.grad(out[4 + 6].sum(), v)
    seen = grad.abs().sum((1, 2)).nonzero().flatten().tolist()
    assert seen == list(range(4 + 6 - window + 1, 4 + 6 + 1))


@pytest.mark.parametrize("window", [None, 2, 4])
@pytest.mark.parametrize("heads, groups", [(1, 1), (4, 2)])
def test_cached_attention(window: int | None, heads: int, groups: int, dtype: torch.dtype) -> None:
    """Ragged: a sequence that begins, one that goes on with one token, one with three; the last's keys in any order."""
    new, cached = [3, 1, 3], [0, 6, 4]
    q = torch.randn(sum(new), heads, 6)
    positions = torch.cat([torch.arange(c, c + n) for n, c in zip(new, cached, strict=True)])
    orders = [torch.arange(3), torch.arange(7), torch.randperm(7)]
    keys, values = ([torch.randn(len(o), groups, 6) for o in orders] for _ in range(2))

    def call(function: object) -> object:
        def with_cache(q: Tensor, *kv: Tensor) -> Tensor:
            entries = list(zip(kv[:3], kv[3:], orders, strict=True))
            return function(q, positions, _ends(new), entries, window)  # type: ignore[operator]

        return with_cache

    compare(call(sdpa.cached_attention), call(reference.cached_attention), [q, *keys, *values], dtype)  # type: ignore[arg-type]


@pytest.mark.parametrize("attention", [reference.attention, sdpa.attention])
def test_attention_of_no_sequences(attention: object) -> None:
    q, k, v = _qkv(0, 4, 2, 6)
    assert attention(q, k, v, _ends([]), None).shape == q.shape  # type: ignore[operator]


@pytest.mark.parametrize("function", [reference.cached_attention, sdpa.cached_attention])
def test_cached_attention_of_nothing(function: object) -> None:
    q = torch.randn(0, 2, 4)
    out = function(q, torch.empty(0, dtype=torch.int64), _ends([]), [], None)  # type: ignore[operator]
    assert out.shape == q.shape


@pytest.mark.parametrize("window", [None, 3])
def test_cached_equals_uncached_with_everything_in_the_cache(window: int | None) -> None:
    q, k, v = _qkv(8, 4, 2, 6)
    whole = sdpa.attention(q, k, v, _ends([8]), window)
    at = torch.arange(8)
    last = sdpa.cached_attention(q[5:], at[5:], _ends([3]), [(k, v, at)], window)
    torch.testing.assert_close(last, whole[5:], rtol=1e-5, atol=1e-6)
