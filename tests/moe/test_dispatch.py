from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from mixtral.moe import LocalDispatcher, Routing
from tests.moe.naive import routing

EXPERTS = 5


@st.composite
def choices(draw: st.DrawFn) -> list[list[int]]:
    """Each token's experts, all different, then -1 for the slots it does not use."""
    k, tokens = draw(st.integers(1, EXPERTS)), draw(st.integers(1, 12))
    taken = st.lists(st.integers(0, EXPERTS - 1), max_size=k, unique=True)
    return [(some + [-1] * k)[:k] for some in draw(st.lists(taken, min_size=tokens, max_size=tokens))]


@settings(max_examples=100, derandomize=True)
@given(choices())
def test_laws(choice: list[list[int]]) -> None:
    x = torch.arange(len(choice) * 2.0).view(-1, 2)
    route = routing(choice, n_experts=EXPERTS)
    route = route._replace(chosen_TK=torch.zeros_like(route.experts_TK))  # what is computed is not what was chosen
    dispatched = LocalDispatcher().dispatch(x, route)
    flat = [e for experts in choice for e in experts]
    _, order_N, row_TK = dispatched.context
    order = order_N.tolist()
    assert sorted(order) == list(range(len(flat)))  # a permutation of the assignments,
    assert row_TK.flatten()[order_N].tolist() == list(range(len(flat)))  # its inverse,
    kept = [n for n in order if flat[n] >= 0]
    assert order[: len(kept)] == kept  # the dropped at the end,
    assert [(flat[n], n) for n in kept] == sorted((flat[n], n) for n in kept)  # grouped by expert, stable
    assert dispatched.counts_E.tolist() == [flat.count(e) for e in range(EXPERTS)]
    assert torch.equal(dispatched.rows_ND, x[torch.tensor(order) // len(choice[0])])
    assert dispatched.counts_E.dtype == torch.int64


@settings(max_examples=50, derandomize=True)
@given(choices())
def test_combine_undoes_dispatch(choice: list[list[int]]) -> None:
    """With experts that return their rows, a token comes back times the sum of its weights: 1, or 0 when dropped."""
    x = torch.randn(len(choice), 3)
    dispatcher, route = LocalDispatcher(), routing(choice, n_experts=EXPERTS)
    dispatched = dispatcher.dispatch(x, route)
    want = x * route.weights_TK.sum(-1, keepdim=True)
    torch.testing.assert_close(dispatcher.combine(dispatched.rows_ND, dispatched), want)


def test_no_tokens() -> None:
    one = routing([[0, 1]], n_experts=EXPERTS)
    empty = one.tokens(0, 0)
    dispatcher = LocalDispatcher()
    dispatched = dispatcher.dispatch(torch.empty(0, 3), empty)
    assert dispatched.counts_E.tolist() == [0] * EXPERTS
    assert dispatcher.combine(dispatched.rows_ND, dispatched).shape == (0, 3)


def test_no_host_synchronisation() -> None:
    """Tensors without values do: nothing waits for one, and no shape depends on one."""
    route = routing([[0, 1], [3, -1], [-1, -1]], n_experts=EXPERTS)
    with FakeTensorMode(allow_non_fake_inputs=False) as mode:
        fake = Routing(*map(mode.from_tensor, route[:5]))
        dispatcher = LocalDispatcher()
        dispatched = dispatcher.dispatch(torch.empty(3, 4), fake)
        assert dispatched.counts_E.shape == (EXPERTS,)
        assert dispatcher.combine(dispatched.rows_ND, dispatched).shape == (3, 4)
