"""Embedding: token ids to rows of activations, and the output product of a model whose output is tied to it.

Legend: T tokens, D model width, V vocabulary, R rows.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixtral import kernels


class Embedding(nn.Module):
    """One row of `weight` [V, D] a token.

    Args:
        dtype: of the activations; None: the weight's, whatever that becomes.
    """

    def __init__(self, vocab_size: int, dim: int, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, dim))
        self._dtype = dtype

    @property
    def dtype(self) -> torch.dtype:
        """Of the activations."""
        return self._dtype or self.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.weight.device

    def forward(self, tokens_T: Tensor) -> Tensor:
        """int64 [T] -> [T, D]."""
        return F.embedding(tokens_T, self.weight).to(self.dtype)

    def logits(self, h_RD: Tensor) -> Tensor:
        """h E^T -> [R, V], the output product of a tied model."""
        return kernels.linear(h_RD, self.weight)
