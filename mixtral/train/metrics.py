"""Metrics as JSON lines: results in `metrics.jsonl`, times in `timings.jsonl`.

They stand apart so that the results of two runs, or of an interrupted and an uninterrupted one, compare byte by byte.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mixtral.errors import MixtralError
from mixtral.files import atomic_write


class MetricsLog:
    """Appends to both files of a run's folder. Opened at `step`, it first drops the lines of later steps."""

    def __init__(self, folder: Path, step: int) -> None:
        self.paths = {name: folder / f"{name}.jsonl" for name in ("metrics", "timings")}
        for path in self.paths.values():
            if path.exists():
                kept = [line for line in read_lines(path) if line["step"] <= step]
                atomic_write(path, "".join(f"{json.dumps(line)}\n" for line in kept))

    def write(self, name: str, line: dict[str, Any]) -> None:
        """Append one line to `metrics` or `timings`; it carries a `step`."""
        try:
            with open(self.paths[name], "a") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:
            raise MixtralError(f"cannot write {self.paths[name]}: {error.strerror}") from error


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics file; a last line cut off by a kill is left out."""
    lines = []
    for text in path.read_text().splitlines():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            break
    return lines
