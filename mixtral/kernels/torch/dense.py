"""Linear, dense SwiGLU, RMSNorm and rotary embedding on torch.

Legend: T tokens, D model width, O output width, F feed-forward hidden width, H heads, C head width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from mixtral.kernels.torch.matmul import matmul, upcasts


class _UpcastLinear(torch.autograd.Function):
    """A bf16 linear through fp32 copies, which live only for the product (see products.py)."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, w_OD: Tensor) -> Tensor:
        ctx.save_for_backward(x_TD, w_OD)
        return matmul(x_TD, w_OD.T)

    @staticmethod
    def backward(ctx: Any, grad_TO: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x_TD, w_OD = ctx.saved_tensors
        need_x, need_w = ctx.needs_input_grad
        return matmul(grad_TO, w_OD) if need_x else None, matmul(grad_TO.T, x_TD) if need_w else None


def linear(x_TD: Tensor, w_OD: Tensor) -> Tensor:
    """See reference.linear."""
    if upcasts(x_TD.device, x_TD.dtype):
        return _UpcastLinear.apply(x_TD, w_OD)
    return F.linear(x_TD, w_OD)


def swiglu(x_TD: Tensor, w13_2FD: Tensor, w2_DF: Tensor) -> Tensor:
    """See reference.swiglu. Gate and up in one product."""
    gate_TF, up_TF = linear(x_TD, w13_2FD.flatten(0, 1)).chunk(2, dim=-1)
    return linear(F.silu(gate_TF) * up_TF, w2_DF)


class _RMSNorm(torch.autograd.Function):
    """Backward by its formula: five passes over [T, D] instead of autograd's dozen."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        x = x_TD.float()
        scale_T1 = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x_TD, weight_D, scale_T1)
        return (x * scale_T1).to(x_TD.dtype) * weight_D

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor | None, ...]:
        x_TD, weight_D, scale_T1 = ctx.saved_tensors
        normed_TD = x_TD.float() * scale_T1
        grad = grad_TD.float()
        grad_normed_TD = grad * weight_D
        along_T1 = torch.linalg.vecdot(grad_normed_TD, normed_TD).unsqueeze(-1).div_(normed_TD.shape[-1])
        grad_weight_D = (grad * normed_TD).sum(0).to(weight_D.dtype) if ctx.needs_input_grad[1] else None
        grad_x_TD = grad_normed_TD.sub_(normed_TD.mul_(along_T1)).mul_(scale_T1)
        return grad_x_TD.to(x_TD.dtype), grad_weight_D, None


def rms_norm(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """See reference.rms_norm."""
    return _RMSNorm.apply(x_TD, weight_D, eps)


def _rotate(x_THC: Tensor, cos_T1C: Tensor, sin_T1C: Tensor) -> Tensor:
    first, second = x_THC.chunk(2, dim=-1)
    out_THC = torch.empty(x_THC.shape, dtype=x_THC.dtype, device=x_THC.device)
    out_first, out_second = out_THC.chunk(2, dim=-1)
    torch.mul(first, cos_T1C, out=out_first).sub_(second * sin_T1C)
    torch.mul(second, cos_T1C, out=out_second).add_(first * sin_T1C)
    return out_THC


class _Rotary(torch.autograd.Function):
    """A rotation: its gradient is the rotation by the opposite angle."""

    @staticmethod
    def forward(ctx: Any, x_THC: Tensor, cos_TC: Tensor, sin_TC: Tensor) -> Tensor:
        cos_T1C, sin_T1C = cos_TC[:, None].to(x_THC.dtype), sin_TC[:, None].to(x_THC.dtype)
        ctx.save_for_backward(cos_T1C, sin_T1C)
        return _rotate(x_THC, cos_T1C, sin_T1C)

    @staticmethod
    def backward(ctx: Any, grad_THC: Tensor) -> tuple[Tensor | None, ...]:
        cos_T1C, sin_T1C = ctx.saved_tensors
        return _rotate(grad_THC, cos_T1C, -sin_T1C), None, None


def rotary(x_THC: Tensor, cos_TC: Tensor, sin_TC: Tensor) -> Tensor:
    """See reference.rotary."""
    return _Rotary.apply(x_THC, cos_TC, sin_TC)
