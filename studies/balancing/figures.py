"""Figures out of the summaries of runs: by kind of run, over seeds and layers."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from plan import KINDS

Summary = Mapping[str, Any]
Kinds = Mapping[str, Sequence[Summary]]  # label: its runs, one a seed


def read_summaries(out: Path) -> list[Summary]:
    """Of all runs that are done, by kind and seed, with `paced_seconds` where the pace of the kind was measured."""
    order = [kind.label for kind in KINDS]
    found = [json.loads(path.read_text()) for path in sorted((out / "runs").glob("*/summary.json"))]
    pace = json.loads((out / "pace.json").read_text()) if (out / "pace.json").exists() else {}
    for run in found:
        if run["label"] in pace:
            run["paced_seconds"] = run["steps"] * pace[run["label"]]
    return sorted(found, key=lambda summary: (order.index(summary["label"]), summary["seed"]))


def by_kind(summaries: Sequence[Summary], group: str) -> Kinds:
    """The runs that serve a question."""
    found: dict[str, list[Summary]] = {}
    for summary in summaries:
        if group in summary["groups"]:
            found.setdefault(summary["label"], []).append(summary)
    return found


def over_layers(measured: Mapping[str, Any], figure: str) -> float:
    """Mean of a layer's figure over layers; NaN for a dense model."""
    return fmean(layer[figure] for layer in measured["layers"]) if measured["layers"] else float("nan")


def spread(runs: Sequence[Summary], figure: Callable[[Summary], float]) -> tuple[float, float]:
    """(mean over seeds, half of the distance between the lowest and the highest)."""
    values = [figure(run) for run in runs]
    return fmean(values), (max(values) - min(values)) / 2


def mean_k(summary: Summary) -> float:
    """Experts that a token takes, as measured; 1 for a dense model."""
    return over_layers(summary["final"], "mean_k") if summary["final"]["layers"] else 1.0


def training_flops(summary: Summary) -> float:
    """Of the whole run, with the number of experts that tokens take at its end; a second pass to count is not in it."""
    model = summary["model"]
    one_expert = 6 * 3 * model["dim"] * model["ffn_dim"] * model["n_layers"]
    more = (mean_k(summary) - model["experts_per_token"]) * one_expert
    return summary["tokens"] * (summary["flops_per_token"] + more)


def curve(runs: Sequence[Summary], figure: Callable[[Mapping[str, Any]], float]) -> tuple[list[int], list[float]]:
    """(tokens, mean over seeds) of a figure at every checkpoint."""
    checkpoints = list(zip(*(run["trajectory"] for run in runs), strict=True))
    return [seeds[0]["tokens"] for seeds in checkpoints], [fmean(map(figure, seeds)) for seeds in checkpoints]
