"""A training step of a model whose router has a capacity, against the same step without dispatch.

Legend: T tokens, E experts.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mixtral.data.loader import Loader
from mixtral.train.config import PretrainConfig
from mixtral.train.objective import next_token
from mixtral.train.state import TrainState
from mixtral.train.step import StepResult, train_step
from tests.moe import naive
from tests.train.tiny_run import fresh_model, fresh_state, model_config, train_config

ROUTERS = {
    "topk": "topk?capacity_factor=0.6",
    "bias": "sigmoid?bias=true&capacity_factor=0.7",
    "learned_k": "learned_k?most=3&capacity_factor=0.5",
}
BALANCE = [
    ("topk", ("micro_batch?weight=0.1", "z_loss")),
    ("topk", ("global_batch?weight=0.1",)),
    ("bias", ("loss_free?rate=0.01",)),
    ("bias", ("quantile", "global_batch?exact=false")),
    ("learned_k", ("k_price?weight=0.1", "micro_batch")),
]


def _config(router: str, balance: tuple[str, ...] = ()) -> PretrainConfig:
    model: dict[str, Any] = model_config(router=ROUTERS[router], init_std=0.3).to_dict()
    return train_config(model, balance=balance)


def _step(
    config: PretrainConfig, loader: Loader, parts: int, dispatch: bool
) -> tuple[StepResult, dict[str, Tensor], dict[str, Tensor]]:
    """-> what the first step reports, the gradients that its update is given, the routers' buffers after it.

    Not the weights after it: AdamW divides a gradient by its own size, and so the rounding of one that is 0.
    """
    model = fresh_model(config.model)
    train_state = TrainState.of(model if dispatch else naive.without_dispatch(model), config, torch.float32)
    grads: dict[str, Tensor] = {}
    optimizer = train_state.optimizer
    optimizer.step = lambda _: grads.update({n: p.grad.clone() for n, p in optimizer.params.items()})  # type: ignore
    batches = [loader.batch(0, i, parts) for i in range(parts)]
    return train_step(train_state, batches, next_token, config, 0, False), grads, train_state.buffers


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize(("router", "balance"), BALANCE, ids=str)
def test_a_step_is_the_one_without_dispatch(loader: Loader, router: str, balance: tuple[str, ...], parts: int) -> None:
    config = _config(router, balance)
    (found, *got), (wanted, *want) = (_step(config, loader, parts, dispatch) for dispatch in (True, False))
    assert found.cross_entropy == pytest.approx(wanted.cross_entropy, rel=1e-6)
    assert found.grad_norm == pytest.approx(wanted.grad_norm, rel=1e-5)
    assert found.aux == pytest.approx(wanted.aux, rel=1e-5)
    assert found.aux.keys() == {spec.partition("?")[0] for spec in balance}
    for mine, other in zip(got, want, strict=True):
        for name, tensor in other.items():
            assert float((mine[name] - tensor).norm()) <= 2e-6 * float(tensor.norm()) + 1e-9, name


def test_the_statistics_tell_what_was_computed_from_what_was_chosen(loader: Loader) -> None:
    """Loads by choice, norms by the rows that were computed, each expert's outputs computed one row at a time."""
    config = _config("topk")
    model, train_state = fresh_state(config)
    inputs: list[Tensor] = []
    for block in model.layers:
        block.ffn.register_forward_pre_hook(lambda _, args: inputs.append(args[0].detach()))
    batch = loader.batch(0)
    with torch.no_grad():
        routings = model.train()(batch.batch).routing
    layers = train_step(train_state, [batch], next_token, config, 0, True).layers
    assert layers is not None
    before = fresh_model(config.model)
    for i, (stats, routing) in enumerate(zip(layers, routings, strict=True)):
        chosen, computed = routing.chosen_TK, routing.experts_TK
        assert 0 < (computed < 0).sum() == round(stats.dropped * chosen.numel())
        wanted = [int((chosen == e).sum()) / chosen.numel() for e in range(4)]
        assert stats.load == pytest.approx(wanted, abs=1e-6)
        norms = [_mean_norm(before.layers[i].ffn.experts, inputs[i][(computed == e).any(-1)], e) for e in range(4)]
        assert stats.output_norms == pytest.approx(norms, rel=1e-4)


@torch.no_grad()
def _mean_norm(experts: Any, rows_ND: Tensor, e: int) -> float:
    gate, up = experts.w13[e]
    rows = [experts.w2[e] @ (torch.nn.functional.silu(gate @ x_D) * (up @ x_D)) for x_D in rows_ND]
    return float(sum(row.norm() for row in rows) / max(1, len(rows)))
