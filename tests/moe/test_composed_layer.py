"""The layer as it is put together: every router in each mode, with each dispatcher and kind of experts.

Outputs and all gradients against the sum over all experts, weighted by the router's equation (naive_routers.route).

Legend: T tokens, D model width, E experts.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
    register_module_full_backward_hook,
)

from mixtral.moe import Dispatched, Dispatcher, Experts, LocalDispatcher, MoE, Router, Routing
from mixtral.quant.formats import INT8
from mixtral.quant.layers import PackedExperts
from tests.moe import naive, naive_routers
from tests.moe.naive_routers import MODES
from tests.quant.test_layers import close, pack_into

D, F, E = 6, 5, 8
SEED = 5  # of the routers' noise


class Doubling(LocalDispatcher):
    """Doubles; and holds that rows are counted as `experts_TK` names them."""

    def dispatch(self, x_TD: Tensor, routing: Routing) -> Dispatched:
        made = super().dispatch(x_TD, routing)
        named_N = routing.experts_TK[routing.experts_TK >= 0]
        assert torch.equal(made.counts_E, torch.bincount(named_N, minlength=E))
        return made

    def combine(self, y_ND: Tensor, dispatched: Dispatched) -> Tensor:
        return 2 * super().combine(y_ND, dispatched)


class Around(Dispatcher):
    """Doubles with a context of its own around another dispatcher."""

    def dispatch(self, x_TD: Tensor, routing: Routing) -> Dispatched:
        inner = LocalDispatcher().dispatch(x_TD, routing)
        return Dispatched(inner.rows_ND, inner.counts_E, inner)

    def combine(self, y_ND: Tensor, dispatched: Dispatched) -> Tensor:
        return 2 * LocalDispatcher().combine(y_ND, dispatched.context)


class Tripled(Experts):
    """A subclass with a forward pass of its own, which inherits the rest."""

    def forward(self, rows_ND: Tensor, counts_E: Tensor) -> Tensor:
        return 3 * super().forward(rows_ND, counts_E)


class Wrapped(nn.Module):
    """Holds other experts, and can do what the contract asks, no more."""

    def __init__(self, inner: Experts) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, rows_ND: Tensor, counts_E: Tensor) -> Tensor:
        return 3 * self.inner(rows_ND, counts_E)


def _experts() -> Experts:
    made, generator = Experts(E, D, F), torch.Generator().manual_seed(3)
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.5, generator=generator)
    return made


def _layers(router: Router, plain: Experts) -> Iterator[tuple[MoE, int]]:
    """(a layer whose experts have the parameters of `plain`, what it multiplies the output of the plain one by)."""
    tripled, hooked = Tripled(E, D, F), Experts(E, D, F)
    for made in (tripled, hooked):
        made.w13, made.w2 = plain.w13, plain.w2
    hooked.register_forward_hook(lambda _, __, y_ND: 3 * y_ND)
    for dispatcher, outer in ((LocalDispatcher(), 1), (Doubling(), 2)):
        yield MoE(router, plain, dispatcher), outer
        yield MoE(router, tripled, dispatcher), 3 * outer
    yield MoE(router, plain, Around()), 2
    yield MoE(router, Wrapped(plain)), 3  # type: ignore[arg-type]
    yield MoE(router, hooked), 3


def _case(spec: str, training: bool, tokens: int) -> tuple[Router, Tensor, Tensor | None]:
    router = naive_routers.router(spec).train(training)
    x = torch.randn(tokens, D, generator=torch.Generator().manual_seed(tokens), requires_grad=True)
    k_T = (torch.arange(tokens) + 1) % 4 if spec.startswith("token_k?most=3") else None
    return router, x, k_T


def _gradients(out: Tensor, wrt: list[Tensor]) -> tuple[Tensor, ...]:
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    return torch.autograd.grad(out, wrt, cotangent, materialize_grads=True)


def _same(got: Tensor, want: Tensor) -> None:
    assert got.shape == want.shape and (got - want).abs().max() <= 2e-5 * max(1.0, want.abs().max().item())


@pytest.mark.parametrize("tokens", [1, 3, 40])
@pytest.mark.parametrize(("spec", "training"), MODES)
def test_every_router_with_every_dispatcher_and_experts(spec: str, training: bool, tokens: int) -> None:
    router, x, k_T = _case(spec, training, tokens)
    plain = _experts()
    wrt = [x, *router.parameters(), *plain.parameters()]
    want = naive.weighted(plain, x, naive_routers.route(router, x, SEED, k_T))
    want_grads = _gradients(want, wrt)
    for moe, factor in _layers(router, plain):
        torch.manual_seed(SEED)
        got, _ = moe(x, k=k_T)
        _same(got, factor * want)
        for a, b in zip(_gradients(got, wrt), want_grads, strict=True):
            _same(a, factor * b)
        torch.manual_seed(SEED)
        with torch.no_grad():  # where one token may take the shortcut
            _same(moe(x, k=k_T)[0], factor * want)


@pytest.mark.parametrize("tokens", [1, 3, 40])
@pytest.mark.parametrize("spec", [spec for spec, training in MODES if not training])
@torch.no_grad()
def test_every_router_with_quantised_experts(spec: str, tokens: int) -> None:
    router, x, k_T = _case(spec, False, tokens)
    quantised, plain = PackedExperts(INT8, E, D, F), _experts()
    pack_into(quantised, plain, INT8)
    want = naive.weighted(plain, x, naive_routers.route(router, x, SEED, k_T))
    for dispatcher, outer in ((LocalDispatcher(), 1), (Doubling(), 2)):
        moe = MoE(router, quantised, dispatcher)  # type: ignore[arg-type]
        close(moe(x, k=k_T)[0], outer * want)


@pytest.mark.parametrize("kind", ["plain", "quantised"])
@torch.no_grad()
def test_one_token_is_decoded_without_dispatch_by_the_parts_themselves_alone(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not by their subclasses, nor past a hook or a method that one of them was given."""

    def refuse(*_: object) -> Dispatched:
        raise AssertionError("dispatched")

    monkeypatch.setattr(LocalDispatcher, "dispatch", refuse)
    made = Experts(E, D, F) if kind == "plain" else PackedExperts(INT8, E, D, F)
    for tensor in made.state_dict().values():
        tensor.zero_()
    one, routing = torch.zeros(1, D), naive.routing([[0, 1]], n_experts=E)
    two = naive.routing([[0, 1], [2, 3]], n_experts=E)

    def dispatches(dispatcher: Dispatcher, x: Tensor = one, routing: Routing = routing) -> bool:
        try:
            dispatcher.apply(made, x, routing)  # type: ignore[arg-type]
        except AssertionError:
            return True
        return False

    assert not dispatches(LocalDispatcher()) and dispatches(Doubling())
    assert dispatches(LocalDispatcher(), torch.zeros(2, D), two)
    for register in (made.register_forward_hook, made.register_forward_pre_hook):
        handle = register(lambda *_: None)
        assert dispatches(LocalDispatcher())
        handle.remove()
    for register in (
        register_module_forward_hook,
        register_module_forward_pre_hook,
        register_module_full_backward_hook,
    ):
        handle = register(lambda *_: None)
        assert dispatches(LocalDispatcher())
        handle.remove()
    assert not dispatches(LocalDispatcher())
    changed = LocalDispatcher()
    changed.combine = lambda y_ND, _: y_ND  # type: ignore[method-assign]
    assert dispatches(changed)
    made.forward = lambda rows_ND, _: rows_ND  # type: ignore[method-assign, assignment]
    assert dispatches(LocalDispatcher())
    del made.forward
    assert not dispatches(LocalDispatcher())
    made.__class__ = type("Adapted", (type(made),), {})
    assert dispatches(LocalDispatcher())
