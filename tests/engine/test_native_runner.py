"""Generation through the native step: the tokens, log-probabilities and routing of the model itself."""

from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import torch
from torch.nn.modules.module import register_module_forward_hook

from mixtral.engine import Generation, KVPool, SamplingParams, Stream, TorchRunner, generate, stream
from mixtral.engine.native_runner import NativeRunner, why_not
from mixtral.errors import UsageError
from mixtral.kernels.native import library as native
from mixtral.kernels.native.step import MOST_ROWS
from mixtral.model import Mixtral, Ragged
from mixtral.model.embedding import Embedding
from mixtral.quant.formats import INT8, quantise
from mixtral.quant.layers import PackedLinear
from tests.engine.models import WINDOW, make_model, random_tokens
from tests.kernels.step_models import pack_parts

pytestmark = pytest.mark.skipif(bool(native.available()), reason=f"no native step: {native.available()}")

SHAPES: dict[str, dict[str, Any]] = {
    "dense": {"n_experts": 1, "experts_per_token": 1},
    "eight experts": {"n_experts": 8},
    "four queries a key": {"n_heads": 8},
    "window": {"sliding_window": WINDOW},
    "tied": {"tie_embeddings": True},
}  # fmt: skip
GREEDY = SamplingParams(max_tokens=12, ignore_eos=True)
PROMPTS = [random_tokens(n, seed=n) for n in (5, 1, 23, 12)]
BOUND = {"fp32": 1e-4, "fp16": 1e-4, "bf16": 0.02}


def packed(name: str = "bf16", **changes: Any) -> Mixtral:
    return pack_parts(make_model(**changes), name)


def assert_close(got: list[Generation], want: list[Generation], bound: float) -> None:
    for ours, theirs in zip(got, want, strict=True):
        assert ours.tokens == theirs.tokens and ours.finish_reason == theirs.finish_reason
        torch.testing.assert_close(ours.logprobs, theirs.logprobs, rtol=0, atol=bound)
        assert len(ours.routing) == len(theirs.routing)
        for a, b in zip(ours.routing, theirs.routing, strict=True):
            assert torch.equal(a.experts_TK, b.experts_TK)
            torch.testing.assert_close(a.logits_TE, b.logits_TE, rtol=0, atol=bound)
            torch.testing.assert_close(a.scores_TE, a.logits_TE.softmax(-1))
            torch.testing.assert_close(a.weights_TK, b.weights_TK, rtol=0, atol=bound)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", BOUND)
@pytest.mark.parametrize("chunk", [None, 7])
def test_greedy_texts_are_the_models(shape: str, name: str, chunk: int | None) -> None:
    """A ragged batch, chunked prompts, sequences that end at different steps.

    Sums are fp32 in both, in another order. In bf16 the rounding of a product's input may fall the other way, which
    moves a logit by 2^-9 of one of its terms. The cache is fp32 for both.
    """
    model = packed(name, **SHAPES[shape])
    params = [SamplingParams(max_tokens=n, ignore_eos=True) for n in (12, 3, 9, 12)]
    want = generate(TorchRunner(model), PROMPTS, params, keep_routing=True)
    runner = NativeRunner(model, KVPool(model.config, torch.float32))
    got = generate(runner, PROMPTS, params, prefill_chunk=chunk, keep_routing=True)
    assert_close(got, want, BOUND[name])
    assert NativeRunner(model).pool.dtype == (torch.bfloat16 if name == "bf16" else torch.float32)


def test_end_tokens_and_rules_hold_natively() -> None:
    [free] = generate(NativeRunner(packed("fp32")), [PROMPTS[0]], GREEDY)
    model = packed("fp32", eos_id=[96, free.tokens[3]])
    params = [SamplingParams(max_tokens=12), SamplingParams(max_tokens=12, min_tokens=6),
              SamplingParams(max_tokens=12, no_repeat_ngram_size=1, repetition_penalty=1.3)]  # fmt: skip
    want, got = (generate(kind(model), [PROMPTS[0]] * 3, params) for kind in (TorchRunner, NativeRunner))
    assert [g.tokens for g in got] == [g.tokens for g in want]
    assert got[0].tokens == free.tokens[:4] and got[0].finish_reason == "stop" and len(got[1].tokens) >= 6


@pytest.mark.parametrize("shape", ["eight experts", "window"])
def test_bits_do_not_depend_on_the_batch(shape: str) -> None:
    runner = NativeRunner(packed(**SHAPES[shape]))
    together = generate(runner, PROMPTS, GREEDY, n=2)
    for i, prompt in enumerate(PROMPTS):
        [alone] = generate(runner, [prompt], GREEDY, prefill_chunk=3)
        assert alone == together[2 * i] == together[2 * i + 1]  # log-probs too


def test_more_rows_than_a_call_takes() -> None:
    model = packed(n_layers=1, context=2048, vocab_size=40)
    texts = [[t % 40 for t in random_tokens(n, seed=n)] for n in (3, 2 * MOST_ROWS, 5, 40)]
    rows = torch.tensor([700, 2, 1071, 1028, 700])
    runner, want = NativeRunner(model), model(Ragged.of(texts), rows=rows)

    def run(texts: list[list[int]], rows: torch.Tensor | None = None) -> Any:
        return runner.run(runner.pool.batch([(runner.pool.add(), text) for text in texts]), rows)

    out = run(texts, rows)
    torch.testing.assert_close(out.logits, want.logits, rtol=0, atol=0.05)
    assert out.routing[0].logits_TE.shape == want.routing[0].logits_TE.shape
    assert torch.equal(run(texts).logits[rows], out.logits)
    assert run([]).logits.shape == (0, 40)


def test_streams_and_k() -> None:
    runner = NativeRunner(packed())
    [whole] = generate(runner, [PROMPTS[0]], GREEDY, k=3, keep_routing=True)
    assert whole.routing[0].experts_TK.shape[1] == 3
    assert [p.token for p in stream(runner, [PROMPTS[0]], GREEDY, k=3)] == whole.tokens
    each = generate(runner, [PROMPTS[0]] * 3, GREEDY, k=[3, 1, None])
    assert each == [generate(runner, [PROMPTS[0]], GREEDY, k=k)[0] for k in (3, 1, None)]


def test_parts_in_different_formats() -> None:
    model = packed("fp32")
    output = PackedLinear(INT8, model.config.dim, model.config.vocab_size)
    output.weight_packed.copy_(quantise(make_model().output_weight, INT8))
    model.output = output
    got, want = (generate(kind(model), PROMPTS, GREEDY) for kind in (NativeRunner, TorchRunner))
    assert_close(got, want, 0.02)


def test_weights_that_change_in_place_are_seen() -> None:
    model = packed("fp32")
    runner = NativeRunner(model)
    before = runner.read(PROMPTS[2]).logits
    model.layers[0].ffn.experts.w2_packed[0].copy_(model.layers[0].ffn.experts.w2_packed[1])
    model.norm.weight.mul_(2)
    after = runner.read(PROMPTS[2]).logits
    assert not torch.equal(after, before) and torch.equal(after, NativeRunner(model).read(PROMPTS[2]).logits)


# -- threads -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [NativeRunner, TorchRunner])
def test_threads_that_share_a_runner_get_the_bits_they_get_alone(kind: Any) -> None:
    """Prompts of all lengths, so that scratch and pool grow while others run."""
    runner = kind(packed(context=1024))
    prompts = [random_tokens(n, seed=n) for n in (3, 600, 17, 90, 250, 1)]
    alone = [generate(kind(packed(context=1024)), [p], GREEDY)[0] for p in prompts]
    found: dict[int, Generation] = {}

    def work(i: int) -> None:
        found[i] = generate(runner, [prompts[i]], GREEDY, prefill_chunk=100)[0]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, want in enumerate(alone):
        assert found[i].tokens == want.tokens
        if kind is NativeRunner:
            assert found[i] == want
    assert runner.pool.ids == []


def test_two_streams_in_turn() -> None:
    runner = NativeRunner(packed())
    want = [generate(runner, [p], GREEDY)[0].tokens for p in PROMPTS[:2]]
    streams: list[Stream] = [stream(runner, [p], GREEDY) for p in PROMPTS[:2]]
    assert [list(t) for t in zip(*([p.token for p in s] for s in streams), strict=True)] == [
        list(t) for t in zip(*want, strict=True)
    ]
    assert torch.get_num_threads() >= 1


# -- what it declines --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda _: make_model(router="topk?capacity_factor=1.5"), "Mixtral's own router alone"),
        (lambda _: make_model(shared_experts=1), "no shared experts"),
        (lambda _: make_model(), "it does not know Linear"),
        (lambda m: m.to("meta"), "it runs on the CPU alone"),
        (lambda m: m.set_submodule("output", type("Adapted", (PackedLinear,), {})(INT8, 32, 97)) or m,
         "it does not know Adapted"),
    ],
)  # fmt: skip
def test_it_declines_what_it_cannot_do(change: Any, reason: str) -> None:
    model = packed()
    assert why_not(model) == ""
    model = change(model)
    assert reason in why_not(model)
    with pytest.raises(UsageError, match=f"native step: .*{reason}"):
        NativeRunner(model)


def _adapted(part: Any) -> None:
    part.__class__ = type("Adapted", (type(part),), {})


@pytest.mark.parametrize(
    "part",
    ["", "embedding", "norm", "output", "layers.0", "layers.1.attention", "layers.1.attention.wo", "layers.0.ffn",
     "layers.0.ffn_norm", "layers.1.ffn.router", "layers.1.ffn.experts", "layers.1.ffn.dispatcher"],
)  # fmt: skip
def test_it_declines_any_part_that_was_replaced(part: str) -> None:
    """The dispatcher too, which is no module: the step would compute the layer past it."""
    model = packed()
    owner, _, name = part.rpartition(".")
    _adapted(getattr(model.get_submodule(owner), name) if name else model)
    assert why_not(model) == "it does not know Adapted in the model"


def test_it_declines_a_model_whose_hooks_it_would_not_call() -> None:
    model = packed()
    handle = model.layers[1].attention.wo.register_forward_hook(lambda *_: None)
    assert why_not(model) == "it would not call the hooks on PackedLinear in the model"
    handle.remove()
    handle = register_module_forward_hook(lambda *_: None)  # on all modules
    assert why_not(model) == "it would not call the hooks on Mixtral in the model"
    handle.remove()
    assert why_not(model) == ""


@pytest.mark.parametrize(
    ("part", "method"), [("layers.1.attention", "forward"), ("layers.0.ffn.dispatcher", "combine")]
)
def test_it_declines_a_part_that_was_given_a_method(part: str, method: str) -> None:
    model = packed()
    owner, _, name = part.rpartition(".")
    changed = getattr(model.get_submodule(owner), name)
    setattr(changed, method, lambda *_: None)
    assert why_not(model) == f"it would not call the {method} that a {type(changed).__name__} was given in the model"


def test_a_plain_embedding_beside_packed_matrices() -> None:
    """As in a model that is not tied; its rows may be of any of the three dtypes."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        model = copy.deepcopy(packed("fp32"))
        plain = Embedding(97, 32, torch.float32).requires_grad_(False)
        plain.weight.data = make_model().embedding.weight.to(dtype)
        model.embedding = plain
        got, want = (generate(kind(model), PROMPTS, GREEDY) for kind in (NativeRunner, TorchRunner))
        assert_close(got, want, 1e-4)


def test_without_the_library_it_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "available", lambda: "not built")
    assert why_not(packed()) == "not built"
