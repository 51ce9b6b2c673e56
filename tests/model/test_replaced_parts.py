"""Parts put in from above are respected everywhere: training, statistics, losses, decoding one token or several.

Each replacement changes what the model computes by a known amount, so that a way past it would show.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mixtral.data.loader import TrainBatch
from mixtral.engine import SamplingParams, TorchRunner, generate
from mixtral.lm import LM
from mixtral.model import Mixtral, Ragged
from mixtral.moe import Routing
from mixtral.moe.dispatch import LocalDispatcher
from mixtral.quant.formats import INT8, quantise
from mixtral.quant.layers import PackedLinear
from mixtral.train.objective import next_token
from mixtral.train.state import TrainState
from mixtral.train.step import train_step
from tests.engine.models import make_model, random_tokens
from tests.kernels.step_models import pack_parts
from tests.train.tiny_run import train_config


class Doubling(LocalDispatcher):
    def combine(self, y_ND: Tensor, dispatched: Any) -> Tensor:
        return 2 * super().combine(y_ND, dispatched)


class Tripled(nn.Module):
    """Experts of another class, without a shortcut for few tokens."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, rows_ND: Tensor, counts_E: Tensor) -> Tensor:
        return 3 * self.inner(rows_ND, counts_E)


class Adapted(nn.Module):
    """An output with a low-rank product beside it."""

    def __init__(self, inner: nn.Module, dim: int, vocab_size: int) -> None:
        super().__init__()
        self.inner = inner
        g = torch.Generator().manual_seed(3)
        self.a, self.b = (nn.Parameter(torch.randn(*s, generator=g) * 0.3) for s in ((2, dim), (vocab_size, 2)))

    def forward(self, x_TD: Tensor) -> Tensor:
        return self.inner(x_TD) + x_TD @ self.a.T @ self.b.T


def doubled(model: Mixtral) -> None:
    for block in model.layers:
        block.ffn.dispatcher = Doubling()


def tripled(model: Mixtral) -> None:
    for block in model.layers:
        block.ffn.experts = Tripled(block.ffn.experts)


def adapted(model: Mixtral) -> None:
    model.output = Adapted(model.output, model.config.dim, model.config.vocab_size)


def quantised(model: Mixtral) -> None:
    packed = PackedLinear(INT8, model.config.dim, model.config.vocab_size)
    packed.weight_packed.copy_(quantise(model.output_weight.detach(), INT8))
    model.output = packed


def by_hand(replace: Callable[[Mixtral], None], model: Mixtral) -> Mixtral:
    """The same model without the replacement, whose plain weights say the same."""
    plain = copy.deepcopy(model)
    for block in plain.layers:
        if replace is not adapted:
            block.ffn.experts.w2.data *= {doubled: 2.0, tripled: 3.0}.get(replace, 1.0)
    if replace is adapted:
        fresh = Adapted(plain.output, plain.config.dim, plain.config.vocab_size)
        plain.output.weight.data += (fresh.b @ fresh.a).detach()
    if replace is quantised:
        made = copy.deepcopy(model)
        quantised(made)
        plain.output.weight.data = made.output(torch.eye(plain.config.dim)).T.contiguous()
    return plain


REPLACED = [doubled, tripled, adapted, quantised]
NAMES = [f.__name__ for f in REPLACED]
BOUND = {"quantised": 0.03}  # int8 rounds its inputs too


@pytest.mark.parametrize("replace", REPLACED, ids=NAMES)
@pytest.mark.parametrize("n_tokens", [1, 3, 17])
def test_logits_losses_and_gradients(replace: Callable[[Mixtral], None], n_tokens: int) -> None:
    model = make_model().requires_grad_()
    want, bound = by_hand(replace, model), BOUND.get(replace.__name__, 1e-4)
    replace(model)
    ids = random_tokens(n_tokens + 1)
    batch, targets = Ragged.of([ids[:-1]]), torch.tensor(ids[1:])
    for grad in (False, True):  # shortcuts are taken without gradients alone
        with torch.set_grad_enabled(grad):
            logits = [m(batch).logits for m in (model, want)]
            assert (logits[0] - logits[1]).norm() <= bound * logits[1].norm()
            for weights in (None, "mean"):
                outs = [m(batch, targets=targets, loss_weights=weights) for m in (model, want)]
                losses = [o.nll_T.sum() if o.loss is None else o.loss for o in outs]
                assert abs(losses[0] - losses[1]) <= bound * abs(losses[1]) + bound
    grads = [torch.autograd.grad(m(batch, targets=targets).nll_T.sum(), m.embedding.weight)[0] for m in (model, want)]
    assert (grads[0] - grads[1]).norm() <= max(bound, 1e-3) * 3 * grads[1].norm()


PLACES = [*(("plain", replace) for replace in REPLACED), ("packed", doubled), ("packed", tripled)]


@pytest.mark.parametrize(("kind", "replace"), PLACES, ids=lambda p: p if isinstance(p, str) else p.__name__)
def test_decoding(kind: str, replace: Callable[[Mixtral], None]) -> None:
    """By LM, whatever runner it takes: one token a step, and three sequences at once."""
    model = make_model()
    want = by_hand(replace, model)
    model = pack_parts(model, "fp32") if kind == "packed" else model
    replace(model)
    lm = LM(model)
    params = SamplingParams(max_tokens=6, ignore_eos=True)
    prompts = [random_tokens(n, seed=n) for n in (1, 3, 9)]
    for texts in ([prompts[0]], prompts):
        got = [g for of_prompt in lm.complete(texts, max_tokens=6, ignore_eos=True, temperature=0.0) for g in of_prompt]
        theirs = generate(TorchRunner(want), texts, params)
        assert lm.runner.name == "torch"
        if replace is not quantised:
            assert [g.tokens for g in got] == [g.tokens for g in theirs]
            for a, b in zip(got, theirs, strict=True):
                torch.testing.assert_close(a.logprobs, b.logprobs, rtol=0, atol=1e-3)
        for g, prompt in zip(got, texts, strict=True):  # decode equals one pass over the whole text
            logits = lm.logits([*prompt, *g.tokens[:-1]])[len(prompt) - 1 :]
            chosen = logits.log_softmax(-1).gather(1, torch.tensor(g.tokens)[:, None])[:, 0]
            torch.testing.assert_close(chosen, torch.tensor(g.logprobs), rtol=0, atol=1e-3)


@pytest.mark.parametrize("replace", [doubled, tripled, adapted], ids=NAMES[:3])
def test_training_and_statistics(replace: Callable[[Mixtral], None]) -> None:
    """A step has the loss and the gradients of the model by hand, and statistics of the replaced experts' outputs."""
    config = train_config({"n_layers": 2}, balance=("micro_batch?weight=0.01",), clip=0.0)
    model = Mixtral(config.model)
    for p in model.parameters():
        p.data.normal_(0, 0.2, generator=torch.Generator().manual_seed(p.numel()))
    want = by_hand(replace, model)
    replace(model)
    ids = torch.randint(config.model.vocab_size, (2, 24), generator=torch.Generator().manual_seed(0))
    batch = TrainBatch(Ragged.of(ids.tolist()), ids.roll(-1, 1).flatten(), None)
    results, norms = [], []
    for each in (model, want):
        train_state = TrainState.of(each, config, torch.float32)
        results.append(train_step(train_state, [batch], next_token, config, 0, stats=True))
        norms.append([layer.output_norms for layer in results[-1].layers])
    assert results[0].cross_entropy == pytest.approx(results[1].cross_entropy, rel=1e-4)
    factor = 0.5 if replace is doubled else 1.0  # the dispatcher doubles behind the experts
    torch.testing.assert_close(torch.tensor(norms[0]), factor * torch.tensor(norms[1]), rtol=1e-3, atol=1e-4)
    if replace is not adapted:
        assert results[0].grad_norm != 0


def test_routing_of_a_replaced_layer_is_still_a_value() -> None:
    model = make_model()
    tripled(model)
    doubled(model)
    out = LM(model).routing(random_tokens(5))
    assert len(out) == 2 and isinstance(out[0], Routing)
