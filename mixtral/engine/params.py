"""SamplingParams: how to continue one prompt."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from mixtral.errors import UsageError, did_you_mean, shown

TOKEN_FIELDS = ("bad_words_ids", "suppress_tokens", "begin_suppress_tokens")  # of SamplingParams, with ids of tokens
_MORE_TOKEN_FIELDS = ("stop_token_ids", "allowed_token_ids")
_MOST_ALTERNATIVES = 1000
_FLOATS = (
    *("repetition_penalty", "temperature", "top_h", "top_p", "min_p", "typical_p"),
    *("epsilon_cutoff", "eta_cutoff", "presence_penalty", "frequency_penalty"),
)


@dataclass(frozen=True)
class SamplingParams:
    """How to continue one prompt. Raises UsageError when a value is out of range.

    Lists become tuples.
    """

    # how long
    max_tokens: int = 256  # 0 with prompt_logprobs alone: the prompt is read and nothing follows
    max_length: int | None = None  # the most tokens of prompt and continuation together
    min_tokens: int = 0  # no end token before so many new ones
    min_length: int = 0  # no end token before prompt and continuation together have so many
    stop: tuple[str, ...] = ()  # end before any of these strings
    stop_token_ids: tuple[int, ...] = ()  # end after any of these tokens, as after an end token
    ignore_eos: bool = False  # go on after an end token
    # which tokens may follow, whatever their probability
    repetition_penalty: float = 1.0  # above 1: every token that occurred so far becomes less probable
    presence_penalty: float = 0.0  # taken from the logit of every token that was generated so far
    frequency_penalty: float = 0.0  # the same, as often as it was
    logit_bias: tuple[tuple[int, float], ...] = ()  # (token id, what is added to its logit); a dict is taken too
    no_repeat_ngram_size: int = 0  # no sequence of this many tokens occurs twice; 0: no such rule
    bad_words_ids: tuple[tuple[int, ...], ...] = ()  # sequences of tokens that are never completed
    bad_words: tuple[str, ...] = ()  # phrases that are never completed, as the tokenizer encodes them
    suppress_tokens: tuple[int, ...] = ()  # never sampled
    allowed_token_ids: tuple[int, ...] | None = None  # nothing else is sampled, but for end tokens
    begin_suppress_tokens: tuple[int, ...] = ()  # not as the first new token
    # how to sample
    temperature: float = 0.0  # 0: always the most probable token
    top_h: float | None = None  # keep the most probable tokens up to this share of the entropy
    top_k: int | None = None  # keep this many of the most probable tokens
    top_p: float = 1.0  # keep the fewest of the most probable tokens whose probabilities reach this sum
    min_p: float = 0.0  # keep tokens of at least this share of the highest probability
    typical_p: float = 1.0  # keep the fewest tokens nearest to the expected surprise that reach this sum
    epsilon_cutoff: float = 0.0  # keep tokens of at least this probability
    eta_cutoff: float = 0.0  # the same, with a smaller bound where the distribution is flat
    seed: int | None = None  # None: another text every time
    # what is returned beside the text
    logprobs: int | None = None  # log-probabilities of so many of the most probable tokens at each place
    prompt_logprobs: int | None = None  # of the prompt's tokens, and of so many alternatives to each

    def __post_init__(self) -> None:
        self._make_tuples()
        self._check_lengths()
        self._check_history()
        self._check_sampling()
        for name in _FLOATS:  # whole numbers are right too, and torch takes none of more than 64 bits
            if (value := getattr(self, name)) is not None:
                object.__setattr__(self, name, float(value))

    def _make_tuples(self) -> None:
        bias: object = self.logit_bias
        if isinstance(bias, dict):
            object.__setattr__(self, "logit_bias", tuple(bias.items()))
        for name in ("stop", "bad_words", "logit_bias", *TOKEN_FIELDS, *_MORE_TOKEN_FIELDS):
            if isinstance(value := getattr(self, name), list | tuple):
                object.__setattr__(self, name, tuple(tuple(v) if isinstance(v, list) else v for v in value))

    def _check_lengths(self) -> None:
        max_length = self.max_length is None or _is_int(self.max_length, 1)
        self._require("max_length", "a positive integer or None", max_length)  # before what may come of it
        reads = self.prompt_logprobs is not None
        wanted = "an integer of at least 0" if reads else "a positive integer"
        self._require("max_tokens", wanted, _is_int(self.max_tokens, 0 if reads else 1))
        for name in ("min_tokens", "min_length"):
            self._require(name, "an integer of at least 0", _is_int(getattr(self, name), 0))
        strings = isinstance(self.stop, tuple) and all(isinstance(s, str) and s for s in self.stop)
        self._require("stop", "one or more texts that are not empty", strings)
        self._require("stop_token_ids", "a list of token ids", _are_ids(self.stop_token_ids))
        self._require("ignore_eos", "True or False", isinstance(self.ignore_eos, bool))

    def _check_history(self) -> None:
        penalty = _is_number(self.repetition_penalty, 1e-30, 1e30)  # 0 or inf in fp32
        self._require("repetition_penalty", "a positive number from 1e-30 to 1e30", penalty)
        for name in ("presence_penalty", "frequency_penalty"):
            self._require(name, "a number from -2 to 2", _is_number(getattr(self, name), -2, 2))
        bias = isinstance(self.logit_bias, tuple) and all(_is_bias(pair) for pair in self.logit_bias)
        self._require("logit_bias", "token ids with numbers from -100 to 100", bias)
        phrases = isinstance(self.bad_words, tuple) and all(isinstance(s, str) and s for s in self.bad_words)
        self._require("bad_words", "a list of texts that are not empty", phrases)
        allowed = self.allowed_token_ids is None or (
            _are_ids(self.allowed_token_ids) and len(self.allowed_token_ids) > 0
        )
        self._require("allowed_token_ids", "a list of token ids that is not empty, or None", allowed)
        self._require("no_repeat_ngram_size", "an integer of at least 0", _is_int(self.no_repeat_ngram_size, 0))
        words = isinstance(self.bad_words_ids, tuple) and all(word and _are_ids(word) for word in self.bad_words_ids)
        self._require("bad_words_ids", "a list of lists of token ids, none of them empty", words)
        for name in ("suppress_tokens", "begin_suppress_tokens"):
            self._require(name, "a list of token ids", _are_ids(getattr(self, name)))

    def _check_sampling(self) -> None:
        self._require("temperature", "a number of at least 0", _is_number(self.temperature, 0, sys.float_info.max))
        top_h = self.top_h is None or _is_share(self.top_h, above=True)
        self._require("top_h", "above 0 and at most 1, or None", top_h)
        self._require("top_k", "a positive integer or None", self.top_k is None or _is_int(self.top_k, 1))
        for name in ("top_p", "typical_p"):
            self._require(name, "above 0 and at most 1", _is_share(getattr(self, name), above=True))
        self._require("min_p", "between 0 and 1", _is_share(self.min_p))
        for name in ("epsilon_cutoff", "eta_cutoff"):
            value = getattr(self, name)
            self._require(name, "at least 0 and below 1", _is_share(value) and value < 1)
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            fits = value is None or (_is_int(value, 0) and value <= _MOST_ALTERNATIVES)
            self._require(name, f"an integer of 0 to {_MOST_ALTERNATIVES}, or None", fits)
        self._require("seed", "an integer of at least 0 or None", self.seed is None or _is_int(self.seed, 0))

    def _require(self, name: str, wanted: str, holds: bool) -> None:
        if not holds:
            value = getattr(self, name)
            value = list(value) if isinstance(value, tuple) else value  # as users write it
            raise UsageError(f"sampling: {name} must be {wanted}, not {shown(value)}")

    def check_tokens(self, vocab_size: int) -> None:
        """Raise UsageError for the ids of tokens to be ruled out that lie beyond a vocabulary."""
        fields = {name: _flat(getattr(self, name) or ()) for name in (*TOKEN_FIELDS, *_MORE_TOKEN_FIELDS)}
        for name, ids in {**fields, "logit_bias": iter([i for i, _ in self.logit_bias])}.items():
            for i in ids:
                if i >= vocab_size:
                    known = f"the model knows ids 0 to {vocab_size - 1}"
                    raise UsageError(f"sampling: {name}: token id {shown(i)} is out of range; {known}")

    @property
    def uses_history(self) -> bool:
        """Whether the logits depend on the tokens so far, or some tokens are banned (engine/history.py)."""
        bans = self.no_repeat_ngram_size or self.bad_words_ids or self.suppress_tokens or self.begin_suppress_tokens
        penalties = self.repetition_penalty != 1 or self.presence_penalty or self.frequency_penalty or self.logit_bias
        allowed = self.allowed_token_ids is not None
        return bool(bans or penalties or allowed or self.min_tokens or self.min_length)

    @property
    def is_filtered(self) -> bool:
        """Whether some filter may drop tokens before one is sampled."""
        neutral = self.top_k is None and self.top_h is None and self.top_p == 1 and self.typical_p == 1
        return not (neutral and self.min_p == self.epsilon_cutoff == self.eta_cutoff == 0)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> SamplingParams:
        """From field names; an unknown one raises UsageError with the nearest known one."""
        known = [f.name for f in dataclasses.fields(cls)]
        for name in values:
            if name not in known:
                raise UsageError(f"sampling: unknown option {name!r}; {did_you_mean(name, known)}")
        return cls(**values)


def _flat(ids: Iterable[int | tuple[int, ...]]) -> Iterator[int]:
    for value in ids:
        yield from value if isinstance(value, tuple) else (value,)


def _is_int(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _is_number(value: object, least: float, most: float) -> bool:
    """Whether it lies between the two; NaN does not."""
    return isinstance(value, int | float) and not isinstance(value, bool) and least <= value <= most


def _is_share(value: Any, above: bool = False) -> bool:
    """Whether it lies in 0..1, or `above` 0."""
    return _is_number(value, 0, 1) and not (above and value == 0)


def _is_bias(pair: object) -> bool:
    return isinstance(pair, tuple) and len(pair) == 2 and _is_int(pair[0], 0) and _is_number(pair[1], -100, 100)


def _are_ids(value: object) -> bool:
    return isinstance(value, tuple) and all(_is_int(i, 0) for i in value)
