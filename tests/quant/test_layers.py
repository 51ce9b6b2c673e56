"""Quantised layers against the plain layers that hold the same, already rounded, weights."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from mixtral.kernels.torch.dequantise import expand
from mixtral.model.linear import Linear
from mixtral.moe import Experts, FeedForward, LocalDispatcher, MoE, TopKRouter
from mixtral.quant.formats import INT4, INT8, Format, quantise
from mixtral.quant.layers import PackedExperts, PackedFeedForward, PackedLinear

BOTH = pytest.mark.parametrize("format", [INT8, INT4], ids=["int8", "int4"])
E, D, F = 3, 40, 24  # odd on purpose: neither a multiple of 32, nor F of 16


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def pack_into(quantised: nn.Module, plain: nn.Module, format: Format) -> None:
    """Random weights into both, rounded in both."""
    for name, parameter in plain.named_parameters():
        stack = random(*parameter.shape, seed=len(name)).view(-1, *parameter.shape[-2:])
        packed = [quantise(w, format) for w in stack]
        rounded = [expand(p, format.name, *parameter.shape[-2:]) for p in packed]
        parameter.data = torch.stack(rounded).view(parameter.shape)
        buffer = getattr(quantised, name + "_packed")
        buffer.copy_(torch.stack(packed).view(buffer.shape))


def close(got: Tensor, want: Tensor) -> None:
    """Up to the rounding of activations to 8 bits."""
    assert got.shape == want.shape and got.dtype == want.dtype
    assert (got - want).float().norm() <= 0.03 * want.float().norm()


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linear(format: Format, dtype: torch.dtype) -> None:
    quantised, plain = PackedLinear(format, D, 19), Linear(D, 19)
    pack_into(quantised, plain, format)
    x_TD = random(5, D).to(dtype)
    close(quantised(x_TD), plain.to(dtype)(x_TD))


@BOTH
def test_feed_forward(format: Format) -> None:
    quantised, plain = PackedFeedForward(format, D, F), FeedForward(D, F)
    pack_into(quantised, plain, format)
    close(quantised(random(5, D)), plain(random(5, D)))


@BOTH
@pytest.mark.parametrize("counts", [[2, 0, 3], [0, 0, 0], [0, 6, 0], [1, 1, 1]])
def test_experts(format: Format, counts: list[int]) -> None:
    quantised, plain = PackedExperts(format, E, D, F), Experts(E, D, F)
    pack_into(quantised, plain, format)
    rows_ND, counts_E = random(6, D), torch.tensor(counts)
    got = quantised(rows_ND, counts_E)
    close(got, plain(rows_ND, counts_E))
    assert not got[sum(counts) :].any()


def test_a_swapped_gate_and_up_shows() -> None:
    quantised, plain = PackedExperts(INT8, E, D, F), Experts(E, D, F)
    pack_into(quantised, plain, INT8)
    quantised.w13_packed.copy_(quantised.w13_packed.flip(1))
    rows_ND, counts_E = random(6, D), torch.tensor([2, 2, 2])
    with pytest.raises(AssertionError):
        close(quantised(rows_ND, counts_E), plain(rows_ND, counts_E))


@BOTH
def test_decoding_equals_dispatch(format: Format) -> None:
    quantised = PackedExperts(format, E, D, F)
    pack_into(quantised, Experts(E, D, F), format)
    router, dispatcher = TopKRouter(D, E, 2), LocalDispatcher()
    nn.init.normal_(router.weight)
    for dtype in (torch.float32, torch.bfloat16):
        x_TD = random(1, D, seed=3).to(dtype)
        routing = router(x_TD)
        routing.experts_TK[0, 1] = -1  # a slot that is not used
        routing = routing._replace(weights_TK=torch.tensor([[0.7, 0.0]]))
        dispatched = dispatcher.dispatch(x_TD, routing)
        want = dispatcher.combine(quantised(dispatched.rows_ND, dispatched.counts_E), dispatched)
        got = quantised.decode(x_TD, routing)
        assert got is not None and got.dtype == dtype
        assert torch.allclose(got, want, rtol=1e-5)
    assert quantised.decode(random(2, D), router(random(2, D))) is None


@BOTH
def test_in_a_layer(format: Format) -> None:
    quantised, plain = PackedExperts(format, E, D, F), Experts(E, D, F)
    pack_into(quantised, plain, format)
    router = TopKRouter(D, E, 2)
    nn.init.normal_(router.weight)
    x_TD = random(7, D)
    got, _ = MoE(router, quantised)(x_TD)  # type: ignore[arg-type]
    close(got.detach(), MoE(router, plain)(x_TD)[0].detach())


def test_nothing_is_left_to_train() -> None:
    experts = PackedExperts(INT4, E, D, F)
    assert not list(experts.parameters())
    assert {name: tuple(b.shape) for name, b in experts.named_buffers()} == {
        "w13_packed": (E, 2, 2, 2 * 288),
        "w2_packed": (E, 3, 288),
    }
