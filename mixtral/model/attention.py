"""Grouped-query attention (arXiv 2305.13245) with rotary embedding, and the contract of a KV cache.

Legend: T tokens, D model width, H query heads, G key/value heads, C head width, S slots of the cache.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor, nn

from mixtral import kernels
from mixtral.config import ModelConfig
from mixtral.model.batch import Ragged
from mixtral.model.linear import Linear


class KVCache(Protocol):
    """Keys and values in blocks (engine/pool.py). The batch says which blocks are whose, and where new ones belong."""

    @property
    def block_size(self) -> int: ...

    def layer(self, layer: int) -> Tensor:
        """One layer's keys (rotated) and values [2, G, S, C]."""
        ...


class Attention(nn.Module):
    """Query, key and value in one projection, its rows grouped by key/value head: H/G query heads, a key, a value."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.queries_per_kv, self.head_dim = config.queries_per_kv, config.head_dim
        self.window = config.sliding_window
        self.wqkv = Linear(config.dim, (config.n_heads + 2 * config.n_kv_heads) * config.head_dim)
        self.wo = Linear(config.n_heads * config.head_dim, config.dim)

    def forward(
        self, x_TD: Tensor, angles: tuple[Tensor, Tensor], batch: Ragged, layer: int, cache: KVCache | None
    ) -> Tensor:
        """x [T, D] -> [T, D]. `angles` are the rotary cos and sin of the batch's positions; `layer` is the cache's."""
        qkv = self.wqkv(x_TD).unflatten(1, (-1, self.queries_per_kv + 2, self.head_dim))
        q_THC = kernels.rotary(qkv[:, :, :-2].flatten(1, 2), *angles)
        k_TGC = kernels.rotary(qkv[:, :, -2], *angles)
        v_TGC = qkv[:, :, -1]
        if cache is None:
            out_THC = kernels.attention(q_THC, k_TGC, v_TGC, batch.cu_seqlens, self.window)
        else:
            assert batch.slots_T is not None and batch.block_tables is not None and batch.context_lens is not None
            pool_2GSC = cache.layer(layer)
            kernels.write_kv(pool_2GSC, k_TGC, v_TGC, batch.slots_T)
            out_THC = kernels.paged_attention(
                q_THC, pool_2GSC, batch.positions_T, batch.cu_seqlens, batch.block_tables, batch.context_lens,
                cache.block_size, self.window,
            )  # fmt: skip
        return self.wo(out_THC.flatten(1))
