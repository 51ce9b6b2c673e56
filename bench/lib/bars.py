"""Bars of tokens/s by engine and format, and on each what the ceiling of the same minute allows."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

COLOURS = {"mixtral": "C0", "llama.cpp": "C1", "transformers": "C2", "vLLM": "C3"}


def plot(result: dict[str, Any], path: Path, meaning: str) -> None:
    """The rows with one request at the result's context; `meaning`: of the line that marks the ceiling."""
    from matplotlib.figure import Figure  # here, since every engine's process loads this file with the script's others

    rows = [r for r in result["rows"] if r["batch"] == 1 and r["context"] == result["context"]]
    figure = Figure(figsize=(7.5, 0.9 + 0.42 * len(rows)), layout="constrained")
    axes = figure.subplots()
    for place, r in enumerate(rows):
        limit = statistics.median(top / r["needed_a_token"] for top in r["ceilings"])
        axes.barh(place, r["tokens_per_second"], height=0.7, color=COLOURS[r["engine"]])
        axes.plot([limit, limit], [place - 0.42, place + 0.42], color="black", linewidth=2)
        text = f" {r['tokens_per_second']:.1f}, {r['of_ceiling']:.0%}"
        axes.text(max(limit, r["tokens_per_second"]), place, text, va="center", fontsize=9)
    axes.set_yticks(range(len(rows)), [f"{r['engine']} {r['format']}" for r in rows])
    axes.invert_yaxis()
    axes.margins(x=0.18)
    axes.set(xlabel=f"tokens/s, one request; {meaning}")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
