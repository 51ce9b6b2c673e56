"""Sampling against the distribution written out naively, and what a seed promises."""

from __future__ import annotations

import itertools
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from mixtral.engine.params import SamplingParams
from mixtral.engine.sampling import kept, sample
from mixtral.engine.seeds import make_generator
from mixtral.errors import UsageError


def naive(logits: list[float], params: SamplingParams) -> dict[int, float]:
    """The distribution after temperature, top_k, top_p and min_p, token by token: id -> probability."""
    order = sorted(range(len(logits)), key=lambda i: (-logits[i], i))
    lowest = logits[order[: params.top_k][-1]]
    order = [i for i in order if logits[i] >= lowest]  # with all that are equal to the last, as transformers
    weights = {i: math.exp((logits[i] - logits[order[0]]) / params.temperature) for i in order}
    total = sum(weights.values())
    left, mass = {}, 0.0
    for i in order:
        if mass < params.top_p:
            left[i] = weights[i] / total
        mass += weights[i] / total
    left = {i: p for i, p in left.items() if p >= params.min_p * left[order[0]]}
    total = sum(left.values())
    return {i: p / total for i, p in left.items()}


LOGITS = st.lists(st.integers(-20, 20).map(lambda n: n / 4), min_size=1, max_size=12)  # ties are common
PARAMS = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.3, 1.0, 2.5]),
    top_k=st.none() | st.integers(1, 15),
    top_p=st.just(1.0) | st.floats(0.05, 1.0),
    min_p=st.just(0.0) | st.floats(0.0, 1.0),
)


@settings(max_examples=100)
@given(LOGITS, PARAMS)
def test_what_is_kept_equals_the_naive_distribution(logits: list[float], params: SamplingParams) -> None:
    wanted = naive(logits, params)
    masses = naive(logits, SamplingParams(temperature=params.temperature, top_k=params.top_k))
    sums = torch.tensor(list(masses.values()), dtype=torch.float64).cumsum(0)
    # a token right on a border is rounding's to decide
    assume(len(sums) < 2 or params.top_p == 1 or (sums[:-1] - params.top_p).abs().min() > 1e-5)
    ratios = torch.tensor(list(masses.values()), dtype=torch.float64) / next(iter(masses.values()))
    assume(params.min_p in (0.0, 1.0) or (ratios - params.min_p).abs().min() > 1e-5)
    probabilities, ids = kept(torch.tensor(logits), params)
    unfiltered = params.top_k is None and params.top_p == 1 and params.min_p == 0
    assert ids.tolist() == (sorted(wanted) if unfiltered else list(wanted))
    expected = torch.tensor([wanted[i] for i in ids.tolist()])
    torch.testing.assert_close(probabilities / probabilities.sum(), expected, rtol=1e-4, atol=1e-6)


FILTERS: dict[str, list[float | int]] = {  # in transformers' order: the values that are tried
    "temperature": [0.3, 2.5], "top_h": [0.2, 0.7], "top_k": [1, 7, 90], "top_p": [0.03, 0.6], "min_p": [0.02, 0.4],
    "typical_p": [0.05, 0.6], "epsilon_cutoff": [3e-4, 0.04, 0.9], "eta_cutoff": [3e-4, 0.1],
}  # fmt: skip


def warped(logits_BV: Tensor, values: dict[str, Any]) -> Tensor:
    """The probabilities after transformers' own warpers, in its own order."""
    config = transformers.GenerationConfig(do_sample=True, **{"top_k": 0, **values})
    model = transformers.MixtralForCausalLM(transformers.MixtralConfig(
        vocab_size=8, hidden_size=4, intermediate_size=4, num_hidden_layers=1, num_attention_heads=1,
        num_key_value_heads=1, num_local_experts=2))  # fmt: skip
    config._eos_token_tensor = None
    return model._get_logits_processor(config, 0)(torch.zeros(len(logits_BV), 1).long(), logits_BV).softmax(-1)


def is_clear(logits_V: Tensor, values: dict[str, Any]) -> bool:
    """Whether no filter's bound is so near that rounding decides: a bound moved by 1e-4 of itself keeps the same."""
    def left(factor: float) -> list[int]:
        moved = {n: v if n in ("top_k", "temperature") else min(v * factor, 1.0) for n, v in values.items()}
        return sorted(kept(logits_V, SamplingParams(**{"temperature": 1.0, **moved}))[1].tolist())

    return left(1 - 1e-4) == left(1 + 1e-4)


@pytest.mark.parametrize("names", [(n,) for n in FILTERS] + list(itertools.combinations(FILTERS, 2)) + [tuple(FILTERS)],
                         ids="+".join)  # fmt: skip
def test_what_is_kept_equals_transformers(names: tuple[str, ...]) -> None:
    """Each filter, each pair of them, and all together: the order shows in the pairs."""
    generator = torch.Generator().manual_seed(0)
    logits_BV = torch.randn(6, 120, generator=generator) * torch.tensor([0.1, 1, 2, 3, 5, 8])[:, None]
    logits_BV[3] = logits_BV[3].round()  # ties
    logits_BV[4, ::3] = -math.inf  # banned
    n_clear = 0
    choices = list(itertools.product(*(FILTERS[name] for name in names)))
    for choice in choices[:: max(1, len(choices) // 8)]:
        values = dict(zip(names, choice, strict=True))
        wanted_BV = warped(logits_BV, values)
        for row, (logits_V, wanted_V) in enumerate(zip(logits_BV, wanted_BV, strict=True)):
            if not is_clear(logits_V, values) or (row == 3 and "top_p" in values):  # its order of ties is not fixed
                continue
            n_clear += 1
            probabilities, ids = kept(logits_V, SamplingParams(**{"temperature": 1.0, **values}))
            found_V = torch.zeros(120).index_put((ids,), probabilities / probabilities.sum())
            torch.testing.assert_close(found_V, wanted_V, rtol=1e-4, atol=1e-6, msg=lambda m, v=values: f"{v}: {m}")
    assert n_clear >= 6


@pytest.mark.parametrize("top_p", [1 - 1e-5, 1 - 1e-6, 1 - 1e-7])
def test_top_p_near_one_keeps_as_many_as_transformers(top_p: float) -> None:
    """It sums from the other end, where the probabilities that decide are not lost beside the large ones."""
    for logits_V in (1 + torch.arange(4)[:, None]) * torch.randn(4, 5000, generator=torch.Generator().manual_seed(0)):
        found = len(kept(logits_V, SamplingParams(temperature=1.0, top_p=top_p))[1])
        assert found == pytest.approx(int((warped(logits_V[None], {"top_p": top_p}) > 0).sum()), abs=1)


def test_a_banned_token_is_never_sampled() -> None:
    """A uniform number next to 1 rounds up to the whole sum: the last token that has a probability is meant."""
    logits_V = torch.tensor([1.0, 2.0, -math.inf, -math.inf])
    highest = SimpleNamespace(rand=lambda *_, **__: torch.tensor(1.0))
    for params in (SamplingParams(temperature=1.0), SamplingParams(temperature=1.0, top_k=4)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch, "rand", highest.rand)
            assert sample(logits_V[None], [params], [make_generator(params, 0)]).item() in (0, 1)


def test_draws_follow_the_distribution() -> None:
    """Chi-squared over 2,000 draws, fixed seed; 99.9 % of honest samplers stay under 18.5 at 4 degrees of freedom."""
    logits, params = [1.0, 0.5, -1.0, 2.0, 0.0, -6.0], SamplingParams(temperature=1.3, top_k=5, seed=5)
    wanted = naive(logits, params)
    generator = make_generator(params, 0)
    n = 2000
    batch = torch.tensor(logits).expand(n, -1)
    counts = torch.bincount(sample(batch, [params] * n, [generator] * n), minlength=6).tolist()
    assert counts[5] == 0
    assert sum((counts[i] - n * p) ** 2 / (n * p) for i, p in wanted.items()) < 18.5


def test_greedy_takes_the_lower_of_equal_logits_and_draws_no_random_number() -> None:
    params = SamplingParams()
    generator = make_generator(params, 0)
    state = generator.get_state()
    logits_BV = torch.tensor([[0.0, 3.0, 1.0, 3.0], [2.0, 2.0, 2.0, 2.0]])
    assert sample(logits_BV, [params] * 2, [generator] * 2).tolist() == [1, 0]
    assert torch.equal(generator.get_state(), state)


@pytest.mark.parametrize("only_the_best", [{"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}, {"temperature": 1e-300}])
def test_the_narrowest_filters_equal_greedy(only_the_best: dict[str, Any]) -> None:
    logits_BV = torch.randn(20, 50, generator=torch.Generator().manual_seed(0)) * 1e4
    params = [SamplingParams(**{"temperature": 1.0, **only_the_best})] * 20
    generators = [make_generator(params[0], i) for i in range(20)]
    assert torch.equal(sample(logits_BV, params, generators), logits_BV.argmax(-1))


def test_a_row_does_not_depend_on_the_others() -> None:
    logits_BV = torch.randn(4, 30, generator=torch.Generator().manual_seed(1))
    params = [SamplingParams(temperature=t, seed=s) for t, s in ((1.0, 7), (0.0, 7), (2.0, 8), (1.0, 7))]
    together = sample(logits_BV, params, [make_generator(p, i) for i, p in enumerate(params)])
    alone = [sample(logits_BV[i : i + 1], [p], [make_generator(p, i)]) for i, p in enumerate(params)]
    assert together.tolist() == torch.cat(alone).tolist()


def test_seeds_and_indices_never_meet() -> None:
    def first(seed: int | None, index: int) -> float:
        return torch.rand((), generator=make_generator(SamplingParams(seed=seed), index)).item()

    numbers = [first(seed, index) for seed in range(8) for index in range(8)]
    assert len(set(numbers)) == 64  # seed + index would repeat
    assert numbers == [first(seed, index) for seed in range(8) for index in range(8)]
    assert first(None, 0) != first(None, 0)
    assert 0 <= first(2**200, 0) < 1


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"max_tokens": 0}, "max_tokens must be a positive integer, not 0"),
        ({"max_tokens": 1.5}, "max_tokens must be a positive integer, not 1.5"),
        ({"max_tokens": True}, "max_tokens must be a positive integer, not True"),
        ({"temperature": -1}, "temperature must be a number of at least 0, not -1"),
        ({"temperature": float("nan")}, "temperature must be a number of at least 0, not nan"),
        ({"top_k": 0}, "top_k must be a positive integer or None, not 0"),
        ({"top_p": 0.0}, "top_p must be above 0 and at most 1, not 0.0"),
        ({"top_p": 1.1}, "top_p must be above 0 and at most 1, not 1.1"),
        ({"min_p": -0.1}, "min_p must be between 0 and 1, not -0.1"),
        ({"seed": -1}, "seed must be an integer of at least 0 or None, not -1"),
        ({"seed": "x"}, "seed must be an integer of at least 0 or None, not 'x'"),
        ({"stop": "end"}, "stop must be one or more texts that are not empty, not 'end'"),
        ({"stop": ("",)}, "stop must be one or more texts that are not empty, not ['']"),
        ({"max_length": 0}, "max_length must be a positive integer or None, not 0"),
        ({"min_tokens": -1}, "min_tokens must be an integer of at least 0, not -1"),
        ({"min_length": 1.0}, "min_length must be an integer of at least 0, not 1.0"),
        ({"repetition_penalty": 0}, "repetition_penalty must be a positive number from 1e-30 to 1e30, not 0"),
        ({"repetition_penalty": 1e31}, "repetition_penalty must be a positive number from 1e-30 to 1e30, not 1e+31"),
        ({"no_repeat_ngram_size": True}, "no_repeat_ngram_size must be an integer of at least 0, not True"),
        ({"bad_words_ids": [[1], []]}, "bad_words_ids must be a list of lists of token ids, none of them empty"),
        ({"bad_words_ids": [1]}, "bad_words_ids must be a list of lists of token ids"),
        ({"suppress_tokens": 5}, "suppress_tokens must be a list of token ids, not 5"),
        ({"begin_suppress_tokens": [1, -1]}, "begin_suppress_tokens must be a list of token ids, not [1, -1]"),
        ({"top_h": 0}, "top_h must be above 0 and at most 1, or None, not 0"),
        ({"typical_p": 0}, "typical_p must be above 0 and at most 1, not 0"),
        ({"epsilon_cutoff": 1}, "epsilon_cutoff must be at least 0 and below 1, not 1"),
        ({"eta_cutoff": float("inf")}, "eta_cutoff must be at least 0 and below 1, not inf"),
        ({"ignore_eos": 1}, "ignore_eos must be True or False, not 1"),
        ({"temprature": 1.0}, "unknown option 'temprature'; did you mean 'temperature'?"),
    ],
)
def test_bad_values_are_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as error:
        SamplingParams.from_dict(wrong)
    assert message in str(error.value)
