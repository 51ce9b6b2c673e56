"""Speculation changes no answer: with any drafter, right or wrong guesses, at any temperature, in any room."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest

from mixtral.engine import KVPool, SamplingParams
from mixtral.engine.continuation import Continuation
from mixtral.engine.engine import Engine
from mixtral.engine.native_runner import NativeRunner
from mixtral.engine.runner import Runner, TorchRunner
from mixtral.engine.speculative import Account, DraftModel, OwnWeights, PromptLookup, Speculation
from tests.engine.models import make_model, random_tokens
from tests.engine.test_engine import MODELS, NATIVE, alone, assert_all_returned, assert_equal, check_blocks, runner_of

PARAMS = [
    SamplingParams(max_tokens=30, ignore_eos=True),
    SamplingParams(max_tokens=17, temperature=0.8, seed=4, ignore_eos=True),
    SamplingParams(max_tokens=24, repetition_penalty=1.3, ignore_eos=True),
    SamplingParams(max_tokens=25, temperature=1.0, top_k=5, seed=1, presence_penalty=0.5, ignore_eos=True),
]  # fmt: skip


class Always(Speculation):
    """Guesses whatever the clock says."""

    def propose(self, decoding: Sequence[Continuation], room: int) -> None:
        self._plain[len(decoding)] = 1.0, self._steps
        for sequence in decoding:
            self._account(sequence).balance = 1.0
        super().propose(decoding, room)


class Oracle:
    """Guesses right with some probability."""

    def __init__(self, answers: dict[tuple[int, ...], list[int]], share: float) -> None:
        self.answers, self.share, self.random = answers, share, random.Random(3)

    def propose(self, sequences: Sequence[Continuation], most: Sequence[int]) -> list[list[int]]:
        found = []
        for s, n in zip(sequences, most, strict=True):
            answer = self.answers[tuple(s.all_tokens[: s.n_prompt])][len(s.all_tokens) - s.n_prompt :][:n]
            found.append([t if self.random.random() < self.share else 5 for t in answer])
        return found

    def drop(self, sequence: Continuation) -> None:
        pass


def drafter_of(kind: str, runner: Runner, answers: dict[tuple[int, ...], list[int]]) -> Any:
    other = make_model(seed=9)
    return {
        "lookup": PromptLookup, "one expert": lambda: OwnWeights(runner, 1), "itself": lambda: OwnWeights(runner, None),
        "draft model": lambda: DraftModel(TorchRunner(other, KVPool(other.config, other.embedding.dtype))),
        "always right": lambda: Oracle(answers, 1.0), "half right": lambda: Oracle(answers, 0.6),
    }[kind]()  # fmt: skip


KINDS = ["lookup", "one expert", "itself", "draft model", "always right", "half right"]


@pytest.mark.parametrize(("name", "kind"), [
    (name, kind) for name in MODELS for kind in KINDS if name != "dense" or kind != "one expert"
])  # fmt: skip
@pytest.mark.parametrize("n_blocks", [200, 28])
def test_answers_are_the_same(name: str, kind: str, n_blocks: int) -> None:
    model = MODELS[name]
    prompts = [random_tokens(6, seed=i) * (2 + i % 3) for i in range(8)]
    params = [PARAMS[i % len(PARAMS)] for i in range(8)]
    wanted = [alone(model, prompt, p)[0] for prompt, p in zip(prompts, params, strict=True)]
    answers = {tuple(p): w.tokens for p, w in zip(prompts, wanted, strict=True)}
    runner = runner_of(model, n_blocks)
    engine = Engine(runner, max_sequences=8, step_tokens=40, drafter=drafter_of(kind, runner, answers))
    assert engine.speculation is not None
    engine.speculation = Always(engine.speculation.drafter)
    requests = [engine.add(prompt, p) for prompt, p in zip(prompts, params, strict=True)]
    while engine.has_work:
        engine.step()
        check_blocks(engine)
    for request, theirs in zip(requests, wanted, strict=True):
        assert_equal(model, request.results()[0], theirs)
    assert engine.speculation.drafted > 0 or n_blocks == 28
    if n_blocks == 200 and kind == "itself":  # the samples are not its guesses
        assert engine.speculation.accepted > 0.3 * engine.speculation.drafted
    if n_blocks == 200 and kind == "always right":
        assert engine.speculation.accepted > 0.9 * engine.speculation.drafted and engine.metrics.steps < 20
    assert_all_returned(engine)


def test_a_copy_in_fewer_bits_on_the_same_keys_and_values() -> None:
    if not NATIVE:
        pytest.skip("no native library")
    model, rough = NATIVE["native"], NATIVE["native int8"]
    runner = runner_of(model)
    engine = Engine(runner, max_sequences=8, step_tokens=40, drafter=OwnWeights(NativeRunner(rough, runner.pool), None))
    engine.speculation = Always(engine.speculation.drafter)  # type: ignore[union-attr]
    prompt = random_tokens(9)
    assert_equal(model, engine.generate([prompt], PARAMS[0])[0], alone(model, prompt, PARAMS[0])[0])
    assert engine.speculation.accepted > 0.6 * engine.speculation.drafted


def test_a_draft_model_without_room_guesses_less_and_fails_nobody() -> None:
    model, other = MODELS["full"], make_model(seed=9)
    drafter = DraftModel(TorchRunner(other, KVPool(other.config, other.embedding.dtype, block_size=4, n_blocks=5,
                                                   grows=False)))  # fmt: skip
    engine = Engine(runner_of(model), max_sequences=8, step_tokens=40, drafter=drafter)
    engine.speculation = Always(drafter)
    prompts = [random_tokens(9, seed=i) for i in range(3)]
    for prompt, ours in zip(prompts, engine.generate(prompts, PARAMS[0]), strict=True):
        assert_equal(model, ours, alone(model, prompt, PARAMS[0])[0])
    assert_all_returned(engine)


def test_an_account_that_loses_stops_and_is_tried_again() -> None:
    account, guessed = Account(), 0
    for _ in range(1000):
        if account.may_guess():
            guessed += 1
            account.settle(3, 0, 0.0, 0.5, 1.0)  # half a step lost each time
        else:
            account.step(1.0)
    assert 15 < guessed < 25 and account.balance > -0.011 * account.spent - 0.5  # a hundredth, and one guess
    for _ in range(100):
        account.settle(3, 3, 3.0, 0.5, 1.0)
    assert account.may_guess() and account.balance == 4.0  # however long the success
    lost = 0
    while account.may_guess():
        account.settle(3, 0, 0.0, 0.5, 1.0)
        lost += 1
    assert lost < 35 and account.size == 1


def test_lookup_finds_what_followed_last() -> None:
    from mixtral.engine.speculative import _Index

    index, tokens = _Index(), [1, 2, 3, 9, 1, 2, 3, 7, 8, 1, 2]
    assert index.after(tokens, 5) == [3, 7, 8, 1, 2]
    assert index.after([*tokens, 3], 2) == [7, 8]
    assert index.after([*tokens, 3, 5], 2) == []
