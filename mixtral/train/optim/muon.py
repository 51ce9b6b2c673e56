"""Muon: momentum whose update is made orthogonal (Keller Jordan, 2024), for stacks of matrices as well as single ones.

Legend: B matrices of a stack, M rows, N columns.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic that drives every singular value towards 1
NEWTON_SCHULZ_STEPS = 5


def orthogonalise(matrices_BMN: Tensor) -> Tensor:
    """The nearest (semi-)orthogonal matrix of each, roughly.

    Singular vectors stay; singular values of at least a 400th of the matrix's norm end between 0.68 and 1.21, smaller
    ones below. Newton-Schulz: X <- a X + (b A + c A^2) X with A = X X^T, on the short side. In the dtype given, all B
    at once.
    """
    a, b, c = COEFFICIENTS
    tall = matrices_BMN.shape[-2] > matrices_BMN.shape[-1]
    x = matrices_BMN.mT if tall else matrices_BMN
    x = _near_one(x)
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def _near_one(matrices_BMN: Tensor) -> Tensor:
    """Each matrix times the power of two that brings its largest entry to 0.5..1, so that its norm, a sum of squares,
    neither overflows nor vanishes. No bit of an entry changes."""
    largest_B11 = torch.linalg.vector_norm(matrices_BMN, math.inf, dim=(-2, -1), keepdim=True)
    exponent_B11 = largest_B11.frexp().exponent.clamp(-126, 126)
    return matrices_BMN * torch.ldexp(torch.ones_like(largest_B11), -exponent_B11)


class Muon(torch.optim.Optimizer):
    """Muon for parameters of two or more dimensions; all but the last two count single matrices of a stack.

    torch.optim.Muon takes 2-D parameters alone, and stacked experts are 3-D and 4-D. The update is scaled by
    0.2 sqrt(max(M, N)), which gives it AdamW's root mean square (arXiv 2502.16982), so both share a learning rate.
    """

    def __init__(self, params: Iterable[Tensor], lr: float, weight_decay: float, momentum: float = 0.95) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient; `closure` is not supported."""
        assert closure is None
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._update(p, p.grad, group)

    def _update(self, p: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        state = self.state[p]
        if not state:
            state["momentum"] = torch.zeros_like(p)
        state["momentum"].lerp_(grad, 1 - group["momentum"])
        update = torch.lerp(grad, state["momentum"], group["momentum"])  # Nesterov's look ahead
        rows, columns = p.shape[-2:]
        update = orthogonalise(update.reshape(-1, rows, columns)).view_as(p)
        p.mul_(1 - group["lr"] * group["weight_decay"])
        p.add_(update, alpha=-group["lr"] * 0.2 * max(rows, columns) ** 0.5)
