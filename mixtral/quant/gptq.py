"""Rounding with feedback: what one input's rounding gets wrong, the inputs after it make good (GPTQ, arXiv 2210.17323).

The output's mean squared error of a row is (w - v) M (w - v)^T, M = E[x x^T]. Inputs are rounded one after the other;
after each, the weights that are still free take the values that minimise it, given those that are fixed. With U the
upper Cholesky factor of M^-1 (M^-1 = U^T U) that is w_j -= U_ij (w_i - v_i) / U_ii for all j > i, and rounding input i
costs (w_i - v_i)^2 / U_ii^2: so 1 / U_ii^2 is its importance when a group's scale is chosen.

Legend: N outputs, D inputs (a multiple of 32), I the 32 inputs of a group, G groups.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mixtral.kernels.packing import GROUP

DAMPING = 0.01  # of the mean square of inputs, added to M's diagonal: text that was not in the sample differs
_ROWS = 4096  # rows of a matrix that are rounded at once

Scales = Callable[[Tensor, Tensor], Tensor]  # weights [N, 32] and importance [32] -> scales [N]
Rounding = Callable[[Tensor, Tensor], Tensor]  # weights [N] and scales [N] -> whole numbers [N]


def round_with_feedback(w_ND: Tensor, moments_DD: Tensor, scales: Scales, whole: Rounding) -> tuple[Tensor, Tensor]:
    """-> (whole numbers int8 [N, D], scales [N, G]) of the weights fp32 [N, D]; moments_DD is E[x x^T]."""
    factor_DD = inverse_factor(moments_DD)
    done = [_round_rows(part_ND.clone(), factor_DD, scales, whole) for part_ND in w_ND.split(_ROWS)]
    q_ND, scale_NG = (torch.cat(parts) for parts in zip(*done, strict=True))
    return q_ND, scale_NG


def inverse_factor(moments_DD: Tensor) -> Tensor:
    """The upper Cholesky factor of the inverse of the damped moments, fp32; computed in fp64."""
    m_DD = moments_DD.double()
    diagonal_D = m_DD.diagonal()
    mean = float(diagonal_D.mean())
    m_DD = m_DD + torch.diag(torch.full_like(diagonal_D, DAMPING * mean if mean > 0 else 1.0))
    return torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(m_DD)), upper=True).float()


def _round_rows(w_ND: Tensor, factor_DD: Tensor, scales: Scales, whole: Rounding) -> tuple[Tensor, Tensor]:
    """Changes w_ND, whose columns hold at each moment what is still to be rounded."""
    q_ND = torch.empty_like(w_ND, dtype=torch.int8)
    scale_NG = w_ND.new_empty(len(w_ND), w_ND.shape[1] // GROUP)
    for group, begin in enumerate(range(0, w_ND.shape[1], GROUP)):
        end = begin + GROUP
        u_II = factor_DD[begin:end, begin:end]
        w_NI, error_NI = w_ND[:, begin:end], w_ND.new_empty(len(w_ND), GROUP)
        scale_N = scales(w_NI, u_II.diagonal() ** -2)
        for i in range(GROUP):
            q_N = whole(w_NI[:, i], scale_N)
            error_NI[:, i] = (w_NI[:, i] - scale_N * q_N) / u_II[i, i]
            w_NI[:, i + 1 :] -= error_NI[:, i, None] * u_II[i, i + 1 :]
            q_ND[:, begin + i] = q_N
        w_ND[:, end:] -= error_NI @ factor_DD[begin:end, end:]
        scale_NG[:, group] = scale_N
    return q_ND, scale_NG
