from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from torch import Tensor

from mixtral.errors import UsageError
from mixtral.kernels import packing
from mixtral.kernels.packing import GROUP, LANES, fma, pack, packed_linear, packed_shape, quantise_rows, unpack

SIZES = [(16, 32), (1, 1), (17, 33), (48, 96), (5, 70)]


def weight(name: str, *shape: int) -> tuple[Tensor, Tensor | None]:
    """Random values of a format, and their scales."""
    if name in packing.DTYPES:
        return torch.randn(*shape).to(packing.DTYPES[name]), None
    low, high = {"int8": (-127, 128), "int4": (-8, 8)}[name]
    q = torch.randint(low, high, shape, dtype=torch.int8)
    return q, torch.rand(*shape[:-1], math.ceil(shape[-1] / GROUP)).half().float()


@pytest.mark.parametrize("name", packing.GROUP_BYTES)
@pytest.mark.parametrize(("n", "d"), SIZES)
def test_unpack_is_the_inverse_of_pack(name: str, n: int, d: int) -> None:
    values, scale = weight(name, n, d)
    bytes_ = pack(values, name, scale)
    assert bytes_.dtype == torch.uint8 and bytes_.is_contiguous() and tuple(bytes_.shape) == packed_shape(name, n, d)
    back, back_scale = unpack(bytes_, name, n, d)
    assert torch.equal(back, values)
    assert back_scale is None if scale is None else torch.equal(back_scale, scale)


@pytest.mark.parametrize("name", packing.GROUP_BYTES)
def test_stacked_matrices_are_packed_one_by_one(name: str) -> None:
    values, scale = weight(name, 2, 3, 20, 40)
    together = pack(values, name, scale)
    assert together.shape[:2] == (2, 3)
    alone = pack(values[1, 2], name, None if scale is None else scale[1, 2])
    assert torch.equal(together[1, 2], alone)
    assert torch.equal(unpack(together, name, 20, 40)[0], values)


@pytest.mark.parametrize(("name", "bits"), [("fp32", 32), ("fp16", 16), ("bf16", 16), ("int8", 8.5), ("int4", 4.5)])
def test_bits_a_weight(name: str, bits: float) -> None:
    blocks, row = packed_shape(name, 64, 128)
    assert 8 * blocks * row == bits * 64 * 128


def test_where_each_weight_lies_bf16() -> None:
    """Output 17, input 35: block 1, pair 17, lane 1, second of its pair."""
    values = torch.zeros(32, 64, dtype=torch.bfloat16)
    values[17, 35] = 1.0
    bytes_ = pack(values, "bf16")
    at = 17 * 64 + 1 * 4 + 2
    assert bytes_[1, at : at + 2].tolist() == [0x80, 0x3F] and bytes_.count_nonzero() == 2


@pytest.mark.parametrize(("name", "bytes_of_one"), [("fp32", [0, 0, 0x80, 0x3F]), ("fp16", [0, 0x3C])])
def test_where_each_weight_lies_without_pairs(name: str, bytes_of_one: list[int]) -> None:
    """Output 17, input 35: block 1, input 35, lane 1."""
    values = torch.zeros(32, 64, dtype=packing.DTYPES[name])
    values[17, 35] = 1.0
    bytes_, size = pack(values, name), len(bytes_of_one)
    at = (35 * LANES + 1) * size
    assert bytes_[1, at : at + size].tolist() == bytes_of_one and bytes_.count_nonzero() == sum(map(bool, bytes_of_one))


@pytest.mark.parametrize("name", packing.GROUP_BYTES)
@pytest.mark.parametrize(("n", "d"), SIZES)
def test_rows_of_a_packed_matrix(name: str, n: int, d: int) -> None:
    values, scale = weight(name, n, d)
    ids = torch.tensor([n - 1, 0, n // 2, 0])
    got = packing.unpack_rows(pack(values, name, scale), name, n, d, ids)
    want = values if scale is None else values * scale.repeat_interleave(GROUP, dim=1)[:, :d]
    assert got.dtype == packing.DTYPES.get(name, torch.float32) and torch.equal(got, want[ids])


def test_where_each_weight_lies_int8() -> None:
    """Output 17, input 32 + 13: block 1, group 1, quad 3, lane 1, second of its quad."""
    q, scale = torch.zeros(32, 64, dtype=torch.int8), torch.zeros(32, 2)
    q[17, 45], scale[17, 1] = -3, 1.0
    bytes_ = pack(q, "int8", scale)
    at = 544 + 3 * 64 + 1 * 4 + 1
    assert bytes_[1, at] == 125
    assert bytes_[1, 544 + 512 + 2 : 544 + 512 + 4].tolist() == [0x00, 0x3C]
    assert (bytes_ == 128).sum() == 32 * 64 - 1 and ((bytes_ != 128) & (bytes_ != 0)).sum() == 2


@pytest.mark.parametrize(("quad", "byte"), [(3, 0x8B), (7, 0xB8)])
def test_where_each_weight_lies_int4(quad: int, byte: int) -> None:
    """Quads 3 and 7 share register 3: one in its low nibbles, one in its high ones."""
    q = torch.zeros(16, 32, dtype=torch.int8)
    q[2, 4 * quad + 1] = 3
    bytes_ = pack(q, "int4", torch.zeros(16, 1))
    assert bytes_[0, 3 * 64 + 2 * 4 + 1] == byte and (bytes_[0, :256] == 0x88).sum() == 255


def test_fma_rounds_once() -> None:
    """Against exact fractions; half of the sums cancel."""
    a, b = (torch.randn(2000) * 2.0 ** torch.randint(-9, 9, (2000,)) for _ in range(2))
    c = torch.where(torch.arange(2000) % 2 == 0, -a * b, a * b * 2.0**28)
    for x, y, z, got in zip(a.tolist(), b.tolist(), c.tolist(), fma(a, b, c).tolist(), strict=True):
        exact = Fraction(x) * Fraction(y) + Fraction(z)
        around = [torch.nextafter(torch.tensor(got), torch.tensor(side)).item() for side in (math.inf, -math.inf)]
        assert abs(exact - Fraction(got)) <= min(abs(exact - Fraction(other)) for other in around), (x, y, z, got)


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize(
    ("a", "b", "c", "sum_"),
    [
        (1 + 2.0**-23, 1 - 2.0**-23, 1 + 2.0**-23, 1 + 2.0**-23),  # 2^-70 below a tie that would go up
        (1 + 2.0**-11, 1 - 2.0**-11 + 2.0**-22, 1.0, 1 + 2.0**-23),  # 2^-57 above a tie that would go down
        (1.0, 1.0, 1.0, 1.0),
        (1.0, 1.0, 1 + 2.0**-23, 1 + 2.0**-22),  # true ties go to even
    ],
)
def test_fma_near_a_tie(a: float, b: float, c: float, sum_: float, sign: float) -> None:
    """Where fp64 cannot hold the sum: rounded to fp64 and then to fp32 it would fall on the tie."""
    got = fma(torch.tensor([sign * a * 2.0**-24]), torch.tensor([b]), torch.tensor([sign * c]))
    assert got.item() == sign * sum_


def test_quantised_rows() -> None:
    x = torch.randn(3, 70)
    x[1, :32] = 0
    qx, sx = quantise_rows(x)
    assert qx.shape == (3, 70) and sx.shape == (3, 3) and qx.dtype == torch.int8
    assert sx[1, 0] == 0 and not qx[1, :32].any()
    assert sx[0, 1] == x[0, 32:64].abs().max() / 127 and qx[0, 32:64].abs().max() == 127
    spread = sx.repeat_interleave(GROUP, dim=1)[:, :70]
    assert ((qx * spread - x).abs() <= 0.5001 * spread).all()


def test_quantised_rows_round_half_to_even() -> None:
    row = torch.tensor([[127.0, 0.5, 1.5, -2.5, 3.5, 126.5]])
    assert quantise_rows(row)[0].tolist() == [[127, 0, 2, -2, 4, 126]]


def test_quantised_rows_of_tiny_numbers_stay_in_range() -> None:
    """190 times the least fp32 number: its 127th part rounds to one, and 190 would not fit."""
    row = torch.full((1, 4), 190 * 2.0**-149)
    assert quantise_rows(row)[0].tolist() == [[127] * 4]


def test_not_a_number_stays_one() -> None:
    q, scale = weight("int8", 16, 32)
    x = torch.randn(2, 32)
    x[0, 3] = math.nan
    out = packed_linear(x, pack(q, "int8", scale), "int8", 16)
    assert out[0].isnan().all() and out[1].isfinite().all()


@pytest.mark.parametrize("name", packing.GROUP_BYTES)
@pytest.mark.parametrize("rows", [0, 1, 3])
@pytest.mark.parametrize(("n", "d"), SIZES)
def test_the_product_is_close_to_the_exact_one(name: str, rows: int, n: int, d: int) -> None:
    """fp32, fp16: sums rounded. bf16: x and sums rounded. Quantised: x is off by up to half a step of its group, which
    is 1/254 of its largest value."""
    values, scale = weight(name, n, d)
    w = values.double() if scale is None else values * scale.repeat_interleave(GROUP, dim=1)[:, :d].double()
    x = torch.randn(rows, d)
    got = packed_linear(x, pack(values, name, scale), name, n)
    assert got.dtype == torch.float32 and got.shape == (rows, n)
    step = {"fp32": 1e-6, "fp16": 1e-6, "bf16": 2.0**-8}.get(name, 1 / 250)
    largest = x.abs().amax(1, keepdim=True) if rows else x[:, :1]
    assert ((got - x.double() @ w.T).abs() <= step * largest * w.abs().sum(1)).all()


@pytest.mark.parametrize("name", ["fp32", "fp16"])
def test_fp32_and_fp16_sums_ascend_in_fused_steps(name: str) -> None:
    """1 first loses each 2^-24 by itself; last it takes both."""
    bytes_ = pack(torch.ones(1, 4, dtype=packing.DTYPES[name]), name)
    small = 2.0**-24
    assert packed_linear(torch.tensor([[1.0, small, small, 0.0]]), bytes_, name, 1).item() == 1.0
    assert packed_linear(torch.tensor([[small, small, 1.0, 0.0]]), bytes_, name, 1).item() == 1.0 + 2 * small


@pytest.mark.parametrize("name", ["fp32", "fp16"])
def test_fp32_and_fp16_leave_inputs_as_they_are(name: str) -> None:
    bytes_ = pack(torch.ones(1, 1, dtype=packing.DTYPES[name]), name)
    x = torch.tensor([[1 + 2.0**-23]])
    assert torch.equal(packed_linear(x, bytes_, name, 1), x)


def test_bf16_sums_are_single_fused_steps() -> None:
    """1 and 2^-24, 2^-24 in the order of pairs: each alone is lost beside 1; added to each other first they are not."""
    values = torch.ones(1, 4, dtype=torch.bfloat16)
    small = 2.0**-24
    bytes_ = pack(values, "bf16")
    assert packed_linear(torch.tensor([[1.0, 0.0, small, small]]), bytes_, "bf16", 1).item() == 1.0
    assert packed_linear(torch.tensor([[1.0, 2 * small, 0.0, 0.0]]), bytes_, "bf16", 1).item() == 1.0 + 2 * small
    # the second of a pair comes first: 2^-24 + 2^-24, then 1; ascending it would be 1 + 2^-24 twice, which is 1
    assert packed_linear(torch.tensor([[small, small, 1.0, 0.0]]), bytes_, "bf16", 1).item() == 1.0 + 2 * small
    assert packed_linear(torch.tensor([[1.0, small, small, 0.0]]), bytes_, "bf16", 1).item() == 1.0


@pytest.mark.parametrize(
    ("values", "name", "scale", "says"),
    [
        (torch.zeros(16, 32), "bf16", None, "values must be bfloat16, not float32"),
        (torch.zeros(16, 32).bfloat16(), "bf16", torch.ones(16, 1), "scales are not part of this format"),
        (torch.zeros(16, 32, dtype=torch.int8), "int8", None, "scales are missing"),
        (torch.zeros(16, 32), "int8", torch.ones(16, 1), "values must be int8 in -127..127"),
        (torch.full((16, 32), -128, dtype=torch.int8), "int8", torch.ones(16, 1), "values must be int8 in -127..127"),
        (torch.full((16, 32), 8, dtype=torch.int8), "int4", torch.ones(16, 1), "values must be int8 in -8..7"),
        (torch.zeros(16, 33, dtype=torch.int8), "int4", torch.ones(16, 1), "scales must have the shape [16, 2]"),
        (torch.zeros(16, 32), "int5", None, "unknown name 'int5'; did you mean 'int"),
    ],
)
def test_what_cannot_be_packed_is_refused(values: Tensor, name: str, scale: Tensor | None, says: str) -> None:
    with pytest.raises(UsageError) as error:
        pack(values, name, scale)
    assert says in str(error.value)


def test_a_packed_tensor_of_another_size_is_refused() -> None:
    bytes_ = pack(torch.zeros(LANES, 32).bfloat16(), "bf16")
    with pytest.raises(UsageError, match=r"weight of 32 x 32: must be uint8 \[..., 2, 1024\], not uint8 \[1, 1024\]"):
        unpack(bytes_, "bf16", 32, 32)
    with pytest.raises(UsageError, match="must be uint8"):
        packed_linear(torch.zeros(1, 40), bytes_, "bf16", 16)
