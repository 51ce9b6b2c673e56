from __future__ import annotations

import pytest
import torch

from mixtral.model import Ragged


def test_sequences_lie_end_to_end() -> None:
    packed = Ragged.of([[5, 6, 7], [], [8]])
    assert packed.tokens_T.tolist() == [5, 6, 7, 8]
    assert packed.positions_T.tolist() == [0, 1, 2, 0]
    assert packed.cu_seqlens.tolist() == [0, 3, 3, 4] and packed.cu_seqlens.dtype == torch.int32


def test_starts_move_the_positions() -> None:
    assert Ragged.of([[5, 6], [8]], starts=[10, 3]).positions_T.tolist() == [10, 11, 3]


def test_nothing() -> None:
    packed = Ragged.of([])
    assert packed.tokens_T.shape == (0,) and packed.cu_seqlens.tolist() == [0]


def test_a_start_for_each_sequence() -> None:
    with pytest.raises(ValueError):
        Ragged.of([[5, 6], [8]], starts=[10])
