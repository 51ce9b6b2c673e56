"""Mixtral's router: the K highest logits and their softmax (arXiv 2401.04088, section 2.1).

Legend: T tokens, D model width, E experts, K the most experts a token may take.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mixtral.config.router import TopK
from mixtral.errors import UsageError
from mixtral.moe.choice import choose_experts, reorder, within_capacity
from mixtral.moe.router import Router


class TopKRouter(Router):
    """Softmax over the K highest of x W^T, in fp32; optionally with a bias for the choice, and a capacity in training.

    The base of all routers that rank experts: they replace the ranking, the scores or the weights.
    """

    options: TopK
    bias: Tensor  # with the option `bias` alone

    def __init__(self, dim: int, n_experts: int, experts_per_token: int, options: TopK | None = None) -> None:
        super().__init__(dim, n_experts, experts_per_token, TopK() if options is None else options)

    def _choose(self, logits_TE: Tensor, scores_TE: Tensor, k: int | Tensor | None) -> Tensor:
        fixed = self.options.slots(self.n_experts, self.experts_per_token)  # of routers whose k is a choice of theirs
        if isinstance(k, Tensor) and k.is_floating_point() and fixed is None:
            k = numbers_of(k, logits_TE)
        slots, k_T = self._slots(k, len(scores_TE))
        rank_TE = self._rank(logits_TE, scores_TE)
        experts_TK = choose_experts(self._key(rank_TE, scores_TE), slots)
        if k_T is not None:
            experts_TK = experts_TK.masked_fill(torch.arange(slots, device=k_T.device) >= k_T[:, None], -1)
        if self.options.bias:
            experts_TK = reorder(rank_TE, experts_TK)  # so far by what they were chosen for, and that is not the weight
        return experts_TK

    def _rank(self, logits_TE: Tensor, scores_TE: Tensor) -> Tensor:
        """What weights rise with: logits tell experts apart whose scores have rounded to one number."""
        del scores_TE
        return logits_TE

    def _key(self, rank_TE: Tensor, scores_TE: Tensor) -> Tensor:
        """What experts are chosen by; -inf: never."""
        return scores_TE + self.bias.float() if self.options.bias else rank_TE

    def _slots(self, k: int | Tensor | None, n_tokens: int) -> tuple[int, Tensor | None]:
        """-> (number of slots per token, each token's own number of experts or None)."""
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

    # -- capacity ------------------------------------------------------------------------------------------------------

    def _kept(self, chosen_TK: Tensor, k: int | Tensor | None, replayed: bool) -> Tensor:
        """The assignments kept after capacity dropping; the choice itself where there is no capacity."""
        if replayed and k is not None:
            self._slots(k, len(chosen_TK))
        factor = self.options.capacity_factor
        if not self.training or factor is None:
            return chosen_TK
        if replayed and k is None:
            k = self._number_of(chosen_TK)
        mean = k if isinstance(k, int) else self.experts_per_token
        return within_capacity(chosen_TK, self.n_experts, mean, factor)

    def _number_of(self, replay: Tensor) -> int | None:
        """The `k` of the call that chose `replay`: its width; None where each token took its own."""
        n_slots = replay.shape[1]
        each_its_own = n_slots == self.options.slots(self.n_experts, self.experts_per_token) or (replay < 0).any()
        return None if each_its_own else n_slots


def numbers_of(k_T: Tensor, logits_TE: Tensor) -> Tensor:
    """How many experts each token takes -> int64 [T], of fp32 [T]: a whole number is one; a number between 0 and 1
    means the fewest experts whose softmax over all of them sums to it, as of the router top_p (arXiv 2403.07652)."""
    if k_T.shape != logits_TE.shape[:1]:
        want = f"{len(logits_TE)} numbers, one for each token"
        raise UsageError(f"router: a tensor k must have {want}, not {list(k_T.shape)}")
    is_share = (k_T > 0) & (k_T < 1)
    if not (is_share | (k_T == k_T.floor())).all():
        raise UsageError("router: each token's k must be a whole number, or lie between 0 and 1")
    best_TE = (logits_TE - logits_TE.amax(-1, keepdim=True)).exp().double().sort(-1, descending=True).values
    before_TE = best_TE.cumsum(-1) - best_TE
    needed_T = (before_TE < k_T.double()[:, None] * best_TE.sum(-1, keepdim=True)).sum(-1)
    return torch.where(is_share, needed_T, k_T.to(torch.int64))


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
