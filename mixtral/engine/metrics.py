"""Metrics of an engine: plain values, counted as steps go by."""

from __future__ import annotations

import time
from collections import deque
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mixtral.engine.engine import Engine, Request
    from mixtral.engine.scheduler import Chunk

_RECENT = 1024  # values of which percentiles are made


class Metrics:
    """What an engine has done so far."""

    def __init__(self) -> None:
        self.requests = self.steps = self.prompt_tokens = self.generated_tokens = 0
        self.busy_seconds = 0.0  # in steps
        self.first_token_seconds: deque[float] = deque(maxlen=_RECENT)  # from arrival
        self.between_tokens_seconds: deque[float] = deque(maxlen=_RECENT)

    def stepped(self, chunks: list[Chunk], seconds: float) -> None:
        """A step has been run."""
        self.steps += 1
        self.busy_seconds += seconds
        self.prompt_tokens += sum(n for c, n, _ in chunks if c.n_cached - n < c.n_prompt)

    def token(self, request: Request) -> None:
        """A request has got a token."""
        now = time.monotonic()
        self.generated_tokens += 1
        if request.last_token is None:
            self.first_token_seconds.append(now - request.arrived)
        else:
            self.between_tokens_seconds.append(now - request.last_token)
        request.last_token = now

    def values(self, engine: Engine) -> dict[str, float | None]:
        """All as numbers by name; None where nothing has been measured yet."""
        scheduler, pool, speculation = engine.scheduler, engine.pool, engine.speculation
        return {
            "requests": self.requests,
            "running": len(scheduler.running),
            "waiting": len(scheduler.waiting),
            "steps": self.steps,
            "preemptions": scheduler.preemptions,
            "blocks": pool.n_blocks,
            "blocks_free": pool.n_free,
            "blocks_remembered": pool.blocks.n_remembered,
            "prefix_hit_tokens": scheduler.prefix_hits,
            "prompt_tokens": self.prompt_tokens,
            "generated_tokens": self.generated_tokens,
            "drafted_tokens": speculation.drafted if speculation else 0,
            "accepted_tokens": speculation.accepted if speculation else 0,
            "tokens_per_second": self.generated_tokens / self.busy_seconds if self.busy_seconds else None,
            "first_token_seconds_median": _median(self.first_token_seconds),
            "first_token_seconds_p95": _percentile(self.first_token_seconds, 0.95),
            "between_tokens_seconds_median": _median(self.between_tokens_seconds),
            "between_tokens_seconds_p95": _percentile(self.between_tokens_seconds, 0.95),
        }


def _median(values: deque[float]) -> float | None:
    return _percentile(values, 0.5)


def _percentile(values: deque[float], share: float) -> float | None:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else None
