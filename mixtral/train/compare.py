"""Comparing runs by what they logged: one line of figures each, and their curves."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mixtral.errors import MixtralError, UsageError
from mixtral.train.metrics import read_lines
from mixtral.train.pretrain import recorded_config


class RunSummary(NamedTuple):
    """A run's figures; None where it has not come that far."""

    name: str
    parameters: int
    active_parameters: int
    step: int
    steps: int
    tokens: int
    cross_entropy: float | None  # of the last step, nats a token
    val_cross_entropy: float | None  # of the last validation
    val_bits_per_byte: float | None
    best_val_cross_entropy: float | None
    gini: float | None  # of the last routing statistics, the worst layer
    tokens_per_second: float | None  # median over steps


def summarise(folder: Path) -> RunSummary:
    """The figures of the run in `folder`. Raises UsageError when it is none."""
    config = recorded_config(folder)
    lines, times = (_lines(folder / f"{name}.jsonl") for name in ("metrics", "timings"))
    steps = [line for line in lines if "cross_entropy" in line]
    validations = [line for line in lines if "val_cross_entropy" in line]
    layers = next((line["layers"] for line in reversed(steps) if "layers" in line), None)
    last = steps[-1] if steps else {"step": 0, "tokens": 0}
    return RunSummary(
        name=str(folder),
        parameters=config.model.n_params(),
        active_parameters=config.model.n_active_params(),
        step=last["step"],
        steps=config.steps,
        tokens=last["tokens"],
        cross_entropy=last.get("cross_entropy"),
        val_cross_entropy=validations[-1]["val_cross_entropy"] if validations else None,
        val_bits_per_byte=validations[-1]["val_bits_per_byte"] if validations else None,
        best_val_cross_entropy=min((v["val_cross_entropy"] for v in validations), default=None),
        gini=max(layer["gini"] for layer in layers) if layers else None,
        tokens_per_second=statistics.median(t["tokens_per_second"] for t in times) if times else None,
    )


def plot_runs(folders: Sequence[Path], path: Path) -> None:
    """Write a PNG of training and validation loss, and of the worst layer's Gini coefficient, over tokens.

    Raises UsageError without matplotlib, MixtralError when the file cannot be written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UsageError('plots need matplotlib: pip install "mixtral[plots]"') from error
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    loss, balance = figure.subplots(1, 2)
    for number, folder in enumerate(folders):
        _draw(loss, balance, folder, f"C{number % 10}")
    loss.set(title="loss: steps (faint) and validation", xlabel="tokens", ylabel="nats a token")
    balance.set(title="imbalance of the worst layer", xlabel="tokens", ylabel="Gini coefficient (0: balanced)")
    balance.set_ylim(bottom=0)
    loss.legend()
    try:
        figure.savefig(path, dpi=120)
    except (OSError, ValueError) as error:  # ValueError: a suffix that matplotlib does not know
        raise MixtralError(f"cannot write {path}: {error}") from error


def _draw(loss: Any, balance: Any, folder: Path, colour: str) -> None:
    per_step = recorded_config(folder).tokens_per_step
    lines = _lines(folder / "metrics.jsonl")
    named: dict[str, Any] = {"marker": "o", "label": str(folder)}
    for key, style in (("cross_entropy", {"alpha": 0.25}), ("val_cross_entropy", named)):
        points = [(line["step"] * per_step, line[key]) for line in lines if key in line]
        if points:
            loss.plot(*zip(*points, strict=True), color=colour, **style)
    points = [(line["step"] * per_step, max(x["gini"] for x in line["layers"])) for line in lines if line.get("layers")]
    if points:
        balance.plot(*zip(*points, strict=True), color=colour)


def _lines(path: Path) -> list[dict[str, Any]]:
    return read_lines(path) if path.exists() else []
