"""Linear: a bias-free projection whose product goes through the kernels table. Adapted, quantised forms replace it."""

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
