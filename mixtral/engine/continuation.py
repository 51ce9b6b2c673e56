"""Continuation: one continuation of a prompt as it grows, what is asked of it, and what comes of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from torch import Tensor

from mixtral.config import ModelConfig
from mixtral.engine.detokenize import TextOutput
from mixtral.engine.params import SamplingParams
from mixtral.engine.seeds import make_generator
from mixtral.errors import UsageError
from mixtral.moe import Routing
from mixtral.tokenizer import Tokenizer

# Given the prompt's tokens and those sampled since: bool [V], which may follow; None: any.
Mask = Callable[[Sequence[int]], Tensor | None]
# An end token or a stop string; max_tokens or the end of the context; taken back; `error` says why.
FinishReason = Literal["stop", "length", "abort", "error"]


class Token(NamedTuple):
    """A token that was sampled."""

    id: int
    logprob: float  # natural logarithm of its probability, before temperature and filters
    alternatives: dict[int, float] | None = None  # log-probabilities of the most probable tokens, if asked for


class Piece(NamedTuple):
    """One generated token, as it is streamed."""

    sequence: int  # index of the continuation: those of a prompt follow each other, `n` of each
    token: int
    logprob: float  # natural logarithm of the token's probability, before temperature and filters
    text: str  # what may be shown now; "" without a tokenizer or while text is held back
    finish_reason: FinishReason | None  # with the sequence's last piece


@dataclass(frozen=True)
class Generation:
    """One continuation of a prompt."""

    tokens: list[int]  # all that were sampled: the end token too, and those of a stop string
    logprobs: list[float]  # as in Piece
    text: str  # without the end token and the stop string; "" without a tokenizer
    finish_reason: FinishReason
    alternatives: list[dict[int, float]] = field(default_factory=list)  # of each token, if asked for: those of Token
    prompt_logprobs: list[float] = field(default_factory=list)  # if asked for, of the prompt's tokens but the first
    prompt_alternatives: list[dict[int, float]] = field(default_factory=list)
    error: str = ""  # with the finish reason "error"
    routing: tuple[Routing, ...] = ()  # if kept, one a layer: every token but the last one sampled, prompt first


def check_prompt(tokens: Sequence[int], config: ModelConfig, name: str = "prompt") -> None:
    """Raise UsageError unless the model can read `tokens`: at least one, no more than the context, all in range."""
    if len(tokens) == 0:
        raise UsageError(f"{name}: empty; at least one token is needed, such as the tokenizer's first one")
    if len(tokens) > config.context:
        raise UsageError(f"{name}: {len(tokens)} tokens do not fit the model's context of {config.context}")
    low, high = min(tokens), max(tokens)
    if low < 0 or high >= config.vocab_size:
        wrong = low if low < 0 else high
        raise UsageError(f"{name}: token id {wrong} is out of range; the model knows ids 0 to {config.vocab_size - 1}")


def check_request(
    prompt: Sequence[int], params: SamplingParams, config: ModelConfig, tokenizer: Tokenizer | None,
    name: str = "prompt",
) -> None:  # fmt: skip
    """Raise UsageError, which begins with `name`, for a prompt that cannot be continued in this way."""
    check_prompt(prompt, config, name)
    if len(prompt) == config.context and params.max_tokens:
        raise UsageError(f"{name}: {len(prompt)} tokens fill the model's context; none is left for an answer")
    if len(prompt) >= _longest(params, config) and params.max_tokens:
        whole = f"max_length {params.max_length}, the most of prompt and text together"
        raise UsageError(f"{name}: {len(prompt)} tokens reach {whole}; give max_tokens, or raise it")
    params.check_tokens(config.vocab_size)
    if params.bad_words and tokenizer is None:
        raise UsageError("bad_words: phrases need a tokenizer, and this model came without one")
    if params.stop and tokenizer is None:
        raise UsageError("stop: stop strings need a tokenizer, and this model came without one")


def _end_ids(config: ModelConfig, tokenizer: Tokenizer | None) -> frozenset[int]:
    """The model's end tokens, or where its files name none, the tokenizer's."""
    if config.eos_ids or tokenizer is None:
        return frozenset(config.eos_ids)
    return frozenset({tokenizer.eos_id})


def _longest(params: SamplingParams, config: ModelConfig) -> int:
    """The most tokens of prompt and continuation together."""
    return min(params.max_length or config.context, config.context)


def known_ids(config: ModelConfig, tokenizer: Tokenizer | None) -> int:
    """How many ids may be sampled: those that the tokenizer lacks are padding of the weights."""
    return min(config.vocab_size, tokenizer.vocab_size) if tokenizer else config.vocab_size


def with_phrases(params: SamplingParams, tokenizer: Tokenizer | None) -> SamplingParams:
    """`bad_words` as ids of tokens: as they are encoded at the beginning of a text, and behind a space."""
    if not params.bad_words or tokenizer is None:
        return params
    forms = [tokenizer.encode(before + word, bos=False, eos=False) for word in params.bad_words for before in ("", " ")]
    return dataclasses.replace(params, bad_words=(), bad_words_ids=(*params.bad_words_ids, *map(tuple, forms)))


class Continuation:
    """One continuation of a prompt."""

    def __init__(
        self, index: int, prompt: Sequence[int], params: SamplingParams, k: float | None, config: ModelConfig,
        tokenizer: Tokenizer | None, number: int, keep_routing: bool = False, mask: Mask | None = None,
    ) -> None:  # fmt: skip
        self.index, self.k, self.keep_routing, self.mask = index, k, keep_routing, mask
        self.params = params = with_phrases(params, tokenizer)
        self.is_plain = params.temperature == 0 and not params.uses_history and params.logprobs is None
        self.id: int | None = None  # in the pool
        self.generator = make_generator(params, number)
        self.all_tokens = list(prompt)
        self.n_cached = 0  # how many of them are in the cache
        self.n_prompt = len(prompt)
        self.limit = min(self.n_prompt + params.max_tokens, _longest(params, config))
        self.end_ids = frozenset(params.stop_token_ids)
        self.end_ids |= frozenset() if params.ignore_eos else _end_ids(config, tokenizer)
        self.output = TextOutput(tokenizer, prompt, params.stop) if tokenizer else None
        self.logprobs: list[float] = []
        self.alternatives: list[dict[int, float]] = []
        self.prompt_tokens: list[Token] = []  # but the first, as far as they are read, if asked for
        self.texts: list[str] = []
        self.error = ""
        self.finish_reason: FinishReason | None = None
        self.routings: list[tuple[Routing, ...]] = []  # one entry a step
        self.order: tuple[int, ...] = ()  # the scheduler's
        self.drafts: list[int] = []  # guesses at the next tokens
        self.followers: list[Continuation] = []  # other continuations of the prompt, until it is in the cache

    @property
    def shares_prefixes(self) -> bool:
        """Whether it may begin with keys and values that others have left: not if all its tokens are to be seen."""
        return not self.keep_routing and self.params.prompt_logprobs is None

    @property
    def n_left(self) -> int:
        """Tokens that the model has not read."""
        return len(self.all_tokens) - self.n_cached

    def accept(self, token: Token) -> Piece:
        """Add a sampled token."""
        self.all_tokens.append(token.id)
        self.logprobs.append(token.logprob)
        if token.alternatives is not None:
            self.alternatives.append(token.alternatives)
        text, ended = "", token.id in self.end_ids
        full = len(self.all_tokens) >= self.limit
        if self.output:
            text = "" if ended else self.output.push(token.id)
            text += self.output.end() if ended or full else ""
            ended = ended or self.output.stopped
        if ended or full:
            self.finish_reason = "stop" if ended else "length"
        self.texts.append(text)
        return Piece(self.index, token.id, token.logprob, text, self.finish_reason)

    def result(self) -> Generation:
        assert self.finish_reason is not None
        routing = tuple(Routing.cat(steps) for steps in zip(*self.routings, strict=True))
        return Generation(
            self.all_tokens[self.n_prompt :], self.logprobs, "".join(self.texts), self.finish_reason,
            self.alternatives, [t.logprob for t in self.prompt_tokens],
            [t.alternatives for t in self.prompt_tokens if t.alternatives is not None], self.error, routing,
        )  # fmt: skip
