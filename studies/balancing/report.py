"""From the summaries of runs to what is read: OUT/report with tables (Markdown), plots (PNG) and all figures (JSON)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from figures import read_summaries
from plots import plots
from tables import tables

from mixtral.files import atomic_write


def report(out: Path) -> Path:
    """Write the report of the runs in `out` that are done -> its folder."""
    summaries = read_summaries(out)
    folder = out / "report"
    folder.mkdir(exist_ok=True)
    lines = ",\n".join(json.dumps(_rounded(summary)) for summary in summaries)
    atomic_write(folder / "balancing.json", f"[{lines}]\n")
    atomic_write(folder / "balancing_tables.md", tables(summaries))
    plots(summaries, folder)
    return folder


def _rounded(value: Any) -> Any:
    """Floats to five significant digits, at any depth."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {key: _rounded(inner) for key, inner in value.items()}
    return [_rounded(inner) for inner in value] if isinstance(value, list) else value
