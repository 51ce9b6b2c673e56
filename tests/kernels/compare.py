"""Run two forms of an op on the same inputs and compare outputs and all gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

FP32 = 1e-5  # largest difference relative to the largest value: room for another order of summation, not for a mistake
BF16 = 2**-6  # a few roundings of 2^-9 each, grown by the sums that follow them

Op = Callable[..., Tensor]


def run(op: Op, inputs: list[Any]) -> list[Tensor]:
    """The output of `op` on copies of `inputs`, then the gradient of every floating-point input (fixed cotangent)."""
    inputs = [i.detach().clone() if isinstance(i, Tensor) else i for i in inputs]
    leaves = [i.requires_grad_() for i in inputs if isinstance(i, Tensor) and i.is_floating_point()]
    out = op(*inputs)
    generator = torch.Generator().manual_seed(7)
    cotangent = torch.randn(out.shape, generator=generator).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, leaves, cotangent)]


def assert_close(got: Tensor, want: Tensor, tolerance: float, name: str = "") -> None:
    """The largest difference is at most `tolerance` times the largest value of `want`."""
    assert got.shape == want.shape, f"{name}: shape {tuple(got.shape)}, not {tuple(want.shape)}"
    if not want.numel():
        return
    assert got.isfinite().all(), f"{name}: not finite"
    difference, largest = (got.double() - want.double()).abs().max().item(), want.double().abs().max().item()
    assert difference <= tolerance * largest + 1e-30, f"{name}: off by {difference:.3g}, largest value {largest:.3g}"


def compare(op: Op, reference: Op, inputs: list[Any], dtype: torch.dtype = torch.float32) -> None:
    """`op` in `dtype` against `reference` in fp32 on the same (already rounded) inputs."""
    rounded = [i.to(dtype) if isinstance(i, Tensor) and i.is_floating_point() else i for i in inputs]
    exact = [i.float() if isinstance(i, Tensor) and i.is_floating_point() else i for i in rounded]
    tolerance = BF16 if dtype == torch.bfloat16 else FP32
    for i, (got, want) in enumerate(zip(run(op, rounded), run(reference, exact), strict=True)):
        name = f"gradient {i - 1}" if i else "output"
        assert got.dtype in (dtype, torch.float32), f"{name} in {got.dtype}"
        assert_close(got, want, tolerance, name)
