"""Experts choose tokens.

Legend: T tokens, E experts, K experts a token takes on average, N tokens of an expert.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mixtral.errors import UsageError
from mixtral.moe.choice import choose_experts, chosen
from mixtral.moe.router import Router


class ExpertChoiceRouter(Router):
    """Each expert takes the ceil(T K / E) tokens of its highest softmax scores; weight = the score (arXiv 2202.09368).

    Balanced by construction; a token may get no expert, or all. Which tokens an expert takes depends on later tokens
    of the same sequence, so a model trained so cannot be run token by token: in evaluation mode `forward` refuses.
    """

    def _choose(self, logits_TE: Tensor, scores_TE: Tensor, k: int | Tensor | None) -> Tensor:
        if not self.training:
            raise UsageError(
                "router expert_choice: experts choose among all tokens of a batch, later ones included, which do not "
                "exist yet when a token is generated; it is for training alone (replay an earlier choice to evaluate)"
            )
        mean = self.experts_per_token if k is None else k
        if type(mean) is not int or not 1 <= mean <= self.n_experts:
            raise UsageError(f"router expert_choice: k must be one number for all tokens, 1..{self.n_experts}, not {k}")
        share = math.ceil(len(scores_TE) * mean / self.n_experts)
        tokens_EN = choose_experts(scores_TE.T, share)
        taken_TE = torch.zeros_like(scores_TE, dtype=torch.bool).T.scatter(1, tokens_EN, True).T
        return choose_experts(logits_TE.masked_fill(~taken_TE, float("-inf")), self.n_experts)

    def _weights(self, logits_TE: Tensor, scores_TE: Tensor, experts_TK: Tensor) -> Tensor:
        del logits_TE
        return chosen(scores_TE, experts_TK, 0.0)
