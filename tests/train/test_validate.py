"""Validation by hand: nats a token, bits a byte, loads of the experts."""

from __future__ import annotations

import math

import pytest
import torch

from mixtral.data.loader import Loader, TrainBatch
from mixtral.tokenizer import Tokenizer
from mixtral.train.step import validate
from tests.train.tiny_run import fresh_model, model_config


@pytest.fixture
def lengths_V(tokenizer: Tokenizer) -> torch.Tensor:
    return torch.from_numpy(tokenizer.byte_lengths())


def test_by_hand(loader: Loader, lengths_V: torch.Tensor) -> None:
    model = fresh_model(model_config(init_std=0.3)).requires_grad_(False)
    batches = loader.val_batches(200)
    assert len({len(b.targets_T) for b in batches}) > 1  # batches of unequal size count by their tokens
    nats, tokens, n_bytes = 0.0, 0, 0
    counts = torch.zeros(2, 4)
    for batch, targets_T, _ in batches:
        output = model(batch)
        assert output.logits is not None
        for row, target in zip(output.logits.log_softmax(-1), targets_T.tolist(), strict=True):
            if target != -100:
                nats, tokens, n_bytes = nats - float(row[target]), tokens + 1, n_bytes + int(lengths_V[target])
        for layer, routing in enumerate(output.routing):
            for expert in routing.experts_TK.flatten().tolist():
                counts[layer, expert] += 1
    found = validate(model, batches, lengths_V)
    assert found.cross_entropy == pytest.approx(nats / tokens, rel=1e-5)
    assert found.bits_per_byte == pytest.approx(nats / math.log(2) / n_bytes, rel=1e-5)
    torch.testing.assert_close(torch.tensor(found.loads), counts / counts.sum(1, keepdim=True))
    assert [sum(load) for load in found.loads] == pytest.approx([1, 1], abs=1e-6)


def test_the_bytes_are_those_of_the_text(loader: Loader, lengths_V: torch.Tensor) -> None:
    """And one more a document: the vocabulary puts a space before each text, which the model has to predict too."""
    val = loader.data.summary()["val"]
    batches = loader.val_batches(10**6)
    counted = sum(int(lengths_V[targets_T[targets_T != -100]].sum()) for _, targets_T, _ in batches)
    assert counted == val["text_bytes"] + val["documents"]


def test_a_dense_model_has_no_loads(loader: Loader, lengths_V: torch.Tensor) -> None:
    found = validate(fresh_model(model_config(n_experts=1, experts_per_token=1)), loader.val_batches(64), lengths_V)
    assert found.loads == [] and found.cross_entropy > 0


def test_loads_are_numbers_when_no_token_takes_an_expert(loader: Loader, lengths_V: torch.Tensor) -> None:
    model = fresh_model(model_config(router="threshold"))
    for block in model.layers:
        block.ffn.router.threshold.fill_(1.0)
    assert validate(model, loader.val_batches(64), lengths_V).loads == [[0.0] * 4] * 2


def test_a_batch_without_targets_changes_nothing(loader: Loader, lengths_V: torch.Tensor) -> None:
    """Such a batch comes when the held-out tokens end with one document's last token in a batch of its own."""
    model = fresh_model(model_config())
    batches = loader.val_batches(64)
    empty = TrainBatch(batches[0].batch, torch.full_like(batches[0].targets_T, -100))
    found = validate(model, [*batches, empty], lengths_V)
    assert found[:2] == validate(model, batches, lengths_V)[:2] and math.isfinite(found.cross_entropy)
