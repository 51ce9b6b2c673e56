"""The C++ library of kernels/native: found, loaded when first used, called through ctypes, which releases the GIL.

setup.py builds it at installation; where that failed, `available` says why, and everything runs on torch.

Legend: T rows, D inputs, N outputs.
"""

from __future__ import annotations

import ctypes
import functools
import statistics
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from mixtral.cores import cpu_count
from mixtral.errors import UsageError
from mixtral.kernels.packing import LANES, check_packed
from mixtral.kernels.table import Call
from mixtral.kernels.torch.dequantise import with_gradient
from mixtral.native_file import FOLDER, load

REMEDY = "install a C++17 compiler (g++ or clang++), then run `make native` in a checkout, or reinstall the package"
SPIN_MICROSECONDS = 50  # spin time before a worker of the pool sleeps; none where threads outnumber cores


class _Blocks:
    """The blocks of cores_for_library that are running in the whole process."""

    count = 0
    threads: int | None = None  # of the library inside them; None: as many as torch has


_blocks, _lock = _Blocks(), threading.Lock()
_mine = threading.local()  # .blocks: those running in this thread

FORMATS = {"bf16": 0, "int8": 1, "int4": 2, "fp32": 3, "fp16": 4}  # enum Format of native/packed.h


class Matrix(ctypes.Structure):
    """struct Matrix of native/packed.h."""

    _fields_ = (("data", ctypes.c_void_p), ("format", ctypes.c_int32), ("n", ctypes.c_int32), ("d", ctypes.c_int32))


def available() -> str:
    """"" when the library can be used, else the reason why not."""
    return "" if isinstance(_load(), ctypes.CDLL) else str(_load())


def supports(call: Call) -> str:
    """For the table of ops: "" or why not."""
    if call.device.type != "cpu":
        return "the library computes on the CPU"
    return available() if call.dtype in (torch.float32, torch.bfloat16) else "the library takes fp32 and bf16"


def supports_log_sum_exp(call: Call) -> str:
    """For the table of ops: "" or why not."""
    if call.needs_grad:
        return "the library has no gradient for it"
    if call.dtype != torch.float32 or (call.shapes and (len(call.shapes[0]) != 2 or not call.shapes[0][1])):
        return "the library takes fp32 rows of one number or more"
    return supports(call)


def library() -> ctypes.CDLL:
    """The library, its pool as many threads as torch has (`cores_for_library`). UsageError where there is none."""
    loaded = _load()
    if not isinstance(loaded, ctypes.CDLL):
        raise UsageError(f"native kernels: {loaded}; {REMEDY}")
    threads = _blocks.threads or torch.get_num_threads()
    loaded.mx_set_threads(threads, SPIN_MICROSECONDS if threads <= _cores() else 0)
    return loaded


@contextmanager
def cores_for_library() -> Iterator[None]:
    """While the block runs, torch computes on one thread, and the library on as many as torch had.

    For loops of native calls with small ops of torch between them: after every op that it spreads, torch's OpenMP
    threads may spin for a while and keep the cores from the library's pool (docs/log.md, 2026-11-22).

    Blocks may overlap, in one thread or in several: each thread has torch's number back when its last block ends.
    """
    with _lock:  # torch keeps a number for each thread, and one for threads that are yet to use it
        _blocks.threads = _blocks.threads or torch.get_num_threads()
        _blocks.count += 1
        threads = _blocks.threads
    _mine.blocks = getattr(_mine, "blocks", 0) + 1
    torch.set_num_threads(1)
    try:
        yield
    finally:
        _mine.blocks -= 1
        with _lock:
            _blocks.count -= 1
            if not _mine.blocks:
                torch.set_num_threads(threads)
            if not _blocks.count:
                _blocks.threads = None


def instruction_set() -> str:
    """What the library uses of the processor: "portable", "avx2" or "avx512"."""
    return str(library().mx_isa().decode())


def set_instruction_set(name: str | None) -> None:
    """Use another instruction set, for tests; None: the best one. Raises UsageError for one that cannot be used."""
    if library().mx_set_isa(None if name is None else name.encode()):
        raise UsageError(f"native kernels: no instruction set {name!r} in this build or on this processor")


def packed_linear(x_TD: Tensor, packed: Tensor, name: str, n: int) -> Tensor:
    """x W^T -> fp32 [T, n], as packed.packed_linear defines it: equal bits for int8 and int4, and for bf16 too but for
    AVX-512's, which takes numbers below 2^-126 for zero.

    Its gradient is that of the product with the expanded weight, as if inputs were not rounded; the weight has none.
    Raises UsageError for inputs that the library cannot read.
    """
    if x_TD.dim() != 2 or x_TD.device.type != "cpu" or x_TD.dtype not in (torch.float32, torch.bfloat16):
        raise UsageError(f"native product: x must be fp32 or bf16 [T, D] on the CPU, not {_described(x_TD)}")
    if packed.dim() != 2 or packed.device.type != "cpu" or not packed.is_contiguous():
        raise UsageError(f"native product: the weight must be a contiguous matrix on the CPU, not {_described(packed)}")
    check_packed(packed, name, n, x_TD.shape[1])
    return with_gradient(_packed_linear, x_TD, packed, name, n)


def _packed_linear(x_TD: Tensor, packed: Tensor, name: str, n: int) -> Tensor:
    blocks = packed.shape[0]
    out = torch.empty(len(x_TD), blocks * LANES)
    if out.numel():
        x_TD = x_TD.float()
        x_TD = x_TD if x_TD.stride(1) == 1 else x_TD.contiguous()
        weight = Matrix(packed.data_ptr(), FORMATS[name], n, x_TD.shape[1])
        _linear(weight, x_TD, out)
    return out if blocks * LANES == n else out[:, :n].contiguous()


def _linear(weight: Matrix, x_TD: Tensor, out: Tensor) -> None:
    rows = len(x_TD)
    failed = library().mx_linear(
        ctypes.byref(weight), ctypes.c_void_p(x_TD.data_ptr()), ctypes.c_int64(x_TD.stride(0)), rows,
        ctypes.c_void_p(out.data_ptr()), ctypes.c_int64(out.stride(0)),
    )  # fmt: skip
    if failed:
        raise MemoryError(f"native product: no memory for {rows} rounded rows of {x_TD.shape[1]} inputs")


def log_sum_exp(x_RN: Tensor) -> Tensor:
    """log of the sum of e^x along each row, fp32 [R, N] on the CPU -> fp32 [R], in a fraction of torch's time.

    Not finite when some number of the row is NaN or +infinity. UsageError for other tensors, and rows without a number.
    """
    if x_RN.dim() != 2 or x_RN.device.type != "cpu" or x_RN.dtype != torch.float32 or not x_RN.shape[1]:
        raise UsageError(f"native log_sum_exp: x must be fp32 [R, N] on the CPU, N at least 1, not {_described(x_RN)}")
    x_RN = x_RN if x_RN.stride(1) == 1 else x_RN.contiguous()
    rows, n = x_RN.shape
    out = torch.empty(rows)
    if rows:
        library().mx_log_sum_exp(ctypes.c_void_p(x_RN.data_ptr()), rows, n,
                                 ctypes.c_int64(x_RN.stride(0)), ctypes.c_void_p(out.data_ptr()))  # fmt: skip
    return out


def read_sum(words: Tensor) -> int:
    """The sum modulo 2^64 of contiguous int64 numbers, read by all threads: memory read and nothing else."""
    assert words.dtype == torch.int64 and words.is_contiguous() and words.device.type == "cpu"
    return int(library().mx_read(ctypes.c_void_p(words.data_ptr()), ctypes.c_int64(words.numel())))


def measure_read(n_bytes: int = 1 << 30, seconds: float = 0.5) -> float:
    """Bytes a second at which all threads of the library read memory: the ceiling of decoding.

    The median of passes over a buffer of `n_bytes`, which is to be much larger than the caches; there are three or
    more, until `seconds` are over. UsageError where there is no library.
    """
    words = torch.ones(n_bytes // 8, dtype=torch.int64)
    times: list[float] = []
    while len(times) < 3 or sum(times) < seconds:
        started = time.perf_counter()
        read_sum(words)
        times.append(time.perf_counter() - started)
    return 8 * len(words) / statistics.median(times)


def _described(tensor: Tensor) -> str:
    laid = "" if tensor.is_contiguous() else ", not contiguous"
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)} on {tensor.device}{laid}"


@functools.cache
def _cores() -> int:
    return cpu_count()


@functools.cache
def _load() -> ctypes.CDLL | str:
    """The library, or why there is none."""
    return load(FOLDER)
