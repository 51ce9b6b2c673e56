"""Formats of packed weights: fp32, fp16 and bf16 as they are, and 8.5 and 4.5 bits: how a matrix is rounded to those.

For the latter a matrix is cut into groups of 32 consecutive inputs of one output. Each has one fp16 scale s and whole
numbers q, and stands for s * q: q in -127..127 (int8) or -8..7 (int4). Scale and numbers are chosen to make the
squared error small, each input weighted by its importance (the mean square of what the calibration text sends through
it). Where the moments of all pairs of inputs are known, the rounding error of an input is compensated in the inputs
not yet rounded (quant/gptq.py). kernels/packing.py says where the bytes lie.

Legend: N outputs, D inputs, I the 32 inputs of a group, G groups.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mixtral.errors import WeightsError
from mixtral.kernels import packing
from mixtral.kernels.packing import GROUP
from mixtral.quant.gptq import round_with_feedback

_CHUNK = 4096  # groups that are searched at once: half a megabyte in fp32, which stays in the cache


@dataclass(frozen=True)
class Format:
    """What one weight becomes when it is packed."""

    name: str  # of kernels/packing.py

    @property
    def bits(self) -> float:
        """Bits a weight, the scales included."""
        return 8 * packing.GROUP_BYTES[self.name] / (packing.LANES * GROUP)

    def packed_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Of a matrix [N, D], or a stack of them [..., N, D] -> [..., blocks, bytes of a block]."""
        *lead, n, d = shape
        return (*lead, *packing.packed_shape(self.name, n, d))


@dataclass(frozen=True)
class QuantFormat(Format):
    """Whole numbers low..high with a scale a group. `divisors`: the numbers that the largest weight of a group is tried
    at; in int4 some lie beyond -8: the largest weight is then clipped, and all others are rounded more finely."""

    low: int
    high: int
    divisors: tuple[float, ...]


INT8 = QuantFormat("int8", -127, 127, (126.0, 126.5, 127.0, 127.5))
INT4 = QuantFormat("int4", -8, 7, tuple(7.0 + 0.3 * step for step in range(12)))
FORMATS = {format.name: format for format in (INT8, INT4)}
PLAIN = {dtype: Format(name) for name, dtype in packing.DTYPES.items()}  # formats that round nothing, by dtype


def quantise(
    w_ND: Tensor, format: QuantFormat, importance: Tensor | None = None, allow_nonfinite: bool = False
) -> Tensor:
    """Round and pack one matrix -> uint8 [blocks, bytes of a block].

    Args:
        importance: [D], how much an error in each input's weights counts; all alike by default. Or [D, D], the mean of
            x x^T over inputs x: rounding is then done with feedback.
        allow_nonfinite: a weight that is not finite, or too large for the scale of its group, makes its group NaN
            (with feedback, and the groups after it in that row) instead of an error.

    Raises WeightsError for such a weight otherwise, and when the importance is not finite.
    """
    if importance is not None and not importance.isfinite().all():
        raise WeightsError("the calibration text gives it inputs that are not finite; is a weight before it so?")
    if importance is not None and importance.dim() == 2:
        q_ND, scale_NG = _round_with_feedback(w_ND, format, importance)
    else:
        q_ND, scale_NG = round_weights(w_ND, format, importance)
    if (bad_NG := ~scale_NG.isfinite()).any():
        if not allow_nonfinite:
            what = "weights that are not finite, or too large for an fp16 scale, cannot be quantised"
            raise WeightsError(f"{what}; allow_nonfinite (--allow-nonfinite of quantize) makes their groups NaN")
        scale_NG = scale_NG.masked_fill(bad_NG, torch.nan)
    return packing.pack(q_ND, format.name, scale_NG)


def _round_with_feedback(w_ND: Tensor, format: QuantFormat, moments_DD: Tensor) -> tuple[Tensor, Tensor]:
    """As `round_weights`; inputs that fill up the last group are 0 and touch no other."""
    more = -w_ND.shape[1] % GROUP
    padded_ND = torch.nn.functional.pad(w_ND.float(), (0, more))
    moments_DD = torch.nn.functional.pad(moments_DD, (0, more, 0, more))
    return round_with_feedback(
        padded_ND, moments_DD,
        scales=lambda w_NI, m_I: _round_groups(w_NI.T, m_I[:, None].expand(-1, len(w_NI)), format)[1],
        whole=lambda w_N, scale_N: _whole(w_N, scale_N, format),
    )  # fmt: skip


def round_weights(w_ND: Tensor, format: QuantFormat, importance_D: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The rounding alone -> (q int8 [N, D'], scales fp32 that fp16 holds [N, D' / 32]), D' = D up to a multiple of 32.

    Of several scales for each group the one is taken that leaves the least error once it is fitted to the numbers it
    leads to (least squares): with q fixed, sum m (w - s q)^2 is least at s = sum m w q / sum m q^2, and is then
    sum m w^2 - (sum m w q)^2 / sum m q^2.
    """
    n, d = w_ND.shape
    groups = -(-d // GROUP)
    q_ND = torch.empty(n, groups * GROUP, dtype=torch.int8)
    scale_NG = torch.empty(n, groups)
    m_IG = _by_group(_importance(importance_D, d)[None])
    rows = max(1, _CHUNK // groups)
    for begin in range(0, n, rows):
        w_IG = _by_group(w_ND[begin : begin + rows].float())
        q_IG, scale_G = _round_groups(w_IG, m_IG.repeat(1, w_IG.shape[1] // groups), format)
        q_ND[begin : begin + rows] = q_IG.T.reshape(-1, groups * GROUP)
        scale_NG[begin : begin + rows] = scale_G.view(-1, groups)
    return q_ND, scale_NG


def _importance(importance_D: Tensor | None, d: int) -> Tensor:
    """With a floor: an input that the calibration text never used still has weights to keep."""
    if importance_D is None:
        return torch.ones(d)
    mean = importance_D.float().mean()
    return importance_D.float().clamp(min=float(mean) * 1e-4) / mean if mean > 0 else torch.ones(d)


def _by_group(w_ND: Tensor) -> Tensor:
    """[N, D] -> [32, N * groups]: sums over a group then run along memory, many groups at a time."""
    padded_ND = torch.nn.functional.pad(w_ND, (0, -w_ND.shape[1] % GROUP))
    return padded_ND.reshape(-1, GROUP).T.contiguous()


def _round_groups(w_IG: Tensor, m_IG: Tensor, format: QuantFormat) -> tuple[Tensor, Tensor]:
    """-> (whole numbers, still fp32 [32, G], scales [G] rounded to fp16)."""
    mw_IG = m_IG * w_IG
    extreme_G = w_IG.gather(0, w_IG.abs().argmax(0, keepdim=True))[0]
    best_G, scale_G = torch.zeros_like(extreme_G), torch.zeros_like(extreme_G)
    for divisor in format.divisors:
        q_IG = _whole(w_IG, -extreme_G / divisor, format)
        along_G = (mw_IG * q_IG).sum(0)
        fitted_G = along_G / (m_IG * q_IG * q_IG).sum(0).clamp(min=1e-30)
        better_G = along_G * fitted_G > best_G  # by how much the error is less than that of all zeros
        best_G = torch.where(better_G, along_G * fitted_G, best_G)
        scale_G = torch.where(better_G, fitted_G, scale_G)
    scale_G = torch.where(extreme_G.isfinite(), scale_G, extreme_G).half().float()
    return _whole(w_IG, scale_G, format), scale_G


def _whole(w_IG: Tensor, scale_G: Tensor, format: QuantFormat) -> Tensor:
    """The nearest numbers of the format; all 0 where the scale is 0."""
    inverse_G = torch.where(scale_G.abs() > 1e-20, 1 / scale_G, 0.0)
    return (w_IG * inverse_G).round_().clamp_(format.low, format.high)
