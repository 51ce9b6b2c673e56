"""The counts that papers and model cards give, from the shapes."""

from __future__ import annotations

import pytest

from mixtral.errors import ConfigError
from mixtral.presets import PRESETS
from mixtral.shapes import SHAPES, shape, shape_of

# Parameters and, where published, active parameters, both in billions; within a hundredth.
PUBLISHED: dict[str, tuple[float, float | None]] = {
    "llama-2-70b": (69.0, 69.0),
    "switch-base-8": (0.62, None), "switch-base-16": (1.1, None), "switch-base-32": (2.0, None),
    "switch-base-64": (3.8, None), "switch-base-128": (7.4, None), "switch-base-256": (14.7, None),
    "glam-64b-64e": (1162, 96.6), "st-moe-32b": (269, None), "grok-1": (314, None),
    "deepseek-moe-16b": (16.4, 2.8), "qwen1.5-moe-a2.7b": (14.3, 2.7), "olmoe-1b-7b": (6.9, 1.3),
    "deepseek-v3": (671, 37), "kimi-k2": (1030, 32.6),
}  # fmt: skip


@pytest.mark.parametrize("name", SHAPES)
def test_published_counts(name: str) -> None:
    total, active = PUBLISHED[name]
    rough = 0.04 if name == "switch-base-8" else 0.01  # published with two digits
    assert shape(name).n_params() / 1e9 == pytest.approx(total, rel=rough)
    if active is not None:
        assert shape(name).n_active_params() / 1e9 == pytest.approx(active, rel=0.02)
    assert shape(name).is_sparse == (name != "llama-2-70b")


@pytest.mark.parametrize("name", PRESETS)
def test_ours_are_counted_alike(name: str) -> None:
    config = PRESETS[name]().replace(sliding_window=None)
    same = shape_of(config)
    assert same.n_params() == config.n_params() and same.n_active_params() == config.n_active_params()
    for backward in (False, True):
        assert same.flops_per_token(500, backward) == config.flops_per_token(500, backward)
    assert same.kv_bytes(500) == config.kv_bytes(500) and same.weight_bytes(4.5) == config.weight_bytes(4.5)


def test_an_unknown_shape() -> None:
    with pytest.raises(ConfigError, match="unknown shape 'gpt-5'; known: llama-2-70b, "):
        shape("gpt-5")
