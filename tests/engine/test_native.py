"""Generation through the native step: the tokens, log-probabilities and routing of the model in its place."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch.nn.modules.module import register_module_forward_hook

from mixtral.engine import FullCache, SamplingParams, generate, make_cache, stream
from mixtral.engine.native import NativeModel, why_not
from mixtral.errors import UsageError
from mixtral.kernels.native import library as native
from mixtral.kernels.native.step import MOST_ROWS
from mixtral.model import Mixtral, Ragged
from mixtral.model.linear import Linear
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


def packed(model: Mixtral) -> Mixtral:
    """The same model with packed bf16 weights, which torch multiplies with the same rounded inputs as the step does."""
    return pack_parts(copy.deepcopy(model), "bf16")


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("chunk", [None, 7])
def test_greedy_texts_are_the_models(shape: str, chunk: int | None) -> None:
    """A ragged batch, chunked prompts, sequences that end at different steps.

    Sums are fp32 on both roads, in another order; a rounding of a product's input that falls the other way moves a
    logit by 2^-9 of one of its terms. Log-probs agree to 0.02.
    """
    model = packed(make_model(**SHAPES[shape]))
    params = [SamplingParams(max_tokens=n, ignore_eos=True) for n in (12, 3, 9, 12)]
    want = generate(model, PROMPTS, params, keep_routing=True)
    got = generate(model, PROMPTS, params, prefill_chunk=chunk, keep_routing=True, native=NativeModel(model))
    for ours, theirs in zip(got, want, strict=True):
        assert ours.tokens == theirs.tokens and ours.finish_reason == theirs.finish_reason
        torch.testing.assert_close(ours.logprobs, theirs.logprobs, rtol=0, atol=0.02)
        assert len(ours.routing) == len(theirs.routing)
        for a, b in zip(ours.routing, theirs.routing, strict=True):
            assert torch.equal(a.experts_TK, b.experts_TK)
            torch.testing.assert_close(a.logits_TE, b.logits_TE, rtol=0, atol=0.02)
            torch.testing.assert_close(a.scores_TE, a.logits_TE.softmax(-1))
            torch.testing.assert_close(a.weights_TK, b.weights_TK, rtol=0, atol=0.02)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_plain_weights_are_rounded_to_bf16(shape: str, dtype: torch.dtype) -> None:
    model = make_model(**SHAPES[shape]).to(dtype)
    assert generate(model, PROMPTS, GREEDY, native=NativeModel(model)) == generate(
        model, PROMPTS, GREEDY, native=NativeModel(packed(model))
    )


def test_end_tokens_and_rules_hold_natively() -> None:
    [free] = generate(packed(make_model()), [PROMPTS[0]], GREEDY)
    model = packed(make_model(eos_id=[96, free.tokens[3]]))
    params = [SamplingParams(max_tokens=12), SamplingParams(max_tokens=12, min_tokens=6),
              SamplingParams(max_tokens=12, no_repeat_ngram_size=1, repetition_penalty=1.3)]  # fmt: skip
    want, got = (generate(model, [PROMPTS[0]] * 3, params, native=n) for n in (None, NativeModel(model)))
    assert [g.tokens for g in got] == [g.tokens for g in want]
    assert got[0].tokens == free.tokens[:4] and got[0].finish_reason == "stop" and len(got[1].tokens) >= 6


@pytest.mark.parametrize("shape", ["eight experts", "window"])
def test_bits_do_not_depend_on_the_batch(shape: str) -> None:
    model = make_model(**SHAPES[shape])
    runner = NativeModel(model)
    together = generate(model, PROMPTS, GREEDY, native=runner)
    for prompt, batched in zip(PROMPTS, together, strict=True):
        [alone] = generate(model, [prompt], GREEDY, prefill_chunk=3, native=runner)
        assert alone == batched  # log-probs too


def test_a_full_cache_of_a_model_with_a_window() -> None:
    model = make_model(sliding_window=WINDOW)
    runner = NativeModel(model)
    rolling = generate(model, PROMPTS, GREEDY, native=runner)
    cache = FullCache(model.config, len(PROMPTS), torch.float32)
    assert generate(model, PROMPTS, GREEDY, cache=cache, native=runner) == rolling


def test_more_rows_than_a_call_takes() -> None:
    model = make_model(n_layers=1, context=2048, vocab_size=40)
    model = packed(model)
    texts = [[t % 40 for t in random_tokens(n, seed=n)] for n in (3, 2 * MOST_ROWS, 5, 40)]
    batch = Ragged.of(texts)
    rows = torch.tensor([700, 2, 1071, 1028, 700])
    out = NativeModel(model)(batch, make_cache(model.config, 4, torch.float32), rows=rows)
    want = model(batch, rows=rows)
    torch.testing.assert_close(out.logits, want.logits, rtol=0, atol=0.05)
    assert out.routing[0].logits_TE.shape == want.routing[0].logits_TE.shape
    every = NativeModel(model)(batch, make_cache(model.config, 4, torch.float32))
    assert torch.equal(every.logits[rows], out.logits)
    assert NativeModel(model)(Ragged.of([]), make_cache(model.config, 0, torch.float32)).logits.shape == (0, 40)


def test_streams_and_k() -> None:
    model = make_model()
    runner = NativeModel(model)
    [whole] = generate(model, [PROMPTS[0]], GREEDY, k=3, native=runner, keep_routing=True)
    assert whole.routing[0].experts_TK.shape[1] == 3
    assert [p.token for p in stream(model, [PROMPTS[0]], GREEDY, k=3, native=runner)] == whole.tokens


def test_parts_in_different_formats() -> None:
    model = packed(make_model())
    output = PackedLinear(INT8, model.config.dim, model.config.vocab_size)
    output.weight_packed.copy_(quantise(make_model().output_weight, INT8))
    model.output = output
    got = generate(model, PROMPTS, GREEDY, native=NativeModel(model))
    for ours, theirs in zip(got, generate(model, PROMPTS, GREEDY), strict=True):
        assert ours.tokens == theirs.tokens
        torch.testing.assert_close(ours.logprobs, theirs.logprobs, rtol=0, atol=0.02)


@pytest.mark.parametrize("shape", ["eight experts", "dense", "tied"])
def test_releasing_frees_the_models_own_matrices_and_restoring_brings_them_back(shape: str) -> None:
    model = make_model(**SHAPES[shape]).to(torch.bfloat16)
    model.layers[1].attention.wo.weight.data[0, :3] = torch.tensor([-0.0, 1e-40, 1.0])
    before = {name: tensor.clone().view(torch.int16) for name, tensor in model.state_dict().items()}
    want = NativeModel(model)
    got = NativeModel(model, release=True)
    kept = {name for name, parameter in model.named_parameters() if parameter.numel()}
    assert all(name.endswith(("norm.weight", "embedding.weight", "router.weight")) for name in kept)
    assert len(kept) < len(before)
    batch, config = Ragged.of(PROMPTS), model.config
    outputs = [runner(batch, make_cache(config, 4, torch.bfloat16)).logits for runner in (want, got)]
    assert torch.equal(*outputs)
    with torch.inference_mode():
        got.restore()
    after = model.state_dict()
    assert all(torch.equal(tensor, after[name].view(torch.int16)) for name, tensor in before.items())
    assert not any(parameter.is_inference() for parameter in model.parameters())
    assert torch.equal(got(batch, make_cache(config, 4, torch.bfloat16)).logits, outputs[0])


def test_fp32_matrices_are_not_released_for_packing_rounds_them() -> None:
    model = make_model()
    NativeModel(model, release=True)
    assert all(parameter.numel() for parameter in model.parameters())


def test_a_model_whose_packing_was_broken_off_is_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("mixtral.engine.native.Step", interrupted)
    model = make_model().to(torch.bfloat16)
    with pytest.raises(KeyboardInterrupt):
        NativeModel(model, release=True)
    assert all(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda _: make_model(router="topk?capacity_factor=1.5"), "Mixtral's own router alone"),
        (lambda _: make_model(shared_experts=1), "no shared experts"),
        (lambda m: m.half(), "it takes fp32 and bf16, not float16"),
        (lambda m: m.to("meta"), "it runs on the CPU alone"),
        (lambda m: m.set_submodule("output", type("Adapted", (Linear,), {})(32, 97)) or m, "it does not know Adapted"),
    ],
)
def test_it_declines_what_it_cannot_do(change: Any, reason: str) -> None:
    model = make_model()
    assert why_not(model) == ""
    model = change(model)
    assert reason in why_not(model)
    with pytest.raises(UsageError, match=f"native step: .*{reason}"):
        NativeModel(model)


def _adapted(part: Any) -> None:
    part.__class__ = type("Adapted", (type(part),), {})


@pytest.mark.parametrize(
    "part",
    ["", "embedding", "norm", "output", "layers.0", "layers.1.attention", "layers.1.attention.wo", "layers.0.ffn",
     "layers.0.ffn_norm", "layers.1.ffn.router", "layers.1.ffn.experts", "layers.1.ffn.dispatcher"],
)  # fmt: skip
def test_it_declines_any_part_that_was_exchanged(part: str) -> None:
    """The dispatcher too, which is no module: the step would compute the layer past it."""
    model = make_model()
    owner, _, name = part.rpartition(".")
    _adapted(getattr(model.get_submodule(owner), name) if name else model)
    assert why_not(model) == "it does not know Adapted in the model"


def test_it_declines_a_model_whose_hooks_it_would_not_call() -> None:
    model = make_model()
    handle = model.layers[1].attention.wo.register_forward_hook(lambda *_: None)
    assert why_not(model) == "it would not call the hooks on Linear in the model"
    handle.remove()
    handle = register_module_forward_hook(lambda *_: None)  # on all modules
    assert why_not(model) == "it would not call the hooks on Mixtral in the model"
    handle.remove()
    assert why_not(model) == ""


@pytest.mark.parametrize(
    ("part", "method"), [("layers.1.attention", "forward"), ("layers.0.ffn.dispatcher", "combine")]
)
def test_it_declines_a_part_that_was_given_a_method(part: str, method: str) -> None:
    model = make_model()
    owner, _, name = part.rpartition(".")
    changed = getattr(model.get_submodule(owner), name)
    setattr(changed, method, lambda *_: None)
    assert why_not(model) == f"it would not call the {method} that a {type(changed).__name__} was given in the model"


def test_without_the_library_it_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "available", lambda: "not built")
    assert why_not(make_model()) == "not built"
