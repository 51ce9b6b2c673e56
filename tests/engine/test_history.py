"""Penalty and bans against transformers' processors on random logits, each alone."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.generation import logits_process as theirs

from mixtral.engine.history import apply_history
from mixtral.engine.params import SamplingParams
from mixtral.errors import MixtralError

V, N_PROMPT, ENDS = 24, 7, (2, 5)
BAD = [[3], [2], [1, 4], [6, 7, 8], [9] * 40]
CASES: dict[str, tuple[dict[str, Any], Any]] = {
    "penalty": ({"repetition_penalty": 1.7}, theirs.RepetitionPenaltyLogitsProcessor(1.7)),
    "reward": ({"repetition_penalty": 0.6}, theirs.RepetitionPenaltyLogitsProcessor(0.6)),
    "1-grams": ({"no_repeat_ngram_size": 1}, theirs.NoRepeatNGramLogitsProcessor(1)),
    "2-grams": ({"no_repeat_ngram_size": 2}, theirs.NoRepeatNGramLogitsProcessor(2)),
    "3-grams": ({"no_repeat_ngram_size": 3}, theirs.NoRepeatNGramLogitsProcessor(3)),
    "50-grams": ({"no_repeat_ngram_size": 50}, theirs.NoRepeatNGramLogitsProcessor(50)),
    "bad words": ({"bad_words_ids": BAD}, theirs.NoBadWordsLogitsProcessor(BAD, list(ENDS))),
    "minimum": ({"min_length": 12}, theirs.MinLengthLogitsProcessor(12, list(ENDS))),
    "new minimum": ({"min_tokens": 4}, theirs.MinNewTokensLengthLogitsProcessor(N_PROMPT, 4, list(ENDS))),
    "suppressed": ({"suppress_tokens": [0, 9, 100]}, theirs.SuppressTokensLogitsProcessor([0, 9, 100])),
    "at first": ({"begin_suppress_tokens": [1, 2]}, theirs.SuppressTokensAtBeginLogitsProcessor([1, 2], N_PROMPT)),
}  # fmt: skip


def texts() -> list[list[int]]:
    """Texts that go on after the prompt, of few different tokens, so that sequences repeat."""
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(0, 9, (n,), generator=generator).tolist() for n in (7, 7, 8, 10, 11, 12, 19, 30)]


@pytest.mark.parametrize("case", CASES)
def test_equals_transformers(case: str) -> None:
    values, processor = CASES[case]
    generator = torch.Generator().manual_seed(4)
    changed = 0
    for tokens in [*texts(), [1, 2, 3, 4, 5, 6, 7, 1], [0, 0, 0, 6, 7, 8, 6, 7]]:
        logits_V = torch.randn(V, generator=generator)
        wanted_V = processor(torch.tensor([tokens]), logits_V[None])[0]
        found_V = apply_history(logits_V, SamplingParams(**values), tokens, N_PROMPT, ENDS)
        torch.testing.assert_close(found_V, wanted_V, rtol=1e-6, atol=0)
        changed += not torch.equal(wanted_V, logits_V)
    assert changed > 0 or case == "50-grams"


def test_nothing_asked_for_changes_nothing() -> None:
    logits_V = torch.randn(V).to(torch.bfloat16)
    assert apply_history(logits_V, SamplingParams(), [1, 2], 2, ENDS) is logits_V


def test_the_penalty_of_bf16_logits_is_computed_in_fp32() -> None:
    logits_V = torch.randn(V, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    found_V = apply_history(logits_V, SamplingParams(repetition_penalty=1.1), [3], 1, ENDS)
    wanted: Tensor = logits_V[3].float()
    assert found_V.dtype == torch.float32 and found_V[3] == (wanted * 1.1 if wanted < 0 else wanted / 1.1)


@pytest.mark.parametrize("penalty", [1e-30, 1e30])
def test_the_extremes_of_the_penalty_stay_finite(penalty: float) -> None:
    logits_V = torch.linspace(-80, 80, V)
    logits_V[3] = 0
    found_V = apply_history(logits_V, SamplingParams(repetition_penalty=penalty), list(range(V)), 1, ENDS)
    assert found_V.isfinite().all()


def test_a_word_that_is_an_end_token_is_no_bad_word_unless_ends_are_ignored() -> None:
    params = SamplingParams(bad_words_ids=((2,),))
    assert apply_history(torch.zeros(V), params, [1], 1, ENDS)[2] == 0
    assert apply_history(torch.zeros(V), params, [1], 1, ())[2] == -math.inf


def test_something_must_be_left() -> None:
    with pytest.raises(MixtralError, match="every token is banned by suppress_tokens, bad_words_ids"):
        apply_history(torch.zeros(V), SamplingParams(suppress_tokens=tuple(range(V))), [1], 1, ENDS)
