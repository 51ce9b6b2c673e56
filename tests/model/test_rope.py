from __future__ import annotations

import math

import torch

from mixtral import kernels
from mixtral.model.rope import rotary_angles


def test_angles_by_hand() -> None:
    cos, sin = rotary_angles(torch.tensor([0, 3]), head_dim=4, theta=100.0)
    torch.testing.assert_close(cos, torch.tensor([[1.0, 1.0], [math.cos(3), math.cos(0.3)]]))
    torch.testing.assert_close(sin, torch.tensor([[0.0, 0.0], [math.sin(3), math.sin(0.3)]]))


def test_far_positions_keep_their_precision() -> None:
    """fp32 end to end: at position 65,535 the error of an angle stays near one rounding of it."""
    positions = torch.tensor([65535])
    exponents = torch.arange(0, 128, 2, dtype=torch.float64) / 128
    want = (positions[:, None].double() / 1e6**exponents).cos()
    assert (rotary_angles(positions, 128, 1e6)[0] - want).abs().max() < 65535 * 2**-22


def test_scores_depend_on_distance_alone() -> None:
    torch.manual_seed(0)
    q, k = torch.randn(1, 1, 8), torch.randn(1, 1, 8)
    scores = []
    for first in (0, 5, 100):
        angles = rotary_angles(torch.tensor([first, first + 7]), 8, 1e4)
        turned_q = kernels.rotary(q, *(a[1:] for a in angles))
        turned_k = kernels.rotary(k, *(a[:1] for a in angles))
        scores.append((turned_q * turned_k).sum())
    torch.testing.assert_close(torch.stack(scores), scores[0].expand(3), rtol=1e-4, atol=1e-5)
