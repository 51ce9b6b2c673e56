"""Products of numbers at fp32's ends (subnormal, too large, infinite, none), bit for bit, on every instruction set."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from mixtral.kernels import packing
from mixtral.kernels.native import library as native
from mixtral.kernels.packing import GROUP, pack
from tests.kernels.native_oracle import assert_same_bits, oracle

pytestmark = pytest.mark.skipif(bool(native.available()), reason=native.available())

LEAST = 2.0**-149  # of fp32, and 2^-133 that of bf16
NAN, INF = math.nan, math.inf


def check_bf16(x_TD: Tensor, w_ND: Tensor, isa: str) -> Tensor:
    w = pack(w_ND.bfloat16(), "bf16")
    got = native.packed_linear(x_TD, w, "bf16", len(w_ND))
    assert_same_bits(got, oracle(x_TD, w, "bf16", len(w_ND), isa))
    return got


def scaled(rows: int, d: int, exponent: int) -> Tensor:
    """Random numbers around 2^exponent; of fp32's range only."""
    return (torch.randn(rows, d, dtype=torch.float64) * 2.0**exponent).float()


@pytest.mark.parametrize(
    ("x", "w"),
    [
        (-63, -63),  # products on both sides of the least normal number
        (-70, -70),  # subnormal products
        (-75, -75),  # products that round to the least number or to zero
        (-90, -90),  # to zero
        (-128, 20), (-133, 0), (20, -130),  # subnormal inputs, subnormal weights
        (63, 63),  # products on both sides of the largest number
        (66, 62),
    ],
)  # fmt: skip
@pytest.mark.parametrize("d", [2, 64, 70])
def test_bf16_products_that_fp32_does_not_hold(x: int, w: int, d: int, isa: str) -> None:
    """Of a product that is rounded before it is added, the sum would be another one, or infinite."""
    check_bf16(scaled(7, d, x), scaled(20, d, w), isa)


def test_a_product_beyond_fp32_may_add_up_to_a_number(isa: str) -> None:
    """2^128 does not fit; less 2^127, it does."""
    x_TD, w_ND = torch.tensor([[2.0**64, -(2.0**126)]]), torch.tensor([[2.0**64, 2.0]])
    assert check_bf16(x_TD, w_ND, isa).tolist() == [[2.0**127]]


def test_half_of_the_least_number_counts_beside_what_is_there(isa: str) -> None:
    """2^-150 alone is a tie that goes to zero; with 3 times 2^-149 it is one that goes to 4 times."""
    got = check_bf16(torch.tensor([[2.0**-75, 2.0**-74]]), torch.tensor([[2.0**-75, 1.5 * 2.0**-74]]), isa)
    assert got.item() == (0.0 if isa == "avx512" else 4 * LEAST)


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("at", [0, 1, 37])
@pytest.mark.parametrize("where", ["x", "w"])
def test_bf16_of_what_is_not_finite(bad: float, at: int, where: str, isa: str) -> None:
    x_TD, w_ND = torch.randn(5, 40), torch.randn(20, 40)
    w_ND[3] = 0.0  # infinity times zero is no number
    (x_TD[2:3] if where == "x" else w_ND[4:5])[:, at] = bad
    got = check_bf16(x_TD, w_ND, isa)
    assert got.isfinite().all(dim=1 if where == "x" else 0).sum() == (4 if where == "x" else 19)


def test_bf16_of_infinities_of_both_signs_and_of_zeros(isa: str) -> None:
    values = torch.tensor([0.0, -0.0, INF, -INF, 3e38, -3e38, 1.0, LEAST, -LEAST, 2.0**-126])
    pairs = torch.cartesian_prod(values, values)
    check_bf16(pairs, pairs, isa)


def test_rounding_to_bf16(isa: str) -> None:
    """Times one: NaN of any bits stays NaN, what lies beyond the largest bf16 becomes infinite, ties go to even."""
    tops = torch.arange(1 << 16, dtype=torch.int64)
    bits = torch.cat([tops << 16 | low for low in (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF)])
    x = bits.to(torch.int32).view(torch.float32)
    x_TD = torch.zeros(len(x), 2)
    x_TD[:, 1] = x
    w_ND = torch.tensor([[0.0, 1.0]])
    got = native.packed_linear(x_TD, pack(w_ND.bfloat16(), "bf16"), "bf16", 1)[:, 0]
    want = x.bfloat16().float()
    if isa == "avx512":
        want = torch.where(want.abs() < 2.0**-126, 0.0, want)
    assert torch.equal(got.isnan(), x.isnan())
    assert_same_bits(got, want + 0.0)  # a sum starts from +0, and so never is -0


@pytest.mark.parametrize("name", ["int8", "int4"])
@pytest.mark.parametrize("exponent", [-149, -140, -126, -120, 0, 120, 127])
def test_quantised_products_that_fp32_does_not_hold(name: str, exponent: int, isa: str) -> None:
    """Scales of groups whose product is subnormal, zero or infinite."""
    x_TD, n = scaled(5, 70, exponent).clamp(-3e38, 3e38), 20
    q_ND = torch.randint(-7, 8, (n, 70), dtype=torch.int8)
    for scale in (2.0**-24, 2.0**-10, 1.0, 65504.0):
        w = pack(q_ND, name, torch.full((n, 3), scale) * torch.tensor([1.0, -1.0, 0.5]))
        assert_same_bits(native.packed_linear(x_TD, w, name, n), oracle(x_TD, w, name, n, isa))


@pytest.mark.parametrize("name", ["int8", "int4"])
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_quantised_products_of_what_is_not_finite(name: str, bad: float, isa: str) -> None:
    x_TD, w = torch.randn(4, 70), pack(torch.randint(-7, 8, (20, 70), dtype=torch.int8), name, torch.rand(20, 3))
    x_TD[1, 40] = bad
    got, want = native.packed_linear(x_TD, w, name, 20), oracle(x_TD, w, name, 20, isa)
    assert_same_bits(got[[0, 2, 3]], want[[0, 2, 3]])
    assert not got[1].isfinite().any()


def test_every_fp16_scale(isa: str) -> None:
    """All of fp16, subnormal numbers, infinities and NaN among them."""
    scale_NG = torch.arange(1 << 16).to(torch.int16).view(torch.float16).float()[:, None]
    w = packing.pack(torch.ones(1 << 16, GROUP, dtype=torch.int8), "int8", scale_NG)
    x_TD = torch.zeros(1, GROUP)
    x_TD[0, 5] = 127.0  # sx is 1 and the dot product 127
    got = native.packed_linear(x_TD, w, "int8", 1 << 16)
    assert_same_bits(got, oracle(x_TD, w, "int8", 1 << 16, isa))
    assert_same_bits(got[0], 127 * scale_NG[:, 0] + 0.0)
