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

from mixtral.engine.native_runner import step_weights
from mixtral.errors import UsageError
from mixtral.kernels.native import library as native
from mixtral.kernels.native import plan
from mixtral.kernels.native.plan import ModelWeights, Weight
from mixtral.kernels.native.step import Pages, Result, Routed, Span, Step
from mixtral.model.rope import rotary_angles
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
        close(torch.cat([p.router_logits_MTE[layer] for p in parts]), routing.logits_TE[order])
        close(torch.cat([p.weights_MTK[layer] for p in parts]), routing.weights_TK[order])
        agree = torch.cat([p.experts_MTK[layer] for p in parts]) == routing.experts_TK[order]
        assert agree.float().mean() > 0.97  # near ties may fall either way


def test_a_bf16_cache_rounds_keys_and_values_alone() -> None:
    model, text = packed_model(config(**SHAPES["dense"]), "bf16"), tokens(30)  # no router, which might choose otherwise
    exact, rounded = (Cached(model, 1, dtype=dtype) for dtype in (torch.float32, torch.bfloat16))
    want, got = exact.run({0: text}).logits_RV, rounded.run({0: text}).logits_RV
    assert torch.equal(rounded.pool[0, :, :, :30], exact.pool[0, :, :, :30].bfloat16())  # of the first layer
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


def test_blocks_out_of_the_window_may_be_gone() -> None:
    """What no row of a call sees may be overwritten, and its block be no block."""
    model, text = packed_model(config(sliding_window=11), "bf16"), tokens(60)
    want = Cached(model, 1).run({0: text})
    cached, done = Cached(model, 1, blocks=15, size=4), 0
    for n in (5, 1, 25, 1, 13, 15):
        seen = max(0, done - 11 + 1) // 4
        cached.pool.unflatten(3, (-1, 4))[:, :, :, cached.tables[0, :seen]] = float("nan")
        cached.tables[0, :seen] = -1
        same(want, cached.run({0: text[done : done + n]}), torch.arange(done, done + n))
        done += n


def test_a_range_of_layers() -> None:
    model, text = packed_model(config(n_layers=3), "int8"), tokens(9)
    whole = Cached(model, 1).run({0: text})
    cached, source = Cached(model, 1), torch.tensor(text)
    given = [Span(0, 9, 0)], cached.pages(0), cached.angles
    first = cached.step.run(source, *given, None, layers=range(1))
    assert first.logits_RV is None and len(first.experts_MTK) == 1
    rest = cached.step.run(first.x_TD, *given, torch.arange(9), layers=range(1, 3))
    assert torch.equal(rest.logits_RV, whole.logits_RV) and torch.equal(rest.x_TD, whole.x_TD)
    assert torch.equal(torch.cat((first.experts_MTK, rest.experts_MTK)), whole.experts_MTK)


def test_wanted_rows_and_k() -> None:
    model, text = packed_model(config(), "bf16"), tokens(9)
    whole = Cached(model, 1).run({0: text})
    wanted = torch.tensor([8, 2, 2])
    some = Cached(model, 1).run({0: text}, wanted=wanted)
    assert torch.equal(some.logits_RV, whole.logits_RV[wanted])
    assert Cached(model, 1).run({0: text}, wanted=wanted[:0]).logits_RV.shape == (0, 50)
    same(Cached(model, 1).run({0: text}, k=2), whole)
    all_experts = Cached(model, 1).run({0: text}, k=8)
    assert all_experts.experts_MTK.sort(-1).values.eq(torch.arange(8)).all()
    assert torch.allclose(all_experts.weights_MTK, all_experts.router_logits_MTE.softmax(-1).sort(-1, True).values)
    nothing = Cached(model, 1).run({})
    assert nothing.logits_RV.shape == (0, 50) and nothing.experts_MTK.shape == (2, 0, 2)


def test_equal_logits_go_to_the_lower_index() -> None:
    model = packed_model(config(), "bf16")
    for block in model.layers:
        block.ffn.router.weight[:] = block.ffn.router.weight[:1]
    out = Cached(model, 1).run({0: tokens(5)})
    assert out.experts_MTK.eq(torch.tensor([0, 1])).all() and out.weights_MTK.eq(0.5).all()


def test_only_the_rows_own_slots_are_written() -> None:
    cached = Cached(packed_model(config(), "bf16"), 1, blocks=4, size=4)
    cached.run({0: tokens(6)})
    used = torch.zeros(4, 4, dtype=torch.bool)
    for position in range(6):
        used[cached.tables[0][position // 4], position % 4] = True
    written = ~cached.pool.isnan().all(-1)  # [L, 2, G, slots]
    assert written.eq(used.flatten()).all()


# -- what engines plan -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["fp32", "int8"])
def test_each_row_has_its_own_k(name: str) -> None:
    """As if each k had a call of its own."""
    model, text = packed_model(config(), name), tokens(9)
    k_T = torch.tensor([2] * 9)
    same(Cached(model, 1).run({0: text}, k=k_T), Cached(model, 1).run({0: text}, k=2))
    model, text = packed_model(config(n_layers=1), name), tokens(9)  # later layers would read other keys
    k_T = torch.tensor([3, 1, 2, 2, 1, 3, 1, 2, 2])
    got = Cached(model, 1).run({0: text}, k=k_T)
    for k in (1, 2, 3):
        want, rows = Cached(model, 1).run({0: text}, k=k), k_T == k
        assert torch.equal(got.logits_RV[rows], want.logits_RV[rows])
        assert torch.equal(got.experts_MTK[:, rows, :k], want.experts_MTK[:, rows])
        assert torch.equal(got.weights_MTK[:, rows, :k], want.weights_MTK[:, rows])
        assert got.experts_MTK[:, rows, k:].eq(-1).all() and got.weights_MTK[:, rows, k:].eq(0).all()


@pytest.mark.parametrize("shape", ["sparse", "dense"])
def test_inactive_rows_change_nothing_of_the_others(shape: str) -> None:
    model, texts = packed_model(config(**SHAPES[shape]), "bf16"), [tokens(7), tokens(4, seed=1)]
    want = Cached(model, 2).run(dict(enumerate(texts)))
    cached = Cached(model, 2)
    source = torch.tensor([1, 1, *texts[0], 2, *texts[1], 3])
    spans, rows = [Span(2, 7, 0), Span(10, 4, 0)], torch.tensor([*range(2, 9), *range(10, 14)])
    got = cached.step.run(source, spans, cached.pages(0, 1), cached.angles, torch.arange(15))
    assert torch.equal(got.logits_RV[rows], want.logits_RV) and torch.equal(got.x_TD[rows], want.x_TD)
    assert torch.equal(got.experts_MTK[:, rows], want.experts_MTK)
    inactive = torch.tensor([0, 1, 9, 14])
    assert got.experts_MTK[:, inactive].eq(-1).all() and got.weights_MTK[:, inactive].eq(0).all()


@pytest.mark.parametrize("rows", [1, 9])
@pytest.mark.parametrize("name", ["fp32", "int4"])
def test_a_layer_in_two_parts(name: str, rows: int) -> None:
    """Up to the router, then from its experts on, with the same choice and with another one."""
    model, text = packed_model(config(), name), tokens(rows)
    whole, cached = Cached(model, 1).run({0: text}), Cached(model, 1)
    given = [Span(0, rows, 0)], cached.pages(0), cached.angles
    x, routed = torch.tensor(text), None
    for layer in range(2):
        part = cached.step.run(x, *given, None, layers=range(layer, layer + 1), to_router=True)
        assert torch.equal(part.experts_MTK[0], whole.experts_MTK[layer])
        assert torch.equal(part.router_logits_MTE[0], whole.router_logits_MTE[layer])
        routed = Routed(part.experts_MTK[0], part.weights_MTK[0])
        wanted = torch.arange(rows) if layer else None
        done = cached.step.run(part.x_TD, *given, wanted, layers=range(layer, layer + 1), routed=routed)
        x = done.x_TD
    assert torch.equal(done.logits_RV, whole.logits_RV) and torch.equal(x, whole.x_TD)
    one = Routed(torch.tensor([[3, -1]] * rows), torch.tensor([[0.5, 9.0]] * rows))
    other = cached.step.run(part.x_TD, *given, None, layers=range(1, 2), routed=one)
    kernel = model.layers[1].ffn.experts
    h_TD = model.layers[1].ffn_norm(part.x_TD)
    close(other.x_TD - part.x_TD, 0.5 * kernel._expert(h_TD, 3))


@pytest.mark.parametrize("rows", [1, 20])
def test_experts_may_change_their_format_and_be_elsewhere(rows: int) -> None:
    """In one layer all formats side by side; and two halves of the experts add up to all of them."""
    model, text = packed_model(config(n_layers=1), "fp32"), tokens(rows)
    formats = ["fp32", "int8", "bf16", "int4", "fp16", "int8", "fp32", "bf16"]
    of_format = {name: step_weights(packed_model(config(n_layers=1), name)).layers[0].experts for name in set(formats)}
    cached = Cached(model, 1)
    for e, name in enumerate(formats):
        cached.step.set_expert(0, e, of_format[name][e])
    mixed = cached.run({0: text})
    want = Cached(model, 1).run({0: text})
    assert 0 < (mixed.x_TD - want.x_TD).abs().max() <= 0.1 * want.x_TD.abs().max()
    halves, whole = [], step_weights(model).layers[0].experts
    for half in (range(4), range(4, 8)):
        part = Cached(model, 1)
        for e in half:
            part.step.set_expert(0, e, None)
        halves.append(part.run({0: text}).x_TD)
        for e in half:
            part.step.set_expert(0, e, whole[e])
        part.lengths = [0]
        assert torch.equal(part.run({0: text}).x_TD, want.x_TD)
    before = Cached(model, 1)
    for e in range(8):
        before.step.set_expert(0, e, None)
    torch.testing.assert_close(halves[0] + halves[1] - before.run({0: text}).x_TD, want.x_TD, rtol=1e-5, atol=1e-5)


def test_experts_that_do_not_fit_are_refused() -> None:
    step, experts = Cached(packed_model(config(), "fp32"), 1).step, step_weights(packed_model(config(), "int8"))
    weights = experts.layers[0].experts[0]
    for layer, expert in ((2, 0), (0, 8), (0, -1)):
        with pytest.raises(UsageError, match=f"no expert {expert} in layer {layer}"):
            step.set_expert(layer, expert, weights)
    with pytest.raises(UsageError, match="expert 3 gate must be 96 x 64, not 95 x 64"):
        step.set_expert(0, 3, weights._replace(gate=weights.gate._replace(n=95)))


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

POOL = torch.zeros(2, 2, 2, 8, 16)
ZERO = torch.zeros(1, 1, dtype=torch.int64)
FIVE = torch.arange(5)
ANGLES = rotary_angles(torch.arange(8), 16, 1e4)


def pages(pool: Tensor = POOL, tables: Tensor = ZERO, size: int = 8) -> Pages:
    return Pages(pool, size, tables)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"source": FIVE - 1}, r"a token id is not one of 0\.\.49"),
        ({"source": FIVE * 20}, r"a token id is not one of 0\.\.49"),
        ({"source": FIVE.int()}, r"tokens must be a contiguous int64 \[5\]"),
        ({"source": torch.zeros(5, 63)}, r"rows must be a contiguous float32 \[5, 64\]"),
        ({"spans": [Span(1, 5, 0)]}, r"5 rows in the spans \[\(1, 5\)\]"),
        ({"spans": [Span(0, 3, 0), Span(2, 2, 0)]}, "disjoint spans of at least one of them"),
        ({"spans": [Span(0, 5, 0), Span(5, 0, 0)]}, "disjoint spans of at least one of them"),
        ({"spans": [Span(0, 5, 4)]}, r"1 blocks of 8 for the positions 4\.\.8"),
        ({"spans": [Span(0, 5, -1)]}, r"1 blocks of 8 for the positions -1\.\.3"),
        ({"pages": pages(tables=ZERO + 1)}, r"a block that is not one of 0\.\.0"),
        ({"pages": pages(tables=ZERO - 1)}, r"a block that is not one of 0\.\.0"),
        ({"pages": pages(tables=ZERO.int())}, r"need block tables int64 \[1, blocks\]"),
        ({"pages": pages(tables=ZERO.expand(2, 1))}, r"1 spans need block tables"),
        ({"pages": pages(POOL.half())}, "a pool must be fp32 or bf16"),
        ({"pages": pages(POOL[:1])}, "a pool must be fp32 or bf16"),
        ({"pages": pages(POOL.transpose(3, 4).contiguous().transpose(3, 4))}, "its last axis in one"),
        ({"angles": (ANGLES[0][:4], ANGLES[1][:4])}, r"rotary angles must be a contiguous float32 \[5, 8\]"),
        ({"wanted_R": torch.tensor([5])}, r"a wanted row is not one of 0\.\.4"),
        ({"k": 9}, r"k must lie in 1\.\.8"),
        ({"k": FIVE - 1}, r"k must lie in 0\.\.the number of experts"),
        ({"k": FIVE * 3}, r"k must lie in 1\.\.8 \(the experts\), not 12"),
        ({"layers": range(3)}, r"layers must be a range within 0\.\.2"),
        ({"routed": Routed(torch.full((5, 2), 8), torch.ones(5, 2))}, r"an expert is not one of 0\.\.7"),
        ({"routed": Routed(torch.zeros(4, 2).long(), torch.ones(5, 2))}, r"experts must be .* int64 \[5, 2\]"),
    ],
)
def test_what_does_not_fit_is_refused(changes: dict[str, object], message: str) -> None:
    step = Cached(packed_model(config(), "bf16"), 1).step
    good = {"source": FIVE, "spans": [Span(0, 5, 0)], "pages": pages(), "angles": ANGLES, "wanted_R": FIVE}
    step.run(**good)
    with pytest.raises(UsageError, match=message):
        step.run(**{**good, **changes})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w._replace(norm=w.norm.double()), r"norm must be a contiguous float32 \[64\]"),
        (lambda w: w._replace(embedding=w.embedding[1:]), r"embedding must be a contiguous float32 or .* \[50, 64\]"),
        (lambda w: w._replace(embedding=Weight(w.output.packed, "int8", 50, 64)), "must be packed in fp32, fp16 or"),
        (lambda w: w._replace(output=w.output._replace(n=49)), "output must be 50 x 64, not 49 x 64"),
        (lambda w: w._replace(output=w.output._replace(format="int8")), "packed int8 weight of 50 x 64: must be uint8"),
        (lambda w: w._replace(output=w.output._replace(packed=w.output.packed.T.contiguous().T)), "contiguous tensor"),
        (lambda w: _with_layer(w, router=None), "layer 0 has 8 experts without a router; the config asks for 8"),
        (lambda w: _with_layer(w, experts=w.layers[0].experts[:7]), "layer 0 has 7 experts with a router"),
    ],
)
def test_weights_that_do_not_fit_are_refused(change: Callable[[ModelWeights], ModelWeights], message: str) -> None:
    weights = step_weights(packed_model(config(), "bf16"))
    Step(config(), weights)
    with pytest.raises(UsageError, match=message):
        Step(config(), change(weights))


def _with_layer(weights: ModelWeights, **changes: object) -> ModelWeights:
    return weights._replace(layers=(weights.layers[0]._replace(**changes), *weights.layers[1:]))


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
