"""Where our log goes. Loads no torch: every command sets this up first."""

from __future__ import annotations

import logging


def setup_logging(verbose: bool = False) -> None:
    """Send our log to standard error: warnings, and with `verbose` everything, with the names of the loggers.

    Calling it again changes that.
    """
    log = logging.getLogger("mixtral")
    log.setLevel(logging.DEBUG if verbose else logging.WARNING)
    if not log.handlers:
        log.addHandler(logging.StreamHandler())
        log.propagate = False  # else a library that configures the root logger makes every line appear twice
    line = "%(levelname)s %(name)s: %(message)s" if verbose else "mixtral: warning: %(message)s"
    log.handlers[0].setFormatter(logging.Formatter(line))
