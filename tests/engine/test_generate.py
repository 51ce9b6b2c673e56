"""The plain loop: batches equal single runs, decoding equals prefill, streams equal results, and where it ends."""

from __future__ import annotations

import copy
import dataclasses
import functools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mixtral.engine import KVPool, SamplingParams, TorchRunner
from mixtral.engine import generate as run_generate
from mixtral.engine import stream as engine_stream
from mixtral.errors import MixtralError, UsageError
from mixtral.model import Mixtral, Ragged
from mixtral.tokenizer import Tokenizer, train_bpe
from tests.engine.models import CONFIG, WINDOW, Pieces, generate, make_model, random_tokens, stream

MODELS = {
    "full": make_model(),
    "window": make_model(sliding_window=WINDOW),
    "dense": make_model(n_experts=1, experts_per_token=1),
}
MODEL = MODELS["full"]
GREEDY = SamplingParams(max_tokens=12, ignore_eos=True)
PROMPTS = [random_tokens(n, seed=n) for n in (5, 1, 23, 12)]


@functools.cache
def own_tokenizer() -> Tokenizer:
    """So small that a random model's text is full of bytes that are no characters, alone."""
    return train_bpe(["the cat sat on the mat\n" * 20], vocab_size=300)


@functools.cache
def text_model() -> Mixtral:
    return make_model(seed=3, vocab_size=300)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("chunk", [None, 1, WINDOW, 9])
def test_a_batch_equals_each_prompt_alone_in_any_chunks(name: str, chunk: int | None) -> None:
    together = generate(MODELS[name], PROMPTS, GREEDY, prefill_chunk=chunk)
    for prompt, batched in zip(PROMPTS, together, strict=True):
        [alone] = generate(MODELS[name], [prompt], GREEDY)
        assert batched.tokens == alone.tokens and len(alone.tokens) == 12
        torch.testing.assert_close(batched.logprobs, alone.logprobs, rtol=0, atol=1e-4)


@settings(max_examples=15)
@given(
    name=st.sampled_from(sorted(MODELS)),
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=4),
    chunk=st.none() | st.integers(1, 45),
    temperature=st.sampled_from([0.0, 1.0]),
)
def test_decode_logprobs_and_routing_equal_one_prefill(
    name: str, lengths: list[int], chunk: int | None, temperature: float
) -> None:
    """What the cached loop says of each token is what one uncached pass over the whole text says."""
    prompts = [random_tokens(n, seed=i) for i, n in enumerate(lengths)]
    params = SamplingParams(max_tokens=6, temperature=temperature, seed=1, ignore_eos=True)
    model = MODELS[name]
    done = generate(model, prompts, params, prefill_chunk=chunk, keep_routing=True)
    for prompt, out in zip(prompts, done, strict=True):
        whole = model(Ragged.of([prompt + out.tokens[:-1]]))
        wanted = whole.logits.log_softmax(-1)[len(prompt) - 1 :].gather(1, torch.tensor(out.tokens)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(out.logprobs), wanted, rtol=0, atol=1e-4)
        if temperature == 0:
            assert out.tokens == whole.logits[len(prompt) - 1 :].argmax(-1).tolist()
        assert len(out.routing) == len(whole.routing)
        for ours, theirs in zip(out.routing, whole.routing, strict=True):
            assert torch.equal(ours.experts_TK, theirs.experts_TK)
            torch.testing.assert_close(ours.logits_TE, theirs.logits_TE, rtol=0, atol=1e-4)


def test_streams_equal_results_and_come_token_by_token() -> None:
    params = [SamplingParams(max_tokens=n, temperature=1.0, seed=2, ignore_eos=True) for n in (3, 9, 1, 6)]
    done = generate(MODEL, PROMPTS, params)
    pieces = list(stream(MODEL, PROMPTS, params))
    for i, out in enumerate(done):
        mine = [p for p in pieces if p.sequence == i]
        assert [p.token for p in mine] == out.tokens and [p.logprob for p in mine] == out.logprobs
        assert [p.finish_reason for p in mine] == [None] * (len(mine) - 1) + ["length"]
    assert [p.sequence for p in pieces[:7]] == [0, 1, 2, 3, 0, 1, 3]  # the third prompt asked for one token


def test_a_prompt_still_being_read_does_not_hold_up_the_others() -> None:
    order = [p.sequence for p in stream(MODEL, [PROMPTS[2], PROMPTS[0]], GREEDY, prefill_chunk=6)]
    assert order[:4] == [1, 1, 1, 0]  # 23 tokens take four chunks, 5 take one


def test_seeds_reproduce_and_differ() -> None:
    def tokens(seed: int | None, n: int = 1) -> list[list[int]]:
        params = SamplingParams(max_tokens=20, temperature=1.0, seed=seed, ignore_eos=True)
        return [g.tokens for g in generate(MODEL, [PROMPTS[0]] * n, params)]

    assert tokens(1) == tokens(1) != tokens(2)
    assert tokens(None) != tokens(None)
    first, second = tokens(1, n=2)
    assert [first] == tokens(1) and first != second  # the same prompt twice gives two texts, the first as if alone


@pytest.mark.parametrize("name", MODELS)
def test_a_small_pool_that_does_not_grow(name: str) -> None:
    model = MODELS[name]
    pool = KVPool(model.config, torch.float32, block_size=4, n_blocks=24, grows=False)
    runner = TorchRunner(model, pool)
    got = run_generate(runner, PROMPTS, GREEDY)
    assert [g.tokens for g in got] == [g.tokens for g in generate(model, PROMPTS, GREEDY)]
    assert pool.ids == [] and pool.n_free == 24
    with pytest.raises(MixtralError, match="blocks of 4 positions are needed"):
        run_generate(runner, [random_tokens(100)], GREEDY)
    assert pool.ids == [] and pool.n_free == 24  # and the pool is as before


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("chunk", [None, 5])
def test_n_continuations_are_those_of_as_many_prompts(name: str, chunk: int | None) -> None:
    """With the same seeds; keys and values of the prompt are there once, routing with each."""
    params = SamplingParams(max_tokens=9, temperature=1.0, seed=5, ignore_eos=True)
    model, sparse = MODELS[name], MODELS[name].config.is_sparse
    got = generate(model, PROMPTS[:3], params, n=3, prefill_chunk=chunk, keep_routing=True)
    want = generate(model, [p for p in PROMPTS[:3] for _ in range(3)], params, keep_routing=True)
    for ours, theirs in zip(got, want, strict=True):
        assert ours.tokens == theirs.tokens
        torch.testing.assert_close(ours.logprobs, theirs.logprobs, rtol=0, atol=1e-4)
        assert len(ours.routing) == (2 if sparse else 0)
        for a, b in zip(ours.routing, theirs.routing, strict=True):
            assert torch.equal(a.experts_TK, b.experts_TK)
    assert len({tuple(g.tokens) for g in got[:3]}) == 3


def test_each_prompt_has_its_own_k() -> None:
    got = generate(MODEL, PROMPTS[:3], GREEDY, k=[1, None, 3], keep_routing=True)
    for prompt, k, ours in zip(PROMPTS, (1, None, 3), got, strict=False):
        [alone] = generate(MODEL, [prompt], GREEDY, k=k, keep_routing=True)
        assert ours.tokens == alone.tokens
        width = alone.routing[0].experts_TK.shape[1]
        assert torch.equal(ours.routing[0].experts_TK[:, :width], alone.routing[0].experts_TK)


def test_a_stream_that_is_dropped_or_closed_frees_its_cache() -> None:
    runner = TorchRunner(MODEL)
    for end in ("close", "drop"):
        pieces = engine_stream(runner, PROMPTS, GREEDY, n=2)
        next(pieces)
        assert len(runner.pool.ids) == 8
        with pytest.raises(UsageError, match="the stream is not at its end yet"):
            pieces.results()
        if end == "close":
            pieces.close()
        del pieces
        assert runner.pool.ids == [] and runner.pool.n_free == runner.pool.n_blocks


# -- where it ends -----------------------------------------------------------------------------------------------------


def test_the_end_token_ends_it() -> None:
    [free] = generate(MODEL, [PROMPTS[0]], GREEDY)
    at = next(i for i, t in enumerate(free.tokens) if t not in free.tokens[:i] and i > 2)
    model = make_model(eos_id=free.tokens[at])
    [out] = generate(model, [PROMPTS[0]], SamplingParams(max_tokens=12))
    assert out.tokens == free.tokens[: at + 1] and out.finish_reason == "stop"
    [ignored] = generate(model, [PROMPTS[0]], GREEDY)
    assert ignored.tokens == free.tokens and ignored.finish_reason == "length"
    [none] = generate(make_model(eos_id=None), [PROMPTS[0]], SamplingParams(max_tokens=12))
    assert none.tokens == free.tokens


def test_any_of_several_end_tokens_ends_it() -> None:
    [free] = generate(MODEL, [PROMPTS[0]], GREEDY)
    at, later, *_ = (i for i, t in enumerate(free.tokens) if t not in free.tokens[:i] and i > 1)
    for ends in ((free.tokens[later], free.tokens[at]), (free.tokens[at], free.tokens[later])):
        model = make_model(eos_id=ends)
        [out] = generate(model, [PROMPTS[0]], SamplingParams(max_tokens=12))
        assert out.tokens == free.tokens[: at + 1] and out.finish_reason == "stop"
        [ignored] = generate(model, [PROMPTS[0]], GREEDY)
        assert ignored.tokens == free.tokens
        [longer] = generate(model, [PROMPTS[0]], SamplingParams(max_tokens=12, min_tokens=at + 2))
        assert not set(longer.tokens[: at + 1]) & set(ends) and longer.tokens[:at] == free.tokens[:at]


def test_max_length_counts_the_prompt() -> None:
    params = SamplingParams(max_tokens=50, max_length=20, ignore_eos=True)
    found = generate(MODEL, PROMPTS[:2], params)
    assert [len(g.tokens) for g in found] == [20 - len(p) for p in PROMPTS[:2]]
    assert all(g.finish_reason == "length" for g in found)
    with pytest.raises(UsageError, match="prompt 0: 23 tokens reach max_length 20, the most of prompt and text"):
        generate(MODEL, [PROMPTS[2]], params)


def test_a_log_probability_is_the_models_own_whatever_is_banned() -> None:
    [free] = generate(MODEL, [PROMPTS[0]], GREEDY)
    params = SamplingParams(max_tokens=1, suppress_tokens=(free.tokens[0],), repetition_penalty=1.5)
    [out] = generate(MODEL, [PROMPTS[0]], params)
    logits = MODEL(Ragged.of([PROMPTS[0]])).logits
    assert logits is not None and out.tokens != free.tokens[:1]
    assert out.logprobs[0] == pytest.approx(logits[-1].log_softmax(-1)[out.tokens[0]].item(), abs=1e-5)


def test_each_sequence_of_a_batch_has_its_own_history() -> None:
    params = [SamplingParams(max_tokens=12, ignore_eos=True, **{"no_repeat_ngram_size": n, "repetition_penalty": x})
              for n, x in ((0, 1.0), (1, 1.0), (0, 1.8), (2, 1.2))]  # fmt: skip
    together = generate(MODEL, PROMPTS, params, prefill_chunk=4)
    alone = [generate(MODEL, [p], q)[0].tokens for p, q in zip(PROMPTS, params, strict=True)]
    assert [g.tokens for g in together] == alone
    assert len({*PROMPTS[1], *together[1].tokens}) == 13


def test_the_models_end_tokens_count_before_the_tokenizers() -> None:
    [free] = generate(make_model(vocab_size=300, eos_id=None), [PROMPTS[0]], GREEDY)
    own = copy.copy(own_tokenizer())
    own.eos_id = free.tokens[2]
    [out] = generate(make_model(vocab_size=300, eos_id=299), [PROMPTS[0]], SamplingParams(max_tokens=12), tokenizer=own)
    assert out.tokens == free.tokens[: len(out.tokens)] and len(out.tokens) > 3


def test_the_end_of_the_context_ends_it() -> None:
    [out] = generate(make_model(context=20), [random_tokens(17)], SamplingParams(max_tokens=100, ignore_eos=True))
    assert len(out.tokens) == 3 and out.finish_reason == "length"


def test_text_grows_as_it_streams_and_equals_decoding() -> None:
    own, model = own_tokenizer(), text_model()
    prompt = own.encode("the cat")
    params = SamplingParams(max_tokens=60, temperature=1.0, seed=0, ignore_eos=True)
    [out] = generate(model, [prompt], params, tokenizer=own)
    pieces = list(stream(model, [prompt], params, tokenizer=own))
    assert "".join(p.text for p in pieces) == out.text
    assert own.decode(prompt + out.tokens) == own.decode(prompt) + out.text


@pytest.mark.parametrize("start", range(3))
def test_a_stop_string_across_tokens(start: int) -> None:
    """A string cut from the middle of two tokens' text ends the text just before it."""
    own, model = own_tokenizer(), text_model()
    params = SamplingParams(max_tokens=40, temperature=1.0, seed=4, ignore_eos=True)
    [free] = generate(model, [own.encode("the cat")], params, tokenizer=own)
    texts = [p.text for p in stream(model, [own.encode("the cat")], params, tokenizer=own)]
    first = [i for i in range(len(texts) - 1) if texts[i] and texts[i + 1]][start]
    stop = texts[first][-1] + texts[first + 1][0]
    wanted = free.text[: free.text.index(stop)]
    stopping = SamplingParams(max_tokens=40, temperature=1.0, seed=4, ignore_eos=True, stop=(stop, "never seen"))
    [out] = generate(model, [own.encode("the cat")], stopping, tokenizer=own)
    assert out.text == wanted and out.finish_reason == "stop"
    assert out.tokens == free.tokens[: len(out.tokens)]
    shown = [p.text for p in stream(model, [own.encode("the cat")], stopping, tokenizer=own)]
    assert "".join(shown) == wanted


@pytest.mark.parametrize(("pieces", "stop", "text", "reason"), [
    ([b"one", b"\n\xe2\x80"], "\n", "one", "stop"),  # the token that holds the stop also begins a character
    ([b"one\xe2\x80", b"\n"], "\n", "one\ufffd", "stop"),  # what is broken before it really is there
    ([b"one E", b"ND\xf0"], "END", "one ", "stop"),
    ([b"a", b"b\xe2"], "b\ufffd", "a", "stop"),  # the end of the text completes the stop
    ([b"a", b"b\xe2"], "x", "ab\ufffd", "length"),
])
def test_text_around_a_stop_string(pieces: list[bytes], stop: str, text: str, reason: str) -> None:
    params = SamplingParams(max_tokens=len(pieces), ignore_eos=True)
    answers = generate(MODEL, [[first] for first in range(3, 60)], params)
    ways = ([first, *answer.tokens] for first, answer in zip(range(3, 60), answers, strict=True))
    first, *answer = next(way for way in ways if len(set(way)) == len(way))  # each token is given a text of its own
    bytes_of = dict(zip(answer, pieces, strict=True))
    tokenizer = Pieces([bytes_of.get(i, b"") for i in range(CONFIG.vocab_size)])
    shown = list(stream(MODEL, [[first]], dataclasses.replace(params, stop=(stop,)), tokenizer=tokenizer))
    assert "".join(piece.text for piece in shown) == text and shown[-1].finish_reason == reason


def test_the_tokenizers_end_token_counts_where_the_model_names_none() -> None:
    """A Mistral folder's configuration names no end token; its tokenizer does."""
    [free] = generate(make_model(vocab_size=300, eos_id=None), [PROMPTS[0]], GREEDY)
    own = copy.copy(own_tokenizer())
    own.eos_id = free.tokens[2]
    params = SamplingParams(max_tokens=12)
    [out] = generate(make_model(vocab_size=300, eos_id=None), [PROMPTS[0]], params, tokenizer=own)
    assert out.tokens == free.tokens[: free.tokens.index(own.eos_id) + 1] and out.finish_reason == "stop"


def test_padding_of_the_vocabulary_is_never_drawn() -> None:
    own, model = own_tokenizer(), make_model(vocab_size=310)
    assert own.vocab_size < 310
    model.output_weight[own.vocab_size :] = 100 * model.output_weight[:1]
    assert any(t >= own.vocab_size for g in generate(model, PROMPTS, GREEDY) for t in g.tokens)
    assert all(t < own.vocab_size for g in generate(model, PROMPTS, GREEDY, tokenizer=own) for t in g.tokens)


# -- errors ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", [generate, stream])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompts": [[5], []]}, "prompt 1: empty; at least one token is needed"),
        ({"prompts": [[5] * 129]}, "prompt 0: 129 tokens do not fit the model's context of 128"),
        ({"prompts": [[5] * 128]}, "prompt 0: 128 tokens fill the model's context; none is left for an answer"),
        ({"prompts": [[5, 97]]}, "prompt 0: token id 97 is out of range; the model knows ids 0 to 96"),
        ({"prompts": [[-1, 3]]}, "prompt 0: token id -1 is out of range"),
        ({"params": [GREEDY, GREEDY]}, "params: 2 given for 1 prompts"),
        ({"params": SamplingParams(suppress_tokens=(96, 97))}, "sampling: suppress_tokens: token id 97 is out of"),
        ({"params": SamplingParams(begin_suppress_tokens=(99,))}, "begin_suppress_tokens: token id 99 is out of range"),
        ({"params": SamplingParams(bad_words_ids=((9,), (1, 97)))}, "bad_words_ids: token id 97 is out of range"),
        ({"params": SamplingParams(stop=("x",))}, "stop: stop strings need a tokenizer"),
        ({"prefill_chunk": 0}, "prefill_chunk: must be a positive number of tokens, not 0"),
        ({"n": 0}, "n: must be a positive number of continuations, not 0"),
        ({"k": [1, 2]}, "k: 2 given for 1 prompts"),
    ],
)
def test_bad_arguments_are_refused_at_once(call: Any, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as error:
        call(MODEL, **{"prompts": [[5]], "params": GREEDY, **arguments})
    assert message in str(error.value)


def test_logits_that_are_not_finite_are_an_error_not_a_token() -> None:
    model = make_model()
    model.norm.weight[0] = float("nan")
    with pytest.raises(MixtralError, match=r"logits are not finite"):
        generate(model, [[5]], GREEDY)


def test_no_prompts_give_no_texts() -> None:
    assert generate(MODEL, [], GREEDY) == []
