"""What one layer's routing says about its experts: numbers to log, pure functions of Routing.

Legend: T tokens, E experts, K experts a token.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mixtral.moe.choice import counts_of, taken
from mixtral.moe.losses import score_shares, share_of
from mixtral.moe.router import Routing

DEAD_SHARE = 0.01


class LayerStats(NamedTuple):
    """One layer, one batch."""

    load: list[float]  # share of assignments of each expert, those that capacity dropped included, summing to 1
    max_over_mean: float  # 1 at balance, E when one expert takes everything
    gini: float  # 0 at balance, (E - 1) / E when one expert takes everything
    entropy: float  # of the router's scores, mean over tokens, as a share of ln E: 1 undecided, 0 certain
    repeats: float  # share of consecutive tokens with the same first choice (arXiv 2401.04088, table 5); 1/E by chance
    repeats_any: float  # share of consecutive tokens with a choice in common; 1 - C(E-K, K) / C(E, K) by chance
    dead: int  # experts with next to no tokens, or whose outputs have faded to next to nothing
    output_norms: list[float] | None = None  # mean norm of each expert's output rows, when they were watched
    dropped: float = 0.0  # share of the assignments that no capacity was left for


def gini(load_E: Tensor) -> float:
    """Gini coefficient of a distribution over experts: mean absolute difference over twice the mean."""
    n = load_E.numel()
    differences = (load_E[:, None] - load_E[None, :]).abs().sum()
    return float(differences / (2 * n * load_E.sum().clamp(min=1e-12)))


def score_entropy(routing: Routing) -> float:
    """Entropy of normalised scores, mean over tokens, divided by its maximum ln E."""
    p_TE = score_shares(routing.scores_TE)
    return float(torch.special.entr(p_TE).sum(-1).mean() / torch.tensor(float(p_TE.shape[1])).log())


class Repeats(NamedTuple):
    """How often neighbouring tokens of one sequence make the same choice (arXiv 2401.04088, table 5); sums add up."""

    pairs: int = 0
    first: int = 0  # pairs with the same first choice
    any: int = 0  # pairs with an expert in common: with two experts a token, the table's "first or second choice"

    def plus(self, other: Repeats) -> Repeats:
        return Repeats(self.pairs + other.pairs, self.first + other.first, self.any + other.any)

    @property
    def first_share(self) -> float:
        """1 / E by chance; 0 without pairs."""
        return self.first / max(1, self.pairs)

    @property
    def any_share(self) -> float:
        """1 - C(E - K, K) / C(E, K) by chance, 13/28 for two of 8 experts; 0 without pairs."""
        return self.any / max(1, self.pairs)


def count_repeats(routing: Routing, cu_seqlens: Tensor) -> Repeats:
    """Count over the pairs (token, next token) that lie in one sequence, by what the router chose."""
    first_T = routing.chosen_TK[:, 0]
    same_first = (first_T[1:] == first_T[:-1]) & (first_T[1:] >= 0)
    taken_TE = taken(routing.chosen_TK, routing.logits_TE.shape[1])
    overlap = (taken_TE[1:] & taken_TE[:-1]).any(1)
    inside = torch.ones_like(overlap)
    ends = cu_seqlens[1:-1].to(inside.device, torch.int64)
    inside[(ends[(ends > 0) & (ends < len(first_T))]) - 1] = False
    return Repeats(*(int(pairs.sum()) for pairs in (inside, same_first & inside, overlap & inside)))


def dropped_share(routing: Routing) -> float:
    """The share of assignments that capacity dropped."""
    chosen, computed = (int((experts_TK >= 0).sum()) for experts_TK in (routing.chosen_TK, routing.experts_TK))
    return (chosen - computed) / max(1, chosen)


def dead_experts(load_E: Tensor, norms_E: Tensor | None) -> int:
    """Experts under DEAD_SHARE of the fair load, or of the layer's median output norm when norms are known."""
    dead_E = load_E * load_E.numel() < DEAD_SHARE
    if norms_E is not None:
        dead_E = dead_E | (norms_E < DEAD_SHARE * norms_E.median())
    return int(dead_E.sum())


@torch.no_grad()
def layer_stats(routing: Routing, cu_seqlens: Tensor, norms_E: Tensor | None = None) -> LayerStats:
    """All of LayerStats for one layer's routing of a packed batch; `norms_E` as train/expert_norms.py takes them."""
    load_E = share_of(counts_of(routing.chosen_TK, routing.logits_TE.shape[1]))
    repeats = count_repeats(routing, cu_seqlens)
    return LayerStats(
        load=[round(x, 6) for x in load_E.tolist()],
        max_over_mean=float(load_E.max() * load_E.numel()),
        gini=gini(load_E),
        entropy=score_entropy(routing),
        repeats=repeats.first_share,
        repeats_any=repeats.any_share,
        dead=dead_experts(load_E, norms_E),
        output_norms=None if norms_E is None else [round(x, 6) for x in norms_E.tolist()],
        dropped=dropped_share(routing),
    )
