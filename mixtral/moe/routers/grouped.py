"""Hierarchical choice: groups of experts first, then experts inside them.

Legend: T tokens, E experts, G groups, S experts of a group (E / G).
"""

from __future__ import annotations

from torch import Tensor

from mixtral.config.router import Grouped
from mixtral.moe.choice import choose_experts, taken
from mixtral.moe.routers.topk import TopKRouter


class GroupedRouter(TopKRouter):
    """The groups of the highest scores, then the K highest experts of those (arXiv 2412.19437, section 2.1.2).

    Neighbouring experts form a group. Its score is the sum of its two highest scores (or the highest one), the bias
    included. Weights are Mixtral's.
    """

    options: Grouped

    def _key(self, rank_TE: Tensor, scores_TE: Tensor) -> Tensor:
        groups = self.options.groups
        biased_TE = scores_TE + self.bias.float() if self.options.bias else scores_TE
        best = 2 if self.options.by == "top2" else 1
        score_TG = biased_TE.unflatten(1, (groups, -1)).topk(best, dim=-1).values.sum(-1)
        taken_TG = taken(choose_experts(score_TG, self.options.taken), groups)
        taken_TE = taken_TG.repeat_interleave(self.n_experts // groups, dim=1)
        return super()._key(rank_TE, scores_TE).masked_fill(~taken_TE, float("-inf"))
