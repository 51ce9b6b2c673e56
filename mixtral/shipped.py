"""Models by name: the one that comes inside the package, and those of a hub."""

from __future__ import annotations

from pathlib import Path

from mixtral.hub import is_name, pulled

SHIPPED = "mixtral-nano"
FOLDER = Path(__file__).parent / "nano"  # weights, tokenizer, and README.md, its card


def model_folder(name: str | Path) -> Path:
    """The folder that a model's name stands for: the package's own for `mixtral-nano` (a folder so called is
    `./mixtral-nano`), the hub's cache for OWNER/MODEL where no such folder is here, and the path itself for all others.

    Raises UsageError for a model of the hub that was not fetched to the end (hub.py).
    """
    if str(name) == SHIPPED:
        return FOLDER
    return (pulled(str(name)) if is_name(name) else None) or Path(name)
