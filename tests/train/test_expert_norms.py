"""Mean norms of each expert's outputs, and the experts that count as dead."""

from __future__ import annotations

import torch
from torch import Tensor

from mixtral.model import Mixtral, Ragged, initialise
from mixtral.moe.stats import dead_experts
from mixtral.presets import tiny
from mixtral.train.expert_norms import expert_output_norms, mean_row_norms


def test_mean_row_norms_by_hand() -> None:
    rows = torch.tensor([[3.0, 4.0], [0.0, 1.0], [6.0, 8.0], [9.0, 9.0]])
    assert mean_row_norms(rows, torch.tensor([2, 0, 1])).tolist() == [3.0, 0.0, 10.0]


def test_dead_by_count_and_by_norm() -> None:
    load = torch.tensor([0.5, 0.499, 0.001, 0.0])
    assert dead_experts(load, None) == 2
    assert dead_experts(torch.tensor([0.5, 0.494, 0.004, 0.002]), None) == 1  # of the fair load, 1/4: below 0.0025
    even = torch.full((4,), 0.25)
    assert dead_experts(even, torch.tensor([1.0, 1.0, 1.0, 0.005])) == 1
    assert dead_experts(even, torch.tensor([1.0, 1.0, 1.0, 1000.0])) == 0  # one loud expert does not kill the others


def _model() -> Mixtral:
    torch.manual_seed(0)
    return initialise(Mixtral(tiny().replace(dim=32, n_layers=2, n_heads=1, head_dim=32, ffn_dim=16, vocab_size=64)))


class Doubled(torch.nn.Module):
    """What may stand in the place of experts: two arguments, rows out."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, rows_ND: Tensor, counts_E: Tensor) -> Tensor:
        return 2 * self.inner(rows_ND, counts_E)


@torch.no_grad()
def test_other_experts_are_watched_too() -> None:
    model = _model()
    with expert_output_norms(model) as plain:
        model(Ragged.of([list(range(64))]))
    model.layers[1].ffn.experts = Doubled(model.layers[1].ffn.experts)  # type: ignore[union-attr, arg-type]
    with expert_output_norms(model) as norms:
        model(Ragged.of([list(range(64))]))
    assert len(norms) == 2 and torch.equal(norms[0], plain[0])
    torch.testing.assert_close(norms[1], 2 * plain[1])


@torch.no_grad()
def test_one_token_is_watched_too() -> None:
    model = _model()
    with expert_output_norms(model) as norms:
        routing = model(Ragged.of([[5]])).routing
    for seen, layer in zip(norms, routing, strict=True):
        assert (seen > 0).nonzero().flatten().tolist() == sorted(layer.experts_TK[0].tolist())


def test_a_faded_expert_is_seen_and_the_hooks_go() -> None:
    model = _model()
    with torch.no_grad():
        model.layers[1].ffn.experts.w2[3] = 0  # type: ignore[union-attr]
        with expert_output_norms(model) as norms:
            model(Ragged.of([list(range(64))]))
    assert (norms[0] > 0).all()
    assert norms[1][3] == 0
    assert not any(module._forward_hooks for module in model.modules())
