"""The sparse layer: router -> dispatcher and experts, and the experts that every token takes.

Legend: T tokens, D model width, K experts a token.
"""

from __future__ import annotations

from torch import Tensor, nn

from mixtral.moe.dispatch import Dispatcher, LocalDispatcher
from mixtral.moe.experts import Experts, FeedForward
from mixtral.moe.router import Router, Routing


class MoE(nn.Module):
    """y = sum over a token's experts of weight * expert(x), + shared(x).

    Its parts can be exchanged from above: experts are any module that maps (rows_ND, counts_E) to rows.

    n shared experts are one network of n times the width: the sum of their outputs is its output (arXiv 2401.06066,
    section 3.2).
    """

    def __init__(
        self, router: Router, experts: Experts, dispatcher: Dispatcher | None = None, shared: FeedForward | None = None
    ) -> None:
        super().__init__()
        self.router = router
        self.experts = experts
        self.shared = shared
        self.dispatcher: Dispatcher = LocalDispatcher() if dispatcher is None else dispatcher

    def forward(
        self, x_TD: Tensor, replay: Tensor | None = None, k: int | Tensor | None = None
    ) -> tuple[Tensor, Routing]:
        """-> (output [T, D], Routing). `replay` [T, K] and `k` as in Router.forward."""
        routing = self.router(x_TD, replay, k)
        y_TD = self.dispatcher.apply(self.experts, x_TD, routing)
        if self.shared is not None:
            y_TD = y_TD + self.shared(x_TD)
        return y_TD, routing
