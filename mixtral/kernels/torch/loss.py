"""Cross-entropy fused with the output projection: [T, V] logits are never held whole.

Legend: T tokens, D model width, V vocabulary, t tokens of one block.
"""

from __future__ import annotations

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
    def forward(ctx: Any, h_TD: Tensor, w_VD: Tensor, targets_T: Tensor, training: bool) -> Tensor:
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
            loss, grad_tV = _block((h_tD @ w_p.T).float(), target_t, need_h or need_w)
            total += loss
            if grad_tV is None:
                continue
            grad_tV = grad_tV.div_(count).to(product)
            if grad_h_TD is not None:
                grad_h_TD[begin : begin + size] = grad_tV @ w_p
            if grad_w_VD is not None:
                grad_w_VD += grad_tV.T @ h_tD
        ctx.save_for_backward(*(g for g in (grad_h_TD, grad_w_VD) if g is not None))
        ctx.w_dtype = w_VD.dtype
        return total / count

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        saved = list(ctx.saved_tensors)
        grad_h_TD = saved.pop(0) * grad if ctx.needs_input_grad[0] else None
        grad_w_VD = (saved.pop(0) * grad).to(ctx.w_dtype) if ctx.needs_input_grad[1] else None
        return grad_h_TD, grad_w_VD, None, None


def _block(logits_tV: Tensor, target_t: Tensor, need_grad: bool) -> tuple[Tensor, Tensor | None]:
    """Summed loss of one block, and softmax minus the target's one-hot (zero rows where there is no target)."""
    counted_t = target_t != -100
    index_t1 = target_t.where(counted_t, 0)[:, None]  # any other target outside the vocabulary is refused by gather
    top_t1 = logits_tV.amax(-1, keepdim=True)
    picked_t = (logits_tV.gather(1, index_t1) - top_t1)[:, 0]
    logits_tV.sub_(top_t1).exp_()
    sum_t1 = logits_tV.sum(-1, keepdim=True)
    loss = ((sum_t1[:, 0].log() - picked_t) * counted_t).sum()
    if not need_grad:
        return loss, None
    logits_tV.div_(sum_t1)
    logits_tV.scatter_add_(1, index_t1, -torch.ones_like(sum_t1))
    return loss, logits_tV.mul_(counted_t[:, None])


def cross_entropy(h_TD: Tensor, w_VD: Tensor, targets_T: Tensor) -> Tensor:
    """See reference.cross_entropy."""
    return _CrossEntropy.apply(h_TD, w_VD, targets_T, torch.is_grad_enabled())
