"""Rules that move biases and thresholds, by hand and against exact quantiles."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mixtral.moe import Routing
from mixtral.moe.bias_updates import BINS, Histogram, centred, loss_free, margins, smebu
from mixtral.moe.choice import counts_of
from mixtral.moe.losses import share_of


def test_loss_free_by_hand() -> None:
    """Loads 5, 1, 2, 0 of mean 2: signs -1, 1, 0, 1, of mean 0.25."""
    bias = loss_free(torch.tensor([0.1, -0.1, 0.0, 0.0]), torch.tensor([5, 1, 2, 0]), rate=0.01)
    torch.testing.assert_close(bias, torch.tensor([0.0875, -0.0925, -0.0025, 0.0075]))


def test_loss_free_at_balance_stays() -> None:
    bias = torch.tensor([0.5, -0.5])
    torch.testing.assert_close(loss_free(bias, torch.tensor([7, 7]), 0.1), bias)


def test_smebu_by_hand() -> None:
    """Loads 3, 1: violations -0.5, 0.5; the clamp tanh(2 * 0.5) = tanh(1), antisymmetric, so centred already."""
    step = 0.01 * torch.tensor([-1.0, 1.0]) * torch.tanh(torch.tensor(1.0))
    momentum = torch.tensor([0.02, -0.02])
    bias, after = smebu(torch.tensor([0.3, -0.3]), momentum, torch.tensor([3, 1]), rate=0.01, scale=2.0, decay=0.75)
    torch.testing.assert_close(after, 0.75 * momentum + 0.25 * step)
    torch.testing.assert_close(bias, torch.tensor([0.3, -0.3]) + after)


def test_smebu_steps_are_clamped_and_shrink_near_balance() -> None:
    zero = torch.zeros(4)
    far, _ = smebu(zero, zero, torch.tensor([1000, 0, 0, 0]), rate=1.0, scale=2.0, decay=0.0)
    near, _ = smebu(zero, zero, torch.tensor([101, 100, 100, 99]), rate=1.0, scale=2.0, decay=0.0)
    assert 1 < float(far.max() - far.min()) <= 2 and float(near.abs().max()) < 0.03


@pytest.mark.parametrize("counts", [[0, 0, 0, 9], [4, 4, 4, 4], [1, 2, 3, 4], [0, 0, 0, 0]])
def test_biases_have_zero_mean(counts: list[int]) -> None:
    start, counts_E = torch.tensor([3.0, 1.0, 0.0, 0.0]), torch.tensor(counts)
    moved, momentum = smebu(start, torch.zeros(4), counts_E, 0.1, 2.0, 0.5)
    for values in (loss_free(start, counts_E, 0.1), moved, momentum):
        assert abs(float(values.mean())) < 1e-6 and values.isfinite().all()


def scores_of(tokens: int, n_experts: int, seed: int = 0) -> Tensor:
    logits = torch.randn(tokens, n_experts, generator=torch.Generator().manual_seed(seed))
    return (logits * 2 + torch.linspace(0, 3, n_experts)).softmax(-1)


def made(scores_TE: Tensor, k: int, bias_E: Tensor) -> Routing:
    experts_TK = (scores_TE + bias_E).topk(k).indices
    return Routing(scores_TE.log(), scores_TE, scores_TE.gather(1, experts_TK), experts_TK, experts_TK)


def test_margins_by_hand() -> None:
    """Scores + bias: 0.5, 0.4, 0.1; for one expert a token the bar is the second, 0.4."""
    scores, bias = torch.tensor([[0.5, 0.3, 0.2]]), torch.tensor([0.0, 0.1, -0.1])
    torch.testing.assert_close(margins(made(scores, 1, bias), bias, 1), torch.tensor([[-0.1, 0.1, 0.2]]))


@pytest.mark.parametrize("q", [0.1, 0.25, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("scale", [1e-4, 1.0, 10.0])
def test_quantiles_are_exact_within_a_bin(q: float, scale: float) -> None:
    torch.manual_seed(0)
    values_TE = torch.randn(777, 3) * scale + torch.tensor([0.0, 0.5, -2.0]) * scale
    histogram = Histogram(torch.tensor([0.0, 0.4, -2.5]) * scale)
    for part in values_TE.split(100):
        histogram.add(part)
    assert int(histogram.counts_EB.sum()) == 777 * 3
    edges = histogram.edges()
    for e, found in enumerate(histogram.quantile(q).tolist()):
        exact = values_TE[:, e].quantile(q, interpolation="lower").item()
        place = int(torch.searchsorted(edges[e], exact)) - 1
        # The neighbour too: at q * T between two values any number between them is a quantile, and they may be far.
        higher = values_TE[:, e].quantile(q, interpolation="higher").item()
        after = int(torch.searchsorted(edges[e], higher)) + 1
        assert float(edges[e, max(0, place)]) <= found <= float(edges[e, min(after, BINS)])


def test_bins_are_finest_at_the_centre() -> None:
    edges = Histogram(torch.tensor([0.0])).edges()[0]
    widths = edges.diff()
    assert float(widths.min()) < 3e-6 and widths.argmin() in (BINS // 2, BINS // 2 - 1)
    far = edges[BINS // 2 + 200]
    assert float(widths[BINS // 2 + 200] / far) < 0.03


@pytest.mark.parametrize("value", [-0.2, 0.05, 0.5, 1.5])
def test_quantiles_are_linear_inside_the_bin_of_the_values(value: float) -> None:
    """Four equal values: a quarter of them lies below a quarter of the width of the bin around them."""
    histogram = Histogram(torch.zeros(1))
    histogram.add(torch.full((4, 1), value))
    edges, bin = histogram.edges()[0], int(histogram.counts_EB.argmax())
    assert edges[bin] <= value <= edges[bin + 1]
    for q in (0.25, 0.5, 1.0):
        torch.testing.assert_close(histogram.quantile(q)[0], edges[bin].lerp(edges[bin + 1], q))


def test_values_out_of_reach_count_at_the_ends() -> None:
    histogram = Histogram(torch.zeros(1))
    histogram.add(torch.tensor([[-1e9], [1e9], [0.0]]))
    assert histogram.counts_EB[0, 0] == histogram.counts_EB[0, -1] == 1


@pytest.mark.parametrize("n_experts, k", [(8, 2), (4, 1), (16, 4)])
def test_the_quantile_rule_balances_in_a_few_steps(n_experts: int, k: int) -> None:
    scores = scores_of(2000, n_experts)
    bias, loads = torch.zeros(n_experts), []
    for _ in range(12):
        routing = made(scores, k, bias)
        loads.append(float(share_of(counts_of(routing.chosen_TK, n_experts)).max()) * n_experts)
        histogram = Histogram(bias)
        histogram.add(margins(routing, bias, k))
        bias = centred(histogram.quantile(k / n_experts))
        exact = centred(margins(routing, histogram.centre_E, k).quantile(k / n_experts, dim=0))
        torch.testing.assert_close(bias, exact, atol=2e-2, rtol=0.05)
    assert loads[0] > 1.4 and loads[-1] < 1.1
