"""What this machine is and what it can do: its name, memory allowed to us, and measured ceilings.

Every speed that `mixtral` reports is a fraction of a ceiling measured here, on the same machine and in the same minute.
"""

from __future__ import annotations

import functools
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from mixtral.cores import cpu_count
from mixtral.system import available_memory_bytes

MEASURE_SECONDS = 0.6  # one measurement starts no new round after this long


def free_memory_bytes(device: torch.device) -> int:
    """Bytes that can still be allocated on a device."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else available_memory_bytes()


def used_memory_bytes(device: torch.device | str) -> int:
    """What this process takes: memory resident now, or on a GPU the most that tensors have taken so far.

    Where the system does not tell what is resident now (macOS), the most that has been.
    """
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        import resource  # not on Windows

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else 1024 * peak


def hardware_name(device: torch.device | str = "cpu") -> str:
    """For instance "AMD EPYC, 2 cores, AVX2" or "NVIDIA H100 80GB HBM3"."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cores = cpu_count()
    return f"{_cpu_model()}, {cores} core{'s' if cores > 1 else ''}, {torch.backends.cpu.get_cpu_capability()}"


def has_fast_bf16(device: torch.device | str) -> bool:
    """Whether bf16 matrix products are done in hardware rather than emulated at a fraction of the fp32 rate.

    CPU: AVX-512 BF16 or AMX. ARM has bf16 instructions too, but torch cannot be asked about them: not counted.
    CUDA: compute capability 8 (Ampere) or later.
    """
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device)[0] >= 8
    # cpuinfo lists AMX when the processor has it; torch's question also asks the kernel's permission to use it
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def measure_bandwidth(device: torch.device | str) -> float:
    """Bytes a second of reading memory with all of torch's threads, best of many rounds; about a second at most.

    The buffer is far larger than any cache: 256 MiB, 2 GiB on a GPU, or less where memory is short. It is read by a
    matrix-vector product, the work that decoding does, and faster than torch's reductions at it (23 against 17 GB/s).
    """
    device = torch.device(device)
    columns = 16384
    n_bytes = 2 * 2**30 if device.type == "cuda" else min(256 * 2**20, available_memory_bytes() // 8)
    rows = max(8, n_bytes // (4 * columns))
    matrix, vector = torch.ones(rows, columns, device=device), torch.ones(columns, device=device)
    return 4 * matrix.numel() / _best_seconds(functools.partial(torch.mv, matrix, vector), device, MEASURE_SECONDS)


def measure_matmul(dtype: torch.dtype, device: torch.device | str) -> float:
    """FLOP/s of the best square matrix product in `dtype` with all of torch's threads; about a second at most.

    Sizes double from 512 to 8192 for as long as the next one is sure to end in time: a fast machine needs a large
    product to show its rate, a slow one would spend minutes on it. The last size gets all the time that is left, as
    one undisturbed round among many is enough on a machine shared with others.
    """
    device = torch.device(device)
    size, ends = 512, time.perf_counter() + MEASURE_SECONDS
    while True:
        left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        product = functools.partial(torch.mm, left, right)
        seconds = _best_seconds(product, device, MEASURE_SECONDS / 10)
        remaining = ends - time.perf_counter()
        if size == 8192 or 4 * 8 * seconds > remaining:  # 8 times the work; a warm-up round, two more, and some slack
            return 2 * size**3 / min(seconds, _best_seconds(product, device, remaining))
        size *= 2


def _best_seconds(run: Callable[[], torch.Tensor], device: torch.device, budget: float) -> float:
    """Seconds of the fastest run: one goes first to warm up, then two or more until `budget` seconds are spent."""
    times: list[float] = []
    ends = time.perf_counter() + budget
    run()
    _wait(device)
    while len(times) < 2 or time.perf_counter() < ends:
        started = time.perf_counter()
        run()
        _wait(device)
        times.append(time.perf_counter() - started)
    return min(times)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# -- what Linux reports ------------------------------------------------------------------------------------------------


def _cpu_model() -> str:
    """The processor's name; where the system does not tell (many ARM machines), its architecture."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:  # not Linux: macOS has a command instead
        try:
            command = ["sysctl", "-n", "machdep.cpu.brand_string"]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            pass
    return platform.machine()
