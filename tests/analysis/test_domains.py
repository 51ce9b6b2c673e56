"""Information of domain and expert, and repetition, by cases computed by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from mixtral.analysis.domains import (
    Repeats,
    count_repeats,
    domain_counts,
    domain_entropy,
    mutual_information,
    token_information,
)
from mixtral.moe import Routing
from mixtral.moe.stats import any_choice_repeats, first_choice_repeats


def routing(experts: list[list[int]], n_experts: int) -> Routing:
    experts_TK = torch.tensor(experts)
    logits_TE = torch.zeros(len(experts), n_experts)
    return Routing(logits_TE, logits_TE, torch.ones_like(experts_TK).float(), experts_TK)


@pytest.mark.parametrize(
    ("counts", "bits"),
    [
        ([[5, 5], [5, 5]], 0.0),  # alike
        ([[2, 6], [1, 3]], 0.0),  # alike, in unequal amounts
        ([[7, 0], [0, 7]], 1.0),  # the expert tells the domain
        ([[4, 4, 0, 0], [0, 0, 4, 4]], 1.0),  # two experts each: still one bit
        ([[3, 1], [1, 3]], 2 * (3 / 8) * math.log2(1.5) + 2 * (1 / 8) * math.log2(0.5)),
        ([[0, 0], [0, 0]], 0.0),
    ],
)
def test_mutual_information(counts: list[list[int]], bits: float) -> None:
    assert mutual_information(torch.tensor(counts)) == pytest.approx(bits, abs=1e-12)


def test_domain_entropy() -> None:
    assert domain_entropy(torch.tensor([[1, 3], [2, 2]])) == pytest.approx(1.0)
    assert domain_entropy(torch.tensor([[3, 3], [1, 1]])) == pytest.approx(2 - 0.75 * math.log2(3))


def counted(cells: dict[tuple[int, int, int], int], shape: tuple[int, int, int]) -> Tensor:
    counts = torch.zeros(shape, dtype=torch.int64)
    for cell, count in cells.items():
        counts[cell] = count
    return counts


def test_a_router_by_the_token_alone_is_explained_by_it() -> None:
    """Token 0 goes to expert 0, token 1 to expert 1; domain 0 is three quarters token 0, domain 1 one quarter."""
    counts = counted({(0, 0, 0): 3, (0, 1, 1): 1, (1, 0, 0): 1, (1, 1, 1): 3}, (2, 2, 2))
    assert token_information(counts) == pytest.approx(mutual_information(counts.sum(1)))
    assert token_information(counts) > 0.1
    counts[0, 0, 0] = 9  # token 0 is now the more frequent one
    assert token_information(counts) == pytest.approx(mutual_information(counts.sum(1)))


def test_a_router_by_the_domain_alone_is_not() -> None:
    """One token in both domains, sent to another expert in each."""
    counts = counted({(0, 0, 0): 4, (1, 0, 1): 4}, (2, 2, 2))
    assert mutual_information(counts.sum(1)) == pytest.approx(1.0)
    assert token_information(counts) == pytest.approx(0.0, abs=1e-12)


def test_counts_by_domain() -> None:
    taken = routing([[0, 2], [2, -1], [1, 0], [1, 2]], n_experts=3)
    domains_T = torch.tensor([0, 1, 1, -1])
    counts = domain_counts(taken, torch.tensor([1, 1, 0, 1]), domains_T, n_domains=2, vocab_size=2)
    wanted = [(0, 1, 0), (0, 1, 2), (1, 1, 2), (1, 0, 0), (1, 0, 1)]  # (domain, token, expert)
    assert torch.equal(counts, counted(dict.fromkeys(wanted, 1), (2, 2, 3)))


def test_repeats_by_hand() -> None:
    taken = routing([[0, 1], [0, 2], [1, 0], [1, -1], [-1, -1], [-1, -1]], n_experts=3)
    # pairs: same first; 0 in common; sequence ends; none in common as one takes nothing; both take nothing
    found = count_repeats(taken, torch.tensor([0, 3, 6], dtype=torch.int32))
    assert found == Repeats(pairs=4, first=1, any=2)
    assert (found.first_share, found.any_share) == (0.25, 0.5)
    assert found.plus(found) == Repeats(8, 2, 4)
    assert Repeats().first_share == 0


def test_repeats_are_those_that_training_logs() -> None:
    generator = torch.Generator().manual_seed(0)
    experts_TK = torch.rand(40, 8, generator=generator).topk(2).indices
    taken, cu_seqlens = routing(experts_TK.tolist(), 8), torch.tensor([0, 11, 12, 40], dtype=torch.int32)
    found = count_repeats(taken, cu_seqlens)
    assert found.first_share == pytest.approx(first_choice_repeats(taken, cu_seqlens))
    assert found.any_share == pytest.approx(any_choice_repeats(taken, cu_seqlens))
