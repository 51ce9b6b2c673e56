"""From tokens to text that only ever grows: unfinished characters and possible stop strings are held back."""

from __future__ import annotations

from collections.abc import Sequence

from mixtral.tokenizer import Tokenizer


class StopStrings:
    """Finds the stop string that ends first; of two that end together, the longer one.

    What it answers does not depend on how the text was cut into pieces.
    """

    def __init__(self, strings: Sequence[str]) -> None:
        self._strings = tuple(strings)
        self._held = ""  # the longest end of the text that could begin a stop string

    def push(self, piece: str) -> tuple[str, bool]:
        """Text that may be shown now, and whether a stop string was found; it and what follows are never shown."""
        if not self._strings:
            return piece, False
        text = self._held + piece
        matches = [(begin + len(s), begin) for s in self._strings if (begin := text.find(s)) >= 0]
        if matches:
            self._held = ""
            return text[: min(matches)[1]], True
        shown = len(text) - self._possible_start(text)
        self._held = text[shown:]
        return text[:shown], False

    def flush(self) -> str:
        """What was held back: nothing more will come."""
        held, self._held = self._held, ""
        return held

    def _possible_start(self, text: str) -> int:
        """Characters at the end of `text` that are the beginning of a stop string, the most of them."""
        longest = max((len(s) for s in self._strings), default=1) - 1
        lengths = range(min(longest, len(text)), 0, -1)
        return next((n for n in lengths if any(s.startswith(text[-n:]) for s in self._strings)), 0)


class TextOutput:
    """The text of one generated sequence. The pieces it returns, joined, are the text."""

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], stop: Sequence[str]) -> None:
        self._stream = tokenizer.stream(after=prompt)
        self._stops = StopStrings(stop)
        self.stopped = False  # a stop string has ended the text

    def push(self, token: int) -> str:
        """The text that `token` adds; none once a stop string was found."""
        return self._add(self._stream.add(token))

    def end(self) -> str:
        """The rest, when no token will come: an unfinished character becomes U+FFFD, unless it begins after a stop."""
        return self._add(self._stream.flush()) + self._stops.flush()

    def _add(self, piece: str) -> str:
        if self.stopped:
            return ""
        text, self.stopped = self._stops.push(piece)
        return text
