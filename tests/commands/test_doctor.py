from __future__ import annotations

import json
import tomllib
from pathlib import Path

import pytest
import torch

from mixtral import hardware, kernels
from mixtral.commands import doctor
from mixtral.kernels.native import library as native
from tests.commands.conftest import Run


@pytest.fixture(autouse=True)
def _no_measuring(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measuring is tested with hardware.py and takes seconds."""
    monkeypatch.setattr(hardware, "measure_bandwidth", lambda _: 45.2e9)
    monkeypatch.setattr(hardware, "measure_matmul", lambda *_: 1.05e12)


def test_every_op_has_a_backend_and_a_reason(run: Run) -> None:
    told = json.loads(run("doctor", "--json").out)
    assert sorted(told["ops"]) == kernels.ops()
    for op, by_dtype in told["ops"].items():
        assert set(by_dtype) == {"float32", "bfloat16"}
        for choice in by_dtype.values():
            assert choice["backend"] in kernels.backends(op) and choice["reason"]


def test_device_and_rates(run: Run) -> None:
    told = json.loads(run("doctor", "--json").out)
    assert told["device"] in ("cpu", "cuda") and told["dtype"] in ("float32", "bfloat16") and told["dtype_reason"]
    assert told["bandwidth_bytes_per_second"] == 45.2e9
    assert told["matmul_flops_per_second"] == {"float32": 1.05e12, "bfloat16": 1.05e12}
    assert told["environment"]["threads"] >= 1 and told["memory_bytes"] > 0


def test_for_people(run: Run) -> None:
    out = run("doctor").out
    for wanted in ("45.2 GB/s", "1.05 TFLOP/s in float32", "experts_decode", "torch 2.", "default dtype"):
        assert wanted in out
    assert max(map(len, out.splitlines())) <= 80


def test_a_reason_of_the_other_dtype_is_told_too(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    names = {"float32": "plain", "bfloat16": "special"}
    monkeypatch.setattr(doctor, "_kernel", lambda op, _, dtype: {
        "backend": "torch", "reason": f"{op} is {names[str(dtype).removeprefix('torch.')]}"})  # fmt: skip
    out = " ".join(run("doctor").out.split())
    assert "swiglu is plain; bfloat16: swiglu is special" in out or "swiglu is special; float32: swiglu is plain" in out


def test_a_missing_extra_comes_with_its_line_to_install(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "EXTRAS", {"plots": ("surely-not-installed",), "own": ("torch",)})
    out = run("doctor").out
    assert 'pip install "mixtral[plots]" adds surely-not-installed' in out
    assert "mixtral[own]" not in out


def test_the_extras_are_the_packages() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    bare = {extra: tuple(r.split(">")[0] for r in wanted) for extra, wanted in project["optional-dependencies"].items()}
    assert bare == doctor.EXTRAS
    assert tuple(r.split(">")[0] for r in project["dependencies"]) == doctor.CORE


def test_the_native_library_is_told(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "available", lambda: "")
    monkeypatch.setattr(native, "instruction_set", lambda: "avx512")
    told = json.loads(run("doctor", "--json").out)["native"]
    assert told["available"] and told["instruction_set"] == "avx512" and "native step" in told["generates"]
    assert "instruction set avx512" in run("doctor").out


def test_a_missing_native_library_comes_with_its_cost_and_remedy(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "available", lambda: "was not built")
    told = json.loads(run("doctor", "--json").out)["native"]
    assert told["reason"] == "was not built" and not told["available"]
    out = " ".join(run("doctor").out.split())
    for wanted in ("missing was not built", "cost products with packed weights", "remedy install a C++17 compiler"):
        assert wanted in out


def test_gpus_are_listed(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"Card {index}")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (70 * 2**30, 80 * 2**30))
    out = run("doctor").out
    assert "Card 0, 70.00 GiB of 80.00 GiB free" in out and "Card 1" in out
