"""The errors a user can meet: one line each, saying what was wrong, where, and what would be right."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class MixtralError(Exception):
    """Something failed. The command line prints the message alone and exits with `exit_code`."""

    exit_code = 1


class UsageError(MixtralError):
    """The request itself was wrong: an unknown name, a bad value, a missing path."""

    exit_code = 2


class ConfigError(UsageError):
    """A configuration is incomplete, contradicts itself, or asks for what is not implemented."""


class WeightsError(MixtralError):
    """Weight files are missing, damaged, or do not fit the configuration."""


class DataError(MixtralError):
    """A data file cannot be read: names the file, the line and the reason."""


def did_you_mean(name: str, options: Iterable[str]) -> str:
    """A closing clause for "unknown NAME" errors: the nearest option when there is one, else all of them."""
    known = sorted(options)
    close = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known)}"
