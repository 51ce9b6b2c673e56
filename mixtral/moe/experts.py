"""Experts: stacked SwiGLU networks over rows grouped by expert, and the dense network of a model without routing.

Legend: T tokens, D model width, F expert hidden width, E experts, K experts a token, N routed rows.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mixtral import kernels
from mixtral.moe.router import Routing


class Experts(nn.Module):
    """E networks w2(silu(w1 x) * w3 x) without biases; gate (w1) and up (w3) are fused as w13 [E, 2, F, D]."""

    def __init__(self, n_experts: int, dim: int, ffn_dim: int) -> None:
        super().__init__()
        self.w13 = nn.Parameter(torch.empty(n_experts, 2, ffn_dim, dim))
        self.w2 = nn.Parameter(torch.empty(n_experts, dim, ffn_dim))

    def forward(self, rows_ND: Tensor, counts_E: Tensor) -> Tensor:
        """Rows grouped by expert, and how many each has -> outputs [N, D] in the same order."""
        return kernels.experts(rows_ND, counts_E, self.w13, self.w2)

    def decode(self, x_TD: Tensor, routing: Routing) -> Tensor | None:
        """dispatch, forward and combine in one, where that is faster; None where it is not, and the caller dispatches.

        On a CPU, for one token without gradients: as soon as two tokens share an expert, reading its weights once for
        both beats the sorting that it takes (docs/log.md, 2026-11-21). A subclass has a forward pass of its own, of
        which this knows nothing.
        """
        if torch.is_grad_enabled() or len(x_TD) != 1 or x_TD.device.type != "cpu" or type(self) is not Experts:
            return None
        return kernels.experts_decode(x_TD, routing.weights_TK, routing.experts_TK, self.w13, self.w2)


class FeedForward(nn.Module):
    """The dense network of Mistral 7B: one expert that every token takes."""

    def __init__(self, dim: int, ffn_dim: int) -> None:
        super().__init__()
        self.w13 = nn.Parameter(torch.empty(2, ffn_dim, dim))
        self.w2 = nn.Parameter(torch.empty(dim, ffn_dim))

    def forward(self, x_TD: Tensor) -> Tensor:
        return kernels.swiglu(x_TD, self.w13, self.w2)
