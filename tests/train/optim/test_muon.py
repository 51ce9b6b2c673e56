"""Muon against its definition, written with singular value decompositions and plain loops.

Legend: B matrices of a stack, M rows, N columns.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from mixtral.train.optim.muon import Muon, orthogonalise
from mixtral.train.optim.optimizer import Optimizer
from tests.train.tiny_run import fresh_model, train_config

STEPS = 5
SHAPES = [(24, 24), (40, 16), (16, 40), (1, 9), (9, 1), (1, 1)]


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _quintic(matrix_MN: Tensor) -> Tensor:
    """Newton-Schulz by its effect on singular values: each step s <- a s + b s^3 + c s^5, from s / the norm of all."""
    u, s, v = torch.linalg.svd(matrix_MN, full_matrices=False)
    s = s / s.norm()
    for _ in range(STEPS):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return u @ torch.diag(s) @ v


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_orthogonalise_keeps_singular_vectors_and_moves_singular_values(shape: tuple[int, int]) -> None:
    for seed, scale in ((0, 1.0), (1, 1e-6), (2, 1e6)):
        matrix_MN = scale * _random(*shape, seed=seed)
        (found,) = orthogonalise(matrix_MN[None])
        torch.testing.assert_close(found, _quintic(matrix_MN), rtol=0, atol=1e-9)


@pytest.mark.parametrize("scale", [1e-30, 1e-18, 1e-7, 1.0, 1e7, 1e18, 1e30])
def test_in_fp32_the_scale_of_a_matrix_does_not_matter(scale: float) -> None:
    """Nor that of another in the same stack: squares of 1e20 overflow in fp32, those of 1e-23 vanish."""
    matrix_MN = scale * _random(24, 16)
    found, other = orthogonalise(torch.stack([matrix_MN, _random(24, 16, seed=1)]).float())
    torch.testing.assert_close(found, _quintic(matrix_MN).float(), rtol=0, atol=1e-5)
    torch.testing.assert_close(other, _quintic(_random(24, 16, seed=1)).float(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("shape", [(24, 24), (40, 16), (16, 40), (9, 1)], ids=str)
def test_singular_values_end_in_the_stated_range(shape: tuple[int, int]) -> None:
    """U V^T, but for factors of 0.68 to 1.21."""
    u, s, v = torch.linalg.svd(_random(*shape), full_matrices=False)
    s = torch.logspace(-2, 0, len(s), dtype=s.dtype)  # a hundredth of the largest is a 250th of the norm here
    (found,) = orthogonalise((u @ torch.diag(s) @ v)[None])
    across = u.T @ found @ v.T  # diagonal: the same singular vectors, in the same pairs and with the same signs
    assert (across - across.diag().diag()).abs().max() < 1e-9
    assert across.diag().min() > 0.68 and across.diag().max() < 1.21


def test_the_products_are_on_the_short_side() -> None:
    """A tall matrix and its transpose cost the same: [16, 16] products, never [40, 40]."""
    flops = []
    for shape in ((40, 16), (16, 40)):
        with FlopCounterMode(display=False) as counter:
            orthogonalise(_random(1, *shape))
        flops.append(counter.get_total_flops())
    assert flops[0] == flops[1] == STEPS * 2 * (2 * 16 * 16 * 40 + 16**3)


def test_a_transposed_matrix_gives_the_transposed_result() -> None:
    matrices_BMN = _random(2, 12, 7)
    torch.testing.assert_close(orthogonalise(matrices_BMN.mT), orthogonalise(matrices_BMN).mT)


def test_a_zero_matrix_stays_zero_and_fp32_does_too() -> None:
    found = orthogonalise(torch.stack([torch.zeros(5, 3), _random(5, 3).float()]))
    assert found.dtype == torch.float32 and not found[0].any() and found.isfinite().all() and found[1].any()


def _plain_loop(weight: Tensor, grads: list[Tensor], lr: float, decay: float, momentum: float) -> Tensor:
    """One matrix, step by step, as the optimiser's definition says."""
    average = torch.zeros_like(weight)
    for grad in grads:
        average = momentum * average + (1 - momentum) * grad
        ahead = momentum * average + (1 - momentum) * grad  # Nesterov: as if it came once more
        scale = 0.2 * max(weight.shape) ** 0.5
        weight = weight - lr * decay * weight - lr * scale * _quintic(ahead)
    return weight


def _run(weight: Tensor, grads: list[Tensor], **options: float) -> Tensor:
    parameter = torch.nn.Parameter(weight.clone())
    optimizer = Muon([parameter], **options)  # type: ignore[arg-type]
    for grad in grads:
        parameter.grad = grad.clone()
        optimizer.step()
        assert torch.equal(parameter.grad, grad), "a gradient is read, not written"
    return parameter.detach()


@pytest.mark.parametrize("shape", SHAPES[:3], ids=str)
@pytest.mark.parametrize("decay", [0.0, 0.3])
@pytest.mark.parametrize("momentum", [0.95, 0.5])
def test_three_steps_of_a_matrix(shape: tuple[int, int], decay: float, momentum: float) -> None:
    weight, grads = _random(*shape, seed=9), [_random(*shape, seed=seed) * 10**seed for seed in range(3)]
    found = _run(weight, grads, lr=0.05, weight_decay=decay, momentum=momentum)
    torch.testing.assert_close(found, _plain_loop(weight, grads, 0.05, decay, momentum), rtol=1e-9, atol=1e-9)


def test_the_momentum_is_0_95_unless_given() -> None:
    weight, grads = _random(6, 4), [_random(6, 4, seed=seed) for seed in range(2)]
    found = _run(weight, grads, lr=0.1, weight_decay=0.0)
    torch.testing.assert_close(found, _plain_loop(weight, grads, 0.1, 0.0, 0.95), rtol=1e-9, atol=1e-9)


def test_an_update_has_the_root_mean_square_of_adamw_s() -> None:
    """0.2 sqrt(max(M, N)) times a matrix of min(M, N) singular values near 1 has a root mean square near 0.2."""
    for shape in SHAPES[:3]:
        moved = _run(torch.zeros(*shape, dtype=torch.float64), [_random(*shape)], lr=1.0, weight_decay=0.0)
        assert 0.2 * 0.7 < float(moved.square().mean().sqrt()) < 0.2 * 1.2


@pytest.mark.parametrize("stack", [(3,), (2, 2)], ids=str)
def test_a_stack_equals_its_matrices(stack: tuple[int, ...]) -> None:
    weight, grads = _random(*stack, 10, 6, seed=9), [_random(*stack, 10, 6, seed=seed) for seed in range(3)]
    grads[1].view(-1, 10, 6)[0] = 0  # as of an expert without tokens
    found = _run(weight, grads, lr=0.05, weight_decay=0.1)
    matrices = zip(found.view(-1, 10, 6), weight.view(-1, 10, 6), *(g.view(-1, 10, 6) for g in grads), strict=True)
    for got, alone, *its_grads in matrices:
        torch.testing.assert_close(got, _plain_loop(alone, its_grads, 0.05, 0.1, 0.95), rtol=1e-9, atol=1e-9)


def test_parameters_without_a_gradient_are_left_alone() -> None:
    still, moving = (torch.nn.Parameter(_random(4, 4)) for _ in range(2))
    moving.grad = _random(4, 4, seed=1)
    before = still.detach().clone()
    optimizer = Muon([still, moving], lr=0.1, weight_decay=0.5)
    optimizer.step()
    assert torch.equal(still.detach(), before) and still not in optimizer.state


def test_muon_takes_the_matrices_inside_the_layers_and_adamw_the_rest() -> None:
    """One step of the optimiser on every parameter; the two differ in what a gradient's size does."""
    config = train_config(optimizer="muon", weight_decay=0.2)
    model = fresh_model(config.model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = Optimizer(model, config, torch.float32)
    grads = {name: _random(*p.shape, seed=i).float() for i, (name, p) in enumerate(model.named_parameters())}
    for name, p in model.named_parameters():
        p.grad = grads[name].clone()
    optimizer.step(0.01)
    muon = {f"layers.{i}.{n}" for i in range(2) for n in ("attention.wqkv.weight", "attention.wo.weight",
                                                         "ffn.experts.w13", "ffn.experts.w2")}  # fmt: skip
    for name, p in model.named_parameters():
        start, grad = before[name], grads[name]
        if name in muon:
            stack = zip(start.flatten(0, -3) if start.dim() > 2 else start[None],
                        grad.flatten(0, -3) if grad.dim() > 2 else grad[None], strict=True)  # fmt: skip
            want = torch.stack([_plain_loop(w, [g], 0.01, 0.2, 0.95) for w, g in stack]).view_as(start)
        else:  # AdamW's first step is the gradient's sign
            want = start * (1 - 0.01 * (0.2 if start.dim() > 1 else 0.0)) - 0.01 * grad.sign()
        torch.testing.assert_close(p.detach(), want, rtol=1e-4, atol=1e-5, msg=name)
