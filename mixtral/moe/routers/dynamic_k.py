"""Routers by which a token takes as many experts as it needs; a call's `k` has no meaning to them.

Legend: T tokens, E experts, K the most experts a token may take.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from mixtral.config.router import Bounded, MinP, Threshold, TopP
from mixtral.errors import UsageError
from mixtral.moe.choice import choose_experts, chosen, taken
from mixtral.moe.router import Router


class _NeededRouter(Router):
    """Takes the experts that `_needs` marks, the best first, within bounds."""

    options: Bounded | Threshold

    def _choose(self, logits_TE: Tensor, scores_TE: Tensor, k: int | Tensor | None) -> Tensor:
        if k is not None:
            raise UsageError("router: this router finds the number of experts itself; k cannot be set for it")
        key_TE = logits_TE.masked_fill(~self._needs(logits_TE, scores_TE), float("-inf"))
        return choose_experts(key_TE, self.options.most or self.n_experts)

    def _needs(self, logits_TE: Tensor, scores_TE: Tensor) -> Tensor:
        """-> bool [T, E]."""
        raise NotImplementedError


class TopPRouter(_NeededRouter):
    """The fewest experts whose softmax scores sum to p or more (arXiv 2403.07652), all at p = 1; Mixtral's weights."""

    options: TopP

    def _needs(self, logits_TE: Tensor, scores_TE: Tensor) -> Tensor:
        order_TE = logits_TE.sort(dim=-1, descending=True, stable=True).indices
        sorted_TE = scores_TE.gather(1, order_TE)
        p = self.options.p if self.options.p < 1 else math.inf  # rounded scores may sum to 1 before the last
        sums_TE = sorted_TE.cumsum(-1, dtype=torch.float64)  # in fp32 the smallest would be lost
        needed_TE = nn.functional.pad(sums_TE[:, :-1], (1, 0)) < p  # those before it do not suffice
        needed_TE[:, : self.options.least] = True
        return torch.empty_like(needed_TE).scatter_(1, order_TE, needed_TE)


class MinPRouter(_NeededRouter):
    """Every expert with a softmax score of at least p times the highest; weights are Mixtral's.

    The rule of min-p sampling (arXiv 2407.01082), put to experts.
    """

    options: MinP

    def _needs(self, logits_TE: Tensor, scores_TE: Tensor) -> Tensor:
        del scores_TE  # a ratio of scores is a difference of logits
        needed_TE = logits_TE >= logits_TE.amax(-1, keepdim=True) + math.log(self.options.p)
        return needed_TE | taken(choose_experts(logits_TE, self.options.least), self.n_experts)


class ThresholdRouter(_NeededRouter):
    """Every expert j with s_j > c_j, from none to all; the weight is the score itself (arXiv 2603.11535).

    The buffer c follows each expert's (1 - K/E) quantile of scores while training; the trainer moves it. Scores are a
    softmax over all experts. They are not normalised over the chosen ones: a token that one expert takes barely would
    jump from weight 0 to weight 1.
    """

    options: Threshold
    threshold: Tensor

    def _needs(self, logits_TE: Tensor, scores_TE: Tensor) -> Tensor:
        del logits_TE
        return scores_TE > self.threshold.float()

    def _weights(self, logits_TE: Tensor, scores_TE: Tensor, experts_TK: Tensor) -> Tensor:
        del logits_TE
        return chosen(scores_TE, experts_TK, 0.0)
