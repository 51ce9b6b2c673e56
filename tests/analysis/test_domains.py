"""Information of domain and expert, by cases computed by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from mixtral.analysis.domains import (
    domain_counts,
    domain_entropy,
    mutual_information,
    token_information,
)
from mixtral.moe import Routing


def routing(experts: list[list[int]], n_experts: int) -> Routing:
    experts_TK = torch.tensor(experts)
    logits_TE = torch.zeros(len(experts), n_experts)
    return Routing(logits_TE, logits_TE, torch.ones_like(experts_TK).float(), experts_TK, experts_TK)


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
