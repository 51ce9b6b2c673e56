"""The command line: which function serves which subcommand, and error reporting. No logic of its own."""

from __future__ import annotations

import functools
import importlib
import inspect
import logging
import os
import sys
import textwrap
import traceback
import warnings
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import typer
from typer.exceptions import TyperException

import mixtral
from mixtral.commands.chat import chat
from mixtral.commands.convert import convert
from mixtral.commands.demo import demo
from mixtral.commands.doctor import doctor
from mixtral.commands.generate import generate
from mixtral.commands.info import info
from mixtral.commands.pull import pull
from mixtral.commands.quantize import quantize
from mixtral.commands.runs import runs
from mixtral.commands.score import score
from mixtral.commands.streams import discard_output, prepare_streams
from mixtral.commands.synth import synth
from mixtral.commands.train import train
from mixtral.errors import MixtralError, UsageError, one_line
from mixtral.logs import setup_logging

COMMANDS: tuple[Callable[..., None], ...] = (
    demo,
    doctor,
    info,
    train,
    runs,
    generate,
    score,
    chat,
    pull,
    convert,
    quantize,
    synth,
)

_log = logging.getLogger("mixtral")  # its level says whether --verbose was given

app = typer.Typer(
    name="mixtral",
    help="Sparse mixture-of-experts language models: train, run and study them.",
    epilog="Each command has its own help with examples: mixtral COMMAND --help.",
    rich_markup_mode=None,
    add_completion=False,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"mixtral {mixtral.__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _global_options(
    context: typer.Context,
    verbose: Annotated[
        bool, typer.Option("--verbose", help="Show logs, warnings of libraries, and the traceback of internal errors.")
    ] = False,
    extensions: Annotated[
        list[str] | None,
        typer.Option("--import", metavar="MODULE", help="Import a module that adds routers, recipes, ...; repeatable."),
    ] = None,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """What comes before the command; without a command, the help."""
    del version  # its callback has answered
    _log.setLevel(logging.DEBUG if verbose else logging.WARNING)
    for module in extensions or ():
        _import(module)
    if context.invoked_subcommand is None:
        print(context.get_help())


def _import(module: str) -> None:
    """Import an extension (mixtral/extend.py). Raises UsageError where that fails."""
    try:
        importlib.import_module(module)
    except Exception as error:
        raise UsageError(f"--import {module}: {type(error).__name__}: {error}") from error


def _is_verbose() -> bool:
    return _log.level == logging.DEBUG


def _prepare() -> None:
    """Settings of the process that every command wants."""
    verbose = _is_verbose()
    setup_logging(verbose)
    if not verbose:
        logging.getLogger().addHandler(logging.NullHandler())  # else Python prints other libraries' warnings itself
        warnings.simplefilter("ignore")


def _register(function: Callable[..., None]) -> None:
    """Make a function a command of its name. What its docstring says after "Examples:" ends the help, line by line."""

    @functools.wraps(function)
    def run(*args: Any, **options: Any) -> None:
        _prepare()
        function(*args, **options)

    text, _, examples = inspect.cleandoc(function.__doc__ or "").partition("Examples:\n")
    epilog = "\b\nExamples:\n" + textwrap.indent(examples, "  ")  # \b: keep the lines as they are
    first_paragraph = " ".join(text.split("\n\n")[0].split())
    app.command(function.__name__, help=text, short_help=first_paragraph, epilog=epilog)(run)


for _command in COMMANDS:
    _register(_command)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line (by default the process's own) and return the exit code: 0, 1 failure, 2 misuse, 130 Ctrl-C.

    Whatever goes wrong is reported in one line on standard error.
    """
    _log.setLevel(logging.WARNING)
    try:
        prepare_streams()
        code = typer.main.get_command(app).main(arguments, prog_name="mixtral", standalone_mode=False)
        sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except MixtralError as error:
        return _fail(str(error), error.exit_code)
    except TyperException as error:  # an unknown command or option, a value of the wrong type
        return _fail(error.format_message(), 2)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader has left, as `head` does: nobody reads on
        discard_output()
        return 1
    except Exception as error:
        if _is_verbose():
            traceback.print_exc()
        return _fail(_reason(error), 1)


def _reason(error: Exception) -> str:
    """The message for an error that has none of ours."""
    if isinstance(error, MemoryError) or "allocate memory" in str(error) or "out of memory" in str(error):
        return f"not enough memory: {str(error).splitlines()[0] if str(error) else 'the system gives no more'}"
    if isinstance(error, OSError) and error.filename is not None:
        return f"{os.fsdecode(error.filename)}: {error.strerror}"
    kind = type(error).__name__
    return f"internal error: {kind}: {error}; `mixtral --verbose COMMAND ...` shows where"


def _fail(message: str, exit_code: int) -> int:
    try:
        sys.stdout.flush()  # what was printed before comes first
    except (BrokenPipeError, MixtralError):
        discard_output()
    print("mixtral: " + one_line(" ".join(message.split())), file=sys.stderr)
    return exit_code
