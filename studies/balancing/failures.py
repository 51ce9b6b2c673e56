"""Where a trained model is put out of its way: what its loss, its routing and its balance do.

    plain      each domain by itself, each document a context of its own, as in training
    joined     the same, but documents run on into each other
    mixed      four domains in one context, PIECE tokens of each in turn
    alone      the same pieces, each a context of its own
    shuffled   the tokens of joined contexts in random order
    NAME       text of no trained domain (corpus.py), as `plain`

The first four are the same tokens with the same targets in other company, so that their losses compare. (The last
token of a piece has no target.)

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
from mixtral.model import Mixtral, Ragged
from mixtral.moe.choice import counts_of
from mixtral.moe.stats import gini, score_entropy

PIECE = 32
TOKENS_AT_A_TIME = 2048
Texts = tuple[Tensor, Tensor]  # tokens and targets, both int64 [P, PIECE]
Batch = tuple[Ragged, Tensor]  # and its targets, int64 [T]


@torch.no_grad()
def failures(model: Mixtral, plain: HeldOut, others: HeldOut, byte_lengths_V: Tensor) -> dict[str, dict[str, Any]]:
    """The figures of every case; of each domain as much as there is of the shortest one."""
    model.eval()
    count = min(map(len, plain.values()))
    parts = {domain: parts[:count] for domain, parts in plain.items()}
    pieces = {domain: _pieces(mine) for domain, mine in parts.items()}
    joined = _joined([_rows(texts, CONTEXT) for texts in pieces.values()])
    cases = {
        "plain": [(part.batch, _cut(part.targets_T)) for mine in parts.values() for part in mine],
        "joined": _batches(joined),
        "mixed": _batches(_rows(interleaved(pieces), CONTEXT)),
        "alone": _batches(_joined([_rows(texts, PIECE) for texts in pieces.values()])),
        "shuffled": _batches(shuffled(joined[0])),
    }
    cases |= {name: [(part.batch, part.targets_T) for part in mine] for name, mine in others.items()}
    return {name: figures(model, batches, byte_lengths_V) for name, batches in cases.items()}


def _pieces(parts: Sequence[TrainBatch]) -> Texts:
    """A domain's tokens in pieces, in order."""
    tokens_T = torch.cat([part.batch.tokens_T for part in parts])
    targets_T = torch.cat([_cut(part.targets_T) for part in parts])
    return tokens_T.view(-1, PIECE), targets_T.view(-1, PIECE)


def _cut(targets_T: Tensor) -> Tensor:
    """Without the targets of the last tokens of pieces: in a piece alone, these would have nothing to predict."""
    targets_T = targets_T.clone()
    targets_T[PIECE - 1 :: PIECE] = NO_TARGET
    return targets_T


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


def shuffled(tokens: Tensor) -> Texts:
    """Each row's tokens in random order; a target is what follows now, the last of a row has none."""
    order = torch.rand(tokens.shape, generator=torch.Generator().manual_seed(0)).argsort(1)
    tokens = tokens.gather(1, order)
    return tokens, torch.nn.functional.pad(tokens[:, 1:], (0, 1), value=NO_TARGET)


def figures(model: Mixtral, batches: Sequence[Batch], byte_lengths_V: Tensor) -> dict[str, Any]:
    """Loss (nats a token, bits a byte) and, a layer each, entropy of scores, Gini and largest load of the experts."""
    nats, counted, n_bytes, counts, entropies = 0.0, 0, 0, list[Tensor](), list[list[float]]()
    for batch, targets_T in batches:
        output = model(batch, targets=targets_T, loss_weights="mean")
        here_T = targets_T[targets_T != NO_TARGET]
        nats, counted = nats + float(output.loss) * len(here_T), counted + len(here_T)
        n_bytes += int(byte_lengths_V[here_T].sum())
        taken = [counts_of(routing.chosen_TK, model.config.n_experts) for routing in output.routing]
        counts = [a + b for a, b in zip(counts, taken, strict=True)] if counts else taken
        entropies.append([score_entropy(routing) for routing in output.routing])
    loads = [c / c.sum().clamp(min=1) for c in counts]
    return {
        "loss": nats / counted,
        "bits_per_byte": nats / math.log(2) / max(1, n_bytes),
        "targets": counted,
        "entropy": [sum(layer) / len(layer) for layer in zip(*entropies, strict=True)],
        "gini": [gini(load_E) for load_E in loads],
        "max_over_mean": [float(load_E.max() * len(load_E)) for load_E in loads],
    }


def _batches(rows: Texts) -> list[Batch]:
    """Each row a context, as many in a batch as there is room for."""
    at_a_time = max(1, TOKENS_AT_A_TIME // rows[0].shape[1])
    parts = zip(*(texts.split(at_a_time) for texts in rows), strict=True)
    return [(_packed(tokens), targets.flatten()) for tokens, targets in parts]


def _packed(tokens: Tensor) -> Ragged:
    rows, context = tokens.shape
    positions_T = torch.arange(context).repeat(rows)
    starts = torch.arange(0, rows * context + 1, context, dtype=torch.int32)
    return Ragged(tokens.flatten(), positions_T, starts, context)
