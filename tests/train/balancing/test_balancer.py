"""Objectives in a step: one batch or its parts, exact or running, resumed, recomputed, noisy, and what they refuse."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mixtral.data.loader import Loader, TrainBatch
from mixtral.errors import ConfigError
from mixtral.model import Ragged, named_state
from mixtral.moe import MoE, Routing, make_router
from mixtral.moe.bias_updates import centred, margins
from mixtral.moe.choice import counts_of
from mixtral.moe.losses import load_balance
from mixtral.train.balancing.balancer import Balancer
from mixtral.train.config import PretrainConfig
from mixtral.train.objective import next_token
from mixtral.train.recompute import recompute_layers
from mixtral.train.record import checkpoints
from mixtral.train.state import TrainState
from mixtral.train.step import StepResult, train_step, validate
from tests.moe.naive import routing
from tests.train.tiny_run import MakeRun, Watching, fresh_model, fresh_state, model_config, same, train_config

BIASED = {"router": "sigmoid?bias=true", "init_std": 0.3}
RULES = ["loss_free?rate=0.01", "smebu?rate=0.01", "quantile", "threshold"]


def router_for(rule: str) -> dict[str, Any]:
    return {"router": "threshold", "init_std": 0.3} if rule == "threshold" else BIASED


def config_of(*balance: str, model: dict[str, Any] | None = None, **changes: Any) -> PretrainConfig:
    shape = model_config(**(model or {"init_std": 0.3})).to_dict()
    return train_config(shape, balance=balance, clip=0.0, **changes)


def step_of(
    parts: list[TrainBatch], config: PretrainConfig, recompute: bool = False, domains: tuple[str, ...] = ()
) -> tuple[StepResult, dict[str, Tensor], TrainState]:
    """What the first step reports, the gradients that its update is given, and the optimiser after it."""
    model = fresh_model(config.model)
    if recompute:
        recompute_layers(model)
    train_state = TrainState.of(model, config, torch.float32, domains)
    taken: dict[str, Tensor] = {}
    optimizer = train_state.optimizer
    optimizer.step = lambda _: taken.update({n: p.grad.clone() for n, p in optimizer.params.items()})  # type: ignore
    return train_step(train_state, parts, next_token, config, 0, False), taken, train_state


def parts_of(loader: Loader, n: int) -> list[TrainBatch]:
    return [loader.batch(0, i, n) for i in range(n)]


def uneven(loader: Loader) -> list[TrainBatch]:
    """The same four rows in parts of one and three."""
    whole, first = loader.batch(0), loader.batch(0, 0, 4)
    n, cuts = len(first.targets_T), whole.batch.cu_seqlens
    rest = cuts[cuts >= n] - n
    packed = Ragged(whole.batch.tokens_T[n:], whole.batch.positions_T[n:], rest, int(rest.diff().max()))
    return [first, TrainBatch(packed, whole.targets_T[n:])]


def balancer_of(config: PretrainConfig, *parts: Routing, step: int = 0) -> Balancer:
    """Of one layer, whose router's buffers are as at the start, in a step that has seen these parts."""
    router = make_router(config.model)
    router.reset_buffers()
    balancer = Balancer([router], config)
    balancer.begin(step)
    for part in parts:
        balancer.observe([part])
    return balancer


def random_part(seed: int, tokens: int = 60, k: int = 2) -> Routing:
    scores_TE = (torch.randn(tokens, 4, generator=torch.Generator().manual_seed(seed)) + torch.arange(4)).softmax(-1)
    return routing(scores_TE.topk(k).indices.tolist(), scores_TE)


COLLAPSED = routing([[0, 1]] * 4)  # loads 4, 4, 0, 0


def assert_close(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    for name, wanted in right.items():
        assert float((left[name] - wanted).norm()) <= 1e-6 * float(wanted.norm()) + 1e-9, name


# -- the global batch --------------------------------------------------------------------------------------------------


Cut = Callable[[Loader], list[TrainBatch]]


@pytest.mark.parametrize("cut", [lambda x: parts_of(x, 2), lambda x: parts_of(x, 4), uneven], ids=["2", "4", "1 and 3"])
def test_exact_global_batch_is_the_same_for_any_parts(loader: Loader, cut: Cut) -> None:
    config = config_of("global_batch?weight=0.5", "z_loss?weight=0.1")
    whole, whole_grads, _ = step_of([loader.batch(0)], config)
    result, grads, _ = step_of(cut(loader), config)
    for name in ("global_batch", "z_loss"):
        assert result.aux[name] == pytest.approx(whole.aux[name], rel=1e-6)
    assert result.cross_entropy == pytest.approx(whole.cross_entropy, rel=1e-6)
    assert_close(grads, whole_grads)


def test_the_micro_form_is_not(loader: Loader) -> None:
    results = [step_of(parts_of(loader, n), config_of("micro_batch?weight=0.5"))[0].aux["micro_batch"] for n in (1, 4)]
    assert results[1] > results[0] * (1 + 1e-4)


@pytest.mark.parametrize("form", ["", "&exact=false"])
def test_in_one_part_it_is_micro_batch_to_the_bit(loader: Loader, form: str) -> None:
    micro, grads, _ = step_of([loader.batch(0)], config_of("micro_batch?weight=0.5"))
    found, same_grads, _ = step_of([loader.batch(0)], config_of("global_batch?weight=0.5" + form))
    assert found.aux["global_batch"] == micro.aux["micro_batch"] and same(grads, same_grads)


def test_the_running_form_takes_the_counts_so_far(loader: Loader) -> None:
    parts = parts_of(loader, 4)
    result, _, _ = step_of(parts, config_of("global_batch?weight=0.5&exact=false"))
    model, wanted = fresh_model(model_config(init_std=0.3)), 0.0
    counts = [torch.zeros(4), torch.zeros(4)]
    for part in parts:
        for layer, made in enumerate(model(part.batch).routing):
            counts[layer] = counts[layer] + counts_of(made.chosen_TK, 4)
            wanted += float(load_balance(made, counts_E=counts[layer]).detach()) / 8
    assert result.aux["global_batch"] == pytest.approx(wanted, rel=1e-5)


def test_counts_are_summed_over_ranks_through_one_hook(loader: Loader) -> None:
    """Another rank whose assignments all went to expert 3."""
    config = config_of("global_batch?weight=0.5", "loss_free?rate=0.01", model=BIASED)
    model, train_state = fresh_state(config)
    train_state.balancer.sum_over_ranks = lambda counts: counts + torch.tensor([0, 0, 0, 10_000])
    train_step(train_state, parts_of(loader, 2), next_token, config, 0, False)
    bias = named_state(model)["layers.0.ffn.router.bias"]
    torch.testing.assert_close(bias, 0.01 * torch.tensor([0.5, 0.5, 0.5, -1.5]))


@pytest.mark.parametrize("form", ["exact=true", "exact=false"])
def test_global_batch_takes_the_counts_of_all_ranks(form: str) -> None:
    """Two tokens here for expert 0, six of another rank for expert 3: f = (1, 0, 0, 3) / 4."""
    part = routing([[0], [0]], torch.tensor([[0.4, 0.3, 0.2, 0.1]] * 2))
    balancer = balancer_of(config_of(f"global_batch?{form}"))
    balancer.sum_over_ranks = lambda counts: counts + torch.tensor([0, 0, 0, 6])
    balancer.begin(0, [counts_of(part.chosen_TK, 4)] if form == "exact=true" else None)
    balancer.observe([part])
    (term,) = balancer.terms([part])
    assert float(term.values[0]) == pytest.approx(4 * (0.4 + 3 * 0.1) / 4)


def test_exact_and_running_forms_stand_side_by_side() -> None:
    """Of a step whose counts are all expert 3's, the first part has expert 0 alone: 4 p_3, then 4 p_0."""
    part = routing([[0], [0]], torch.tensor([[0.4, 0.3, 0.2, 0.1]] * 2))
    config = config_of("global_batch?layers=0", "global_batch?exact=false&layers=1")
    balancer = Balancer([make_router(config.model) for _ in range(2)], config)
    balancer.begin(0, [torch.tensor([0, 0, 0, 6])] * 2)
    balancer.observe([part, part])
    assert [float(term.values[0]) for term in balancer.terms([part, part])] == pytest.approx([4 * 0.1, 4 * 0.4])


def test_router_losses_weigh_parts_by_tokens_and_cross_entropy_by_targets(loader: Loader) -> None:
    config = config_of("global_batch?weight=0.5", "z_loss?weight=0.5")
    whole, halves = loader.batch(0), parts_of(loader, 2)
    few_T = halves[0].targets_T.where(torch.arange(len(halves[0].targets_T)) < 5, -100)
    halves[0] = halves[0]._replace(targets_T=few_T)
    whole = whole._replace(targets_T=torch.cat([half.targets_T for half in halves]))
    wanted, exact, _ = step_of([whole], config)
    found, grads, _ = step_of(halves, config)
    assert found.cross_entropy == pytest.approx(wanted.cross_entropy, rel=1e-6)
    assert found.aux == pytest.approx(wanted.aux, rel=1e-6)
    assert_close(grads, exact)


@pytest.mark.parametrize("recompute", [False, True])
def test_with_a_capacity_both_passes_count_and_drop_alike(loader: Loader, recompute: bool) -> None:
    """Each part's own capacity: the second pass replays the choice of before the drops, and drops from it again."""
    config = config_of("global_batch", model={"router": "topk?capacity_factor=0.6", "init_std": 0.3})
    result, grads, train_state = step_of(parts_of(loader, 2), config, recompute)
    balancer, chosen = train_state.balancer, 2 * len(loader.batch(0).targets_T)
    assert balancer.known is not None and [int(counts.sum()) for counts in balancer.known] == [chosen] * 2
    assert all(torch.equal(a, b) for a, b in zip(balancer.known, balancer.counts, strict=True))
    assert result.cross_entropy > 0 and all(grad.isfinite().all() for grad in grads.values())


def test_dropped_assignments_are_told(loader: Loader) -> None:
    config = config_of(model={"router": "topk?capacity_factor=0.6", "init_std": 0.3})
    _, train_state = fresh_state(config)
    layers = train_step(train_state, [loader.batch(0)], next_token, config, 0, True).layers
    assert layers is not None and all(0.3 < layer.dropped < 0.9 for layer in layers)


def test_replayed_and_recomputed(loader: Loader) -> None:
    config = config_of("global_batch?weight=0.5")
    kept, grads, _ = step_of(parts_of(loader, 2), config)
    again, recomputed, _ = step_of(parts_of(loader, 2), config, recompute=True)
    assert kept == again and same(grads, recomputed)


# -- rules without a loss ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES)
def test_rules_see_the_whole_step_however_it_is_cut(loader: Loader, rule: str) -> None:
    config = config_of(rule, model=router_for(rule))
    moved = []
    for n in (1, 2, 4):
        result, _, train_state = step_of(parts_of(loader, n), config)
        moved.append(train_state.buffers)
        assert 0 < result.aux[rule.partition("?")[0]] < 3
    for name, buffer in moved[0].items():
        assert all(torch.allclose(buffer, other[name], atol=1e-6) for other in moved[1:]), name
        if "bias" in name:
            assert abs(float(buffer.mean())) < 1e-6 and float(buffer.abs().max()) > 0


@pytest.mark.parametrize("rule", RULES)
def test_two_ranks_of_a_part_each_are_one_of_both(rule: str) -> None:
    """What is summed over ranks: a row of counts an expert, and a histogram where the rule has one."""
    config = config_of(rule, model=router_for(rule))
    both = balancer_of(config, random_part(0), random_part(1))
    mine, other = (balancer_of(config, random_part(seed)) for seed in (0, 1))
    theirs = [*other.counts, *(r.histogram.counts_EB for r in other.rules if hasattr(r, "histogram"))]
    mine.sum_over_ranks = lambda counts: counts + next(t for t in theirs if t.shape == counts.shape)
    assert mine.update() == both.update()
    assert torch.equal(mine.rules[0].moved_E, both.rules[0].moved_E)


@pytest.mark.parametrize("k", [1, 3])
def test_quantile_rules_aim_at_k_of_e(k: int) -> None:
    part = random_part(0, tokens=2000, k=k)
    for rule, model in (("quantile", BIASED), ("threshold", router_for("threshold"))):
        balancer = balancer_of(config_of(rule, model={**model, "experts_per_token": k}), part)
        wanted = part.scores_TE.quantile(1 - k / 4, dim=0)
        if rule == "quantile":
            wanted = centred(margins(part, torch.zeros(4), k).quantile(k / 4, dim=0))
        balancer.update()
        torch.testing.assert_close(balancer.rules[0].moved_E, wanted, atol=0.01, rtol=0)


@pytest.mark.parametrize("step, weight", [(0, 0.5), (9, 0.25)])
def test_weight_is_the_share_of_the_move_that_is_made(step: int, weight: float) -> None:
    """Violation 4 / 2 - 1; the signs of mean load - load are -1, -1, 1, 1."""
    config = config_of("loss_free?rate=0.1&weight=0.5&final=0.25", model=BIASED)
    balancer = balancer_of(config, COLLAPSED, step=step)
    assert balancer.update() == {"loss_free": 1.0}
    torch.testing.assert_close(balancer.rules[0].moved_E, 0.1 * weight * torch.tensor([-1.0, -1.0, 1.0, 1.0]))


def test_smebu_goes_by_its_options() -> None:
    """From no momentum: b = m = (1 - 0.8) * 0.1 * tanh(0.5 v), v = -1, -1, 1, 1."""
    balancer = balancer_of(config_of("smebu?rate=0.1&scale=0.5&decay=0.8", model=BIASED), COLLAPSED)
    balancer.update()
    wanted = 0.02 * torch.tensor([-0.5, -0.5, 0.5, 0.5]).tanh()
    torch.testing.assert_close(balancer.rules[0].moved_E, wanted)
    torch.testing.assert_close(balancer.state()["smebu.0.momentum"], wanted)


@pytest.mark.parametrize("rule", RULES)
def test_weight_zero_is_absence(loader: Loader, rule: str) -> None:
    model = router_for(rule)
    absent, grads, before = step_of([loader.batch(0)], config_of(model=model))
    off = rule + ("&" if "?" in rule else "?") + "weight=0"
    result, same_grads, after = step_of([loader.batch(0)], config_of(off, model=model))
    assert result == absent and same(grads, same_grads) and same(before.buffers, after.buffers)


def test_threshold_is_a_mean_at_first_then_a_moving_average(loader: Loader) -> None:
    """With decay 0.6 the rates are 1, 1/2, 0.4, 0.4. Layer 0's scores hang on no threshold: they are known before."""
    config = config_of("threshold?decay=0.6", model=router_for("threshold"))
    model, train_state = fresh_state(config)
    wanted = torch.zeros(4)
    for step, rate in enumerate((1, 0.5, 0.4, 0.4)):
        part = loader.batch(step)
        with torch.no_grad():
            scores_TE = model(part.batch).routing[0].scores_TE
        wanted = wanted.lerp(scores_TE.quantile(0.5, dim=0), rate)
        train_step(train_state, [part], next_token, config, step, False)
        # The first one starts at 1/4, and the bins are wider the farther from there; then they are fine.
        found = train_state.buffers["layers.0.ffn.router.threshold"]
        torch.testing.assert_close(found, wanted, rtol=0, atol=0.01)
        wanted = found.clone()
    assert all(int(value) == 4 for value in train_state.balancer.state().values())


def test_layers_of_a_rule(loader: Loader) -> None:
    _, _, train_state = step_of([loader.batch(0)], config_of("quantile?layers=1", model=BIASED))
    moved = {name: bool(buffer.any()) for name, buffer in train_state.buffers.items()}
    assert moved == {"layers.0.ffn.router.bias": False, "layers.1.ffn.router.bias": True}


@pytest.mark.parametrize("rule", RULES[1:])
def test_killed_and_resumed_keeps_what_balancing_knows(run_in: MakeRun, tmp_path: Path, rule: str) -> None:
    config = config_of(rule, "micro_batch?weight=0.1&final=0", model=router_for(rule), steps=4, save_every=2)
    whole = run_in(tmp_path / "whole", config)
    whole.train()

    def killed(step: int) -> None:
        if step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_in(tmp_path / "killed", config, Watching(killed)).train()
    again = run_in(tmp_path / "killed", config)
    again.writer.wait()
    again.resume(checkpoints(tmp_path / "killed")[-1])
    assert again.progress.step == 2
    again.train()
    assert same(again.state.weights, whole.state.weights)
    assert same(again.state.state_dict()["optimizer"], whole.state.state_dict()["optimizer"])
    metrics = [(tmp_path / name / "metrics.jsonl").read_bytes() for name in ("whole", "killed")]
    assert metrics[0] == metrics[1]


# -- noise, modes ------------------------------------------------------------------------------------------------------


def test_noise_hangs_on_seed_step_and_part_alone(loader: Loader) -> None:
    config = config_of("global_batch?weight=0.5", model={"router": "noisy", "init_std": 0.3})
    results = []
    for drawn in (1, 2):
        torch.manual_seed(drawn)
        results.append(step_of(parts_of(loader, 2), config))
    assert results[0][0] == results[1][0] and same(results[0][1], results[1][1])
    other = step_of(parts_of(loader, 2), config.replace(seed=5))[0]
    assert other.cross_entropy != results[0][0].cross_entropy
    kept, recomputed = step_of(parts_of(loader, 2), config), step_of(parts_of(loader, 2), config, recompute=True)
    assert kept[0] == recomputed[0] and same(kept[1], recomputed[1])


def test_training_and_evaluation_modes(loader: Loader) -> None:
    config = config_of(model={"router": "noisy", "init_std": 0.3})
    model, train_state = fresh_state(config)
    seen = []
    model.embedding.register_forward_hook(lambda *_: seen.append(model.training))
    model.eval()
    train_step(train_state, [loader.batch(0)], next_token, config, 0, False)
    assert model.training
    lengths = torch.ones(model.config.vocab_size, dtype=torch.int64)
    first, second = (validate(model, loader.val_batches(64), lengths) for _ in range(2))
    assert first == second and model.training and set(seen[1:]) == {False} and seen[0]
    model.eval()
    validate(model, loader.val_batches(64), lengths)
    assert not model.training


def test_expert_choice_is_validated_as_it_is_trained(loader: Loader) -> None:
    model = fresh_model(model_config(router="expert_choice", init_std=0.3))
    lengths = torch.ones(model.config.vocab_size, dtype=torch.int64)
    found = validate(model, loader.val_batches(64), lengths)
    assert all(sum(loads) == pytest.approx(1) for loads in found.loads) and model.training


# -- domains and a price -----------------------------------------------------------------------------------------------


def test_guided_reads_the_domains(loader: Loader) -> None:
    config = config_of("guided?weight=2")
    part = loader.batch(0)
    domains_T = torch.arange(len(part.targets_T)) % 3 - 1
    result, grads, _ = step_of([part._replace(domains_T=domains_T)], config, domains=("code", "prose"))
    assert 0.3 < result.aux["guided"] < 3
    assert not same(grads, step_of([part], config_of())[1])
    explicit = config_of("guided?weight=2&groups=0-1/2,3")
    assert step_of([part._replace(domains_T=domains_T)], explicit, domains=("code", "prose"))[0] == result
    unknown = part._replace(domains_T=torch.full_like(domains_T, -1))
    assert step_of([unknown], config, domains=("code", "prose"))[0].aux["guided"] == 0.0


def test_a_price_for_k(loader: Loader) -> None:
    config = config_of("k_price?weight=0.5", model={"router": "learned_k", "init_std": 0.3})
    result, grads, _ = step_of([loader.batch(0)], config)
    _, free, _ = step_of([loader.batch(0)], config.replace(balance=()))
    assert 1 <= result.aux["k_price"] <= 4
    assert not torch.equal(grads["layers.0.ffn.router.k_weight"], free["layers.0.ffn.router.k_weight"])


@pytest.mark.parametrize("spec, price", [("k_price", 2.5), ("k_price?target=2", 0.25)])
def test_a_price_by_hand(spec: str, price: float) -> None:
    part = COLLAPSED.tokens(0, 2)._replace(k_T=torch.tensor([1.0, 4.0]))
    (term,) = balancer_of(config_of(spec, model={"router": "learned_k"}), part).terms([part])
    assert float(term.values[0]) == price


# -- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "spec, model, domains, message",
    [
        ("loss_free", {}, (), "balance loss_free: the router of layer 0 has no bias; choose model.router=topk[?]bias"),
        ("smebu?layers=1", {}, (), "balance smebu: the router of layer 1 has no bias"),
        ("threshold", BIASED, (), "has no threshold; choose model.router=threshold"),
        ("quantile", {**BIASED, "experts_per_token": 4}, (), "balance quantile: 4 of 4 experts a token leaves nothing"),
        ("k_price", {}, (), "balance k_price: the router learns no k; choose model.router=learned_k"),
        ("guided", {}, (), "balance guided: the data has one domain alone; name them with [?]domain=NAME"),
        ("guided", {}, tuple("abcde"), "balance guided: 5 domains for 4 experts; give fewer domains"),
        ("guided?groups=0/1/2", {}, ("a", "b"), r"balance guided: 3 groups for 2 domains \(a, b\)"),
        ("guided?groups=0/4", {}, ("a", "b"), r"balance guided: groups name expert 4, but there are 0..3"),
    ],
)
def test_what_does_not_fit_is_refused_at_the_start(
    spec: str, model: dict[str, Any], domains: tuple[str, ...], message: str
) -> None:
    config = config_of(spec, model=model)
    with pytest.raises(ConfigError, match=message) as caught:
        TrainState.of(fresh_model(config.model), config, torch.float32, domains)
    assert "\n" not in str(caught.value)


def test_guided_without_labels_in_the_batch_is_refused(loader: Loader) -> None:
    with pytest.raises(ConfigError, match="balance guided: the batch carries no domains"):
        step_of([loader.batch(0)], config_of("guided"), domains=("a", "b"))


def test_every_sparse_layer_is_balanced() -> None:
    model, train_state = fresh_state(config_of(*RULES[:1], model=BIASED))
    assert len(train_state.balancer.rules) == sum(isinstance(m, MoE) for m in model.modules()) == 2


@pytest.mark.parametrize("rule", RULES)
def test_a_rule_moves_the_router_whose_routing_it_watched(loader: Loader, rule: str) -> None:
    """Layers 0 and 2 are dense. Oracle: each sparse layer's router alone, as a model of one layer."""
    shape = {"n_layers": 4, "experts_by_layer": (1, 4, 1, 4)}
    config, alone = (config_of(rule, model={**router_for(rule), **s}) for s in (shape, {"n_layers": 1}))
    model, train_state = fresh_state(config)
    part = loader.batch(0)
    with torch.no_grad():
        routings = model(part.batch).routing
    wanted = {}
    for layer, seen in zip((1, 3), routings, strict=True):
        router = copy.deepcopy(model.layers[layer].ffn.router)
        balancer = Balancer([router], alone)
        balancer.begin(0)
        balancer.observe([seen])
        balancer.update()
        wanted[layer] = balancer.rules[0].moved_E
    train_step(train_state, [part], next_token, config, 0, False)
    assert [r.layer for r in train_state.balancer.rules] == [1, 3] and not torch.equal(wanted[1], wanted[3])
    for moved in train_state.balancer.rules:
        torch.testing.assert_close(moved.moved_E, wanted[moved.layer])
        buffer = train_state.buffers[f"layers.{moved.layer}.ffn.router.{moved.options.buffer}"]
        assert torch.equal(buffer, moved.moved_E)
