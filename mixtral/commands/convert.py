"""`mixtral convert`: a model folder from one format to another."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mixtral.commands.common import bytes_text, console

if TYPE_CHECKING:
    from mixtral.weights.progress import Progress


def convert(
    source: Annotated[str, typer.Argument(metavar="SRC", help="Model folder to read, of Hugging Face or Mistral.")],
    target: Annotated[str, typer.Argument(metavar="DST", help="Folder to write; must not exist, or be empty.")],
    to: Annotated[str, typer.Option(metavar="FORMAT", help="hf or mistral.")],
    dtype: Annotated[
        str, typer.Option(metavar="NAME", help="bf16, fp32 or fp16, to be written; auto: as they are.")
    ] = "auto",
    fused: Annotated[
        bool, typer.Option("--fused", help="One tensor a layer for all experts, as transformers 5 holds them; hf only.")
    ] = False,
) -> None:
    """Rewrite a model folder for Hugging Face or Mistral tools.

    The weights keep their dtype unless told otherwise, and the tokenizer goes along. The folder appears whole or not
    at all.

    Examples:
    mixtral convert Mixtral-8x7B-v0.1 mixtral-native --to mistral
    mixtral convert mistral-download mixtral-hf --to hf --dtype bf16
    """
    from mixtral import weights
    from mixtral.runtime import choose_dtype

    written = None if dtype == "auto" else choose_dtype(dtype, "cpu")
    with _bar() as progress:
        weights.convert(source, target, to, written, fused, progress)
    for file in sorted(Path(target).iterdir()):
        print(f"{file}  {bytes_text(file.stat().st_size)}")


@contextmanager
def _bar() -> Iterator[Progress]:
    """A bar of bytes on standard error, one for reading and one for writing; nothing where that is not a terminal."""
    from rich import progress as rich_progress

    err = console(stderr=True)
    columns = (
        rich_progress.TextColumn("{task.description}"),
        rich_progress.BarColumn(bar_width=20),
        rich_progress.DownloadColumn(binary_units=True),
        rich_progress.TransferSpeedColumn(),
        rich_progress.TimeRemainingColumn(compact=True),
    )
    with rich_progress.Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as bar:
        tasks: dict[str, rich_progress.TaskID] = {}

        def show(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(what, total=total)
            bar.update(tasks[what], completed=done)

        yield show
