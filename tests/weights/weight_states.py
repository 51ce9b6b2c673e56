"""Small configs and random states, shared by the tests of this folder."""

from __future__ import annotations

import torch
from torch import Tensor

from mixtral.config import ModelConfig
from mixtral.weights.names import parameter_shapes

SPARSE = ModelConfig(
    vocab_size=11, dim=24, n_layers=2, n_heads=6, n_kv_heads=3, head_dim=4, ffn_dim=10, n_experts=5,
    experts_per_token=3, rope_theta=1e4, context=64,
)  # fmt: skip
DENSE = SPARSE.replace(n_experts=1, experts_per_token=1, sliding_window=16, n_heads=8, n_kv_heads=2)
CONFIGS = {
    "sparse": SPARSE,
    "sparse-tied": SPARSE.replace(tie_embeddings=True),
    "dense": DENSE,
    "dense-tied": DENSE.replace(tie_embeddings=True),
}


def random_state(config: ModelConfig, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=random).to(dtype) for name, shape in parameter_shapes(config).items()}


def assert_same(state: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Equal names, in the same order, dtypes and every element."""
    assert list(state) == list(expected)
    for name, tensor in state.items():
        assert tensor.dtype == expected[name].dtype, name
        assert torch.equal(tensor, expected[name]), name
