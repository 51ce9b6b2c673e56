"""A folder's generation_config.json through our whole generation and through transformers': the same folder, the same
tokens when greedy, the same distribution of each next token when sampling."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from mixtral.engine import SamplingParams
from mixtral.engine.history import apply_history
from mixtral.engine.sampling import kept
from mixtral.lm import LM, load
from tests.engine.models import make_model, random_tokens

PROMPT = random_tokens(20)
NEW = 24


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("both") / "model"
    LM(make_model(seed=5)).save(path)
    return path


def both(folder: Path, values: dict[str, Any] | None, config: dict[str, Any] | None = None) -> tuple[LM, Any]:
    """The folder as both load it with this generation_config.json, or none, and with its config.json changed."""
    file = folder / "generation_config.json"
    file.unlink(missing_ok=True)
    if values is not None:
        file.write_text(json.dumps(values))
    as_it_was = (folder / "config.json").read_text()
    try:
        (folder / "config.json").write_text(json.dumps({**json.loads(as_it_was), **(config or {})}))
        theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        return load(folder, dtype="fp32", device="cpu"), theirs
    finally:
        (folder / "config.json").write_text(as_it_was)


def their_text(theirs: Any, **options: Any) -> list[int]:
    found = theirs.generate(torch.tensor([PROMPT]), attention_mask=torch.ones(1, len(PROMPT)), **options)
    tokens: list[int] = found[0, len(PROMPT) :].tolist()
    return tokens


def free_text(folder: Path) -> list[int]:
    lm, _ = both(folder, {"eos_token_id": 0})
    return lm.generate(PROMPT, max_tokens=NEW, ignore_eos=True)


def greedy_cases(free: list[int]) -> dict[str, dict[str, Any]]:
    """Each made of the text without rules, so that every rule bites."""
    a, b = free[3], free[5]
    return {
        "nothing": {},
        "one end": {"eos_token_id": a},
        "ends": {"eos_token_id": [96, b, a]},
        "new minimum": {"eos_token_id": [a, b], "min_new_tokens": 9},
        "minimum": {"eos_token_id": [a, b], "min_length": len(PROMPT) + 5},
        "penalty": {"repetition_penalty": 1.3},
        "2-grams": {"no_repeat_ngram_size": 2},
        "1-grams": {"no_repeat_ngram_size": 1},
        "bad words": {"bad_words_ids": [[free[0]], free[2:4], [free[1], 3]]},
        "suppressed": {"suppress_tokens": free[1:3], "begin_suppress_tokens": [free[0]]},
        "length": {"max_length": len(PROMPT) + 6},
        "lengths": {"max_length": 3, "max_new_tokens": 5},
        "without do_sample": {"temperature": 0.1, "top_k": 1, "top_p": 0.1, "typical_p": 0.2, "min_p": 0.3},
        "all": {"eos_token_id": [a, 4], "min_new_tokens": 6, "repetition_penalty": 1.2, "no_repeat_ngram_size": 3,
                "bad_words_ids": [free[1:3]], "suppress_tokens": [free[4]], "max_length": 200},
    }  # fmt: skip


def test_greedy_tokens_are_the_same(folder: Path) -> None:
    free, (_, theirs) = free_text(folder), both(folder, {})
    lengths, texts = set(), set()
    for name, values in greedy_cases(free).items():
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 0, "pad_token_id": 0, **values}))
        lm = load(folder, dtype="fp32", device="cpu")
        theirs.generation_config = transformers.GenerationConfig.from_pretrained(folder)
        bounded = {} if "max_length" in values or "max_new_tokens" in values else {"max_new_tokens": NEW}
        ours = lm.generate(PROMPT, **({"max_tokens": NEW} if bounded else {}))
        assert ours == their_text(theirs, **bounded), name
        lengths.add(len(ours))
        texts.add(tuple(ours))
    assert len(texts) >= 11 and {4, 5, 6, NEW} <= lengths


@pytest.mark.parametrize("name", ["generation_config.json", "config.json"])
def test_end_tokens_of_either_file(folder: Path, name: str) -> None:
    """And of config.json the other keys too, where it is alone."""
    free = free_text(folder)
    ends = {"eos_token_id": [free[5], free[3]], "suppress_tokens": [free[1]]}
    if name == "config.json":
        lm, theirs = both(folder, None, ends)
    else:
        lm, theirs = both(folder, ends, {"eos_token_id": free[0], "suppress_tokens": [free[2]]})
    assert lm.config.eos_ids == (free[5], free[3]) and lm.sampling == {"suppress_tokens": (free[1],)}
    lm.sampling["min_tokens"] = theirs.generation_config.min_new_tokens = 2
    assert lm.generate(PROMPT, max_tokens=NEW) == their_text(theirs, max_new_tokens=NEW, pad_token_id=0)


SAMPLED: list[dict[str, Any]] = [
    {},
    {"temperature": 0.7, "top_p": 0.8},
    {"top_k": 0},
    {"top_k": 12, "min_p": 0.05, "repetition_penalty": 1.3},
    {"top_k": 0, "typical_p": 0.7, "no_repeat_ngram_size": 2},
    {"epsilon_cutoff": 0.01, "eta_cutoff": 0.02, "suppress_tokens": [5, 6, 7], "temperature": 1.7},
    {"top_h": 0.5, "eos_token_id": [9, 10, 11, 12], "min_new_tokens": 9},
]


@pytest.mark.parametrize("values", SAMPLED, ids=lambda values: "+".join(values) or "do_sample")
def test_sampled_distributions_are_the_same(folder: Path, values: dict[str, Any]) -> None:
    """Of every token of a text that transformers sampled, the probabilities that it was sampled from."""
    lm, theirs = both(folder, {"eos_token_id": 0, "pad_token_id": 0, "do_sample": True, **values})
    torch.manual_seed(2)
    out = theirs.generate(torch.tensor([PROMPT]), attention_mask=torch.ones(1, len(PROMPT)), max_new_tokens=10,
                          return_dict_in_generate=True, output_scores=True)  # fmt: skip
    tokens, params = out.sequences[0].tolist(), SamplingParams.from_dict(lm.sampling)
    logits_TV = lm.logits(tokens)
    for i, scores in enumerate(out.scores):
        n = len(PROMPT) + i
        changed_V = apply_history(logits_TV[n - 1], params, tokens[:n], len(PROMPT), lm.config.eos_ids)
        probabilities, ids = kept(changed_V, params)
        found_V = torch.zeros_like(changed_V).index_put((ids,), probabilities / probabilities.sum())
        torch.testing.assert_close(found_V, scores[0].softmax(-1), rtol=1e-3, atol=1e-6)


def test_what_lm_samples_obeys_the_folder(folder: Path) -> None:
    """The folder's rules reach sampling itself: top_k 1 is greedy, and what is asked for comes before it."""
    lm, _ = both(folder, {"eos_token_id": 0, "do_sample": True, "top_k": 1, "max_new_tokens": 7})
    greedy = free_text(folder)
    assert lm.generate(PROMPT, ignore_eos=True) == greedy[:7] == list(lm.stream(PROMPT, ignore_eos=True))
    assert lm.generate(PROMPT, ignore_eos=True, top_k=None, seed=1) != greedy[:7]
    assert lm.generate(PROMPT, ignore_eos=True, top_k=None, temperature=0, max_tokens=NEW) == greedy
