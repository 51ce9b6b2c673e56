"""The total is cross-entropy plus weighted router losses; a coefficient of 0 leaves no trace."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mixtral.data.loader import Loader
from mixtral.model import Output
from mixtral.moe.balance import load_balance, z_loss
from mixtral.train.config import TrainConfig
from mixtral.train.objective import objective
from tests.train.tiny_run import fresh_model, model_config, train_config

Gradients = dict[str, torch.Tensor]


def output_and_model(loader: Loader, **model_changes: Any) -> tuple[Output, torch.nn.Module]:
    model = fresh_model(model_config(init_std=0.3, **model_changes))
    part = loader.batch(0)
    return model(part.batch, targets=part.targets_T), model


def gradients(loader: Loader, config: TrainConfig | None) -> tuple[float, Gradients]:
    """Of the objective, or of the model's plain loss when there is no config."""
    output, model = output_and_model(loader)
    total = output.loss if config is None else objective(output, config).total
    assert total is not None
    total.backward()
    return float(total.detach()), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_coefficients_of_zero_are_bit_identical_to_none(loader: Loader) -> None:
    plain_loss, plain = gradients(loader, None)
    loss, found = gradients(loader, train_config(load_balance=0.0, z_loss=0.0))
    assert loss == plain_loss and all(torch.equal(found[name], plain[name]) for name in plain)
    output, _ = output_and_model(loader)
    terms = objective(output, train_config(load_balance=0.0, z_loss=0.0))
    assert terms.load_balance is None and terms.z_loss is None and terms.total is terms.cross_entropy


@pytest.mark.parametrize("name", ["load_balance", "z_loss"])
def test_a_positive_coefficient_is_used(loader: Loader, name: str) -> None:
    off = {"load_balance": 0.0, "z_loss": 0.0}
    _, plain = gradients(loader, None)
    _, small = gradients(loader, train_config(**{**off, name: 0.5}))
    _, large = gradients(loader, train_config(**{**off, name: 1.0}))
    router = "layers.1.ffn.router.weight"
    added = small[router] - plain[router]
    assert added.abs().max() > 1e-4
    torch.testing.assert_close(large[router] - plain[router], 2 * added, rtol=1e-3, atol=1e-6)


def test_the_parts_are_apart_unweighted_and_means_over_layers(loader: Loader) -> None:
    output, _ = output_and_model(loader)
    terms = objective(output, train_config(load_balance=0.3, z_loss=0.7))
    balance = sum(float(load_balance(r).detach()) for r in output.routing) / 2
    squares = sum(float(z_loss(r).detach()) for r in output.routing) / 2
    assert output.loss is not None and float(terms.cross_entropy.detach()) == float(output.loss.detach())
    assert float(terms.load_balance.detach()) == pytest.approx(balance, rel=1e-6)
    assert float(terms.z_loss.detach()) == pytest.approx(squares, rel=1e-6)
    total = float(output.loss.detach()) + 0.3 * balance + 0.7 * squares
    assert float(terms.total.detach()) == pytest.approx(total, rel=1e-6)


def test_a_dense_model_has_no_router_losses(loader: Loader) -> None:
    output, _ = output_and_model(loader, n_experts=1, experts_per_token=1)
    terms = objective(output, train_config(load_balance=1.0, z_loss=1.0))
    assert terms.load_balance is None and terms.z_loss is None and terms.total is terms.cross_entropy
