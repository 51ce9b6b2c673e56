"""Every option of every command with an absurd number and with a wrong type: one line and the right exit code."""

from __future__ import annotations

import io
import shutil
import typing
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.models import OptionInfo

from mixtral import cli
from tests.commands.conftest import Outcome, Run
from tests.commands.examples import BASE

Attempt = Callable[..., Outcome]
HUGE = str(10**30)
ABSURD = [HUGE, "0", "nan", "-1", "9" * 5000]


def valued() -> list[tuple[str, str, bool]]:
    """(command, option, whether it takes a number) of every option that takes a value, by the functions' signatures."""
    found = []
    for function in cli.COMMANDS:
        for name, kind in typing.get_type_hints(function, include_extras=True).items():
            info = next((x for x in getattr(kind, "__metadata__", ()) if isinstance(x, OptionInfo)), None)
            types = {kind.__origin__, *typing.get_args(kind.__origin__)} if info else set()
            if info and bool not in types:
                words = (info.default, *(info.param_decls or ()))  # in Annotated the first word is taken for a default
                declared = [word for word in words if isinstance(word, str) and word.startswith("--")]
                option = declared[0] if declared else "--" + name.replace("_", "-")
                found.append((function.__name__, option, bool({int, float} & types)))
    return found


TEXTS = [(command, option) for command, option, number in valued() if not number]
NUMBERS = [(command, option) for command, option, number in valued() if number]


@pytest.fixture
def attempt(run: Run, folder: Path, a_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Attempt:
    """A command with its base arguments and more; what is told must be one line, whatever comes out."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.stdin", io.StringIO("To be\n"))
    monkeypatch.setattr("mixtral.commands.demo._shipped", lambda *_: None)  # some seconds, after all options are read
    monkeypatch.setattr("mixtral.commands.doctor.examine", lambda: {})
    monkeypatch.setattr("mixtral.commands.doctor._print", lambda *_: None)

    def call(name: str, *more: str) -> Outcome:
        places = {"model": folder, "run": a_run, "new": tmp_path / "new"}
        got = run(name, *(word.format(**places) for word in BASE[name]), *more)
        assert "internal error" not in got.err and "Traceback" not in got.err, got.err
        if got.code:
            told = [line for line in got.err.splitlines() if line.startswith("mixtral: ")]
            assert got.code in (1, 2) and got.out == "" and len(told) == 1 and not (tmp_path / "new").exists(), got
        shutil.rmtree(tmp_path / "new", ignore_errors=True)
        return got

    return call


def test_every_command_has_its_arguments_here() -> None:
    assert BASE.keys() == {function.__name__ for function in cli.COMMANDS}


def test_every_command_has_options_here() -> None:
    assert {("chat", "--dtype"), ("train", "--set"), ("runs", "--plot"), ("chat", "--stop")} < set(TEXTS)
    assert {("generate", "--n"), ("generate", "--top-p"), ("info", "--k"), ("train", "--max-steps")} < set(NUMBERS)


@pytest.mark.parametrize(("name", "option"), NUMBERS)
def test_numbers(attempt: Attempt, name: str, option: str) -> None:
    for value in ABSURD:
        attempt(name, f"{option}={value}")
    assert attempt(name, f"{option}=many").code == 2


@pytest.mark.parametrize(("name", "option"), TEXTS)
def test_texts(attempt: Attempt, name: str, option: str) -> None:
    for value in (HUGE, "", "\udce9", "x" * 300):
        attempt(name, f"{option}={value}")
