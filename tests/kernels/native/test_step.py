"""The native step against the model on reference ops, and against itself: any batch, chunks, blocks, threads, layers.

Bound: native code adds up norms, scores and softmax in another order than torch, some 1e-6 of a value apart. A value
that then falls on the other side of a rounding of the next product's input moves by a whole step: 2^-8 of itself in
bf16, 1/127 of its group's largest in int8. Few do, and each is one of many terms of a sum: logits may differ by 3 % of
the largest. A wrong term, weight or position moves them by far more than that.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from mixtral.engine.native import step_weights
from mixtral.errors import UsageError
from mixtral.kernels.native import library as native
from mixtral.kernels.native import plan
from mixtral.kernels.native.plan import ExpertWeights, ModelWeights, Weight
from mixtral.kernels.native.step import Result, Span, Step
from mixtral.model.rope import rotary_angles
from mixtral.quant.formats import INT8, quantise
from tests.kernels.step_models import SHAPES, Cached, config, oracle, packed_model, tokens

pytestmark = pytest.mark.skipif(bool(native.available()), reason=f"no native step: {native.available()}")
FORMATS = ["fp32", "fp16", "bf16", "int8", "int4"]
BOUND = 0.03


def close(got: Tensor | None, want: Tensor | None) -> None:
    assert got is not None and want is not None and got.shape == want.shape
    assert (got - want).abs().max() <= BOUND * want.abs().max()


def same(a: Result, b: Result, rows: Tensor | None = None) -> None:
    """Bit for bit: `b` and the rows of `a`."""
    for name in Result._fields:
        mine, theirs = getattr(a, name), getattr(b, name)
        if rows is not None:
            mine = mine[rows] if name in ("x_TD", "logits_RV") else mine[:, rows]
        assert torch.equal(mine, theirs), name


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_step_equals_the_model(shape: str, name: str) -> None:
    """A chunk of each of three sequences, then single tokens: what one pass over the whole sequences says."""
    model = packed_model(config(**SHAPES[shape]), name)
    texts = [tokens(n, seed=n) for n in (17, 1, 40)]
    cached = Cached(model, 3)
    parts = [cached.run({i: text[:n] for (i, text), n in zip(enumerate(texts), (12, 1, 38), strict=True)})]
    parts += [cached.run({0: texts[0][i : i + 1], 2: texts[2][i + 26 : i + 27]}) for i in (12, 13)]
    parts.append(cached.run({0: texts[0][14:]}))
    want = oracle(model, [texts[0], texts[1], texts[2]])
    order = [*range(12), 17, *range(18, 56), 12, 56, 13, 57, 14, 15, 16]
    close(torch.cat([p.logits_RV for p in parts if p.logits_RV is not None]), want.logits[order])
    for layer, routing in enumerate(want.routing):
        close(torch.cat([p.router_logits_LTE[layer] for p in parts]), routing.logits_TE[order])
        close(torch.cat([p.weights_LTK[layer] for p in parts]), routing.weights_TK[order])
        agree = torch.cat([p.experts_LTK[layer] for p in parts]) == routing.experts_TK[order]
        assert agree.float().mean() > 0.97  # near ties may fall either way


def test_a_bf16_cache_rounds_keys_and_values_alone() -> None:
    model, text = packed_model(config(**SHAPES["dense"]), "bf16"), tokens(30)  # no router, which might choose otherwise
    exact, rounded = (Cached(model, 1, dtype=dtype) for dtype in (torch.float32, torch.bfloat16))
    want, got = exact.run({0: text}).logits_RV, rounded.run({0: text}).logits_RV
    assert torch.equal(rounded.pools[0][0, :, :, :30], exact.pools[0][0, :, :, :30].bfloat16())  # of the first layer
    assert want is not None and got is not None and not torch.equal(got, want)
    assert (got - want).abs().max() <= 0.05 * want.abs().max()


@pytest.fixture
def _threads_as_before() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("_threads_as_before")
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("shape", SHAPES)
def test_bits_do_not_depend_on_batch_chunks_blocks_or_threads(shape: str, name: str) -> None:
    model = packed_model(config(**SHAPES[shape]), name)
    texts = [tokens(n, seed=n) for n in (70, 3, 33)]
    torch.set_num_threads(1)
    whole = Cached(model, 3, size=70).run(dict(enumerate(texts)))
    torch.set_num_threads(3)
    same(Cached(model, 3, blocks=14, size=5).run(dict(enumerate(texts))), whole)
    torch.set_num_threads(2)
    begin = 0
    for text in texts:
        alone, done = Cached(model, 1, blocks=10, size=7), 0
        for n in (1, 20, 1, 1, 2, len(text)):
            part = alone.run({0: text[done : done + n]})
            same(whole, part, torch.arange(begin + done, begin + min(done + n, len(text))))
            done = min(done + n, len(text))
            if done == len(text):
                break
        begin += len(text)


def test_a_pool_of_the_window_alone_is_enough() -> None:
    """Slots are used again as soon as no row of the call can see what they held."""
    model, text = packed_model(config(sliding_window=11), "bf16"), tokens(60)
    want = Cached(model, 1).run({0: text})
    for blocks, size in ((1, 11), (3, 4)):
        ring, done = Cached(model, 1, blocks=blocks, size=size), 0
        for n in (5, 1, 25, 1, 13, 15):
            same(want, ring.run({0: text[done : done + n]}), torch.arange(done, done + n))
            done += n


def test_a_range_of_layers() -> None:
    model, text = packed_model(config(n_layers=3), "int8"), tokens(9)
    whole = Cached(model, 1).run({0: text})
    cached, source = Cached(model, 1), torch.tensor(text)
    span = Span(9, 0, cached.pools[0], [0])
    first = cached.step.run(source, [span], cached.angles, None, layers=range(1))
    assert first.logits_RV is None and len(first.experts_LTK) == 1
    rest = cached.step.run(first.x_TD, [span], cached.angles, torch.arange(9), layers=range(1, 3))
    assert torch.equal(rest.logits_RV, whole.logits_RV) and torch.equal(rest.x_TD, whole.x_TD)
    assert torch.equal(torch.cat((first.experts_LTK, rest.experts_LTK)), whole.experts_LTK)


def test_wanted_rows_and_k() -> None:
    model, text = packed_model(config(), "bf16"), tokens(9)
    whole = Cached(model, 1).run({0: text})
    wanted = torch.tensor([8, 2, 2])
    some = Cached(model, 1).run({0: text}, wanted=wanted)
    assert torch.equal(some.logits_RV, whole.logits_RV[wanted])
    assert Cached(model, 1).run({0: text}, wanted=wanted[:0]).logits_RV.shape == (0, 50)
    same(Cached(model, 1).run({0: text}, k=2), whole)
    all_experts = Cached(model, 1).run({0: text}, k=8)
    assert all_experts.experts_LTK.sort(-1).values.eq(torch.arange(8)).all()
    assert torch.allclose(all_experts.weights_LTK, all_experts.router_logits_LTE.softmax(-1).sort(-1, True).values)
    nothing = Cached(model, 1).run({})
    assert nothing.logits_RV.shape == (0, 50) and nothing.experts_LTK.shape == (2, 0, 2)


def test_equal_logits_go_to_the_lower_index() -> None:
    model = packed_model(config(), "bf16")
    for block in model.layers:
        block.ffn.router.weight[:] = block.ffn.router.weight[:1]
    out = Cached(model, 1).run({0: tokens(5)})
    assert out.experts_LTK.eq(torch.tensor([0, 1])).all() and out.weights_LTK.eq(0.5).all()


def test_only_the_rows_own_slots_are_written() -> None:
    cached = Cached(packed_model(config(), "bf16"), 1, blocks=4, size=4)
    cached.run({0: tokens(6)})
    used = torch.zeros(4, 4, dtype=torch.bool)
    for position in range(6):
        used[cached.tables[0][position // 4], position % 4] = True
    written = ~cached.pools[0].isnan().all(-1).all(-1)  # [L, blocks, 2, slots]
    assert written.eq(used[None, :, None]).all()


@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512"])
def test_every_instruction_set(isa: str) -> None:
    model, text = packed_model(config(), "int8"), tokens(40)
    best = Cached(model, 1).run({0: text})
    try:
        native.set_instruction_set(isa)
    except UsageError as error:
        pytest.skip(str(error))
    try:
        close(Cached(model, 1).run({0: text}).logits_RV, best.logits_RV)
    finally:
        native.set_instruction_set(None)


def test_a_nan_stays_in_its_row() -> None:
    model, text = packed_model(config(), "bf16"), tokens(6)
    want = Cached(model, 1).run({0: text[:5]})
    model.embedding.weight[text[5]] = float("nan")
    assert text[5] not in text[:5]
    out = Cached(model, 1).run({0: text})
    assert torch.equal(out.logits_RV[:5], want.logits_RV) and out.logits_RV[5].isnan().all()


# -- errors ------------------------------------------------------------------------------------------------------------

POOL = torch.zeros(2, 1, 2, 8, 2, 16)
FIVE = torch.arange(5)
ANGLES = rotary_angles(torch.arange(8), 16, 1e4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"source": FIVE - 1}, r"a token id is not one of 0\.\.49"),
        ({"source": FIVE * 20}, r"a token id is not one of 0\.\.49"),
        ({"source": FIVE.int()}, r"tokens must be a contiguous int64 \[5\]"),
        ({"source": torch.zeros(5, 63)}, r"rows must be a contiguous float32 \[5, 64\]"),
        ({"spans": [Span(4, 0, POOL, [0])]}, r"5 rows in spans of \[4\]"),
        ({"spans": [Span(5, 0, POOL, [0]), Span(0, 0, POOL, [0])]}, r"5 rows in spans of \[5, 0\]"),
        ({"spans": [Span(5, 4, POOL, [0])]}, "8 slots for positions 4..8; 9 are needed"),
        ({"spans": [Span(5, -1, POOL, [0])]}, "8 slots for positions -1..3"),
        ({"spans": [Span(5, 0, POOL, [1])]}, r"a block that is not one of 0\.\.0"),
        ({"spans": [Span(5, 0, POOL.half(), [0])]}, "a cache must be fp32 or bf16"),
        ({"spans": [Span(5, 0, POOL[:1], [0])]}, "a cache must be fp32 or bf16"),
        ({"spans": [Span(5, 0, POOL.transpose(4, 5).contiguous().transpose(4, 5), [0])]}, "its last axis in one"),
        ({"spans": [Span(3, 0, POOL, [0]), Span(2, 0, POOL.bfloat16(), [0])]}, "one dtype for all"),
        ({"angles": (ANGLES[0][:4], ANGLES[1][:4])}, r"rotary angles must be a contiguous float32 \[5, 8\]"),
        ({"wanted_R": torch.tensor([5])}, r"a wanted row is not one of 0\.\.4"),
        ({"k": 9}, r"k must lie in 1\.\.8"),
        ({"layers": range(3)}, r"layers must be a range within 0\.\.2"),
    ],
)
def test_what_does_not_fit_is_refused(changes: dict[str, object], message: str) -> None:
    step = Cached(packed_model(config(), "bf16"), 1).step
    good = {"source": FIVE, "spans": [Span(5, 0, POOL, [0])], "angles": ANGLES, "wanted_R": FIVE}
    step.run(**good)
    with pytest.raises(UsageError, match=message):
        step.run(**{**good, **changes})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w._replace(norm=w.norm.double()), r"norm must be a contiguous float32 \[64\]"),
        (lambda w: w._replace(embedding=w.embedding[1:]), r"embedding must be a contiguous float32 or bf.* \[50, 64\]"),
        (lambda w: w._replace(output=w.output._replace(n=49)), "output must be 50 x 64, not 49 x 64"),
        (lambda w: w._replace(output=w.output._replace(format="int8")), "packed int8 weight of 50 x 64: must be uint8"),
        (lambda w: w._replace(output=w.output._replace(packed=w.output.packed.T.contiguous().T)), "contiguous tensor"),
        (lambda w: _with_layer(w, gate=None), "8 experts without a gate given for a model of 8"),
        (lambda w: _with_layer(w, experts=w.layers[0].experts[:7]), "7 experts with a gate given for a model of 8"),
        (lambda w: _with_layer(w, experts=(_int8_up(w), *w.layers[0].experts[1:])), "gate and up weights read"),
    ],
)
def test_weights_that_do_not_fit_are_refused(change: Callable[[ModelWeights], ModelWeights], message: str) -> None:
    weights = step_weights(packed_model(config(), "bf16"))
    Step(config(), weights)
    with pytest.raises(UsageError, match=message):
        Step(config(), change(weights))


def _with_layer(weights: ModelWeights, **changes: object) -> ModelWeights:
    return weights._replace(layers=(weights.layers[0]._replace(**changes), *weights.layers[1:]))


def _int8_up(weights: ModelWeights) -> ExpertWeights:
    first = weights.layers[0].experts[0]
    return first._replace(up=Weight(quantise(torch.zeros(96, 64), INT8), "int8", 96, 64))


def test_too_many_rows_are_refused() -> None:
    cached = Cached(packed_model(config(n_layers=1), "bf16"), 1, size=513)
    with pytest.raises(UsageError, match="at most 512 rows"):
        cached.run({0: tokens(513)})


def test_structures_have_the_sizes_that_c_gives_them() -> None:
    """Fields in C's order and of C's types; a field forgotten on one side moves all that follow."""
    sizes = (ctypes.c_int64 * 6)()
    native.library().mx_step_sizes(sizes)
    mine = ("Matrix", "Expert", "Layer", "Model", "Sequence", "Plan")
    assert list(sizes) == [ctypes.sizeof(getattr(plan, name)) for name in mine]
