"""Attention of the native step: every width and group, tiles read in place or copied, cache layouts, parts of heads.

Tiles have 32 positions. One is read where it lies if it is whole in one block, and copied otherwise; the sizes of
blocks below make both happen. Bounds as in test_step.py; a cache in bf16 rounds once more.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from mixtral.errors import UsageError
from mixtral.kernels.native import library as native
from mixtral.model import Mixtral
from tests.kernels.step_models import Cached, config, oracle, packed_model, tokens

pytestmark = pytest.mark.skipif(bool(native.available()), reason=f"no native step: {native.available()}")
TEXT = tokens(101)
CUTS = ((101,), (31, 1, 1, 1, 40, 27), (64, *[1] * 37), (3, 96, 1, 1))  # chunks that begin and end at edges of tiles


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    native.set_instruction_set(None)


def model(head_dim: int, queries: int, window: int | None = None, kv_heads: int = 2) -> Mixtral:
    """One dense layer: nothing is chosen, so that small differences stay small."""
    return packed_model(config(
        dim=32, n_layers=1, n_heads=kv_heads * queries, n_kv_heads=kv_heads, head_dim=head_dim, ffn_dim=32, n_experts=1,
        experts_per_token=1, sliding_window=window,
    ), "bf16")  # fmt: skip


def logits(cached: Cached, chunks: tuple[int, ...]) -> Tensor:
    rows, done = [], 0
    for n in chunks:
        found = cached.run({0: TEXT[done : done + n]}).logits_RV
        assert found is not None
        rows.append(found)
        done += n
    assert done == len(TEXT)
    return torch.cat(rows)


@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512"])
@pytest.mark.parametrize("window", [None, 33])
@pytest.mark.parametrize(("head_dim", "queries"), [(16, 8), (32, 4), (64, 2), (64, 3), (80, 4), (128, 1), (10, 5)])
def test_every_width_and_group(head_dim: int, queries: int, window: int | None, isa: str) -> None:
    try:
        native.set_instruction_set(isa)
    except UsageError as error:
        pytest.skip(str(error))
    mine = model(head_dim, queries, window)
    want = oracle(mine, [TEXT]).logits
    assert want is not None
    for dtype, bound in ((torch.float32, 0.03), (torch.bfloat16, 0.05)):
        for chunks in CUTS[1:3]:
            got = logits(Cached(mine, 1, size=128, dtype=dtype, by_head=True), chunks)
            assert (got - want).abs().max() <= bound * want.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("head_dim", "window"), [(32, None), (32, 40), (80, None), (128, 33)])
def test_bits_do_not_depend_on_chunks_blocks_or_layout(head_dim: int, window: int | None, dtype: torch.dtype) -> None:
    mine = model(head_dim, 3, window)
    want = logits(Cached(mine, 1, size=101, dtype=dtype), CUTS[0])
    for chunks in CUTS[1:]:
        for blocks, size, by_head in ((1, 101, True), (1, 128, False), (2, 64, True), (4, 32, False), (15, 7, True)):
            cached = Cached(mine, 1, blocks=blocks, size=size, dtype=dtype, by_head=by_head)
            assert torch.equal(logits(cached, chunks), want), (chunks, size, by_head)


def test_bits_do_not_depend_on_how_heads_are_parted() -> None:
    """One key/value head and seven queries: with more threads each takes some of them, down to one."""
    mine = model(32, 7, kv_heads=1)
    torch.set_num_threads(1)
    want = logits(Cached(mine, 1, size=128, dtype=torch.bfloat16), CUTS[2])
    for threads in (2, 5, 9):
        torch.set_num_threads(threads)
        assert torch.equal(logits(Cached(mine, 1, size=128, dtype=torch.bfloat16), CUTS[2]), want), threads


def test_what_a_row_does_not_see_does_not_reach_it() -> None:
    """Not a number in every slot outside the window changes no bit."""
    mine = model(32, 2, window=33)
    clean, spoilt = (Cached(mine, 1, size=128, dtype=torch.bfloat16) for _ in range(2))
    for cached in (clean, spoilt):
        cached.run({0: TEXT[:100]})
    spoilt.pool[:, :, :, : 101 - 33] = float("nan")
    assert torch.equal(spoilt.run({0: TEXT[100:]}).x_TD, clean.run({0: TEXT[100:]}).x_TD)
