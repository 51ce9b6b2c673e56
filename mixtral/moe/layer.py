"""The sparse layer: router -> dispatch -> experts -> combine.

Legend: T tokens, D model width, K experts a token.
"""

from __future__ import annotations

from torch import Tensor, nn

from mixtral.moe.dispatch import Dispatcher, LocalDispatcher
from mixtral.moe.experts import Experts
from mixtral.moe.router import Router, Routing


class MoE(nn.Module):
    """y = sum over a token's experts of weight * expert(x). Its parts can be exchanged from above."""

    def __init__(self, router: Router, experts: Experts, dispatcher: Dispatcher | None = None) -> None:
        super().__init__()
        self.router = router
        self.experts = experts
        self.dispatcher: Dispatcher = LocalDispatcher() if dispatcher is None else dispatcher

    def forward(
        self, x_TD: Tensor, replay: Tensor | None = None, k: int | Tensor | None = None
    ) -> tuple[Tensor, Routing]:
        """-> (output [T, D], Routing). `replay` [T, K] and `k` as in Router.forward."""
        routing = self.router(x_TD, replay, k)
        y_TD = self.experts.decode(x_TD, routing)
        if y_TD is None:
            dispatched = self.dispatcher.dispatch(x_TD, routing)
            y_TD = self.dispatcher.combine(self.experts(dispatched.rows_ND, dispatched.counts_E), dispatched)
        return y_TD, routing
