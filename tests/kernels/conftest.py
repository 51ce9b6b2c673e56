from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from mixtral.kernels.native import library as native
from mixtral.kernels.torch import matmul
from tests.kernels.native_oracle import usable


@pytest.fixture(params=["fp32", "bf16", "bf16 through fp32"])
def dtype(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.dtype:
    """Each dtype, and both paths of bf16, whichever of them this processor would take."""
    monkeypatch.setattr(matmul, "_upcasts_on", lambda _: "through" in request.param)
    return torch.float32 if request.param == "fp32" else torch.bfloat16


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=usable())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each instruction set that this machine has, set for the test."""
    native.set_instruction_set(request.param)
    yield request.param
    native.set_instruction_set(None)
