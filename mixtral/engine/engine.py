"""Engine: many requests at once on one model, each answered as if it were alone.

A step takes the tokens that the scheduler chose, of many sequences, through the model in one pass, and samples for
those whose tokens are all in the cache. Whoever waits for an answer runs steps: threads that ask together share them.

Legend: R rows whose logits are wanted, V vocabulary.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor

from mixtral.engine.continuation import (
    Continuation,
    Generation,
    Mask,
    Token,
    check_request,
    known_ids,
)
from mixtral.engine.masks import Masks
from mixtral.engine.metrics import Metrics
from mixtral.engine.params import SamplingParams
from mixtral.engine.request import Request, Stream
from mixtral.engine.runner import Runner
from mixtral.engine.sampling import given_tokens, next_tokens
from mixtral.engine.scheduler import Chunk, Scheduler
from mixtral.engine.speculative import Drafter, Speculation
from mixtral.errors import MixtralError, UsageError
from mixtral.moe import Routing
from mixtral.tokenizer import Tokenizer

MAX_SEQUENCES = 64
MOST_CONTINUATIONS = 10_000  # of a prompt
STEP_TOKENS = 512  # as many rows as a pass of the native step has


class Engine:
    """Runs requests together. Threads may share it.

    Args:
        runner: runs the model; its pool is the cache, and must not grow.
        max_sequences: that run at once; others wait.
        step_tokens: the most tokens of a pass: a prompt longer than that is read in chunks.
        prefix_cache: keep keys and values of prompts for others that begin alike, while there is room.
        drafter: guesses tokens that the model then checks (engine/speculative.py).
    """

    def __init__(
        self, runner: Runner, tokenizer: Tokenizer | None = None, max_sequences: int = MAX_SEQUENCES,
        step_tokens: int = STEP_TOKENS, prefix_cache: bool = True, drafter: Drafter | None = None,
    ) -> None:  # fmt: skip
        self.speculation = None if drafter is None else Speculation(drafter)
        self.runner, self.tokenizer, self.pool = runner, tokenizer, runner.pool
        self.lock = threading.RLock()
        self.metrics = Metrics()
        self.scheduler = Scheduler(
            runner.pool, max_sequences, step_tokens, runner.config.sliding_window, prefix_cache
        )  # fmt: skip
        self._vocab_size = known_ids(runner.config, tokenizer)
        self._arrivals: deque[tuple[Request, int]] = deque()  # with their priorities, since the last step
        self._requests: dict[int, Request] = {}  # of each unfinished continuation

    # -- requests ------------------------------------------------------------------------------------------------------

    def add(
        self, prompt: Sequence[int], params: SamplingParams, *, n: int = 1, k: float | None = None, priority: int = 0,
        keep_routing: bool = False, mask: Mask | None = None, first: int = 0, index: int = 0, name: str = "prompt",
    ) -> Request:  # fmt: skip
        """A request joins those that wait.

        Args:
            n: continuations, which share the prompt's keys and values.
            k: how many experts a token takes, or a number between 0 and 1: the fewest whose probabilities sum to it;
                None: what the model was trained with.
            priority: the lower, the sooner; see Scheduler.
            keep_routing: record the routing of every token; nothing comes from the prefix cache then.
            mask: says after each token which may follow.
            first: the number of the first continuation, on which a seed's random numbers depend.
            index: of the first continuation, in its pieces.
            name: how errors call the prompt.

        Raises UsageError for what cannot be served.
        """
        self.check(prompt, params, n=n, k=k, name=name)
        config, tokenizer = self.runner.config, self.tokenizer
        continuations = [
            Continuation(index + j, prompt, params, k, config, tokenizer, first + j, keep_routing, mask)
            for j in range(n)
        ]
        leader = continuations[0]
        leader.followers = continuations[1:]
        request = Request(continuations)
        self._arrivals.append((request, priority))  # without the lock: who asks does not wait for a step
        return request

    def _let_in(self) -> None:
        while self._arrivals:
            request, priority = self._arrivals.popleft()
            self.scheduler.add(request.continuations[0], priority)
            self._requests |= {id(c): request for c in request.continuations}
            self.metrics.requests += 1

    def check(
        self, prompt: Sequence[int], params: SamplingParams, *, n: int = 1, k: float | None = None, name: str = "prompt"
    ) -> None:
        """Raise UsageError for what `add` would refuse."""
        config = self.runner.config
        check_request(prompt, params, config, self.tokenizer, name)
        _check_numbers(n, k, config.fewest_experts)
        self.scheduler.check(min(len(prompt) + params.max_tokens, params.max_length or config.context, config.context))

    def abort(self, request: Request) -> None:
        """Take a request back. Its blocks are free when this returns."""
        with self.lock:
            self._let_in()
            for c in request.continuations:
                if c.finish_reason is None:
                    self._end(c, "abort")

    @property
    def has_work(self) -> bool:
        return bool(self._requests or self._arrivals)

    def step(self) -> None:
        """Run the model once for what the scheduler chose. Pieces are put with their requests.

        An error of one request ends it with the finish reason "error". What else fails is raised; all requests are then
        as they were, and computed again.
        """
        with self.lock, torch.inference_mode(), self.runner.cores():
            started = time.perf_counter()
            self._let_in()
            try:
                self._speculate()
                if not (chunks := self.scheduler.schedule()):
                    return
                right = self._run(chunks)
            except BaseException:  # Ctrl-C too: the pool may hold half a step
                for c in list(self.scheduler.running):
                    self.scheduler.preempt(c)
                self.pool.forget_remembered()
                raise
            seconds = time.perf_counter() - started
            self.metrics.stepped(chunks, seconds)
            if self.speculation is not None and all(chunk.n == 1 for chunk in chunks):
                self.speculation.settle([(c, n, right.get(id(c), 0)) for c, _, n in chunks], seconds)

    def _speculate(self) -> None:
        if self.speculation is None:
            return
        for c in self.scheduler.running:
            c.drafts = []  # those of a step that had no room for them
        if not self.scheduler.waiting:
            decoding = [c for c in self.scheduler.running if c.n_left == 1]
            if len(decoding) == len(self.scheduler.running):
                self.speculation.propose(decoding, self.scheduler.step_tokens - len(decoding))

    # -- a step --------------------------------------------------------------------------------------------------------

    def _run(self, chunks: list[Chunk]) -> dict[int, int]:
        """-> of each sequence that has guessed how many guesses were right."""
        read = [
            (c.id, [*c.all_tokens[c.n_cached : c.n_cached + n], *c.drafts[:drafts]])
            for c, n, drafts in chunks if c.id is not None
        ]  # fmt: skip
        batch = self.pool.batch(read)
        ready = [chunk.sequence for chunk in chunks if chunk.n == chunk.sequence.n_left]
        masks = Masks([c for c in ready if c.params.max_tokens])
        spans, rows = self._wanted(chunks)
        keep = any(chunk.sequence.keep_routing for chunk in chunks)
        rows_R = torch.tensor(rows, dtype=torch.int64, device=self.runner.device)
        out = self.runner.run(batch, rows_R, self._k(chunks), keep)
        assert out.logits is not None
        for c, n, drafts in chunks:
            c.n_cached += n
            if not drafts and c.n_cached % self.pool.block_size < n:  # a block has become full
                self._remember(c)
        if keep:
            self._record(chunks, out.routing)
        logits_RV = out.logits[:, : self._vocab_size]
        self._read_prompts(chunks, spans, logits_RV)
        row_of = {id(c): span.stop - 1 for (c, _, _), span in zip(chunks, spans, strict=True)}
        guessed = {id(c): n for c, _, n in chunks if n}
        self._sample([c for c in ready if id(c) not in guessed], row_of, logits_RV, masks)
        return {id(c): self._check_drafts(c, n, logits_RV[row_of[id(c)] - n :]) for c, _, n in chunks if n}

    def _check_drafts(self, c: Continuation, n: int, logits_RV: Tensor) -> int:
        """Sample from the first n + 1 rows, for as long as what comes is what was guessed -> how many guesses were."""
        drafts, c.drafts = c.drafts[:n], []
        at_once = c.is_plain  # no token changes what another may be
        found = next_tokens(logits_RV[: n + 1], range(n + 1), [c] * (n + 1)) if at_once else []
        for i in range(n + 1):
            token = found[i] if at_once else next_tokens(logits_RV[i : i + 1], range(1), [c])[0]
            self._accept(c, token)
            if c.finish_reason is not None or i == n or c.all_tokens[-1] != drafts[i]:
                break
            c.n_cached += 1  # its keys and values are there
        if c.id is not None:
            self.pool.truncate(c.id, c.n_cached)
            self._remember(c)
        return i

    def _wanted(self, chunks: list[Chunk]) -> tuple[list[range], list[int]]:
        """Of each chunk its rows of the logits, and the tokens of the batch that these are of."""
        spans: list[range] = []
        rows: list[int] = []
        begin = 0
        for c, n, n_drafts in chunks:
            end = begin + n + n_drafts
            first = begin if _reads_prompt(c) else end - 1 - n_drafts if n == c.n_left else end
            spans.append(range(len(rows), len(rows) + end - first))
            rows += range(first, end)
            begin = end
        return spans, rows

    def _k(self, chunks: list[Chunk]) -> int | Tensor | None:
        """How many experts each token of the step takes."""
        first = chunks[0].sequence.k
        if not isinstance(first, float) and all(c.k == first for c, _, _ in chunks):
            return first
        default = self.runner.config.experts_per_token
        k_T = [default if c.k is None else c.k for c, n, drafts in chunks for _ in range(n + drafts)]
        return torch.tensor(k_T, dtype=_k_dtype(k_T), device=self.runner.device)

    def _remember(self, c: Continuation) -> None:
        if self.scheduler.prefix_cache and c.shares_prefixes and c.id is not None:
            self.pool.remember(c.id, c.all_tokens)

    def _record(self, chunks: list[Chunk], routing: tuple[Routing, ...]) -> None:
        begin = 0
        for c, n, drafts in chunks:
            if c.keep_routing:
                c.routings.append(tuple(layer.tokens(begin, begin + n) for layer in routing))
            begin += n + drafts

    def _read_prompts(self, chunks: list[Chunk], spans: list[range], logits_RV: Tensor) -> None:
        """Log-probabilities of prompts that asked for them."""
        for (c, n, _), span in zip(chunks, spans, strict=True):
            if (not _reads_prompt(c) and c.n_cached < c.n_prompt) or c.params.prompt_logprobs is None:
                continue
            begin = c.n_cached - n
            first, last = max(begin, len(c.prompt_tokens)), min(c.n_cached, c.n_prompt - 1)
            if first < last:
                rows_TV = logits_RV[span.start + first - begin : span.start + last - begin]
                c.prompt_tokens += given_tokens(rows_TV, c.all_tokens[first + 1 : last + 1], c.params.prompt_logprobs)

    def _sample(self, ready: list[Continuation], row_of: dict[int, int], logits_RV: Tensor, masks: Masks) -> None:
        sampling = self._with_followers([c for c in ready if c.params.max_tokens])
        rows = [row_of[id(leader)] for leader, _ in sampling]
        continuations = [c for _, c in sampling]
        if rows:
            answers = [masks.of(leader) for leader, _ in sampling]
            for c, found in zip(continuations, next_tokens(logits_RV, rows, continuations, answers), strict=True):
                self._accept(c, found)
        for c in ready:
            if not c.params.max_tokens:
                self._end(c, "length")

    def _with_followers(self, ready: list[Continuation]) -> list[tuple[Continuation, Continuation]]:
        """(whose logits, continuation): those whose prompt is now in the cache let the others of it begin."""
        pairs = []
        for leader in ready:
            pairs.append((leader, leader))
            for follower in leader.followers:
                assert leader.id is not None
                if follower.finish_reason is None:
                    self.scheduler.fork(follower, leader, self.pool.share(leader.id))
                    follower.routings, follower.prompt_tokens = list(leader.routings), leader.prompt_tokens
                    pairs.append((leader, follower))
            leader.followers = []
        return pairs

    def _accept(self, c: Continuation, token: Token | MixtralError) -> None:
        if isinstance(token, MixtralError):
            c.error = str(token)
            return self._end(c, "error")
        piece = c.accept(token)
        request = self._requests[id(c)]
        request.pieces.append(piece)
        self.metrics.token(request)
        if piece.finish_reason is not None:
            self._end(c, piece.finish_reason)
        return None

    def _end(self, c: Continuation, reason: str) -> None:
        if c.finish_reason is None:
            c.finish_reason = reason  # type: ignore[assignment]
        followers, c.followers = c.followers, []
        for follower in followers:  # they have not begun, and never will
            follower.error, follower.prompt_tokens = c.error, c.prompt_tokens
            self._end(follower, reason)
        if c.id is not None and self.pool.length(c.id) > c.n_cached:  # guesses that nobody has checked
            self.pool.truncate(c.id, c.n_cached)
        if self.speculation is not None:
            self.speculation.drop(c)
        self.scheduler.remove(c)
        del self._requests[id(c)]

    # -- as calls ------------------------------------------------------------------------------------------------------

    def stream(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams | Sequence[SamplingParams], *, n: int = 1,
        k: float | Sequence[float | None] | None = None, keep_routing: bool = False, first: int = 0,
    ) -> Stream:  # fmt: skip
        """Continue prompts; their pieces as they come. Arguments as of the plain loop (engine/generate.py)."""
        params = [params] * len(prompts) if isinstance(params, SamplingParams) else list(params)
        of_prompt = [k] * len(prompts) if k is None or isinstance(k, int | float) else list(k)
        for name, given in (("params", params), ("k", of_prompt)):
            if len(given) != len(prompts):
                raise UsageError(f"{name}: {len(given)} given for {len(prompts)} prompts; give one, or one for each")
        requests: list[Request] = []
        try:
            for i, (prompt, wanted, its_k) in enumerate(zip(prompts, params, of_prompt, strict=True)):
                requests.append(self.add(prompt, wanted, n=n, k=its_k, keep_routing=keep_routing, first=first + n * i,
                                         index=n * i, name=f"prompt {i}"))  # fmt: skip
        except BaseException:
            for request in requests:
                self.abort(request)
            raise
        return Stream(self, requests)

    def generate(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams | Sequence[SamplingParams], *, n: int = 1,
        k: float | Sequence[float | None] | None = None, keep_routing: bool = False, first: int = 0,
    ) -> list[Generation]:  # fmt: skip
        """The same to the end. Raises MixtralError when one ends with an error."""
        stream = self.stream(prompts, params, n=n, k=k, keep_routing=keep_routing, first=first)
        for _ in stream:
            pass
        return stream.results()

    def finish(self, request: Request) -> None:
        """Run steps until it has ended, in whatever way. Interrupted, it is taken back."""
        try:
            while not request.is_finished:
                with self.lock:
                    if not request.is_finished:
                        self.step()
        except BaseException:
            self.abort(request)
            raise

    def in_order(self, requests: Iterable[Callable[[], Request]]) -> Iterator[Request]:
        """Finished requests in the order of those given, each a call that adds it: a few steps ahead of what is needed,
        so that any number of them can be given. Dropped, it takes back what is unfinished."""
        queue: deque[Request] = deque()
        source = iter(requests)
        try:
            while True:
                while len(queue) < 4 * self.scheduler.max_sequences and (add := next(source, None)) is not None:
                    queue.append(add())
                if not queue:
                    return
                self.finish(queue[0])
                yield queue.popleft()
        finally:
            for request in queue:
                self.abort(request)


def _reads_prompt(c: Continuation) -> bool:
    """Whether log-probabilities of its prompt are still to be read."""
    return c.params.prompt_logprobs is not None and len(c.prompt_tokens) < c.n_prompt - 1


def _k_dtype(k_T: Sequence[float]) -> torch.dtype:
    return torch.float32 if any(isinstance(k, float) for k in k_T) else torch.int64


def _check_numbers(n: int, k: float | None, n_experts: int) -> None:
    if not 1 <= n <= MOST_CONTINUATIONS:
        raise UsageError(f"n: must lie in 1..{MOST_CONTINUATIONS:,} continuations, not {n}")
    if k is not None and not (0 < k < 1 if isinstance(k, float) else 1 <= k <= n_experts):
        share = ", or between 0 and 1 for as many as sum to that probability" if n_experts > 1 else ""
        raise UsageError(f"k: must lie in 1..{n_experts} (the model's experts){share}, not {k}")
    if isinstance(k, float) and n_experts == 1:
        raise UsageError("k: this model is dense (one expert); only sparse models choose how many a token takes")
