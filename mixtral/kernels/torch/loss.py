"""Cross-entropy fused with the output projection: [T, V] logits are never held whole.

Legend: T tokens, D model width, V vocabulary, t tokens of one block.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mixtral.kernels.torch.matmul import upcasts

_BLOCK_BYTES = 32 * 2**20  # fp32 logits of one block: large enough for the product, small enough to stay near the cache


class _CrossEntropy(torch.autograd.Function):
    """Loss and gradients block by block in the forward pass: a block's logits are used up while they are warm.

    The gradients are then only scaled in the backward pass. Three products in all, as many as the plain form takes.
    """

    @staticmethod
    def forward(
        ctx: Any, h_TD: Tensor, w_VD: Tensor, targets_T: Tensor, weights_T: Tensor | None, training: bool
    ) -> Tensor:
        need_h, need_w = h_TD.requires_grad and training, w_VD.requires_grad and training
        count = (targets_T != -100).sum().clamp(min=1)
        product = torch.float32 if upcasts(h_TD.device, h_TD.dtype) else h_TD.dtype
        w_p = w_VD.to(product)
        grad_h_TD = torch.empty_like(h_TD) if need_h else None
        grad_w_VD = torch.zeros_like(w_VD, dtype=torch.float32) if need_w else None
        total = torch.zeros((), dtype=torch.float32, device=h_TD.device)
        size = max(1, _BLOCK_BYTES // (4 * w_VD.shape[0]))
        for begin in range(0, len(h_TD), size):
            h_tD, target_t = h_TD[begin : begin + size].to(product), targets_T[begin : begin + size]
            nll_t, grad_tV = _block((h_tD @ w_p.T).float(), target_t, need_h or need_w)
            weight_t = None if weights_T is None else weights_T[begin : begin + size].float()
            total += (nll_t if weight_t is None else nll_t * weight_t).sum()
            if grad_tV is None:
                continue
            grad_tV = grad_tV.div_(count) if weight_t is None else grad_tV.mul_(weight_t[:, None])
            grad_tV = grad_tV.to(product)
            if grad_h_TD is not None:
                grad_h_TD[begin : begin + size] = grad_tV @ w_p
            if grad_w_VD is not None:
                grad_w_VD += grad_tV.T @ h_tD
        ctx.save_for_backward(*(g for g in (grad_h_TD, grad_w_VD) if g is not None))
        ctx.w_dtype = w_VD.dtype
        return total / count if weights_T is None else total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        saved = list(ctx.saved_tensors)
        grad_h_TD = saved.pop(0) * grad if ctx.needs_input_grad[0] else None
        grad_w_VD = (saved.pop(0) * grad).to(ctx.w_dtype) if ctx.needs_input_grad[1] else None
        return grad_h_TD, grad_w_VD, None, None, None


class _TokenNLL(torch.autograd.Function):
    """-log p of each target. The backward pass makes each block's logits again: one product more than _CrossEntropy."""

    @staticmethod
    def forward(ctx: Any, h_TD: Tensor, w_VD: Tensor, targets_T: Tensor) -> Tensor:
        ctx.save_for_backward(h_TD, w_VD, targets_T)
        nll_T = torch.empty(len(h_TD), dtype=torch.float32, device=h_TD.device)
        for rows, h_tD, w_p in _TokenNLL.blocks(h_TD, w_VD):
            nll_T[rows], _ = _block((h_tD @ w_p.T).float(), targets_T[rows], need_grad=False)
        return nll_T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_T: Tensor) -> tuple[Tensor | None, ...]:
        h_TD, w_VD, targets_T = ctx.saved_tensors
        need_h, need_w, _ = ctx.needs_input_grad
        grad_h_TD = torch.empty_like(h_TD) if need_h else None
        grad_w_VD = torch.zeros_like(w_VD, dtype=torch.float32) if need_w else None
        for rows, h_tD, w_p in _TokenNLL.blocks(h_TD, w_VD):
            _, grad_tV = _block((h_tD @ w_p.T).float(), targets_T[rows], need_grad=True)
            assert grad_tV is not None
            grad_tV = grad_tV.mul_(grad_T[rows, None]).to(h_tD.dtype)
            if grad_h_TD is not None:
                grad_h_TD[rows] = (grad_tV @ w_p).to(grad_h_TD.dtype)
            if grad_w_VD is not None:
                grad_w_VD += grad_tV.T @ h_tD
        return grad_h_TD, None if grad_w_VD is None else grad_w_VD.to(w_VD.dtype), None

    @staticmethod
    def blocks(h_TD: Tensor, w_VD: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """(which rows, those rows, the weight) of each block, in the dtype that products have here."""
        product = torch.float32 if upcasts(h_TD.device, h_TD.dtype) else h_TD.dtype
        w_p, size = w_VD.to(product), max(1, _BLOCK_BYTES // (4 * w_VD.shape[0]))
        for begin in range(0, len(h_TD), size):
            rows = slice(begin, begin + size)
            yield rows, h_TD[rows].to(product), w_p


def _block(logits_tV: Tensor, target_t: Tensor, need_grad: bool) -> tuple[Tensor, Tensor | None]:
    """-log p of each target of one block (0 where there is none), and softmax minus its one-hot (a zero row there)."""
    counted_t = target_t != -100
    index_t1 = target_t.where(counted_t, 0)[:, None]  # any other target outside the vocabulary is refused by gather
    top_t1 = logits_tV.amax(-1, keepdim=True)
    picked_t = (logits_tV.gather(1, index_t1) - top_t1)[:, 0]
    logits_tV.sub_(top_t1).exp_()
    sum_t1 = logits_tV.sum(-1, keepdim=True)
    nll_t = (sum_t1[:, 0].log() - picked_t) * counted_t
    if not need_grad:
        return nll_t, None
    logits_tV.div_(sum_t1)
    logits_tV.scatter_add_(1, index_t1, -torch.ones_like(sum_t1))
    return nll_t, logits_tV.mul_(counted_t[:, None])


def cross_entropy(h_TD: Tensor, w_VD: Tensor, targets_T: Tensor, weights_T: Tensor | None = None) -> Tensor:
    """See reference.cross_entropy."""
    return _CrossEntropy.apply(h_TD, w_VD, targets_T, weights_T, torch.is_grad_enabled())


def token_nll(h_TD: Tensor, w_VD: Tensor, targets_T: Tensor) -> Tensor:
    """See reference.token_nll."""
    return _TokenNLL.apply(h_TD, w_VD, targets_T)


def log_sum_exp(x_RN: Tensor) -> Tensor:
    """See reference.log_sum_exp."""
    return x_RN.float().logsumexp(-1)
