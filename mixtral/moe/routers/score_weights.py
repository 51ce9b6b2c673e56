"""Routers whose weights are other functions of the scores.

Legend: T tokens, E experts, K experts a token.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mixtral.config.router import Sigmoid
from mixtral.moe.choice import chosen
from mixtral.moe.routers.topk import TopKRouter


class SwitchRouter(TopKRouter):
    """weight = softmax(x W^T)_j of the chosen expert j, not normalised (arXiv 2101.03961, equation 2).

    So the router learns from one expert a token: normalised, the weight would always be 1.
    """

    def _weights(self, logits_TE: Tensor, scores_TE: Tensor, experts_TK: Tensor) -> Tensor:
        del logits_TE
        return chosen(scores_TE, experts_TK, 0.0)


class SigmoidRouter(TopKRouter):
    """s = sigmoid(x W^T); weight = scale * s_j / sum of s over the chosen (arXiv 2412.19437, equations 13 to 16)."""

    options: Sigmoid

    def _scores(self, logits_TE: Tensor) -> Tensor:
        return logits_TE.sigmoid()

    def _rank(self, logits_TE: Tensor, scores_TE: Tensor) -> Tensor:
        del logits_TE
        return scores_TE

    def _weights(self, logits_TE: Tensor, scores_TE: Tensor, experts_TK: Tensor) -> Tensor:
        del logits_TE
        chosen_TK = chosen(scores_TE, experts_TK, 0.0)
        smallest = torch.finfo(chosen_TK.dtype).tiny  # tokens without experts, and scores that round to 0
        return self.options.scale * chosen_TK / chosen_TK.sum(-1, keepdim=True).clamp(min=smallest)
