"""What several commands share: consoles, sizes as people read them, and loading a model."""

from __future__ import annotations

import re
import sys
import unicodedata
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mixtral.errors import UsageError

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.table import Table
    from rich.text import Text

    from mixtral.config import ModelConfig
    from mixtral.engine import SamplingParams
    from mixtral.lm import LM
    from mixtral.moe import Routing
    from mixtral.tokenizer import Tokenizer
    from mixtral.weights.progress import Progress

ModelOption = Annotated[
    str, typer.Option("--model", metavar="DIR", help="Model folder, GGUF file, OWNER/MODEL, or mixtral-nano.")
]
DtypeOption = Annotated[
    str, typer.Option(metavar="NAME", help="bf16, fp32 or fp16; auto: the file's, or fp32 where bf16 is slow.")
]
DeviceOption = Annotated[str, typer.Option(metavar="NAME", help="cpu, cuda, cuda:N; auto: a GPU when there is one.")]
BosOption = Annotated[
    bool | None,
    typer.Option("--bos/--no-bos", help="Begin with <s>, or not; otherwise as the tokenizer's files decide."),
]
AllowNonfinite = Annotated[
    bool, typer.Option("--allow-nonfinite", help="Write weights that are NaN or infinite, or become so when rounded.")
]
ThreadsOption = Annotated[
    str,
    typer.Option(metavar="N", help="auto: OMP_NUM_THREADS, or as many as cores are free; training measures."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON for scripts instead.")]


def console(stderr: bool = False) -> Console:
    """A rich console that leaves text as it is: no markup, no colouring of numbers, no emoji codes."""
    from rich.console import Console

    return Console(stderr=stderr, highlight=False, markup=False, emoji=False)


def print_table(out: Console, table: Table) -> None:
    """Print a table; where a cell would be cut for want of room, each row as a block of lines instead."""
    lines = out.render_lines(table, out.options)
    if not any("…" in segment.text for line in lines for segment in line):  # how rich marks what it cuts
        out.print(table)
        return
    if table.title:
        out.print(table.title, style=table.title_style)
    names = [column.header if table.show_header else "" for column in table.columns]
    for row in zip(*(column.cells for column in table.columns), strict=True):
        out.print(_cell(names[0], row[0]), style="bold", soft_wrap=True)
        for name, cell in zip(names[1:], row[1:], strict=True):
            out.print(" ", _cell(name, cell), soft_wrap=True)


def _cell(name: RenderableType, value: RenderableType) -> Text:
    from rich.text import Text

    return Text(" ").join(part if isinstance(part, Text) else Text(str(part)) for part in (name, value) if part)


def say(text: str) -> None:
    """A remark to the person at the terminal, on standard error, out of the way of the output."""
    print(text, file=sys.stderr, flush=True)


def shown(text: str) -> str:
    """Text as standard output gets it: as it is, but on a terminal with control characters escaped, as in \\x1b.

    Generated and given text could otherwise move the cursor or change the terminal. Newlines and tabs stay.
    """
    if not sys.stdout.isatty():
        return text
    return "".join(c if c in "\n\t" or unicodedata.category(c) != "Cc" else f"\\x{ord(c):02x}" for c in text)


@contextmanager
def working(what: str) -> Iterator[None]:
    """A spinner on standard error while the block runs; nothing where that is not a terminal."""
    if not sys.stderr.isatty():  # and rich, which takes a tenth of a second to import, is not needed
        yield
        return
    with console(stderr=True).status(what):
        yield


@contextmanager
def stages_bar(in_bytes: bool = False) -> Iterator[Progress]:
    """A bar for each stage on standard error, its progress in bytes or in percent; none where that is no terminal."""
    from rich import progress as rich_progress

    err = console(stderr=True)
    amounts: list[rich_progress.ProgressColumn] = (
        [rich_progress.DownloadColumn(binary_units=True), rich_progress.TransferSpeedColumn()]
        if in_bytes
        else [rich_progress.TaskProgressColumn()]
    )
    columns = (
        rich_progress.TextColumn("{task.description}"),
        rich_progress.BarColumn(bar_width=20),
        *amounts,
        rich_progress.TimeRemainingColumn(compact=True),
    )
    with rich_progress.Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as bar:
        tasks: dict[str, rich_progress.TaskID] = {}

        def show(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(what, total=total)
            bar.update(tasks[what], completed=done)

        yield show


def load_model(folder: str, dtype: str, device: str) -> tuple[LM, Tokenizer]:
    """The model of a folder and its tokenizer. Raises UsageError when it came without one, and as mixtral.load does."""
    from mixtral import lm

    with working(f"reading {folder}"):
        model = lm.load(folder, dtype=dtype, device=device)
    if model.tokenizer is None:
        wanted = "a sentencepiece vocabulary" if folder.endswith(".gguf") else "tekken.json, *.model or tokenizer.json"
        python = f"from Python, token ids work too: mixtral.load({folder!r}).generate([1, 2, 3])"
        raise UsageError(f"{folder}: no tokenizer that is read; {wanted} is wanted in it; {python}")
    return model, model.tokenizer


def sampling_params(model: str, otherwise: dict[str, Any] | None = None, **asked: Any) -> SamplingParams:
    """How to generate: what was asked for, then what the model recommends, then the defaults of SamplingParams.

    Raises UsageError, naming the option, for a value that is out of range.

    Args:
        otherwise: what counts before these defaults; all but `max_tokens` only where the model does not recommend to
            sample.
        asked: fields of SamplingParams; None or an empty list for what was not asked for.
    """
    from mixtral.config.formats import read_config
    from mixtral.engine import SamplingParams, recommended, with_recommended, within_vocabulary
    from mixtral.shipped import model_folder

    folder = model_folder(model)
    vocab_size = read_config(folder).vocab_size
    found, otherwise = within_vocabulary(recommended(folder), vocab_size), dict(otherwise or {})
    if "temperature" in found:
        otherwise = {name: value for name, value in otherwise.items() if name == "max_tokens"}
    given = {name: value for name, value in asked.items() if value is not None and value != []}
    try:
        params = SamplingParams(**with_recommended(given, otherwise | found))
        params.check_tokens(vocab_size)
    except UsageError as error:  # of what was given: the rest has been checked
        raise UsageError(re.sub(r"^sampling: (\w+)", _option, str(error))) from None
    return params


def check_k(k: int | None, config: ModelConfig) -> None:
    """Raise UsageError unless a token can take as many experts as --k says."""
    if k is not None and not 1 <= k <= config.fewest_experts:
        raise UsageError(f"--k must lie in 1..{config.fewest_experts} (the model's experts), not {k}")


def _option(field: re.Match[str]) -> str:
    return f"--{field[1].replace('_', '-')}"


def loads(layers: Sequence[Routing]) -> list[list[float]]:
    """Each layer's load: the share of its assignments that each expert got."""
    from mixtral.moe.choice import counts_of
    from mixtral.moe.losses import share_of

    return [share_of(counts_of(layer.experts_TK, layer.logits_TE.shape[1])).tolist() for layer in layers]


def show_loads(layers: Sequence[Sequence[float]], title: str, numbers: Sequence[int] | None = None) -> None:
    """Print a table of loads, a row for each of the layers `numbers` (0, 1, ...), and how to read it."""
    from mixtral.analysis import routing_table

    out = console()
    out.print()
    print_table(out, routing_table(layers, title, out.options.ascii_only, numbers, out.width))
    out.print("\nBars: each expert's share of a layer's tokens, half full at the fair share.", style="dim")
    out.print("max, min: the largest and smallest share, as multiples of the fair share.", style="dim")


def show_routing(lm: LM, tokens: Sequence[int], layers: Sequence[Routing]) -> None:
    """Print the table of a text's loads, and on a terminal the text by first choice at three of the layers: on the
    experts' colours, or where there is no colour with the expert's number before each stretch.

    The token sampled last may have no routing: the model has not processed it.
    """
    from mixtral.analysis import expert_legend, text_by_expert, tokens_by_expert

    assert lm.tokenizer is not None
    out, n = console(), len(layers[0].experts_TK)
    numbers = lm.config.sparse_layers
    show_loads(loads(layers), f"Routing of {n} tokens", numbers)
    if out.color_system is None:
        return
    decoder = lm.tokenizer.stream()
    pieces = [shown(decoder.add(token)) for token in tokens[:n]]
    few_colours = out.no_color or out.color_system == "standard"  # sixteen colours make one of several experts'
    show = text_by_expert if few_colours else tokens_by_expert
    legend = "[number of the expert]" if few_colours else expert_legend(lm.config.n_experts)
    out.print("\nThe text by each token's first choice:", legend)
    for i in sorted({0, len(layers) // 2, len(layers) - 1}):
        out.print(f"\nlayer {numbers[i]}", style="bold")
        out.print(show(pieces, layers[i].experts_TK[:, 0].tolist()))


def bytes_text(n_bytes: float) -> str:
    """Such as 86.99 GiB or 128 KiB."""
    units = ["B", "KiB", "MiB", "GiB", "TiB"]
    while n_bytes >= 1024 and len(units) > 1:
        n_bytes /= 1024
        del units[0]
    return f"{n_bytes:.0f} {units[0]}" if units[0] in ("B", "KiB") else f"{n_bytes:.2f} {units[0]}"


def rate_text(per_second: float, unit: str) -> str:
    """Such as 45.2 GB/s or 1.05 TFLOP/s: powers of a thousand, as rates are given."""
    prefixes = ["", "k", "M", "G", "T", "P"]
    while per_second >= 999.5 and len(prefixes) > 1:  # what would be rounded to 1000
        per_second /= 1000
        del prefixes[0]
    return f"{per_second:.3g} {prefixes[0]}{unit}"
