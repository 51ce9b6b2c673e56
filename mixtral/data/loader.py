"""Training batches cut from prepared tokens: a pure function of the data, the seed and the step.

**The stream.** All documents of an epoch, in an order sampled from seed and epoch, laid end to end; then the next
epoch's. Segment g of the stream holds the `context` tokens from g * context on, so every token is an input exactly once
an epoch, wherever rows and batches end. What a checkpoint must keep of the data is the step alone.

**The order of rows.** Neighbouring segments are often one document, and a batch of them would have gradients of one
subject. So rows are taken in a random order within each stretch of as many segments as an epoch has: row g of the run
is segment `permutation(g)`. (Measured: docs/log.md, 2026-11-22.)

**Boundaries.** Attention sees a document's tokens inside its row, nothing else: a sequence starts at each document's
BOS and at each row. A document that a row cuts goes on in the next row as a new sequence, its positions from 0 again.
A token's target is the next token of its document, across the row's end too; a document's last token has none.

**Mixture.** Without weights every document comes once an epoch. With weights w, an epoch still holds as many tokens as
all sources have together, and source i gets the share w_i / sum(w) of them: it is walked through again and again in
ever new orders, each epoch going on where the last one stopped. So a small source with a large weight repeats within
an epoch, and of a large source with a small weight every document is seen before one is seen twice. The shares hold to
within one document.

Legend: T tokens, M documents.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from mixtral.data.store import NO_TARGET, Documents, TokenData
from mixtral.errors import DataError, UsageError
from mixtral.model.batch import Ragged


class TrainBatch(NamedTuple):
    """Ragged inputs and, for each, the token that follows in its document."""

    batch: Ragged
    targets_T: Tensor  # int64, NO_TARGET (-100) at the last token of each document
    domains_T: Tensor | None = None  # int64, index into TokenData.domains, -1: unknown; None: the data has one alone

    def to(self, device: torch.device | str) -> TrainBatch:
        domains_T = None if self.domains_T is None else self.domains_T.to(device)
        return TrainBatch(self.batch.to(device), self.targets_T.to(device), domains_T)


class Loader:
    """Batches of `rows` rows of `context` tokens.

    Raises UsageError for sizes out of range, DataError when the split is empty.
    """

    def __init__(self, data: TokenData, rows: int, context: int, seed: int = 0, split: str = "train") -> None:
        for name, value in (("rows", rows), ("context", context)):
            if value < 1:
                raise UsageError(f"loader: {name} must be at least 1, not {value}")
        self.data = data
        self.rows = rows
        self.context = context
        self.seed = seed
        self.stream = Stream(data.documents(split), data.weights, seed)
        self.stretch = max(1, sum(self.stream.quotas) // context)  # segments that are shuffled together
        self._permutation: tuple[int, np.ndarray] | None = None  # the last one sampled, as steps follow each other

    def batch(self, step: int, part: int = 0, parts: int = 1) -> TrainBatch:
        """Part `part` of `parts` of the batch of a step: an equal share of its rows, in order."""
        if self.rows % parts or not 0 <= part < parts:
            raise UsageError(f"loader: {self.rows} rows cannot give part {part} of {parts} equal parts")
        rows = self.rows // parts
        first = step * self.rows + part * rows
        firsts = [self.segment(row) * self.context for row in range(first, first + rows)]
        return self._pack([self.stream.read(begin, begin + self.context + 1) for begin in firsts])

    def segment(self, row: int) -> int:
        """Where in the stream, in units of `context`, the row of this number lies."""
        stretch, number = divmod(row, self.stretch)
        if self._permutation is None or self._permutation[0] != stretch:
            sampled = np.random.default_rng([self.seed, 3, stretch]).permutation(self.stretch)
            self._permutation = stretch, sampled
        return stretch * self.stretch + int(self._permutation[1][number])

    def epoch(self, step: int) -> int:
        """The epoch in which a step's first token lies, from 0."""
        return self.stream.epoch_at(step * self.rows * self.context)

    def val_batches(self, max_tokens: int) -> list[TrainBatch]:
        """The first `max_tokens` tokens of the held-out documents, in an order that no seed changes.

        Documents come once, unweighted; the last batch and its last row may be shorter.
        """
        if max_tokens < 1:
            raise UsageError(f"loader: max_tokens must be at least 1, not {max_tokens}")
        documents = self.data.documents("val")
        stream = Stream(documents, [None] * len(self.data.weights), seed=0)
        stop = min(max_tokens, int(documents.length_M.sum()))
        firsts = range(0, stop, self.context)
        rows = [stream.read(first, min(first + self.context, stop) + 1) for first in firsts]
        return [self._pack(rows[i : i + self.rows]) for i in range(0, len(rows), self.rows)]

    def _pack(self, rows: list[Row]) -> TrainBatch:
        """The batch of rows as `Stream.read` gives them, each with one token more than it has inputs."""
        tokens_T = np.concatenate([row.tokens[:-1] for row in rows])
        if (largest := max(int(row.tokens.max()) for row in rows)) >= self.data.vocab_size:
            raise DataError(
                f"{self.data.folder}: damaged, token {largest} is not one of the vocabulary's {self.data.vocab_size}"
            )
        targets_T = np.concatenate([np.where(row.begins[1:], NO_TARGET, row.tokens[1:]) for row in rows])
        begins_T = np.concatenate([np.append(True, row.begins[1:-1]) for row in rows])
        starts = np.flatnonzero(begins_T)
        lengths = np.diff(starts, append=len(tokens_T))
        positions_T = np.arange(len(tokens_T)) - np.repeat(starts, lengths)
        cu_seqlens = np.append(starts, len(tokens_T)).astype(np.int32)
        packed = Ragged(
            torch.from_numpy(tokens_T),
            torch.from_numpy(positions_T),
            torch.from_numpy(cu_seqlens),
        )
        domains_T = None
        if len(self.data.domains) > 1:
            domains_T = torch.from_numpy(np.concatenate([row.domains[:-1] for row in rows]))
        return TrainBatch(packed, torch.from_numpy(targets_T), domains_T)


class Row(NamedTuple):
    """A stretch of the stream."""

    tokens: np.ndarray  # int64
    begins: np.ndarray  # bool, whether a document begins there
    domains: np.ndarray  # int64, of the document


class _Epoch(NamedTuple):
    order_M: np.ndarray  # the documents, in order
    ends_M: np.ndarray  # where each ends in the whole stream


class Stream:
    """The endless stream of tokens; see the top of this file."""

    def __init__(self, documents: Documents, weights: list[float | None], seed: int) -> None:
        self.documents = documents
        self.seed = seed
        sizes = np.bincount(documents.source_M, weights=documents.length_M, minlength=len(weights))
        self.sizes = [int(size) for size in sizes]  # tokens of each source
        self.quotas = epoch_quotas(self.sizes, weights)
        self.epoch_ends: list[int] = []  # in tokens, of the epochs planned so far
        self.planned: dict[int, _Epoch] = {}  # shuffled rows step between neighbouring epochs at their seam

    def read(self, first: int, stop: int) -> Row:
        """The stream from position `first` to `stop`."""
        begins = np.zeros(stop - first, dtype=bool)
        domains = np.empty(stop - first, dtype=np.int64)
        pieces = []
        position = first
        while position < stop:
            order_M, ends_M = self._epoch(self.epoch_at(position))
            for i in range(int(np.searchsorted(ends_M, position, side="right")), len(order_M)):
                document, end = int(order_M[i]), int(ends_M[i])
                begin = end - int(self.documents.length_M[document])
                if begin >= position:
                    begins[begin - first] = True
                pieces.append(self.documents.tokens(document)[position - begin : stop - begin])
                domains[position - first : end - first] = self.documents.domain_M[document]
                position = min(end, stop)
                if position == stop:
                    break
        return Row(np.concatenate(pieces).astype(np.int64), begins, domains)

    def epoch_at(self, position: int) -> int:
        while not self.epoch_ends or self.epoch_ends[-1] <= position:
            self._epoch(len(self.epoch_ends))
        return int(np.searchsorted(self.epoch_ends, position, side="right"))

    def _epoch(self, epoch: int) -> _Epoch:
        """Plan an epoch; its neighbours' plans are kept, as steps follow each other."""
        if epoch not in self.planned:
            order_M = self.order(epoch)
            start = self.epoch_ends[epoch - 1] if epoch else 0
            ends_M = start + np.cumsum(self.documents.length_M[order_M])
            if epoch == len(self.epoch_ends):
                self.epoch_ends.append(int(ends_M[-1]) if len(ends_M) else start)
            self.planned[epoch] = _Epoch(order_M, ends_M)
            self.planned = {e: plan for e, plan in self.planned.items() if abs(e - epoch) <= 2}
        return self.planned[epoch]

    def order(self, epoch: int) -> np.ndarray:
        """The documents of an epoch: of each source those that begin in its quota's stretch, all shuffled together."""
        chosen = [np.empty(0, np.int64)]
        for source, (size, quota) in enumerate(zip(self.sizes, self.quotas, strict=True)):
            if not quota:
                continue
            mine = np.flatnonzero(self.documents.source_M == source)
            start, stop = epoch * quota, (epoch + 1) * quota
            for walk in range(start // size, -(-stop // size)):
                order = np.random.default_rng([self.seed, 1, source, walk]).permutation(mine)
                lengths = self.documents.length_M[order]
                begins = walk * size + np.cumsum(lengths) - lengths
                chosen.append(order[(begins >= start) & (begins < stop)])
        return np.random.default_rng([self.seed, 2, epoch]).permutation(np.concatenate(chosen))


def epoch_quotas(sizes: list[int], weights: list[float | None]) -> list[int]:
    """Tokens of each source in one epoch, from its tokens and weight; the rule stands at the top of this file."""
    given = [weight or 0.0 for weight in weights]
    if not any(given):
        return sizes
    # A source that has no training text takes no share.
    live = [weight if size else 0.0 for size, weight in zip(sizes, given, strict=True)]
    return [max(1, round(sum(sizes) * weight / sum(live))) if weight else 0 for weight in live]
