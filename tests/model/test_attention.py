"""The attention layer against its formula, one query, head and key at a time.

Legend: T tokens, D model width, H query heads, G key/value heads, C head width.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from mixtral.model import Ragged
from mixtral.model.attention import Attention
from mixtral.model.rope import rotary_angles
from tests.model import small


def _rotated(x_C: Tensor, position: int, theta: float) -> Tensor:
    """Pair i is (i, i + C/2), turned by position * theta^(-2i/C)."""
    half, out = len(x_C) // 2, x_C.clone()
    for i in range(half):
        angle = position * theta ** (-2 * i / len(x_C))
        out[i] = x_C[i] * math.cos(angle) - x_C[i + half] * math.sin(angle)
        out[i + half] = x_C[i + half] * math.cos(angle) + x_C[i] * math.sin(angle)
    return out


def _naive(layer: Attention, x_TD: Tensor, batch: Ragged, theta: float, heads: int) -> Tensor:
    """Rows of wqkv: for each key/value head its H/G query heads, its key, its value."""
    groups, width = heads // layer.queries_per_kv, layer.head_dim
    each = heads // groups
    rows = layer.wqkv.weight.view(groups, each + 2, width, -1)
    out = []
    for t, x_D in enumerate(x_TD):
        first = int(batch.cu_seqlens[batch.cu_seqlens <= t].max())
        sees = range(max(first, t + 1 - (layer.window or t + 1)), t + 1)
        of_heads = []
        for head in range(heads):
            query, key, value = (rows[head // each, i] for i in (head % each, each, each + 1))
            q_C = _rotated(query @ x_D, t - first, theta)
            scores = [q_C @ _rotated(key @ x_TD[s], s - first, theta) / math.sqrt(width) for s in sees]
            weights = torch.stack(scores).softmax(0)
            of_heads.append(sum(w * (value @ x_TD[s]) for w, s in zip(weights, sees, strict=True)))
        out.append(layer.wo.weight @ torch.cat(of_heads))
    return torch.stack(out)


@pytest.mark.parametrize("shape", ["sparse", "windowed", "one key head, odd widths"])
def test_equals_its_formula(shape: str) -> None:
    config = small.config(**{**small.SHAPES[shape], "rope_theta": 50.0})
    layer, batch = small.model(config).layers[1].attention, small.batch(config.vocab_size, 5, 1, 3)
    x_TD = torch.randn(9, config.dim, generator=torch.Generator().manual_seed(0))
    angles = rotary_angles(batch.positions_T, config.head_dim, config.rope_theta)
    want = _naive(layer, x_TD, batch, config.rope_theta, config.n_heads)
    torch.testing.assert_close(layer(x_TD, angles, batch, 1, None), want, rtol=1e-4, atol=1e-5)


def test_key_value_heads_shared_out_by_hand_sum_to_the_whole() -> None:
    """Sizes inside come from the tensors: a shard of wqkv and wo is a layer too, and the shards' outputs add up."""
    config = small.config(**small.SHAPES["sparse"])
    layer, batch = small.model(config).layers[0].attention, small.batch(config.vocab_size, 5, 1, 3)
    assert config.n_kv_heads % 2 == 0
    x_TD = torch.randn(9, config.dim, generator=torch.Generator().manual_seed(0))
    angles = rotary_angles(batch.positions_T, config.head_dim, config.rope_theta)
    whole_TD = layer(x_TD, angles, batch, 0, None)
    wqkv, wo = layer.wqkv.weight.detach(), layer.wo.weight.detach()
    halves = []
    for wqkv_half, wo_half in zip(wqkv.chunk(2), wo.chunk(2, dim=1), strict=True):
        layer.wqkv.weight, layer.wo.weight = torch.nn.Parameter(wqkv_half), torch.nn.Parameter(wo_half)
        halves.append(layer(x_TD, angles, batch, 0, None))
    torch.testing.assert_close(halves[0] + halves[1], whole_TD, rtol=1e-5, atol=1e-6)
