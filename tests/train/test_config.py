"""PretrainConfig refuses what cannot be meant, and --set changes any field of it."""

from __future__ import annotations

import json
from typing import Any

import pytest

from mixtral.errors import ConfigError
from mixtral.train.config import PretrainConfig, override
from tests.train.tiny_run import train_config

COUNTS = "steps rows context accumulation val_every val_tokens save_every keep stats_every"
AMOUNTS = "lr warmup cooldown final_lr weight_decay clip"


@pytest.mark.parametrize("name", COUNTS.split())
def test_counts_are_positive(name: str) -> None:
    with pytest.raises(ConfigError, match=f"train: {name} must be at least 1, not 0"):
        train_config(**{name: 0})


@pytest.mark.parametrize("name", AMOUNTS.split())
@pytest.mark.parametrize("value", [-0.5, float("nan"), float("inf")])
def test_amounts_are_neither_negative_nor_infinite(name: str, value: float) -> None:
    with pytest.raises(ConfigError, match=f"train: {name} must not be negative, nor infinite, not {value}"):
        train_config(**{name: value})


@pytest.mark.parametrize(("changes", "reason"), [
    ({"warmup": 1.1}, "warmup is a share and must not be more than 1, not 1.1"),
    ({"cooldown": 2.0}, "cooldown is a share"),
    ({"final_lr": 1.5}, "final_lr is a share"),
    ({"betas": (0.9, 1.0)}, r"betas must be two numbers in \[0, 1\), not \(0.9, 1.0\)"),
    ({"betas": (-0.1, 0.9)}, "betas must be two numbers"),
    ({"betas": (0.9,)}, "betas must be two numbers"),
    ({"rows": 4, "accumulation": 3}, "rows 4 is not a multiple of accumulation 3"),
    ({"context": 65}, "context 65 is longer than the model's 64"),
    ({"dtype": "bf61"}, "unknown dtype 'bf61'; did you mean 'bf16'?"),
    ({"schedule": "cosin"}, "unknown schedule 'cosin'; did you mean 'cosine'?"),
    ({"optimizer": "adam"}, "unknown optimizer 'adam'; did you mean 'adamw'?"),
    ({"trackers": ("wandb", "tensorbord")}, "unknown tracker 'tensorbord'; did you mean 'tensorboard'?"),
    ({"schedule": "wsd", "warmup": 0.4, "cooldown": 0.7}, "warmup 0.4 and cooldown 0.7 overlap; with schedule wsd"),
    ({"data": ()}, "data names no source"),
    ({"seed": -1}, "seed must not be negative, not -1"),
])
def test_refusals(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=rf"^train: [^\n]*{reason}[^\n]*$"):
        train_config(**changes)


def test_zero_turns_off_what_may_be_off() -> None:
    train_config(weight_decay=0.0, clip=0.0, balance=(), warmup=0.0)


def test_a_step_takes_rows_times_context_tokens() -> None:
    assert train_config(rows=6, context=32, accumulation=3).tokens_per_step == 192


def test_a_passage_through_json_changes_nothing() -> None:
    config = train_config(tokenizer="own.model.v3", data=("a", "b=2"), trackers=("wandb",), betas=(0.8, 0.99), seed=3)
    assert PretrainConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_an_unknown_field_of_a_recorded_configuration_is_not_dropped() -> None:
    with pytest.raises(ConfigError, match=r"train: unknown field 'learning_rate'; known: "):
        PretrainConfig.from_dict({**train_config().to_dict(), "learning_rate": 1})


def test_a_record_from_before_a_field_was_there() -> None:
    record = json.loads(json.dumps(train_config().to_dict()))
    del record["trackers"]
    assert PretrainConfig.from_dict(record) == train_config()


def test_warmup_and_cooldown_may_take_all_steps() -> None:
    train_config(schedule="wsd", warmup=0.7, cooldown=0.3)
    train_config(schedule="cosine", warmup=0.9, cooldown=0.2)  # cosine has no cooldown


# -- override ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("assignment", "field", "value"), [
    ("steps=20", "steps", 20),
    ("steps=1e3", "steps", 1000),
    ("lr=3e-4", "lr", 3e-4),
    ("lr=1", "lr", 1.0),
    ("skip_bad=true", "skip_bad", True),
    ("skip_bad=False", "skip_bad", False),
    ("schedule=wsd", "schedule", "wsd"),
    ("device=cpu", "device", "cpu"),
    ("tokenizer=none", "tokenizer", None),
    ("tokenizer=Own.model.v3", "tokenizer", "Own.model.v3"),
    ("tokenizer=123", "tokenizer", "123"),
    ("betas=0,0.95", "betas", (0.0, 0.95)),
    ("data=stdlib", "data", ("stdlib",)),
    ("trackers=wandb,tensorboard", "trackers", ("wandb", "tensorboard")),
    ("trackers=", "trackers", ()),
    ("data=a.txt=2,b.txt=1", "data", ("a.txt=2", "b.txt=1")),
    ("model.dim=48", "model.dim", 48),
    ("model.sliding_window=16", "model.sliding_window", 16),
    ("model.sliding_window=null", "model.sliding_window", None),
    ("model.tie_embeddings=true", "model.tie_embeddings", True),
    ("model.norm_eps=1e-6", "model.norm_eps", 1e-6),
])
def test_set(assignment: str, field: str, value: object) -> None:
    start = train_config(tokenizer="before", model={"sliding_window": 8})
    found = override(start, [assignment])
    got = getattr(found.model, field.removeprefix("model.")) if "." in field else getattr(found, field)
    assert got == value and type(got) is type(value)


def test_several_settings_are_checked_together() -> None:
    config = override(train_config(), ["context=128", "model.context=128", "lr=1", "lr=2"])
    assert config.context == 128 and config.lr == 2  # context alone would be longer than the model's; the last lr wins
    assert override(config, []) == config


@pytest.mark.parametrize(("assignment", "reason"), [
    ("lr", "--set 'lr': expected FIELD=VALUE"),
    ("learnrate=1", "--set learnrate: unknown field; known: "),
    ("step=1", "--set step: unknown field; did you mean 'steps'?"),
    ("model.dims=1", "--set model.dims: unknown field; did you mean 'model.dim'?"),
    ("model=tiny", "--set model: unknown field; did you mean 'model.dim'?"),
    ("dim=64", "--set dim: unknown field"),
    ("steps=many", "--set steps=many: expected int"),
    ("steps=1.5", "--set steps=1.5: expected int"),
    ("steps=true", "--set steps=true: expected int"),
    ("steps=", "--set steps=: expected int"),
    ("lr=fast", "--set lr=fast: expected float"),
    ("lr=true", "--set lr=true: expected float"),
    ("skip_bad=1", "--set skip_bad=1: expected bool"),
    ("betas=0.9,x", "--set betas=x: expected float"),
    ("betas=0.9", "betas must be two numbers"),
    ("steps=0", "steps must be at least 1"),
    ("schedule=linear", "unknown schedule 'linear'"),
    ("model.dim=none", "--set model.dim=none: expected int"),
    ("model.head_dim=7", "head_dim must be even"),
])
def test_set_refusals(assignment: str, reason: str) -> None:
    with pytest.raises(ConfigError) as caught:
        override(train_config(), [assignment])
    assert reason in str(caught.value) and "\n" not in str(caught.value)
