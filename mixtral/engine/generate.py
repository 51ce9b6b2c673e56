"""The plain loop: what every faster engine must reproduce.

One pass of the model a step, over all unfinished sequences as one packed batch. Each sequence brings what the model
has not read of it yet: a chunk of its prompt, or the token drawn last. A sequence read to its end gets a new token.

Legend: B sequences of the step that get a token, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from mixtral.config import ModelConfig
from mixtral.engine.detokenize import TextOutput
from mixtral.engine.history import apply_history
from mixtral.engine.kv_cache import FullCache, make_cache
from mixtral.engine.native import NativeModel
from mixtral.engine.params import SamplingParams
from mixtral.engine.sampling import make_generator, sample
from mixtral.errors import MixtralError, UsageError
from mixtral.kernels.native.library import cores_for_library, log_sum_exp
from mixtral.model import Mixtral, Output, Ragged
from mixtral.moe import Routing
from mixtral.tokenizer import Tokenizer

FinishReason = Literal["stop", "length"]  # an end token or a stop string; max_tokens or the end of the context


class Piece(NamedTuple):
    """One generated token, as it is streamed."""

    sequence: int  # index of the prompt
    token: int
    logprob: float  # natural logarithm of the token's probability, before temperature and filters
    text: str  # what may be shown now; "" without a tokenizer or while text is held back
    finish_reason: FinishReason | None  # with the sequence's last piece


@dataclass(frozen=True)
class Generation:
    """What was generated for one prompt."""

    tokens: list[int]  # all that were drawn: the end token too, and those of a stop string
    logprobs: list[float]  # as in Piece
    text: str  # without the end token and the stop string; "" without a tokenizer
    finish_reason: FinishReason
    routing: tuple[Routing, ...] = ()  # when asked for, one a layer: every token but the last one drawn, prompt first


def generate(
    model: Mixtral,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams | Sequence[SamplingParams],
    *,
    tokenizer: Tokenizer | None = None,
    prefill_chunk: int | None = None,
    cache: FullCache | None = None,
    keep_routing: bool = False,
    k: int | None = None,
    native: NativeModel | None = None,
) -> list[Generation]:
    """Continue each prompt, all as one batch.

    Args:
        prompts: token ids.
        params: one for all prompts, or one for each.
        tokenizer: gives the text; stop strings need it.
        prefill_chunk: the most tokens of a prompt read in one step; all of them by default.
        cache: an empty one to use, for as many sequences as prompts; by default `make_cache`'s.
        keep_routing: record the routing of every token that the model read.
        k: how many experts a token takes; by default what the model was trained with.
        native: what runs the model's forward pass in its place.

    Raises UsageError for a prompt that is empty, too long for the context or not of this vocabulary, and for arguments
    that contradict each other; MixtralError when the model's output is not finite.
    """
    run = _Run(model, prompts, params, tokenizer, prefill_chunk, cache, keep_routing, k, native)
    while run.active:
        run.step()
    return [s.result() for s in run.sequences]


def stream(
    model: Mixtral,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams | Sequence[SamplingParams],
    *,
    tokenizer: Tokenizer | None = None,
    prefill_chunk: int | None = None,
    cache: FullCache | None = None,
    k: int | None = None,
    native: NativeModel | None = None,
) -> Iterator[Piece]:
    """The same as `generate`, token by token as they come. Errors in the arguments are raised at once."""
    run = _Run(model, prompts, params, tokenizer, prefill_chunk, cache, False, k, native)

    def pieces() -> Iterator[Piece]:
        while run.active:
            yield from run.step()

    return pieces()


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


def _end_ids(config: ModelConfig, tokenizer: Tokenizer | None) -> frozenset[int]:
    """The model's end tokens, or where its files name none, the tokenizer's."""
    if config.eos_ids or tokenizer is None:
        return frozenset(config.eos_ids)
    return frozenset({tokenizer.eos_id})


def _longest(params: SamplingParams, config: ModelConfig) -> int:
    """The most tokens of prompt and continuation together."""
    return min(params.max_length or config.context, config.context)


class _Sequence:
    """One prompt and its continuation."""

    def __init__(
        self, index: int, prompt: Sequence[int], params: SamplingParams, config: ModelConfig,
        tokenizer: Tokenizer | None,
    ) -> None:  # fmt: skip
        self.index = index
        self.params = params
        self.generator = make_generator(params, index)
        self.all_tokens = list(prompt)
        self.read = 0  # how many of them the model has read
        self.n_prompt = len(prompt)
        self.limit = min(self.n_prompt + params.max_tokens, _longest(params, config))
        self.end_ids = frozenset() if params.ignore_eos else _end_ids(config, tokenizer)
        self.output = TextOutput(tokenizer, prompt, params.stop) if tokenizer else None
        self.logprobs: list[float] = []
        self.texts: list[str] = []
        self.finish_reason: FinishReason | None = None
        self.routings: list[tuple[Routing, ...]] = []  # one entry a step

    def accept(self, token: int, logprob: float) -> Piece:
        """Add a drawn token."""
        self.all_tokens.append(token)
        self.logprobs.append(logprob)
        text, ended = "", token in self.end_ids
        full = len(self.all_tokens) >= self.limit
        if self.output:
            text = "" if ended else self.output.push(token)
            text += self.output.end() if ended or full else ""
            ended = ended or self.output.stopped
        if ended or full:
            self.finish_reason = "stop" if ended else "length"
        self.texts.append(text)
        return Piece(self.index, token, logprob, text, self.finish_reason)

    def result(self) -> Generation:
        assert self.finish_reason is not None
        layers = zip(*self.routings, strict=True)
        routing = tuple(Routing.cat(steps) for steps in layers)
        tokens = self.all_tokens[self.n_prompt :]
        return Generation(tokens, self.logprobs, "".join(self.texts), self.finish_reason, routing)


class _Run:
    """The state of one call: its sequences, which of them are still active, and the cache of those."""

    def __init__(
        self, model: Mixtral, prompts: Sequence[Sequence[int]], params: SamplingParams | Sequence[SamplingParams],
        tokenizer: Tokenizer | None, prefill_chunk: int | None, cache: FullCache | None, keep_routing: bool,
        k: int | None, native: NativeModel | None,
    ) -> None:  # fmt: skip
        params = [params] * len(prompts) if isinstance(params, SamplingParams) else list(params)
        _check(prompts, params, model.config, tokenizer, prefill_chunk)
        weight = model.embedding.weight
        self.native = native is not None
        self.forward: Callable[..., Output] = partial(native, routing=keep_routing) if native else model
        self.cores: Callable[[], AbstractContextManager[None]] = cores_for_library if native else nullcontext
        self.device, self.dtype = weight.device, weight.dtype
        self.vocab_size = min(model.config.vocab_size, tokenizer.vocab_size) if tokenizer else model.config.vocab_size
        self.prefill_chunk, self.keep_routing, self.k = prefill_chunk, keep_routing, k
        self.sequences = [
            _Sequence(i, prompt, wanted, model.config, tokenizer)
            for i, (prompt, wanted) in enumerate(zip(prompts, params, strict=True))
        ]
        self.active = list(self.sequences)
        self.cache = make_cache(model.config, len(prompts), weight.dtype, weight.device) if cache is None else cache
        if self.cache.lengths != [0] * len(prompts):
            raise UsageError(f"cache: must be empty and for {len(prompts)} sequences, as many as there are prompts")

    @torch.inference_mode()
    def step(self) -> list[Piece]:
        """Run the model once; the pieces of the sequences that it read to their end."""
        with self.cores():
            return self._step()

    def _step(self) -> list[Piece]:
        chunks = [s.all_tokens[s.read :][: self.prefill_chunk] for s in self.active]
        batch = Ragged.of(chunks, [s.read for s in self.active], self.device)
        for sequence, chunk in zip(self.active, chunks, strict=True):
            sequence.read += len(chunk)
        ready = [i for i, s in enumerate(self.active) if s.read == len(s.all_tokens)]
        ends = batch.cu_seqlens.tolist()
        rows = torch.tensor([ends[i + 1] - 1 for i in ready], dtype=torch.int64, device=self.device)
        out = self.forward(batch, self.cache, rows=rows, k=self.k)
        if self.keep_routing:
            self._record(out.routing, ends)
        assert out.logits is not None
        pieces = self._draw(out.logits, [self.active[i] for i in ready]) if ready else []
        self._drop_finished()
        return pieces

    def _record(self, routing: tuple[Routing, ...], ends: list[int]) -> None:
        for sequence, begin, end in zip(self.active, ends[:-1], ends[1:], strict=True):
            sequence.routings.append(tuple(layer.tokens(begin, end) for layer in routing))

    def _draw(self, logits_BV: Tensor, ready: list[_Sequence]) -> list[Piece]:
        logits_BV = logits_BV[:, : self.vocab_size]  # ids that the tokenizer lacks are padding of the weights
        norm_B = log_sum_exp(logits_BV) if self.native else logits_BV.logsumexp(-1)
        if not all(map(math.isfinite, norm_B.tolist())):  # some norm is not as soon as one logit is NaN or +inf
            raise MixtralError(
                f"generation: logits are not finite in {self.dtype}; "
                "the weights are damaged, or need a dtype of larger range (bf16 or fp32)"
            )
        ids_B = sample(_after_history(logits_BV, ready), [s.params for s in ready], [s.generator for s in ready])
        logprobs_B = logits_BV.gather(1, ids_B[:, None])[:, 0] - norm_B
        drawn = zip(ready, ids_B.tolist(), logprobs_B.tolist(), strict=True)
        return [sequence.accept(token, logprob) for sequence, token, logprob in drawn]

    def _drop_finished(self) -> None:
        unfinished = [i for i, s in enumerate(self.active) if s.finish_reason is None]
        if len(unfinished) < len(self.active):
            self.active = [self.active[i] for i in unfinished]
            self.cache.keep(unfinished)


def _after_history(logits_BV: Tensor, sequences: list[_Sequence]) -> Tensor:
    """Each sequence's logits, after what its tokens so far do to them."""
    if not any(s.params.uses_history for s in sequences):
        return logits_BV
    rows = [
        apply_history(logits_V, s.params, s.all_tokens, s.n_prompt, s.end_ids)
        for logits_V, s in zip(logits_BV, sequences, strict=True)
    ]
    return torch.stack([logits_V.float() for logits_V in rows])


def _check(
    prompts: Sequence[Sequence[int]], params: Sequence[SamplingParams], config: ModelConfig,
    tokenizer: Tokenizer | None, prefill_chunk: int | None,
) -> None:  # fmt: skip
    """Raise UsageError for arguments that cannot be served."""
    if len(params) != len(prompts):
        raise UsageError(f"params: {len(params)} given for {len(prompts)} prompts; give one, or one for each")
    if prefill_chunk is not None and prefill_chunk < 1:
        raise UsageError(f"prefill_chunk: must be a positive number of tokens, not {prefill_chunk}")
    for i, (prompt, wanted) in enumerate(zip(prompts, params, strict=True)):
        check_prompt(prompt, config, f"prompt {i}")
        if len(prompt) == config.context:
            raise UsageError(f"prompt {i}: {len(prompt)} tokens fill the model's context; none is left for an answer")
        if len(prompt) >= _longest(wanted, config):
            whole = f"max_length {wanted.max_length}, the most of prompt and text together"
            raise UsageError(f"prompt {i}: {len(prompt)} tokens reach {whole}; give max_tokens, or raise it")
        wanted.check_tokens(config.vocab_size)
        if wanted.stop and tokenizer is None:
            raise UsageError("stop: stop strings need a tokenizer, and this model came without one")
