"""What a checkpoint of a run is like: held-out loss by domain, and each layer's routing by domain.

Legend: T tokens, E experts, M domains, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from corpus import DOMAINS, OTHER
from torch import Tensor

from mixtral.analysis.domains import (
    domain_counts,
    domain_entropy,
    mutual_information,
    token_information,
)
from mixtral.data.loader import Loader, TrainBatch
from mixtral.data.shards import prepare
from mixtral.data.sources import Source
from mixtral.data.store import NO_TARGET
from mixtral.model import Mixtral
from mixtral.moe.stats import Repeats, count_repeats, dead_experts, gini, score_entropy
from mixtral.tokenizer import Tokenizer

ROWS, CONTEXT = 8, 256
HeldOut = Mapping[str, Sequence[TrainBatch]]


def prepare_held_out(corpus: Path, tokenizer: Tokenizer) -> None:
    """Tokenise the held-out texts, once for all runs."""
    for path in (corpus / "held_out").glob("*.jsonl"):
        prepare([Source(str(path))], tokenizer, corpus / "tokens" / path.stem, val_share=0)


def held_out(corpus: Path, tokenizer: Tokenizer, tokens: int, names: Sequence[str] = tuple(DOMAINS)) -> HeldOut:
    """Batches of each domain, about `tokens` tokens of it, the same ones always; every token once."""
    found = {}
    for name in (name for name in names if (corpus / "held_out" / f"{name}.jsonl").exists()):
        source = Source(str(corpus / "held_out" / f"{name}.jsonl"))
        data = prepare([source], tokenizer, corpus / "tokens" / name, val_share=0)
        there = int(data.train.length_M.sum())
        batches = max(1, min(tokens, there) // (ROWS * CONTEXT))
        loader = Loader(data, ROWS, CONTEXT)
        found[name] = [loader.batch(i) for i in range(batches)]
    return found


def other_texts(corpus: Path, tokenizer: Tokenizer, tokens: int) -> HeldOut:
    """The same of the texts that no run trains on."""
    return held_out(corpus, tokenizer, tokens, OTHER)


class Layer:
    """Sums over batches of one layer's routing."""

    def __init__(self, n_experts: int, vocab_size: int) -> None:
        self.counts_MVE = torch.zeros(len(DOMAINS), vocab_size, n_experts, dtype=torch.int64)
        self.repeats = {domain: Repeats() for domain in DOMAINS}
        self.entropies: list[float] = []
        self.tokens = 0

    def add(self, routing: Any, part: TrainBatch, domain: str) -> None:
        """A batch whose tokens are all of one domain."""
        tokens_T = part.batch.tokens_T
        domains_T = torch.full_like(tokens_T, list(DOMAINS).index(domain))
        n_domains, vocab_size, _ = self.counts_MVE.shape
        self.counts_MVE += domain_counts(routing, tokens_T, domains_T, n_domains, vocab_size)
        self.repeats[domain] = self.repeats[domain].plus(count_repeats(routing, part.batch.cu_seqlens))
        self.entropies.append(score_entropy(routing))
        self.tokens += len(tokens_T)

    def figures(self) -> dict[str, Any]:
        counts_ME = self.counts_MVE.sum(1)
        load_E = counts_ME.sum(0) / counts_ME.sum().clamp(min=1)
        shares_ME = counts_ME / counts_ME.sum(1, keepdim=True).clamp(min=1)
        together = Repeats()
        for repeats in self.repeats.values():
            together = together.plus(repeats)
        return {
            "load": _rounded(load_E),
            "gini": gini(load_E),
            "max_over_mean": float(load_E.max() * len(load_E)),
            "dead": dead_experts(load_E, None),
            "entropy": sum(self.entropies) / len(self.entropies),
            "mean_k": float(counts_ME.sum() / self.tokens),
            "information": mutual_information(counts_ME),
            "token_information": token_information(self.counts_MVE),
            "domain_entropy": domain_entropy(counts_ME),
            "first_repeats": together.first_share,
            "any_repeats": together.any_share,
            "repeats": {d: [r.first_share, r.any_share] for d, r in self.repeats.items()},
            "shares": {d: _rounded(shares_E) for d, shares_E in zip(DOMAINS, shares_ME, strict=True)},
        }


@torch.no_grad()
def measure(model: Mixtral, batches: HeldOut) -> dict[str, Any]:
    """Losses in nats a token, `loss` their mean over domains, and the routing of every layer."""
    model.eval()
    config = model.config
    layers = [Layer(config.n_experts, config.vocab_size) for _ in range(config.n_layers if config.is_sparse else 0)]
    losses = {}
    for domain, parts in batches.items():
        nats, targets = 0.0, 0
        for part in parts:
            output = model(part.batch, targets=part.targets_T, loss_weights="mean")
            counted = int((part.targets_T != NO_TARGET).sum())
            nats, targets = nats + float(output.loss) * counted, targets + counted
            for layer, routing in zip(layers, output.routing, strict=True):
                layer.add(routing, part, domain)
        losses[domain] = nats / targets
    return {
        "loss": sum(losses.values()) / len(losses),
        "losses": losses,
        "layers": [layer.figures() for layer in layers],
    }


def _rounded(values: Tensor) -> list[float]:
    return [round(x, 5) for x in values.tolist()]
