"""Rounding: as good as can be found by hand, and no worse than the usual schemes of others."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mixtral.errors import WeightsError
from mixtral.kernels.torch.dequantise import expand
from mixtral.quant.formats import INT4, INT8, Format, quantise, round_weights


def random_matrix(n: int, d: int, seed: int = 0) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def back(w_ND: Tensor, format: Format, importance_D: Tensor | None = None) -> Tensor:
    return expand(quantise(w_ND, format, importance_D), format.name, *w_ND.shape)


def error(w_ND: Tensor, got_ND: Tensor, m_D: Tensor | float = 1.0) -> float:
    return float((m_D * (w_ND - got_ND) ** 2).sum())


def test_bits_and_shapes() -> None:
    assert (INT8.bits, INT4.bits) == (8.5, 4.5)
    assert INT8.packed_shape((8, 2, 48, 64)) == (8, 2, 3, 2 * 544)
    assert INT4.packed_shape((17, 33)) == (2, 2 * 288)
    packed = quantise(random_matrix(17, 33), INT4)
    assert packed.dtype == torch.uint8 and packed.shape == (2, 2 * 288)
    assert quantise(random_matrix(32, 64), INT8).numel() * 8 == 32 * 64 * 8.5


@pytest.mark.parametrize(("format", "bound"), [(INT8, 0.006), (INT4, 0.1)])
@pytest.mark.parametrize("shape", [(1, 1), (16, 32), (17, 33), (5, 160)])
def test_the_error_of_normal_weights(format: Format, bound: float, shape: tuple[int, int]) -> None:
    w_ND = random_matrix(*shape)
    got_ND = back(w_ND, format)
    assert got_ND.shape == w_ND.shape
    assert error(w_ND, got_ND) ** 0.5 <= bound * float(w_ND.norm())


@pytest.mark.parametrize("format", [INT8, INT4])
def test_what_the_format_holds_exactly_comes_back_exactly(format: Format) -> None:
    q_ND = torch.randint(format.low, format.high + 1, (16, 64), generator=torch.Generator().manual_seed(1)).float()
    q_ND[:, ::32] = format.low
    w_ND = q_ND * torch.tensor([0.5, 2.0]).repeat_interleave(32)
    assert torch.equal(back(w_ND, format), w_ND)


def absmax_rounding(w_ND: Tensor, format: Format) -> Tensor:
    """What Q8_0 and Q4_0 do: the scale from the largest weight alone."""
    groups = w_ND.view(-1, 32)
    extreme = groups.gather(1, groups.abs().argmax(1, keepdim=True))
    scale = (extreme / (127 if format is INT8 else -8)).half().float()
    return ((groups / scale).round().clamp(format.low, format.high) * scale).view_as(w_ND)


@pytest.mark.parametrize(("format", "gain"), [(INT8, 1.0), (INT4, 0.9)])
def test_the_search_beats_the_scale_of_the_largest_weight(format: Format, gain: float) -> None:
    w_ND = random_matrix(64, 128)
    assert error(w_ND, back(w_ND, format)) < gain * error(w_ND, absmax_rounding(w_ND, format))


def test_important_inputs_are_rounded_better() -> None:
    w_ND, importance_D = random_matrix(64, 128), torch.ones(128)
    importance_D[::8] = 100
    plain, aware = back(w_ND, INT4), back(w_ND, INT4, importance_D)
    assert error(w_ND, aware, importance_D) < 0.7 * error(w_ND, plain, importance_D)
    assert torch.equal(back(w_ND, INT4, importance_D * 1e6), aware)  # proportions count alone


def test_inputs_that_were_never_used_keep_their_weights() -> None:
    w_ND, importance_D = random_matrix(16, 64), torch.ones(64)
    importance_D[:32] = 0
    got_ND = back(w_ND, INT4, importance_D)
    assert error(w_ND[:, :32], got_ND[:, :32]) ** 0.5 < 0.1 * float(w_ND[:, :32].norm())
    assert torch.equal(back(w_ND, INT4, torch.zeros(64)), back(w_ND, INT4))


@pytest.mark.parametrize("format", [INT8, INT4])
def test_zeros_and_weights_too_small_for_a_scale(format: Format) -> None:
    w_ND = torch.zeros(16, 64)
    w_ND[:, :32] = 1e-12
    w_ND[3] = 1e-44  # not even its inverse is finite
    assert not back(w_ND, format).any()


@pytest.mark.parametrize("format", [INT8, INT4])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_weights_that_no_scale_fits(format: Format, value: float) -> None:
    w_ND = random_matrix(16, 64)
    w_ND[2, 40] = value
    with pytest.raises(WeightsError, match="not finite, or too large for an fp16 scale"):
        quantise(w_ND, format)


def test_chunks_do_not_show() -> None:
    w_ND = random_matrix(3000, 64)  # more groups than are searched at once
    q_ND, scale_NG = round_weights(w_ND, INT4)
    last_q_ND, last_scale_NG = round_weights(w_ND[2990:], INT4)
    assert torch.equal(q_ND[2990:], last_q_ND) and torch.equal(scale_NG[2990:], last_scale_NG)
