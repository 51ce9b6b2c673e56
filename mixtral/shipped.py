"""The model that comes inside the package, by name."""

from __future__ import annotations

from pathlib import Path

SHIPPED = "mixtral-nano"
FOLDER = Path(__file__).parent / "nano"  # weights, tokenizer, and README.md, its card


def model_folder(name: str | Path) -> Path:
    """The folder that a model's name stands for: the package's own for `mixtral-nano` (a folder so called is
    `./mixtral-nano`), and the path itself for all others."""
    return FOLDER if str(name) == SHIPPED else Path(name)
