"""A step: the same for any accumulation, nothing updated on a non-finite number, and it learns."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from mixtral.data.loader import Loader, TrainBatch
from mixtral.model import Mixtral
from mixtral.moe.stats import layer_stats
from mixtral.train.config import PretrainConfig
from mixtral.train.objective import next_token
from mixtral.train.state import TrainState
from mixtral.train.step import NonFiniteLoss, StepResult, train_step
from tests.train.tiny_run import fresh_state, same, train_config, weights

PLAIN = train_config(balance=(), clip=0.0)


def gradients(parts: list[TrainBatch], config: PretrainConfig = PLAIN) -> tuple[StepResult, dict[str, Tensor]]:
    """What a step reports, and the gradients that its update is given."""
    _, train_state = fresh_state(config)
    taken: dict[str, Tensor] = {}
    optimizer = train_state.optimizer
    optimizer.step = lambda _: taken.update({n: p.grad.clone() for n, p in optimizer.params.items()})  # type: ignore
    return train_step(train_state, parts, next_token, config, 0, False), taken


def parts_of(loader: Loader, n: int, step: int = 0) -> list[TrainBatch]:
    return [loader.batch(step, i, n) for i in range(n)]


def counts(parts: list[TrainBatch]) -> list[int]:
    return [int((part.targets_T != -100).sum()) for part in parts]


def assert_same_step(left: tuple[StepResult, dict[str, Tensor]], right: tuple[StepResult, dict[str, Tensor]]) -> None:
    assert left[0].cross_entropy == pytest.approx(right[0].cross_entropy, rel=1e-6)
    assert left[0].grad_norm == pytest.approx(right[0].grad_norm, rel=1e-6)
    for name, wanted in right[1].items():
        assert float((left[1][name] - wanted).norm()) <= 1e-6 * float(wanted.norm()), name


def test_accumulation_changes_nothing(loader: Loader) -> None:
    # A step whose halves and whose quarters differ in targets: parts weigh by their targets, not equally.
    step = next(s for s in range(100) if all(len(set(counts(parts_of(loader, n, s)))) > 1 for n in (2, 4)))
    whole = gradients(parts_of(loader, 1, step))
    for n in (2, 4):
        assert_same_step(gradients(parts_of(loader, n, step)), whole)


def test_very_unequal_targets_weigh_by_their_number(loader: Loader) -> None:
    first, *rest = parts_of(loader, 4)
    few = first.targets_T.where(torch.arange(32) < 3, -100)
    none = torch.full_like(first.targets_T, -100)
    parts = [TrainBatch(first.batch, few), TrainBatch(rest[0].batch, none), *rest[1:]]
    assert counts(parts)[1] == 0 < counts(parts)[0] < 4
    whole = loader.batch(0)._replace(targets_T=torch.cat([part.targets_T for part in parts]))
    assert_same_step(gradients(parts), gradients([whole]))


def test_a_batch_without_any_target_is_no_nan(loader: Loader) -> None:
    batch = loader.batch(0)
    result, found = gradients([TrainBatch(batch.batch, torch.full_like(batch.targets_T, -100))])
    assert result.cross_entropy == 0 and all(grad.eq(0).all() for grad in found.values())


def test_what_is_reported(loader: Loader) -> None:
    config = train_config(balance=("micro_batch?weight=0.5", "z_loss?weight=0.25"), lr=1e-2, warmup=0.2)
    model, train_state = fresh_state(config)
    part = loader.batch(0)
    output = model(part.batch, targets=part.targets_T, loss_weights="mean")
    result = train_step(train_state, [part], next_token, config, 0, True)
    assert output.loss is not None and result.cross_entropy == float(output.loss.detach())  # no router loss in it
    assert 0.9 < result.aux["micro_batch"] < 4
    assert result.aux["z_loss"] == pytest.approx(math.log(4) ** 2, rel=0.1)  # fresh logits are near 0
    assert result.lr == 0.005
    assert result.layers is not None
    for layer, routing in zip(result.layers, output.routing, strict=True):
        assert layer.output_norms is not None
        norms = torch.tensor(layer.output_norms)
        assert layer == layer_stats(routing, part.batch.cu_seqlens, norms)
        assert (norms > 0).all()
    assert train_step(train_state, [part], next_token, config, 1, False).layers is None


def test_clipping_limits_the_update_not_the_report(loader: Loader) -> None:
    _, free = gradients(parts_of(loader, 1))
    result, found = gradients(parts_of(loader, 1), PLAIN.replace(clip=0.01))
    total = math.sqrt(sum(float(g.square().sum()) for g in found.values()))
    assert result.grad_norm > 0.1 and total == pytest.approx(0.01, rel=1e-4)
    assert result.grad_norm == pytest.approx(math.sqrt(sum(float(g.square().sum()) for g in free.values())), rel=1e-5)


def test_one_batch_is_learnt_by_heart(loader: Loader) -> None:
    config = train_config(steps=60, lr=2e-2, rows=2)
    _, train_state = fresh_state(config)
    part = loader.batch(0, 0, 2)
    losses = [train_step(train_state, [part], next_token, config, step, False).cross_entropy for step in range(60)]
    assert losses[0] > 5 and losses[-1] < 0.1


# -- non-finite numbers ------------------------------------------------------------------------------------------------


def after_two_steps(loader: Loader, config: PretrainConfig) -> tuple[Mixtral, TrainState]:
    model, train_state = fresh_state(config)
    for step in range(2):
        train_step(train_state, [loader.batch(step)], next_token, config, step, False)
    return model, train_state


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("factor", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["layers.1.ffn.experts.w2", "layers.0.ffn.router.weight", "norm.weight"])
def test_a_non_finite_gradient_stops_before_the_update(loader: Loader, dtype: str, factor: float, name: str) -> None:
    config = train_config(dtype=dtype)
    model, train_state = after_two_steps(loader, config)
    before, state = weights(model), {k: v.clone() for k, v in train_state.state_dict()["optimizer"].items()}
    masters = {n: p.detach().clone() for n, p in train_state.optimizer.params.items()}
    dict(model.named_parameters())[name].register_hook(lambda grad: grad * factor)
    with pytest.raises(NonFiniteLoss) as caught:
        train_step(train_state, [loader.batch(2)], next_token, config, 2, False)
    assert str(caught.value).startswith("step 3: the gradient norm is ") and f"first in {name};" in str(caught.value)
    assert same(weights(model), before) and same(train_state.state_dict()["optimizer"], state)
    assert same({n: p.detach() for n, p in train_state.optimizer.params.items()}, masters)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_non_finite_loss_stops_before_the_update(loader: Loader, dtype: str) -> None:
    config = train_config(dtype=dtype)
    model, train_state = after_two_steps(loader, config)
    with torch.no_grad():
        model.norm.weight[0] = math.nan
    before, state = weights(model), {k: v.clone() for k, v in train_state.state_dict()["optimizer"].items()}
    with pytest.raises(NonFiniteLoss, match=r"^step 3: cross_entropy is nan; [^\n]+$"):
        train_step(train_state, [loader.batch(2)], next_token, config, 2, False)
    assert all(torch.equal(p.detach().nan_to_num(7), before[n].nan_to_num(7)) for n, p in model.named_parameters())
    assert same(train_state.state_dict()["optimizer"], state)


def test_a_router_loss_that_is_not_finite_is_named(loader: Loader) -> None:
    config = train_config()
    model, train_state = fresh_state(config)
    with torch.no_grad():
        model.layers[0].ffn.router.weight.mul_(1e25)
    with pytest.raises(NonFiniteLoss, match=r"^step 1: z_loss is inf"):
        train_step(train_state, [loader.batch(0)], next_token, config, 0, False)
