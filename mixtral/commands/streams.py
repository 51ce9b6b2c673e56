"""Standard input, output and error as a process finds them: closed, full, without a reader, or in another encoding."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO, cast

from mixtral.data.readers import other_encoding
from mixtral.errors import MixtralError, UsageError


def prepare_streams() -> None:
    """Make the standard streams safe to write; MixtralError when standard output is closed.

    No file that is opened later may get the descriptor of a closed stream, or what libraries print would land in it.
    A write to standard output that fails raises MixtralError; one to standard error, where only remarks go, is ignored.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, which is this one
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - for the rest of the process
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
        raise MixtralError("standard output is closed; send it to a file, or to /dev/null")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a console that lacks a character gets its number
    if sys.stdout is sys.__stdout__:  # not what a test put in its place
        sys.stdout = cast(TextIO, _Stream(sys.__stdout__, needed=True))
    if sys.stderr is sys.__stderr__:
        sys.stderr = cast(TextIO, _Stream(sys.__stderr__, needed=False))


def discard_output() -> None:
    """Send what is still to be written to standard output nowhere, so that the process ends without failing at it."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if isinstance(sys.stdout, _Stream):
        sys.stdout = sys.stdout.stream


@contextmanager
def text_input(whole: bool = False) -> Iterator[TextIO]:
    """Standard input as UTF-8, whatever the locale says, without a byte-order mark.

    Raises UsageError when it is closed, and when what is read inside the block is not UTF-8 or cannot be read. The
    message gives the position of a fault only if the block reads the `whole` input at once; line by line it is not
    known.
    """
    if sys.stdin is None or sys.stdin.closed:
        raise UsageError("standard input is closed; the text is wanted there")
    if isinstance(sys.stdin, io.TextIOWrapper) and not sys.stdin.isatty():
        sys.stdin.reconfigure(encoding="utf-8-sig", errors="strict")
    try:
        yield sys.stdin
    except UnicodeDecodeError as error:
        at = f" at byte {error.start}" if whole else f" (byte 0x{error.object[error.start]:02x})"
        what = other_encoding(error.object) or f"not UTF-8 text{at}; convert it to UTF-8"
        raise UsageError(f"standard input: {what}") from None
    except OSError as error:
        if isinstance(error, BrokenPipeError) or error.filename is not None:
            raise  # standard output's, or a file's
        raise UsageError(f"cannot read standard input: {error.strerror or error}") from None


class _Stream:
    """A standard stream; after a write to it has failed, its output is discarded.

    If it is `needed`, that write and all later ones raise MixtralError: libraries probe a stream and swallow what that
    raises. A reader that has left still raises BrokenPipeError.
    """

    def __init__(self, stream: TextIO | None, needed: bool) -> None:
        assert stream is not None
        self.stream, self._needed = stream, needed
        self._failure: MixtralError | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        with self._watched():
            self.stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self._watched():
            self.stream.flush()

    @contextmanager
    def _watched(self) -> Iterator[None]:
        if self._failure:
            raise self._failure
        try:
            yield
        except OSError as error:
            if self._needed and isinstance(error, BrokenPipeError):
                raise
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())
            if self._needed:
                self._failure = MixtralError(f"cannot write standard output: {error.strerror}")
                raise self._failure from error
