"""Stacked SwiGLU networks of packed weights over rows grouped by expert: two packed products an expert.

Legend: N routed rows, D model width, F expert hidden width, E experts.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mixtral.kernels import table
from mixtral.kernels.packing import LANES


def packed_swiglu(x_TD: Tensor, w13_packed: Tensor, w2_packed: Tensor, name: str, ffn_dim: int) -> Tensor:
    """See reference.packed_swiglu. Gate and up are one product: each is padded to whole blocks."""
    padded = LANES * w13_packed.shape[1]
    h_T2F = _product(x_TD, w13_packed.flatten(0, 1), name, 2 * padded)
    hidden_TF = F.silu(h_T2F[:, :ffn_dim]) * h_T2F[:, padded : padded + ffn_dim]
    return _product(hidden_TF, w2_packed, name, x_TD.shape[1]).to(x_TD.dtype)


def packed_experts(
    rows_ND: Tensor, counts_E: Tensor, w13_packed: Tensor, w2_packed: Tensor, name: str, ffn_dim: int
) -> Tensor:
    """See reference.packed_experts."""
    parts, begin = [], 0
    for e, count in enumerate(counts_E.tolist()):
        if count:
            rows = rows_ND[begin : begin + count]
            parts.append(packed_swiglu(rows, w13_packed[e], w2_packed[e], name, ffn_dim))
        begin += count
    return torch.cat([*parts, torch.zeros_like(rows_ND[begin:])])


def _product(x_TD: Tensor, packed: Tensor, name: str, n: int) -> Tensor:
    out: Tensor = table.run("packed_linear", x_TD, x_TD, packed, name, n)
    return out
