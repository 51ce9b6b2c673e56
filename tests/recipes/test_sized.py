"""The one dial: every size is a valid configuration, and the rule holds what it says."""

from __future__ import annotations

from itertools import pairwise

import pytest

from mixtral.errors import ConfigError
from mixtral.recipes import sized
from mixtral.recipes.sized import SIZES


def test_every_size_grows() -> None:
    made = [sized(size) for size in SIZES]  # each validates itself
    for smaller, larger in pairwise(made):
        assert smaller.model.n_params() < larger.model.n_params()
        assert smaller.lr > larger.lr


def test_the_rule() -> None:
    config = sized(8)
    model = config.model
    assert (model.dim, model.n_layers, model.n_heads, model.n_kv_heads, model.ffn_dim) == (512, 8, 8, 2, 1792)
    tokens = config.steps * config.tokens_per_step
    assert tokens == pytest.approx(20 * model.n_active_params(), rel=1e-3)


@pytest.mark.parametrize("size", [0, 65, -1])
def test_out_of_range(size: int) -> None:
    with pytest.raises(ConfigError, match="size must lie in"):
        sized(size)
