"""`mixtral demo`: what the system does, shown by the model that comes with it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mixtral.commands.common import JsonOption, ThreadsOption, console, loads, print_table, shown, working
from mixtral.commands.demo_train import train_demo
from mixtral.shipped import FOLDER, SHIPPED

if TYPE_CHECKING:
    from rich.table import Table

    from mixtral.lm import LM

PROMPT = 'def fibonacci(n):\n    """Return the n-th number."""\n'
SAMPLING: dict[str, Any] = {"max_tokens": 120, "temperature": 0.7, "top_p": 0.95, "seed": 6}
DEFAULT_OUT = Path("runs/demo")
ARITHMETIC = """\
State the final answer to the following arithmetic problem: 57 + 22 =
79

State the final answer to the following arithmetic problem: 14 - 3 + 20 =
31
"""
PROSE = """\
A mapping object maps hashable values to arbitrary objects. Mappings are mutable objects. There is currently only one
standard mapping type, the dictionary. Objects that compare equal refer to the same entry, and the order is kept.
"""


def demo(
    train: Annotated[bool, typer.Option("--train", help="Train a small model here first: some minutes.")] = False,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="With --train: the run's folder (runs/demo).")] = None,
    max_steps: Annotated[
        int | None, typer.Option(metavar="N", help="With --train: fewer or more steps than the recipe's.")
    ] = None,
    threads: ThreadsOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Let the model that comes with the package write Python, and show which experts take what.

    Needs no download and takes seconds. With --train, a smaller model is trained on the standard library of your Python
    first, and shows the same; an interrupted training goes on where it stopped, a finished one only shows its model.

    Examples:
    mixtral demo
    mixtral demo --train
    mixtral demo --train --out runs/quick --max-steps 100
    """
    from mixtral.errors import UsageError
    from mixtral.runtime import set_threads

    set_threads(threads)
    if train:
        train_demo(out or DEFAULT_OUT, max_steps, threads, as_json)
    elif out is not None or max_steps is not None:
        raise UsageError("--out and --max-steps are for a training of your own; add --train")
    else:
        _shipped(as_json)


def _shipped(as_json: bool) -> None:
    from mixtral.lm import load

    with working(f"reading {SHIPPED}"):
        lm = load(SHIPPED)
    figures = _figures(lm)
    if as_json:
        print(json.dumps(figures))
    else:
        _show(lm, figures)


def _figures(lm: LM) -> dict[str, Any]:
    """What the model writes, and the loads of three kinds of text by layer and expert."""
    assert lm.tokenizer is not None
    text = lm.generate(PROMPT, **SAMPLING)
    kinds = {"code": PROMPT + text, "prose": PROSE, "arithmetic": ARITHMETIC}
    return {
        "model": str(FOLDER),
        "parameters": lm.config.n_params(),
        "active_parameters": lm.config.n_active_params(),
        "prompt": PROMPT,
        "text": text,
        "loads": {kind: loads(lm.routing(lm.tokenizer.encode(text))) for kind, text in kinds.items()},
    }


def _show(lm: LM, figures: dict[str, Any]) -> None:
    out, shape = console(), lm.config
    out.print(
        f"{SHIPPED}, the model that comes with the package: {shape.n_params() / 1e6:.1f} M parameters, "
        f"{shape.n_active_params() / 1e6:.1f} M active;\n{shape.n_layers} layers of {shape.n_experts} experts, "
        f"{shape.experts_per_token} a token. Its card:\n{FOLDER / 'README.md'}\n",
        soft_wrap=True,
    )
    out.print(PROMPT, style="dim", end="")
    out.print(shown(figures["text"]), soft_wrap=True)
    out.print()
    print_table(out, _by_kind(figures["loads"], out.options.ascii_only))
    out.print("\nA character an expert: half height is a fair share, full height twice that.", style="dim")
    out.print(
        "\nNext:\n"
        "  mixtral generate --prompt 'def read(self, size):' --routing\n"
        "  mixtral chat\n"
        f"  mixtral info {SHIPPED}\n"
        f"  mixtral convert {SHIPPED} runs/mistral --to mistral\n"
        "  mixtral demo --train",
        soft_wrap=True,
    )


def _by_kind(layers_of: dict[str, list[list[float]]], ascii_only: bool) -> Table:
    """A row a kind of text, a column a layer: which experts took it (arXiv 2401.04088, figure 7, in characters)."""
    from rich.table import Table

    from mixtral.analysis import load_strip

    table = Table(
        title="Which experts took what", title_justify="left", title_style="bold", box=None, padding=(0, 1, 0, 0)
    )
    table.add_column("")
    for number in range(len(next(iter(layers_of.values())))):
        table.add_column(f"layer {number}", no_wrap=True)
    for kind, layers in layers_of.items():
        table.add_row(kind, *(load_strip(load, ascii_only) for load in layers))
    return table
