"""A number of experts that the model learns, token by token.

Legend: T tokens, D model width, E experts, J the numbers the head knows, K the most experts a token may take.
"""

from __future__ import annotations

from torch import Tensor, nn

from mixtral.moe.choice import choose_experts, chosen, reorder
from mixtral.moe.router import Routing
from mixtral.moe.routers.topk import TopKRouter


class LearnedKRouter(TopKRouter):
    """A head [J, D] gives P(K = j); a token takes the most probable number of experts.

    The number is an argmax, so the layer's output has no gradient with respect to the head. In training the head gets
    a straight-through one (arXiv 1308.3432), as if the weight g_j of the expert that comes in when K reaches j were
    g_j * P(K >= j) with g_j held fixed: an expert that helps raises the probability of taking it. The weight's value,
    and its gradient to the gate, are those of g_j itself.

    `Routing.k_T`, the sum of P(K >= j) over j, is the expected number, on which an objective puts a price. Its gradient
    is the ordinary one.

    A call's `k` takes the place of the head's answer.
    """

    k_weight: Tensor

    def forward(self, x_TD: Tensor, replay: Tensor | None = None, k: int | Tensor | None = None) -> Routing:
        head_TJ = nn.functional.linear(x_TD.float(), self.k_weight.float())
        if k is None and replay is None:
            k = choose_experts(head_TJ, 1)[:, 0] + 1
        routing = super().forward(x_TD, replay, k)
        at_least_TJ = head_TJ.softmax(-1).flip(1).cumsum(1).flip(1)
        weights_TK = routing.weights_TK
        if self.training:
            relaxed_TK = self._entry_probabilities(routing, at_least_TJ)
            weights_TK = weights_TK * (1 + (relaxed_TK - relaxed_TK.detach()))
        return routing._replace(weights_TK=weights_TK, k_T=at_least_TJ.sum(-1))

    def _entry_probabilities(self, routing: Routing, at_least_TJ: Tensor) -> Tensor:
        """P(K >= j) for the expert in each slot, j its rank in the choice -> [T, K]; 0 at slots without an expert.

        Neither the order of weights, when a bias takes part in the choice, nor the slot, when a capacity dropped an
        expert before it, is that rank.
        """
        rank_TE = self._rank(routing.logits_TE, routing.scores_TE)
        entering_TK = reorder(self._key(rank_TE, routing.scores_TE), routing.chosen_TK)[:, : at_least_TJ.shape[1]]
        probability_TE = at_least_TJ.new_zeros(len(entering_TK), self.n_experts + 1)
        probability_TE = probability_TE.scatter(1, entering_TK + 1, at_least_TJ[:, : entering_TK.shape[1]])
        return chosen(probability_TE[:, 1:], routing.experts_TK, 0.0)
