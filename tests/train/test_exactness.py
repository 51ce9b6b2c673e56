"""Numbers that must not hang on how a step is computed: in bf16, in parts, or with activations computed again."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, silu

from mixtral.data.loader import TrainBatch
from mixtral.kernels.torch import matmul
from mixtral.model import Ragged
from mixtral.moe import MoE, Routing
from mixtral.moe.choice import taken
from mixtral.runtime import choose_dtype
from mixtral.train.config import PretrainConfig
from mixtral.train.objective import next_token
from mixtral.train.recompute import recompute_layers
from mixtral.train.state import TrainState
from mixtral.train.step import StepResult, train_step
from tests.train.tiny_run import fresh_model, fresh_state, same, train_config

ROUNDING = 2.0**-8  # the largest relative error of one rounding to bf16
# The small preset's proportions. A gradient passes some 12 roundings a layer forward and as many backward, 48 in two
# layers. They are independent, and of 0.4 * 2^-8 root mean square each, so together about sqrt(48) * 0.4 = 2.8 of 2^-8.
BF16_ERROR = 4 * ROUNDING
BENCH_LIKE = {
    "vocab_size": 256, "dim": 64, "n_layers": 2, "n_heads": 4, "n_kv_heads": 1, "head_dim": 16, "ffn_dim": 224,
}  # fmt: skip


def random_batch(vocab_size: int, *lengths: int) -> TrainBatch:
    draw = torch.Generator().manual_seed(5)
    batch = Ragged.of([torch.randint(vocab_size, (n,), generator=draw).tolist() for n in lengths])
    return TrainBatch(batch, torch.randint(vocab_size, (sum(lengths),), generator=draw))


PATHS = pytest.mark.parametrize("through_fp32", [False, True])  # of bf16, whichever this processor would take


# -- bf16 --------------------------------------------------------------------------------------------------------------


def gradients_in(
    dtype: torch.dtype, config: PretrainConfig, part: TrainBatch, replay: list[Tensor] | None
) -> tuple[dict[str, Tensor], list[Tensor]]:
    """The gradients that the fp32 masters receive, and the experts taken."""
    model = fresh_model(config.model)
    train_state = TrainState.of(model, config, dtype)
    output = model(part.batch, replay=replay, targets=part.targets_T, loss_weights="mean")
    assert output.loss is not None
    output.loss.backward()
    train_state.optimizer.collect_gradients()
    return {name: p.grad for name, p in train_state.optimizer.params.items()}, [r.experts_TK for r in output.routing]


@PATHS
def test_bf16_gradients_are_fp32_s_within_rounding(through_fp32: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fp32 pass's experts are replayed: a token sent elsewhere has another gradient, not a rounded one."""
    monkeypatch.setattr(matmul, "_upcasts_on", lambda _: through_fp32)
    config = train_config(BENCH_LIKE)
    part = random_batch(256, 24, 16, 24)
    wanted, experts = gradients_in(torch.float32, config, part, None)
    found, _ = gradients_in(torch.bfloat16, config, part, experts)
    for name, exact in wanted.items():
        error = float((found[name] - exact).norm() / exact.norm())
        assert ROUNDING / 4 < error < BF16_ERROR, f"{name}: {error / ROUNDING:.2f} * 2^-8"
        assert float(cosine_similarity(found[name].flatten(), exact.flatten(), dim=0)) > 0.999, name


# -- accumulation ------------------------------------------------------------------------------------------------------


def step_gradients(parts: list[TrainBatch], config: PretrainConfig) -> tuple[StepResult, dict[str, Tensor], Tensor]:
    """What a step reports, the gradients that its update is given, and `router_terms` of its last layer."""
    model, train_state = fresh_state(config)
    gradients: dict[str, Tensor] = {}
    optimizer = train_state.optimizer
    optimizer.step = lambda _: gradients.update({n: p.grad.clone() for n, p in optimizer.params.items()})  # type: ignore
    terms_ED = router_terms(model.layers[-1].ffn)
    return train_step(train_state, parts, next_token, config, 0, False), gradients, terms_ED


def router_terms(moe: nn.Module) -> Tensor:
    """[E, D], filled by a step: the sizes of all products that the router's gradient is the sum of.

    For K = 2 that gradient is sum_t w_1 w_2 (o_1 . g - o_2 . g) x: o_k an expert's output, g the layer's gradient. What
    fp32 rounds is each of these products. They cancel, to a twentieth of their sizes where few tokens have a gradient.
    """
    assert isinstance(moe, MoE)
    terms_ED = torch.zeros_like(moe.router.weight.detach())

    def watch(_moe: nn.Module, inputs: tuple[Tensor, ...], output: tuple[Tensor, Routing]) -> None:
        x_TD, (y_TD, routing) = inputs[0].detach(), output
        w13, w2 = (w.detach()[routing.experts_TK] for w in (moe.experts.w13, moe.experts.w2))
        gate_TKF, up_TKF = torch.einsum("tkcfd,td->ctkf", w13, x_TD)
        out_TKD = torch.einsum("tkdf,tkf->tkd", w2, silu(gate_TKF) * up_TKF)

        def add(g_TD: Tensor) -> None:
            worth_T = routing.weights_TK.detach().prod(-1) * (out_TKD * g_TD[:, None]).abs().sum((1, 2))
            terms_ED.addmm_(taken(routing.experts_TK, len(terms_ED)).float().T, worth_T[:, None] * x_TD.abs())

        y_TD.register_hook(add)

    moe.register_forward_hook(watch)
    return terms_ED


def cut(whole: TrainBatch, n: int) -> list[TrainBatch]:
    """A batch of sequences of one length in `n` equal parts."""
    length = int(whole.batch.cu_seqlens[1])
    pairs = zip(whole.batch.tokens_T.chunk(n), whole.targets_T.chunk(n), strict=True)
    return [TrainBatch(Ragged.of([row.tolist() for row in tokens.split(length)]), targets) for tokens, targets in pairs]


@settings(max_examples=8)
@given(kept=st.lists(st.integers(0, 12), min_size=4, max_size=4).filter(any), parts=st.sampled_from([2, 4]))
def test_accumulation_with_any_number_of_targets_in_each_part(kept: list[int], parts: int) -> None:
    """Cross-entropy and its gradients to 1e-6 of the whole batch's, parts without targets among them.

    The router's, or to two units in the last place of its terms.
    """
    config = train_config({"n_layers": 1}, balance=(), clip=0.0)
    whole = random_batch(320, 12, 12, 12, 12)
    place = torch.arange(12)
    whole = whole._replace(targets_T=whole.targets_T.where(torch.cat([place < n for n in kept]), -100))
    wanted, exact, terms_ED = step_gradients([whole], config)
    result, found, _ = step_gradients(cut(whole, parts), config)
    assert result.cross_entropy == pytest.approx(wanted.cross_entropy, rel=1e-6)
    for name, gradient in exact.items():
        rounded = 2**-22 * float(terms_ED.norm()) if name.endswith("router.weight") else 0.0
        assert float((found[name] - gradient).norm()) <= max(1e-6 * float(gradient.norm()), rounded), name


# -- recomputed activations --------------------------------------------------------------------------------------------


@PATHS
def test_recomputed_layers_train_bit_identically_in_bf16(through_fp32: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two whole steps of two parts each, with statistics: what is reported, and masters and moments afterwards."""
    monkeypatch.setattr(matmul, "_upcasts_on", lambda _: through_fp32)
    config = train_config(dtype="bf16", accumulation=2)
    ends = []
    for recompute in (False, True):
        model = fresh_model(config.model)
        if recompute:
            recompute_layers(model)
        train_state = TrainState.of(model, config, choose_dtype(config.dtype, "cpu"))
        parts = [random_batch(320, 20, 12), random_batch(320, 7, 25)]
        results = [train_step(train_state, parts, next_token, config, step, True) for step in range(2)]
        params = {name: p.detach() for name, p in train_state.optimizer.params.items()}
        ends.append((results, params, train_state.state_dict()["optimizer"]))
    (plain, plain_weights, plain_state), (again, again_weights, again_state) = ends
    assert plain == again
    assert same(plain_weights, again_weights) and same(plain_state, again_state)
