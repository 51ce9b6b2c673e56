"""A whole model with each router: it trains, is recomputed, generates, and survives saving."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

import mixtral
from mixtral.engine import SamplingParams, TorchRunner, generate
from mixtral.errors import UsageError
from mixtral.lm import LM
from mixtral.model import Mixtral, initialise, named_state
from mixtral.moe import Router
from mixtral.train.recompute import recompute_layers
from tests.model import small
from tests.moe import naive
from tests.moe.naive_routers import MODES, SPECS, config

EACH = list({spec.partition("?")[0]: spec for spec in SPECS}.values())  # one spec a router
NEEDED = ("top_p", "min_p", "threshold")


def _model(spec: str, shared: int = 1) -> Mixtral:
    torch.manual_seed(0)
    return initialise(Mixtral(config(spec, shared_experts=shared, init_std=0.3)))


def _train(model: Mixtral, steps: int = 3) -> list[float]:
    batch = small.batch(50, 7, 5)
    targets = small.targets(batch, 50)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for _ in range(steps):
        out = model(batch, targets=targets, loss_weights="mean")
        price = [r.k_T.mean() for r in out.routing if r.k_T is not None]
        optimizer.zero_grad()
        (out.loss + 0.01 * sum(price)).backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
        optimizer.step()
        losses.append(out.loss.item())
    return losses


@pytest.mark.parametrize("spec", EACH)
def test_trains_generates_saves_and_loads(spec: str, tmp_path: Path) -> None:
    model = _model(spec)
    losses = _train(model)
    assert losses[-1] < losses[0]
    for module in model.modules():  # as a balancing rule would have left them
        if isinstance(module, Router):
            for buffer in module.buffers():
                buffer += 0.01 * torch.arange(8)
    if model.k_of_token is not None:
        model.k_of_token[::3] = 1
    lm = LM(model)
    lm.save(tmp_path / "model")
    again = mixtral.load(tmp_path / "model", dtype="fp32", runner="torch")
    assert again.config == model.config
    for name, tensor in named_state(model).items():
        assert torch.equal(named_state(again.model)[name], tensor), name
    if spec.startswith("expert_choice"):
        with pytest.raises(UsageError, match="training alone"):
            lm.logits([1, 2, 3])
        return
    assert torch.equal(lm.logits([1, 2, 3]), again.logits([1, 2, 3]))
    params = SamplingParams(max_tokens=5, ignore_eos=True)
    cached = generate(TorchRunner(model), [[1, 2, 3], [4]], params, keep_routing=True)
    for made, prompt in zip(cached, ([1, 2, 3], [4]), strict=True):
        ids = [*prompt, *made.tokens]
        assert lm.logits(ids[:-1]).argmax(-1)[len(prompt) - 1 :].tolist() == made.tokens
        assert made.routing[0].experts_TK.shape[0] == len(ids) - 1


@pytest.mark.parametrize(("spec", "training"), MODES)
def test_equals_the_model_without_dispatch_in_logits_loss_and_gradients(spec: str, training: bool) -> None:
    """Every router, with and without a capacity and biases, through Mixtral.forward."""
    model, batch = _model(spec).train(training), small.batch(50, 9, 1, 6)
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            if buffer.is_floating_point():
                buffer += 0.02 * torch.randn(buffer.shape, generator=torch.Generator().manual_seed(len(name)))
            else:
                buffer.copy_(torch.arange(50) % 4)
    found = []
    for made in (model, naive.without_dispatch(copy.deepcopy(model))):
        torch.manual_seed(3)
        loss = made(batch, targets=small.targets(batch, 50), loss_weights="mean").loss
        grads = torch.autograd.grad(loss, list(made.parameters()), materialize_grads=True)
        torch.manual_seed(3)
        found.append([loss.detach(), *grads, made(batch).logits.detach()])
    for (name, _), got, want in zip([("loss", None), *model.named_parameters(), ("logits", None)], *found, strict=True):
        assert (got - want).abs().max() <= 1e-5 * max(want.abs().max().item(), 1e-2), name


@pytest.mark.parametrize("spec", EACH)
def test_recomputing_layers_changes_no_bit(spec: str) -> None:
    plain, batch = _model(spec), small.batch(50, 7, 5)
    targets = small.targets(batch, 50)
    grads = []
    for model in (plain, recompute_layers(copy.deepcopy(plain))):
        torch.manual_seed(3)
        loss = model(batch, targets=targets, loss_weights="mean").loss
        grads.append([loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("spec", ["topk", "sigmoid", "learned_k", "token_k", *NEEDED])
def test_a_call_may_set_k_in_every_layer(spec: str) -> None:
    model, batch = _model(spec), small.batch(50, 6)
    if spec in NEEDED:
        with pytest.raises(UsageError, match="k cannot be set"):
            model(batch, k=1)
        return
    for k in (1, 3):
        assert all(((r.experts_TK >= 0).sum(-1) == k).all() for r in model(batch, k=k).routing)


@pytest.mark.parametrize("spec", ["topk?capacity_factor=0.6", "token_k?most=4&capacity_factor=0.6"])
def test_a_replay_of_a_call_with_a_k_gives_its_loss(spec: str) -> None:
    """Capacity drops the same assignments, though nothing but the width of the choice tells k."""
    model, batch = _model(spec).train(), small.batch(50, 30)
    first = model(batch, targets=small.targets(batch, 50), loss_weights="mean", k=3)
    assert any((r.experts_TK != r.chosen_TK).any() for r in first.routing)
    replay = [r.chosen_TK for r in first.routing]
    again = model(batch, targets=small.targets(batch, 50), loss_weights="mean", replay=replay)
    assert torch.equal(again.loss, first.loss)


def test_a_dense_model_refuses_k() -> None:
    model = small.model(small.config(**small.SHAPES["dense"]))
    with pytest.raises(UsageError, match="dense"):
        model(small.batch(50, 3), k=1)


def test_k_follows_the_class_of_the_token() -> None:
    model, batch = _model("token_k?most=4"), small.batch(50, 20)
    assert model.k_of_token.tolist() == [2] * 50
    model.k_of_token.copy_(torch.arange(50) % 6)  # 5 is more than there are slots
    for routing in model(batch).routing:
        want = (batch.tokens_T % 6).clamp(max=4)
        assert torch.equal((routing.experts_TK >= 0).sum(-1), want) and routing.experts_TK.shape[1] == 4


def test_shared_experts_are_added_to_the_routed_ones() -> None:
    model, x = _model("topk", shared=2), torch.randn(5, 6)
    moe = model.layers[0].ffn
    with_shared = moe(x)[0]
    w13, w2 = moe.shared.w13, moe.shared.w2
    moe.shared = None
    want = moe(x)[0]
    for i in (slice(0, 5), slice(5, 10)):  # each of the two by itself
        want = want + (torch.nn.functional.silu(x @ w13[0, i].T) * (x @ w13[1, i].T)) @ w2[:, i].T
    torch.testing.assert_close(with_shared, want)


@pytest.mark.parametrize("spec", ["switch", "sigmoid?scale=2.5", "threshold", "token_k", "top_p?p=0.6"])
def test_decode_agrees_with_dispatch(spec: str) -> None:
    """Weights that do not sum to 1, and slots without an expert."""
    model = _model(spec).eval()
    x = torch.randn(1, 6)
    moe = model.layers[1].ffn
    for k in [None] + ([torch.tensor([0])] if spec == "token_k" else []):
        want, routing = moe(x, k=k)
        with torch.no_grad():
            assert moe.experts.decode(x, routing) is not None
            torch.testing.assert_close(moe(x, k=k)[0], want)


def test_initialisation_of_router_tensors() -> None:
    noisy = _model("noisy?bias=true").layers[0].ffn.router
    assert not noisy.noise_weight.any() and noisy.weight.any() and not noisy.bias.any()
    with torch.device("meta"):
        empty = Mixtral(config("threshold"))
    made = initialise(empty.to_empty(device="cpu"))
    assert (made.layers[0].ffn.router.threshold == 1 / 8).all()
    tokens = initialise(Mixtral(config("token_k")))
    assert next(iter(named_state(tokens))) == "k_of_token" and (tokens.k_of_token == 2).all()
