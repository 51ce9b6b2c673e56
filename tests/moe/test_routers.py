"""Each router against its equation, and what holds for all of them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mixtral.config.router import Bounded, ExpertChoice, LearnedK, Sigmoid, Switch, Threshold, TopK
from mixtral.errors import UsageError
from mixtral.moe import Router, Routing, make_router
from mixtral.moe.choice import counts_of, taken, within_capacity
from tests.moe import naive_routers
from tests.moe.naive_routers import MODES, SPECS, TRAINING_ONLY, dense_weights

E = 8


def _call(router: Router, x: Tensor, replay: Tensor | None = None, seed: int = 5) -> Routing:
    torch.manual_seed(seed)
    return router(x, replay)


@pytest.mark.parametrize("tokens", [1, 23])
@pytest.mark.parametrize(("spec", "training"), MODES)
def test_equals_its_equation_token_by_token(spec: str, training: bool, tokens: int) -> None:
    router = naive_routers.router(spec).train(training)
    x = torch.randn(tokens, 6, generator=torch.Generator().manual_seed(1), requires_grad=True)
    cotangent = torch.randn(tokens, E, generator=torch.Generator().manual_seed(2))
    routing = _call(router, x)
    got, want = dense_weights(routing.experts_TK, routing.weights_TK, E), naive_routers.route(router, x, 5)
    assert torch.equal(got > 0, want > 0)
    torch.testing.assert_close(got, want)
    wrt = [x, *router.parameters()]
    if not want.requires_grad:  # no token takes an expert
        return
    grads = (torch.autograd.grad((w * cotangent).sum(), wrt, materialize_grads=True) for w in (got, want))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-6)


def _sums(routing: Routing, options: object) -> None:
    """Rows sum to 1 (to `scale`, below 1 where scores stay raw); tokens without experts to 0."""
    sums = routing.weights_TK.sum(-1)
    some = (routing.experts_TK >= 0).any(-1)
    assert not sums[~some].any()
    if isinstance(options, Switch | Threshold | ExpertChoice):
        assert (sums <= 1 + 1e-5).all()
    else:
        whole = options.scale if isinstance(options, Sigmoid) else 1.0
        torch.testing.assert_close(sums[some], torch.full_like(sums[some], whole))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.sampled_from(SPECS), st.integers(0, 40), st.integers(0, 1000), st.sampled_from([0.0, 0.1, 1.0, 30.0]))
def test_laws(spec: str, tokens: int, seed: int, spread: float) -> None:
    router = naive_routers.router(spec, seed)
    x = spread * torch.randn(tokens, 6, generator=torch.Generator().manual_seed(seed))
    routing = _call(router, x, seed=seed)
    experts, weights, options = routing.experts_TK, routing.weights_TK, router.options
    counts = (experts >= 0).sum(-1)
    _sums(routing, options)
    assert not weights[experts < 0].any() and (experts >= -1).all() and (experts < E).all()
    assert {t.dtype for t in (routing.logits_TE, routing.scores_TE, weights)} == {torch.float32}
    first, second = experts[:, :-1], experts[:, 1:]
    assert ((first >= 0) | (second < 0)).all(), "unused places come last"
    used = second >= 0
    assert (weights[:, :-1] >= weights[:, 1:])[used].all(), "sorted by weight"
    tied = used & (routing.logits_TE.gather(1, first.clamp(min=0)) == routing.logits_TE.gather(1, second.clamp(min=0)))
    assert (first < second)[tied].all(), "ties to the lower index"
    assert torch.equal(taken(experts, E).sum(-1), counts), "no expert twice"
    again = _call(router, x, replay=routing.chosen_TK, seed=seed)
    assert torch.equal(again.weights_TK, weights) and torch.equal(again.experts_TK, experts)
    _within_bounds(router, routing, counts)


def _within_bounds(router: Router, routing: Routing, counts_T: Tensor) -> None:
    options, k, tokens = router.options, router.experts_per_token, len(counts_T)
    load_E = [(routing.experts_TK == e).sum().item() for e in range(E)]
    if isinstance(options, TopK) and options.capacity_factor:
        assert max(load_E) <= math.ceil(Fraction(str(options.capacity_factor)) * tokens * k / E)
        chosen_T = (routing.chosen_TK >= 0).sum(-1)
        assert (counts_T <= chosen_T).all()
        counts_T = chosen_T
    else:
        assert torch.equal(routing.chosen_TK, routing.experts_TK)
    if isinstance(options, LearnedK):
        assert ((counts_T >= 1) & (counts_T <= (options.most or E))).all()
        assert ((routing.k_T >= 1 - 1e-4) & (routing.k_T <= (options.most or E) + 1e-4)).all()
    elif isinstance(options, Bounded):
        assert ((counts_T >= options.least) & (counts_T <= (options.most or E))).all()
    elif isinstance(options, ExpertChoice):
        assert load_E == [math.ceil(tokens * k / E)] * E
    elif isinstance(options, TopK):
        assert (counts_T == k).all()


@pytest.mark.parametrize("spec", [spec for spec in SPECS if spec not in TRAINING_ONLY])
def test_evaluation_is_deterministic_and_each_token_stands_alone(spec: str) -> None:
    router, x = naive_routers.router(spec).eval(), torch.randn(9, 6)
    whole, again = _call(router, x, seed=1), _call(router, x, seed=2)
    assert torch.equal(whole.weights_TK, again.weights_TK) and torch.equal(whole.experts_TK, again.experts_TK)
    for t in range(9):
        alone = router(x[t : t + 1])
        assert torch.equal(alone.experts_TK[0], whole.experts_TK[t])
        torch.testing.assert_close(alone.weights_TK[0], whole.weights_TK[t])


@pytest.mark.parametrize("spec", ["noisy", "jitter?eps=0.3"])
def test_training_noise_follows_the_seed(spec: str) -> None:
    router, x = naive_routers.router(spec), torch.randn(9, 6)
    a, same, other = (_call(router, x, seed=seed).logits_TE for seed in (1, 1, 2))
    assert torch.equal(a, same) and not torch.equal(a, other)


def test_capacity_drops_second_choices_first_and_renormalises() -> None:
    """All four tokens want expert 0, then 1; each may have ceil(0.5 * 4 * 2 / 8) = 1 token."""
    router = naive_routers.router("topk?capacity_factor=0.5")
    with torch.no_grad():
        router.weight.zero_()
        router.weight[0, 0], router.weight[1, 0] = 2.0, 1.0
    x = torch.zeros(4, 6)
    x[:, 0] = 1
    routing = router(x)
    assert routing.experts_TK.tolist() == [[0, 1], [-1, -1], [-1, -1], [-1, -1]]
    assert int((routing.experts_TK < 0).sum()) == 6  # dropped assignments can be counted
    assert routing.chosen_TK.tolist() == [[0, 1]] * 4
    assert counts_of(routing.chosen_TK, E).tolist() == [4, 4, *[0] * 6], "balancing sees what was asked for"
    assert counts_of(routing.experts_TK, E).tolist() == [1, 1, *[0] * 6], "and dispatch what is computed"
    again = router(x, replay=routing.chosen_TK)
    assert torch.equal(again.experts_TK, routing.experts_TK) and torch.equal(again.chosen_TK, routing.chosen_TK)
    x[1, 0] = -1  # this one ranks 0 and 1 last: first choices 2, 3
    routing = router(x)
    assert routing.experts_TK.tolist() == [[0, 1], [2, 3], [-1, -1], [-1, -1]]
    x[0, 0], x[2, 0] = 0.0, 1.0  # the first token has no preference: 0, then 1
    with torch.no_grad():
        router.weight[1, 1] = 5.0
    x[2, 1] = 1.0  # and the third prefers 1 to 0
    routing = router(x)
    assert routing.experts_TK.tolist() == [[0, -1], [2, 3], [1, -1], [-1, -1]]
    assert routing.weights_TK[0].tolist() == [1.0, 0.0]
    whole = router.eval()(x)
    assert (whole.experts_TK >= 0).all() and whole.chosen_TK is whole.experts_TK, "nothing is dropped in evaluation"
    assert torch.equal(whole.chosen_TK, routing.chosen_TK)
    both = Routing.cat([whole, routing])
    assert torch.equal(both.chosen_TK, torch.cat([whole.experts_TK, routing.chosen_TK]))
    assert torch.equal(both.tokens(4, 8).chosen_TK, routing.chosen_TK)


def test_capacity_follows_a_call_s_number_but_not_each_token_s_own() -> None:
    """Eight tokens that want the same experts: each of these may have ceil(8 * k / 8) = k, or K = 2 of them."""
    router = naive_routers.router("topk?capacity_factor=1")
    for k, rows in ((None, 2), (1, 1), (4, 4), (torch.full((8,), 4), 2)):
        experts = router(torch.ones(8, 6), k=k).experts_TK
        assert taken(experts, E).sum(0).max() == rows


@pytest.mark.parametrize("spec", ["topk", "grouped?groups=4&taken=3", "sigmoid?bias=true", "learned_k", "token_k",
                                  "learned_k?most=1", "learned_k?most=5", "token_k?most=4"])  # fmt: skip
def test_a_replay_drops_what_its_call_dropped(spec: str) -> None:
    """With the same k, and without one where the call was given a number (other than all slots, for the last ones)."""
    router = naive_routers.router(spec + ("&" if "?" in spec else "?") + "capacity_factor=0.6")
    x = torch.randn(40, 6, generator=torch.Generator().manual_seed(1))
    for k in (None, 1, 2, 3, torch.arange(40) % 4, torch.full((40,), 3)):
        first = router(x, k=k)
        assert k is None or (first.chosen_TK >= 0).sum() > (first.experts_TK >= 0).sum(), "something was dropped"
        assert torch.equal(router(x, replay=first.chosen_TK, k=k).experts_TK, first.experts_TK)
        slots = router.options.slots(E, 2)
        if k is None or (isinstance(k, int) and (k != slots or k == 2)):
            assert torch.equal(router(x, replay=first.chosen_TK).experts_TK, first.experts_TK)


@pytest.mark.parametrize("factor", [1e10, 1e300])
def test_a_capacity_beyond_all_numbers_drops_nothing(factor: float) -> None:
    routing = naive_routers.router(f"topk?capacity_factor={factor}")(torch.randn(7, 6))
    assert torch.equal(routing.experts_TK, routing.chosen_TK) and (routing.experts_TK >= 0).all()


def test_a_bias_moves_the_choice_and_never_the_weight() -> None:
    plain, biased = (naive_routers.router(spec) for spec in ("topk", "topk?bias=true"))
    x = torch.randn(20, 6)
    biased.bias.zero_()
    torch.testing.assert_close(biased(x).weights_TK, plain(x).weights_TK)
    biased.bias[3] = 2.0
    moved = biased(x)
    assert (moved.experts_TK == 3).any(-1).all() and (plain(x).experts_TK == 3).any(-1).sum() < 20
    torch.testing.assert_close(moved.weights_TK, plain(x, replay=moved.experts_TK).weights_TK)


def _slope(f: Callable[[], Tensor], at: Tensor, along: Tensor) -> float:
    """The derivative by central differences."""
    step, values = 1e-6, []
    with torch.no_grad():
        for sign in (1, -1):
            at += sign * step * along
            values.append(float(f()))
            at -= sign * step * along
    return (values[0] - values[1]) / (2 * step)


@pytest.mark.parametrize("replayed", [False, True])
@pytest.mark.parametrize("spec", ["learned_k", "learned_k?most=4&bias=true&capacity_factor=0.7"])
def test_which_gradients_of_learned_k_are_slopes(spec: str, replayed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """In fp64. The price's are, and the weights' to the gate; to the head the weights are flat, and their gradient is
    the slope of weight * P(K >= j), the weight held fixed, j the rank in the choice of the expert in a slot.
    """
    monkeypatch.setattr(Tensor, "float", Tensor.double)
    router = naive_routers.router(spec).double()
    generator = torch.Generator().manual_seed(0)
    x, along = (torch.randn(*shape, generator=generator).double() for shape in ((9, 6), router.k_weight.shape))
    first = router(x)
    replay = first.chosen_TK if replayed else None
    held_TE = dense_weights(first.experts_TK, first.weights_TK.detach(), E)
    worth_TE = torch.randn(9, E, generator=generator).double()
    key_TE = first.scores_TE + router.bias if router.options.bias else first.scores_TE
    rank_TE = key_TE.masked_fill(~taken(first.chosen_TK, E), -math.inf).argsort(dim=-1, descending=True).argsort()

    def output() -> Tensor:
        routing = router(x, replay)
        return (dense_weights(routing.experts_TK, routing.weights_TK, E) * worth_TE).sum()

    def relaxed() -> Tensor:
        p_TK = (x @ router.k_weight.T).softmax(-1)
        at_least_TE = torch.stack([p_TK[:, j:].sum(-1) for j in range(E)], dim=1).gather(1, rank_TE)
        return (held_TE * at_least_TE * worth_TE).sum()

    def price() -> Tensor:
        return (router(x, replay).k_T - 1.5).square().mean()

    def gradient(of: Tensor, parameter: Tensor, direction: Tensor) -> float:
        grad = torch.autograd.grad(of, parameter, materialize_grads=True, allow_unused=True)[0]
        return float((grad * direction).sum())

    gate, head = router.weight, router.k_weight
    gate_along = torch.randn(gate.shape, generator=generator).double()
    assert gradient(price(), head, along) == pytest.approx(_slope(price, head, along), rel=1e-6) != 0
    assert gradient(price(), gate, gate_along) == _slope(price, gate, gate_along) == 0
    assert gradient(output(), gate, gate_along) == pytest.approx(_slope(output, gate, gate_along), rel=1e-6) != 0
    assert _slope(output, head, along) == 0 != gradient(output(), head, along)
    assert gradient(output(), head, along) == pytest.approx(_slope(relaxed, head, along), rel=1e-6)
    router.eval()
    assert gradient(output(), head, along) == 0, "in evaluation there is none"


def test_k_t_of_learned_k_is_the_expected_number() -> None:
    router, x = naive_routers.router("learned_k"), torch.randn(7, 6)
    p_TK = (x @ router.k_weight.T).softmax(-1)
    torch.testing.assert_close(router(x).k_T, (p_TK * torch.arange(1, 9)).sum(-1))


@pytest.mark.parametrize("spec", ["topk", "noisy", "sigmoid", "grouped?groups=4&taken=2", "learned_k", "token_k"])
def test_a_call_may_set_k(spec: str) -> None:
    router, x = naive_routers.router(spec), torch.randn(6, 6)
    for k in (1, 2, 4):
        assert ((router(x, k=k).experts_TK >= 0).sum(-1) == k).all()
    each = router(x, k=torch.tensor([0, 1, 2, 2, 1, 0]))
    assert (each.experts_TK >= 0).sum(-1).tolist() == [0, 1, 2, 2, 1, 0] and each.weights_TK.isfinite().all()


@pytest.mark.parametrize("spec", ["top_p", "min_p", "threshold"])
def test_routers_that_find_k_refuse_one(spec: str) -> None:
    with pytest.raises(UsageError, match="k cannot be set"):
        naive_routers.router(spec)(torch.randn(2, 6), k=2)


@pytest.mark.parametrize("spec, wanted", [("top_p?p=0.5", 4), ("min_p?p=1", 8), ("threshold", 0)])
def test_needs_on_the_edge(spec: str, wanted: int) -> None:
    """Eight scores of 1/8: four sum to 0.5, all reach the highest, none exceeds a threshold of 1/8."""
    router = naive_routers.router(spec)
    router.reset_buffers()
    assert (router(torch.zeros(3, 6)).experts_TK >= 0).sum(-1).tolist() == [wanted] * 3


@pytest.mark.parametrize("n_experts", [8, 64, 256])
def test_top_p_of_one_takes_every_expert(n_experts: int) -> None:
    """Also those that a running sum of scores, or the score itself, rounds away."""
    router = make_router(naive_routers.config("top_p?p=1", n_experts=n_experts))
    torch.nn.init.normal_(router.weight, std=3.0)
    routing = router(torch.cat([torch.randn(50, 6), 100 * torch.eye(6)]))
    assert (routing.scores_TE == 0).any() and (routing.experts_TK >= 0).all()


@pytest.mark.parametrize("n_experts", [8, 64, 256])
@pytest.mark.parametrize("p", [0.9, 1 - 1e-7, 1 - 1e-8, 1 - 2**-53])
def test_top_p_sums_scores_without_rounding(n_experts: int, p: float) -> None:
    router = make_router(naive_routers.config(f"top_p?p={p!r}", n_experts=n_experts))
    generator = torch.Generator().manual_seed(1)
    torch.nn.init.normal_(router.weight, generator=generator)
    routing = router(torch.cat([torch.zeros(1, 6), torch.randn(60, 6, generator=generator)]))
    for scores, taken_K in zip(routing.scores_TE.tolist(), routing.experts_TK, strict=True):
        sums = list(itertools.accumulate(Fraction(score) for score in sorted(scores, reverse=True)))
        assert (taken_K >= 0).sum() == next((n for n, mass in enumerate(sums, 1) if mass >= p), n_experts)


@pytest.mark.parametrize(("tokens", "k", "n_experts", "factor", "rows"), [
    (100, 1, 55, 0.55, 1), (100, 1, 11, 1.1, 10), (100, 1, 8, 0.29, 4), (3, 2, 8, 4 / 3, 1), (12, 2, 4, 0.5, 3),
    (7, 2, 4, 1.0, 4), (1, 1, 8, 0.1, 1),
])  # fmt: skip
def test_capacity_rounds_the_exact_product_up(tokens: int, k: int, n_experts: int, factor: float, rows: int) -> None:
    """In floating point 0.55 * 100 / 55 is a little above 1, and gave each expert two rows."""
    all_on_one = torch.zeros(tokens, 1, dtype=torch.int64)
    assert int((within_capacity(all_on_one, n_experts, k, factor) >= 0).sum()) == min(tokens, rows)


def test_sigmoid_scores_that_round_to_one_number_are_tied() -> None:
    """Logits 40 and 30: both scores are 1, so the lower index comes first."""
    router = naive_routers.router("sigmoid")
    with torch.no_grad():
        router.weight.zero_()
        router.weight[5, 0], router.weight[2, 0] = 40.0, 30.0
    routing = router(torch.eye(6)[:1])
    assert routing.experts_TK.tolist() == [[2, 5]] and routing.weights_TK.tolist() == [[0.5, 0.5]]


def test_k_beyond_the_groups_is_refused() -> None:
    with pytest.raises(UsageError, match=r"k must lie in 1\.\.4"):
        naive_routers.router("grouped?groups=4&taken=2")(torch.randn(2, 6), k=5)


def test_expert_choice_is_for_training() -> None:
    router, x = naive_routers.router("expert_choice"), torch.randn(4, 6)
    made = router(x, k=4)
    assert taken(made.experts_TK, E).sum(0).tolist() == [4 * 4 // E] * E
    with pytest.raises(UsageError, match="later ones included"):
        router.eval()(x)
    assert torch.equal(router(x, replay=made.experts_TK).weights_TK, made.weights_TK)
    for k in (0, 9, 2.0, True, torch.tensor([1, 1, 1, 1])):
        with pytest.raises(UsageError, match="one number for all tokens"):
            router.train()(x, k=k)


def test_routings_of_several_calls_make_one() -> None:
    router, x = naive_routers.router("learned_k"), torch.randn(6, 6)
    whole = router(x)
    assert torch.equal(Routing.cat([whole.tokens(0, 2), whole.tokens(2, 6)]).k_T, whole.k_T)
    narrow = Routing.cat([router(x[:2], k=1), router(x[2:], k=3)])
    assert narrow.experts_TK.shape == (6, 3) and (narrow.experts_TK[:2, 1:] == -1).all()
    assert not narrow.weights_TK[:2, 1:].any() and torch.equal(narrow.chosen_TK, narrow.experts_TK)


def test_buffers_go_back_to_their_start() -> None:
    for spec, name, start in (("topk?bias=true", "bias", 0.0), ("threshold", "threshold", 1 / 8)):
        router = naive_routers.router(spec)
        router.reset_buffers()
        assert (router.get_buffer(name) == start).all()
