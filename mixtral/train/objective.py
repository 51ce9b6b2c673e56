"""What training minimises: a loss of the model's outputs plus weighted router losses, each kept apart.

Legend: T tokens, K slots of a token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mixtral.data.loader import TrainBatch
from mixtral.data.store import NO_TARGET
from mixtral.model import Mixtral
from mixtral.moe import Routing
from mixtral.train.balancing.balancer import Balancer

Replay = Sequence[Tensor] | None  # one int64 [T, K] a sparse layer: the experts to take


class Terms(NamedTuple):
    """What a loss function makes of one micro-batch."""

    loss: Tensor  # a mean over its targets, to differentiate
    routing: tuple[Routing, ...]  # of the pass, for balancing and statistics


LossFn = Callable[[Mixtral, TrainBatch, Replay], Terms]
"""Pre-training, tuning on answers and on preferences differ by this function alone."""


def next_token(model: Mixtral, batch: TrainBatch, replay: Replay = None) -> Terms:
    """Pre-training: the mean cross-entropy of the targets."""
    output = model(batch.batch, targets=batch.targets_T, loss_weights="mean", replay=replay)
    return Terms(output.loss, output.routing)


class Shares(NamedTuple):
    """What one micro-batch counts for: its share of the global batch's targets, and of its tokens."""

    targets: float
    tokens: float

    @classmethod
    def of(cls, micro_batches: Sequence[TrainBatch], over_ranks: Callable[[int], int] = int) -> list[Shares]:
        """Of each micro-batch; `over_ranks` sums a count over all ranks, of which one has its own alone."""
        targets = [int((batch.targets_T != NO_TARGET).sum()) for batch in micro_batches]
        tokens = [len(batch.targets_T) for batch in micro_batches]
        all_targets, all_tokens = max(1, over_ranks(sum(targets))), over_ranks(sum(tokens))
        return [cls(a / all_targets, b / all_tokens) for a, b in zip(targets, tokens, strict=True)]


WHOLE = Shares(1.0, 1.0)


class Objective(NamedTuple):
    """The micro-batch's contribution to the total, to differentiate, and its losses, unweighted."""

    total: Tensor
    cross_entropy: Tensor
    aux: dict[str, Tensor]  # router losses by name, each the mean over its layers; not those of weight 0


def objective(terms: Terms, balancer: Balancer, domains_T: Tensor | None = None, shares: Shares = WHOLE) -> Objective:
    """The loss by the share of targets, plus each router loss times its coefficient by the share of tokens.

    So a batch cut into micro-batches has the same total, and gradients, as the whole, if its losses are means.
    """
    total = terms.loss * shares.targets
    values: dict[str, list[Tensor]] = {}
    for term in balancer.terms(terms.routing, domains_T):
        total = total + term.coefficient * shares.tokens * torch.stack(term.values).mean()
        values.setdefault(term.name, []).extend(term.values)
    return Objective(total, terms.loss, {name: torch.stack(found).mean() for name, found in values.items()})
