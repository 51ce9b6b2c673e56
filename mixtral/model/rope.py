"""Rotary position embedding (arXiv 2104.09864), in the layout of two halves: pair i is (i, i + C/2)."""

from __future__ import annotations

import torch
from torch import Tensor


def rotary_angles(positions_T: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """cos and sin of position * theta^(-2i/C) for each pair i -> two fp32 [T, C/2].

    Computed for the positions at hand instead of kept as a table: T * C/2 values once a forward pass, shared by all
    layers, and no state for a cast or a move to spoil.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions_T.device) / head_dim
    angles = positions_T[:, None].float() * (1.0 / theta**exponents)
    return angles.cos(), angles.sin()
