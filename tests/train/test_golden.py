"""Losses of a tiny run, committed: a change that should not move numbers does not.

To renew them after a change that should: python -m tests.train.test_golden
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from mixtral.data.loader import TrainBatch
from mixtral.model import Ragged
from mixtral.train.objective import next_token
from mixtral.train.step import train_step
from tests.train.tiny_run import fresh_state, model_config, train_config

GOLDEN = Path(__file__).parent / "golden_tiny.json"
STEPS = 10


def batch(step: int) -> TrainBatch:
    """Made of integers alone, so that neither the data nor the tokenizer moves these numbers."""
    tokens = [[(7 * step + 3 * row + i * i) % 320 for i in range(33)] for row in range(4)]
    return TrainBatch(Ragged.of([t[:-1] for t in tokens]), torch.tensor([t for row in tokens for t in row[1:]]))


def losses() -> dict[str, list[float]]:
    config = train_config(model=model_config(init_std=0.1).to_dict())
    _, train_state = fresh_state(config)
    results = [train_step(train_state, [batch(step % 2)], next_token, config, step, False) for step in range(STEPS)]
    lines = [{**result._asdict(), **result.aux} for result in results]
    names = ("cross_entropy", "micro_batch", "z_loss", "grad_norm", "lr")
    return {name: [line[name] for line in lines] for name in names}


def test_golden_losses() -> None:
    wanted = json.loads(GOLDEN.read_text())
    found = losses()
    assert found.keys() == wanted.keys()
    for name, values in wanted.items():
        assert found[name] == pytest.approx(values, rel=1e-5), name


if __name__ == "__main__":
    torch.set_num_threads(1)
    GOLDEN.write_text(json.dumps(losses(), indent=1) + "\n")
