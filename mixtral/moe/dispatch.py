"""Dispatch: from token order to rows grouped by expert, and back. Expert parallelism is another Dispatcher.

Legend: T tokens, D model width, E experts, K experts a token, N routed rows (T * K).
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from mixtral import kernels
from mixtral.moe.balance import assignment_counts
from mixtral.moe.router import Routing


class Dispatched(NamedTuple):
    """Rows for the experts, and what the same dispatcher needs to bring their outputs back."""

    rows_ND: Tensor  # grouped by expert, in token order within each; rows of dropped assignments lie at the end
    counts_E: Tensor  # int64, rows of each expert
    weights_TK: Tensor  # fp32
    order_N: Tensor  # int64, the flat assignment (token * K + choice) that each row serves
    place_TK: Tensor  # int64, the row that serves each assignment


class Dispatcher(Protocol):
    """Two verbs and no parameters, so not an nn.Module. Experts never know which dispatcher brought their rows."""

    def dispatch(self, x_TD: Tensor, routing: Routing) -> Dispatched: ...

    def combine(self, y_ND: Tensor, dispatched: Dispatched) -> Tensor:
        """The weighted sum of each token's expert outputs, in fp32 and token order, rounded once -> [T, D]."""
        ...


class LocalDispatcher:
    """All experts in this process, by a stable sort of the assignments. Static shapes, no host synchronisation."""

    def dispatch(self, x_TD: Tensor, routing: Routing) -> Dispatched:
        n_experts, k = routing.logits_TE.shape[1], routing.experts_TK.shape[1]
        expert_N = routing.experts_TK.flatten()
        expert_N = torch.where(expert_N < 0, n_experts, expert_N)
        order_N = expert_N.argsort(stable=True)
        place_N = torch.empty_like(order_N)
        place_N[order_N] = torch.arange(len(order_N), device=order_N.device)
        place_TK = place_N.view(-1, k)
        rows_ND = kernels.gather_rows(x_TD, order_N, place_TK)
        return Dispatched(rows_ND, assignment_counts(routing), routing.weights_TK, order_N, place_TK)

    def combine(self, y_ND: Tensor, dispatched: Dispatched) -> Tensor:
        return kernels.combine(y_ND, dispatched.weights_TK, dispatched.order_N, dispatched.place_TK)
