"""`mixtral runs`: training runs side by side."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from mixtral.commands.common import JsonOption, console


def runs(
    folders: Annotated[list[Path], typer.Argument(metavar="DIR...", help="Folders of training runs.")],
    plot: Annotated[Path | None, typer.Option(metavar="FILE", help="Also draw the curves, as a PNG.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Compare training runs, finished or not, in a table and a plot.

    Examples:
    mixtral runs runs/a runs/b
    mixtral runs runs/* --plot curves.png
    """
    from rich.table import Table

    from mixtral.train.compare import plot_runs, summarise

    summaries = [summarise(folder) for folder in folders]
    if plot is not None:
        plot_runs(folders, plot)
    if as_json:
        print(json.dumps([summary._asdict() for summary in summaries]))
        return
    table = Table(box=None, padding=(0, 1, 0, 0))
    table.add_column("run", overflow="fold")
    for name in ("active/all", "step", "tokens", "loss", "val", "best", "bits/byte", "gini", "tok/s"):
        table.add_column(name, justify="right", no_wrap=True)
    for s in summaries:
        figures = (s.cross_entropy, s.val_cross_entropy, s.best_val_cross_entropy, s.val_bits_per_byte, s.gini)
        table.add_row(
            s.name,
            f"{s.active_parameters / 1e6:.1f}/{s.parameters / 1e6:.1f} M",
            f"{s.step}/{s.steps}",
            f"{s.tokens / 1e6:.2f} M",
            *("-" if x is None else f"{x:.3f}" for x in figures),
            "-" if s.tokens_per_second is None else f"{s.tokens_per_second:,.0f}",
        )
    console().print(table)
    if plot is not None:
        console().print(f"curves: {plot}", soft_wrap=True)
