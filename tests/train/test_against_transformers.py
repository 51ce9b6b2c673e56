"""Our training step against transformers' model under torch's AdamW: same weights, batches and hyper-parameters.

Legend: B rows, S tokens of a row, K experts a token.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bench.lib.peer import peer
from mixtral.data.loader import Loader, TrainBatch
from mixtral.data.store import TokenData
from mixtral.model import Mixtral
from mixtral.moe.losses import load_balance_hf
from mixtral.train.config import PretrainConfig
from mixtral.train.objective import next_token
from mixtral.train.optim.schedule import learning_rate
from mixtral.train.state import TrainState
from mixtral.train.step import train_step
from mixtral.weights.names import slots
from tests.train.tiny_run import fresh_state, train_config

STEPS = 10
LARGE = {"init_std": 0.2}  # weights large enough for routing and attention to matter from the first step

def settings(model: dict[str, Any] | None = None, **changes: Any) -> PretrainConfig:
    fields: dict[str, Any] = {"steps": STEPS, "lr": 5e-3, "warmup": 0.3, "clip": 0.5, "context": 64, "balance": ()}
    return train_config({**LARGE, **(model or {})}, **{**fields, **changes})


class Theirs:
    """transformers' model with a copy of our weights, its own forward pass and loss, and torch's AdamW."""

    def __init__(self, ours: Mixtral, config: PretrainConfig, coefficient: float) -> None:
        self.model: Any = peer(ours, torch.float32, "eager")
        self.model.router_aux_loss_coef = self.coefficient = coefficient
        self.config = config
        matrices = [p for p in self.model.parameters() if p.dim() > 1]
        norms = [p for p in self.model.parameters() if p.dim() == 1]
        groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": norms, "weight_decay": 0.0}]
        self.adamw = torch.optim.AdamW(groups, betas=config.betas)
        self.gradients: dict[str, Tensor] = {}  # of the last step, clipped

    def step(self, part: TrainBatch, step: int) -> tuple[float, float, float]:
        """(cross-entropy, their balancing loss, gradient norm). Rows with positions that start again are packed."""
        ids_BS, positions_BS, targets_BS = (
            x.view(-1, self.config.context) for x in (part.batch.tokens_T, part.batch.positions_T, part.targets_T)
        )
        output = self.model(
            input_ids=ids_BS, position_ids=positions_BS, labels=targets_BS, shift_labels=targets_BS,
            use_cache=False, output_router_logits=True,
        )  # fmt: skip
        output.loss.backward()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip)
        self.gradients = {name: p.grad.clone() for name, p in self.model.named_parameters()}
        for group in self.adamw.param_groups:
            group["lr"] = learning_rate(step, self.config)
        self.adamw.step()
        self.adamw.zero_grad()
        balance = float(output.aux_loss.detach())
        return float(output.loss.detach()) - self.coefficient * balance, balance, float(norm)


def gradients_of(train_state: TrainState, config: PretrainConfig) -> dict[str, Tensor]:
    """Our gradients, named and laid out as transformers has its parameters."""
    found = slots(config.model, "hf", "fused").items()
    params = train_state.optimizer.params
    return {name: slot.view(params[slot.ours].grad).reshape(slot.shape).clone() for name, slot in found}


def compare(data: TokenData, config: PretrainConfig, coefficient: float) -> None:
    """Losses and gradient norms of every step to 1e-5, the first step's gradients to 1e-5 of each one's norm."""
    loader = Loader(data, config.rows, config.context)
    model, train_state = fresh_state(config)
    theirs = Theirs(model, config, coefficient)
    ours: list[dict[str, Tensor]] = []
    update = train_state.optimizer.step
    train_state.optimizer.step = lambda lr: (ours.append(gradients_of(train_state, config)), update(lr))[1]  # type: ignore
    for step in range(STEPS):
        part = loader.batch(step)
        assert len(part.batch.cu_seqlens) > config.rows + 1  # documents begin inside rows
        result = train_step(train_state, [part], next_token, config, step, False)
        loss, balance, norm = theirs.step(part, step)
        assert norm > config.clip  # so clipping acts
        assert result.cross_entropy == pytest.approx(loss, rel=1e-5), step
        assert result.grad_norm == pytest.approx(norm, rel=1e-5), step
        if coefficient:
            assert result.aux["micro_batch"] == pytest.approx(balance / config.model.experts_per_token, rel=1e-5), step
        if step == 0:
            assert ours[0].keys() == theirs.gradients.keys()
            for name, wanted in theirs.gradients.items():
                assert float((ours[0][name] - wanted).norm()) <= 1e-5 * float(wanted.norm()), name


def test_the_curve_and_the_gradients_are_theirs(data: TokenData) -> None:
    compare(data, settings(), 0.0)


def test_with_the_balancing_loss_of_one_layer(data: TokenData) -> None:
    """Theirs is K times ours on one layer (K, not 1, at balance): ours with a coefficient c is theirs with c / K."""
    config = settings({"n_layers": 1}, balance=("micro_batch?weight=0.5",))
    compare(data, config, 0.5 / config.model.experts_per_token)


def test_the_pooled_form_is_load_balance_hf(data: TokenData) -> None:
    """On several layers theirs multiplies pooled shares with pooled scores; only our form of that name equals it."""
    config = settings({"n_layers": 3})
    model, _ = fresh_state(config)
    part = Loader(data, config.rows, config.context).batch(0)
    routing = model(part.batch, targets=part.targets_T, loss_weights="mean").routing
    _, balance, _ = Theirs(model, config, 0.0).step(part, 0)
    assert float(load_balance_hf(routing).detach()) == pytest.approx(balance, rel=1e-5)
