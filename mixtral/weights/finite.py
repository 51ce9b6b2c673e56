"""Refusing to write weights that are not finite, or that the written type turns into infinity."""

from __future__ import annotations

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


def is_finite(x: Tensor) -> bool:
    """Whether all numbers are; without a tensor of as many truths."""
    return x.numel() == 0 or all(bool(end.isfinite()) for end in x.aminmax())
