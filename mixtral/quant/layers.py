"""Packed modules, put in the place of model.Linear, model.Embedding, moe.Experts and moe.FeedForward.

They hold packed bytes (kernels/packing.py) of a plain or a quantised format and no parameters, so they are not trained.

Legend: T tokens, D model width, F expert hidden width, E experts, K experts a token, N routed rows, O output width, V
vocabulary, R rows.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mixtral import kernels
from mixtral.kernels.packing import unpack_rows
from mixtral.moe import Routing
from mixtral.quant.formats import Format


class PackedLinear(nn.Module):
    """x W^T; the packed W is the buffer `weight_packed`, uint8 [blocks, bytes of a block]."""

    weight_packed: Tensor

    def __init__(self, format: Format, dim_in: int, dim_out: int) -> None:
        super().__init__()
        self.format, self.dim_out = format, dim_out
        self.register_buffer("weight_packed", _empty(format, dim_out, dim_in))

    def forward(self, x_TD: Tensor) -> Tensor:
        """-> [T, O] in the dtype of `x`."""
        return kernels.packed_linear(x_TD, self.weight_packed, self.format.name, self.dim_out).to(x_TD.dtype)


class PackedEmbedding(nn.Module):
    """An embedding and the output product tied to it, stored once: [V, D] packed as `weight_packed`.

    Args:
        format: one without scales.
        dtype: of the activations.
    """

    weight_packed: Tensor

    def __init__(self, format: Format, vocab_size: int, dim: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.format, self.vocab_size, self.dim, self.dtype = format, vocab_size, dim, dtype
        self.register_buffer("weight_packed", _empty(format, vocab_size, dim))

    @property
    def device(self) -> torch.device:
        return self.weight_packed.device

    def forward(self, tokens_T: Tensor) -> Tensor:
        """int64 [T] -> [T, D]."""
        return unpack_rows(self.weight_packed, self.format.name, self.vocab_size, self.dim, tokens_T).to(self.dtype)

    def logits(self, h_RD: Tensor) -> Tensor:
        """h E^T -> [R, V]."""
        return kernels.packed_linear(h_RD, self.weight_packed, self.format.name, self.vocab_size).to(h_RD.dtype)


class PackedFeedForward(nn.Module):
    """w2(silu(w1 x) * w3 x): `w13_packed` [2, blocks, bytes of a block], `w2_packed` [blocks, bytes of a block]."""

    w13_packed: Tensor
    w2_packed: Tensor

    def __init__(self, format: Format, dim: int, ffn_dim: int) -> None:
        super().__init__()
        self.format, self.ffn_dim = format, ffn_dim
        self.register_buffer("w13_packed", _empty(format, 2, ffn_dim, dim))
        self.register_buffer("w2_packed", _empty(format, dim, ffn_dim))

    def forward(self, x_TD: Tensor) -> Tensor:
        return kernels.packed_swiglu(x_TD, self.w13_packed, self.w2_packed, self.format.name, self.ffn_dim)


class PackedExperts(nn.Module):
    """E such networks: `w13_packed` [E, 2, blocks, bytes of a block], `w2_packed` [E, blocks, bytes of a block]."""

    w13_packed: Tensor
    w2_packed: Tensor

    def __init__(self, format: Format, n_experts: int, dim: int, ffn_dim: int) -> None:
        super().__init__()
        self.format, self.ffn_dim = format, ffn_dim
        self.register_buffer("w13_packed", _empty(format, n_experts, 2, ffn_dim, dim))
        self.register_buffer("w2_packed", _empty(format, n_experts, dim, ffn_dim))

    def forward(self, rows_ND: Tensor, counts_E: Tensor) -> Tensor:
        """Rows grouped by expert, and how many each has -> outputs [N, D] in the same order; rows past the last: 0."""
        weights = self.w13_packed, self.w2_packed, self.format.name, self.ffn_dim
        return kernels.packed_experts(rows_ND, counts_E, *weights)

    def decode(self, x_TD: Tensor, routing: Routing) -> Tensor | None:
        """One token without dispatch, rounded as with it; None for more, and in a subclass (moe.Experts.decode)."""
        if len(x_TD) != 1 or type(self) is not PackedExperts:
            return None
        y_TD = torch.zeros(x_TD.shape, device=x_TD.device)
        for weight, e in zip(routing.weights_TK[0], routing.experts_TK[0].tolist(), strict=True):
            if e >= 0:
                y_TD += weight * self._expert(x_TD, e).float()
        return y_TD.to(x_TD.dtype)

    def _expert(self, x_TD: Tensor, e: int) -> Tensor:
        return kernels.packed_swiglu(
            x_TD, self.w13_packed[e], self.w2_packed[e], self.format.name, self.ffn_dim
        )


def _empty(format: Format, *shape: int) -> Tensor:
    return torch.empty(format.packed_shape(shape), dtype=torch.uint8)
