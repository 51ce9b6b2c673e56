"""`mixtral convert`: a model folder from one format to another."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mixtral.commands.common import bytes_text, working


def convert(
    source: Annotated[str, typer.Argument(metavar="SRC", help="Model folder to read, of Hugging Face or Mistral.")],
    target: Annotated[str, typer.Argument(metavar="DST", help="Folder to write; must not exist, or be empty.")],
    to: Annotated[str, typer.Option(metavar="FORMAT", help="hf or mistral.")],
) -> None:
    """Rewrite a model folder for Hugging Face or Mistral tools.

    The weights keep their dtype, and the tokenizer goes along. The folder appears whole or not at all.

    Examples:
    mixtral convert Mixtral-8x7B-v0.1 mixtral-native --to mistral
    mixtral convert mistral-download mixtral-hf --to hf
    """
    from mixtral import weights

    with working(f"converting {source}"):
        weights.convert(source, target, to)
    for file in sorted(Path(target).iterdir()):
        print(f"{file}  {bytes_text(file.stat().st_size)}")
