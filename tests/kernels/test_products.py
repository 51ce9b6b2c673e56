from __future__ import annotations

import pytest
import torch

from mixtral import kernels
from mixtral.kernels import products, reference
from tests.kernels import compare


@pytest.mark.parametrize("fast", [True, False])
def test_only_bf16_on_a_processor_without_it_goes_through_fp32(fast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "has_fast_bf16", lambda _: fast)
    products._upcasts_on.cache_clear()
    try:
        cpu, cuda = torch.device("cpu"), torch.device("cuda")
        assert products.upcasts(cpu, torch.bfloat16) == (not fast)
        assert not products.upcasts(cpu, torch.float32)
        assert not products.upcasts(cuda, torch.bfloat16)
    finally:
        products._upcasts_on.cache_clear()


def test_a_product_is_rounded_once(dtype: torch.dtype) -> None:
    """256 + 1 + ... : bf16 sums would stay at 256; sums in fp32 do not."""
    a, b = torch.ones(2, 300, dtype=dtype), torch.ones(300, 3, dtype=dtype)
    want = torch.full((2, 3), 300.0).to(dtype)
    out = torch.empty(2, 3, dtype=dtype)
    products.matmul_into(out, a, b)
    assert torch.equal(out, want) and torch.equal(products.matmul(a, b), want)


@pytest.fixture
def numpy_takes_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "LARGE", 0)
    monkeypatch.setattr(products, "numpy_multiplies_faster", lambda: True)


@pytest.mark.usefixtures("numpy_takes_all")
def test_numpys_products_are_torchs() -> None:
    a, b = torch.randn(5, 7, dtype=torch.float32), torch.randn(9, 7)
    out_whole = torch.full((6, 11), 5.0)
    products.matmul_into(out_whole[:5, 1:10], a, b.T)
    torch.testing.assert_close(out_whole[:5, 1:10], a.double() @ b.double().T, check_dtype=False)
    assert (out_whole[5] == 5).all() and (out_whole[:, 0] == 5).all() and (out_whole[:, 10] == 5).all()
    torch.testing.assert_close(products.matmul(b.T, b), b.T @ b)


@pytest.mark.usefixtures("numpy_takes_all")
@pytest.mark.parametrize("op", ["linear", "swiglu", "cross_entropy", "experts"])
def test_gradients_through_numpys_products(op: str) -> None:
    torch.manual_seed(0)
    inputs = {
        "linear": (torch.randn(5, 8), torch.randn(6, 8)),
        "swiglu": (torch.randn(5, 8), torch.randn(2, 4, 8), torch.randn(8, 4)),
        "cross_entropy": (torch.randn(5, 8), torch.randn(6, 8), torch.tensor([1, 0, -100, 5, 2])),
        "experts": (torch.randn(5, 8), torch.tensor([2, 0, 3]), torch.randn(3, 2, 4, 8), torch.randn(3, 8, 4)),
    }[op]
    compare.compare(getattr(kernels, op), getattr(reference, op), list(inputs))


def test_small_products_and_other_dtypes_stay_with_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "numpy_multiplies_faster", lambda: True)
    large = torch.empty(1024, 1024)
    assert products.by_numpy(large, large) and not products.by_numpy(large[:1], large)
    assert not products.by_numpy(large.double(), large.double())
    assert not products.by_numpy(large.to("meta"), large.to("meta"))
