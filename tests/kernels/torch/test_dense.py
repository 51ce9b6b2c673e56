from __future__ import annotations

import pytest
import torch

from mixtral.kernels import reference
from mixtral.kernels.torch import dense
from tests.kernels.compare import compare

SHAPES = [(0, 8, 4), (1, 1, 1), (1, 8, 6), (7, 13, 5), (33, 64, 48)]


@pytest.mark.parametrize("tokens, wide, out", SHAPES)
def test_linear(tokens: int, wide: int, out: int, dtype: torch.dtype) -> None:
    compare(dense.linear, reference.linear, [torch.randn(tokens, wide), torch.randn(out, wide)], dtype)


@pytest.mark.parametrize("needs", [(True, False), (False, True)])
def test_linear_gives_only_the_gradient_asked_for(needs: tuple[bool, bool], dtype: torch.dtype) -> None:
    x = torch.randn(3, 4, dtype=dtype, requires_grad=needs[0])
    w = torch.randn(5, 4, dtype=dtype, requires_grad=needs[1])
    dense.linear(x, w).sum().backward()
    assert (x.grad is not None, w.grad is not None) == needs


@pytest.mark.parametrize("tokens, wide, hidden", SHAPES)
def test_swiglu(tokens: int, wide: int, hidden: int, dtype: torch.dtype) -> None:
    inputs = [torch.randn(tokens, wide), torch.randn(2, hidden, wide) / 4, torch.randn(wide, hidden) / 4]
    compare(dense.swiglu, reference.swiglu, inputs, dtype)


def test_swiglu_gates_with_the_first_half() -> None:
    """Gate and up exchanged give no error and nonsense: hold the order to the formula itself."""
    x, w1, w3, w2 = torch.randn(3, 4), torch.randn(5, 4), torch.randn(5, 4), torch.randn(4, 5)
    want = (torch.nn.functional.silu(x @ w1.T) * (x @ w3.T)) @ w2.T
    for swiglu in (reference.swiglu, dense.swiglu):
        torch.testing.assert_close(swiglu(x, torch.stack((w1, w3)), w2), want)


@pytest.mark.parametrize("tokens, wide, scale", [(0, 8, 1.0), (1, 3, 1.0), (5, 7, 1e-4), (5, 7, 1e4), (33, 64, 1.0)])
def test_rms_norm(tokens: int, wide: int, scale: float, dtype: torch.dtype) -> None:
    inputs = [torch.randn(tokens, wide) * scale, torch.randn(wide), 1e-5]
    compare(dense.rms_norm, reference.rms_norm, inputs, dtype)


def test_rms_norm_of_zeros_is_zero_and_finite_backward() -> None:
    compare(dense.rms_norm, reference.rms_norm, [torch.zeros(3, 8), torch.randn(8), 1e-5])


def test_rms_norm_refuses_a_second_derivative() -> None:
    """Its backward is written by hand and keeps the scale as a constant: a derivative of that would lack terms."""
    x = torch.randn(3, 4, requires_grad=True)
    (grad,) = torch.autograd.grad(dense.rms_norm(x, torch.ones(4), 1e-5).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_rms_norm_with_a_frozen_weight() -> None:
    x, weight = torch.randn(3, 4, requires_grad=True), torch.randn(4)
    want = torch.autograd.grad(reference.rms_norm(x, weight, 1e-5).square().sum(), x)[0]
    torch.testing.assert_close(torch.autograd.grad(dense.rms_norm(x, weight, 1e-5).square().sum(), x)[0], want)


@pytest.mark.parametrize("tokens, heads, width", [(0, 2, 4), (1, 1, 2), (7, 3, 10), (16, 8, 64)])
def test_rotary(tokens: int, heads: int, width: int, dtype: torch.dtype) -> None:
    angles = torch.rand(tokens, width // 2) * 100
    x, cos, sin = torch.randn(tokens, heads, width), angles.cos(), angles.sin()
    if dtype == torch.bfloat16:  # cos and sin are rounded to x's dtype by contract
        cos, sin = cos.bfloat16().float(), sin.bfloat16().float()
    compare(lambda x: dense.rotary(x, cos, sin), lambda x: reference.rotary(x, cos, sin), [x], dtype)


def test_rotary_turns_pairs_by_the_angle_and_keeps_their_length() -> None:
    x = torch.tensor([[[1.0, 0.0, 0.0, 2.0]]])  # pairs (0, 2) and (1, 3)
    angles = torch.tensor([[torch.pi / 2, torch.pi]])
    want = torch.tensor([[[0.0, 0.0, 1.0, -2.0]]])
    for rotary in (reference.rotary, dense.rotary):
        torch.testing.assert_close(rotary(x, angles.cos(), angles.sin()), want, atol=1e-6, rtol=0)


def test_numerical_gradients() -> None:
    x, w = torch.randn(3, 4).double().requires_grad_(), torch.randn(5, 4).double().requires_grad_()
    w13, w2 = torch.randn(2, 5, 4).double().requires_grad_(), torch.randn(4, 5).double().requires_grad_()
    heads, angles = torch.randn(3, 2, 4).double().requires_grad_(), torch.rand(3, 2)
    assert torch.autograd.gradcheck(dense.linear, (x, w))
    assert torch.autograd.gradcheck(dense.swiglu, (x, w13, w2))
    assert torch.autograd.gradcheck(lambda h: dense.rotary(h, angles.cos(), angles.sin()), (heads,))
