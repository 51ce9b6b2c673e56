"""AsyncEngine: an engine for asyncio. A thread runs its steps; requests are awaited, streamed, and taken back when the
task that asked is cancelled."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

from mixtral.engine.continuation import Generation, Piece
from mixtral.engine.engine import Engine
from mixtral.engine.params import SamplingParams
from mixtral.engine.request import Request
from mixtral.errors import MixtralError, one_line

MOST_REQUESTS = 1024


class AsyncEngine:
    """Use it as `async with AsyncEngine(engine) as front`.

    Args:
        most_requests: unfinished ones; whoever asks for more waits until one has ended.
    """

    def __init__(self, engine: Engine, most_requests: int = MOST_REQUESTS) -> None:
        self.engine = engine
        self._room = asyncio.Semaphore(most_requests)
        self._wake = threading.Condition()
        self._listeners: dict[int, tuple[Request, Callable[[], Any]]] = {}  # what has news for whom
        self._closed = False
        self._failed = ""
        self._thread = threading.Thread(target=self._run, name="mixtral engine", daemon=True)

    async def __aenter__(self) -> AsyncEngine:
        self._thread.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        with self._wake:
            self._closed = True
            self._wake.notify()
        await asyncio.to_thread(self._thread.join)

    async def stream(self, prompt: Sequence[int], params: SamplingParams, **options: Any) -> AsyncIterator[Piece]:
        """The pieces of a request as they come. Closed or cancelled, it is taken back.

        Options are those of Engine.add. Raises UsageError for what cannot be served, MixtralError when it fails.
        """
        async with self._asked(prompt, params, options) as (request, news):
            async for piece in self._pieces(request, news):
                yield piece

    async def generate(self, prompt: Sequence[int], params: SamplingParams, **options: Any) -> list[Generation]:
        """The continuations of a request, whole. As of `stream`."""
        async with self._asked(prompt, params, options) as (request, news):
            async for _ in self._pieces(request, news):
                pass
            return request.results()

    @asynccontextmanager
    async def _asked(
        self, prompt: Sequence[int], params: SamplingParams, options: dict[str, Any]
    ) -> AsyncIterator[tuple[Request, asyncio.Event]]:
        """A request and the event of its news, once there is room; taken back at the end if it is unfinished."""
        async with self._room:
            news, loop = asyncio.Event(), asyncio.get_running_loop()
            request = self.engine.add(prompt, params, **options)
            with self._wake:
                self._listeners[id(request)] = request, lambda: loop.call_soon_threadsafe(news.set)
                self._wake.notify()
            try:
                yield request, news
            finally:
                with self._wake:
                    del self._listeners[id(request)]
                if not request.is_finished:  # in a thread, as a step may be running
                    await asyncio.shield(asyncio.to_thread(self.engine.abort, request))

    async def _pieces(self, request: Request, news: asyncio.Event) -> AsyncIterator[Piece]:
        while True:
            news.clear()
            finished = request.is_finished
            while request.pieces:
                yield request.pieces.popleft()
            if reason := request.error or self._failed or ("engine: it has been closed" if self._closed else ""):
                raise MixtralError(reason)
            if finished:
                return
            await news.wait()

    # -- the thread ----------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            with self._wake:
                while not self._closed and not self.engine.has_work:
                    self._wake.wait()
                if self._closed:
                    break
            try:
                self.engine.step()
            except Exception as error:
                self._failed = one_line(f"engine: {type(error).__name__}: {error}")
            self._tell()
            if self._failed:
                break
        self._tell(everyone=True)

    def _tell(self, everyone: bool = False) -> None:
        with self._wake:
            for request, tell in self._listeners.values():
                if everyone or self._failed or request.pieces or request.is_finished:
                    tell()
