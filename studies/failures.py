"""Where a trained model is put out of its way: what its loss, its routing and its balance do.

    plain      each domain by itself
    mixed      four domains in one context, PIECE tokens of each in turn
    alone      the same pieces, each in a context of its own
    shuffled   the tokens of plain contexts in random order
    NAME       text of no trained domain (corpus.py)

The first three are the same tokens with the same targets in other company, so that their losses compare. (The last
token of a piece has no target, and a context may run on from one document into the next.)

Legend: T tokens, P pieces.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from measure import CONTEXT, HeldOut
from torch import Tensor

from mixtral.data.loader import TrainBatch
from mixtral.data.store import NO_TARGET
from mixtral.model import Mixtral, Packed
from mixtral.moe.balance import assignment_counts
from mixtral.moe.stats import gini, score_entropy

PIECE = 32
TOKENS_AT_A_TIME = 2048
Texts = tuple[Tensor, Tensor]  # tokens and targets, both int64 [P, PIECE]


@torch.no_grad()
def failures(model: Mixtral, plain: HeldOut, others: HeldOut, byte_lengths_V: Tensor) -> dict[str, dict[str, Any]]:
    """The figures of every case; `plain` has as many pieces of each domain as the shortest one has."""
    model.eval()
    pieces = {domain: _pieces(parts) for domain, parts in plain.items()}
    count = min(len(tokens) for tokens, _ in pieces.values()) // (CONTEXT // PIECE) * (CONTEXT // PIECE)
    pieces = {domain: (tokens[:count], targets[:count]) for domain, (tokens, targets) in pieces.items()}
    cases = {
        "plain": _joined([_rows(texts, CONTEXT) for texts in pieces.values()]),
        "mixed": _rows(interleaved(pieces), CONTEXT),
        "alone": _joined([_rows(texts, PIECE) for texts in pieces.values()]),
    }
    cases["shuffled"] = shuffled(*cases["plain"])
    found = {name: figures(model, *rows, byte_lengths_V) for name, rows in cases.items()}
    for name, parts in others.items():
        found[name] = figures(model, *_rows(_pieces(parts), CONTEXT), byte_lengths_V)
    return found


def _pieces(parts: Sequence[TrainBatch]) -> Texts:
    """A domain's tokens in pieces, in order; the last token of each is no input to a target."""
    tokens_T = torch.cat([part.batch.tokens_T for part in parts])
    targets_T = torch.cat([part.targets_T for part in parts])
    whole = len(tokens_T) // PIECE * PIECE
    tokens, targets = tokens_T[:whole].view(-1, PIECE), targets_T[:whole].view(-1, PIECE).clone()
    targets[:, -1] = NO_TARGET
    return tokens, targets


def interleaved(pieces: Mapping[str, Texts]) -> Texts:
    """One piece of each domain in turn; each domain's pieces keep their order."""
    tokens, targets = zip(*pieces.values(), strict=True)
    return torch.stack(tokens, 1).view(-1, PIECE), torch.stack(targets, 1).view(-1, PIECE)


def _rows(texts: Texts, context: int) -> Texts:
    """Pieces laid end to end and cut into rows -> [rows, context]; what fills no row is left out."""
    tokens, targets = (t.flatten() for t in texts)
    whole = len(tokens) // context * context
    return tokens[:whole].view(-1, context), targets[:whole].view(-1, context)


def _joined(rows: Sequence[Texts]) -> Texts:
    tokens, targets = zip(*rows, strict=True)
    return torch.cat(tokens), torch.cat(targets)


def shuffled(tokens: Tensor, targets: Tensor) -> Texts:
    """Each row's tokens in random order; a target is what follows now, the last of a row has none."""
    del targets
    order = torch.rand(tokens.shape, generator=torch.Generator().manual_seed(0)).argsort(1)
    tokens = tokens.gather(1, order)
    return tokens, torch.nn.functional.pad(tokens[:, 1:], (0, 1), value=NO_TARGET)


def figures(model: Mixtral, tokens: Tensor, targets: Tensor, byte_lengths_V: Tensor) -> dict[str, Any]:
    """Loss (nats a token, bits a byte) and, a layer each, entropy of scores, Gini and largest load of the experts."""
    nats, counted, counts, entropies = 0.0, 0, list[Tensor](), list[list[float]]()
    rows = max(1, TOKENS_AT_A_TIME // tokens.shape[1])
    for part_tokens, part_targets in zip(tokens.split(rows), targets.split(rows), strict=True):
        output = model(_packed(part_tokens), targets=part_targets.flatten())
        here = int((part_targets != NO_TARGET).sum())
        nats, counted = nats + float(output.loss) * here, counted + here
        taken = [assignment_counts(routing) for routing in output.routing]
        counts = [a + b for a, b in zip(counts, taken, strict=True)] if counts else taken
        entropies.append([score_entropy(routing) for routing in output.routing])
    loads = [c / c.sum().clamp(min=1) for c in counts]
    n_bytes = int(byte_lengths_V[targets[targets != NO_TARGET]].sum())
    return {
        "loss": nats / counted,
        "bits_per_byte": nats / math.log(2) / max(1, n_bytes),
        "targets": counted,
        "entropy": [sum(layer) / len(layer) for layer in zip(*entropies, strict=True)],
        "gini": [gini(load_E) for load_E in loads],
        "max_over_mean": [float(load_E.max() * len(load_E)) for load_E in loads],
    }


def _packed(tokens: Tensor) -> Packed:
    rows, context = tokens.shape
    positions_T = torch.arange(context).repeat(rows)
    starts = torch.arange(0, rows * context + 1, context, dtype=torch.int32)
    return Packed(tokens.flatten(), positions_T, starts, context)
