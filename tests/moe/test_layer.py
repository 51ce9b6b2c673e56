from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mixtral import kernels
from mixtral.moe import MoE
from tests.moe import naive


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def _gradients(out: Tensor, moe: MoE, x: Tensor) -> list[Tensor]:
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    return list(torch.autograd.grad(out, [x, *moe.parameters()], cotangent))


@pytest.mark.parametrize("tokens, n_experts, k", [(1, 4, 2), (3, 8, 1), (17, 5, 3), (30, 4, 4), (9, 1, 1)])
@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_equals_the_paper_written_as_a_loop(tokens: int, n_experts: int, k: int, backend: str) -> None:
    moe, x = naive.moe(n_experts, k), torch.randn(tokens, 12, requires_grad=True)
    with kernels.use_backend(backend):
        out, _ = moe(x)
        got = [out, *_gradients(out, moe, x)]
    want_out = naive.layer(moe, x, k)
    for have, want in zip(got, [want_out, *_gradients(want_out, moe, x)], strict=True):
        # with one expert a token the router's gradient is zero but for rounding, hence the 1
        assert (have - want).abs().max() <= 1e-5 * max(1.0, want.abs().max().item())


def test_no_tokens() -> None:
    moe, x = naive.moe(), torch.empty(0, 12, requires_grad=True)
    out, routing = moe(x)
    assert out.shape == (0, 12) and routing.logits_TE.shape == (0, 5)
    assert all(g is not None and not g.any() for g in _gradients(out, moe, x))
    with torch.no_grad():
        assert moe(x)[0].shape == (0, 12)


def test_all_tokens_on_one_expert_leave_zero_gradients_to_the_others() -> None:
    moe = naive.moe(n_experts=3, k=1)
    with torch.no_grad():
        moe.router.weight.zero_()[1] = 1.0
    out, routing = moe(torch.rand(6, 12))
    assert (routing.experts_TK == 1).all()
    out.square().sum().backward()
    for grad in (moe.experts.w13.grad, moe.experts.w2.grad):
        assert grad is not None and not grad[[0, 2]].any() and grad[1].any()


def test_a_token_without_experts_gives_zero_and_takes_no_gradient() -> None:
    moe, x = naive.moe(), torch.randn(4, 12, requires_grad=True)
    out, _ = moe(x, k=torch.tensor([2, 0, 1, 2]))
    assert not out[1].any()
    (grad,) = torch.autograd.grad(out.square().sum(), x)
    assert not grad[1].any() and grad[[0, 2, 3]].any(-1).all()


def test_k_of_nobody_is_zero() -> None:
    assert not naive.moe()(torch.randn(4, 12), k=torch.zeros(4, dtype=torch.int64))[0].any()


def test_replay_gives_the_same_output_and_gradients() -> None:
    moe, x = naive.moe(), torch.randn(11, 12, requires_grad=True)
    out, routing = moe(x)
    again, _ = moe(x, replay=routing.experts_TK)
    assert torch.equal(out, again)
    assert all(torch.equal(a, b) for a, b in zip(_gradients(out, moe, x), _gradients(again, moe, x), strict=True))


def test_decode_agrees_with_dispatch() -> None:
    moe, x = naive.moe(), torch.randn(1, 12)
    want, routing = moe(x)
    with torch.no_grad():
        assert moe.experts.decode(x, routing) is not None
        torch.testing.assert_close(moe(x)[0], want)
        for k in (torch.tensor([n]) for n in range(3)):
            torch.testing.assert_close(moe(x, k=k)[0], naive.layer_with_ks(moe, x, k))


def test_decode_declines_what_it_is_not_for() -> None:
    moe = naive.moe()
    few, many = torch.randn(1, 12), torch.randn(2, 12)
    assert moe.experts.decode(few, moe.router(few)) is None  # gradients are on
    with torch.no_grad():
        assert moe.experts.decode(many, moe.router(many)) is None
        assert moe.experts.decode(few, moe.router(few)) is not None


def test_forward_leaves_no_state_behind() -> None:
    moe = naive.moe()
    before = {name: value.clone() for name, value in moe.state_dict().items()}
    attributes = {name: set(vars(module)) for name, module in moe.named_modules()}
    moe(torch.randn(20, 12))[0].sum().backward()
    assert not list(moe.buffers())
    assert all(torch.equal(before[name], value) for name, value in moe.state_dict().items())
    assert attributes == {name: set(vars(module)) for name, module in moe.named_modules()}


@pytest.mark.parametrize("tokens", [2, 40])
def test_bf16_is_close_to_fp32_on_the_same_choice(tokens: int) -> None:
    moe, x = naive.moe(dim=32, ffn=24).bfloat16(), torch.randn(tokens, 32).bfloat16()
    with torch.no_grad():
        low, routing = moe(x)
        high, exact = moe.float()(x.float())
    assert low.dtype == torch.bfloat16 and torch.equal(routing.experts_TK, exact.experts_TK)
    assert (low.float() - high).abs().max() <= 2**-6 * high.abs().max()
