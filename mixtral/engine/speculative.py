"""Speculation: guess the next tokens cheaply, let the model check them all in one pass (arXiv 2211.17192).

A guess counts only where it is the token that the model itself gives: each place is sampled from the model's own
logits, with the random number that it would have had anyway. So an answer is the same, bit for bit on the native step,
as without speculation, at any temperature; it only comes in fewer passes.

Whether that pays is measured. A pass over several tokens reads the experts of all of them, so on a sparse model it
costs more than one over a single token, and a wrong guess is time lost. Each sequence therefore has an account: seconds
that its guesses have saved, less those that they have cost. It may guess while the account stands above -LOSS of the
time that it has taken so far, and a success is remembered only up to MOST_CREDIT steps: who loses stops at once and is
tried again later.

Legend: B sequences.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from mixtral.engine.continuation import Continuation
from mixtral.engine.runner import Runner

LOSS = 0.01  # of a sequence's time
MOST_CREDIT = 4.0  # steps
MOST_DRAFTS = 12
_FRESH = 64  # steps for which the time of a step without guesses holds
_RECENT = 8192  # tokens that prompt lookup knows of a prompt
_SIZES = (4, 3, 2)  # tokens that must have occurred, for prompt lookup


class Drafter(Protocol):
    """Makes guesses."""

    def propose(self, sequences: Sequence[Continuation], most: Sequence[int]) -> list[list[int]]:
        """At most so many tokens that may follow each sequence, whose last token the model has not read."""
        ...

    def drop(self, sequence: Continuation) -> None:
        """It has ended."""
        ...


class PromptLookup:
    """What followed the last tokens where they occurred before: free, and often right in edits and quotations."""

    def __init__(self) -> None:
        self._indices: dict[int, _Index] = {}

    def propose(self, sequences: Sequence[Continuation], most: Sequence[int]) -> list[list[int]]:
        """See Drafter."""
        return [self._of(s).after(s.all_tokens, n) for s, n in zip(sequences, most, strict=True)]

    def drop(self, sequence: Continuation) -> None:
        """See Drafter."""
        self._indices.pop(id(sequence), None)

    def _of(self, sequence: Continuation) -> _Index:
        return self._indices.setdefault(id(sequence), _Index())


class _Index:
    """Where each short run of a text's tokens ends that something follows; the last place counts."""

    def __init__(self) -> None:
        self._ends: dict[tuple[int, ...], int] = {}
        self._done = 0  # tokens in it

    def after(self, tokens: list[int], most: int) -> list[int]:
        for end in range(max(self._done, len(tokens) - _RECENT), len(tokens) - 1):
            for size in _SIZES:
                if end + 1 >= size:
                    self._ends[tuple(tokens[end + 1 - size : end + 1])] = end + 1
        self._done = max(self._done, len(tokens) - 1)
        for size in _SIZES:
            if (begin := self._ends.get(tuple(tokens[-size:]))) is not None and len(tokens) >= size:
                return tokens[begin : begin + most]
        return []


class OwnWeights:
    """The model itself with fewer experts a token, or a copy of it in fewer bits, on the model's own keys and values.

    What it writes there for its guesses, the model writes anew when it checks them.

    Args:
        runner: of a model of the same shape, on the same pool.
        k: how many experts a token takes.
    """

    def __init__(self, runner: Runner, k: int | None) -> None:
        self._runner, self._k = runner, k

    def propose(self, sequences: Sequence[Continuation], most: Sequence[int]) -> list[list[int]]:
        """See Drafter."""
        pool = self._runner.pool
        found: list[list[int]] = [[] for _ in sequences]
        starts = [s.id for s in sequences if s.id is not None]
        lengths = [pool.length(id) for id in starts]
        # what leaves a window while guessing could not be taken back: guess on a copy
        ids = starts if pool.window is None else [pool.share(id) for id in starts]
        try:
            for i in range(max(most)):
                going = [b for b, n in enumerate(most) if n > i]
                if sum(pool.needed(ids[b], 1) for b in going) > pool.n_free:
                    break
                last = [(ids[b], [found[b][-1] if found[b] else sequences[b].all_tokens[-1]]) for b in going]
                logits = self._runner.run(pool.batch(last), None, self._k, keep_routing=False).logits
                assert logits is not None
                for b, token in zip(going, logits.argmax(-1).tolist(), strict=True):
                    found[b].append(token)
        finally:
            for id, start, length in zip(ids, starts, lengths, strict=True):
                if id == start:
                    pool.truncate(id, length)
                else:
                    pool.free(id)
        return found

    def drop(self, sequence: Continuation) -> None:
        """See Drafter."""


class DraftModel:
    """A smaller model of the same vocabulary, with keys and values of its own."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self._states: dict[int, tuple[int, list[int]]] = {}  # (id in its pool, the tokens there) of each sequence

    def propose(self, sequences: Sequence[Continuation], most: Sequence[int]) -> list[list[int]]:
        """See Drafter."""
        found: list[list[int]] = [[] for _ in sequences]
        for sequence in sequences:
            self._catch_up(sequence)
        for i in range(max(most)):
            going = [b for b, n in enumerate(most) if n > i and len(sequences[b].all_tokens) + i < self._context]
            if not going:
                break
            states = [self._states[id(sequences[b])] for b in going]
            texts = [[*sequences[b].all_tokens, *found[b]] for b in going]
            chunks = [(key, text[len(read) :]) for (key, read), text in zip(states, texts, strict=True)]
            pool = self._runner.pool
            if not pool.grows and sum(pool.needed(key, len(chunk)) for key, chunk in chunks) > pool.n_free:
                break  # too few blocks of its own are no reason to fail
            batch = pool.batch(chunks)
            rows = batch.cu_seqlens[1:].to(torch.int64) - 1
            logits = self._runner.run(batch, rows.to(self._runner.device), None, keep_routing=False).logits
            assert logits is not None
            for b, (_, read), (_, chunk), token in zip(going, states, chunks, logits.argmax(-1).tolist(), strict=True):
                read += chunk
                found[b].append(token)
        return found

    def drop(self, sequence: Continuation) -> None:
        """See Drafter."""
        if (state := self._states.pop(id(sequence), None)) is not None:
            self._runner.pool.free(state[0])

    @property
    def _context(self) -> int:
        return self._runner.config.context

    def _catch_up(self, sequence: Continuation) -> None:
        """Forget guesses that were wrong, and the last token, whose logits are wanted."""
        pool, text = self._runner.pool, sequence.all_tokens
        key, read = self._states.get(id(sequence)) or (pool.add(sequence.limit), [])
        pairs = zip(read, text[:-1], strict=False)
        same = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(read), len(text) - 1))
        if pool.window is not None and same < len(read):  # what has left the window could be missing
            pool.free(key)
            key, read, same = pool.add(sequence.limit), [], 0
        pool.truncate(key, same)
        self._states[id(sequence)] = key, read[:same]


class Account:
    """What one sequence's guesses have brought, in seconds."""

    def __init__(self) -> None:
        self.balance = self.spent = 0.0
        self.size = 3  # guesses at once: more after success, fewer after failure

    def may_guess(self) -> bool:
        return self.balance >= -LOSS * self.spent

    def step(self, seconds: float) -> None:
        """A step without guesses."""
        self.spent += seconds

    def settle(self, n_drafts: int, n_right: int, saved: float, cost: float, step_seconds: float) -> None:
        """A step with guesses: `saved` seconds of later steps for `cost` more of this one."""
        self.spent += step_seconds
        self.balance = min(self.balance + saved - cost, MOST_CREDIT * step_seconds)
        self.size = min(2 * self.size, MOST_DRAFTS) if n_right == n_drafts else max(1, n_right + 1)


class Speculation:
    """Which sequences guess, how much, and what came of it."""

    def __init__(self, drafter: Drafter) -> None:
        self.drafter = drafter
        self.drafted = self.accepted = 0  # tokens
        self._accounts: dict[int, Account] = {}
        self._plain: dict[int, tuple[float, int]] = {}  # seconds of a step without guesses by sequences; when measured
        self._steps = 0

    def propose(self, decoding: Sequence[Continuation], room: int) -> None:
        """Give sequences guesses, at most `room` in all."""
        self._steps += 1
        seconds, measured = self._plain.get(len(decoding), (0.0, -_FRESH))
        if self._steps - measured >= _FRESH:  # first see what a step takes without
            return
        able = [s for s in decoding if self._account(s).may_guess() and _can_guess(s)]
        most = [min(self._account(s).size, s.limit - len(s.all_tokens) - 1, room // max(1, len(able))) for s in able]
        pairs = [(s, n) for s, n in zip(able, most, strict=True) if n > 0]
        if pairs and seconds > 0:
            sequences, sizes = zip(*pairs, strict=True)
            for s, tokens in zip(sequences, self.drafter.propose(sequences, sizes), strict=True):
                s.drafts = tokens

    def settle(self, decoding: Sequence[tuple[Continuation, int, int]], seconds: float) -> None:
        """A step of nothing but decoding took so long; (sequence, guesses, how many were right) of each."""
        drafted = sum(n for _, n, _ in decoding)
        known, _ = self._plain.get(len(decoding), (seconds, 0))
        if not drafted:
            self._plain[len(decoding)] = (0.8 * known + 0.2 * seconds if known else seconds), self._steps
            for s, _, _ in decoding:
                self._account(s).step(seconds / len(decoding))
            return
        self.drafted += drafted
        share = known / len(decoding)
        for s, n, right in decoding:
            self.accepted += right
            if n:
                self._account(s).settle(n, right, right * share, max(0.0, seconds - known) * n / drafted, share)

    def drop(self, sequence: Continuation) -> None:
        """It has ended."""
        self._accounts.pop(id(sequence), None)
        self.drafter.drop(sequence)

    def _account(self, sequence: Continuation) -> Account:
        return self._accounts.setdefault(id(sequence), Account())


def _can_guess(s: Continuation) -> bool:
    return s.mask is None and not s.keep_routing
