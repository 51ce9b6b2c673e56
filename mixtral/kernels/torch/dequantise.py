"""Products with packed weights where there is no native code: the matrix is expanded to fp32 for the product alone.

The input is rounded as native code rounds it, so the result differs from native code's in the order of sums alone.

Legend: T rows, N outputs, D inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mixtral.kernels.packing import DTYPES, GROUP, quantise_rows, unpack


def expand(packed: Tensor, name: str, n: int, d: int) -> Tensor:
    """What a packed matrix, or a stack of them, stands for -> fp32 [..., n, d]."""
    values_ND, scale_NG = unpack(packed, name, n, d)
    if scale_NG is None:
        return values_ND.float()
    return values_ND.float().mul_(scale_NG.repeat_interleave(GROUP, dim=-1)[..., :d])


def packed_linear(x_TD: Tensor, packed: Tensor, name: str, n: int) -> Tensor:
    """See packed.packed_linear."""
    if name in DTYPES:
        rounded_TD = (x_TD.to(torch.bfloat16) if name == "bf16" else x_TD).float()
    else:
        qx_TD, sx_TG = quantise_rows(x_TD)
        rounded_TD = qx_TD.float().mul_(sx_TG.repeat_interleave(GROUP, dim=1)[:, : x_TD.shape[1]])
    return rounded_TD @ expand(packed, name, n, x_TD.shape[1]).T
