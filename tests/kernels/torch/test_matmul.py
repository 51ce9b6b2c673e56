from __future__ import annotations

import pytest
import torch

from mixtral.kernels.torch import matmul


@pytest.mark.parametrize("fast", [True, False])
def test_only_bf16_on_a_processor_without_it_goes_through_fp32(fast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matmul, "has_fast_bf16", lambda _: fast)
    matmul._upcasts_on.cache_clear()
    try:
        cpu, cuda = torch.device("cpu"), torch.device("cuda")
        assert matmul.upcasts(cpu, torch.bfloat16) == (not fast)
        assert not matmul.upcasts(cpu, torch.float32)
        assert not matmul.upcasts(cuda, torch.bfloat16)
    finally:
        matmul._upcasts_on.cache_clear()


def test_a_product_is_rounded_once(dtype: torch.dtype) -> None:
    """256 + 1 + ... : bf16 sums would stay at 256; sums in fp32 do not."""
    a, b = torch.ones(2, 300, dtype=dtype), torch.ones(300, 3, dtype=dtype)
    want = torch.full((2, 3), 300.0).to(dtype)
    out = torch.empty(2, 3, dtype=dtype)
    matmul.matmul_into(out, a, b)
    assert torch.equal(out, want) and torch.equal(matmul.matmul(a, b), want)
