from __future__ import annotations

import pytest
import torch

from mixtral import kernels
from mixtral.kernels import packing
from mixtral.kernels.torch.dequantise import expand


def random_packed(name: str, n: int, d: int) -> torch.Tensor:
    g = torch.Generator().manual_seed(n * d)
    if name in packing.DTYPES:
        return packing.pack(torch.randn(n, d, generator=g).to(packing.DTYPES[name]), name)
    most = {"int8": 127, "int4": 7}[name]
    scale_NG = torch.rand(n, -(-d // 32), generator=g) + 0.5
    return packing.pack(torch.randint(-most, most + 1, (n, d), generator=g).to(torch.int8), name, scale_NG)


@pytest.mark.parametrize("name", packing.GROUP_BYTES)
@pytest.mark.parametrize(("t", "n", "d"), [(0, 16, 32), (1, 1, 1), (3, 17, 33), (5, 48, 160)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_the_oracle_but_for_the_order_of_sums(name: str, t: int, n: int, d: int, dtype: torch.dtype) -> None:
    x_TD = torch.randn(t, d, generator=torch.Generator().manual_seed(t)).to(dtype)
    x_TD[:1] = 0
    weight = random_packed(name, n, d)
    got, want = (_call(backend, x_TD, weight, name, n) for backend in ("torch", "reference"))
    assert got.shape == (t, n) and got.dtype == torch.float32
    assert torch.allclose(got, want, rtol=1e-5, atol=1e-5 * float(want.abs().amax() if t else 0))


def _call(backend: str, x_TD: torch.Tensor, weight: torch.Tensor, name: str, n: int) -> torch.Tensor:
    with kernels.use_backend(backend):
        return kernels.packed_linear(x_TD, weight, name, n)


def test_stacks_expand_matrix_by_matrix() -> None:
    stack = torch.stack([random_packed("int4", 5, 40), random_packed("int4", 5, 40) ^ 1])
    assert torch.equal(expand(stack, "int4", 5, 40)[1], expand(stack[1], "int4", 5, 40))
