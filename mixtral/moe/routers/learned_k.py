"""A number of experts that the model learns, token by token.

Legend: T tokens, D model width, E experts, K the most experts a token may take.
"""

from __future__ import annotations

from torch import Tensor, nn

from mixtral.moe.choice import choose_experts
from mixtral.moe.router import Router, Routing


class LearnedKRouter(Router):
    """A head [K, D] gives P(K = j); a token takes the most probable number of experts.

    The number itself has no gradient. In training the weight of the j-th place is w_j * P(K >= j) as the gradient sees
    it, and w_j in value (straight-through, arXiv 1308.3432): an expert that helps raises the probability of taking
    it. `Routing.k_T`, the sum of P(K >= j) over j, is the expected number: an objective puts a price on it.

    A call's `k` takes the place of the head's answer.
    """

    k_weight: Tensor

    def forward(self, x_TD: Tensor, replay: Tensor | None = None, k: int | Tensor | None = None) -> Routing:
        head_TK = nn.functional.linear(x_TD.float(), self.k_weight.float())
        if k is None and replay is None:
            k = choose_experts(head_TK, 1)[:, 0] + 1
        routing = super().forward(x_TD, replay, k)
        at_least_TK = head_TK.softmax(-1).flip(1).cumsum(1).flip(1)
        weights_TK = routing.weights_TK
        if self.training:
            relaxed_TK = nn.functional.pad(at_least_TK, (0, weights_TK.shape[1] - at_least_TK.shape[1]))
            weights_TK = weights_TK * (1 + (relaxed_TK - relaxed_TK.detach()))
        return routing._replace(weights_TK=weights_TK, k_T=at_least_TK.sum(-1))
