from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from mixtral.moe import Routing
from mixtral.moe.choice import counts_of
from mixtral.moe.losses import (
    guidance,
    k_price,
    load_balance,
    load_balance_hf,
    score_shares,
    share_of,
    z_loss,
)
from tests.moe.naive import routing


def _random(tokens: int = 50, n_experts: int = 8, k: int = 2) -> Routing:
    torch.manual_seed(tokens)
    logits = (torch.randn(tokens, n_experts) * 2).requires_grad_()
    return _top(logits, k)


def _top(logits: Tensor, k: int) -> Routing:
    weights, experts = logits.softmax(-1).topk(k)
    return Routing(logits, logits.softmax(-1), weights, experts, experts)


def _balanced(n_experts: int, k: int) -> list[list[int]]:
    return [[(t + i) % n_experts for i in range(k)] for t in range(n_experts)]


@pytest.mark.parametrize("n_experts, k", [(4, 1), (8, 2), (5, 3), (7, 7), (64, 6)])
def test_one_at_balance_whatever_the_sizes(n_experts: int, k: int) -> None:
    assert load_balance(routing(_balanced(n_experts, k), n_experts=n_experts)).item() == pytest.approx(1.0)


@pytest.mark.parametrize("n_experts, k", [(4, 1), (8, 2), (5, 3), (7, 7)])
def test_experts_over_k_at_collapse(n_experts: int, k: int) -> None:
    collapsed = routing([list(range(k))] * 10, n_experts=n_experts)
    assert load_balance(collapsed).item() == pytest.approx(n_experts / k)


def test_uneven_by_hand() -> None:
    """Three tokens, three experts, two each: f = (3, 2, 1) / 6, p = (0.5, 0.3, 0.2)."""
    scores = torch.tensor([[0.6, 0.3, 0.1], [0.5, 0.4, 0.1], [0.4, 0.2, 0.4]])
    uneven = routing([[0, 1], [0, 1], [0, 2]], scores, 3)
    torch.testing.assert_close(share_of(counts_of(uneven.chosen_TK, 3)), torch.tensor([3.0, 2.0, 1.0]) / 6)
    assert load_balance(uneven).item() == pytest.approx(3 * (0.5 * 3 + 0.3 * 2 + 0.2 * 1) / 6)


def test_gradients_by_hand() -> None:
    """d/dscore[t, e] = E f_e / T; through softmax: score[t, e] * (that - its mean under the token's scores)."""
    made = _random(tokens=6, n_experts=4)
    by_score, by_logit = torch.autograd.grad(load_balance(made), [made.scores_TE, made.logits_TE])
    share = torch.bincount(made.experts_TK.flatten(), minlength=4) / 12
    torch.testing.assert_close(by_score, (4 * share / 6).expand(6, 4))
    slope = 4 * share / 6
    scores = made.scores_TE.detach()
    torch.testing.assert_close(by_logit, scores * (slope - (scores @ slope)[:, None]))


def test_descending_it_moves_probability_off_the_busy_experts() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]] * 8, requires_grad=True)
    made = _top(logits, 2)
    (grad,) = torch.autograd.grad(load_balance(made), logits)
    assert (grad[:, :2].sum(-1) > 0).all() and (grad[:, 2:] < 0).all()


def test_unused_slots_do_not_count() -> None:
    assert counts_of(torch.tensor([[0, 1], [2, -1], [-1, -1]]), 4).tolist() == [1, 1, 1, 0]
    assert counts_of(torch.empty(0, 2, dtype=torch.int64), 3).tolist() == [0, 0, 0]
    assert share_of(torch.tensor([2, 1, 1, 0])).tolist() == [0.5, 0.25, 0.25, 0.0]
    assert share_of(torch.tensor([0, 0])).tolist() == [0, 0]


def test_losses_count_what_was_chosen_and_not_what_a_capacity_left() -> None:
    """Three tokens chose expert 0, of which two were dropped: f = (3, 1) / 4, p = (0.8, 0.2)."""
    chosen_TK = torch.tensor([[0], [0], [0], [1]])
    made = routing([[0], [-1], [-1], [1]], torch.tensor([[0.8, 0.2]] * 4), 2)._replace(chosen_TK=chosen_TK)
    assert load_balance(made).item() == load_balance_hf([made]).item() == pytest.approx(2 * (0.75 * 0.8 + 0.25 * 0.2))
    three = torch.tensor([True, True, True, False])
    assert load_balance(made, three).item() == load_balance_hf([made], three).item() == pytest.approx(2 * 0.8)


def test_each_layer_collapsed_on_experts_of_its_own_is_seen_per_layer_alone() -> None:
    """transformers 28255, 31464: pooled over layers, such a model has exactly the value of a balanced one."""
    layers = [routing([[2 * layer, 2 * layer + 1]] * 16, n_experts=8) for layer in range(4)]
    assert [load_balance(layer).item() for layer in layers] == pytest.approx([4.0] * 4)
    assert load_balance_hf(layers).item() == pytest.approx(2.0)
    same = [routing([[0, 1]] * 16, n_experts=8)] * 4
    assert load_balance_hf(same).item() == pytest.approx(8.0)
    balanced = [routing(_balanced(8, 2), n_experts=8)] * 4
    assert load_balance_hf(balanced).item() == pytest.approx(2.0)


@pytest.mark.parametrize("n_experts, k", [(8, 2), (5, 3), (4, 1)])
def test_hf_form_equals_transformers(n_experts: int, k: int) -> None:
    layers = [_shifted(_random(24, n_experts, k), i, k) for i in range(3)]
    logits = tuple(layer.logits_TE for layer in layers)
    want = load_balancing_loss_func(logits, n_experts, k)
    torch.testing.assert_close(load_balance_hf(layers), want)
    mask = (torch.arange(24).view(2, 12) % 12) < torch.tensor([[12], [7]])
    want = load_balancing_loss_func(logits, n_experts, k, attention_mask=mask.long())
    got = load_balance_hf(layers, mask.flatten())
    torch.testing.assert_close(got, want)
    got_grads, want_grads = torch.autograd.grad(got, logits), torch.autograd.grad(want, logits)
    for got_grad, want_grad in zip(got_grads, want_grads, strict=True):
        torch.testing.assert_close(got_grad, want_grad)


def _shifted(made: Routing, by: int, k: int) -> Routing:
    logits = (made.logits_TE.detach() + by * torch.linspace(-1, 1, made.logits_TE.shape[1])).requires_grad_()
    return _top(logits, k)


def _padded(made: Routing, at: Tensor) -> tuple[Routing, Tensor]:
    """`made` spread over the places of mask `at`, with rubbish tokens, all on expert 0, between."""
    parts = []
    for value in made[:5]:
        wide = torch.zeros(len(at), value.shape[1], dtype=value.dtype)
        wide[:, 0] = 9
        wide[at] = value.detach()
        parts.append(wide)
    parts[3][~at] = parts[4][~at] = 0
    return Routing(*parts), at


def test_padding_changes_no_value() -> None:
    """transformers 28505, 29363."""
    made = _random(30)
    padded, mask = _padded(made, torch.arange(50) % 5 < 3)
    for loss in (load_balance, z_loss, lambda r, m=None: load_balance_hf([r, r], m)):
        torch.testing.assert_close(loss(padded, mask), loss(made).detach())
        assert not torch.isclose(loss(padded), loss(made))  # the rubbish would have shown


@pytest.mark.parametrize("mask", [None, torch.zeros(3, dtype=torch.bool)])
def test_nothing_that_counts_is_zero_not_nan(mask: Tensor | None) -> None:
    made = _random(3)
    if mask is None:
        made = made.tokens(0, 0)
    for loss in (load_balance, z_loss, lambda r, m: load_balance_hf([r, r], m)):
        assert loss(made, mask).item() == 0.0


def test_z_loss_by_hand() -> None:
    logits = torch.tensor([[0.0, 0.0], [1.0, 1.0 + torch.tensor(3.0).log()]], requires_grad=True)
    value = z_loss(_top(logits, 1))
    first, second = torch.tensor(2.0).log(), 1 + torch.tensor(4.0).log()
    torch.testing.assert_close(value, (first**2 + second**2) / 2)
    (grad,) = torch.autograd.grad(value, logits)
    want = torch.stack((first * torch.tensor([0.5, 0.5]), second * torch.tensor([0.25, 0.75])))
    torch.testing.assert_close(grad, want)  # 2 / T * logsumexp * softmax


# -- counts of a larger batch, other scores, domains, a price ----------------------------------------------------------


def test_with_given_counts_by_hand() -> None:
    """f = (1, 1, 4) / 6 whatever this part chose, p = (0.5, 0.3, 0.2)."""
    scores = torch.tensor([[0.6, 0.3, 0.1], [0.4, 0.3, 0.3]])
    part = routing([[0, 1], [0, 1]], scores, 3)
    found = load_balance(part, counts_E=torch.tensor([1, 1, 4]))
    assert found.item() == pytest.approx(3 * (0.5 + 0.3 + 4 * 0.2) / 6)


@pytest.mark.parametrize("cut", [1, 10, 25])
def test_parts_with_the_counts_of_all_are_the_whole(cut: int) -> None:
    whole = _random(50)
    counts = torch.bincount(whole.experts_TK.flatten(), minlength=8)
    parts = [Routing(*(t[a:b] for t in whole[:5])) for a, b in ((0, cut), (cut, 50))]
    total = sum(load_balance(part, counts_E=counts) * len(part.scores_TE) / 50 for part in parts)
    assert isinstance(total, Tensor)
    torch.testing.assert_close(total, load_balance(whole), atol=1e-6, rtol=0)
    grads = [torch.autograd.grad(loss, whole.logits_TE, retain_graph=True)[0] for loss in (total, load_balance(whole))]
    torch.testing.assert_close(*grads, atol=1e-7, rtol=1e-6)


def test_sigmoid_scores_count_as_shares() -> None:
    """Scores 0.9, 0.3 and 0.2, 0.6: shares 3/4, 1/4 and 1/4, 3/4; and scaling a token's scores changes nothing."""
    scores = torch.tensor([[0.9, 0.3], [0.2, 0.6]], requires_grad=True)
    torch.testing.assert_close(score_shares(scores), torch.tensor([[0.75, 0.25], [0.25, 0.75]]))
    uneven = Routing(scores, scores, scores, *[torch.tensor([[0], [0]])] * 2)
    assert load_balance(uneven).item() == pytest.approx(2 * 0.5)
    (grad,) = torch.autograd.grad(load_balance(uneven), scores)
    torch.testing.assert_close((grad * scores).sum(-1), torch.zeros(2))
    torch.testing.assert_close(score_shares(torch.tensor([[0.6, 0.42]])), torch.tensor([[0.6, 0.42]]) / 1.02)


def test_softmax_scores_are_their_own_shares_to_the_bit() -> None:
    made = _random(200, 64)
    assert torch.equal(score_shares(made.scores_TE), made.scores_TE)
    weights = torch.randn(200, 64)
    for function in (score_shares, lambda scores: scores):
        grads = torch.autograd.grad((function(made.scores_TE) * weights).sum(), made.logits_TE, retain_graph=True)
        assert torch.equal(grads[0], torch.autograd.grad((made.scores_TE * weights).sum(), made.logits_TE,
                                                         retain_graph=True)[0])  # fmt: skip


GROUPS = torch.tensor([[True, True, False, False], [False, False, True, True]])


def test_guidance_by_hand() -> None:
    """Masses 0.7 and 0.25 on the right groups; the third token's domain is unknown."""
    scores = torch.tensor([[0.4, 0.3, 0.2, 0.1], [0.5, 0.25, 0.125, 0.125], [0.1, 0.2, 0.3, 0.4]])
    made = routing([[0], [0], [3]], scores)
    found = guidance(made, torch.tensor([0, 1, -1]), GROUPS)
    assert found.item() == pytest.approx(-(math.log(0.7) + math.log(0.25)) / 2)
    assert guidance(made, torch.tensor([-1, -1, -1]), GROUPS).item() == 0.0
    uniform = routing([[0]], torch.full((1, 4), 0.25))
    assert guidance(uniform, torch.tensor([1]), GROUPS).item() == pytest.approx(math.log(2))
    sigmoid = routing([[0]], torch.tensor([[0.8, 0.4, 0.3, 0.1]]))
    assert guidance(sigmoid, torch.tensor([0]), GROUPS).item() == pytest.approx(-math.log(1.2 / 1.6))


def test_guidance_gradient_is_that_of_a_cross_entropy() -> None:
    """d/dlogit = (p_j - p_j / mass inside the group) / known tokens; 0 for tokens of unknown domain."""
    made = _random(12, 4)
    domains = torch.tensor([0, 1, -1] * 4)
    (grad,) = torch.autograd.grad(guidance(made, domains, GROUPS), made.logits_TE)
    want = torch.zeros(12, 4)
    for t, domain in enumerate(domains.tolist()):
        p = made.scores_TE[t].detach()
        if domain >= 0:
            want[t] = (p - p * GROUPS[domain] / p[GROUPS[domain]].sum()) / 8
    torch.testing.assert_close(grad, want)


def test_k_price_by_hand() -> None:
    k_T = torch.tensor([1.0, 2.5, 4.0], requires_grad=True)
    assert k_price(k_T).item() == 2.5
    torch.testing.assert_close(torch.autograd.grad(k_price(k_T), k_T)[0], torch.full((3,), 1 / 3))
    assert k_price(k_T, target=2.0).item() == pytest.approx(0.25)
    torch.testing.assert_close(torch.autograd.grad(k_price(k_T, 2.0), k_T)[0], torch.full((3,), 2 * 0.5 / 3))
    assert k_price(k_T[:0]).item() == 0.0
