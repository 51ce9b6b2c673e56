"""What training minimises: next-token cross-entropy plus weighted router losses, each kept apart.

Legend: T tokens.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mixtral.model import Output
from mixtral.train.balancing.balancer import Balancer


class Shares(NamedTuple):
    """What one part of a global batch counts for: its share of the batch's targets, and of its tokens."""

    targets: float
    tokens: float


WHOLE = Shares(1.0, 1.0)


class Objective(NamedTuple):
    """The part's contribution to the total, to differentiate, and its losses, unweighted."""

    total: Tensor
    cross_entropy: Tensor
    aux: dict[str, Tensor]  # router losses by name, each the mean over its layers; not those of weight 0


def objective(
    output: Output, balancer: Balancer, domains_T: Tensor | None = None, shares: Shares = WHOLE
) -> Objective:
    """Cross-entropy by the share of targets, plus each router loss times its coefficient by the share of tokens.

    So a batch cut into parts has the same total, and gradients, as the whole, if its losses are means over tokens.
    """
    assert output.loss is not None, "the model was run without targets"
    total = output.loss * shares.targets
    values: dict[str, list[Tensor]] = {}
    for term in balancer.terms(output.routing, domains_T):
        total = total + term.coefficient * shares.tokens * torch.stack(term.values).mean()
        values.setdefault(term.name, []).extend(term.values)
    return Objective(total, output.loss, {name: torch.stack(found).mean() for name, found in values.items()})
