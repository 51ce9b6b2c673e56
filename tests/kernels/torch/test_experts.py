from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mixtral.kernels import reference
from mixtral.kernels.torch import experts as stacked
from tests.kernels.compare import assert_close, compare, run

# rows of each expert, then rows past the last run
COUNTS = {
    "no rows": ([0, 0, 0], 0),
    "one row": ([0, 1, 0], 0),
    "all on the first": ([9, 0, 0, 0], 0),
    "all on the last": ([0, 0, 0, 9], 0),
    "uneven with an empty one": ([3, 0, 5, 1], 0),
    "rows past the last run": ([2, 4, 0], 3),
    "only rows past the last run": ([0, 0], 4),
    "one expert": ([5], 0),
    "one expert, rows past its run": ([5], 2),
}


def _inputs(counts: list[int], past: int, dim: int = 13, ffn: int = 7) -> list[Tensor]:
    n = len(counts)
    rows = torch.randn(sum(counts) + past, dim)
    return [rows, torch.tensor(counts), torch.randn(n, 2, ffn, dim) / 4, torch.randn(n, dim, ffn) / 4]


@pytest.mark.parametrize("case", COUNTS)
def test_loop(case: str, dtype: torch.dtype) -> None:
    compare(stacked.experts_loop, reference.experts, _inputs(*COUNTS[case]), dtype)


@pytest.mark.parametrize("case", COUNTS)
@pytest.mark.parametrize("grouped_dtype", [torch.float32, torch.bfloat16])
def test_grouped(case: str, grouped_dtype: torch.dtype) -> None:
    """Widths are multiples of 16 bytes, as the GEMM asks for; models' widths are."""
    compare(stacked.experts_grouped, reference.experts, _inputs(*COUNTS[case], dim=16, ffn=24), grouped_dtype)


@pytest.mark.parametrize("experts", [reference.experts, stacked.experts_loop, stacked.experts_grouped])
def test_an_expert_without_rows_has_zero_gradients(experts: object) -> None:
    """Zeros, not None: an optimiser and a collective must see every expert (DeepSpeed 4808, transformers 39275)."""
    _, _, grad_w13, grad_w2 = run(experts, _inputs([3, 0, 2], 1, dim=16, ffn=8))  # type: ignore[arg-type]
    for grad in (grad_w13, grad_w2):
        assert torch.equal(grad[1], torch.zeros_like(grad[1]))
        assert grad[0].abs().sum() > 0 and grad[2].abs().sum() > 0


@pytest.mark.parametrize("experts", [stacked.experts_loop, stacked.experts_grouped])
def test_rows_past_the_last_run_neither_give_nor_take(experts: object) -> None:
    """Not even when they hold NaN, as memory that nobody wrote may."""
    rows, counts, w13, w2 = _inputs([2, 3], 4, dim=16, ffn=8)
    rows[5:] = float("nan")
    out, grad_rows, grad_w13, grad_w2 = run(experts, [rows, counts, w13, w2])  # type: ignore[arg-type]
    assert torch.equal(out[5:], torch.zeros(4, 16)) and torch.equal(grad_rows[5:], torch.zeros(4, 16))
    assert all(t.isfinite().all() for t in (out, grad_rows, grad_w13, grad_w2))


@pytest.mark.parametrize("wanted", [0, 2, 3])
def test_loop_gives_only_the_gradient_asked_for(wanted: int) -> None:
    inputs = _inputs([3, 0, 5, 1], 2)
    want = run(reference.experts, inputs)[1 + [0, 2, 3].index(wanted)]
    inputs[wanted].requires_grad_()
    cotangent = torch.randn(inputs[0].shape, generator=torch.Generator().manual_seed(7))
    stacked.experts_loop(*inputs).backward(cotangent)
    assert [i.grad is not None for i in inputs] == [i == wanted for i in range(4)]
    assert_close(inputs[wanted].grad, want, 1e-5)


def test_loop_takes_gradients_and_rows_of_any_stride() -> None:
    rows, counts, w13, w2 = _inputs([3, 4], 0)
    rows_strided = rows.repeat(1, 2)[:, :13].detach().requires_grad_()
    stacked.experts_loop(rows_strided, counts, w13, w2).sum().backward()  # sum's gradient has stride 0
    want = torch.autograd.grad(reference.experts(leaf := rows.clone().requires_grad_(), counts, w13, w2).sum(), leaf)[0]
    assert_close(rows_strided.grad, want, 1e-5)


def test_loop_numerical_gradients() -> None:
    rows, counts, w13, w2 = _inputs([2, 0, 1], 1, dim=3, ffn=2)
    rows, w13, w2 = (t.double().requires_grad_() for t in (rows, w13, w2))
    assert torch.autograd.gradcheck(stacked.experts_loop, (rows, counts, w13, w2))


def test_loop_refuses_a_second_derivative() -> None:
    """Its backward is written by hand: a derivative of that would lack terms, silently."""
    rows, counts, w13, w2 = _inputs([2, 1], 0)
    rows.requires_grad_()
    (grad,) = torch.autograd.grad(stacked.experts_loop(rows, counts, w13, w2).square().sum(), rows, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize(
    "choice",
    [[[0, 1]], [[2, -1], [1, 0]], [[-1, -1], [3, 2], [3, -1]], [[1], [1], [1]], []],
    ids=["one token", "a place unused", "a token without experts", "one expert", "no tokens"],
)  # fmt: skip
def test_decode(choice: list[list[int]], dtype: torch.dtype) -> None:
    experts = torch.tensor(choice, dtype=torch.int64).reshape(len(choice), -1 if choice else 2)
    weights = torch.rand(experts.shape).masked_fill(experts < 0, 0.0)
    x, w13, w2 = (torch.randn(s).to(dtype) for s in ((len(choice), 13), (4, 2, 7, 13), (4, 13, 7)))
    got = stacked.experts_decode(x, weights, experts, w13, w2)
    want = reference.experts_decode(x.float(), weights, experts, w13.float(), w2.float())
    assert got.dtype == dtype
    assert_close(got, want, 1e-5 if dtype == torch.float32 else 2**-6)
