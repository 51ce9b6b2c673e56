"""Moving rows between token order and expert order on torch. Both directions are gathers, forward and backward, so
they are deterministic; a scatter-add would sum a token's gradients in whatever order the threads arrive.

Legend: T tokens, D model width, K experts a token, N routed rows (T * K).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, order_N: Tensor, place_TK: Tensor) -> Tensor:
        ctx.save_for_backward(place_TK)
        return x_TD.index_select(0, order_N // place_TK.shape[1])

    @staticmethod
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor | None, ...]:
        (place_TK,) = ctx.saved_tensors
        grad_TD = grad_ND.index_select(0, place_TK[:, 0])
        for k in range(1, place_TK.shape[1]):
            grad_TD = grad_TD + grad_ND.index_select(0, place_TK[:, k])
        return grad_TD, None, None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y_ND: Tensor, weights_TK: Tensor, order_N: Tensor, place_TK: Tensor) -> Tensor:
        ctx.save_for_backward(y_ND, weights_TK, order_N, place_TK)
        # multiply, then add, choice by choice: the naive loop's own order and roundings, so equal to it bit for bit
        out_TD = y_ND.index_select(0, place_TK[:, 0]).float() * weights_TK[:, 0, None]
        for k in range(1, place_TK.shape[1]):
            out_TD += y_ND.index_select(0, place_TK[:, k]).float() * weights_TK[:, k, None]
        return out_TD.to(y_ND.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor | None, ...]:
        y_ND, weights_TK, order_N, place_TK = ctx.saved_tensors
        grad_TD = grad_TD.float()
        grad_weights_TK = torch.empty_like(weights_TK)
        for k in range(place_TK.shape[1]):
            y_TD = y_ND.index_select(0, place_TK[:, k]).float()
            torch.sum(y_TD.mul_(grad_TD), dim=1, out=grad_weights_TK[:, k])
        grad_rows_ND = grad_TD.index_select(0, order_N // place_TK.shape[1])
        grad_rows_ND *= weights_TK.flatten()[order_N, None]
        return grad_rows_ND.to(y_ND.dtype), grad_weights_TK, None, None


def gather_rows(x_TD: Tensor, order_N: Tensor, place_TK: Tensor) -> Tensor:
    """See reference.gather_rows."""
    return _GatherRows.apply(x_TD, order_N, place_TK)


def combine(y_ND: Tensor, weights_TK: Tensor, order_N: Tensor, place_TK: Tensor) -> Tensor:
    """See reference.combine."""
    return _Combine.apply(y_ND, weights_TK, order_N, place_TK)
