"""How far a quantised model is from the one it was made from, on a text: whole, and with one layer quantised at a time.

Legend: T tokens, V vocabulary.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mixtral.model import Mixtral, Ragged
from mixtral.weights.progress import Progress

_BLOCK_BYTES = 64 << 20  # of log-probabilities at once: [T, V] is never whole


@dataclass(frozen=True)
class Distance:
    """Means over all predicted tokens: KL(plain || quantised) in nats, and how often both find one token likeliest."""

    what: str  # "all", "layer 3", "output"
    perplexity: float
    kl: float
    agreement: float


@dataclass(frozen=True)
class Comparison:
    """Of the plain model its perplexity; of the quantised one, whole and part by part, all figures."""

    perplexity: float
    tokens: int
    whole: Distance
    parts: list[Distance]


class _Sums:
    """Sums over tokens of one model's figures."""

    def __init__(self) -> None:
        self.nats = self.kl = 0.0
        self.agreed = self.tokens = 0

    def add(self, logp_TV: Tensor, plain_TV: Tensor, targets_T: Tensor) -> None:
        """Log-probabilities of this model and of the plain one, and the tokens that came."""
        self.nats -= float(logp_TV.gather(1, targets_T[:, None]).sum(dtype=torch.float64))
        self.kl += float(torch.nn.functional.kl_div(logp_TV, plain_TV, log_target=True, reduction="sum"))
        self.agreed += int((logp_TV.argmax(-1) == plain_TV.argmax(-1)).sum())
        self.tokens += len(targets_T)

    def distance(self, what: str) -> Distance:
        n = self.tokens
        return Distance(what, math.exp(self.nats / n), self.kl / n, self.agreed / n)


def compare(
    plain: Mixtral, quantised: Mixtral, sequences: Sequence[Sequence[int]], progress: Progress | None = None
) -> Comparison:
    """Both models on the same sequences, each of two tokens or more; `progress` is called after each sequence."""
    device = plain.embedding.device
    batches = [(Ragged.of([s[:-1]], device=device), torch.tensor(s[1:], device=device)) for s in sequences]
    models = dict(_mixtures(plain, quantised))
    itself, whole, *parts = distances(plain, models, batches, progress)
    return Comparison(itself.perplexity, sum(len(targets_T) for _, targets_T in batches), whole, parts)


@torch.no_grad()
def distances(
    plain: Mixtral, models: Mapping[str, Mixtral], batches: Sequence[tuple[Ragged, Tensor]],
    progress: Progress | None = None,
) -> list[Distance]:  # fmt: skip
    """Of the plain model to itself, for its perplexity, and of each other by name, all on the same batches.

    Args:
        batches: tokens, and for each the one that follows it; below 0: none, and the row is not counted.
        progress: called after each batch.
    """
    both = {"plain": plain, **models}
    sums = {what: _Sums() for what in both}
    size = max(1, _BLOCK_BYTES // (4 * len(both) * plain.config.vocab_size))
    for number, (batch, targets_T) in enumerate(batches, start=1):
        rows = (targets_T >= 0).nonzero().flatten()
        hidden = {what: model.norm(model.hidden(batch)[0][rows]) for what, model in both.items()}
        for some in torch.arange(len(rows), device=rows.device).split(size):
            logp = {what: model.logits(hidden[what][some]).log_softmax(-1) for what, model in both.items()}
            for what, sum_ in sums.items():
                sum_.add(logp[what], logp["plain"], targets_T[rows[some]])
        if progress is not None:
            progress("comparing", number, len(batches))
    return [sum_.distance(what) for what, sum_ in sums.items()]


def _mixtures(plain: Mixtral, quantised: Mixtral) -> Iterator[tuple[str, Mixtral]]:
    """The quantised model; then the plain one with one layer, or norm and output, quantised. All share tensors."""
    yield "all", quantised
    for i in range(plain.config.n_layers):
        mixture = _shallow(plain)
        mixture.layers[i] = quantised.layers[i]
        yield f"layer {i}", mixture
    if quantised.output is not None:
        mixture = _shallow(plain)
        mixture.norm, mixture.output = quantised.norm, quantised.output
        yield "output", mixture


def _shallow(model: Mixtral) -> Mixtral:
    """Another model of the same parts, so that one of them can be exchanged."""
    new = copy.copy(model)
    new._modules = dict(model._modules)
    new.layers = torch.nn.ModuleList(model.layers)
    return new
