"""RMSNorm (arXiv 1910.07467)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mixtral import kernels


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight; the mean in fp32."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x_TD: Tensor) -> Tensor:
        return kernels.rms_norm(x_TD, self.weight, self.eps)
