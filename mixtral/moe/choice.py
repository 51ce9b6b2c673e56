"""Choosing experts: one registered op, and what is made of its answers with integers and masks alone.

Legend: T tokens, E experts, K slots of a token, N assignments (T * K).
"""

from __future__ import annotations

import math
from fractions import Fraction

import torch
from torch import Tensor


def choose_experts(key_TE: Tensor, k: int) -> Tensor:
    """The k highest keys of each row, highest first, ties to the lower index; -1 where a key is -inf -> int64 [T, k].

    A registered op, so that selective activation checkpointing can keep the choice: made again on recomputed
    activations, it could fall the other way near a tie. `topk` leaves the order of ties open; a stable sort does not.
    """
    choice_TK: Tensor = torch.ops.mixtral.choose_experts(key_TE.detach(), k)
    return choice_TK


# torch.library.custom_op would import the compiler, three seconds, at its first call; the plain registry does not.
_LIBRARY = torch.library.Library("mixtral", "FRAGMENT")
_LIBRARY.define("choose_experts(Tensor key, int k) -> Tensor")


@torch.library.impl(_LIBRARY, "choose_experts", "CompositeExplicitAutograd")
def _choose_experts(key_TE: Tensor, k: int) -> Tensor:
    values_TE, experts_TE = key_TE.sort(dim=-1, descending=True, stable=True)
    return experts_TE[:, :k].masked_fill(values_TE[:, :k] == float("-inf"), -1)


@torch.library.register_fake("mixtral::choose_experts", lib=_LIBRARY)
def _(key_TE: Tensor, k: int) -> Tensor:
    return key_TE.new_empty((key_TE.shape[0], k), dtype=torch.int64)


def taken(experts_TK: Tensor, n_experts: int) -> Tensor:
    """Which experts a choice holds -> bool [T, E]."""
    taken_TE = torch.zeros(len(experts_TK), n_experts + 1, dtype=torch.bool, device=experts_TK.device)
    return taken_TE.scatter_(1, experts_TK + 1, True)[:, 1:]  # column 0 takes the unused slots


def counts_of(experts_TK: Tensor, n_experts: int) -> Tensor:
    """How often each expert is named -> int64 [E]; unused slots (-1) do not count.

    Takes the tensor to count and not a Routing, which has two: `experts_TK`, what is computed, and `chosen_TK`, what
    the router chose before a capacity dropped a part of it.

    Not by bincount, whose output size depends on the values: on a GPU the host would wait for them.
    """
    slot_N = experts_TK.flatten() + 1  # slot 0 counts the unused
    return slot_N.new_zeros(n_experts + 1).scatter_add_(0, slot_N, torch.ones_like(slot_N))[1:]


def reorder(rank_TE: Tensor, experts_TK: Tensor) -> Tensor:
    """The same choice, highest `rank` first, ties to the lower index, unused slots last."""
    left_out_TE = ~taken(experts_TK, rank_TE.shape[1])
    return choose_experts(rank_TE.masked_fill(left_out_TE, float("-inf")), experts_TK.shape[1])


def within_capacity(experts_TK: Tensor, n_experts: int, k: int, factor: float) -> Tensor:
    """Leave each expert its first ceil(factor * T * k / E) assignments; the others become -1, moved to the end.

    All first choices come before all second choices, each in the order of tokens (arXiv 2006.16668, section 2.2).
    """
    # In exact decimals: 0.55 * 100 in binary is a little above 55, and would give each of 55 experts two rows, not one.
    capacity = math.ceil(Fraction(str(factor)) * len(experts_TK) * k / n_experts)
    capacity = min(capacity, experts_TK.numel())  # any number beyond it means the same, and may be too large for int64
    queue_N = experts_TK.T.flatten()
    mine_NE = queue_N[:, None] == torch.arange(n_experts, device=queue_N.device)
    ahead_N = (mine_NE.cumsum(0, dtype=torch.int32) * mine_NE).sum(1)  # its position in the queue, from 1
    kept_TK = experts_TK.masked_fill((ahead_N > capacity).view_as(experts_TK.T).T, -1)
    return kept_TK.gather(1, (kept_TK < 0).sort(dim=1, stable=True).indices)


def chosen(values_TE: Tensor, experts_TK: Tensor, unused: float) -> Tensor:
    """The values of the chosen experts -> [T, K]; `unused` at slots without one."""
    return values_TE.gather(1, experts_TK.clamp(min=0)).masked_fill(experts_TK < 0, unused)
