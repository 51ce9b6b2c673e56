"""Refusing to write weights that are not finite, and to turn large ones into infinity by a cast."""

from __future__ import annotations

import torch
from torch import Tensor

from mixtral.errors import WeightsError

REMEDY = "they are written only with allow_nonfinite (--allow-nonfinite of convert and quantize)"


def require_finite(name: str, source: Tensor, stored: Tensor, kind: str, larger: str) -> None:
    """Raise WeightsError, naming the tensor and why, unless `stored` (weights, or their scales) is finite.

    Args:
        source: what `stored` was made from.
        kind: the type that is written.
        larger: the types that hold larger numbers.
    """
    if is_finite(stored):
        return
    if not is_finite(source):
        bad = source.numel() - int(source.isfinite().sum())
        raise WeightsError(f"{name}: {bad:,} of {source.numel():,} weights are NaN or infinite; {REMEDY}")
    largest = float(source.abs().max())
    what = f"{name}: its largest weight, {largest:.4g}, is too large for {kind}; {larger}"
    raise WeightsError(f"{what}. As infinity or NaN {REMEDY}")


def require_range(name: str, source: Tensor, dtype: torch.dtype) -> None:
    """Raise WeightsError, naming the tensor, when finite numbers of `source` are infinite in `dtype`.

    What is not finite already may be cast: a model is loaded as it is.
    """
    if not dtype.is_floating_point or torch.finfo(dtype).max >= torch.finfo(source.dtype).max or not source.numel():
        return
    ends = torch.stack(source.aminmax())
    if ends.isfinite().all() and not ends.to(dtype).isfinite().all():
        kind, largest = str(dtype).removeprefix("torch."), float(ends.abs().max())
        raise WeightsError(f"{name}: its largest weight, {largest:.4g}, is too large for {kind}; bf16 and fp32 hold it")


def is_finite(x: Tensor) -> bool:
    """Whether all numbers are; without a tensor of as many truths."""
    return x.numel() == 0 or all(bool(end.isfinite()) for end in x.aminmax())
