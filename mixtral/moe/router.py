"""The router's contract, and Mixtral's router: the K highest logits and their softmax (arXiv 2401.04088, section 2.1).

The other routers, in moe/routers, override one step of `Router.forward` each.

Legend: T tokens, D model width, E experts, K the most experts a token may take.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mixtral.config.router import RouterOptions, TopK
from mixtral.errors import UsageError
from mixtral.moe.choice import choose_experts, chosen, reorder, within_capacity


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
    """Mixtral's router: softmax over the K highest of x W^T, in fp32.

    Args:
        dim, n_experts: the shape [E, D] of the gate, which has no bias.
        experts_per_token: K, unless a call says otherwise.
        options: of this kind of router; those of plain top-k by default.
    """

    weight: Tensor
    bias: Tensor | None

    def __init__(self, dim: int, n_experts: int, experts_per_token: int, options: RouterOptions | None = None) -> None:
        super().__init__()
        self.n_experts, self.experts_per_token = n_experts, experts_per_token
        self.options = TopK() if options is None else options
        for name, shape in self.options.parameters(dim, n_experts).items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape)))
        self.register_buffer("bias", None)
        for name, start in self.options.buffers(n_experts).items():
            self.register_buffer(name, torch.full((n_experts,), start))

    def reset_buffers(self) -> None:
        """Put every buffer back to its value at the start."""
        for name, start in self.options.buffers(self.n_experts).items():
            getattr(self, name).fill_(start)

    def forward(self, x_TD: Tensor, replay: Tensor | None = None, k: int | Tensor | None = None) -> Routing:
        """Route each token.

        Args:
            replay: int64 [T, K]; take these experts and compute logits and weights anew, so that gradients flow. An
                earlier `chosen_TK`; where there is a capacity, it drops from it what it dropped then, given the `k` of
                then. A number may be left out, as the width tells it, but for all slots of learned_k or token_k.
            k: experts a token takes in this call: a number, or int64 [T] for each token its own (0: none; to learned_k
                and token_k, whose slots do not depend on values, what lies beyond their range means its nearest end).

        Raises UsageError when `k` is neither, or out of range, or this router does not let a call set it.
        """
        logits_TE = self._logits(x_TD)
        scores_TE = self._scores(logits_TE)
        chosen_TK = self._choose(logits_TE, scores_TE, k) if replay is None else replay
        experts_TK = self._kept(chosen_TK, k if replay is None else self._number_of(replay, k))
        weights_TK = self._weights(logits_TE, scores_TE, experts_TK)
        return Routing(logits_TE, scores_TE, weights_TK, experts_TK, chosen_TK)

    # -- the steps, each of which some router overrides ----------------------------------------------------------------

    def _logits(self, x_TD: Tensor) -> Tensor:
        return nn.functional.linear(x_TD.float(), self.weight.float())

    def _scores(self, logits_TE: Tensor) -> Tensor:
        return logits_TE.softmax(-1)

    def _choose(self, logits_TE: Tensor, scores_TE: Tensor, k: int | Tensor | None) -> Tensor:
        assert isinstance(self.options, TopK)
        slots, k_T = self._slots(k, len(scores_TE))
        rank_TE = self._rank(logits_TE, scores_TE)
        experts_TK = choose_experts(self._key(rank_TE, scores_TE), slots)
        if k_T is not None:
            experts_TK = experts_TK.masked_fill(torch.arange(slots, device=k_T.device) >= k_T[:, None], -1)
        if self.bias is not None:
            experts_TK = reorder(rank_TE, experts_TK)  # so far by what they were chosen for, and that is not the weight
        return experts_TK

    @property
    def _has_capacity(self) -> bool:
        return self.training and isinstance(self.options, TopK) and self.options.capacity_factor is not None

    def _kept(self, chosen_TK: Tensor, k: int | Tensor | None) -> Tensor:
        """The assignments kept after capacity dropping; the choice itself where there is no capacity."""
        if not self._has_capacity:
            return chosen_TK
        assert isinstance(self.options, TopK) and self.options.capacity_factor
        mean = k if isinstance(k, int) else self.experts_per_token
        return within_capacity(chosen_TK, self.n_experts, mean, self.options.capacity_factor)

    def _number_of(self, replay: Tensor, k: int | Tensor | None) -> int | Tensor | None:
        """The `k` of the call that chose `replay`: as given, else its width; None where each token took its own."""
        if k is not None and isinstance(self.options, TopK):
            self._slots(k, len(replay))
        if k is not None or not self._has_capacity:
            return k
        n_slots = replay.shape[1]
        each_its_own = n_slots == self.options.slots(self.n_experts, self.experts_per_token) or (replay < 0).any()
        return None if each_its_own else n_slots

    def _slots(self, k: int | Tensor | None, n_tokens: int) -> tuple[int, Tensor | None]:
        """-> (number of slots per token, each token's own number of experts or None)."""
        assert isinstance(self.options, TopK)
        most = self.options.reachable(self.n_experts)
        if isinstance(k, Tensor):
            _check_shape(k, n_tokens)
            slots = self.options.slots(self.n_experts, self.experts_per_token)
            return max(1, _highest(k, most)) if slots is None else slots, k  # one slot at least, if none is used
        k = self.experts_per_token if k is None else k
        if type(k) is not int:
            raise UsageError(f"router: k must be a whole number or an int64 tensor [T], not {k!r}")
        if not 1 <= k <= most:
            raise UsageError(f"router: k must lie in 1..{most} (the experts), not {k}")
        return k, None

    def _rank(self, logits_TE: Tensor, scores_TE: Tensor) -> Tensor:
        """What weights rise with: logits tell experts apart whose scores have rounded to one number."""
        del scores_TE
        return logits_TE

    def _key(self, rank_TE: Tensor, scores_TE: Tensor) -> Tensor:
        """What experts are chosen by; -inf: never."""
        return rank_TE if self.bias is None else scores_TE + self.bias.float()

    def _weights(self, logits_TE: Tensor, scores_TE: Tensor, experts_TK: Tensor) -> Tensor:
        """A function of logits and choice alone, so that a replayed choice has the same weights."""
        del scores_TE
        return choice_weights(logits_TE, experts_TK)


def _check_shape(k_T: Tensor, n_tokens: int) -> None:
    if k_T.dtype != torch.int64 or k_T.shape != (n_tokens,):
        found = f"{str(k_T.dtype).removeprefix('torch.')} {list(k_T.shape)}"
        raise UsageError(f"router: a tensor k must be int64 [{n_tokens}], a number for each token, not {found}")


def _highest(k_T: Tensor, most: int) -> int:
    """The highest of each token's own k, 0 without tokens; UsageError unless all lie in 0..most."""
    if not k_T.numel():
        return 0
    lowest, highest = (int(end) for end in k_T.aminmax())
    if lowest < 0 or highest > most:
        raise UsageError(f"router: each token's k must lie in 0..{most}, not {lowest if lowest < 0 else highest}")
    return highest


def choice_weights(logits_TE: Tensor, experts_TK: Tensor) -> Tensor:
    """Softmax over the chosen logits -> fp32 [T, K]; unused slots (-1) and tokens without experts weigh 0."""
    unused_TK = experts_TK < 0
    chosen_TK = chosen(logits_TE, experts_TK, float("-inf"))
    chosen_TK = chosen_TK.masked_fill(unused_TK.all(-1, keepdim=True), 0.0)  # a row of -inf alone would give NaN
    return chosen_TK.softmax(-1).masked_fill(unused_TK, 0.0)
