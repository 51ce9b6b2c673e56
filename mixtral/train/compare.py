"""Comparing runs by what they logged: one line of figures each, and their curves."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from mixtral.config.table import flatten
from mixtral.errors import MixtralError, UsageError
from mixtral.files import atomic_file, check_writable
from mixtral.train.lines import read_lines
from mixtral.train.record import recorded_config

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PLOTTED_BY = "mixtral runs"  # stands in the file: a plot may be replaced by a newer one, another picture may not
SMOOTHED = 20  # steps that a point of the speed's curve is the median of


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
    best_val_cross_entropy: float | None  # of the lowest one
    best_val_bits_per_byte: float | None
    max_over_mean: float | None  # of the last routing statistics, the worst layer; so is the next
    gini: float | None
    dead: int | None  # experts of all layers
    tokens_per_second: float | None  # median over steps; so is the next
    share_of_peak: float | None
    memory_bytes: int | None  # the most of any step


def summarise(folder: Path) -> RunSummary:
    """The figures of the run in `folder`. Raises UsageError when it is none."""
    config = recorded_config(folder)
    lines, times = (_lines(folder / f"{name}.jsonl") for name in ("metrics", "timings"))
    steps = [line for line in lines if "cross_entropy" in line]
    validations = [line for line in lines if "val_cross_entropy" in line]
    finite = (line for line in validations if math.isfinite(line["val_cross_entropy"]))
    best = min(finite, key=lambda v: v["val_cross_entropy"], default={})
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
        val_bits_per_byte=validations[-1].get("val_bits_per_byte") if validations else None,
        best_val_cross_entropy=best.get("val_cross_entropy"),
        best_val_bits_per_byte=best.get("val_bits_per_byte"),
        max_over_mean=max(layer["max_over_mean"] for layer in layers) if layers else None,
        gini=max(layer["gini"] for layer in layers) if layers else None,
        dead=sum(layer["dead"] for layer in layers) if layers else None,
        tokens_per_second=_median(times, "tokens_per_second"),
        share_of_peak=_median(times, "share_of_peak"),
        memory_bytes=max((line["memory_bytes"] for line in times if "memory_bytes" in line), default=None),
    )


def _median(lines: Sequence[dict[str, Any]], key: str) -> float | None:
    values = [line[key] for line in lines if key in line]
    return statistics.median(values) if values else None


def differences(folders: Sequence[Path]) -> dict[str, list[Any]]:
    """The fields in which the runs' configurations differ, those of the model as `model.dim`: a value for each run."""
    configs = [flatten(recorded_config(folder).to_dict()) for folder in folders]
    names = dict.fromkeys(name for config in configs for name in config)
    values = {name: [config.get(name) for config in configs] for name in names}
    return {name: found for name, found in values.items() if any(value != found[0] for value in found)}


def plot_runs(folders: Sequence[Path], path: Path) -> None:
    """Write a PNG of three panels over tokens: training and validation loss, speed, and how uneven the loads are.

    Where the runs' vocabularies differ, a token is not the same to them: validation alone is shown, in bits a byte.
    An earlier plot of this function is replaced. Raises UsageError for another file in its place, for another suffix,
    and without matplotlib; MixtralError when the file cannot be written.
    """
    _check_plot(path)
    figure = figure_of(folders)
    with atomic_file(path, replace=True) as new:
        figure.savefig(new, dpi=120, format="png", metadata={"Software": PLOTTED_BY})


def figure_of(folders: Sequence[Path]) -> Figure:
    """The plot, as a figure of matplotlib. Raises UsageError where that is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UsageError('plots need matplotlib: pip install "mixtral[plots]"') from error
    figure = Figure(figsize=(15, 4.6), layout="constrained")
    panels = loss, speed, balance = figure.subplots(1, 3)
    by_byte = len({recorded_config(folder).model.vocab_size for folder in folders}) > 1
    for number, folder in enumerate(folders):
        _draw(panels, folder, f"C{number % 10}", by_byte)
    if by_byte:
        loss.set(title="loss of validation; vocabularies differ", ylabel="bits a byte")
    else:
        loss.set(title="loss: steps (faint) and validation", ylabel="nats a token")
    speed.set(title=f"speed: steps (faint), median of {SMOOTHED}", ylabel="tokens/s")
    balance.set(title="loads of the worst layer", ylabel="max / mean (1: balanced)")
    for panel in panels:
        panel.set_xlabel("tokens")
        panel.grid(alpha=0.25)
    speed.set_ylim(bottom=0)
    balance.set_ylim(bottom=1)
    figure.legend(*loss.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


def _check_plot(path: Path) -> None:
    if path.suffix != ".png":
        raise UsageError(f"{path}: a plot is a PNG; a name that ends in .png is wanted")
    if not path.parent.is_dir():
        raise MixtralError(f"cannot write {path}: no such folder")
    check_writable(path)
    if path.exists() and not (path.is_file() and f"Software\0{PLOTTED_BY}".encode() in path.read_bytes()[:1000]):
        raise UsageError(f"{path}: exists already, and is no plot of runs; name another file")


def _draw(panels: Sequence[Any], folder: Path, colour: str, by_byte: bool) -> None:
    loss, speed, balance = panels
    per_step = recorded_config(folder).tokens_per_step
    lines, times = (_lines(folder / f"{name}.jsonl") for name in ("metrics", "timings"))

    def draw(panel: Any, points: list[tuple[int, float]], **style: Any) -> None:
        tokens, values = [per_step * step for step, _ in points], [value for _, value in points]
        panel.plot(tokens, values, color=colour, **style)

    if not by_byte:
        draw(loss, _series(lines, "cross_entropy"), alpha=0.25)
    validation = "val_bits_per_byte" if by_byte else "val_cross_entropy"
    draw(loss, _series(lines, validation), marker="o", markersize=4, label=str(folder))
    rates = _series(times, "tokens_per_second")
    draw(speed, rates, alpha=0.25)
    draw(speed, _running_median(rates))
    worst = [(x["step"], max(layer["max_over_mean"] for layer in x["layers"])) for x in lines if x.get("layers")]
    draw(balance, worst)


def _series(lines: Sequence[dict[str, Any]], key: str) -> list[tuple[int, float]]:
    return [(line["step"], line[key]) for line in lines if key in line]


def _running_median(points: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """At each step the median of the last SMOOTHED values."""
    values = [value for _, value in points]
    return [(step, statistics.median(values[max(0, i + 1 - SMOOTHED) : i + 1])) for i, (step, _) in enumerate(points)]


def _lines(path: Path) -> list[dict[str, Any]]:
    return read_lines(path) if path.exists() else []
