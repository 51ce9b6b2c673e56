"""`mixtral convert`: a model folder from one format to another."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mixtral.commands.common import AllowNonfinite, ThreadsOption, bytes_text, stages_bar


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
    allow_nonfinite: AllowNonfinite = False,
    threads: ThreadsOption = "auto",
) -> None:
    """Rewrite a model for Hugging Face's, Mistral's or llama.cpp's tools.

    The weights keep their dtype unless --dtype says otherwise (what GGUF had quantised becomes bf16), and the tokenizer
    goes along. Folder or file appear whole or not at all; weights that are not finite, or too large for the type that
    is written, are refused by name.

    Examples:
    mixtral convert Mixtral-8x7B-v0.1 mixtral-native --to mistral
    mixtral convert mistral-download mixtral-hf --to hf --dtype bf16
    mixtral convert Mixtral-8x7B-v0.1 mixtral.gguf --to gguf --type q8_0
    """
    from mixtral import weights
    from mixtral.runtime import choose_dtype, set_threads
    from mixtral.shipped import model_folder

    set_threads(threads)
    written = None if dtype == "auto" else choose_dtype(dtype, "cpu")
    with stages_bar(in_bytes=True) as progress:
        weights.convert(model_folder(source), target, to, written, fused, progress, type, allow_nonfinite)
    for file in [Path(target)] if to == "gguf" else sorted(Path(target).iterdir()):
        print(f"{file}  {bytes_text(file.stat().st_size)}")
