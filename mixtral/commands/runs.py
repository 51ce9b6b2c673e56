"""`mixtral runs`: training runs side by side."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mixtral.commands.common import JsonOption, console, print_table, say

if TYPE_CHECKING:
    from mixtral.train.compare import RunSummary


def runs(
    folders: Annotated[list[Path], typer.Argument(metavar="DIR...", help="Folders of training runs.")],
    plot: Annotated[Path | None, typer.Option(metavar="FILE", help="Also draw the curves, as a PNG.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Compare training runs, finished or not, in a table and a plot; folders that are no runs are named and left out.

    size is active and all parameters; val and b/B (bits a byte) are of the validation with the lowest loss, tok/s and
    matmul (the share of peak matmul throughput) medians over steps, mem the most memory; max (the worst layer's
    largest load over the mean) and dead experts are of the last statistics. Below stand the fields of the configuration
    in which they differ. --plot draws bits a byte where vocabularies differ.

    Examples:
    mixtral runs runs/a runs/b
    mixtral runs runs/* --plot curves.png
    mixtral runs runs/* --json
    """
    from rich.table import Table

    from mixtral.train.compare import plot_runs
    from mixtral.train.lines import json_line

    summaries = _summaries(folders)
    if plot is not None:
        plot_runs([Path(summary.name) for summary in summaries], plot)
    if as_json:
        print(json_line([summary._asdict() for summary in summaries]))
        return
    table = Table(box=None, padding=(0, 1, 0, 0))
    table.add_column("run", overflow="fold")
    for name in ("size", "step", "loss", "val", "b/B", "tok/s", "matmul", "mem", "max", "dead"):
        table.add_column(name, justify="right")
    for name, summary in zip(_short([summary.name for summary in summaries]), summaries, strict=True):
        table.add_row(name, *_row(summary))
    print_table(console(), table)
    _print_differences([Path(summary.name) for summary in summaries])
    if plot is not None:
        console().print(f"curves: {plot}", soft_wrap=True)


def _print_differences(folders: list[Path]) -> None:
    """The fields in which the runs were configured otherwise, a row each."""
    from rich.table import Table

    from mixtral.train.compare import differences

    if not (found := differences(folders)):
        return
    table = Table(box=None, padding=(0, 1, 0, 0), title="They differ in", title_justify="left", title_style="bold")
    table.add_column("field")
    for name in _short([str(folder) for folder in folders]):
        table.add_column(name, overflow="fold")
    for field, values in found.items():
        table.add_row(field, *(json.dumps(value) for value in values))
    console().print()
    print_table(console(), table)


def _summaries(folders: list[Path]) -> list[RunSummary]:
    """Of those folders that are runs; each of the others is named. Raises UsageError when none is."""
    from mixtral.errors import UsageError
    from mixtral.train.compare import summarise

    found = []
    for folder in folders:
        try:
            found.append(summarise(folder))
        except UsageError as error:
            if len(folders) == 1:
                raise
            say(f"left out: {error}")
    if not found:
        raise UsageError(f"none of these {len(folders)} is a training run")
    return found


def _short(names: list[str]) -> list[str]:
    """Paths from the folder that all of them share, as a table has little room."""
    shared = os.path.commonpath([os.path.dirname(os.path.abspath(name)) for name in names])
    return [os.path.relpath(name, shared) for name in names]


def _row(s: RunSummary) -> list[str]:
    return [
        f"{s.active_parameters / 1e6:.1f}/{s.parameters / 1e6:.1f}M",
        f"{s.step}/{s.steps}",
        _text(s.cross_entropy, "{:.3f}"),
        _text(s.best_val_cross_entropy, "{:.3f}"),
        _text(s.best_val_bits_per_byte, "{:.3f}"),
        _text(s.tokens_per_second, "{:,.0f}"),
        _text(s.share_of_peak, "{:.0%}"),
        _text(None if s.memory_bytes is None else s.memory_bytes / 1e9, "{:.1f}GB"),
        _text(s.max_over_mean, "{:.2f}"),
        _text(s.dead, "{}"),
    ]


def _text(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)
