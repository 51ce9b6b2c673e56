"""Request: a prompt given to an engine, and Stream: the pieces of some requests as they come."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from typing import TYPE_CHECKING

from mixtral.engine.continuation import Continuation, Generation, Piece
from mixtral.errors import MixtralError, UsageError

if TYPE_CHECKING:
    from mixtral.engine.engine import Engine


class Request:
    """A prompt and its continuations, as `Engine.add` returns it."""

    def __init__(self, continuations: list[Continuation]) -> None:
        self.continuations = continuations
        self.pieces: deque[Piece] = deque()  # that have come, and nobody has fetched
        self.arrived = time.monotonic()
        self.last_token: float | None = None  # when it came

    @property
    def is_finished(self) -> bool:
        return all(c.finish_reason is not None for c in self.continuations)

    @property
    def error(self) -> str:
        """Of the first continuation that ended with one."""
        return next((c.error for c in self.continuations if c.error), "")

    def results(self) -> list[Generation]:
        """Raises UsageError while some are unfinished."""
        if not self.is_finished:
            raise UsageError("results: the request is not at its end yet")
        return [c.result() for c in self.continuations]


class Stream(Iterator[Piece]):
    """The pieces of some requests as they come. Closed, exhausted or dropped, it takes back what is unfinished.

    Raises MixtralError when a request ends with an error.
    """

    def __init__(self, engine: Engine, requests: list[Request]) -> None:
        self._engine, self._requests = engine, requests
        self._open = list(requests)
        self._pieces: deque[Piece] = deque()

    def __next__(self) -> Piece:
        while not self._pieces:
            self._collect()
            if not self._pieces:
                if not self._open:
                    raise StopIteration
                self._step()
        return self._pieces.popleft()

    def _collect(self) -> None:
        """Take over what has come. Raises MixtralError for a request that has ended with one."""
        going = []
        for request in self._open:
            finished = request.is_finished  # before its pieces are fetched: nothing comes after them
            while request.pieces:
                self._pieces.append(request.pieces.popleft())
            if finished and request.error:
                self.close()
                raise MixtralError(request.error)
            if not finished:
                going.append(request)
        self._open = going

    def results(self) -> list[Generation]:
        """All continuations, those of a prompt one after the other. Raises UsageError while some are unfinished."""
        if self._pieces or any(request.pieces for request in self._requests):
            raise UsageError("results: the stream is not at its end yet")
        return [result for request in self._requests for result in request.results()]

    def close(self) -> None:
        """Stop here, and free the cache."""
        for request in self._open:
            self._engine.abort(request)
        self._open = []

    def __del__(self) -> None:
        self.close()

    def _step(self) -> None:
        """Run a step, unless another thread's has brought something meanwhile."""
        try:
            with self._engine.lock:
                if not any(request.pieces or request.is_finished for request in self._open):
                    self._engine.step()
        except BaseException:
            self.close()
            raise
