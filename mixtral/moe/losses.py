"""Balancing losses: pure functions of routing, each of one layer. The rules that need no loss are in updates.py.

Assignments are those of `chosen_TK`, what the router chose: counted after a capacity dropped a part, an overloaded
expert would look as if it had no more than its capacity (arXiv 2101.03961, equation 5).

Legend: T tokens, E experts, K experts a token, M domains.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mixtral.moe.choice import counts_of
from mixtral.moe.router import Routing


def share_of(counts_E: Tensor) -> Tensor:
    """Counts of assignments -> fp32 [E], summing to 1, or zeros when nothing was assigned."""
    return counts_E.float() / counts_E.float().sum().clamp(min=1)


def _mean(values_T: Tensor) -> Tensor:
    """Mean over tokens; 0, not NaN, when none counts."""
    return values_T.sum(0) / max(1, len(values_T))


def score_shares(scores_TE: Tensor) -> Tensor:
    """Each token's scores as shares of their sum, so that losses mean the same for sigmoid scores (arXiv 2412.19437).

    Softmax scores pass untouched, to the bit.
    """
    sum_T1 = scores_TE.sum(-1, keepdim=True)
    return torch.where((sum_T1 - 1).abs() < 1e-5, scores_TE, scores_TE / sum_T1.clamp(min=1e-20))


def load_balance(routing: Routing, mask_T: Tensor | None = None, counts_E: Tensor | None = None) -> Tensor:
    """E * sum over experts of f * p for one layer (arXiv 2101.03961, equation 4).

    f is the share of assignments given to an expert, p its mean share of the score. 1 at balance for any E and K; E / K
    when all tokens put all their score on the same K experts. Gradients flow through p alone.

    Args:
        mask_T: bool, the tokens that count (padding does not). Ragged batches need none.
        counts_E: assignments to take f from, instead of this routing's own: those of the whole global batch, of which
            this is a part (arXiv 2501.11873). The mean of the parts' losses, weighted by their tokens, is then the
            loss of the whole batch, and so are the gradients.
    """
    scores_TE, chosen_TK = routing.scores_TE, routing.chosen_TK
    if mask_T is not None:
        scores_TE, chosen_TK = scores_TE[mask_T], chosen_TK[mask_T]
    n_experts = scores_TE.shape[1]
    counts_E = counts_of(chosen_TK, n_experts) if counts_E is None else counts_E
    return n_experts * (share_of(counts_E) @ _mean(score_shares(scores_TE)))


def z_loss(routing: Routing, mask_T: Tensor | None = None) -> Tensor:
    """Mean over tokens of (logsumexp of the router's logits) squared (arXiv 2202.08906, equation 5)."""
    logits_TE = routing.logits_TE if mask_T is None else routing.logits_TE[mask_T]
    return _mean(logits_TE.logsumexp(-1).square())


def guidance(routing: Routing, domains_T: Tensor, groups_ME: Tensor) -> Tensor:
    """Supervised specialisation: mean over tokens of -log of the score mass on the experts of the token's domain.

    The cross-entropy of "which group does this token belong to" under the router's own distribution. 0 when all mass
    lies on the right groups; -log(size of the group / E) for uniform scores.

    Args:
        domains_T: int64, the domain of each token, -1: unknown, does not count.
        groups_ME: bool, the experts that each domain is to use.
    """
    inside_TE = groups_ME[domains_T.clamp(min=0)]
    mass_T = (score_shares(routing.scores_TE) * inside_TE).sum(-1).clamp(min=1e-20)
    known_T = domains_T >= 0
    return -(mass_T.log() * known_T).sum() / known_T.sum().clamp(min=1)


def k_price(k_T: Tensor, target: float | None = None) -> Tensor:
    """What a learned number of experts costs: its mean over tokens, or that mean's squared distance from a target."""
    mean = _mean(k_T)
    return mean if target is None else (mean - target).square()


def load_balance_hf(routings: Sequence[Routing], mask_T: Tensor | None = None) -> Tensor:
    """The form of transformers' `load_balancing_loss_func`, for parity: all layers pooled before the product.

    K at balance, not 1; and layers that each collapse on experts of their own look balanced to it. Train with
    `load_balance`.
    """
    n_experts, k = routings[0].logits_TE.shape[1], routings[0].chosen_TK.shape[1]
    scores_TE = torch.cat([routing.scores_TE for routing in routings])
    chosen_TK = torch.cat([routing.chosen_TK for routing in routings])
    if mask_T is not None:
        mask = mask_T.repeat(len(routings))
        scores_TE, chosen_TK = scores_TE[mask], chosen_TK[mask]
    return n_experts * k * (share_of(counts_of(chosen_TK, n_experts)) @ _mean(scores_TE))
