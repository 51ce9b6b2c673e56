"""The picture of bench/decode.py: tokens/s of each engine, and what the bandwidth of the same minute allows."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

COLOURS = {"mixtral": "C0", "llama.cpp": "C1", "transformers": "C2", "vLLM": "C3"}


def plot(result: dict[str, Any], path: Path) -> None:
    """Bars of the rows with one request at the result's context; a line on each is the limit of its bytes."""
    rows = [r for r in result["rows"] if r["batch"] == 1 and r["context"] == result["context"]]
    figure = Figure(figsize=(7.5, 0.9 + 0.42 * len(rows)), layout="constrained")
    axes = figure.subplots()
    for place, r in enumerate(rows):
        limit = statistics.median(top / r["needed_a_token"] for top in r["ceilings"])
        axes.barh(place, r["tokens_per_second"], height=0.7, color=COLOURS[r["engine"]])
        axes.plot([limit, limit], [place - 0.42, place + 0.42], color="black", linewidth=2)
        told = f" {r['tokens_per_second']:.1f}, {r['of_ceiling']:.0%}"
        axes.text(max(limit, r["tokens_per_second"]), place, told, va="center", fontsize=9)
    axes.set_yticks(range(len(rows)), [f"{r['engine']} {r['format']}" for r in rows])
    axes.invert_yaxis()
    axes.margins(x=0.18)
    axes.set(xlabel="tokens/s, one request; the black line is where memory's speed ends")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
