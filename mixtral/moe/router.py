"""The router: which experts a token takes, and with what weight (arXiv 2401.04088, section 2.1).

Legend: T tokens, D model width, E experts, K the most experts a token may take.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from mixtral.errors import UsageError


class Routing(NamedTuple):
    """One layer's routing: all that losses, statistics, plots, caches and prefetch need."""

    logits_TE: Tensor  # fp32, before the score function
    scores_TE: Tensor  # fp32, after it: what balancing objectives read
    weights_TK: Tensor  # fp32; 0 where experts_TK is -1
    experts_TK: Tensor  # int64, sorted by weight, ties to the lower index; -1: place unused or token dropped


def choose_experts(logits_TE: Tensor, k: int) -> Tensor:
    """The k highest logits of each token, highest first, ties to the lower index -> int64 [T, k].

    A registered op, so that selective activation checkpointing can keep the choice: made again on recomputed
    activations, it could fall the other way near a tie. `topk` leaves the order of ties open; a stable sort does not.
    """
    choice_TK: Tensor = torch.ops.mixtral.choose_experts(logits_TE.detach(), k)
    return choice_TK


# torch.library.custom_op would import the compiler, three seconds, at its first call; the plain registry does not.
_LIBRARY = torch.library.Library("mixtral", "FRAGMENT")
_LIBRARY.define("choose_experts(Tensor logits, int k) -> Tensor")


@torch.library.impl(_LIBRARY, "choose_experts", "CompositeExplicitAutograd")
def _choose_experts(logits_TE: Tensor, k: int) -> Tensor:
    return logits_TE.sort(dim=-1, descending=True, stable=True).indices[:, :k].contiguous()


@torch.library.register_fake("mixtral::choose_experts", lib=_LIBRARY)
def _(logits_TE: Tensor, k: int) -> Tensor:
    return logits_TE.new_empty((logits_TE.shape[0], k), dtype=torch.int64)


class Router(nn.Module):
    """Mixtral's router: softmax over the K highest of x W^T, in fp32.

    Args:
        dim, n_experts: the shape [E, D] of the gate, which has no bias.
        experts_per_token: K, unless a call says otherwise.
    """

    def __init__(self, dim: int, n_experts: int, experts_per_token: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_experts, dim))
        self.experts_per_token = experts_per_token

    def forward(self, x_TD: Tensor, replay: Tensor | None = None, k: int | Tensor | None = None) -> Routing:
        """Route each token.

        Args:
            replay: int64 [T, K]; take these experts and compute logits and weights anew, so that gradients flow.
            k: experts a token takes in this call: a number, or int64 [T] for each token its own (0: none).

        Raises UsageError when a number `k` is not one of 1..E.
        """
        logits_TE = nn.functional.linear(x_TD.float(), self.weight.float())
        experts_TK = self._choose(logits_TE, k) if replay is None else replay
        weights_TK = choice_weights(logits_TE, experts_TK)
        return Routing(logits_TE, logits_TE.softmax(-1), weights_TK, experts_TK)

    def _choose(self, logits_TE: Tensor, k: int | Tensor | None) -> Tensor:
        n_experts = logits_TE.shape[1]
        if not isinstance(k, Tensor):
            k = self.experts_per_token if k is None else k
            if not 1 <= k <= n_experts:
                raise UsageError(f"router: k must lie in 1..{n_experts} (the experts), not {k}")
            return choose_experts(logits_TE, k)
        most = min(max(1, int(k.max())), n_experts) if k.numel() else 1  # one place at least, if none is used
        experts_TK = choose_experts(logits_TE, most)
        unused_TK = torch.arange(most, device=k.device) >= k[:, None]
        return experts_TK.masked_fill(unused_TK, -1)


def choice_weights(logits_TE: Tensor, experts_TK: Tensor) -> Tensor:
    """Softmax over the chosen logits -> fp32 [T, K]; unused places (-1) and tokens without experts weigh 0."""
    unused_TK = experts_TK < 0
    chosen_TK = logits_TE.gather(1, experts_TK.clamp(min=0)).masked_fill(unused_TK, float("-inf"))
    chosen_TK = chosen_TK.masked_fill(unused_TK.all(-1, keepdim=True), 0.0)  # a row of -inf alone would give NaN
    return chosen_TK.softmax(-1).masked_fill(unused_TK, 0.0)
