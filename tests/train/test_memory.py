"""Every field of a run with absurd values: refused in one line, and before any memory is taken."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from mixtral.config import ModelConfig
from mixtral.data.loader import Loader
from mixtral.data.store import TokenData
from mixtral.errors import ConfigError, MixtralError
from mixtral.model import Mixtral
from mixtral.system import available_memory_bytes
from mixtral.train.config import PretrainConfig, override
from mixtral.train.memory import BYTES_PER_TOKEN, batch_bytes, check_memory, least_bytes
from mixtral.train.state import TrainState
from tests.train.tiny_run import train_config

ABSURD = ("1e30", "1" + 400 * "0", 5000 * "9", "-1e30", "nan", "infinity", "1e400", "many", "[]", "")
KINDS = {"": PretrainConfig, "model.": ModelConfig}
FIELDS = [f"{prefix}{f.name}" for prefix, kind in KINDS.items() for f in dataclasses.fields(kind)]
# What costs no memory by itself: texts, rates, which training judges, and tokens of a text, which has only so many.
FREE = {
    "data", "tokenizer", "lr", "weight_decay", "clip", "balance", "trackers", "model.rope_theta", "model.norm_eps",
    "model.init_std", "val_tokens", "val_every", "save_every", "stats_every", "keep", "seed", "model.context",
    "model.sliding_window", "model.bos_id", "model.eos_id", "steps",
}  # fmt: skip


@pytest.mark.parametrize("field", [name for name in FIELDS if name != "model"])
def test_absurd_values(field: str) -> None:
    for text in ABSURD:
        try:
            check_memory(override(train_config(), [f"{field}={text}"]))
        except MixtralError as error:
            assert "\n" not in str(error)
        else:
            assert field in FREE, text


@pytest.mark.parametrize("field", ["rows", "model.dim", "model.n_layers", "model.vocab_size", "model.ffn_dim"])
def test_the_largest_numbers_that_a_field_takes(field: str) -> None:
    with pytest.raises(MixtralError, match=r"memory are needed|too many tokens|must be at most"):
        check_memory(override(train_config(), [f"{field}={2**63 - 2 * 2**10}"]))


def test_rows_are_bounded_however_many_parts_they_come_in() -> None:
    """The parts of a step are a list."""
    for parts in ("1e15", "1e10"):
        changes = ["rows=1e15", f"accumulation={parts}", "steps=1", "context=1"]
        with pytest.raises(MixtralError, match=r"GiB of memory are needed .*; choose fewer rows, or a shorter context"):
            check_memory(override(train_config(), changes))


def test_a_batch_is_no_less_than_is_told(data: TokenData) -> None:
    config = train_config(rows=4, accumulation=2)
    parts = [Loader(data, config.rows, config.context).batch(0, i, 2) for i in range(2)]
    tensors = [(part.batch.tokens_T, part.batch.positions_T, part.targets_T) for part in parts]
    content = sum(t.nbytes for part in tensors for t in part)
    assert content == BYTES_PER_TOKEN * config.tokens_per_step < batch_bytes(config)


def test_both_numbers_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mixtral.train.memory.free_memory_bytes", lambda _: 2**30)
    config = train_config(model={"dim": 4096, "head_dim": 1024})
    needed = least_bytes(config) / 2**30
    assert needed > 1
    with pytest.raises(MixtralError, match=rf"^train: {needed:,.1f} GiB of memory .* and 1\.0 GiB are free; choose a"):
        check_memory(config)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_no_more_than_what_a_run_takes(optimizer: str, dtype: torch.dtype) -> None:
    """Counted on the tensors of a run: weights, masters, gradients, moments; no run that fits may be refused."""
    config = train_config(optimizer=optimizer, rows=1, context=1)
    model = Mixtral(config.model)
    held = TrainState.of(model, config, dtype)
    for p in held.optimizer.params.values():
        p.grad = torch.ones_like(p)
    held.optimizer.step(0)
    states = (model.state_dict(), held.weights, held.optimizer.state())
    tensors = {t.data_ptr(): t.nbytes for state in states for t in state.values()}
    gradients = sum(math.prod(p.shape) * 4 for p in held.optimizer.params.values())
    assert least_bytes(config) <= sum(tensors.values()) + gradients + 2 * config.model.dim * config.model.n_layers
    assert least_bytes(config) < available_memory_bytes()


def test_too_many_tokens() -> None:
    with pytest.raises(ConfigError, match="steps 1000000000000 of 100000000 rows of 64 are too many tokens"):
        train_config(steps=10**12, rows=10**8, context=64)
    with pytest.raises(ConfigError, match=r"seed must be a whole number below 2\^63"):
        train_config(seed=2**63)
