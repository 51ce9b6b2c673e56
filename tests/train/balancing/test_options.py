"""Specs of balancing objectives: what they set, and what is refused in one line."""

from __future__ import annotations

import pytest

from mixtral.errors import ConfigError
from mixtral.train.balancing.options import (
    OBJECTIVES,
    GlobalBatch,
    LossFree,
    MicroBatch,
    Quantile,
    numbers,
    parse_balance,
    split_balance,
)
from mixtral.train.config import PretrainConfig, override
from tests.train.tiny_run import train_config


def test_specs_set_options() -> None:
    specs = ("micro_batch", "global_batch?weight=0.02&final=0&exact=false&layers=0,2-3", "loss_free?rate=0.01", "none")
    assert parse_balance(specs, 4) == [
        MicroBatch(weight=0.01),
        GlobalBatch(weight=0.02, final=0.0, exact=False, layers="0,2-3"),
        LossFree(rate=0.01),
    ]
    assert parse_balance((), 4) == parse_balance(("", "none"), 4) == []
    assert all(parse_balance([name], 1)[0].name == name for name in OBJECTIVES)


def test_schedule_by_step_and_layer() -> None:
    (entry,) = parse_balance(["micro_batch?weight=1&final=0.2&layers=1,3-4"], 5)
    assert [entry.coefficient(step, 5) for step in range(5)] == pytest.approx([1, 0.8, 0.6, 0.4, 0.2])
    assert entry.coefficient(0, 1) == 1
    assert [entry.covers(layer) for layer in range(5)] == [False, True, False, True, True]
    assert MicroBatch(weight=0.3).coefficient(7, 9) == 0.3 and MicroBatch().covers(99)


def test_the_command_line_sets_them_all() -> None:
    config = override(train_config(model={"n_layers": 4}), ["balance=micro_batch?layers=0,2-3,quantile?layers=1"])
    assert config.balance == ("micro_batch?layers=0,2-3", "quantile?layers=1")
    assert override(config, ["balance=none"]).balance == ("none",) and override(config, ["balance="]).balance == ()
    assert split_balance("a?x=1,b") == ("a?x=1", "b")
    assert PretrainConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize(
    "spec, message",
    [
        ("micro", "balance: unknown 'micro'; did you mean 'micro_batch'?"),
        ("micro_batch?rate=1", "balance micro_batch?rate=1: unknown option 'rate=1'"),
        ("micro_batch?weight=-1", "balance micro_batch: weight must not be negative, nor infinite, not -1.0"),
        ("z_loss?final=-1", "balance z_loss: final must not be negative"),
        ("z_loss?layers=2-1", "balance z_loss: layers=2-1: expected numbers and ranges, as in 0,2-4"),
        ("z_loss?layers=a", "balance z_loss: layers=a: expected numbers"),
        ("z_loss?layers=0,5", "balance z_loss: layer 5 of layers=0,5 is not one of the model's 0..1"),
        ("loss_free?rate=0", "balance loss_free: rate must be a positive number, not 0.0"),
        ("smebu?scale=0", "balance smebu: scale must be a positive number"),
        ("smebu?decay=1", "balance smebu: decay must lie in [0, 1), not 1.0"),
        ("threshold?decay=-1", "balance threshold: decay must lie in [0, 1)"),
        ("k_price?target=0", "balance k_price: target must be a positive number"),
        ("guided?groups=0-1/x", "balance guided: groups=x: expected numbers"),
    ],
)
def test_what_is_refused(spec: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        train_config(balance=(spec,))
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


def test_two_rules_for_one_buffer_are_refused() -> None:
    with pytest.raises(ConfigError, match="balance: loss_free and quantile both move the bias of layer 1; keep one"):
        train_config(balance=("loss_free", "quantile?layers=1"))
    assert parse_balance(("loss_free?layers=0", "quantile?layers=1"), 2)[1] == Quantile(layers="1")


def test_numbers() -> None:
    assert numbers("0,2-4,3", "x") == {0, 2, 3, 4}


@pytest.mark.parametrize("layers", ["0-9999999999", "0-" + "9" * 5000, "1" * 5000, "5-100000"])
def test_a_range_of_billions_is_refused_at_once(layers: str) -> None:
    for spec in (f"loss_free?layers={layers}", f"guided?groups={layers}"):
        with pytest.raises(ConfigError, match="expected numbers and ranges, as in 0,2-4") as caught:
            parse_balance([spec], 4)
        assert len(str(caught.value)) < 600
