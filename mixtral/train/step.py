"""One training step, and validation.

Legend: T tokens.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch

from mixtral.data.loader import TrainBatch
from mixtral.errors import MixtralError
from mixtral.model import Mixtral
from mixtral.moe.balance import assignment_counts
from mixtral.moe.stats import LayerStats, layer_stats
from mixtral.train.config import TrainConfig
from mixtral.train.objective import objective
from mixtral.train.optim import Optimizer
from mixtral.train.schedule import learning_rate
from mixtral.train.watch import expert_output_norms


class NonFiniteLoss(MixtralError):
    """A loss or gradient is not finite. Raised before the update: weights and optimiser are those of the last step."""


class StepResult(NamedTuple):
    """What one step reports; the losses apart, unweighted."""

    cross_entropy: float  # nats a token
    load_balance: float | None
    z_loss: float | None
    grad_norm: float  # before clipping
    lr: float
    layers: list[LayerStats] | None  # of the step's last part, when asked for


def train_step(
    model: Mixtral, optimizer: Optimizer, parts: Sequence[TrainBatch], config: TrainConfig, step: int, stats: bool
) -> StepResult:
    """Forward and backward over each part of a global batch, clip, update.

    A part's share in the loss is its share of the targets, so that one batch of B and two of B/2 have the same
    cross-entropy and the same gradient of it. Router losses are means over each part's own tokens (micro-batch form).
    """
    counts = [int((part.targets_T != -100).sum()) for part in parts]
    sums: dict[str, float] = {}
    layers = None
    for i, (part, count) in enumerate(zip(parts, counts, strict=True)):
        share = count / max(1, sum(counts))
        batch, targets_T = part.to(model.output_weight.device)
        watched = stats and i == len(parts) - 1
        with contextlib.ExitStack() as stack:
            norms = stack.enter_context(expert_output_norms(model)) if watched else []
            output = model(batch, targets=targets_T)
        terms = objective(output, config)
        (terms.total * share).backward()
        optimizer.collect_gradients()
        for name in ("cross_entropy", "load_balance", "z_loss"):
            if (value := getattr(terms, name)) is not None:
                sums[name] = sums.get(name, 0.0) + float(value.detach()) * share
        if watched:
            pairs = zip(output.routing, norms, strict=True)
            layers = [layer_stats(routing, batch.cu_seqlens, norms_E) for routing, norms_E in pairs]
    norm = optimizer.grad_norm()
    grad_norm = float(norm)
    _require_finite(optimizer, sums, grad_norm, step)  # before clipping, which would spread a NaN over all gradients
    optimizer.clip_gradients(norm)
    lr = learning_rate(step, config)
    optimizer.step(lr)
    return StepResult(sums["cross_entropy"], sums.get("load_balance"), sums.get("z_loss"), grad_norm, lr, layers)


def _require_finite(optimizer: Optimizer, losses: dict[str, float], grad_norm: float, step: int) -> None:
    for name, value in losses.items():
        if not math.isfinite(value):
            raise NonFiniteLoss(f"step {step + 1}: {name} is {value}; lower the learning rate, or look at the data")
    if not math.isfinite(grad_norm):
        bad = [n for n, p in optimizer.params.items() if p.grad is not None and not p.grad.isfinite().all()]
        where = f", first in {bad[0]}" if bad else ""
        raise NonFiniteLoss(f"step {step + 1}: the gradient norm is {grad_norm}{where}; lower the learning rate")


class Validation(NamedTuple):
    """Held-out loss, and what each layer's routing looked like over all held-out tokens."""

    cross_entropy: float  # nats a token
    bits_per_byte: float
    loads: list[list[float]]  # per layer, the share of assignments of each expert; empty for a dense model


@torch.no_grad()
def validate(model: Mixtral, batches: Iterable[TrainBatch], byte_lengths_V: torch.Tensor) -> Validation:
    """Cross-entropy over `batches`, in nats a token and in bits a byte of the text those tokens stand for."""
    nats, tokens, n_bytes = 0.0, 0, 0
    counts: list[torch.Tensor] = []
    for part in batches:
        counted = part.targets_T[part.targets_T != -100]
        batch, targets_T = part.to(model.output_weight.device)
        output = model(batch, targets=targets_T)
        nats += float(output.loss) * len(counted)
        tokens += len(counted)
        n_bytes += int(byte_lengths_V[counted].sum())
        taken = [assignment_counts(r) for r in output.routing]
        counts = taken if not counts else [a + b for a, b in zip(counts, taken, strict=True)]
    loads = [(c / c.sum()).tolist() for c in counts]
    return Validation(nats / max(1, tokens), nats / math.log(2) / max(1, n_bytes), loads)
