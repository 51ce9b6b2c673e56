"""Ragged: a ragged batch on one axis. Padding exists nowhere inside the model.

Legend: T tokens of all sequences, S sequences.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor


class Ragged(NamedTuple):
    """Several token sequences laid end to end; attention never crosses from one into another."""

    tokens_T: Tensor  # int64
    positions_T: Tensor  # int64, the position of each token in its own sequence
    cu_seqlens: Tensor  # int32 [S + 1], where each sequence starts, and T at the end; kept on the CPU
    # With a cache of keys and values in blocks (engine/pool.py):
    block_tables: Tensor | None = None  # int64 [S, most blocks] on the CPU, each sequence's blocks; -1: none, or freed
    context_lens: Tensor | None = None  # int64 [S] on the CPU, positions of each sequence, this batch's included
    slots_T: Tensor | None = None  # int64, the slot of the pool for each token's key and value

    @classmethod
    def of(cls, sequences: Sequence[Sequence[int]], starts: Sequence[int] | None = None,
           device: torch.device | str = "cpu") -> Ragged:
        """Pack token lists; `starts` gives each one's first position (0 by default; a cache's length when it grows)."""
        lengths = [len(s) for s in sequences]
        starts = [0] * len(lengths) if starts is None else list(starts)
        tokens = torch.tensor([t for s in sequences for t in s], dtype=torch.int64, device=device)
        positions = [p for n, first in zip(lengths, starts, strict=True) for p in range(first, first + n)]
        positions_T = torch.tensor(positions, dtype=torch.int64, device=device)
        return cls(tokens, positions_T, cls.offsets(lengths))

    @staticmethod
    def offsets(lengths: Sequence[int]) -> Tensor:
        """-> cu_seqlens of sequences of these lengths."""
        return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)

    def to(self, device: torch.device | str) -> Ragged:
        """On `device`, but for what the host reads."""
        slots_T = None if self.slots_T is None else self.slots_T.to(device)
        tokens_T, positions_T = self.tokens_T.to(device), self.positions_T.to(device)
        return self._replace(tokens_T=tokens_T, positions_T=positions_T, slots_T=slots_T)
