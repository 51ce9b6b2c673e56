"""`mixtral quantize`: a model folder in 8 or 4 bits a weight, and what that costs in quality."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mixtral.commands.common import (
    AllowNonfinite,
    JsonOption,
    ThreadsOption,
    bytes_text,
    console,
    print_table,
    stages_bar,
)

if TYPE_CHECKING:
    from torch import Tensor

    from mixtral.quant.compare import Comparison
    from mixtral.quant.quantize import Size
    from mixtral.quant.scheme import QuantScheme
    from mixtral.weights.progress import Progress


def quantize(
    source: Annotated[
        str, typer.Argument(metavar="SRC", help="Model folder of Hugging Face or Mistral, or GGUF file, to read.")
    ],
    target: Annotated[str, typer.Argument(metavar="DST", help="Folder to write; must not exist, or be empty.")],
    bits: Annotated[str, typer.Option(metavar="BITS", help="8, 4, or mixed: 8, and 4 for the experts.")],
    calibrate: Annotated[
        str | None, typer.Option(metavar="SOURCE", help="Text to calibrate with: a file or another data source.")
    ] = None,
    text: Annotated[
        str | None, typer.Option(metavar="SOURCE", help="Text to compare with the unquantised model on.")
    ] = None,
    tokens: Annotated[int, typer.Option(min=2, metavar="N", help="Read at most this many tokens of each text.")] = 8192,
    allow_nonfinite: AllowNonfinite = False,
    threads: ThreadsOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Quantise a model: attention, experts and output to 8.5 or 4.5 bits a weight.

    The weights stream by tensor by tensor, so memory for a few of them is enough; --calibrate needs that of one layer,
    --text that of the whole model. Every mixtral command reads the new folder as it is. It appears whole or not at all.

    Examples:
    mixtral quantize runs/first/final small --bits mixed
    mixtral quantize runs/first/final small --bits 4 --calibrate stdlib:code --text notes.txt
    mixtral quantize Mixtral-8x7B-v0.1 small --bits 8 --json
    """
    from mixtral.quant.quantize import quantise_folder
    from mixtral.quant.scheme import QuantScheme
    from mixtral.runtime import set_threads
    from mixtral.shipped import model_folder
    from mixtral.weights.save import check_free

    set_threads(threads)
    scheme, source = QuantScheme.of(bits), str(model_folder(source))
    check_free(target)
    to_compare = None if text is None else _sequences(source, text, tokens)  # a bad text is refused before the work
    importance: dict[str, Tensor] | None = None
    with stages_bar() as progress:
        if calibrate is not None:
            importance, facts = _calibrated(source, calibrate, tokens, progress)
            scheme = QuantScheme.of(bits, facts)
        size = quantise_folder(source, target, scheme, importance, progress, allow_nonfinite)
        comparison = None if to_compare is None else _compared(source, target, to_compare, progress)
    if as_json:
        print(json.dumps(_figures(size, scheme, comparison), indent=2))
        return
    _show_size(target, size, scheme)
    if comparison is not None:
        _show_comparison(comparison)


def _sequences(source: str, text: str, tokens: int) -> list[list[int]]:
    """Sequences of a text by the tokenizer of the model `source`. Raises UsageError when it came without one."""
    from mixtral.config.formats import read_config
    from mixtral.errors import UsageError
    from mixtral.quant.text import read_sequences
    from mixtral.tokenizer.load import find_tokenizer

    context = read_config(source).context
    if (tokenizer := find_tokenizer(source)) is None:
        raise UsageError(f"{source}: no tokenizer; --calibrate and --text need one")
    return read_sequences(text, tokenizer, tokens, context)


def _calibrated(
    source: str, text: str, tokens: int, progress: Progress
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """-> (the importance of inputs, what the scheme records of the calibration)."""
    from mixtral.config.formats import read_config
    from mixtral.quant.calibrate import second_moments
    from mixtral.weights.load import StateReader

    sequences = _sequences(source, text, tokens)
    config = read_config(source)
    importance = second_moments(StateReader(source, config), config, sequences, progress)
    return importance, {"source": text, "tokens": sum(map(len, sequences))}


def _compared(source: str, target: str, sequences: list[list[int]], progress: Progress) -> Comparison:
    from mixtral import lm
    from mixtral.quant.compare import compare

    return compare(lm.load(source, device="cpu").model, lm.load(target, device="cpu").model, sequences, progress)


def _figures(size: Size, scheme: QuantScheme, comparison: Comparison | None) -> dict[str, Any]:
    return {
        "size": asdict(size),
        "recipe": scheme.to_dict(),
        "comparison": None if comparison is None else asdict(comparison),
    }


# -- for people --------------------------------------------------------------------------------------------------------


def _show_size(target: str, size: Size, scheme: QuantScheme) -> None:
    excess = 100 * (size.written / size.theory - 1)
    print(f"{target}: {bytes_text(size.written)}, {100 * size.written / size.bf16:.1f} % of bf16; "
          f"in theory {bytes_text(size.theory)} ({excess:+.2f} %)")  # fmt: skip
    formats = f"attention {scheme.attention}, experts {scheme.experts}, output {scheme.output}"
    print(f"{formats}; norms and gates as they were")
    if scheme.calibration is not None:
        print(f"calibrated on {scheme.calibration['tokens']:,} tokens of {scheme.calibration['source']}")


def _show_comparison(comparison: Comparison) -> None:
    from rich.table import Table

    out = console()
    out.print(f"\nOn {comparison.tokens:,} tokens, against the unquantised model", style="bold")
    table = Table.grid(padding=(0, 3, 0, 0))
    for _ in range(4):
        table.add_column(justify="left" if not table.columns else "right")
    table.add_row("quantised", "perplexity", "KL (nats)", "same choice", style="dim")
    table.add_row("nothing", f"{comparison.perplexity:.4f}", "", "")
    for part in (comparison.whole, *comparison.parts):
        table.add_row(part.what, f"{part.perplexity:.4f}", f"{part.kl:.6f}", f"{100 * part.agreement:.2f}%")
    print_table(out, table)
