"""One training step, and validation."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from mixtral.config.router import ExpertChoice
from mixtral.data.loader import TrainBatch
from mixtral.data.store import NO_TARGET
from mixtral.errors import MixtralError
from mixtral.model import Mixtral
from mixtral.moe.choice import counts_of
from mixtral.moe.losses import share_of
from mixtral.moe.stats import LayerStats, layer_stats
from mixtral.train.config import PretrainConfig
from mixtral.train.expert_norms import expert_output_norms
from mixtral.train.objective import LossFn, Shares, objective
from mixtral.train.optim.optimizer import Optimizer
from mixtral.train.optim.schedule import learning_rate
from mixtral.train.state import TrainState


class NonFiniteLoss(MixtralError):
    """A loss or gradient is not finite. Raised before the update: weights and optimiser are those of the last step."""


class StepResult(NamedTuple):
    """What one step reports; the losses apart, unweighted."""

    cross_entropy: float  # nats a token
    aux: dict[str, float]  # by objective: router losses, and the load violation of objectives without a loss
    grad_norm: float  # before clipping
    lr: float
    layers: list[LayerStats] | None  # of the step's last micro-batch, when asked for


def train_step(
    state: TrainState, micro_batches: Sequence[TrainBatch], loss_fn: LossFn, config: PretrainConfig, step: int,
    stats: bool,
) -> StepResult:  # fmt: skip
    """Forward and backward over each micro-batch of a global batch, clip, update, balance.

    A micro-batch's share in the loss is its share of the targets, and in router losses its share of the tokens, so that
    one batch of B and two of B/2 have the same losses and the same gradients (but for micro_batch, which is each one's
    own). Torch's global generator is seeded before each: noise depends on seed, step and micro-batch alone.
    """
    model, balancer, optimizer = state.model, state.balancer, state.optimizer
    model.train()
    choices = _choose_first(state, micro_batches, config, step)
    cross_entropy, aux, layers = 0.0, dict[str, float](), None
    for i, (batch, shares) in enumerate(zip(micro_batches, Shares.of(micro_batches), strict=True)):
        watched = stats and i == len(micro_batches) - 1
        batch = batch.to(model.embedding.device)
        seed_micro_batch(config.seed, step, i)
        with contextlib.ExitStack() as stack:
            norms = stack.enter_context(expert_output_norms(model)) if watched else []
            terms = loss_fn(model, batch, choices[i] if choices else None)
        balancer.observe(terms.routing)
        found = objective(terms, balancer, batch.domains_T, shares)
        found.total.backward()
        optimizer.collect_gradients()
        cross_entropy += float(found.cross_entropy.detach()) * shares.targets
        for name, value in found.aux.items():
            aux[name] = aux.get(name, 0.0) + float(value.detach()) * shares.tokens
        if watched:
            pairs = zip(terms.routing, norms, strict=True)
            layers = [layer_stats(routing, batch.batch.cu_seqlens, norms_E) for routing, norms_E in pairs]
    norm = optimizer.grad_norm()
    grad_norm = float(norm)
    losses = {"cross_entropy": cross_entropy, **aux}
    _require_finite(optimizer, losses, grad_norm, step)  # before clipping, which would spread a NaN over all gradients
    optimizer.clip_gradients(norm)
    lr = learning_rate(step, config)
    optimizer.step(lr)
    return StepResult(cross_entropy, aux | balancer.update(), grad_norm, lr, layers)


def seed_micro_batch(seed: int, step: int, micro_batch: int) -> None:
    """Seed torch's global generator, from which routers sample their noise."""
    torch.manual_seed(int(np.random.SeedSequence([seed, step, micro_batch]).generate_state(1, np.uint64)[0]))


@torch.no_grad()
def _choose_first(
    state: TrainState, micro_batches: Sequence[TrainBatch], config: PretrainConfig, step: int
) -> list[list[Tensor]]:
    """Begin the balancer's step. -> for each micro-batch the experts chosen in each layer, to be replayed; or nothing.

    The exact form of global_batch must know all assignments of the step before its first loss. So they are counted in
    a pass of their own, without gradients, and the choices are kept: made again, one near a tie could fall otherwise.
    One micro-batch alone needs no such pass.
    """
    model, balancer = state.model, state.balancer
    if len(micro_batches) == 1 or not model.config.is_sparse or not balancer.counts_first(step):
        balancer.begin(step)
        return []
    choices, counts = [], []
    for i, batch in enumerate(micro_batches):
        seed_micro_batch(config.seed, step, i)
        ragged = batch.batch.to(model.embedding.device)
        routing = model(ragged, rows=ragged.tokens_T.new_zeros(1)).routing  # one row of logits, which nobody reads
        choices.append([layer.chosen_TK for layer in routing])
        counts.append([counts_of(layer.chosen_TK, layer.logits_TE.shape[1]) for layer in routing])
    balancer.begin(step, [torch.stack(layer).sum(0) for layer in zip(*counts, strict=True)])
    return choices


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
    loads: list[list[float]]  # per layer, each expert's share of assignments, 0 if there are none; empty if dense


@torch.no_grad()
def validate(model: Mixtral, batches: Iterable[TrainBatch], byte_lengths_V: torch.Tensor) -> Validation:
    """Cross-entropy over `batches`, in nats a token and in bits a byte of the text those tokens stand for.

    In evaluation mode; the model's mode is then what it was before. The router expert_choice has training mode alone:
    its figures are of a choice that sees later tokens.
    """
    nats, tokens, n_bytes = 0.0, 0, 0
    counts: list[torch.Tensor] = []
    training = model.training
    model.train(isinstance(model.config.router_options, ExpertChoice))
    for part in batches:
        counted = part.targets_T[part.targets_T != NO_TARGET]
        part = part.to(model.embedding.device)
        output = model(part.batch, targets=part.targets_T, loss_weights="mean")
        nats += float(output.loss) * len(counted)
        tokens += len(counted)
        n_bytes += int(byte_lengths_V[counted].sum())
        taken = [counts_of(r.chosen_TK, r.logits_TE.shape[1]) for r in output.routing]
        counts = taken if not counts else [a + b for a, b in zip(counts, taken, strict=True)]
    model.train(training)
    loads = [share_of(c).tolist() for c in counts]
    return Validation(nats / max(1, tokens), nats / math.log(2) / max(1, n_bytes), loads)
