"""The contract of all routers: tokens to `Routing`, in the steps of `Router.forward`. The routers are in moe/routers.

Legend: T tokens, D model width, E experts, K the most experts a token may take.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mixtral.config.router import RouterOptions
from mixtral.moe.choice import chosen


class Routing(NamedTuple):
    """One layer's routing: all that losses, statistics, plots, caches and prefetch need."""

    logits_TE: Tensor  # fp32, before the score function
    scores_TE: Tensor  # fp32, after it: what balancing objectives read
    weights_TK: Tensor  # fp32; 0 where experts_TK is -1
    experts_TK: Tensor  # int64, what is computed: sorted by weight, ties to the lower index; -1: unused or dropped
    chosen_TK: Tensor  # int64, the choice before a capacity dropped a part of it (else the same): what is balanced
    k_T: Tensor | None = None  # fp32, differentiable: how many experts a token is expected to take, if it has a price

    def tokens(self, first: int, last: int) -> Routing:
        """The routing of tokens first..last - 1."""
        return Routing._make(None if t is None else t[first:last] for t in self)

    @staticmethod
    def cat(parts: Sequence[Routing]) -> Routing:
        """One routing of the tokens of several calls; where these differ in slots, -1 fills up."""
        most = max(part.experts_TK.shape[1] for part in parts)
        fields = zip(*(_widen(part, most) for part in parts), strict=True)
        return Routing._make(torch.cat(tensors) if tensors[0] is not None else None for tensors in fields)


def _widen(routing: Routing, slots: int) -> Routing:
    more = (0, slots - routing.experts_TK.shape[1])
    return routing._replace(
        weights_TK=nn.functional.pad(routing.weights_TK, more),
        experts_TK=nn.functional.pad(routing.experts_TK, more, value=-1),
        chosen_TK=nn.functional.pad(routing.chosen_TK, more, value=-1),
    )


class Router(nn.Module):
    """Scores are a softmax of x W^T in fp32; a subclass says which experts are chosen, and may replace any step.

    Args:
        dim, n_experts: the shape [E, D] of the gate, which has no bias.
        experts_per_token: K, unless a call says otherwise.
        options: of this kind of router, which state its parameters and buffers.
    """

    weight: Tensor

    def __init__(self, dim: int, n_experts: int, experts_per_token: int, options: RouterOptions) -> None:
        super().__init__()
        self.n_experts, self.experts_per_token, self.options = n_experts, experts_per_token, options
        for name, shape in options.parameters(dim, n_experts).items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape)))
        for name, (shape, start, dtype) in options.buffers(n_experts).items():
            self.register_buffer(name, torch.full(shape, start, dtype=getattr(torch, dtype)))

    def reset_buffers(self) -> None:
        """Put every buffer back to its value at the start."""
        for name, buffer in self.options.buffers(self.n_experts).items():
            self.get_buffer(name).fill_(buffer.start)

    def forward(self, x_TD: Tensor, replay: Tensor | None = None, k: int | Tensor | None = None) -> Routing:
        """Route each token.

        Args:
            replay: int64 [T, K]; take these experts and compute logits and weights anew, so that gradients flow. An
                earlier `chosen_TK`; where there is a capacity, it drops from it what it dropped then, given the `k` of
                then. A number may be left out, as the width gives it, but for all slots of learned_k or token_k.
            k: experts a token takes in this call: a number, or int64 [T] for each token its own (0: none; to learned_k
                and token_k, whose slots do not depend on values, what lies beyond their range means its nearest end).
                Routers that rank experts take fp32 [T] too, where a number between 0 and 1 means the fewest experts
                whose probabilities sum to it.

        Raises UsageError when `k` is neither, or out of range, or this router does not let a call set it.
        """
        logits_TE = self._logits(x_TD)
        scores_TE = self._scores(logits_TE)
        chosen_TK = self._choose(logits_TE, scores_TE, k) if replay is None else replay
        experts_TK = self._kept(chosen_TK, k, replay is not None)
        weights_TK = self._weights(logits_TE, scores_TE, experts_TK)
        return Routing(logits_TE, scores_TE, weights_TK, experts_TK, chosen_TK)

    # -- the steps -----------------------------------------------------------------------------------------------------

    def _logits(self, x_TD: Tensor) -> Tensor:
        return nn.functional.linear(x_TD.float(), self.weight.float())

    def _scores(self, logits_TE: Tensor) -> Tensor:
        return logits_TE.softmax(-1)

    def _choose(self, logits_TE: Tensor, scores_TE: Tensor, k: int | Tensor | None) -> Tensor:
        """-> int64 [T, K], best first, -1 for an unused slot."""
        raise NotImplementedError

    def _kept(self, chosen_TK: Tensor, k: int | Tensor | None, replayed: bool) -> Tensor:
        """What is computed of the choice, -1 for what is dropped; `replayed`: a call with that `k` chose it earlier."""
        del k, replayed
        return chosen_TK

    def _weights(self, logits_TE: Tensor, scores_TE: Tensor, experts_TK: Tensor) -> Tensor:
        """A function of logits and choice alone, so that a replayed choice has the same weights."""
        del scores_TE
        return choice_weights(logits_TE, experts_TK)


def choice_weights(logits_TE: Tensor, experts_TK: Tensor) -> Tensor:
    """Softmax over the chosen logits -> fp32 [T, K]; unused slots (-1) and tokens without experts weigh 0."""
    unused_TK = experts_TK < 0
    chosen_TK = chosen(logits_TE, experts_TK, float("-inf"))
    chosen_TK = chosen_TK.masked_fill(unused_TK.all(-1, keepdim=True), 0.0)  # a row of -inf alone would give NaN
    return chosen_TK.softmax(-1).masked_fill(unused_TK, 0.0)
