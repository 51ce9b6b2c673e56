from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mixtral.kernels import reference
from mixtral.kernels.torch import permute
from tests.kernels.compare import compare, run

CHOICES = {
    "no tokens": [],
    "one token": [[1, 0]],
    "all on one expert": [[2], [2], [2], [2]],
    "top 2": [[0, 3], [3, 1], [1, 0], [3, 2], [2, 0]],
    "dropped": [[0, -1], [-1, -1], [3, 0], [0, -1]],
    "top 3": [[2, 1, 0], [0, 1, -1], [1, 2, 0]],
}


def _order_and_place(choice: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Assignments grouped by expert, -1 at the end, by Python's sort: an oracle for the dispatcher's."""
    k = len(choice[0]) if choice else 2
    flat = [e for token in choice for e in token]
    order = sorted(range(len(flat)), key=lambda n: (flat[n] < 0, flat[n]))
    place = [order.index(n) for n in range(len(flat))]
    return torch.tensor(order, dtype=torch.int64), torch.tensor(place, dtype=torch.int64).view(len(choice), k)


@pytest.mark.parametrize("case", CHOICES)
@pytest.mark.parametrize("dim", [1, 7, 16])
def test_gather_rows(case: str, dim: int, dtype: torch.dtype) -> None:
    order, place = _order_and_place(CHOICES[case])
    inputs = [torch.randn(len(place), dim), order, place]
    compare(permute.gather_rows, reference.gather_rows, inputs, dtype)


@pytest.mark.parametrize("case", CHOICES)
@pytest.mark.parametrize("dim", [1, 7, 16])
def test_combine(case: str, dim: int, dtype: torch.dtype) -> None:
    order, place = _order_and_place(CHOICES[case])
    weights = torch.rand(place.shape)
    compare(
        lambda y, w: permute.combine(y, w.float(), order, place),
        lambda y, w: reference.combine(y, w.float(), order, place),
        [torch.randn(len(order), dim), weights],
        dtype,
    )


@pytest.mark.parametrize("case", CHOICES)
@pytest.mark.parametrize("combine", [reference.combine, permute.combine])
def test_combine_is_bit_equal_to_a_loop_over_tokens(case: str, combine: object, dtype: torch.dtype) -> None:
    """Multiply in fp32, add in the order of the choices, round once."""
    order, place = _order_and_place(CHOICES[case])
    y, weights = torch.randn(len(order), 33).to(dtype), torch.rand(place.shape)
    want = torch.zeros(len(place), 33, dtype=dtype)
    for t in range(len(place)):
        total = torch.zeros(33)
        for k in range(place.shape[1]):
            total = total + weights[t, k] * y[place[t, k]].float()
        want[t] = total.to(dtype)
    assert torch.equal(combine(y, weights, order, place), want)  # type: ignore[operator]


def test_combine_refuses_a_second_derivative() -> None:
    order, place = _order_and_place(CHOICES["top 2"])
    y = torch.randn(len(order), 4, requires_grad=True)
    value = permute.combine(y, torch.rand(place.shape), order, place).square().sum()
    (grad,) = torch.autograd.grad(value, y, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_gradients_do_not_depend_on_thread_timing() -> None:
    choice = [[t % 5, (t * 3 + 1) % 5] for t in range(200)]
    order, place = _order_and_place(choice)
    x = torch.randn(200, 64)
    first = run(permute.gather_rows, [x, order, place])
    for _ in range(5):
        again = run(permute.gather_rows, [x, order, place])
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_numerical_gradients_of_gather_rows() -> None:
    order, place = _order_and_place(CHOICES["dropped"])
    x = torch.randn(4, 3).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: permute.gather_rows(x, order, place), (x,))
