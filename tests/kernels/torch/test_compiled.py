from __future__ import annotations

import shutil

import pytest
import torch

from mixtral import kernels
from mixtral.errors import UsageError
from mixtral.kernels import reference
from mixtral.kernels.torch import compiled
from tests.kernels.compare import compare

INPUTS = {
    "rms_norm": [torch.randn(5, 16), torch.randn(16), 1e-5],
    "rotary": [torch.randn(5, 2, 8), torch.randn(5, 4), torch.randn(5, 4)],
    "experts": [torch.randn(9, 16), torch.tensor([5, 0, 3]), torch.randn(3, 2, 8, 16) / 4, torch.randn(3, 16, 8) / 4],
}


@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
@pytest.mark.parametrize("op", INPUTS)
def test_compiled_ops_are_the_references(op: str) -> None:
    compare(getattr(compiled, op), getattr(reference, op), INPUTS[op])


def test_compiled_is_used_only_when_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    assert kernels.choose("rms_norm", cpu, torch.float32).implementation.backend == "torch"
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert "no-such-compiler is not installed" in compiled.supports(cpu, torch.float32)
    kernels.table._CHOSEN.clear()
    with kernels.use_backend("compiled"), pytest.raises(UsageError, match="needs a C\\+\\+ compiler"):
        kernels.choose("experts", cpu, torch.float32)
