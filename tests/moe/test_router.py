from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from mixtral.errors import UsageError
from mixtral.moe import TopKRouter
from mixtral.moe.choice import choose_experts
from tests.moe import naive_routers
from tests.moe.naive import routing_of


def _router(n_experts: int = 8, k: int = 2, dim: int = 6) -> TopKRouter:
    torch.manual_seed(0)
    router = TopKRouter(dim, n_experts, k)
    torch.nn.init.normal_(router.weight)
    return router


@pytest.mark.parametrize("n_experts, k", [(1, 1), (4, 1), (5, 3), (8, 2), (8, 8)])
def test_equals_a_loop_over_tokens(n_experts: int, k: int) -> None:
    router, x = _router(n_experts, k), torch.randn(40, 6)
    routing = router(x)
    weights, experts = routing_of(routing.logits_TE, k)
    assert torch.equal(routing.experts_TK, experts)
    torch.testing.assert_close(routing.weights_TK, weights)
    torch.testing.assert_close(routing.logits_TE, x @ router.weight.T)
    torch.testing.assert_close(routing.scores_TE, (x @ router.weight.T).softmax(-1))
    torch.testing.assert_close(routing.weights_TK.sum(-1), torch.ones(40))


def test_softmax_over_the_chosen_equals_softmax_over_all_renormalised() -> None:
    routing = _router()(torch.randn(40, 6))
    top = routing.scores_TE.topk(2).values
    torch.testing.assert_close(routing.weights_TK, top / top.sum(-1, keepdim=True))


def test_ties_go_to_the_lower_index() -> None:
    logits = torch.tensor([[1.0, 3.0, 3.0, 3.0], [2.0, 2.0, 2.0, 2.0], [0.0, -0.0, 5.0, 0.0]])
    assert choose_experts(logits, 3).tolist() == [[1, 2, 3], [0, 1, 2], [2, 0, 1]]
    assert choose_experts(torch.zeros(2, 64), 64).tolist() == [list(range(64))] * 2  # topk leaves this order open


def test_no_tokens() -> None:
    routing = _router()(torch.empty(0, 6))
    assert routing.experts_TK.shape == routing.weights_TK.shape == (0, 2)


def test_is_fp32_whatever_the_input() -> None:
    """Two logits that bf16 cannot tell apart are told apart."""
    router = TopKRouter(2, 2, 1).bfloat16()
    with torch.no_grad():
        router.weight.copy_(torch.tensor([[1.0, 0.0], [1.0, 2**-12]]))
    routing = router(torch.tensor([[256.0, 1.0]], dtype=torch.bfloat16))
    assert routing.experts_TK.tolist() == [[1]]
    assert {routing.logits_TE.dtype, routing.scores_TE.dtype, routing.weights_TK.dtype} == {torch.float32}


def test_weights_of_extreme_logits_are_finite_and_sum_to_one() -> None:
    router = _router()
    routing = router(torch.randn(10, 6) * 1e4)
    torch.testing.assert_close(routing.weights_TK.sum(-1), torch.ones(10))


def test_replaying_the_same_choice_changes_nothing() -> None:
    router, x = _router(), torch.randn(20, 6)
    first = router(x)
    again = router(x, replay=first.experts_TK)
    assert all(torch.equal(a, b) for a, b in zip(first[:4], again[:4], strict=True))
    cotangent = torch.randn(20, 2)
    grads = [torch.autograd.grad(r.weights_TK, router.weight, cotangent)[0] for r in (first, again)]
    assert torch.equal(*grads) and grads[0].abs().sum() > 0


def test_replaying_another_choice_takes_it_and_lets_the_gradient_flow() -> None:
    router, x = _router(), torch.randn(3, 6, requires_grad=True)
    choice = torch.tensor([[7, 0], [3, -1], [-1, -1]])
    routing = router(x, replay=choice)
    assert torch.equal(routing.experts_TK, choice)
    logits = (x @ router.weight.T)[0, [7, 0]]
    torch.testing.assert_close(routing.weights_TK[0], logits.softmax(-1))
    assert routing.weights_TK[1:].tolist() == [[1.0, 0.0], [0.0, 0.0]]
    routing.weights_TK[:, 0].sum().backward()
    assert x.grad.isfinite().all() and x.grad[0].abs().sum() > 0 and not x.grad[1:].any()


@pytest.mark.parametrize("k", [1, 5, 8])
def test_k_for_all_tokens(k: int) -> None:
    router, x = _router(), torch.randn(9, 6)
    want, got = _router(k=k)(x), router(x, k=k)
    assert all(torch.equal(a, b) for a, b in zip(want[:4], got[:4], strict=True))


def test_k_for_each_token() -> None:
    router, x = _router(), torch.randn(4, 6)
    routing = router(x, k=torch.tensor([0, 1, 3, 2]))
    assert ((routing.experts_TK >= 0).sum(-1)).tolist() == [0, 1, 3, 2]
    assert routing.experts_TK.shape == (4, 3)
    for t, k in ((1, 1), (2, 3), (3, 2)):
        alone = router(x[t : t + 1], k=k)
        assert torch.equal(routing.experts_TK[t, :k], alone.experts_TK[0])
        torch.testing.assert_close(routing.weights_TK[t, :k], alone.weights_TK[0])
    assert not routing.weights_TK[0].any() and not routing.weights_TK[1, 1:].any()


@pytest.mark.parametrize("k", [[0, 0], [8, 1], []])
def test_k_for_each_token_at_its_ends(k: list[int]) -> None:
    """None for anyone, all there are, no tokens: one slot at least, as many as experts at most."""
    routing = _router()(torch.randn(len(k), 6), k=torch.tensor(k, dtype=torch.int64))
    assert routing.experts_TK.shape == (len(k), min(8, max([1, *k])))
    assert ((routing.experts_TK >= 0).sum(-1)).tolist() == k


def test_a_share_is_the_fewest_experts_that_sum_to_it() -> None:
    router, x = _router(), torch.randn(40, 6)
    share_T = torch.rand(40).clamp(0.05, 0.95)
    share_T[::4] = 3.0
    routing = router(x, k=share_T)
    for t, logits_E in enumerate(routing.logits_TE):
        sums = logits_E.double().softmax(0).sort(descending=True).values.cumsum(0)
        wanted = 3 if t % 4 == 0 else int((sums < float(share_T[t])).sum()) + 1
        alone = router(x[t : t + 1], k=wanted)
        assert torch.equal(routing.experts_TK[t, :wanted], alone.experts_TK[0])
        torch.testing.assert_close(routing.weights_TK[t, :wanted], alone.weights_TK[0])
        assert routing.experts_TK[t, wanted:].eq(-1).all()
    for wrong, message in ((torch.full((40,), 1.5), "a whole number, or lie between"), (torch.rand(3), "40 numbers")):
        with pytest.raises(UsageError, match=message):
            router(x, k=wrong)


@pytest.mark.parametrize(("k", "message"), [
    (2.0, "k must be a whole number or an int64 tensor [T], not 2.0"),
    (True, "k must be a whole number or an int64 tensor [T], not True"),
    ("2", "k must be a whole number or an int64 tensor [T], not '2'"),
    ([1, 2], "k must be a whole number or an int64 tensor [T], not [1, 2]"),
    (torch.tensor(2), "a tensor k must be int64 [2], a number for each token, not int64 []"),
    (torch.tensor([2]), "a tensor k must be int64 [2], a number for each token, not int64 [1]"),
    (torch.tensor([2.0, 1.0]), "a tensor k must be int64 [2], a number for each token, not float32 [2]"),
    (torch.tensor([-1, 3]), "each token's k must lie in 0..8, not -1"),
    (torch.tensor([0, 9]), "each token's k must lie in 0..8, not 9"),
], ids=str)  # fmt: skip
@pytest.mark.parametrize("spec", ["topk?capacity_factor=1", "learned_k", "token_k"])
def test_what_is_no_k_is_refused(k: Any, message: str, spec: str) -> None:
    if message.startswith("each") and not spec.startswith("topk"):
        return  # with slots of their own these routers look at no value
    if message.endswith("not float32 [2]") and spec.startswith("topk"):
        return  # it takes these, and shares
    router, x = naive_routers.router(spec), torch.randn(2, 6)
    for replay in (None, torch.tensor([[0, 1], [2, 3]])):
        with pytest.raises(UsageError, match=f"^router: {re.escape(message)}$"):
            router(x, replay, k)


@pytest.mark.parametrize("k", [0, -1, 9])
def test_an_impossible_k_is_refused(k: int) -> None:
    with pytest.raises(UsageError, match=rf"k must lie in 1\.\.8 \(the experts\), not {k}"):
        _router()(torch.randn(2, 6), k=k)


@pytest.mark.parametrize("tokens", [0, 1, 7])
def test_the_choice_is_a_sound_operator(tokens: int) -> None:
    torch.library.opcheck(torch.ops.mixtral.choose_experts.default, (torch.randn(tokens, 5), 3))
    torch.library.opcheck(torch.ops.mixtral.choose_experts.default, (torch.randn(tokens, 5, requires_grad=True), 5))
