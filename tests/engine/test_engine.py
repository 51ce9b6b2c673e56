"""The engine against the plain loop: any order, any room, any neighbours give each request the answer it has alone."""

from __future__ import annotations

import random
import threading
from typing import Any

import pytest
import torch

from mixtral.engine import KVPool, Runner, SamplingParams, TorchRunner, masks
from mixtral.engine import generate as plain
from mixtral.engine.continuation import Generation
from mixtral.engine.engine import Engine
from mixtral.engine.native_runner import NativeRunner
from mixtral.engine.request import Request
from mixtral.engine.scheduler import AGEING
from mixtral.errors import MixtralError, UsageError
from mixtral.kernels.native import library as native
from mixtral.model import Mixtral
from tests.engine.models import CONFIG, WINDOW, make_model, random_tokens
from tests.kernels.step_models import pack_parts

TORCH = {"full": make_model(), "window": make_model(sliding_window=WINDOW),
         "dense": make_model(n_experts=1, experts_per_token=1)}  # fmt: skip
NATIVE = {} if native.available() else {
    "native": pack_parts(make_model(), "fp32"),
    "native window": pack_parts(make_model(sliding_window=WINDOW), "fp32"),
    "native int8": pack_parts(make_model(), "int8"),
}  # fmt: skip
MODELS = TORCH | NATIVE
GREEDY = SamplingParams(max_tokens=12, ignore_eos=True)


def runner_of(model: Mixtral, n_blocks: int = 400, block_size: int = 4) -> Runner:
    pool = KVPool(model.config, torch.float32, block_size=block_size, n_blocks=n_blocks, grows=False)
    return NativeRunner(model, pool) if model in NATIVE.values() else TorchRunner(model, pool)


def engine_of(model: Mixtral, n_blocks: int = 400, **options: Any) -> Engine:
    return Engine(runner_of(model, n_blocks), **{"max_sequences": 8, "step_tokens": 32} | options)


def alone(model: Mixtral, prompt: list[int], params: SamplingParams, **options: Any) -> list[Generation]:
    return plain(runner_of(model), [prompt], params, **options)


def assert_equal(model: Mixtral, ours: Generation, wanted: Generation) -> None:
    """Bit for bit on the native step; through torch, whose sums depend on shapes, to 1e-4."""
    assert ours.tokens == wanted.tokens and ours.finish_reason == wanted.finish_reason
    if model in NATIVE.values():
        assert ours.logprobs == wanted.logprobs
    else:
        torch.testing.assert_close(ours.logprobs, wanted.logprobs, rtol=0, atol=1e-4)


def assert_all_returned(engine: Engine) -> None:
    assert engine.pool.ids == [] and engine.pool.n_free == engine.pool.n_blocks
    assert not engine.scheduler.running and not engine.scheduler.waiting and not engine.has_work


def some_params(rng: random.Random) -> SamplingParams:
    return SamplingParams(
        max_tokens=rng.randint(1, 14), temperature=rng.choice([0.0, 1.0]), seed=rng.randint(0, 9), ignore_eos=True,
        presence_penalty=rng.choice([0.0, 0.7]), logprobs=rng.choice([None, 3]),
    )  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("room", ["much", "little"])
def test_many_requests_equal_each_alone(name: str, room: str) -> None:
    """Little room: a quarter of what they need together, so that sequences are preempted."""
    model, rng = MODELS[name], random.Random(name)
    prompts = [random_tokens(rng.randint(1, 60), seed=i) for i in range(24)]
    params = [some_params(rng) for _ in prompts]
    ks = [rng.choice([None, 1, 2, 3, 0.4, 0.8]) if model.config.is_sparse else None for _ in prompts]
    engine = engine_of(model, n_blocks=400 if room == "much" else 24)
    got = engine.generate(prompts, params, k=ks)
    for prompt, wanted, k, ours in zip(prompts, params, ks, got, strict=True):
        theirs = alone(model, prompt, wanted, k=k)[0]
        assert_equal(model, ours, theirs) if wanted.seed is None or wanted.temperature == 0 else None
        if wanted.logprobs is not None:
            assert [len(a) for a in ours.alternatives] == [3] * len(ours.tokens)
    assert_all_returned(engine)


@pytest.mark.parametrize("name", MODELS)
def test_who_comes_last_gives_up_its_blocks(name: str) -> None:
    model, params = MODELS[name], SamplingParams(max_tokens=40, ignore_eos=True)
    prompts = [random_tokens(4, seed=i) for i in range(3)]
    engine = engine_of(model, n_blocks=12)
    for prompt, ours in zip(prompts, engine.generate(prompts, params), strict=True):
        assert_equal(model, ours, alone(model, prompt, params)[0])
    assert "window" in name or engine.scheduler.preemptions > 0
    assert_all_returned(engine)


def test_more_continuations_than_run_at_once() -> None:
    params = SamplingParams(max_tokens=5, temperature=1.0, seed=1, ignore_eos=True)
    engine = engine_of(MODELS["full"], n_blocks=30, max_sequences=4, step_tokens=6)
    got = engine.generate([[5, 9]], params, n=9)
    for ours, theirs in zip(got, alone(MODELS["full"], [5, 9], params, n=9), strict=True):
        assert_equal(MODELS["full"], ours, theirs)


@pytest.mark.parametrize("name", MODELS)
def test_seeds_give_the_same_whatever_else_runs(name: str) -> None:
    model = MODELS[name]
    params = SamplingParams(max_tokens=10, temperature=1.0, seed=3, ignore_eos=True)
    prompts = [random_tokens(n, seed=n) for n in (5, 9, 30)]
    got = engine_of(model, n_blocks=26).generate(prompts, params, n=3)
    want = plain(runner_of(model), prompts, params, n=3)
    for ours, theirs in zip(got, want, strict=True):
        assert_equal(model, ours, theirs)


@pytest.mark.parametrize("name", MODELS)
def test_a_shared_prefix_is_read_once(name: str) -> None:
    model = MODELS[name]
    prefix = random_tokens(60, seed=1)
    prompts = [prefix + random_tokens(5, seed=10 + i) for i in range(6)]
    engine = engine_of(model)
    first = engine.generate(prompts[:1], GREEDY)
    read = engine.metrics.prompt_tokens
    rest = engine.generate(prompts[1:], GREEDY)
    assert engine.scheduler.prefix_hits == 5 * 60 and engine.metrics.prompt_tokens - read == 5 * 5
    for prompt, ours in zip(prompts, first + rest, strict=True):
        assert_equal(model, ours, alone(model, prompt, GREEDY)[0])
    assert_all_returned(engine)


@pytest.mark.skipif("full" not in MODELS, reason="never")
def test_prefixes_of_another_k_are_others() -> None:
    model, prompt = MODELS["full"], random_tokens(40)
    engine = engine_of(model)
    for k in (None, 1, 3, 1):
        assert_equal(model, engine.generate([prompt], GREEDY, k=k)[0], alone(model, prompt, GREEDY, k=k)[0])
    assert engine.scheduler.prefix_hits == 36


@pytest.mark.parametrize("name", [name for name in MODELS if name != "dense"])
@pytest.mark.parametrize("share", [0.2, 0.55, 0.9, 0.999])
def test_a_share_of_the_experts_probability(name: str, share: float) -> None:
    """Against the definition: the fewest experts whose softmax over all of them sums to it; weights as ever."""
    [got] = engine_of(MODELS[name]).generate([random_tokens(30)], GREEDY, k=share, keep_routing=True)
    numbers = set()
    for layer in got.routing:
        for logits_E, experts_K, weights_K in zip(layer.logits_TE, layer.experts_TK, layer.weights_TK, strict=True):
            order = logits_E.sort(descending=True, stable=True).indices
            sums = logits_E.double().softmax(0)[order].cumsum(0)
            n = int((sums < share).sum()) + 1
            numbers.add(n)
            assert experts_K.tolist()[:n] == order[:n].tolist() and set(experts_K.tolist()[n:]) <= {-1}
            torch.testing.assert_close(weights_K[:n], logits_E[order[:n]].softmax(0))
    assert len(numbers) > 1 or share in (0.2, 0.999)


@pytest.mark.parametrize("name", MODELS)
def test_routing_and_prompt_logprobs(name: str) -> None:
    model, prompt = MODELS[name], random_tokens(45)
    engine = engine_of(model, n_blocks=30)
    engine.generate([prompt], GREEDY)  # what is remembered does not shorten what is recorded
    [ours] = engine.generate([prompt], GREEDY, keep_routing=True)
    [theirs] = alone(model, prompt, GREEDY, keep_routing=True)
    for a, b in zip(ours.routing, theirs.routing, strict=True):
        assert torch.equal(a.experts_TK, b.experts_TK)
    read = SamplingParams(max_tokens=0, prompt_logprobs=2)
    [scored] = engine.generate([prompt], read)
    whole = runner_of(model).read(prompt).logits
    assert whole is not None
    wanted = whole.log_softmax(-1)[:-1].gather(1, torch.tensor(prompt[1:])[:, None])[:, 0]
    torch.testing.assert_close(torch.tensor(scored.prompt_logprobs), wanted, rtol=0, atol=1e-5)
    assert len({tuple(g.prompt_logprobs) for g in engine.generate([prompt], read, n=3)}) == 1  # all three end
    assert scored.tokens == [] and [len(a) for a in scored.prompt_alternatives] == [2] * 44
    assert_all_returned(engine)


def drive(model: Mixtral, seed: int, steps: int) -> Engine:
    """Random arrivals, lengths, forks, shared beginnings, priorities and aborts; blocks are counted after each step."""
    rng, engine = random.Random(seed), engine_of(model, n_blocks=40)
    stems = [random_tokens(rng.randint(1, 40), seed=100 + i) for i in range(4)]
    live: list[tuple[Request, list[int], SamplingParams, int | None, int]] = []
    for step in range(steps):
        if rng.random() < 0.3 and len(live) < 20:
            prompt = rng.choice(stems) + random_tokens(rng.randint(0, 12), seed=step)
            params, n = some_params(rng), rng.choice([1, 1, 1, 3])
            k = rng.choice([None, None, 1, 3]) if model.config.is_sparse else None
            live.append((engine.add(prompt, params, n=n, k=k, priority=rng.randint(0, 2)), prompt, params, k, n))
        if live and rng.random() < 0.03:
            request, *_ = live.pop(rng.randrange(len(live)))
            engine.abort(request)
            assert all(c.id is None for c in request.continuations)
        engine.step()
        check_blocks(engine)
        for entry in [e for e in live if e[0].is_finished]:
            live.remove(entry)
            request, prompt, params, k, n = entry
            if rng.random() < 0.2:
                for ours, theirs in zip(request.results(), alone(model, prompt, params, n=n, k=k), strict=True):
                    assert_equal(model, ours, theirs)
    for request, *_ in live:
        engine.abort(request)
    assert_all_returned(engine)
    return engine


def check_blocks(engine: Engine) -> None:
    """Each block has as many users as there are sequences that name it, and free are those of none."""
    pool, counted = engine.pool, [0] * engine.pool.n_blocks
    for id in pool.ids:
        for block in pool._sequences[id].blocks:
            if block >= 0:
                counted[block] += 1
    assert list(pool.blocks.used()) == counted and pool.n_free == counted.count(0)
    assert {c.id for c in engine.scheduler.running} == set(pool.ids)


@pytest.mark.parametrize("name", MODELS)
def test_random_load(name: str) -> None:
    engine = drive(MODELS[name], seed=1, steps=250)
    assert engine.scheduler.prefix_hits > 0


def test_first_come_first_served_within_the_bound() -> None:
    engine = engine_of(MODELS["full"], n_blocks=24, max_sequences=1)
    requests = [engine.add(random_tokens(20, seed=i), GREEDY) for i in range(4)]
    order: list[Request] = []
    while engine.has_work:
        engine.step()
        order += [r for r in requests if r.is_finished and r not in order]
    assert order == requests
    for steps, overtakes in ((AGEING + 1, False), (AGEING // 2, True)):
        engine.add(random_tokens(20), GREEDY)  # which both wait for
        low = engine.add(random_tokens(20), GREEDY, priority=1)
        engine.step()
        engine.scheduler.steps += steps
        late = engine.add(random_tokens(20), GREEDY)
        while not (low.is_finished or late.is_finished):
            engine.step()
        assert late.is_finished is overtakes
        while engine.has_work:
            engine.step()
    assert_all_returned(engine)


def test_masks() -> None:
    model, prompt = MODELS["full"], random_tokens(9)
    engine = engine_of(model)
    allowed = torch.zeros(CONFIG.vocab_size, dtype=torch.bool)
    allowed[[5, 7]] = True

    def raises(tokens: Any) -> torch.Tensor:
        raise ValueError(f"no such state after {len(tokens)} tokens")

    fine = engine.add(prompt, GREEDY)
    held = engine.add(prompt, GREEDY, mask=lambda _: allowed)
    broken = engine.add(prompt, GREEDY, mask=raises)
    empty = engine.add(prompt, GREEDY, mask=lambda _: ~torch.ones(CONFIG.vocab_size, dtype=torch.bool))
    wrong = engine.add(prompt, GREEDY, mask=lambda _: torch.ones(3))
    while engine.has_work:
        engine.step()
    assert_equal(model, fine.results()[0], alone(model, prompt, GREEDY)[0])
    assert set(held.results()[0].tokens) <= {5, 7}
    assert broken.error == "mask: ValueError: no such state after 9 tokens"
    assert "allows no token" in empty.error and "bool of 97 tokens" in wrong.error
    assert_all_returned(engine)


def test_a_mask_that_stalls_ends_its_own_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(masks, "SECONDS", 0.05)
    model, prompt = MODELS["full"], random_tokens(9)
    engine, forever = engine_of(model), threading.Event()
    stalled = engine.add(prompt, GREEDY, mask=lambda _: forever.wait() and None)  # type: ignore[func-returns-value]
    fine = engine.add(prompt, GREEDY)
    while engine.has_work:
        engine.step()
    forever.set()
    assert stalled.error == "mask: no answer within 0.05 s"
    assert_equal(model, fine.results()[0], alone(model, prompt, GREEDY)[0])


def test_damaged_logits_end_their_own_request() -> None:
    model = make_model()
    model.embedding.weight[7] = float("nan")
    engine = engine_of(model)
    good, bad = engine.add([5, 9, 11], GREEDY), engine.add([5, 7, 11], GREEDY)
    while engine.has_work:
        engine.step()
    assert good.results()[0].finish_reason == "length" and "not finite" in bad.error
    with pytest.raises(MixtralError, match="not finite"):
        engine.generate([[7]], GREEDY)
    assert_all_returned(engine)


def test_an_interrupted_step_harms_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    model, prompt = MODELS["full"], random_tokens(40)
    engine = engine_of(model)
    request = engine.add(prompt, GREEDY)
    for _ in range(4):
        engine.step()
    run = engine.runner.run

    def interrupted(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(engine.runner, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        engine.step()
    monkeypatch.setattr(engine.runner, "run", run)
    while engine.has_work:
        engine.step()
    assert_equal(model, request.results()[0], alone(model, prompt, GREEDY)[0])
    assert_all_returned(engine)


@pytest.mark.parametrize("name", MODELS)
def test_threads_share_steps(name: str) -> None:
    model = MODELS[name]
    engine, got = engine_of(model), {}
    prompts = [random_tokens(10 + i, seed=i) for i in range(6)]

    def ask(i: int) -> None:
        got[i] = engine.generate([prompts[i]], GREEDY)[0]

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, prompt in enumerate(prompts):
        assert_equal(model, got[i], alone(model, prompt, GREEDY)[0])
    assert_all_returned(engine)


def test_what_cannot_be_served_is_refused_at_once() -> None:
    engine = engine_of(MODELS["full"], n_blocks=6)
    for prompt, params, options, message in [
        (random_tokens(20), GREEDY, {}, "need 8 blocks of keys and values, and the cache has 6"),
        ([], GREEDY, {}, "empty"),
        ([1], GREEDY, {"k": 9}, "k: must lie in 1..4"),
        ([1], GREEDY, {"k": 1.5}, "k: must lie in 1..4 .the model's experts., or between 0 and 1"),
        ([1], GREEDY, {"n": 0}, "n: must lie in 1..10,000"),
        ([99], GREEDY, {}, "out of range"),
        (random_tokens(128), GREEDY, {}, "fill the model's context"),
    ]:  # fmt: skip
        with pytest.raises(UsageError, match=message):
            engine.add(prompt, params, **options)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="more tokens than sequences"):
        engine_of(MODELS["full"], max_sequences=32, step_tokens=32)
    assert_all_returned(engine)
