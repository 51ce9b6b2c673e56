"""Matrix products in the dtype they are given, at the speed the processor has for it.

A CPU without bf16 instructions multiplies bf16 matrices eight times slower than fp32 ones (docs/log.md, 2026-11-21).
There the product is computed from fp32 copies: bf16 products are exact in fp32 and summed in fp32 either way, and the
result is rounded once, so the numbers are as good and the time is fp32's.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from mixtral.hardware import has_fast_bf16


@functools.cache
def _upcasts_on(device_type: str) -> bool:
    return device_type == "cpu" and not has_fast_bf16(torch.device("cpu"))


def upcasts(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether products of this dtype go through fp32 copies on this device."""
    return dtype == torch.bfloat16 and _upcasts_on(device.type)


def matmul_into(out: Tensor, a: Tensor, b: Tensor) -> None:
    """out[:] = a @ b for matrices of one dtype."""
    if upcasts(a.device, a.dtype):
        out.copy_(a.float() @ b.float())
    else:
        torch.mm(a, b, out=out)


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """a @ b for matrices of one dtype."""
    if upcasts(a.device, a.dtype):
        return (a.float() @ b.float()).to(a.dtype)
    return a @ b
