"""Sampling against the distribution written out naively, and what a seed promises."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from mixtral.engine import recommended
from mixtral.engine.params import SamplingParams
from mixtral.engine.sampling import kept, make_generator, sample
from mixtral.errors import ConfigError, UsageError


def naive(logits: list[float], params: SamplingParams) -> dict[int, float]:
    """The distribution after temperature, top_k, top_p and min_p, token by token: id -> probability."""
    order = sorted(range(len(logits)), key=lambda i: (-logits[i], i))
    order = order[: params.top_k]
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
        ({"stop": "end"}, "stop must be a tuple of strings that are not empty, not 'end'"),
        ({"stop": ("",)}, "stop must be a tuple of strings that are not empty"),
        ({"ignore_eos": 1}, "ignore_eos must be True or False, not 1"),
        ({"temprature": 1.0}, "unknown option 'temprature'; did you mean 'temperature'?"),
    ],
)
def test_bad_values_are_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as error:
        SamplingParams.from_dict(wrong)
    assert message in str(error.value)


# -- what a model's folder says ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        (None, {}),
        ("{}", {}),
        ('{"temperature": 0.6}', {}),
        ('{"do_sample": true, "top_k": 0}', {"temperature": 1.0}),
        (
            '{"do_sample": true, "temperature": 0.6, "top_p": 0.9, "top_k": 5, "min_p": null, "eos_token_id": 2}',
            {"temperature": 0.6, "top_p": 0.9, "top_k": 5},
        ),
    ],
)
def test_recommended(tmp_path: Path, text: str | None, wanted: dict[str, float]) -> None:
    if text is not None:
        (tmp_path / "generation_config.json").write_text(text)
    assert recommended(tmp_path) == wanted


@pytest.mark.parametrize("text", ["{", '{"do_sample": true, "temperature": "hot"}', '{"do_sample": 1, "top_k": 0.5}'])
def test_a_damaged_recommendation(tmp_path: Path, text: str) -> None:
    (tmp_path / "generation_config.json").write_text(text)
    with pytest.raises(ConfigError, match=r"generation_config\.json: "):
        recommended(tmp_path)
