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
    source: Annotated[
        str, typer.Argument(metavar="SRC", help="Model folder of Hugging Face or Mistral, or GGUF file, to read.")
    ],
    target: Annotated[
        str, typer.Argument(metavar="DST", help="Folder to write (for gguf a file); must not exist, or be empty.")
    ],
    to: Annotated[str, typer.Option(metavar="FORMAT", help="hf, mistral or gguf.")],
    dtype: Annotated[
        str, typer.Option(metavar="NAME", help="bf16, fp32 or fp16, to be written; auto: as they are.")
    ] = "auto",
    type: Annotated[
        str | None, typer.Option(metavar="NAME", help="bf16 (the default), q8_0 or q4_0: of matrices; gguf only.")
    ] = None,
    fused: Annotated[
        bool, typer.Option("--fused", help="One tensor a layer for all experts, as transformers 5 holds them; hf only.")
    ] = False,
) -> None:
    """Rewrite a model for Hugging Face's, Mistral's or llama.cpp's tools.

    The weights keep their dtype unless told otherwise (what GGUF had quantised becomes bf16), and the tokenizer goes
    along. Folder or file appear whole or not at all.

    Examples:
    mixtral convert Mixtral-8x7B-v0.1 mixtral-native --to mistral
    mixtral convert mistral-download mixtral-hf --to hf --dtype bf16
    mixtral convert Mixtral-8x7B-v0.1 mixtral.gguf --to gguf --type q8_0
    """
    from mixtral import weights
    from mixtral.runtime import choose_dtype

    written = None if dtype == "auto" else choose_dtype(dtype, "cpu")
    with _bar() as progress:
        weights.convert(source, target, to, written, fused, progress, type)
    for file in [Path(target)] if to == "gguf" else sorted(Path(target).iterdir()):
        print(f"{file}  {bytes_text(file.stat().st_size)}")


@contextmanager
def _bar() -> Iterator[Progress]:
    """A bar of bytes on standard error; nothing where that is not a terminal."""
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
