from __future__ import annotations

import mmap
from pathlib import Path

import pytest
import torch

from mixtral import hardware
from mixtral.cores import cpu_count


def test_memory_in_use_grows_with_what_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    before = hardware.used_memory_bytes("cpu")
    held = mmap.mmap(-1, 64 * 2**20)  # fresh pages for sure; an allocator may have some left
    for begin in range(0, len(held), 4096):
        held[begin] = 1
    assert before + 60 * 2**20 < hardware.used_memory_bytes("cpu") < before + 80 * 2**20

    def missing(path: Path) -> str:
        raise FileNotFoundError(path)

    monkeypatch.setattr(Path, "read_text", missing)
    assert hardware.used_memory_bytes("cpu") > 64 * 2**20  # the most that has been


def test_fast_bf16_follows_the_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    for avx512, amx in ((False, False), (True, False), (False, True)):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda x=avx512: x)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda x=amx: x)
        assert hardware.has_fast_bf16("cpu") is (avx512 or amx)
    for capability, fast in (((7, 5), False), ((8, 0), True), ((9, 0), True)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, c=capability: c)
        assert hardware.has_fast_bf16("cuda") is fast


def test_name_tells_cores_and_instructions() -> None:
    name = hardware.hardware_name()
    assert f"{cpu_count()} core" in name and name.endswith(torch.backends.cpu.get_cpu_capability())


def test_ceilings_are_at_least_what_a_plain_run_reaches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "MEASURE_SECONDS", 0.1)
    assert 1e8 < hardware.measure_bandwidth("cpu") < 1e13
    assert 1e8 < hardware.measure_matmul(torch.float32, "cpu") < 1e15
