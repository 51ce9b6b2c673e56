"""A counted bigram model: the baseline that a trained model's bits per byte stand beside.

Witten-Bell smoothing, which has nothing to tune. With c(a, b) how often b followed a in training, c(a) its sum over b,
t(a) how many different tokens followed a, n and t the same for single targets, and V the vocabulary:

    p(b)     = (c(b) + t / V) / (n + t)
    p(b | a) = (c(a, b) + t(a) p(b)) / (c(a) + t(a)),   and p(b) for an a that training never saw

Legend: N token pairs, V vocabulary, P different pairs.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from mixtral.errors import DataError

Pairs = Iterable[tuple[np.ndarray, np.ndarray]]  # (inputs_N, targets_N), integers; a negative target counts for nothing


class Bigram:
    """Counts of pairs of tokens, and the probabilities that follow from them."""

    def __init__(self, train: Pairs, vocab_size: int) -> None:
        """Count; DataError when there is no pair at all."""
        self.vocab_size = vocab_size
        # A pair (a, b) is the number a * V + b; sorted, so that looking one up is a binary search.
        self.pairs_P = np.empty(0, np.int64)
        self.counts_P = np.empty(0, np.int64)
        for inputs_N, targets_N in train:
            kept = targets_N >= 0
            self._add(inputs_N[kept].astype(np.int64) * vocab_size + targets_N[kept])
        if not len(self.pairs_P):
            raise DataError("bigram: no pair of tokens to count; give more training text")
        first_P, second_P = np.divmod(self.pairs_P, vocab_size)
        self.follows_V = np.bincount(first_P, weights=self.counts_P, minlength=vocab_size)  # c(a)
        self.kinds_V = np.bincount(first_P, minlength=vocab_size)  # t(a)
        targets_V = np.bincount(second_P, weights=self.counts_P, minlength=vocab_size)  # c(b)
        kinds = np.count_nonzero(targets_V)
        self.unigram_V = (targets_V + kinds / vocab_size) / (targets_V.sum() + kinds)

    def _add(self, pairs_N: np.ndarray) -> None:
        new, counts = np.unique(pairs_N, return_counts=True)
        merged, where = np.unique(np.concatenate([self.pairs_P, new]), return_inverse=True)
        both = np.concatenate([self.counts_P, counts])
        self.pairs_P, self.counts_P = merged, np.bincount(where, weights=both, minlength=len(merged)).astype(np.int64)

    def probability(self, inputs_N: np.ndarray, targets_N: np.ndarray) -> np.ndarray:
        """p(target | input) of each pair; targets must not be negative."""
        pairs_N = inputs_N.astype(np.int64) * self.vocab_size + targets_N
        place_N = np.minimum(np.searchsorted(self.pairs_P, pairs_N), len(self.pairs_P) - 1)
        count_N = np.where(self.pairs_P[place_N] == pairs_N, self.counts_P[place_N], 0)
        kinds_N, follows_N = self.kinds_V[inputs_N], self.follows_V[inputs_N]
        unigram_N = self.unigram_V[targets_N]
        seen_N = kinds_N > 0
        smoothed_N = (count_N + kinds_N * unigram_N) / np.where(seen_N, follows_N + kinds_N, 1)
        return np.where(seen_N, smoothed_N, unigram_N)


def bigram_bits_per_byte(train: Pairs, val: Pairs, byte_lengths_V: np.ndarray, vocab_size: int) -> float:
    """Bits per byte of text of a bigram model counted on `train`, over exactly the pairs of `val`.

    Bits are summed over all targets, those of no bytes (end of text) too; bytes over the same targets by
    `byte_lengths_V`. A model's figure is comparable when it sums the same way over the same pairs. Arrays of torch
    serve too, by `.numpy()`. Raises DataError when either side is empty.
    """
    model = Bigram(train, vocab_size)
    bits = 0.0
    text_bytes = 0
    for inputs_N, targets_N in val:
        kept = targets_N >= 0
        bits -= float(np.log2(model.probability(inputs_N[kept], targets_N[kept])).sum())
        text_bytes += int(byte_lengths_V[targets_N[kept]].sum())
    if not text_bytes:
        raise DataError("bigram: the validation pairs hold no text; give more validation text")
    return bits / text_bytes
