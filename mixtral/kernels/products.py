"""Matrix products in the dtype they are given, at the speed the processor has for it.

A CPU without bf16 instructions multiplies bf16 matrices eight times slower than fp32 ones (docs/log.md, 2026-11-21).
There the product is computed from fp32 copies: bf16 products are exact in fp32 and summed in fp32 either way, and the
result is rounded once, so the numbers are as good and the time is fp32's.

torch multiplies with MKL, which on AMD processors reaches two thirds of the rate of the OpenBLAS inside numpy. There
numpy takes the large fp32 products, on the tensors' own memory (docs/log.md, 2026-11-22).
"""

from __future__ import annotations

import functools

import numpy as np
import torch
from torch import Tensor

from mixtral.hardware import has_fast_bf16, numpy_multiplies_faster

LARGE = 2**27  # multiply-adds; below it numpy is no faster, and its threads only get in the way of torch's


@functools.cache
def _upcasts_on(device_type: str) -> bool:
    return device_type == "cpu" and not has_fast_bf16(torch.device("cpu"))


def upcasts(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether products of this dtype go through fp32 copies on this device."""
    return dtype == torch.bfloat16 and _upcasts_on(device.type)


def by_numpy(a: Tensor, b: Tensor) -> bool:
    """Whether a @ b is numpy's to compute."""
    fp32_on_cpu = a.dtype == torch.float32 and a.device.type == "cpu"
    return fp32_on_cpu and a.shape[0] * a.shape[1] * b.shape[1] >= LARGE and numpy_multiplies_faster()


def _product(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    if by_numpy(a, b):
        np.matmul(a.detach().numpy(), b.detach().numpy(), out=out.numpy())
        return out
    return torch.mm(a, b, out=out)


def matmul_into(out: Tensor, a: Tensor, b: Tensor) -> None:
    """out[:] = a @ b for matrices of one dtype. Without a gradient: for use inside autograd functions."""
    if upcasts(a.device, a.dtype):
        out.copy_(matmul(a.float(), b.float()))
    else:
        _product(a, b, out)


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """a @ b for matrices of one dtype. Without a gradient: for use inside autograd functions."""
    if upcasts(a.device, a.dtype):
        return matmul(a.float(), b.float()).to(a.dtype)
    return _product(a, b, a.new_empty(a.shape[0], b.shape[1]))
