from __future__ import annotations

from collections.abc import Callable

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


NEW, LENGTHS_SO_FAR = [3, 1, 3, 0], [3, 7, 7, 2]


def _paged(size: int, in_a_row: bool, groups: int = 2) -> tuple[Tensor, Tensor]:
    """A pool of blocks of `size`, not a number where nobody may look, and the tables of four sequences."""
    most = -(-7 // size)
    order = torch.arange(4 * most) if in_a_row else torch.randperm(4 * most)
    tables = order.view(4, most)
    pool = torch.full((2, groups, 4 * most * size, 6), float("nan"))
    for table, length in zip(tables, LENGTHS_SO_FAR, strict=True):
        for position in range(length):
            slot = table[position // size] * size + position % size
            pool[:, :, slot] = torch.randn(2, groups, 6)
    return pool, tables


@pytest.mark.parametrize("window", [None, 2, 4])
@pytest.mark.parametrize("heads, groups", [(2, 1), (4, 2)])
@pytest.mark.parametrize(("size", "in_a_row"), [(3, True), (3, False), (8, True), (1, False)])
def test_paged_attention(
    window: int | None, heads: int, groups: int, size: int, in_a_row: bool, dtype: torch.dtype
) -> None:
    """Ragged: a sequence that begins, one that goes on with one token, one with three, one with none."""
    pool, tables = _paged(size, in_a_row, groups)
    lengths = torch.tensor(LENGTHS_SO_FAR)
    if window is not None:  # blocks out of every row's window are gone
        for table, length, n in zip(tables, LENGTHS_SO_FAR, NEW, strict=True):
            table[: max(0, length - n - window + 1) // size] = -1
    positions = torch.cat([torch.arange(c - n, c) for n, c in zip(NEW, LENGTHS_SO_FAR, strict=True)])

    def call(function: Callable[..., Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda q: function(q, pool.to(dtype), positions, _ends(NEW), tables, lengths, size, window)

    compare(call(sdpa.paged_attention), call(reference.paged_attention), [torch.randn(sum(NEW), heads, 6)], dtype)


@pytest.mark.parametrize("function", [reference.write_kv, sdpa.write_kv])
@pytest.mark.parametrize("pool_dtype", [torch.float32, torch.bfloat16])
def test_write_kv(function: Callable[..., None], pool_dtype: torch.dtype) -> None:
    pool, k, v = torch.zeros(2, 2, 9, 6, dtype=pool_dtype), torch.randn(3, 2, 6), torch.randn(3, 2, 6)
    slots = torch.tensor([7, 0, 4])
    function(pool, k, v, slots)
    assert torch.equal(pool[0, :, slots].transpose(0, 1), k.to(pool_dtype))
    assert torch.equal(pool[1, :, slots].transpose(0, 1), v.to(pool_dtype))
    assert not pool[:, :, [1, 2, 3, 5, 6, 8]].any()
    function(pool, k[:0], v[:0], slots[:0])


@pytest.mark.parametrize("attention", [reference.attention, sdpa.attention])
def test_attention_of_no_sequences(attention: object) -> None:
    q, k, v = _qkv(0, 4, 2, 6)
    assert attention(q, k, v, _ends([]), None).shape == q.shape  # type: ignore[operator]


@pytest.mark.parametrize("function", [reference.paged_attention, sdpa.paged_attention])
def test_paged_attention_of_nothing(function: Callable[..., Tensor]) -> None:
    q, none = torch.randn(0, 2, 4), torch.empty(0, dtype=torch.int64)
    out = function(q, torch.zeros(2, 1, 0, 4), none, _ends([]), none.view(0, 0), none, 8, None)
    assert out.shape == q.shape


@pytest.mark.parametrize("window", [None, 3])
def test_paged_equals_uncached_with_everything_in_the_cache(window: int | None) -> None:
    q, k, v = _qkv(8, 4, 2, 6)
    whole = sdpa.attention(q, k, v, _ends([8]), window)
    pool, at = torch.zeros(2, 2, 12, 6), torch.arange(8)
    sdpa.write_kv(pool, k, v, at + 4)
    last = sdpa.paged_attention(
        q[5:], pool, at[5:], _ends([3]), torch.tensor([[1, 2]]), torch.tensor([8]), 4, window
    )  # fmt: skip
    torch.testing.assert_close(last, whole[5:], rtol=1e-5, atol=1e-6)
