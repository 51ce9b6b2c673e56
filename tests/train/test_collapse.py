"""A planted collapse: the router sends every token to two of eight experts. Each objective undoes it, none does not."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor

from mixtral.config import ModelConfig
from mixtral.moe import Experts, MoE, Routing, make_router
from mixtral.moe.choice import counts_of
from mixtral.train.balancing.balancer import Balancer
from mixtral.train.config import PretrainConfig

TOKENS, DIM, EXPERTS, STEPS = 128, 16, 8, 200
RECOVERED = 1.75  # largest load over the mean one; 4 at the collapse
DOMAINS = ("arithmetic", "code", "logic", "prose")


def config_of(router: str, *balance: str) -> PretrainConfig:
    model = ModelConfig(vocab_size=8, dim=DIM, n_layers=1, n_heads=1, n_kv_heads=1, head_dim=DIM, ffn_dim=8,
                        n_experts=EXPERTS, experts_per_token=2, rope_theta=1e4, router=router)  # fmt: skip
    return PretrainConfig(model=model, steps=STEPS, context=8, balance=balance)


def collapsed_layer(config: PretrainConfig) -> MoE:
    """Input 0 is 1 for every token, and the gate reads from it alone that experts 0 and 1 are the best."""
    torch.manual_seed(0)
    layer = MoE(make_router(config.model), Experts(EXPERTS, DIM, 8))
    layer.router.reset_buffers()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(0, 0.3)
        layer.router.weight.mul_(0.1)
        layer.router.weight[:, 0] = torch.tensor([1.5, 1.5] + [0.0] * (EXPERTS - 2))
    return layer


@functools.cache
def batch(step: int) -> tuple[Tensor, Tensor, Tensor]:
    """(x [T, D], targets [T, D], domains [T]); the domain shows in the inputs."""
    draw = torch.Generator().manual_seed(step)
    x_TD = torch.randn(TOKENS, DIM, generator=draw) * 0.5
    domains_T = torch.arange(TOKENS) % len(DOMAINS)
    x_TD[torch.arange(TOKENS), 1 + domains_T] += 1.5
    x_TD[:, 0] = 1.0
    return x_TD, torch.tanh(2 * x_TD.roll(1, dims=1)), domains_T


def largest(routing: Routing) -> float:
    counts_E = counts_of(routing.chosen_TK, routing.logits_TE.shape[1]).float()
    return float(counts_E.max() / counts_E.mean())


def recovery(router: str, *balance: str) -> int | None:
    """Train the layer on a task of its own -> the step after which ten in a row were balanced; None: there was none."""
    config = config_of(router, *balance)
    layer = collapsed_layer(config)
    balancer = Balancer([layer.router], config, DOMAINS)
    optimizer = torch.optim.Adam(layer.parameters(), lr=6e-3)
    balanced = 0
    for step in range(STEPS):
        x_TD, targets_TD, domains_T = batch(step % 20)
        y_TD, routing = layer(x_TD)
        assert step or largest(routing) == EXPERTS / 2
        balanced = balanced + 1 if largest(routing) < RECOVERED else 0
        if balanced == 10:
            return step
        balancer.begin(step)
        balancer.observe([routing])
        loss = (y_TD - targets_TD).square().mean()
        for term in balancer.terms([routing], domains_T):
            loss = loss + term.coefficient * torch.stack(term.values).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        balancer.update()
    return None


@pytest.mark.parametrize("router", ["topk", "sigmoid?bias=true", "threshold"])
def test_nothing_does_not_recover(router: str) -> None:
    assert recovery(router) is None


@pytest.mark.parametrize(
    "router, objective",
    [
        ("topk", "micro_batch?weight=0.1"),
        ("topk", "global_batch?weight=0.1&exact=false"),
        ("topk", "guided?weight=0.1"),
        ("sigmoid?bias=true", "loss_free?rate=0.01"),
        ("sigmoid?bias=true", "smebu?rate=0.01"),
        ("sigmoid?bias=true", "quantile"),
        ("topk?bias=true", "quantile"),
        ("threshold", "threshold?decay=0.9"),
    ],
)
def test_each_objective_recovers(router: str, objective: str) -> None:
    assert recovery(router, objective) is not None
