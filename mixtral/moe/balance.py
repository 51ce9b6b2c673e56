"""Balancing objectives: pure functions of routing, each per layer.

Legend: T tokens, E experts, K experts a token.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mixtral.moe.router import Routing


def assignment_counts(routing: Routing) -> Tensor:
    """How many assignments each expert received -> int64 [E]; unused places do not count.

    Not by bincount, whose size hangs on the values: on a GPU the host would wait for them.
    """
    n_experts = routing.logits_TE.shape[1]
    place_N = routing.experts_TK.flatten() + 1  # place 0 counts the unused
    return place_N.new_zeros(n_experts + 1).scatter_add_(0, place_N, torch.ones_like(place_N))[1:]


def assignment_share(routing: Routing, mask_T: Tensor | None = None) -> Tensor:
    """The share of assignments that each expert received -> fp32 [E], summing to 1, over the tokens of the mask."""
    if mask_T is not None:
        routing = routing._replace(experts_TK=routing.experts_TK[mask_T])
    counts_E = assignment_counts(routing).float()
    return counts_E / counts_E.sum().clamp(min=1)


def _mean(values_T: Tensor) -> Tensor:
    """Mean over tokens; 0, not NaN, when none counts."""
    return values_T.sum(0) / max(1, len(values_T))


def load_balance(routing: Routing, mask_T: Tensor | None = None) -> Tensor:
    """E * sum over experts of f * p for one layer (arXiv 2101.03961, equation 4).

    f is the share of assignments an expert received, p its mean score. 1 at balance for any E and K; E / K when all
    tokens put all their score on the same K experts. Gradients flow through p alone.

    Args:
        mask_T: bool, the tokens that count (padding does not). Packed batches need none.
    """
    scores_TE = routing.scores_TE if mask_T is None else routing.scores_TE[mask_T]
    return scores_TE.shape[1] * (assignment_share(routing, mask_T) @ _mean(scores_TE))


def z_loss(routing: Routing, mask_T: Tensor | None = None) -> Tensor:
    """Mean over tokens of (logsumexp of the router's logits) squared (arXiv 2202.08906, equation 5)."""
    logits_TE = routing.logits_TE if mask_T is None else routing.logits_TE[mask_T]
    return _mean(logits_TE.logsumexp(-1).square())


def load_balance_hf(routings: Sequence[Routing], mask_T: Tensor | None = None) -> Tensor:
    """The form of transformers' `load_balancing_loss_func`, for parity: all layers pooled before the product.

    K at balance, not 1; and layers that each collapse on experts of their own look balanced to it. Train with
    `load_balance`.
    """
    n_experts, k = routings[0].logits_TE.shape[1], routings[0].experts_TK.shape[1]
    pooled = Routing(*(torch.cat(parts) for parts in zip(*routings, strict=True)))
    mask = None if mask_T is None else mask_T.repeat(len(routings))
    scores_TE = pooled.scores_TE if mask is None else pooled.scores_TE[mask]
    return n_experts * k * (assignment_share(pooled, mask) @ _mean(scores_TE))
