"""LLM: results in the shape of vLLM's, against the plain loop; beam search against all continuations; asyncio."""

from __future__ import annotations

import asyncio
import itertools
import math
from typing import Any

import pytest
import torch

import mixtral
from mixtral import LLM, LM, SamplingParams
from mixtral.engine import Engine, TorchRunner
from mixtral.engine import generate as plain
from mixtral.engine.async_engine import AsyncEngine
from mixtral.errors import MixtralError, UsageError
from tests.engine.models import make_model, random_tokens
from tests.engine.test_engine import GREEDY, assert_all_returned, engine_of
from tests.engine.test_speculative import Always

MODEL = make_model()


@pytest.fixture(scope="module")
def nano() -> LM:
    return mixtral.load("mixtral-nano")


def test_results_are_those_of_the_plain_loop(nano: LM) -> None:
    llm, tokenizer = LLM(nano, max_sequences=3, step_tokens=20), nano.tokenizer
    assert tokenizer is not None
    prompts = ["def mean(", "import ", [1, 50, 60], "The "]
    params: list[Any] = [{"max_tokens": 9, "temperature": 0}, SamplingParams(max_tokens=5, logprobs=2),
                         {"max_tokens": 4, "temperature": 1.0, "seed": 3},
                         {"max_tokens": 3, "stop": "e", "temperature": 0}]  # fmt: skip
    got = llm.generate(prompts, params, n=2, progress=False)
    for i, (prompt, wanted, output) in enumerate(zip(prompts, params, got, strict=True)):
        ids = tokenizer.encode(prompt, eos=False) if isinstance(prompt, str) else prompt
        assert output.prompt == (prompt if isinstance(prompt, str) else None) and output.prompt_token_ids == ids
        alone = plain(nano.runner, [ids], llm.params(wanted), n=2, tokenizer=tokenizer, first=2 * i)
        for j, (ours, theirs) in enumerate(zip(output.outputs, alone, strict=True)):
            assert (ours.index, ours.text, ours.token_ids, ours.finish_reason, ours.token_logprobs) == (
                j, theirs.text, theirs.tokens, theirs.finish_reason, theirs.logprobs)  # fmt: skip
            assert ours.cumulative_logprob == sum(theirs.logprobs) and ours.error == ""
    assert got[0].outputs[0].logprobs is None
    places = got[1].outputs[0].logprobs
    assert places is not None and [len(place) for place in places] == [2] * 5  # the token is the first of the two
    assert llm.metrics()["generated_tokens"] == sum(len(o.token_ids) for r in got for o in r.outputs)
    assert_all_returned(llm.engine)


def test_streams_scores_and_prompt_logprobs(nano: LM) -> None:
    llm = LLM(nano)
    asked: dict[str, Any] = {"max_tokens": 5, "temperature": 0}
    assert [p.token for p in llm.stream("def ", asked)] == nano.generate(nano.prompt_ids("def "), **asked)
    ids = nano.prompt_ids("import os\nimport sys")
    wanted = nano.logits(ids).log_softmax(-1)[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
    [ours] = llm.score("import os\nimport sys")
    torch.testing.assert_close(torch.tensor(ours), wanted, rtol=0, atol=1e-5)
    [read] = llm.generate([ids], SamplingParams(max_tokens=0, prompt_logprobs=1))
    assert read.prompt_logprobs is not None and read.prompt_logprobs[0] is None
    assert [place[token] for place, token in zip(read.prompt_logprobs[1:], ids[1:], strict=True) if place] == ours


def test_what_cannot_be_served_is_refused_before_any_work(nano: LM) -> None:
    llm = LLM(nano, cache_bytes=4 * nano.runner.pool.block_bytes)
    for options, message in [
        ({"params": {"temprature": 1}}, "unknown option 'temprature'; did you mean 'temperature'"),
        ({"params": [{}, {}]}, "params: 2 given for 1 prompts"), ({"k": 99}, "k: must lie in"),
        ({"params": {"max_tokens": 200}}, "blocks of keys and values, and the cache has"),
    ]:  # fmt: skip
        with pytest.raises(UsageError, match=message):
            llm.generate(["a"], **options)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="cache: 10 bytes hold no block of 32 positions"):
        LLM(nano, cache_bytes=10)
    assert llm.metrics()["steps"] == 0


@pytest.mark.parametrize("speculate", ["off", "lookup", "self", "int4", "draft"])
def test_speculation_changes_no_answer(nano: LM, speculate: str) -> None:
    llm = LLM(nano, speculate=nano if speculate == "draft" else speculate)
    if llm.engine.speculation is not None:
        llm.engine.speculation = Always(llm.engine.speculation.drafter)
    prompts = ["def mean(values):\n    return sum(values)", "import os\nimport sys\nimport os\n"]
    params = [SamplingParams(max_tokens=40), SamplingParams(max_tokens=40, temperature=1.0, seed=1)]
    for i, output in enumerate(llm.generate(prompts, params)):
        [theirs] = plain(nano.runner, [output.prompt_token_ids], params[i], tokenizer=nano.tokenizer, first=i)
        ours = output.outputs[0]
        assert (ours.token_ids, ours.text, ours.token_logprobs) == (theirs.tokens, theirs.text, theirs.logprobs)
    metrics = llm.metrics()
    if speculate == "draft":  # itself: the greedy one is always right
        assert metrics["accepted_tokens"] >= 30  # type: ignore[operator]
    assert (metrics["drafted_tokens"] == 0) == (speculate == "off")
    assert_all_returned(llm.engine)


def test_guesses_that_a_model_cannot_have(nano: LM) -> None:
    dense = LM(make_model(n_experts=1, experts_per_token=1))
    for lm, speculate, message in [
        (nano, "looup", "did you mean 'lookup'"), (dense, "self", "this model is dense"),
        (dense, "int4", "runs on the native step"), (dense, nano, "both must have one vocabulary"),
    ]:  # fmt: skip
        with pytest.raises(UsageError, match=message):
            LLM(lm, speculate=speculate)  # type: ignore[arg-type]


# -- beams -------------------------------------------------------------------------------------------------------------


def all_continuations(prompt: list[int], length: int, ends: set[int]) -> dict[tuple[int, ...], float]:
    """Every continuation of `length` tokens, or that ends before, with its log-probability."""
    found, open_ = {}, {(): 0.0}
    for _ in range(length):
        grown = {}
        for tokens, logprob in open_.items():
            logits = TorchRunner(MODEL).read([*prompt, *tokens]).logits
            assert logits is not None
            for token, more in enumerate(logits[-1].log_softmax(-1).tolist()):
                (found if token in ends else grown)[*tokens, token] = logprob + more
        open_ = grown
    return found | open_


@pytest.mark.parametrize("penalty", [0.0, 1.0])
def test_a_beam_as_wide_as_the_vocabulary_finds_the_best(penalty: float) -> None:
    prompt, ends = random_tokens(7), {4, 8}
    beams = mixtral.llm.beam_search(engine_of(MODEL), prompt, 97, 2, length_penalty=penalty, end_ids=ends)
    want = all_continuations(prompt, 2, ends)
    best = sorted(want, key=lambda tokens: -want[tokens] / len(tokens) ** penalty)[:5]
    assert [tuple(beam.tokens) for beam in beams[:5]] == best
    for beam, tokens in zip(beams, best, strict=False):
        assert math.isclose(beam.logprob, want[tokens], abs_tol=1e-4) and beam.finished == (tokens[-1] in ends)


def test_a_beam_of_one_is_greedy_and_wider_is_no_worse() -> None:
    prompt = random_tokens(9)
    engine = engine_of(MODEL)
    [one] = mixtral.llm.beam_search(engine, prompt, 1, 12, end_ids=[])
    assert one.tokens == plain(TorchRunner(MODEL), [prompt], GREEDY)[0].tokens
    best = mixtral.llm.beam_search(engine, prompt, 6, 12, end_ids=[])
    assert len(best) == 6 and best[0].logprob >= one.logprob
    with pytest.raises(UsageError, match="a width of 1 to 500"):
        mixtral.llm.beam_search(engine, prompt, 0, 12)
    assert_all_returned(engine)


# -- asyncio -----------------------------------------------------------------------------------------------------------


def test_tasks_share_the_engine_and_wait_for_room() -> None:
    prompts = [random_tokens(5 + i, seed=i) for i in range(8)]
    engine = engine_of(MODEL)

    async def run() -> list[Any]:
        async with AsyncEngine(engine, most_requests=3) as front:
            whole = [front.generate(prompt, GREEDY) for prompt in prompts[:4]]
            return await asyncio.gather(*whole, *(collect(front, prompt) for prompt in prompts[4:]))

    async def collect(front: AsyncEngine, prompt: list[int]) -> list[int]:
        return [piece.token async for piece in front.stream(prompt, GREEDY)]

    got = asyncio.run(run())
    for prompt, ours in zip(prompts, got, strict=True):
        tokens = ours if isinstance(ours[0], int) else ours[0].tokens
        assert tokens == plain(TorchRunner(MODEL), [prompt], GREEDY)[0].tokens
    assert_all_returned(engine)


def test_a_cancelled_task_takes_its_request_back() -> None:
    engine = engine_of(MODEL)
    long = SamplingParams(max_tokens=100, ignore_eos=True)

    async def run() -> None:
        async with AsyncEngine(engine) as front:
            task = asyncio.create_task(front.generate([5, 9], long))
            stream = front.stream([5, 7], long)
            await anext(stream)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await stream.aclose()  # type: ignore[attr-defined]
            assert engine.pool.ids == [] and not engine.has_work
            with pytest.raises(UsageError, match="empty"):
                await front.generate([], long)

    asyncio.run(run())


def test_an_engine_that_fails_tells_everyone(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engine_of(MODEL)

    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("out of luck")

    monkeypatch.setattr(engine.runner, "run", broken)

    async def run() -> None:
        async with AsyncEngine(engine) as front:
            with pytest.raises(MixtralError, match="engine: RuntimeError: out of luck"):
                await front.generate([5, 9], GREEDY)

    asyncio.run(run())


def test_threads_and_counts_of_engines(nano: LM) -> None:
    assert isinstance(nano.engine, Engine) and nano.engine is nano.engine
    assert len(list(itertools.islice(nano.stream("def ", max_tokens=4), 2))) == 2  # dropped in the middle
    assert not nano.engine.has_work
