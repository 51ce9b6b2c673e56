"""Scheduler: which tokens of which requests the next step processes. Pure Python: no tensors.

Every request has its place in one order, fixed when it arrives: the step it arrived at, put back by AGEING steps for
each unit of its priority number, then the order of arrival. Who comes first runs first, and gives up its blocks last:

- Tokens sampled last go before prompts, so that a long prompt holds up nobody's answer; prompts fill the rest of the
  step's budget, in chunks. The budget is above the number of sequences, so that a prompt always moves on.
- When no block is left, the sequence that comes last loses its own, and is computed again later (preemption).
- The first one of all can always go on, since a request that does not fit the whole pool is refused on arrival.

So waiting is bounded: nothing overtakes a request that comes AGEING * (difference of priorities) steps after it or
later; with equal priorities, nothing at all. It is admitted once those before it have been and there is room.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Hashable
from typing import NamedTuple, Protocol

from mixtral.engine.continuation import Continuation
from mixtral.errors import UsageError

AGEING = 256  # steps


class BlockTables(Protocol):
    """What the scheduler asks of the pool (engine/pool.py)."""

    @property
    def n_free(self) -> int: ...
    @property
    def n_blocks(self) -> int: ...

    def add_remembered(self, tokens: list[int], start: Hashable, most: int = 1) -> int: ...
    def add(self, most: int = 1) -> int: ...
    def free(self, id: int) -> None: ...
    def length(self, id: int) -> int: ...
    def held(self, id: int) -> int: ...
    def needed(self, id: int, n: int) -> int: ...
    def blocks_of(self, length: int) -> int: ...


class Chunk(NamedTuple):
    """The next tokens of a sequence to be processed."""

    sequence: Continuation
    n: int  # of its tokens; drafts come on top
    n_drafts: int


class Scheduler:
    """Waiting and running sequences.

    Args:
        max_sequences: that run at once.
        step_tokens: the most tokens of a step; more than there are sequences.
        window: positions that a token sees; None: all.
        prefix_cache: let prompts begin with what the pool remembers.
    """

    def __init__(
        self, pool: BlockTables, max_sequences: int, step_tokens: int, window: int | None, prefix_cache: bool
    ) -> None:
        if max_sequences < 1 or step_tokens <= max_sequences:
            raise UsageError(
                f"engine: {max_sequences} sequences at once in steps of {step_tokens} tokens: there must be "
                "a sequence at least, and more tokens than sequences"
            )
        self.pool, self.max_sequences, self.step_tokens, self.window = pool, max_sequences, step_tokens, window
        self.prefix_cache = prefix_cache
        self.waiting: list[Continuation] = []  # both in the order above
        self.running: list[Continuation] = []
        self.steps = self.preemptions = self.prefix_hits = 0  # hits in tokens
        self._arrivals = 0

    # -- requests ------------------------------------------------------------------------------------------------------

    def blocks_for(self, limit: int) -> int:
        """The most blocks that a sequence of so many tokens needs at once."""
        length = limit if self.window is None else min(limit, self.window + self.step_tokens)
        return self.pool.blocks_of(length) + (self.window is not None)

    def check(self, limit: int) -> None:
        """Raise UsageError when the pool is too small for a sequence of so many tokens."""
        if (needed := self.blocks_for(limit)) > self.pool.n_blocks:
            raise UsageError(f"engine: {limit} tokens of prompt and answer need {needed} blocks of keys and values, "
                             f"and the cache has {self.pool.n_blocks}; give it more memory, or ask for fewer tokens")

    def add(self, c: Continuation, priority: int = 0) -> None:
        """It waits for its turn. Raises UsageError as `check` does."""
        self.check(c.limit)
        self._arrivals += 1
        c.order = (self.steps + AGEING * priority, self._arrivals)
        insort(self.waiting, c, key=_order)

    def fork(self, c: Continuation, of: Continuation, id: int) -> None:
        """A continuation of a running one's prompt begins to run, with a sequence of the pool of its own."""
        c.id, c.n_cached, c.order = id, of.n_cached, (*of.order[:2], c.index)
        insort(self.running, c, key=_order)

    def remove(self, c: Continuation) -> None:
        """It has ended, or is taken back: its blocks are free at once."""
        queue = self.running if c in self.running else self.waiting
        if c in queue:
            queue.remove(c)
        self._free(c)

    # -- a step --------------------------------------------------------------------------------------------------------

    def schedule(self) -> list[Chunk]:
        """What the next step processes; nothing only if nothing is there."""
        self.steps += 1
        chunks = self._go_on()
        left = self.step_tokens - sum(chunk.n + chunk.n_drafts for chunk in chunks)
        if len(self.running) == len(chunks):  # nobody was preempted, or has to wait
            self._admit(chunks, left)
        return chunks

    def preempt(self, c: Continuation) -> None:
        """It loses its blocks, and waits in its place."""
        self.running.remove(c)
        self._free(c)
        c.n_cached, c.routings, c.drafts = 0, [], []
        self.preemptions += 1
        insort(self.waiting, c, key=_order)

    def _go_on(self) -> list[Chunk]:
        """The next tokens of those that run."""
        n_running = len(self.running)
        if n_running <= min(self.step_tokens, self.pool.n_free) and all(c.n_left == 1 for c in self.running) \
                and not any(c.drafts for c in self.running):  # the usual case: each needs one block at most
            return [Chunk(c, 1, 0) for c in self.running]
        return self._within_room()

    def _within_room(self) -> list[Chunk]:
        """The same, block by block; who comes last gives its own up where there are too few."""
        chunks: dict[int, Chunk] = {}  # by id of the pool
        reserved, left = 0, self.step_tokens
        decoding = [c for c in self.running if c.n_left == 1]
        for c in decoding + [c for c in self.running if c.n_left > 1]:
            if c.id is None:  # preempted in this step
                continue
            n = min(c.n_left, left)
            drafts = min(len(c.drafts), left - n - (len(decoding) - len(chunks))) if n == c.n_left else 0
            if drafts <= 0 or self.pool.needed(c.id, n + drafts) > self.pool.n_free - reserved:
                drafts = 0
            while n and self.pool.needed(c.id, n) > self.pool.n_free - reserved:
                last = self.running[-1]
                if last.id in chunks:
                    dropped = chunks.pop(last.id)
                    left += dropped.n + dropped.n_drafts
                    reserved -= self.pool.needed(last.id, dropped.n + dropped.n_drafts)
                self.preempt(last)
                if last is c:
                    n = 0
            if n and c.id is not None:
                chunks[c.id] = Chunk(c, n, drafts)
                reserved += self.pool.needed(c.id, n + drafts)
                left -= n + drafts
        return list(chunks.values())

    def _admit(self, chunks: list[Chunk], left: int) -> None:
        if not self.waiting:
            return
        reserved = sum(self.pool.needed(c.sequence.id, c.n + c.n_drafts) for c in chunks if c.sequence.id is not None)
        while self.waiting and left > 0:
            c = self.waiting[0]
            size = 1 + len(c.followers)
            if self.running and len(self.running) + size > self.max_sequences:
                return
            c.id = self._begin(c)
            whole = self.pool.blocks_of(len(c.all_tokens)) if self.window is None else self.blocks_for(c.limit)
            room = self.pool.n_free - reserved - len(self.running)  # which may each want another block soon
            if self.running and min(self.blocks_for(c.limit), whole + size) - self.pool.held(c.id) > room:
                self._free(c)
                return
            self.waiting.pop(0)
            c.n_cached = self.pool.length(c.id)
            self.prefix_hits += c.n_cached
            n = min(c.n_left, left)
            chunks.append(Chunk(c, n, 0))
            left -= n
            reserved += self.pool.needed(c.id, n)
            insort(self.running, c, key=_order)

    def _begin(self, c: Continuation) -> int:
        if self.prefix_cache and c.shares_prefixes:
            return self.pool.add_remembered(c.all_tokens, c.k, c.limit)
        return self.pool.add(c.limit)

    def _free(self, c: Continuation) -> None:
        if c.id is not None:
            self.pool.free(c.id)
            c.id = None


def _order(c: Continuation) -> tuple[int, ...]:
    return c.order
