"""Ragged: a ragged batch on one axis. Padding exists nowhere inside the model.

Legend: T tokens of all sequences, S sequences.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Ragged(NamedTuple):
    """Several token sequences laid end to end; attention never crosses from one into another."""

    tokens_T: Tensor  # int64
    positions_T: Tensor  # int64, the position of each token in its own sequence
    cu_seqlens: Tensor  # int32 [S + 1], where each sequence starts, and T at the end; kept on the CPU
    max_seqlen: int

    @classmethod
    def of(cls, sequences: Sequence[Sequence[int]], starts: Sequence[int] | None = None,
           device: torch.device | str = "cpu") -> Ragged:
        """Pack token lists; `starts` gives each one's first position (0 by default; a cache's length when it grows)."""
        lengths = [len(s) for s in sequences]
        starts = [0] * len(lengths) if starts is None else list(starts)
        tokens = torch.tensor([t for s in sequences for t in s], dtype=torch.int64, device=device)
        positions = [p for n, first in zip(lengths, starts, strict=True) for p in range(first, first + n)]
        cu_seqlens = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        positions_T = torch.tensor(positions, dtype=torch.int64, device=device)
        return cls(tokens, positions_T, cu_seqlens, max(lengths, default=0))

    def to(self, device: torch.device | str) -> Ragged:
        """On `device`, but for `cu_seqlens`, which the host reads."""
        return self._replace(tokens_T=self.tokens_T.to(device), positions_T=self.positions_T.to(device))
