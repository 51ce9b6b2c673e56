"""Rounding with feedback: against elimination one input at a time, and what it is for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mixtral.errors import WeightsError
from mixtral.kernels.torch.dequantise import expand
from mixtral.quant import gptq
from mixtral.quant.formats import INT4, INT8, Format, quantise
from mixtral.quant.gptq import DAMPING, inverse_factor, round_with_feedback


def random_matrix(n: int, d: int, seed: int = 0) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def related_inputs(d: int, rows: int = 500) -> Tensor:
    """E[x x^T] of inputs that go together."""
    x_nD = random_matrix(rows, d, seed=1) @ (torch.eye(d) + 0.5 * random_matrix(d, d, seed=2))
    return x_nD.T @ x_nD / rows


def error(w_ND: Tensor, got_ND: Tensor, m_DD: Tensor) -> float:
    return float(((w_ND - got_ND) @ m_DD * (w_ND - got_ND)).sum())


def back(w_ND: Tensor, format: Format, importance: Tensor | None) -> Tensor:
    return expand(quantise(w_ND, format, importance), format.name, *w_ND.shape)


def to_sevenths(w: Tensor, scale: Tensor) -> Tensor:
    return (w / scale).round().clamp(-8, 7)


def naive(w_D: Tensor, m_DD: Tensor) -> tuple[list[float], list[float]]:
    """One row in fp64: fix an input, then solve for the free ones anew -> (whole numbers, scales)."""
    d = len(w_D)
    m_DD = m_DD.double() + DAMPING * m_DD.diagonal().mean() * torch.eye(d)
    wanted_D, value_D, whole, scales = w_D.double(), w_D.double().clone(), [], []
    for i in range(d):
        if i % 32 == 0:
            # 1 / U_ii^2 of input j, when all before it are fixed, is 1 / (M_jj..)^-1_00
            m_I = torch.stack([1 / m_DD[j:, j:].inverse()[0, 0] for j in range(i, i + 32)])
            scales.append(scale_of(value_D[None, i : i + 32].float(), m_I.float())[0].double())
        whole.append(float(to_sevenths(value_D[i], scales[-1])))
        value_D[i] = whole[-1] * scales[-1]
        if i + 1 < d:  # the least of (w - v) M (w - v)^T over the free v
            fixed_D = wanted_D[: i + 1] - value_D[: i + 1]
            value_D[i + 1 :] = wanted_D[i + 1 :] + m_DD[i + 1 :, i + 1 :].inverse() @ m_DD[i + 1 :, : i + 1] @ fixed_D
    return whole, [float(scale) for scale in scales]


def scale_of(w_NI: Tensor, m_I: Tensor) -> Tensor:
    """Any rule will do that uses the weights and their importance."""
    return ((m_I * w_NI.abs()).sum(-1) / m_I.sum() / 3 + 0.01).half().float()


def test_equals_elimination_one_input_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gptq, "_ROWS", 2)
    w_ND, m_DD = random_matrix(5, 96), related_inputs(96)
    q_ND, scale_NG = round_with_feedback(w_ND, m_DD, scale_of, to_sevenths)
    assert q_ND.dtype == torch.int8
    for w_D, q_D, scale_G in zip(w_ND, q_ND, scale_NG, strict=True):
        whole, scales = naive(w_D, m_DD)
        assert scale_G.tolist() == pytest.approx(scales, rel=1e-3)
        assert (q_D != torch.tensor(whole)).sum() <= 1  # a tie may fall otherwise in fp32


def test_the_factor_is_that_of_the_inverse() -> None:
    m_DD = related_inputs(64)
    u_DD = inverse_factor(m_DD)
    assert torch.equal(u_DD, u_DD.triu())
    damped_DD = m_DD + DAMPING * m_DD.diagonal().mean() * torch.eye(64)
    torch.testing.assert_close(u_DD.T @ u_DD @ damped_DD, torch.eye(64), atol=1e-3, rtol=0)


@pytest.mark.parametrize(("format", "gain"), [(INT4, 0.6), (INT8, 0.6)])
def test_the_output_is_nearer(format: Format, gain: float) -> None:
    w_ND, m_DD = random_matrix(48, 160), related_inputs(160)
    plain, weighted = (back(w_ND, format, m_D) for m_D in (None, m_DD.diagonal()))
    got = error(w_ND, back(w_ND, format, m_DD), m_DD)
    assert got < gain * error(w_ND, plain, m_DD) and got < gain * error(w_ND, weighted, m_DD)


@pytest.mark.parametrize("shape", [(16, 64), (5, 33), (1, 1)])
def test_unrelated_inputs_are_rounded_as_by_their_importance(shape: tuple[int, int]) -> None:
    w_ND, m_D = random_matrix(*shape), torch.linspace(1, 3, shape[1])
    damped_D = m_D + DAMPING * (m_D.sum() / (-(-shape[1] // 32) * 32))  # the filled inputs count in the mean
    # the group of one weight alone fits many scales, and one may round to the next fp16
    torch.testing.assert_close(back(w_ND, INT4, m_D.diag()), back(w_ND, INT4, damped_D), rtol=2**-10, atol=0)


@pytest.mark.parametrize("moments", [torch.zeros(64, 64), torch.ones(64, 64)])
def test_inputs_that_never_came_or_always_came_together(moments: Tensor) -> None:
    w_ND = random_matrix(4, 64)
    got_ND = back(w_ND, INT4, moments)
    assert got_ND.isfinite().all() and error(w_ND, got_ND, torch.eye(64)) < 0.1 * float(w_ND.square().sum())


def test_weights_that_are_not_finite() -> None:
    w_ND = random_matrix(4, 64)
    w_ND[1, 40] = float("nan")
    with pytest.raises(WeightsError, match="not finite"):
        quantise(w_ND, INT4, related_inputs(64))


@pytest.mark.parametrize("shape", [(64,), (64, 64)])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_moments_that_are_not_finite(shape: tuple[int, ...], value: float) -> None:
    with pytest.raises(WeightsError, match=r"^the calibration text gives it inputs that are not finite"):
        quantise(random_matrix(4, 64), INT4, torch.full(shape, value))
