"""Masks of grammars, asked for while the model runs; one that raises or stalls harms its own request alone."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence

from torch import Tensor

from mixtral.engine.continuation import Continuation, Mask
from mixtral.errors import MixtralError, one_line

SECONDS = 5.0  # a mask may take as long


class _Asked(threading.Thread):
    """One call of a mask. A daemon: one that never returns does not keep the process alive."""

    def __init__(self, mask: Mask, tokens: Sequence[int]) -> None:
        super().__init__(daemon=True, name="mixtral mask")
        self._mask, self._tokens = mask, tuple(tokens)
        self.answer: Tensor | None = None
        self.error: MixtralError | None = None
        self.done = threading.Event()
        self.start()

    def run(self) -> None:
        try:
            self.answer = self._mask(self._tokens)
        except Exception as error:
            self.error = MixtralError(one_line(f"mask: {type(error).__name__}: {error}"))
        finally:
            self.done.set()


class Masks:
    """The masks of one step."""

    def __init__(self, continuations: Sequence[Continuation]) -> None:
        self._asked = {id(c): _Asked(c.mask, c.all_tokens) for c in continuations if c.mask is not None}
        self._ends = time.monotonic() + SECONDS

    def of(self, c: Continuation) -> Tensor | MixtralError | None:
        """What it may say next; an error instead where the mask raised one, or has not answered in time."""
        if (asked := self._asked.get(id(c))) is None:
            return None
        if not asked.done.wait(max(0.0, self._ends - time.monotonic())):
            return MixtralError(f"mask: no answer within {SECONDS:g} s")
        return asked.error or asked.answer
