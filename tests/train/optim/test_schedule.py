"""Learning rates against values worked out by hand."""

from __future__ import annotations

import math

import pytest

from mixtral.train.optim.schedule import learning_rate
from tests.train.tiny_run import train_config


def rates(**changes: object) -> list[float]:
    config = train_config(**{"steps": 11, "lr": 1.0, "warmup": 0.2, "final_lr": 0.1, **changes})
    return [learning_rate(step, config) for step in range(config.steps)]


def test_cosine() -> None:
    found = rates()
    quarter = 0.1 + 0.9 * 0.5 * (1 + math.sqrt(0.5))
    for step, rate in {0: 0.5, 1: 1.0, 2: 1.0, 4: quarter, 6: 0.55, 10: 0.1}.items():
        assert found[step] == pytest.approx(rate, rel=1e-12), step
    assert found[1:] == sorted(found[1:], reverse=True)


def test_wsd() -> None:
    found = rates(schedule="wsd", cooldown=0.4)  # 4.4 steps, so 4
    assert found == pytest.approx([0.5, 1, 1, 1, 1, 1, 1, 0.775, 0.55, 0.325, 0.1], rel=1e-12)


@pytest.mark.parametrize("schedule", ["cosine", "wsd"])
def test_no_warmup_starts_at_the_peak(schedule: str) -> None:
    assert rates(schedule=schedule, warmup=0.0)[0] == 1.0


def test_only_warmup_ends_at_the_peak() -> None:
    assert rates(warmup=1.0) == pytest.approx([(step + 1) / 11 for step in range(11)])


@pytest.mark.parametrize("schedule", ["cosine", "wsd"])
def test_a_single_step(schedule: str) -> None:
    assert rates(schedule=schedule, steps=1) == [1.0]


def test_everything_scales_with_the_peak() -> None:
    assert rates(lr=3.0) == pytest.approx([3 * rate for rate in rates()])


def test_a_final_share_of_zero_reaches_zero() -> None:
    assert rates(final_lr=0.0)[-1] == pytest.approx(0.0, abs=1e-15)
