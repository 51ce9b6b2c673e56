"""The loss of each token through Mixtral.forward: against the logits, for every kind of output, without [T, V]."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from mixtral.kernels.torch import loss as fused
from mixtral.model import Mixtral, Ragged, transformer
from mixtral.model.linear import Linear
from mixtral.quant.formats import INT8, quantise
from mixtral.quant.layers import PackedLinear
from tests.engine.models import make_model, random_tokens

BATCH = Ragged.of([random_tokens(n, seed=n) for n in (9, 5, 23)])
TARGETS = torch.tensor(random_tokens(37, seed=1))
TARGETS[::5] = -100
WEIGHTS = torch.rand(37, generator=torch.Generator().manual_seed(2))


class Adapted(nn.Module):
    """A LoRA output: the plain one and a product of two small matrices."""

    def __init__(self, inner: Linear) -> None:
        super().__init__()
        self.inner = inner
        self.a, self.b = nn.Parameter(torch.randn(2, 32)), nn.Parameter(torch.randn(len(inner.weight), 2))

    def forward(self, x_TD: Tensor) -> Tensor:
        return self.inner(x_TD) + x_TD @ self.a.T @ self.b.T


def model_with(output: str, vocab_size: int = 97) -> Mixtral:
    model = make_model(tie_embeddings=output == "tied", vocab_size=vocab_size).requires_grad_()
    torch.manual_seed(0)
    if output == "adapted":
        model.output = Adapted(model.output)
    if output == "quantised":
        packed = PackedLinear(INT8, 32, vocab_size)
        packed.weight_packed.copy_(quantise(model.output_weight.detach(), INT8))
        model.output = packed
    return model


OUTPUTS = ["plain", "tied", "adapted", "quantised"]


@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize("block_bytes", [4 * 97 * 3, 1 << 25])
def test_the_loss_of_each_token_and_its_gradients(
    output: str, block_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weighted after the pass, weighted before it, and the mean: as the logits say, each parameter's gradient too."""
    for module in (fused, transformer):
        monkeypatch.setattr(module, "_BLOCK_BYTES", block_bytes)
    model = model_with(output)
    logits = model(BATCH).logits
    want_T = nn.functional.cross_entropy(logits, TARGETS, ignore_index=-100, reduction="none")
    out = model(BATCH, targets=TARGETS)
    assert out.logits is None and out.loss is None and len(out.routing) == 2
    torch.testing.assert_close(out.nll_T, want_T, rtol=1e-5, atol=1e-5)
    known = model(BATCH, targets=TARGETS, loss_weights=WEIGHTS)
    mean = model(BATCH, targets=TARGETS, loss_weights="mean")
    assert known.nll_T is None and mean.logits is None
    counted = (TARGETS != -100).sum()
    weighted = want_T @ WEIGHTS
    for got, want in ((out.nll_T @ WEIGHTS, weighted), (known.loss, weighted), (mean.loss, want_T.sum() / counted)):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
        parameters = list(model.parameters())
        grads = [torch.autograd.grad(x, parameters, retain_graph=True) for x in (got, want)]
        for name, ours, theirs in zip(dict(model.named_parameters()), *grads, strict=True):
            assert (ours - theirs).abs().max() <= 2e-5 * theirs.abs().max() + 1e-9, name


class Largest(TorchDispatchMode):
    """The most numbers that any result of any op has."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, Tensor):
                self.numel = max(self.numel, tensor.numel())
        return out


@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize("loss_weights", [None, "mean"])
def test_no_logits_of_all_tokens_are_ever_whole(
    output: str, loss_weights: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forward or backward."""
    for module in (fused, transformer):
        monkeypatch.setattr(module, "_BLOCK_BYTES", 4 * 400 * 3)
    batch, targets = Ragged.of([random_tokens(120)]), torch.tensor(random_tokens(120, seed=1))
    model = model_with(output, 400)
    with Largest() as largest:
        out = model(batch, targets=targets, loss_weights=loss_weights)
        (out.nll_T.sum() if out.loss is None else out.loss).backward()
    assert 120 * 2 * 2 * 48 <= largest.numel < 0.5 * 120 * 400  # gate and up of all rows, two experts each


def test_replacements_of_linear_do_not_subclass_it() -> None:
    """`type(module) is Linear` then says that a weight is all there is."""
    found = [cls for cls in Linear.__subclasses__() if cls.__module__.startswith("mixtral.")]
    assert not found and not issubclass(PackedLinear, Linear)
