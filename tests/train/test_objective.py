"""The total is cross-entropy plus weighted router losses; a coefficient of 0 leaves no trace."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mixtral.data.loader import Loader
from mixtral.model import Mixtral, Output
from mixtral.moe.losses import load_balance, z_loss
from mixtral.train.balancing.balancer import Balancer
from mixtral.train.config import PretrainConfig
from mixtral.train.objective import Objective, objective
from tests.train.tiny_run import fresh_model, model_config, train_config

Gradients = dict[str, torch.Tensor]


def output_and_model(loader: Loader, **model_changes: Any) -> tuple[Output, Mixtral]:
    model = fresh_model(model_config(init_std=0.3, **model_changes))
    part = loader.batch(0)
    return model(part.batch, targets=part.targets_T, loss_weights="mean"), model


def objective_of(output: Output, model: Mixtral, config: PretrainConfig, step: int = 0) -> Objective:
    routers = [block.ffn.router for block in model.layers] if output.routing else []
    balancer = Balancer(routers, config)
    balancer.begin(step)
    balancer.observe(output.routing)
    return objective(output, balancer)


def gradients(loader: Loader, *balance: str, step: int = 0) -> Gradients:
    output, model = output_and_model(loader)
    objective_of(output, model, train_config(balance=balance), step).total.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def router_gradients(loader: Loader, *balance: str, step: int = 0) -> list[torch.Tensor]:
    """What the objectives add to the gradient of each layer's router."""
    plain, found = gradients(loader), gradients(loader, *balance, step=step)
    names = [f"layers.{layer}.ffn.router.weight" for layer in range(2)]
    return [found[name] - plain[name] for name in names]


@pytest.mark.parametrize("name", ["micro_batch", "global_batch", "z_loss"])
def test_a_coefficient_of_zero_is_bit_identical_to_none(loader: Loader, name: str) -> None:
    output, model = output_and_model(loader)
    assert output.loss is not None
    output.loss.backward()
    plain = {n: p.grad for n, p in model.named_parameters()}
    for balance in ((f"{name}?weight=0",), ("none",), ("",), ()):
        found = gradients(loader, *balance)
        assert all(torch.equal(found[n], plain[n]) for n in plain)
        terms = objective_of(*output_and_model(loader), train_config(balance=balance))
        assert terms.aux == {} and torch.equal(terms.total, terms.cross_entropy)


@pytest.mark.parametrize("name", ["micro_batch", "global_batch", "z_loss"])
def test_a_positive_coefficient_is_used(loader: Loader, name: str) -> None:
    small = router_gradients(loader, f"{name}?weight=0.5")
    large = router_gradients(loader, f"{name}?weight=1.0")
    assert small[1].abs().max() > 1e-4
    torch.testing.assert_close(large[1], 2 * small[1], rtol=1e-3, atol=1e-6)


def test_the_parts_are_apart_unweighted_and_means_over_layers(loader: Loader) -> None:
    output, model = output_and_model(loader)
    terms = objective_of(output, model, train_config(balance=("micro_batch?weight=0.3", "z_loss?weight=0.7")))
    balance = sum(float(load_balance(r).detach()) for r in output.routing) / 2
    squares = sum(float(z_loss(r).detach()) for r in output.routing) / 2
    assert output.loss is not None and float(terms.cross_entropy.detach()) == float(output.loss.detach())
    assert float(terms.aux["micro_batch"].detach()) == pytest.approx(balance, rel=1e-6)
    assert float(terms.aux["z_loss"].detach()) == pytest.approx(squares, rel=1e-6)
    total = float(output.loss.detach()) + 0.3 * balance + 0.7 * squares
    assert float(terms.total.detach()) == pytest.approx(total, rel=1e-6)


def test_layers_have_their_own_coefficients(loader: Loader) -> None:
    """Each layer weighs 1 / L whoever else is named, so two entries for two layers are one entry for both."""
    both = router_gradients(loader, "micro_batch?weight=0.5")
    apart = router_gradients(loader, "micro_batch?weight=0.5&layers=0", "micro_batch?weight=0.5&layers=1")
    for one, other in zip(both, apart, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-7)
    last = router_gradients(loader, "z_loss?weight=0.5&layers=1")
    assert last[0].abs().max() > 0  # through the layers below
    first = router_gradients(loader, "z_loss?weight=0.5&layers=0")
    assert first[1].abs().max() < 1e-6 < first[0].abs().max()
    output, model = output_and_model(loader)
    terms = objective_of(output, model, train_config(balance=("z_loss?layers=1", "z_loss?weight=0.5&layers=0")))
    mean = sum(float(z_loss(r).detach()) for r in output.routing) / 2
    assert float(terms.aux["z_loss"].detach()) == pytest.approx(mean, rel=1e-6)


def test_the_coefficient_moves_to_its_final_value(loader: Loader) -> None:
    """Ten steps: from 0 at the first to 0.9 at the last in a straight line; at 0 there is no such loss at all."""
    spec = "micro_batch?weight=0&final=0.9"
    output, model = output_and_model(loader)
    assert objective_of(output, model, train_config(balance=(spec,)), step=0).aux == {}
    for step, weight in ((1, 0.1), (5, 0.5), (9, 0.9)):
        scheduled = router_gradients(loader, spec, step=step)
        constant = router_gradients(loader, f"micro_batch?weight={weight}")
        for one, other in zip(scheduled, constant, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-7)


def test_a_dense_model_has_no_router_losses(loader: Loader) -> None:
    output, model = output_and_model(loader, n_experts=1, experts_per_token=1)
    terms = objective_of(output, model, train_config(balance=("micro_batch", "loss_free")))
    assert terms.aux == {} and torch.equal(terms.total, terms.cross_entropy)
