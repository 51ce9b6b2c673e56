"""The experts op on torch: stacked SwiGLU networks over rows grouped by expert, forward and backward.

Two implementations. `loop`: one product an expert over its run of rows, gradients written straight into the stacked
gradient. `grouped`: one grouped GEMM for all experts. The measurements that choose between them
are in docs/log.md; kernels/__init__.py holds the rule.

Legend: N routed rows, D model width, F expert hidden width, E experts, n rows of one expert.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from mixtral.kernels.table import Call
from mixtral.kernels.torch.matmul import matmul, matmul_into


def _runs(counts: list[int]) -> Iterator[tuple[int, int, int]]:
    """(expert, first row, one past its last row) of each expert that has rows."""
    begin = 0
    for e, count in enumerate(counts):
        if count:
            yield e, begin, begin + count
        begin += count


def _zero_unused(counts: list[int], rows_ND: Tensor | None, *stacked: Tensor | None) -> None:
    """Zero what no product will write: rows past the last run, and the gradients of experts without rows."""
    if rows_ND is not None:
        rows_ND[sum(counts) :] = 0
    for e, count in enumerate(counts):
        for gradient in stacked:
            if count == 0 and gradient is not None:
                gradient[e] = 0


def _hidden(h_n2F: Tensor) -> Tensor:
    gate_nF, up_nF = h_n2F.chunk(2, dim=-1)
    return F.silu(gate_nF).mul_(up_nF)


def _hidden_backward(grad_nF: Tensor, h_n2F: Tensor) -> tuple[Tensor, Tensor]:
    gate_nF, up_nF = h_n2F.chunk(2, dim=-1)
    silu_nF = F.silu(gate_nF)
    grad_n2F = torch.empty_like(h_n2F)
    grad_gate_nF, grad_up_nF = grad_n2F.chunk(2, dim=-1)
    torch.mul(grad_nF, silu_nF, out=grad_up_nF)
    torch.ops.aten.silu_backward.grad_input(grad_nF * up_nF, gate_nF, grad_input=grad_gate_nF)
    return silu_nF.mul_(up_nF), grad_n2F


class _ExpertsLoop(torch.autograd.Function):
    """One product an expert. Autograd through `w13[e]` would build a full-size gradient for every expert selected."""

    @staticmethod
    def forward(ctx: Any, rows_ND: Tensor, counts_E: Tensor, w13_E2FD: Tensor, w2_EDF: Tensor) -> Tensor:
        counts = counts_E.tolist()  # the one host synchronisation, of the backward pass too
        w13_EHD = w13_E2FD.flatten(1, 2)
        h_N2F = rows_ND.new_empty(len(rows_ND), w13_EHD.shape[1])
        y_ND = torch.empty_like(rows_ND)
        end = 0
        for e, begin, end in _runs(counts):
            matmul_into(h_N2F[begin:end], rows_ND[begin:end], w13_EHD[e].T)
            matmul_into(y_ND[begin:end], _hidden(h_N2F[begin:end]), w2_EDF[e].T)
        y_ND[end:] = 0
        ctx.save_for_backward(rows_ND, w13_E2FD, w2_EDF, h_N2F)
        ctx.counts = counts
        return y_ND

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y_ND: Tensor) -> tuple[Tensor | None, ...]:
        rows_ND, w13_E2FD, w2_EDF, h_N2F = ctx.saved_tensors
        w13_EHD = w13_E2FD.flatten(1, 2)
        need_rows, _, need_w13, need_w2 = ctx.needs_input_grad
        grad_rows_ND = torch.empty_like(rows_ND) if need_rows else None
        grad_w13_EHD = torch.empty_like(w13_EHD) if need_w13 else None
        grad_w2_EDF = torch.empty_like(w2_EDF) if need_w2 else None
        _zero_unused(ctx.counts, grad_rows_ND, grad_w13_EHD, grad_w2_EDF)
        grad_y_ND = grad_y_ND.contiguous()
        for e, begin, end in _runs(ctx.counts):
            grad_y_nD = grad_y_ND[begin:end]
            grad_nF = matmul(grad_y_nD, w2_EDF[e])
            hidden_nF, grad_h_n2F = _hidden_backward(grad_nF, h_N2F[begin:end])
            if grad_w2_EDF is not None:
                matmul_into(grad_w2_EDF[e], grad_y_nD.T, hidden_nF)
            if grad_w13_EHD is not None:
                matmul_into(grad_w13_EHD[e], grad_h_n2F.T, rows_ND[begin:end])
            if grad_rows_ND is not None:
                matmul_into(grad_rows_ND[begin:end], grad_h_n2F, w13_EHD[e])
        grad_w13 = None if grad_w13_EHD is None else grad_w13_EHD.view_as(w13_E2FD)
        return grad_rows_ND, None, grad_w13, grad_w2_EDF


def experts_loop(rows_ND: Tensor, counts_E: Tensor, w13_E2FD: Tensor, w2_EDF: Tensor) -> Tensor:
    """See reference.experts."""
    return _ExpertsLoop.apply(rows_ND, counts_E, w13_E2FD, w2_EDF)


def experts_grouped(rows_ND: Tensor, counts_E: Tensor, w13_E2FD: Tensor, w2_EDF: Tensor) -> Tensor:
    """See reference.experts. One grouped GEMM for gate and up, one for down; no host synchronisation.

    Rows past the last expert's run are left undefined by a grouped GEMM, forward and backward, so each is masked.
    """
    ends_E = counts_E.cumsum(0, dtype=torch.int32)
    unrouted_N1 = (torch.arange(len(rows_ND), device=rows_ND.device) >= ends_E[-1])[:, None]
    rows_ND = rows_ND.masked_fill(unrouted_N1, 0)
    h_N2F = F.grouped_mm(rows_ND, w13_E2FD.flatten(1, 2).transpose(1, 2), offs=ends_E).masked_fill(unrouted_N1, 0)
    gate_NF, up_NF = h_N2F.chunk(2, dim=-1)
    return F.grouped_mm(F.silu(gate_NF) * up_NF, w2_EDF.transpose(1, 2), offs=ends_E).masked_fill(unrouted_N1, 0)


def experts_decode(x_TD: Tensor, weights_TK: Tensor, experts_TK: Tensor, w13_E2FD: Tensor, w2_EDF: Tensor) -> Tensor:
    """A few tokens without gradients: each assignment is two matrix-vector products, no sorting -> [T, D]."""
    out = []
    for x_D, weights_K, choice in zip(x_TD, weights_TK, experts_TK.tolist(), strict=True):
        y_D = torch.zeros(x_D.shape, dtype=torch.float32, device=x_D.device)
        for weight, e in zip(weights_K, choice, strict=True):
            if e >= 0:
                hidden_1F = _hidden(matmul(x_D[None], w13_E2FD[e].flatten(0, 1).T))
                y_D = y_D + weight * matmul(hidden_1F, w2_EDF[e].T)[0].float()
        out.append(y_D.to(x_TD.dtype))
    return torch.stack(out) if out else x_TD


def grouped_supports(call: Call) -> str:
    """The measured rule (docs/log.md, 2026-11-21): on a CPU the loop was as fast, at the one size tried."""
    if not hasattr(torch.nn.functional, "grouped_mm"):
        return "this torch has no grouped_mm"
    if call.device.type != "cuda":
        return "measured no faster than the loop off CUDA"
    return "" if call.dtype == torch.bfloat16 else "CUDA's grouped GEMM takes bf16 alone"
