"""Standard streams that are closed, full, without a reader or in another encoding, for every command."""

from __future__ import annotations

import codecs
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.commands.conftest import Outcome, Run
from tests.commands.examples import BASE

FULL = "mixtral: cannot write standard output: No space left on device\n"
CLOSED = "mixtral: standard output is closed; send it to a file, or to /dev/null\n"
UNREADABLE = "mixtral: cannot read standard input: Bad file descriptor\n"
NO_INPUT = "mixtral: standard input is closed; the text is wanted there\n"
READ_INPUT = {"chat", "prompt", "score"}


class Kind(NamedTuple):
    stream: str  # its number
    is_what: str


KINDS = [
    Kind("0", "closed"), Kind("0", "unreadable"), Kind("1", "closed"), Kind("1", "full"), Kind("1", "broken"),
    Kind("2", "full"),
]  # fmt: skip


@pytest.fixture(scope="module")
def outcomes(folder: Path, a_run: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, Kind], Outcome]:
    """Every command with every kind of stream, all in one process that forks."""
    top = tmp_path_factory.mktemp("streams")
    commands = {name: [name, *words] for name, words in BASE.items() if name != "pull"}  # which asks a hub
    commands["prompt"] = ["generate", "--model", "{model}", "--max-tokens", "2", "--prompt", "-"]
    names = [(name, kind) for name in commands for kind in KINDS]
    cases = []
    for number, (name, kind) in enumerate(names):
        places = {"model": folder, "run": a_run, "new": top / f"new{number}"}
        words = [word.format(**places) for word in commands[name]]
        cases.append([words, {kind.stream: kind.is_what}, "To be\n"])
    done = subprocess.run([sys.executable, "-m", "tests.commands.forked_commands"], input=json.dumps(cases),
                          capture_output=True, text=True, check=True)  # fmt: skip
    found = [Outcome(*outcome) for outcome in json.loads(done.stdout)]
    return dict(zip(names, found, strict=True))


@pytest.mark.parametrize("name", [*(name for name in BASE if name != "pull"), "prompt"])
def test_every_command(outcomes: dict[tuple[str, Kind], Outcome], name: str) -> None:
    for kind in KINDS:
        code, out, err = outcomes[name, kind]
        told = [line for line in err.splitlines(keepends=True) if line.startswith("mixtral: ")]
        assert "Traceback" not in err and "internal error" not in err and "Exception ignored" not in err, err
        if kind.stream == "2" or (kind.stream == "0" and name not in READ_INPUT):
            assert (code, told) == (0, []) and out, (kind, code, err)
        else:
            closed = CLOSED if kind.stream == "1" else NO_INPUT
            line = {"closed": closed, "full": FULL, "unreadable": UNREADABLE}.get(kind.is_what)
            assert (code, told) == (2 if kind.stream == "0" else 1, [line] if line else []), (kind, code, err)


@pytest.mark.parametrize(
    ("redirection", "code", "err"), [(">&-", 1, CLOSED), ("> /dev/full", 1, FULL), ("2>&-", 0, ""), ("<&-", 0, "")]
)
def test_from_a_shell(redirection: str, code: int, err: str) -> None:
    """The same with streams that Python itself has found so."""
    done = subprocess.run(["bash", "-c", f"'{sys.executable}' -m mixtral --help {redirection}"], capture_output=True,
                          text=True, check=False)  # fmt: skip
    assert (done.returncode, done.stderr) == (code, err)


def test_a_file_never_gets_the_descriptor_of_a_closed_stream() -> None:
    """What a library prints to standard error would land in it."""
    code = "import os; from mixtral.commands.streams import prepare_streams; prepare_streams(); "
    code += "print(os.open(os.devnull, 0) > 2)"
    done = subprocess.run(["bash", "-c", f"'{sys.executable}' -c '{code}' <&- 2>&-"], capture_output=True, text=True,
                          check=False)  # fmt: skip
    assert done.stdout == "True\n"


def test_what_a_console_cannot_show_can_still_be_told_apart() -> None:
    """A file's name that is no UTF-8, and a character that the encoding lacks."""
    code = "from mixtral.commands.streams import prepare_streams; prepare_streams(); print('a\\udcff', '\\xe9')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False,
                          env={**os.environ, "PYTHONIOENCODING": "ascii"})  # fmt: skip
    assert done.stdout == "a\\udcff \\xe9\n"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("To bé".encode("latin-1"), "standard input: not UTF-8 text{place}; convert it to UTF-8"),
        ("To be".encode("utf-16"), "standard input: UTF-16 text, as its byte-order mark says; convert it to UTF-8"),
        (codecs.BOM_UTF32_BE + "To".encode("utf-32-be"), "UTF-32 text, as its byte-order mark says"),
    ],
)
@pytest.mark.parametrize("command", [["generate", "--prompt", "-"], ["chat"]])
def test_input_that_is_not_utf_8(run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch, command: list[str],
                                 data: bytes, message: str) -> None:
    """Whatever the locale takes it for."""
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(data), encoding="latin-1", errors="surrogateescape"))
    got = run(*command, "--model", folder, "--max-tokens", "2")
    place = " (byte 0xe9)" if command == ["chat"] else " at byte 4"
    assert got.code == 2 and got.out == "" and message.format(place=place) in got.err


def test_a_byte_order_mark_is_no_part_of_the_prompt(run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def prompt(data: bytes) -> str:
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(data), encoding="latin-1"))
        got = run("generate", "--model", folder, "--prompt", "-", "--max-tokens", "1", "--json")
        return str(json.loads(got.out)["prompt"])

    assert prompt(codecs.BOM_UTF8 + "né\n".encode()) == "né" == prompt("né\r\n".encode())
