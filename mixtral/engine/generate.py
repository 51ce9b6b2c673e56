"""The plain loop: what every faster engine must reproduce.

One pass of the model a step, over all unfinished sequences as one ragged batch. Each sequence contributes the tokens
that are not in the cache yet: a prefill chunk of its prompt, or the token sampled last. A sequence whose tokens are all
in the cache gets a new one.

Legend: B sequences of the step that get a token, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from mixtral.config import ModelConfig
from mixtral.engine.continuation import Continuation, Generation, Piece, check_request, known_ids
from mixtral.engine.params import SamplingParams
from mixtral.engine.runner import Runner
from mixtral.engine.sampling import next_tokens
from mixtral.errors import MixtralError, UsageError
from mixtral.moe import Routing
from mixtral.tokenizer import Tokenizer


def generate(
    runner: Runner,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams | Sequence[SamplingParams],
    *,
    n: int = 1,
    k: float | Sequence[float | None] | None = None,
    keep_routing: bool = False,
    tokenizer: Tokenizer | None = None,
    prefill_chunk: int | None = None,
    first: int = 0,
) -> list[Generation]:
    """Continue each prompt, all as one batch.

    Args:
        prompts: token ids.
        params: one for all prompts, or one for each.
        n: continuations of each prompt, which share its keys and values; those of a prompt follow each other.
        k: how many experts a token takes, for all prompts or for each; None: what the model was trained with.
        keep_routing: record the routing of every token that the model processes.
        tokenizer: gives the text; stop strings need it.
        prefill_chunk: the most tokens of a prompt processed in one step; all of them by default.
        first: the number of the first continuation, on which a seed's random numbers depend: those of a list of prompts
            are the same in one call or in several.

    Raises UsageError for a prompt that is empty, too long for the context or not of this vocabulary, and for arguments
    that contradict each other; MixtralError when the model's output is not finite.
    """
    pieces = stream(runner, prompts, params, n=n, k=k, keep_routing=keep_routing, tokenizer=tokenizer,
                    prefill_chunk=prefill_chunk, first=first)  # fmt: skip
    for _ in pieces:
        pass
    return pieces.results()


def stream(
    runner: Runner,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams | Sequence[SamplingParams],
    *,
    n: int = 1,
    k: float | Sequence[float | None] | None = None,
    keep_routing: bool = False,
    tokenizer: Tokenizer | None = None,
    prefill_chunk: int | None = None,
    first: int = 0,
) -> Stream:
    """The same as `generate`, token by token as they come. Errors in the arguments are raised at once."""
    params = [params] * len(prompts) if isinstance(params, SamplingParams) else list(params)
    of_prompt = [k] * len(prompts) if k is None or isinstance(k, int | float) else list(k)
    _check(prompts, params, of_prompt, runner.config, tokenizer, n, prefill_chunk)
    return Stream(_Run(runner, prompts, params, of_prompt, n, keep_routing, tokenizer, prefill_chunk, first))


class Stream(Iterator[Piece]):
    """The pieces of a generation as they come. Closed, exhausted or dropped, it frees its cache."""

    def __init__(self, run: _Run) -> None:
        self._run = run
        self._pieces: list[Piece] = []  # of the last step, not yet handed out, in reverse

    def __next__(self) -> Piece:
        while not self._pieces:
            if not self._run.active:
                raise StopIteration
            try:
                self._pieces = self._run.step()[::-1]
            except BaseException:  # Ctrl-C too
                self.close()
                raise
        return self._pieces.pop()

    def results(self) -> list[Generation]:
        """The continuations. Raises UsageError while some are unfinished."""
        if self._run.active or self._pieces:
            raise UsageError("results: the stream is not at its end yet")
        return [s.result() for s in self._run.sequences]

    def close(self) -> None:
        """Stop here, and free the cache."""
        self._run.stop()

    def __del__(self) -> None:
        self.close()


class _Run:
    """The state of one call: its sequences, and which of them are still active, with their keys and values."""

    def __init__(
        self, runner: Runner, prompts: Sequence[Sequence[int]], params: Sequence[SamplingParams],
        k: Sequence[float | None], n: int, keep_routing: bool, tokenizer: Tokenizer | None, prefill_chunk: int | None,
        first: int,
    ) -> None:  # fmt: skip
        config = runner.config
        self.runner, self.pool = runner, runner.pool
        self.vocab_size = known_ids(config, tokenizer)
        self.prefill_chunk, self.keep_routing = prefill_chunk, keep_routing
        self.sequences = [
            Continuation(n * i + j, prompt, wanted, of_prompt, config, tokenizer, first + n * i + j)
            for i, (prompt, wanted, of_prompt) in enumerate(zip(prompts, params, k, strict=True))
            for j in range(n)
        ]
        self.active = self.sequences[::n]  # the others follow when their prompt is in the cache
        for leader in self.active:
            leader.followers = self.sequences[leader.index + 1 : leader.index + n]
            leader.id = self.pool.add(leader.limit)

    def stop(self) -> None:
        """Free what the active sequences have in the cache."""
        for sequence in self.active:
            if sequence.id is not None:
                self.pool.free(sequence.id)
                sequence.id = None
        self.active = []

    @torch.inference_mode()
    def step(self) -> list[Piece]:
        """Run the model once; the pieces of the sequences whose tokens are all in the cache."""
        with self.runner.cores():
            return self._step()

    def _step(self) -> list[Piece]:
        chunks = [s.all_tokens[s.n_cached :][: self.prefill_chunk] for s in self.active]
        ids = [s.id for s in self.active]
        batch = self.pool.batch([(id, chunk) for id, chunk in zip(ids, chunks, strict=True) if id is not None])
        for sequence, chunk in zip(self.active, chunks, strict=True):
            sequence.n_cached += len(chunk)
        ready = [i for i, s in enumerate(self.active) if s.n_cached == len(s.all_tokens)]
        ends = batch.cu_seqlens.tolist()
        rows = torch.tensor([ends[i + 1] - 1 for i in ready], dtype=torch.int64, device=self.runner.device)
        out = self.runner.run(batch, rows, self._k([len(chunk) for chunk in chunks]), self.keep_routing)
        if self.keep_routing:
            self._record(out.routing, ends)
        assert out.logits is not None
        pieces = self._sample(out.logits, [self.active[i] for i in ready]) if ready else []
        self._drop_finished()
        return pieces

    def _k(self, counts: list[int]) -> int | Tensor | None:
        """How many experts each token of the step takes."""
        of_sequence = [s.k for s in self.active]
        first = of_sequence[0]
        if not isinstance(first, float) and all(k == first for k in of_sequence):
            return first
        default = self.runner.config.experts_per_token
        k_B = torch.tensor([default if k is None else k for k in of_sequence], device=self.runner.device)
        return k_B.repeat_interleave(torch.tensor(counts, device=self.runner.device))

    def _record(self, routing: tuple[Routing, ...], ends: list[int]) -> None:
        for sequence, begin, end in zip(self.active, ends[:-1], ends[1:], strict=True):
            sequence.routings.append(tuple(layer.tokens(begin, end) for layer in routing))

    def _with_followers(self, ready: list[Continuation]) -> tuple[list[int], list[Continuation]]:
        """Let the other continuations of prompts that are now in the cache begin -> (row of `ready`, sequence) each."""
        rows, sequences = [], []
        for row, leader in enumerate(ready):
            for follower in leader.followers:
                assert leader.id is not None
                follower.id, follower.n_cached = self.pool.share(leader.id), leader.n_cached
                follower.routings = list(leader.routings)
                self.active.append(follower)
            sequences += [leader, *leader.followers]
            rows += [row] * (1 + len(leader.followers))
            leader.followers = []
        return rows, sequences

    def _sample(self, logits_BV: Tensor, ready: list[Continuation]) -> list[Piece]:
        rows, ready = self._with_followers(ready)
        pieces = []
        for sequence, found in zip(ready, next_tokens(logits_BV[:, : self.vocab_size], rows, ready), strict=True):
            if isinstance(found, MixtralError):
                raise found
            pieces.append(sequence.accept(found))
        return pieces

    def _drop_finished(self) -> None:
        for sequence in self.active:
            if sequence.finish_reason is not None and sequence.id is not None:
                self.pool.free(sequence.id)
                sequence.id = None
        self.active = [s for s in self.active if s.finish_reason is None]


def _check(
    prompts: Sequence[Sequence[int]], params: Sequence[SamplingParams], k: Sequence[float | None], config: ModelConfig,
    tokenizer: Tokenizer | None, n: int, prefill_chunk: int | None,
) -> None:  # fmt: skip
    """Raise UsageError for arguments that cannot be served."""
    if n < 1:
        raise UsageError(f"n: must be a positive number of continuations, not {n}")
    if len(k) != len(prompts):
        raise UsageError(f"k: {len(k)} given for {len(prompts)} prompts; give one, or one for each")
    if len(params) != len(prompts):
        raise UsageError(f"params: {len(params)} given for {len(prompts)} prompts; give one, or one for each")
    if prefill_chunk is not None and prefill_chunk < 1:
        raise UsageError(f"prefill_chunk: must be a positive number of tokens, not {prefill_chunk}")
    for i, (prompt, wanted) in enumerate(zip(prompts, params, strict=True)):
        check_request(prompt, wanted, config, tokenizer, f"prompt {i}")
        if wanted.prompt_logprobs is not None:
            raise UsageError("prompt_logprobs: the plain loop has none; ask the engine")
