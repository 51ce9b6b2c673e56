from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mixtral.kernels import reference
from mixtral.kernels.torch import loss
from tests.kernels.compare import FP32, assert_close, compare, run


@pytest.mark.parametrize("block_bytes", [1, 4 * 37 * 3, 32 * 2**20], ids=["a token a block", "3 tokens", "one block"])
@pytest.mark.parametrize("tokens", [0, 1, 3, 10])
def test_cross_entropy(tokens: int, block_bytes: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss, "_BLOCK_BYTES", block_bytes)
    targets = torch.randint(0, 37, (tokens,))
    targets[::3] = -100
    compare(loss.cross_entropy, reference.cross_entropy, [torch.randn(tokens, 13), torch.randn(37, 13), targets], dtype)


@pytest.mark.parametrize("cross_entropy", [reference.cross_entropy, loss.cross_entropy])
def test_no_target_counted_gives_zero_and_zero_gradients(cross_entropy: object) -> None:
    inputs = [torch.randn(4, 5), torch.randn(7, 5), torch.full((4,), -100)]
    for value in run(cross_entropy, inputs):  # type: ignore[arg-type]
        assert torch.equal(value, torch.zeros_like(value))


def test_large_logits_stay_finite() -> None:
    compare(loss.cross_entropy, reference.cross_entropy, [torch.randn(6, 5) * 1e3, torch.randn(7, 5), torch.arange(6)])


@pytest.mark.parametrize("block_bytes", [1, 4 * 37 * 3, 32 * 2**20], ids=["a token a block", "3 tokens", "one block"])
@pytest.mark.parametrize("tokens", [0, 1, 3, 10])
def test_token_nll(tokens: int, block_bytes: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss, "_BLOCK_BYTES", block_bytes)
    targets = torch.randint(0, 37, (tokens,))
    targets[::3] = -100
    inputs = [torch.randn(tokens, 13), torch.randn(37, 13), targets]
    compare(loss.token_nll, reference.token_nll, inputs, dtype)
    assert not loss.token_nll(*inputs)[::3].any()


@pytest.mark.parametrize("tokens", [0, 1, 10])
def test_weighted_cross_entropy(tokens: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the weighted sum of each token's, gradients too; the weights themselves have none."""
    monkeypatch.setattr(loss, "_BLOCK_BYTES", 4 * 37 * 3)
    targets, weights = torch.randint(0, 37, (tokens,)), torch.rand(tokens)
    targets[1::3] = -100
    inputs = [torch.randn(tokens, 13), torch.randn(37, 13), targets]
    compare(lambda *a: loss.cross_entropy(*a, weights), lambda *a: reference.cross_entropy(*a, weights), inputs, dtype)
    compare(lambda *a: loss.cross_entropy(*a, weights), lambda *a: (loss.token_nll(*a) * weights).sum(), inputs)


def test_value_by_hand() -> None:
    h, w = torch.eye(2), torch.tensor([[0.0, 0.0], [1.0, 0.0], [2.0, 0.0]])
    want = (torch.tensor([0.0, 1.0, 2.0]).exp().sum().log() - 1.0 + torch.tensor(3.0).log()) / 2
    for cross_entropy in (reference.cross_entropy, loss.cross_entropy):
        torch.testing.assert_close(cross_entropy(h, w, torch.tensor([1, 2])), want)


@pytest.mark.parametrize("needs", [(True, False), (False, True), (False, False)])
def test_only_the_gradients_asked_for_are_made(needs: tuple[bool, bool]) -> None:
    h, w, targets = torch.randn(4, 5), torch.randn(7, 5), torch.tensor([0, -100, 6, 3])
    _, *want = run(reference.cross_entropy, [h, w, targets])
    h.requires_grad_(needs[0]), w.requires_grad_(needs[1])
    value = loss.cross_entropy(h, w, targets)
    assert value.requires_grad == any(needs)
    if any(needs):
        assert len(value.grad_fn.saved_tensors) == sum(needs)
        value.backward(torch.tensor(1.0))
    for leaf, needed, grad in zip((h, w), needs, want, strict=True):
        assert (leaf.grad is not None) == needed
        if needed:
            cotangent = torch.randn((), generator=torch.Generator().manual_seed(7))
            assert_close(leaf.grad * cotangent, grad, FP32)


def test_no_gradients_are_made_without_grad_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    block = loss._block
    monkeypatch.setattr(loss, "_block", lambda *a, **k: asked.append(a[2]) or block(*a, **k))
    h, w = torch.randn(4, 5, requires_grad=True), torch.randn(7, 5, requires_grad=True)
    with torch.no_grad():
        loss.cross_entropy(h, w, torch.arange(4))
    loss.cross_entropy(h, w, torch.arange(4))
    assert asked == [False, True]


@pytest.mark.parametrize("target", [-1, 7])
@pytest.mark.parametrize("cross_entropy", [reference.cross_entropy, loss.cross_entropy])
def test_a_target_outside_the_vocabulary_is_refused(cross_entropy: object, target: int) -> None:
    """-1 must not pass for token 0; only -100 means "no target"."""
    with pytest.raises((IndexError, RuntimeError), match="out of bounds"):
        cross_entropy(torch.randn(2, 5), torch.randn(7, 5), torch.tensor([0, target]))  # type: ignore[operator]


def test_a_second_derivative_is_refused() -> None:
    h = torch.randn(4, 5, requires_grad=True)
    value = loss.cross_entropy(h, torch.randn(7, 5), torch.arange(4))
    (grad,) = torch.autograd.grad(value.square(), h, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@settings(max_examples=40)
@given(
    targets=st.lists(st.one_of(st.just(-100), st.integers(0, 4)), min_size=1, max_size=9), rows=st.integers(1, 4),
    scale=st.sampled_from([0.1, 1.0, 30.0]), seed=st.integers(0, 99),
)  # fmt: skip
def test_any_pattern_of_targets_in_blocks_of_any_size(targets: list[int], rows: int, scale: float, seed: int) -> None:
    """Against fp64, blocks without a target among them. Gradients are (probability - one-hot) / count times the other
    factor, and the first is known to an absolute 1e-6, or so much of it as large logits leave."""
    draw = torch.Generator().manual_seed(seed)
    h, w = torch.randn(len(targets), 3, generator=draw) * scale, torch.randn(5, 3, generator=draw)
    at = torch.tensor(targets)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loss, "_BLOCK_BYTES", 4 * 5 * rows)
        value, grad_h, grad_w = run(loss.cross_entropy, [h, w, at])
    exact = [x.double().requires_grad_() for x in (h, w)]
    logits = exact[0] @ exact[1].T
    want = torch.nn.functional.cross_entropy(logits, at, reduction="sum") / max(1, int((at != -100).sum()))
    cotangent = torch.randn((), generator=torch.Generator().manual_seed(7)).double()
    want_h, want_w = torch.autograd.grad(want, exact, cotangent)
    error = 1e-6 * max(1.0, float(logits.detach().abs().max()))
    torch.testing.assert_close(value.double(), want.detach(), rtol=0, atol=error)
    torch.testing.assert_close(grad_h.double(), want_h, rtol=0, atol=error * float(w.abs().max()))
    torch.testing.assert_close(grad_w.double(), want_w, rtol=0, atol=error * float(h.abs().max()))
