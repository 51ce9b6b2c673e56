"""The bigram baseline against counts done by hand and against a plain loop."""

from __future__ import annotations

import math
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest

from mixtral.errors import DataError
from mixtral.eval.ngram import Bigram, bigram_bits_per_byte


def pairs(tokens: list[int]) -> tuple[np.ndarray, np.ndarray]:
    return np.array(tokens), np.array([*tokens[1:], -100])


def test_by_hand() -> None:
    # Pairs 0->1, 1->0, 0->1, 1->2 of a vocabulary of 4. Targets: 1 twice, 0 and 2 once: n = 4, t = 3.
    model = Bigram([pairs([0, 1, 0, 1, 2])], vocab_size=4)
    unigram = [(1 + 0.75) / 7, (2 + 0.75) / 7, (1 + 0.75) / 7, 0.75 / 7]
    assert model.unigram_V == pytest.approx(unigram)
    # After 0 only 1 came (twice, one kind); after 1 both 0 and 2; 3 was never seen.
    inputs, targets = np.array([0, 0, 1, 1, 3]), np.array([1, 3, 2, 1, 1])
    expected = [(2 + unigram[1]) / 3, unigram[3] / 3, (1 + 2 * unigram[2]) / 4, 2 * unigram[1] / 4, unigram[1]]
    assert model.probability(inputs, targets) == pytest.approx(expected)


def test_bits_per_byte_by_hand() -> None:
    # One pair seen: p(1) = (1 + 1/2) / 2 = 0.75, p(1 | 0) = (1 + 0.75) / 2 = 0.875; the target stands for 2 bytes.
    bits = bigram_bits_per_byte([pairs([0, 1])], [pairs([0, 1])], np.array([1, 2]), 2)
    assert bits == pytest.approx(-math.log2(0.875) / 2)


def test_probabilities_sum_to_one_and_match_a_loop() -> None:
    rng = np.random.default_rng(0)
    chunks = [rng.integers(0, 12, size) for size in (50, 1, 400)]
    model = Bigram([pairs(list(chunk)) for chunk in chunks], vocab_size=15)
    counted = Counter((int(a), int(b)) for chunk in chunks for a, b in pairwise(chunk))
    for first in range(15):
        probabilities = model.probability(np.full(15, first), np.arange(15))
        assert probabilities.sum() == pytest.approx(1)
        follows = {b: n for (a, b), n in counted.items() if a == first}
        for second in range(15):
            prior = model.unigram_V[second]
            total = sum(follows.values()) + len(follows)
            expected = (follows.get(second, 0) + len(follows) * prior) / total if total else prior
            assert probabilities[second] == pytest.approx(expected)


def test_targets_without_bytes_cost_bits() -> None:
    train = [pairs([0, 1, 2] * 20)]
    text = bigram_bits_per_byte(train, [(np.array([0]), np.array([1]))], np.array([1, 1, 0]), 3)
    with_end = bigram_bits_per_byte(train, [pairs([0, 1, 2])], np.array([1, 1, 0]), 3)
    assert with_end > text


def test_nothing_to_count() -> None:
    with pytest.raises(DataError, match="no pair of tokens to count"):
        Bigram([pairs([1])], 4)
    with pytest.raises(DataError, match="hold no text"):
        bigram_bits_per_byte([pairs([0, 1])], [pairs([1])], np.ones(4, np.int64), 4)
