"""AdamW against torch's own; fp32 masters under a bf16 model; state that saves and loads exactly."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mixtral.data.loader import Loader
from mixtral.data.store import TokenData
from mixtral.model import Mixtral
from mixtral.train.config import PretrainConfig
from mixtral.train.optim.optimizer import Optimizer
from tests.train.tiny_run import fresh_model, fresh_state, model_config, same, train_config, weights

ROUTERS = {f"layers.{i}.ffn.router.weight" for i in range(2)}


def backward(model: Mixtral, loader: Loader, step: int) -> None:
    part = loader.batch(step)
    loss = model(part.batch, targets=part.targets_T, loss_weights="mean").loss
    assert loss is not None
    loss.backward()


def take_steps(model: Mixtral, optimizer: Optimizer, loader: Loader, first: int, stop: int) -> None:
    for step in range(first, stop):
        backward(model, loader, step)
        optimizer.collect_gradients()
        optimizer.step(1e-2)


def cloned(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in tensors.items()}


def test_fp32_is_torch_s_adamw(loader: Loader) -> None:
    config = train_config(weight_decay=0.3, betas=(0.8, 0.9))
    model, state_optimizer = fresh_state(config)
    optimizer = state_optimizer.optimizer
    other = fresh_model(config.model)
    groups = [{"params": [p for p in other.parameters() if p.dim() > 1], "weight_decay": 0.3},
              {"params": [p for p in other.parameters() if p.dim() == 1], "weight_decay": 0.0}]  # fmt: skip
    reference = torch.optim.AdamW(groups, betas=(0.8, 0.9))
    for step in range(10):
        lr = 1e-3 * (step + 1)
        backward(model, loader, step)
        optimizer.collect_gradients()
        optimizer.step(lr)
        backward(other, loader, step)
        for group in reference.param_groups:
            group["lr"] = lr
        reference.step()
        reference.zero_grad()
    for name, p in other.named_parameters():
        torch.testing.assert_close(optimizer.params[name], p, rtol=1e-4, atol=1e-6, msg=name)


def test_only_matrices_decay() -> None:
    model, state_optimizer = fresh_state(train_config(weight_decay=0.5))
    optimizer = state_optimizer.optimizer
    before = weights(model)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step(0.1)
    for name, p in model.named_parameters():
        factor = 0.95 if p.dim() > 1 else 1.0
        torch.testing.assert_close(p.detach(), before[name] * factor, rtol=1e-6, atol=0, msg=name)


def test_gradients_are_gone_after_a_step(loader: Loader) -> None:
    for dtype in ("fp32", "bf16"):
        model, state_optimizer = fresh_state(train_config(dtype=dtype))
        optimizer = state_optimizer.optimizer
        take_steps(model, optimizer, loader, 0, 1)
        assert all(p.grad is None for p in [*model.parameters(), *optimizer.params.values()])


def test_bf16_copies_follow_fp32_masters(loader: Loader) -> None:
    model, state_optimizer = fresh_state(train_config(dtype="bf16"))
    optimizer = state_optimizer.optimizer
    start = cloned(optimizer.params)
    assert same(start, weights(fresh_model(model_config())))  # the masters keep what bf16 would round away
    take_steps(model, optimizer, loader, 0, 3)
    for name, p in model.named_parameters():
        master = optimizer.params[name]
        assert master.dtype == torch.float32 and not torch.equal(master, start[name]), name
        assert p.dtype == (torch.float32 if name in ROUTERS else torch.bfloat16), name
        assert torch.equal(p.detach(), master.to(p.dtype)), name


def test_bf16_steps_smaller_than_a_rounding_add_up() -> None:
    model, state_optimizer = fresh_state(train_config(dtype="bf16", weight_decay=0.0))
    optimizer = state_optimizer.optimizer
    name = "norm.weight"  # 1.0: the next bf16 below is 1 - 2^-8
    for _ in range(100):
        optimizer.params[name].grad = torch.ones_like(optimizer.params[name])
        optimizer.step(1e-4)
    assert optimizer.params[name].detach()[0] == pytest.approx(0.99, abs=1e-4)
    assert dict(model.named_parameters())[name].detach()[0].float() == pytest.approx(0.99, abs=4e-3)


def test_bf16_gradients_are_summed_in_fp32() -> None:
    model, state_optimizer = fresh_state(train_config(dtype="bf16"))
    optimizer = state_optimizer.optimizer
    p = dict(model.named_parameters())["layers.0.ffn.experts.w2"]
    for value in [1.0] + [2.0**-10] * 8:  # in bf16, 1 + 2^-10 is 1
        p.grad = torch.full_like(p, value)
        optimizer.collect_gradients()
        assert p.grad is None
    assert optimizer.params["layers.0.ffn.experts.w2"].grad.eq(1 + 8 * 2.0**-10).all()


@pytest.mark.parametrize("clip", [0.0, 0.5, 100.0])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_clipping(loader: Loader, clip: float, dtype: str) -> None:
    model, state_optimizer = fresh_state(train_config(clip=clip, dtype=dtype))
    optimizer = state_optimizer.optimizer
    backward(model, loader, 0)
    optimizer.collect_gradients()
    before = {name: p.grad.clone() for name, p in optimizer.params.items()}
    norm = torch.stack([g.square().sum() for g in before.values()]).sum().sqrt()
    found = optimizer.grad_norm()
    torch.testing.assert_close(found, norm, rtol=1e-5, atol=0)
    optimizer.clip_gradients(found)
    factor = min(1.0, clip / float(norm)) if clip else 1.0
    for name, p in optimizer.params.items():
        torch.testing.assert_close(p.grad, before[name] * factor, rtol=1e-4, atol=1e-9, msg=name)


# -- state -------------------------------------------------------------------------------------------------------------

CONFIGS = [train_config(), train_config(dtype="bf16"), train_config(optimizer="muon"),
           train_config(optimizer="muon", dtype="bf16")]  # fmt: skip


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: f"{c.optimizer}-{c.dtype}")
def test_state_and_load_are_exact(loader: Loader, config: PretrainConfig) -> None:
    model, state_optimizer = fresh_state(config)
    optimizer = state_optimizer.optimizer
    take_steps(model, optimizer, loader, 0, 3)
    saved = cloned(optimizer.params), cloned(optimizer.state())
    take_steps(model, optimizer, loader, 3, 6)

    other_model, state_other = fresh_state(config)
    other = state_other.optimizer
    other.load(*saved)
    assert same(cloned(other.params), saved[0]) and same(cloned(other.state()), saved[1])
    take_steps(other_model, other, loader, 3, 6)
    assert same(weights(other_model), weights(model))
    assert same(cloned(other.params), cloned(optimizer.params)) and same(other.state(), optimizer.state())


def test_every_parameter_has_a_state(loader: Loader) -> None:
    model, state_optimizer = fresh_state(train_config())
    optimizer = state_optimizer.optimizer
    assert optimizer.state() == {}
    take_steps(model, optimizer, loader, 0, 1)
    wanted = {f"{kind}/{name}" for name in optimizer.params for kind in ("exp_avg", "exp_avg_sq", "step")}
    assert set(optimizer.state()) == wanted


def test_loading_the_state_of_no_steps_forgets_later_ones(loader: Loader) -> None:
    model, state_optimizer = fresh_state(train_config())
    optimizer = state_optimizer.optimizer
    start = cloned(optimizer.params)
    take_steps(model, optimizer, loader, 0, 2)
    optimizer.load(start, {})
    assert optimizer.state() == {}
    other_model, state_other = fresh_state(train_config())
    other = state_other.optimizer
    take_steps(model, optimizer, loader, 0, 2)
    take_steps(other_model, other, loader, 0, 2)
    assert same(weights(model), weights(other_model))


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_an_expert_without_tokens(data: TokenData, dtype: str) -> None:
    """Its gradient and moments are zeros, not missing; it survives saving and loading."""
    config = train_config(dtype=dtype, weight_decay=0.0)
    model, state_optimizer = fresh_state(config)
    optimizer = state_optimizer.optimizer
    loader = Loader(data, rows=4, context=32)
    router = model.layers[0].ffn.router
    real = router.forward
    # Only the first two experts are ever taken in layer 0; the gradient still reaches the router.
    taken = torch.tensor([[0, 1]])
    router.forward = lambda x, *_: real(x, taken.expand(len(x), 2))  # type: ignore[method-assign]
    start = cloned(optimizer.params)
    backward(model, loader, 0)
    optimizer.collect_gradients()
    w2 = "layers.0.ffn.experts.w2"
    grad = optimizer.params[w2].grad
    assert grad[:2].abs().sum() > 0 and grad[2:].eq(0).all()
    optimizer.step(1e-2)
    state = cloned(optimizer.state())
    assert state[f"exp_avg/{w2}"][2:].eq(0).all() and state[f"exp_avg_sq/{w2}"][2:].eq(0).all()
    assert torch.equal(optimizer.params[w2][2:], start[w2][2:])
    _, state_other = fresh_state(config)
    other = state_other.optimizer
    other.load(cloned(optimizer.params), state)
    assert same(cloned(other.state()), state) and torch.equal(other.params[w2][2:], start[w2][2:])
