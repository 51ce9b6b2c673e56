"""Linear: a bias-free projection whose product goes through the kernels table.

Adapted and quantised forms take its place in the model and do not subclass it: `type(module) is Linear` says that its
weight is all there is, which a loss may then use without a call.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mixtral import kernels


class Linear(nn.Module):
    """x W^T with W [out, in]."""

    def __init__(self, dim_in: int, dim_out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim_out, dim_in))

    def forward(self, x: Tensor) -> Tensor:
        return kernels.linear(x, self.weight)
