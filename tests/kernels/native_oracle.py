"""What a native product must give, bit for bit, on each instruction set."""

from __future__ import annotations

import torch
from torch import Tensor

from mixtral.kernels import packing
from mixtral.kernels.native import library as native

LEAST_NORMAL = 2.0**-126


def usable() -> list[str]:
    """The instruction sets that the build and this processor have."""
    if native.available():
        return []
    found = [s for s in ("portable", "avx2", "avx512") if not native.library().mx_set_isa(s.encode())]
    native.set_instruction_set(None)
    return found


def oracle(x_TD: Tensor, w: Tensor, name: str, n: int, isa: str) -> Tensor:
    """packed.packed_linear; with AVX-512's bf16 products, inputs, weights and sums below 2^-126 are zero."""
    if (name, isa) != ("bf16", "avx512"):
        return packing.packed_linear(x_TD, w, name, n)
    x_TD, w_ND = flushed(x_TD.bfloat16().float()), flushed(packing.unpack(w, name, n, x_TD.shape[1])[0].float())
    acc_TN = torch.zeros(len(x_TD), n)
    for d in sorted(range(x_TD.shape[1]), key=lambda d: (d // 2, -d)):
        acc_TN = flushed(packing.fma(x_TD[:, d, None], w_ND[:, d], acc_TN))
    return acc_TN + 0.0 if x_TD.shape[1] % packing.GROUP else acc_TN


def flushed(x: Tensor) -> Tensor:
    """With zeros, of the same sign, for subnormal numbers."""
    return torch.where(x.abs() < LEAST_NORMAL, torch.zeros_like(x).copysign(x), x)


def assert_same_bits(got: Tensor, want: Tensor) -> None:
    """NaN equals NaN whatever its bits; zeros must have the same sign."""
    assert got.shape == want.shape and got.dtype == want.dtype == torch.float32
    wrong = (got.view(torch.int32) != want.view(torch.int32)) & ~(got.isnan() & want.isnan())
    first = [(got[i].item(), want[i].item()) for i in map(tuple, wrong.nonzero()[:3].tolist())]
    assert not wrong.any(), f"{int(wrong.sum())} of {wrong.numel()} differ; (got, want): {first}"
