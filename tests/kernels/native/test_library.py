"""The C++ library against the oracle in packing.py, on every instruction set that this machine has."""

from __future__ import annotations

import ctypes
import functools
import math
import os
import shutil
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mixtral import kernels
from mixtral.errors import UsageError
from mixtral.kernels import Call, packing
from mixtral.kernels.native import library as native
from mixtral.kernels.packing import GROUP, pack
from mixtral.kernels.torch import dequantise
from tests.kernels.native_oracle import assert_same_bits, oracle

pytestmark = pytest.mark.skipif(bool(native.available()), reason=native.available())

FORMATS = list(packing.GROUP_BYTES)


@pytest.fixture
def threads() -> Iterator[None]:
    """Puts back the number of threads that the test changes."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def weight(name: str, n: int, d: int) -> Tensor:
    """A random packed matrix; the scales have both signs and span fp16, subnormal numbers included."""
    if name in packing.DTYPES:
        return pack(torch.randn(n, d).to(packing.DTYPES[name]), name)
    low, high = {"int8": (-127, 128), "int4": (-8, 8)}[name]
    groups = math.ceil(d / GROUP)
    scale_NG = torch.randn(n, groups) * 2.0 ** torch.randint(-24, 10, (n, groups))
    return pack(torch.randint(low, high, (n, d), dtype=torch.int8), name, scale_NG)


def check(x_TD: Tensor, w: Tensor, name: str, n: int, isa: str) -> None:
    assert_same_bits(native.packed_linear(x_TD, w, name, n), oracle(x_TD, w, name, n, isa))


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(("n", "d"), [(16, 32), (1, 1), (17, 33), (90, 100)])
@pytest.mark.parametrize("rows", [0, 1, 2, 3, 5, 7, 13])
def test_equals_the_oracle(name: str, n: int, d: int, rows: int, isa: str) -> None:
    x_TD = torch.randn(rows, d)
    x_TD[:1] = 0
    check(x_TD, weight(name, n, d), name, n, isa)


@pytest.mark.parametrize("name", FORMATS)
def test_many_rows_over_long_inputs_equal_the_oracle(name: str, isa: str) -> None:
    """So long that many rows take the inputs in several parts: 8 KiB of a block are 256 to 896 inputs."""
    check(torch.randn(9, 1000), weight(name, 33, 1000), name, 33, isa)


@pytest.mark.usefixtures("isa", "threads")
@pytest.mark.parametrize("name", FORMATS)
def test_a_row_has_the_same_bits_among_any_rows_and_threads(name: str) -> None:
    w, x_TD = weight(name, 130, 1000), torch.randn(512, 1000)
    torch.set_num_threads(1)
    alone = torch.cat([native.packed_linear(x_TD[t : t + 1], w, name, 130) for t in range(7)])
    for count in (1, 2, 4):
        torch.set_num_threads(count)
        for rows in (1, 2, 7, 64, 512):
            got = native.packed_linear(x_TD[:rows], w, name, 130)
            assert torch.equal(got[:7], alone[:rows]), f"{rows} rows, {count} threads"
            assert torch.equal(native.packed_linear(x_TD[:rows].flip(0), w, name, 130).flip(0), got)


@pytest.mark.parametrize(("name", "q", "other"), [("int8", 127, -127), ("int4", 7, -8)])
def test_the_largest_products_do_not_overflow(name: str, q: int, other: int, isa: str) -> None:
    """All 32 products of a group as large as they can be, of one sign, in every pattern of signs of x."""
    values = torch.full((16, 32), q, dtype=torch.int8)
    values[8:] = other
    w = pack(values, name, torch.ones(16, 1))
    x_TD = torch.full((4, 32), 3.0)
    x_TD[1] = -3.0
    x_TD[2, ::2] = -3.0
    x_TD[3, 16:] = -3.0
    check(x_TD, w, name, 16, isa)
    assert native.packed_linear(x_TD[:1], w, name, 16)[0, 0].item() == pytest.approx(32 * q * 3.0, rel=1e-6)


@pytest.mark.parametrize("scale", [2.0**-24, 2.0**-15, 65504.0, -0.5, 0.0])
def test_every_kind_of_scale(scale: float, isa: str) -> None:
    q = torch.randint(-127, 128, (16, 32), dtype=torch.int8)
    check(torch.randn(2, 32), pack(q, "int8", torch.full((16, 1), scale)), "int8", 16, isa)


@pytest.mark.usefixtures("isa")
def test_scales_that_are_no_number_show() -> None:
    q = torch.ones(16, 32, dtype=torch.int8)
    out = native.packed_linear(torch.ones(1, 32), pack(q, "int8", torch.full((16, 1), math.nan)), "int8", 16)
    infinite = native.packed_linear(torch.ones(1, 32), pack(q, "int8", torch.full((16, 1), -math.inf)), "int8", 16)
    assert out.isnan().all() and (infinite == -math.inf).all()


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_stays_in_its_row(name: str, bad: float) -> None:
    x_TD, w = torch.randn(3, 40), weight(name, 16, 40)
    clean = native.packed_linear(x_TD, w, name, 16)
    x_TD[1, 5] = bad
    got = native.packed_linear(x_TD, w, name, 16)
    assert not got[1].isfinite().any() and torch.equal(got[::2], clean[::2])


@pytest.mark.parametrize("value", [190 * 2.0**-149, 1e-42, 3e38])
@pytest.mark.parametrize("name", ["int8", "int4"])
def test_very_small_and_large_inputs(value: float, name: str, isa: str) -> None:
    x_TD = torch.rand(2, 64) * value
    q = torch.randint(-7, 8, (16, 64), dtype=torch.int8)
    check(x_TD, pack(q, name, torch.full((16, 2), 2.0**-9)), name, 16, isa)


def test_inputs_halfway_between_two_steps_are_rounded_to_even(isa: str) -> None:
    x_TD = torch.arange(-64, 64).float().div(2).view(4, 32)
    x_TD[:, 0] = 127.0
    check(x_TD, pack(torch.eye(32, dtype=torch.int8), "int8", torch.ones(32, 1)), "int8", 32, isa)


@pytest.mark.parametrize("name", FORMATS)
def test_rows_of_bf16_and_rows_apart(name: str) -> None:
    w, wide = weight(name, 16, 40), torch.randn(3, 100)
    want = native.packed_linear(wide[:, 10:50].contiguous(), w, name, 16)
    assert torch.equal(native.packed_linear(wide[:, 10:50], w, name, 16), want)
    columns = wide[:, 10:50].T.contiguous().T
    assert columns.stride(1) != 1 and torch.equal(native.packed_linear(columns, w, name, 16), want)
    half = wide[:, 10:50].bfloat16()
    assert torch.equal(native.packed_linear(half, w, name, 16), native.packed_linear(half.float(), w, name, 16))


def test_the_table_of_ops_takes_it_first() -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert kernels.choose("packed_linear", Call(cpu, torch.bfloat16)).implementation.backend == "native"
    assert native.supports(Call(cuda, torch.float32)) == "the library computes on the CPU"
    assert native.supports(Call(cpu, torch.float16)) == "the library takes fp32 and bf16"
    assert kernels.choose("log_sum_exp", Call(cpu, torch.float32, ((3, 4),))).implementation.backend == "native"
    assert "no gradient" in native.supports_log_sum_exp(Call(cpu, torch.float32, ((3, 4),), needs_grad=True))
    assert "one number or more" in native.supports_log_sum_exp(Call(cpu, torch.float32, ((3, 0),)))


# -- threads -----------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("threads")
def test_the_pool_has_torchs_threads() -> None:
    for count in (3, 1, 2):
        torch.set_num_threads(count)
        native.packed_linear(torch.ones(1, 32), weight("int8", 16, 32), "int8", 16)
        assert native.library().mx_threads() == count


@pytest.mark.usefixtures("threads")
def test_callers_at_once_take_turns() -> None:
    torch.set_num_threads(2)
    w, x_TD = weight("int8", 100, 64), torch.randn(5, 64)
    want, wrong = native.packed_linear(x_TD, w, "int8", 100), []

    def call() -> None:
        wrong.extend(i for i in range(50) if not torch.equal(native.packed_linear(x_TD, w, "int8", 100), want))

    callers = [threading.Thread(target=call) for _ in range(3)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(60)
    assert not wrong and not any(caller.is_alive() for caller in callers)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # forking with threads is what is tried here
@pytest.mark.usefixtures("threads")
def test_a_forked_child_makes_a_pool_of_its_own() -> None:
    torch.set_num_threads(2)
    w, x_TD = weight("int8", 100, 64), torch.randn(5, 64)
    want = native.packed_linear(x_TD, w, "int8", 100)
    if (child := os.fork()) == 0:
        signal.alarm(60)  # one that waits for the parent's threads waits for ever
        os._exit(0 if torch.equal(native.packed_linear(x_TD, w, "int8", 100), want) else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert torch.equal(native.packed_linear(x_TD, w, "int8", 100), want)


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("x", "says"),
    [
        (torch.zeros(2, 32, dtype=torch.float16), "x must be fp32 or bf16 [T, D] on the CPU, not float16 [2, 32]"),
        (torch.zeros(32), "not float32 [32] on cpu"),
        (torch.zeros(2, 32, device="meta"), "on meta"),
        (torch.zeros(2, 65), "weight of 16 x 65: must be uint8"),
    ],
)
def test_inputs_that_cannot_be_read(x: Tensor, says: str) -> None:
    with pytest.raises(UsageError) as error:
        native.packed_linear(x, weight("int8", 16, 32), "int8", 16)
    assert says in str(error.value)


def test_weights_that_cannot_be_read() -> None:
    w = weight("int8", 32, 64)
    for bad in (w[:, ::2], torch.stack([w, w])):
        with pytest.raises(UsageError, match="must be a contiguous matrix on the CPU"):
            native.packed_linear(torch.zeros(1, 32), bad, "int8", 32)


@pytest.mark.parametrize("name", FORMATS)
def test_the_gradient_is_that_of_the_expanded_weight(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dequantise, "_BLOCK_BYTES", 1)  # a block of outputs at a time
    w, x = weight(name, 33, 40), torch.randn(3, 40, requires_grad=True)
    cotangent = torch.randn(3, 33)
    (grad,) = torch.autograd.grad(native.packed_linear(x, w, name, 33), x, cotangent)
    want = cotangent @ dequantise.expand(w, name, 33, 40)
    torch.testing.assert_close(grad, want, rtol=1e-5, atol=1e-5 * float(want.abs().max()))


def test_an_unknown_instruction_set_is_refused() -> None:
    with pytest.raises(UsageError, match="no instruction set 'mmx' in this build or on this processor"):
        native.set_instruction_set("mmx")


def test_no_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reason = native.load(tmp_path)
    assert reason == "the library was not built when this package was installed"
    monkeypatch.setattr(native, "_load", lambda: reason)
    assert native.available() == reason and native.supports(Call(torch.device("cpu"), torch.float32)) == reason
    with pytest.raises(UsageError, match=r"not built when this package was installed; install a C\+\+17 compiler"):
        native.packed_linear(torch.zeros(1, 32), weight("int8", 16, 32), "int8", 16)


def test_a_damaged_library(tmp_path: Path) -> None:
    (tmp_path / "libmixtral.so").write_text("not a library")
    assert "libmixtral.so cannot be loaded" in str(native.load(tmp_path))


def test_a_library_with_other_headers(tmp_path: Path) -> None:
    shutil.copytree(native.FOLDER / "src", tmp_path / "src")
    shutil.copy(native.FOLDER / "libmixtral.so", tmp_path)
    assert not isinstance(native.load(tmp_path), str)
    (tmp_path / "src" / "packed.h").write_text("struct Matrix {};")
    assert "was built with other headers than those beside it" in str(native.load(tmp_path))


def test_the_library_has_the_cores_that_torch_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[int] = []
    monkeypatch.setattr(native, "_load", functools.cache(lambda: Told(told)))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        with pytest.raises(ZeroDivisionError), native.cores_for_library():
            native.library()
            with native.cores_for_library():  # inside, nothing changes
                native.library()
            assert torch.get_num_threads() == 1
            1 / 0  # noqa: B018
        assert torch.get_num_threads() == 2
        torch.set_num_threads(1)
        native.library()
        assert told == [2, 2, 1]
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("order", ["ABab", "ABba", "AaBb", "ABaCbc"])
def test_blocks_that_overlap_leave_torch_its_threads(order: str) -> None:
    """Capital letters enter, small ones leave: two generations whose steps a caller takes in turn."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        blocks = {name: native.cores_for_library() for name in order.upper()}
        for name in order:
            if name.isupper():
                blocks[name].__enter__()
                assert torch.get_num_threads() == 1
            else:
                assert torch.get_num_threads() == 1
                blocks[name.upper()].__exit__(None, None, None)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_blocks_in_two_threads_leave_each_its_threads() -> None:
    """B begins within A and ends after it; torch keeps a number for each thread, and B's starts as A's is just then."""
    before, a_entered, a_left = torch.get_num_threads(), threading.Event(), threading.Event()
    found: list[int] = []

    def other() -> None:
        a_entered.wait(60)
        with native.cores_for_library():
            found.append(native.library().mx_threads())
            b_entered.set()
            a_left.wait(60)
            found.append(native.library().mx_threads())
        found.append(torch.get_num_threads())

    b_entered, thread = threading.Event(), threading.Thread(target=other)
    try:
        torch.set_num_threads(3)
        thread.start()
        with native.cores_for_library():
            a_entered.set()
            b_entered.wait(60)
        found.append(torch.get_num_threads())
        a_left.set()
        thread.join(60)
        assert found == [3, 3, 3, 3]
    finally:
        torch.set_num_threads(before)


class Told(ctypes.CDLL):
    """A library that only notes how many threads it is told to have."""

    def __init__(self, told: list[int]) -> None:
        self.mx_set_threads = lambda threads, _: told.append(threads)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize(("rows", "n"), [(1, 1), (1, 7), (3, 16), (2, 513), (1, 32_000), (5, 2048)])
def test_log_sum_exp(rows: int, n: int) -> None:
    x_RN = 8 * torch.randn(rows, n + 3, generator=torch.Generator().manual_seed(n))[:, :n]
    torch.testing.assert_close(native.log_sum_exp(x_RN), x_RN.double().logsumexp(-1).float(), rtol=1e-6, atol=1e-6)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("place", [0, 5, 18])
def test_log_sum_exp_of_what_is_not_finite(bad: float, place: int) -> None:
    x_RN = torch.zeros(2, 19)
    x_RN[0, place] = bad
    finite = native.log_sum_exp(x_RN).isfinite().tolist()
    assert finite == [False, True]
    x_RN[0, place] = float("-inf")
    torch.testing.assert_close(native.log_sum_exp(x_RN), torch.tensor([18.0, 19.0]).log())


@pytest.mark.parametrize("x", [torch.zeros(3), torch.zeros(1, 0), torch.zeros(1, 2).double()])
def test_log_sum_exp_refuses(x: torch.Tensor) -> None:
    with pytest.raises(UsageError, match="x must be fp32"):
        native.log_sum_exp(x)
