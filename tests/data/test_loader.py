"""Packing laws: every token an input once an epoch, no pair across documents, batches pure in seed and step."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mixtral.data.loader import Loader, TrainBatch, epoch_quotas
from mixtral.data.shards import prepare
from mixtral.data.sources import Source
from mixtral.data.store import NO_TARGET, Documents, TokenData
from mixtral.errors import DataError, UsageError
from tests.data.byte_tokenizer import ByteTokenizer

BOS, EOS = 1, 2


class Fake:
    """Stands for TokenData: documents BOS, x, x, ..., EOS, each with its own x, in one shard."""

    def __init__(self, lengths: list[int], sources: list[int] | None = None, weights: list[float | None] | None = None):
        bodies = [np.full(length, number + 3) for number, length in enumerate(lengths)]
        tokens = np.concatenate([[BOS, *body, EOS] for body in bodies]).astype(np.uint16)
        length_M = np.array(lengths) + 2
        none_M = np.zeros(len(lengths), np.int64)
        source_M = np.array(sources) if sources else none_M
        self.train = Documents([tokens], none_M, np.cumsum(length_M) - length_M, length_M, source_M, none_M)
        self.weights = weights or [None]
        self.domains = [""]
        self.vocab_size = 1 << 16

    def documents(self, split: str) -> Documents:
        del split
        return self.train


def loader(fake: Fake, rows: int, context: int, seed: int = 0) -> Loader:
    return Loader(fake, rows, context, seed)  # type: ignore[arg-type]


def sequences(batch: TrainBatch) -> list[tuple[list[int], list[int]]]:
    """(tokens, targets) of each attention sequence of a batch."""
    cuts = batch.batch.cu_seqlens.tolist()
    return [(batch.batch.tokens_T[a:b].tolist(), batch.targets_T[a:b].tolist()) for a, b in pairwise(cuts)]


@settings(max_examples=60)
@given(
    lengths=st.lists(st.integers(0, 9), min_size=1, max_size=6),
    rows=st.integers(1, 4),
    context=st.integers(1, 9),
    seed=st.integers(0, 3),
)
def test_packing_laws(lengths: list[int], rows: int, context: int, seed: int) -> None:
    fake = Fake(lengths)
    source = loader(fake, rows, context, seed)
    epoch_tokens = sum(lengths) + 2 * len(lengths)
    stream = source.stream.read(0, 2 * epoch_tokens + context + 1)[0]
    for epoch in range(2):
        # An epoch is a permutation of whole documents: each token is an input exactly once.
        one = stream[epoch * epoch_tokens : (epoch + 1) * epoch_tokens].tolist()
        documents = [[BOS, *tail] for tail in split_at_bos(one)]
        assert sorted(documents) == sorted([BOS, *[number + 3] * n, EOS] for number, n in enumerate(lengths))
    # Rows are the stream's segments, each stretch of them in another order and none left out.
    stretch = max(1, epoch_tokens // context)
    segments = [source.segment(row) for row in range(2 * stretch)]
    assert sorted(segments[:stretch]) == list(range(stretch))
    assert sorted(segments[stretch:]) == list(range(stretch, 2 * stretch))
    for step in range(2 * stretch // rows):
        batch = source.batch(step)
        check_sequences(batch, rows, context)
        for row in range(rows):
            first = source.segment(step * rows + row) * context
            inputs, targets = (t[row * context : (row + 1) * context] for t in (batch.batch.tokens_T, batch.targets_T))
            *here, last = source.stream.read(first, first + context + 1)[0].tolist()
            assert inputs.tolist() == here
            # The target is the next token, except after EOS, where there is none: no pair crosses documents.
            expected = [NO_TARGET if x == EOS else y for x, y in zip(here, [*here[1:], last], strict=True)]
            assert targets.tolist() == expected


def split_at_bos(tokens: list[int]) -> list[list[int]]:
    documents: list[list[int]] = []
    for token in tokens:
        if token == BOS:
            documents.append([])
        else:
            documents[-1].append(token)
    return documents


def check_sequences(batch: TrainBatch, rows: int, context: int) -> None:
    """A sequence holds one document's tokens, no row boundary, and positions from 0."""
    packed = batch.batch
    cuts = packed.cu_seqlens.tolist()
    assert packed.cu_seqlens.dtype == torch.int32 and packed.tokens_T.dtype == batch.targets_T.dtype == torch.int64
    assert len(packed.tokens_T) == rows * context == cuts[-1]
    assert set(range(0, rows * context, context)) <= set(cuts)
    assert packed.positions_T.tolist() == [position for a, b in pairwise(cuts) for position in range(b - a)]
    for tokens, _ in sequences(batch):
        assert BOS not in tokens[1:] and EOS not in tokens[:-1]


def test_by_hand() -> None:
    batch = loader(Fake([3]), rows=2, context=4).batch(0)  # the stream: 1 3 3 3 2 1 3 3 | 3
    assert sequences(batch) == [([1, 3, 3, 3], [3, 3, 3, 2]), ([2], [NO_TARGET]), ([1, 3, 3], [3, 3, 3])]
    assert batch.batch.positions_T.tolist() == [0, 1, 2, 3, 0, 0, 1, 2]


def test_a_batch_is_a_function_of_seed_and_step() -> None:
    fake = Fake(list(range(30)))
    forward = [loader(fake, 2, 8, seed=5).batch(step) for step in range(80)]
    used = loader(fake, 2, 8, seed=5)
    for step in reversed(range(80)):  # in any order, from one loader
        again = used.batch(step)
        assert all(torch.equal(a, b) for a, b in zip(again.batch[:3], forward[step].batch[:3], strict=True))
        assert torch.equal(again.targets_T, forward[step].targets_T)
    assert used.epoch(0) == 0 and used.epoch(79) == 2  # 495 tokens an epoch, 16 a step
    other = loader(fake, 2, 8, seed=6)
    assert not all(torch.equal(other.batch(s).batch.tokens_T, forward[s].batch.tokens_T) for s in range(3))


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_parts_are_the_same_rows(parts: int) -> None:
    source = loader(Fake(list(range(12))), 4, 8)
    whole = sequences(source.batch(3))
    assert [s for part in range(parts) for s in sequences(source.batch(3, part, parts))] == whole


def epoch_tokens_by_source(fake: Fake, epochs: int) -> np.ndarray:
    stream = loader(fake, 1, 1).stream
    counts = []
    for epoch in range(epochs):
        order = stream.order(epoch)
        counts.append(np.bincount(fake.train.source_M[order], weights=fake.train.length_M[order], minlength=2))
    return np.array(counts)


def test_mixture_shares() -> None:
    # 4,000 tokens of source 0 and 1,000 of source 1, to be mixed half and half.
    fake = Fake([18] * 200 + [8] * 100, [0] * 200 + [1] * 100, [1.0, 1.0])
    assert epoch_quotas([4000, 1000], [1.0, 1.0]) == [2500, 2500]
    counts = epoch_tokens_by_source(fake, 8)
    assert (abs(counts - 2500) <= 20).all()
    seen = np.concatenate([loader(fake, 1, 1).stream.order(epoch) for epoch in range(8)])
    times = np.bincount(seen, minlength=300)
    # 8 epochs are five walks through source 0 and twenty through source 1: no document before the others' turn.
    assert (times[:200] == 5).all() and (times[200:] == 20).all()


def test_no_weights_means_once_each_and_empty_sources_take_no_share() -> None:
    assert epoch_quotas([40, 10], [None, None]) == [40, 10]
    assert epoch_quotas([40, 0], [1.0, 3.0]) == [40, 0]


def test_weights_reach_the_loader(make_data: Callable[..., TokenData]) -> None:
    data = make_data(["a" * 8] + ["b" * 8 + str(n) for n in range(9)], ["z" * 9], weights=[1.0, 9.0])
    tokens = torch.cat([Loader(data, 4, 16).batch(step).batch.tokens_T for step in range(20)])
    assert 0.8 < (tokens == ord("z") + 3).sum() / (tokens > EOS).sum() < 0.97


def test_val_batches_are_fixed_and_end(make_data: Callable[..., TokenData]) -> None:
    data = make_data([f"text {number}" for number in range(40)], val_share=0.5)
    total = int(data.val.length_M.sum())
    batches = Loader(data, 2, 8, seed=1).val_batches(10_000)
    assert sum(len(batch.targets_T) for batch in batches) == total
    assert sum(int((batch.targets_T == NO_TARGET).sum()) for batch in batches) == len(data.val.length_M)
    other_seed = Loader(data, 2, 8, seed=2).val_batches(10_000)
    assert all(torch.equal(a.targets_T, b.targets_T) for a, b in zip(batches, other_seed, strict=True))
    assert [len(batch.targets_T) for batch in Loader(data, 2, 8).val_batches(20)] == [16, 4]


def test_refusals(make_data: Callable[..., TokenData]) -> None:
    source = loader(Fake([3]), 4, 4)
    with pytest.raises(UsageError, match="rows must be at least 1"):
        loader(Fake([3]), 0, 4)
    with pytest.raises(UsageError, match="context must be at least 1"):
        loader(Fake([3]), 1, 0)
    with pytest.raises(UsageError, match="4 rows cannot give part 0 of 3 equal parts"):
        source.batch(0, 0, 3)
    with pytest.raises(UsageError, match="4 rows cannot give part 2 of 2 equal parts"):
        source.batch(0, 2, 2)
    with pytest.raises(UsageError, match="max_tokens must be at least 1"):
        source.val_batches(0)
    with pytest.raises(DataError, match="no val documents"):
        Loader(make_data(["a", "b"]), 1, 4).val_batches(10)


# -- domains -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def labelled(jsonl: Callable[..., Path], tmp_path: Path, tokenizer: ByteTokenizer) -> TokenData:
    """Documents of "a", "m" and "z" in three domains, which come in another order than their names."""
    letters = {"prose": "z", "code": "a", "logic": "m"}
    sources = [
        Source(str(jsonl(name, [letter * n for n in range(1, 6)])), domain=name) for name, letter in letters.items()
    ]
    return prepare(sources, tokenizer, tmp_path / "labelled", val_share=0.2)


def test_each_token_knows_its_domain(labelled: TokenData) -> None:
    assert labelled.domains == ["code", "logic", "prose"]
    source = Loader(labelled, 2, 16)
    batches = [source.batch(step) for step in range(4)] + source.val_batches(1000)
    number = {ord("a") + 3: 0, ord("m") + 3: 1, ord("z") + 3: 2}
    for batch in batches:
        assert batch.domains_T is not None and batch.domains_T.dtype == torch.int64
        assert batch.domains_T.shape == batch.targets_T.shape
        for tokens, domains in zip(
            torch.tensor_split(batch.batch.tokens_T, batch.batch.cu_seqlens[1:-1].long()),
            torch.tensor_split(batch.domains_T, batch.batch.cu_seqlens[1:-1].long()),
            strict=True,
        ):
            assert len(set(domains.tolist())) == 1  # BOS and EOS are their document's
            assert all(number[t] == d for t, d in zip(tokens.tolist(), domains.tolist(), strict=True) if t > EOS)
    moved = batches[0].to("meta")
    assert moved.domains_T is not None and moved.domains_T.device.type == "meta"


def test_one_domain_is_no_label(make_data: Callable[..., TokenData]) -> None:
    data = make_data(["abc", "def"])
    assert len(data.domains) == 1 and Loader(data, 1, 4).batch(0).domains_T is None


def test_a_token_beyond_the_vocabulary_is_refused(make_data: Callable[..., TokenData]) -> None:
    """A shard that rotted in place keeps its size: no such id may reach the embedding."""
    data = make_data(["a text", "another text"])
    path = data.folder / f"{data.index.shards['train'][0].name}.npy"
    content = path.read_bytes()
    path.write_bytes(content[:-2] + b"\xff\xff")
    damaged = TokenData(data.folder, ByteTokenizer())
    with pytest.raises(DataError, match=r"prepared: damaged, token 65535 is not one of the vocabulary's \d+"):
        Loader(damaged, rows=2, context=16, seed=0).batch(0)
