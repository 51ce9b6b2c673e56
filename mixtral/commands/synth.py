"""`mixtral synth`: random weights of a published shape."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mixtral.commands.common import ThreadsOption, bytes_text, stages_bar


def synth(
    preset: Annotated[str, typer.Argument(metavar="PRESET", help="The shape: mixtral-8x7b, mixtral-8x22b, tiny, ...")],
    target: Annotated[str, typer.Argument(metavar="DST", help="Folder to write; must not exist, or be empty.")],
    bits: Annotated[str, typer.Option(metavar="BITS", help="16, 8, 4, or mixed: 8, and 4 for the experts.")],
    seed: Annotated[int, typer.Option(min=0, metavar="N", help="The same seed gives the same weights.")] = 0,
    threads: ThreadsOption = "auto",
) -> None:
    """Write random weights of a published shape, to try its size without a download.

    At 16 bits in Hugging Face's format, else as `mixtral quantize` writes. The weights are made tensor by tensor, and
    the disk's room is looked at first. There is no tokenizer, and nothing sensible to be said.

    Examples:
    mixtral synth mixtral-8x7b random-8x7b --bits 4
    mixtral synth tiny random-tiny --bits 16 --seed 1
    """
    from mixtral import presets
    from mixtral.quant.synth import write_random
    from mixtral.runtime import set_threads

    set_threads(threads)
    config = presets.preset(preset)
    with stages_bar(in_bytes=True) as progress:
        write_random(config, target, bits, seed, progress)
    for file in sorted(Path(target).iterdir()):
        print(f"{file}  {bytes_text(file.stat().st_size)}")
