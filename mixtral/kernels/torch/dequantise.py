"""Products with packed weights where there is no native code: the matrix is expanded to fp32 for the product alone.

The input is rounded as native code rounds it, so the result differs from native code's in the order of sums alone.

Legend: T rows, N outputs, D inputs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mixtral.kernels.packing import DTYPES, GROUP, LANES, quantise_rows, unpack

_BLOCK_BYTES = 32 * 2**20  # of a weight expanded at once for a gradient


def expand(packed: Tensor, name: str, n: int, d: int) -> Tensor:
    """What a packed matrix, or a stack of them, stands for -> fp32 [..., n, d]."""
    values_ND, scale_NG = unpack(packed, name, n, d)
    if scale_NG is None:
        return values_ND.float()
    return values_ND.float().mul_(scale_NG.repeat_interleave(GROUP, dim=-1)[..., :d])


def with_gradient(product: Callable[..., Tensor], x_TD: Tensor, packed: Tensor, name: str, n: int) -> Tensor:
    """The product, with the gradient of x that the expanded weight gives: rounding of x passes it through."""
    if torch.is_grad_enabled() and x_TD.requires_grad:
        return _WithGradient.apply(product, x_TD, packed, name, n)
    return product(x_TD, packed, name, n)


class _WithGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, product: Callable[..., Tensor], x_TD: Tensor, packed: Tensor, name: str, n: int) -> Tensor:
        ctx.save_for_backward(packed)
        ctx.dtype, ctx.shape = x_TD.dtype, (name, n, x_TD.shape[1])
        return product(x_TD, packed, name, n)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TN: Tensor) -> tuple[Tensor | None, ...]:
        (packed,), (name, n, d) = ctx.saved_tensors, ctx.shape
        grad_TD = grad_TN.new_zeros(len(grad_TN), d)
        blocks = max(1, _BLOCK_BYTES // (4 * LANES * d))
        for first in range(0, len(packed), blocks):  # the weight is never whole in fp32
            columns = slice(first * LANES, min(n, (first + blocks) * LANES))
            w_ND = expand(packed[first : first + blocks], name, columns.stop - columns.start, d)
            grad_TD += grad_TN[:, columns] @ w_ND
        return None, grad_TD.to(ctx.dtype), None, None, None


def packed_linear(x_TD: Tensor, packed: Tensor, name: str, n: int) -> Tensor:
    """See packing.packed_linear."""
    return with_gradient(_packed_linear, x_TD, packed, name, n)


def _packed_linear(x_TD: Tensor, packed: Tensor, name: str, n: int) -> Tensor:
    if name in DTYPES:
        rounded_TD = (x_TD.to(torch.bfloat16) if name == "bf16" else x_TD).float()
    else:
        qx_TD, sx_TG = quantise_rows(x_TD)
        rounded_TD = qx_TD.float().mul_(sx_TG.repeat_interleave(GROUP, dim=1)[:, : x_TD.shape[1]])
    return rounded_TD @ expand(packed, name, n, x_TD.shape[1]).T
