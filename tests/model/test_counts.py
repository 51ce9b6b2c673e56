from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from mixtral import kernels
from mixtral.config import ModelConfig
from mixtral.model import Mixtral
from tests.model import small


@st.composite
def configs(draw: st.DrawFn) -> ModelConfig:
    groups, n_experts = draw(st.integers(1, 4)), draw(st.integers(1, 7))
    return ModelConfig(
        vocab_size=draw(st.integers(1, 99)), dim=draw(st.integers(1, 33)), n_layers=draw(st.integers(1, 4)),
        n_heads=groups * draw(st.integers(1, 4)), n_kv_heads=groups, head_dim=2 * draw(st.integers(1, 9)),
        ffn_dim=draw(st.integers(1, 40)), n_experts=n_experts, experts_per_token=draw(st.integers(1, n_experts)),
        sliding_window=draw(st.none() | st.integers(1, 9)), tie_embeddings=draw(st.booleans()),
    )  # fmt: skip


@settings(max_examples=60, derandomize=True)
@given(configs())
def test_counted_parameters_are_those_built(config: ModelConfig) -> None:
    with torch.device("meta"):
        model = Mixtral(config)
    assert all(p.is_meta for p in model.parameters())
    assert sum(p.numel() for p in model.parameters()) == config.n_params()
    idle = sum(p.numel() // config.n_experts for n, p in model.named_parameters() if ".experts." in n)
    assert config.n_active_params() == config.n_params() - idle * (config.n_experts - config.experts_per_token)


@pytest.mark.parametrize("shape", ["sparse", "dense", "tied", "one key head, odd widths"])
@pytest.mark.parametrize("backward", [False, True])
def test_counted_flops_are_those_of_the_products(shape: str, backward: bool) -> None:
    """The reference computes the whole [T, T] of attention; the config counts the causal half that must be computed.

    The counter hooks every module, so the loss calls the output as it is, and its backward pass makes the logits again.
    """
    config, tokens = small.config(**small.SHAPES[shape]), 10
    model, batch = small.model(config), small.batch(config.vocab_size, tokens)
    with kernels.use_backend("reference"), FlopCounterMode(display=False) as counter:
        loss = model(batch, targets=small.targets(batch, config.vocab_size), loss_weights="mean").loss
        if backward:
            loss.backward()
    not_visible = tokens - (tokens + 1) / 2
    hidden = 4 * config.n_layers * config.n_heads * config.head_dim * tokens * not_visible * (3 if backward else 1)
    if backward:
        hidden += 2 * config.dim * config.vocab_size * tokens
    assert counter.get_total_flops() - hidden == config.flops_per_token(tokens, backward) * tokens
