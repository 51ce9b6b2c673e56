"""The errors a user can meet: one line each, saying what was wrong, where, and what would be right.

Messages quote files and arguments, which may hold anything: `shown` shortens a value, and every message is made one
short line that no terminal takes for a command.
"""

from __future__ import annotations

import difflib
import re
import reprlib
from collections.abc import Iterable

_LONGEST_LINE = 590  # characters
_LONGEST_WORD = 160  # without a slash; a path is shown in full
_shortener = reprlib.Repr()
_shortener.maxstring = _shortener.maxother = _shortener.maxlong = 60
_shortener.maxlevel = 2
_shortener.maxlist = _shortener.maxtuple = _shortener.maxdict = 3


class MixtralError(Exception):
    """Something failed. The command line prints the message alone and exits with `exit_code`."""

    exit_code = 1

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))


class UsageError(MixtralError):
    """The request itself was wrong: an unknown name, a bad value, a missing path."""

    exit_code = 2


class ConfigError(UsageError):
    """A configuration is incomplete, contradicts itself, or asks for what is not implemented."""


class WeightsError(MixtralError):
    """Weight files are missing, damaged, or do not fit the configuration."""


class DataError(MixtralError):
    """A data file cannot be read: names the file, the line and the reason."""


class Interrupted(MixtralError):
    """The user stopped a training run with Ctrl-C; the message says how to go on."""

    exit_code = 130


def did_you_mean(name: str, options: Iterable[str]) -> str:
    """A closing clause for "unknown NAME" errors: the nearest option when there is one, else all of them."""
    known = sorted(options)
    close = nearest(name, known)
    return f"did you mean {close!r}?" if close else f"known: {', '.join(known)}"


def nearest(name: str, options: Iterable[str]) -> str | None:
    """The option that `name` may stand for: a similar one, or the same letters in another order; None: none is near."""
    name, known = name[:_LONGEST_WORD], sorted(options)
    close = difflib.get_close_matches(name, known, n=1)
    return next(iter(close), None) or next((o for o in known if sorted(o) == sorted(name)), None)


def shown(value: object) -> str:
    """A value as Python writes it, at most 100 characters of it: `'abc...xyz'`."""
    try:
        return _short(_shortener.repr(value), 100)
    except ValueError:  # Python writes no number of more than 4,300 digits
        return "a number of thousands of digits"


def one_line(message: str) -> str:
    """A message as one line of bounded length, its ends kept; what is not printable becomes an escape, as in \\x1b."""
    text = "".join(c if c.isprintable() else _visible(c) for c in _short(message, 100 * _LONGEST_LINE).strip())
    text = re.sub(rf"[^\s/]{{{_LONGEST_WORD},}}", lambda word: _short(word[0], _LONGEST_WORD // 2), text)
    return _short(text, _LONGEST_LINE)


def _visible(character: str) -> str:
    return " " if character in "\n\r\t" else character.encode("unicode_escape").decode()


def _short(text: str, most: int) -> str:
    """Its first and last characters, when there are more than `most`."""
    return text if len(text) <= most else f"{text[: most // 2 - 2]}...{text[-(most // 2 - 2) :]}"
