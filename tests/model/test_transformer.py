from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from mixtral import kernels
from mixtral.config import ModelConfig
from mixtral.errors import UsageError
from mixtral.model import Mixtral, Ragged, initialise
from mixtral.model.linear import Linear
from tests.model import small


@pytest.fixture(params=small.SHAPES)
def config(request: pytest.FixtureRequest) -> ModelConfig:
    return small.config(**small.SHAPES[request.param])


def _loss_and_gradients(model: Mixtral, batch: Ragged, backend: str) -> dict[str, Tensor]:
    targets = small.targets(batch, model.config.vocab_size)
    with kernels.use_backend(backend):
        loss = model(batch, targets=targets, loss_weights="mean").loss
        grads = torch.autograd.grad(loss, list(model.parameters()))
    return {"loss": loss.detach(), **dict(zip((n for n, _ in model.named_parameters()), grads, strict=True))}


@pytest.mark.parametrize("lengths", [(7,), (1,), (5, 5), (4, 1, 9)], ids=str)
def test_torch_equals_reference_in_loss_and_every_gradient(config: ModelConfig, lengths: tuple[int, ...]) -> None:
    model, batch = small.model(config), small.batch(config.vocab_size, *lengths)
    fast, slow = (_loss_and_gradients(model, batch, backend) for backend in ("torch", "reference"))
    assert fast["loss"].item() == pytest.approx(slow["loss"].item(), rel=1e-6)
    for name, want in slow.items():
        assert (fast[name] - want).abs().max() <= 2e-5 * want.abs().max() + 1e-7, name


@pytest.mark.parametrize("size", [(64, 32, 1), (512, 64, 4), (3000, 128, 2)], ids=str)
@pytest.mark.parametrize("changes", [{}, {"tie_embeddings": True}, {"n_experts": 1, "experts_per_token": 1}], ids=str)
def test_a_fresh_model_has_the_loss_of_a_uniform_guess(size: tuple[int, int, int], changes: dict[str, int]) -> None:
    vocab, dim, layers = size
    shape = small.config(vocab_size=vocab, dim=dim, n_layers=layers, head_dim=16, ffn_dim=2 * dim, **changes)
    model = initialise(Mixtral(shape), torch.Generator().manual_seed(0))
    batch = small.batch(vocab, 100, 100)
    with torch.no_grad():
        loss = model(batch, targets=small.targets(batch, vocab), loss_weights="mean").loss
    assert loss.item() == pytest.approx(math.log(vocab), rel=0.02)


INITIALISED = {
    "sparse": {"shared_experts": 1},
    "dense": {"n_experts": 1, "experts_per_token": 1},
    "tied": {"tie_embeddings": True},
    "noisy": {"router": "noisy?bias=true"},
    "learned_k": {"router": "learned_k?most=3"},
}


def _stated_std(name: str, tied: bool) -> float:
    """By the docstring of `initialise`, for init_std 0.03, 8 layers and a width of 64."""
    if name == "output.weight" or (tied and name == "embedding.weight"):
        return 0.1 / 8
    if name.endswith(".noise_weight"):
        return 0.0
    return 0.03 / 4 if name.endswith((".wo.weight", ".w2")) else 0.03


@pytest.mark.parametrize("changes", INITIALISED.values(), ids=INITIALISED)
def test_initialisation_is_what_it_says_and_repeats(changes: dict[str, Any]) -> None:
    """The mean and deviation of every parameter, within four deviations of what chance does; its shape, by the largest.

    Each slice along the first axis by itself too, so that no expert, gate or head is an exception.
    """
    shape = small.config(vocab_size=400, dim=64, n_layers=8, ffn_dim=100, head_dim=32, init_std=0.03, **changes)
    models = [initialise(Mixtral(shape), torch.Generator().manual_seed(5)) for _ in range(2)]
    for (name, weight), again in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        assert torch.equal(weight, again), name
        if weight.dim() == 1:
            assert (weight == 1).all()
            continue
        std = _stated_std(name, shape.tie_embeddings)
        for part in (weight, *(weight.flatten(0, -3) if weight.dim() > 2 else ())):
            n = part.numel()
            assert abs(part.mean().item()) <= 4.5 * std / n**0.5, name
            assert abs(part.std().item() - std) <= 4.5 * std / (2 * n) ** 0.5, name
            assert part.abs().max().item() <= 6 * std, name
            assert not std or part.abs().max().item() >= 1.8 * std, f"{name}: normal, not uniform"


def test_no_two_initialised_parameters_are_the_same_numbers() -> None:
    model = initialise(Mixtral(small.config(shared_experts=2)), torch.Generator().manual_seed(5))
    rows = [row for _, p in model.named_parameters() if p.dim() > 1 for row in p.detach().flatten(0, -2)]
    firsts = [(row[:8] / row[0]).round(decimals=4) for row in rows]  # whatever their scale
    assert len({tuple(first.tolist()) for first in firsts}) == len(rows)


def test_another_generator_gives_other_weights_and_none_takes_torch_s_own() -> None:
    a, b = (initialise(Mixtral(small.config()), torch.Generator().manual_seed(seed)) for seed in (5, 6))
    assert all(not torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True) if p.dim() > 1)
    torch.manual_seed(5)
    c = initialise(Mixtral(small.config()))
    torch.manual_seed(5)
    d = initialise(Mixtral(small.config()))
    assert all(torch.equal(p, q) for p, q in zip(c.parameters(), d.parameters(), strict=True))


def test_targets_give_the_cross_entropy_of_the_logits(config: ModelConfig) -> None:
    model, batch = small.model(config), small.batch(config.vocab_size, 4, 1, 9)
    targets = small.targets(batch, config.vocab_size)
    with_targets, without = model(batch, targets=targets, loss_weights="mean"), model(batch)
    assert with_targets.logits is None and without.loss is None
    assert without.logits.dtype == torch.float32
    torch.testing.assert_close(with_targets.loss, torch.nn.functional.cross_entropy(without.logits, targets))


def test_rows_are_those_of_all_logits(config: ModelConfig) -> None:
    model, batch = small.model(config), small.batch(config.vocab_size, 4, 1, 9)
    rows = torch.tensor([13, 3, 4, 3])
    torch.testing.assert_close(model(batch, rows=rows).logits, model(batch).logits[rows], rtol=1e-5, atol=1e-5)


def test_one_routing_a_sparse_layer_and_none_for_a_dense_one(config: ModelConfig) -> None:
    routing = small.model(config)(small.batch(config.vocab_size, 5)).routing
    assert len(routing) == (config.n_layers if config.is_sparse else 0)
    for layer in routing:
        assert layer.experts_TK.shape == (5, config.experts_per_token)
        assert layer.logits_TE.shape == (5, config.n_experts)


def test_sequences_do_not_see_each_other(config: ModelConfig) -> None:
    """Bit for bit. The choice is replayed: another choice would change the shapes of the products, hence roundings."""
    model, batch = small.model(config), small.batch(config.vocab_size, 4, 3, 5)
    with torch.no_grad():
        before = model(batch)
        replay = [layer.experts_TK for layer in before.routing] or None
        before = model(batch, replay=replay)
        changed = batch.tokens_T.clone()
        changed[4:7] = (changed[4:7] + 1) % config.vocab_size
        after = model(batch._replace(tokens_T=changed), replay=replay)
    others = [0, 1, 2, 3, 7, 8, 9, 10, 11]
    assert torch.equal(before.logits[others], after.logits[others])
    assert (before.logits[4:7] != after.logits[4:7]).any(-1).all()


def test_a_packed_sequence_equals_itself_alone(config: ModelConfig) -> None:
    model, batch = small.model(config), small.batch(config.vocab_size, 4, 3, 5)
    with torch.no_grad():
        alone = model(Ragged.of([batch.tokens_T[4:7].tolist()])).logits
        torch.testing.assert_close(model(batch).logits[4:7], alone, rtol=1e-5, atol=1e-5)


def test_later_tokens_do_not_reach_back(config: ModelConfig) -> None:
    model, batch = small.model(config), small.batch(config.vocab_size, 8)
    with torch.no_grad():
        whole = model(batch).logits
        part = model(Ragged.of([batch.tokens_T[:5].tolist()])).logits
    torch.testing.assert_close(whole[:5], part, rtol=1e-5, atol=1e-5)


def test_a_window_bounds_what_a_token_reads() -> None:
    """Two layers of window 3 reach back 4 positions and no further."""
    model = small.model(small.config(sliding_window=3, n_experts=1, experts_per_token=1))
    batch = small.batch(50, 9)
    with torch.no_grad():
        before = model(batch).logits[8]
        for place, reaches in ((3, False), (4, True)):
            changed = batch.tokens_T.clone()
            changed[place] = (changed[place] + 1) % 50
            assert torch.equal(model(batch._replace(tokens_T=changed)).logits[8], before) != reaches


@pytest.mark.parametrize("lengths", [(), (0,), (3, 0, 2)], ids=str)
def test_empty_batches_and_sequences(config: ModelConfig, lengths: tuple[int, ...]) -> None:
    model, batch = small.model(config), small.batch(config.vocab_size, *lengths)
    out = model(batch)
    assert out.logits.shape == (sum(lengths), config.vocab_size)
    model(batch, targets=small.targets(batch, config.vocab_size), loss_weights="mean").loss.backward()
    if sum(lengths):
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_replaying_a_model_repeats_loss_and_gradients() -> None:
    shape = small.config()
    model, batch = small.model(shape), small.batch(50, 6, 8)
    targets = small.targets(batch, 50)
    first = model(batch, targets=targets, loss_weights="mean")
    again = model(batch, targets=targets, loss_weights="mean", replay=[layer.experts_TK for layer in first.routing])
    assert torch.equal(first.loss, again.loss)
    grads = [torch.autograd.grad(out.loss, list(model.parameters())) for out in (first, again)]
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_replay_takes_the_choice_it_is_given() -> None:
    model, batch = small.model(small.config()), small.batch(50, 6)
    choice = [torch.tensor([[0, 3]] * 6), torch.tensor([[2, -1]] * 6)]
    routing = model(batch, replay=choice).routing
    assert all(torch.equal(layer.experts_TK, want) for layer, want in zip(routing, choice, strict=True))


def test_forward_leaves_no_state_behind(config: ModelConfig) -> None:
    model = small.model(config)
    attributes = {name: set(vars(module)) for name, module in model.named_modules()}
    targets = torch.zeros(5, dtype=torch.int64)
    model(small.batch(config.vocab_size, 5), targets=targets, loss_weights="mean").loss.backward()
    assert not list(model.buffers())
    assert attributes == {name: set(vars(module)) for name, module in model.named_modules()}


def test_bf16_is_close_to_fp32_on_the_same_choice(config: ModelConfig) -> None:
    batch = small.batch(config.vocab_size, 20)
    targets = small.targets(batch, config.vocab_size)
    low = small.model(config, std=0.2).bfloat16()
    high = small.model(config, std=0.2)
    high.load_state_dict(low.state_dict())  # the same, already rounded, weights
    exact = high(batch, targets=targets, loss_weights="mean")
    out = low(batch, targets=targets, loss_weights="mean", replay=[layer.experts_TK for layer in exact.routing] or None)
    assert out.loss.dtype == low(batch).logits.dtype == torch.float32
    assert out.loss.item() == pytest.approx(exact.loss.item(), rel=0.01)
    grads = [torch.autograd.grad(o.loss, list(m.parameters())) for o, m in ((out, low), (exact, high))]
    for (name, _), got, want in zip(low.named_parameters(), *grads, strict=True):
        assert got.dtype == torch.bfloat16
        assert (got.float() - want).norm() <= 0.06 * want.norm(), name


def test_an_output_that_does_more_than_its_weight_says_is_respected_in_the_loss() -> None:
    """A subclass, a hook, a method: the loss by targets is that of the logits, an adapter's gradient arrives."""

    class Adapted(Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * self.scale

    batch = small.batch(50, 7, 5)
    targets = small.targets(batch, 50)
    adapted, hooked, given = (small.model(small.config()) for _ in range(3))
    adapted.output.__class__ = Adapted
    adapted.output.scale = torch.nn.Parameter(torch.tensor(3.0))
    hooked.output.register_forward_hook(lambda _, __, logits: 3 * logits)
    own = given.output.forward
    given.output.forward = lambda x: 3 * own(x)
    want = torch.nn.functional.cross_entropy(3 * small.model(small.config())(batch).logits, targets)
    for model in (adapted, hooked, given):
        torch.testing.assert_close(model(batch, targets=targets, loss_weights="mean").loss, want)
    adapted(batch, targets=targets, loss_weights="mean").loss.backward()
    assert adapted.output.scale.grad.abs() > 0


def test_other_parts_are_respected(config: ModelConfig) -> None:
    """An output and a dense feed-forward network of other classes serve logits and loss; there is no weight to read."""

    class Other(torch.nn.Module):
        def __init__(self, inner: torch.nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x)

    model, batch = small.model(config), small.batch(config.vocab_size, 7, 5)
    targets = small.targets(batch, config.vocab_size)
    logits, loss = model(batch).logits, model(batch, targets=targets, loss_weights="mean").loss
    if model.output is not None:
        model.output = Other(model.output)
        with pytest.raises(UsageError, match="this model's output is packed and has none; ask for its logits"):
            _ = model.output_weight
    if not config.is_sparse:
        model.layers[0].ffn = Other(model.layers[0].ffn)
    assert torch.equal(model(batch).logits, logits)
    assert model(batch, targets=targets, loss_weights="mean").loss.item() == pytest.approx(loss.item(), rel=1e-6)
