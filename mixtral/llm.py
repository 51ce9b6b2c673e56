"""LLM: many prompts at once from one model, with results of the shape that vLLM's offline interface has."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from mixtral.engine import Engine, Generation, Piece, Request, Runner, SamplingParams
from mixtral.engine.beam import Beam, beam_search
from mixtral.engine.continuation import FinishReason
from mixtral.engine.engine import MAX_SEQUENCES, STEP_TOKENS
from mixtral.engine.native_runner import NativeRunner
from mixtral.engine.score import ask, logprobs
from mixtral.engine.speculative import Drafter, DraftModel, OwnWeights, PromptLookup
from mixtral.errors import UsageError, did_you_mean
from mixtral.lm import LM, is_one_prompt, load
from mixtral.moe import Routing
from mixtral.quant.copy import quantised_copy
from mixtral.quant.scheme import QuantScheme

SPECULATE = ("off", "lookup", "self", "int4")
Prompt = str | Sequence[int]
Params = SamplingParams | Mapping[str, Any] | None


@dataclass(frozen=True)
class CompletionOutput:
    """One continuation of a prompt."""

    index: int
    text: str
    token_ids: list[int]
    finish_reason: FinishReason
    token_logprobs: list[float]  # of each token, before temperature and filters
    logprobs: list[dict[int, float]] | None  # if asked for: of the most probable tokens at each place, and of the token
    error: str = ""  # with the finish reason "error"
    routing: tuple[Routing, ...] = ()  # if kept

    @property
    def cumulative_logprob(self) -> float:
        return sum(self.token_logprobs)


@dataclass(frozen=True)
class RequestOutput:
    """What came of one prompt."""

    prompt: str | None  # None for a prompt of token ids
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    prompt_logprobs: list[dict[int, float] | None] | None = field(default=None)  # None for the first token


class LLM:
    """A model and an engine of its own.

    Args:
        model: a folder, GGUF file or name as `mixtral.load` takes it, or an LM that is loaded.
        dtype, device, runner: as of `mixtral.load`.
        cache_bytes: of keys and values; by default a quarter of the free memory, or half of it where one text of the
            whole context needs as much.
        max_sequences: that run at once; others wait.
        step_tokens: the most tokens of one pass of the model.
        prefix_cache: keep keys and values of prompts for others that begin alike.
        speculate: where guesses at the next tokens come from (engine/speculative.py): "lookup", what followed the same
            tokens before; "self", the model with one expert a token; "int4", a copy of it in four bits; an LM of the
            same vocabulary; or "off". By default "lookup" on the native step, where no answer changes by a bit.

    Raises UsageError for a cache that holds nothing, and as `mixtral.load` does.
    """

    def __init__(
        self, model: str | Path | LM, *, dtype: str | torch.dtype | None = None, device: str | None = None,
        runner: str = "auto", cache_bytes: int | None = None, max_sequences: int = MAX_SEQUENCES,
        step_tokens: int = STEP_TOKENS, prefix_cache: bool = True, speculate: str | LM | None = None,
    ) -> None:  # fmt: skip
        self.lm = model if isinstance(model, LM) else load(model, dtype, device, runner)
        own = self.lm.make_runner(self.lm.runner_name, cache_bytes)
        drafter = _drafter(self.lm, own, speculate)
        self.engine = Engine(own, self.lm.tokenizer, max_sequences, step_tokens, prefix_cache, drafter)

    def generate(
        self, prompts: Prompt | Sequence[Prompt], params: Params | Sequence[Params] = None, *, n: int = 1,
        k: float | Sequence[float | None] | None = None, priority: int = 0, bos: bool | None = None,
        keep_routing: bool = False, progress: bool | None = None,
    ) -> list[RequestOutput]:  # fmt: skip
        """Continue prompts, as many at once as there is room for; the results are in their order.

        Args:
            prompts: texts or lists of token ids.
            params: one for all or one for each: SamplingParams, or some of its fields, in whose place what the model
                recommends counts, and then the defaults.
            n: continuations of each prompt.
            k: how many experts a token takes, or a number between 0 and 1: the fewest whose probabilities sum to it;
                for all or for each. None: what the model was trained with.
            priority: the lower, the sooner.
            bos: whether <s> stands before a text; None: as the tokenizer's files decide.
            keep_routing: record the routing of every token.
            progress: show a bar; by default on a terminal.

        Raises UsageError for arguments that cannot be served. A request that fails on its way has the finish reason
        "error", and harms no other.
        """
        prompts = _listed(prompts)
        ids = [self.lm.prompt_ids(prompt, bos if isinstance(prompt, str) else None) for prompt in prompts]
        wanted = [self.params(one) for one in _for_each(params, len(prompts), "params")]
        ks = _for_each(k, len(prompts), "k")
        for i, (tokens, one, its_k) in enumerate(zip(ids, wanted, ks, strict=True)):  # before any work
            self.engine.check(tokens, one, n=n, k=its_k, name=f"prompt {i}")
        adds = [
            partial(self.engine.add, tokens, one, n=n, k=its_k, priority=priority, keep_routing=keep_routing,
                    first=n * i)
            for i, (tokens, one, its_k) in enumerate(zip(ids, wanted, ks, strict=True))
        ]
        results = []
        with _bar(len(prompts), progress) as advance:
            for prompt, request in zip(prompts, self.engine.in_order(adds), strict=True):
                results.append(_output(prompt, request))
                advance()
        return results

    def stream(
        self, prompt: Prompt, params: Params = None, *, k: float | None = None, bos: bool | None = None
    ) -> Iterator[Piece]:
        """One continuation of one prompt, token by token."""
        return self.engine.stream([self.lm.prompt_ids(prompt, bos)], self.params(params), k=k)

    def score(
        self, texts: Prompt | Sequence[Prompt], *, k: float | None = None, bos: bool | None = None
    ) -> list[list[float]]:
        """For each text the natural logarithm of each token's probability after those before it, but the first's."""
        ids = [self.lm.prompt_ids(text, bos if isinstance(text, str) else None) for text in _listed(texts)]
        return [logprobs(request) for request in self.engine.in_order(partial(ask, self.engine, t, k) for t in ids)]

    def beam_search(
        self, prompt: Prompt, width: int = 4, max_tokens: int = 64, *, length_penalty: float = 1.0,
        k: float | None = None, bos: bool | None = None,
    ) -> list[Beam]:  # fmt: skip
        """The most probable continuations that a search `width` wide finds, the best first (engine/beam.py)."""
        ids = self.lm.prompt_ids(prompt, bos)
        return beam_search(self.engine, ids, width, max_tokens, length_penalty=length_penalty, k=k)

    def metrics(self) -> dict[str, float | None]:
        """What the engine has done, and how fast, as plain numbers."""
        return self.engine.metrics.values(self.engine)

    def params(self, given: Params) -> SamplingParams:
        """SamplingParams, of fields with what the model recommends where they say nothing."""
        if isinstance(given, SamplingParams):
            return given
        return self.lm.params(given or {})


def _drafter(lm: LM, runner: Runner, speculate: str | LM | None) -> Drafter | None:
    """Raises UsageError for guesses that this model cannot have."""
    if isinstance(speculate, LM):
        if speculate.config.vocab_size != lm.config.vocab_size:
            raise UsageError(f"speculate: the draft model has {speculate.config.vocab_size} tokens and the model "
                             f"{lm.config.vocab_size}; both must have one vocabulary")
        return DraftModel(speculate.make_runner(speculate.runner_name))
    wanted = ("lookup" if runner.name == "native" else "off") if speculate is None else speculate
    if wanted not in SPECULATE:
        raise UsageError(f"speculate: unknown choice {wanted!r}; {did_you_mean(wanted, SPECULATE)}")
    if wanted == "self" and not lm.config.is_sparse:
        raise UsageError("speculate: this model is dense (one expert), and cannot guess with fewer")
    if wanted == "int4":
        if runner.name != "native":
            raise UsageError("speculate: a copy in four bits runs on the native step, and this model does not")
        return OwnWeights(NativeRunner(quantised_copy(lm.model, QuantScheme.of("4")), runner.pool), None)
    made = {"off": lambda: None, "lookup": PromptLookup, "self": lambda: OwnWeights(runner, 1)}
    return made[wanted]()


def _listed(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """One prompt or a list of them, as a list."""
    if is_one_prompt(prompts):
        return [prompts]  # type: ignore[list-item]
    return list(prompts)  # type: ignore[arg-type]


def _for_each(value: Any, n: int, name: str) -> list[Any]:
    if isinstance(value, Sequence) and not isinstance(value, str):
        if len(value) != n:
            raise UsageError(f"{name}: {len(value)} given for {n} prompts; give one, or one for each")
        return list(value)
    return [value] * n


def _output(prompt: Prompt, request: Request) -> RequestOutput:
    results = [c.result() for c in request.continuations]
    leader = request.continuations[0]
    read = None
    if leader.params.prompt_logprobs is not None:
        read = [None, *({**(t.alternatives or {}), t.id: t.logprob} for t in leader.prompt_tokens)]
    text = prompt if isinstance(prompt, str) else None
    outputs = [_completion(i, result) for i, result in enumerate(results)]
    return RequestOutput(text, leader.all_tokens[: leader.n_prompt], outputs, read)


def _completion(index: int, result: Generation) -> CompletionOutput:
    tops = zip(result.alternatives, result.tokens, result.logprobs, strict=bool(result.alternatives))
    alternatives = [{**top, token: logprob} for top, token, logprob in tops] if result.alternatives else None
    return CompletionOutput(index, result.text, result.tokens, result.finish_reason, result.logprobs, alternatives,
                            result.error, result.routing)  # fmt: skip


def _bar(total: int, wanted: bool | None) -> AbstractContextManager[Any]:
    """A bar on standard error -> a function that moves it by one prompt."""
    if not (sys.stderr.isatty() if wanted is None else wanted):
        return nullcontext(lambda: None)
    return _Bar(total)


class _Bar(AbstractContextManager[Any]):
    def __init__(self, total: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = TextColumn("prompts"), BarColumn(bar_width=20), MofNCompleteColumn(), TimeRemainingColumn(True)
        self._progress = Progress(*columns, console=Console(stderr=True))
        self._task = self._progress.add_task("prompts", total=total)

    def __enter__(self) -> Any:
        self._progress.start()
        return lambda: self._progress.advance(self._task)

    def __exit__(self, *_: object) -> None:
        self._progress.stop()
