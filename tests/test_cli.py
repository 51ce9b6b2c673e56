"""The frame around the commands: help, versions, and what happens when something goes wrong."""

from __future__ import annotations

import logging
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import mixtral
from mixtral import cli
from mixtral.errors import MixtralError, UsageError

HINT = "`mixtral --verbose COMMAND ...` shows where"
NAMES = [function.__name__ for function in cli.COMMANDS]


@pytest.fixture(autouse=True)
def _process_stays_as_it_is(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Without the settings for a process of its own; logging is as before afterwards."""
    monkeypatch.setattr(cli, "_prepare", lambda: None)
    level = logging.getLogger("mixtral").level
    yield
    logging.getLogger("mixtral").setLevel(level)


@pytest.fixture
def fail_with(monkeypatch: pytest.MonkeyPatch) -> Callable[[BaseException], None]:
    """Add a command `fail` that raises the given error."""

    def register(error: BaseException) -> None:
        def fail() -> None:
            """Fail.

            Examples:
            mixtral fail
            """
            print("before")
            raise error

        monkeypatch.setattr(cli.app, "registered_commands", [*cli.app.registered_commands])
        cli._register(fail)

    return register


def test_help_lists_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(f"\n  {name} " in out for name in NAMES) and "..." not in out.split("Commands:")[1]
    assert cli.main([]) == 0
    assert capsys.readouterr().out == out


@pytest.mark.parametrize("name", NAMES)
def test_help_of_every_command_ends_with_examples(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([name, "--help"]) == 0
    out = capsys.readouterr().out
    before, _, examples = out.partition("Examples:\n")
    lines = examples.strip().splitlines()
    assert lines and all(f"mixtral {name}" in line for line in lines)
    assert max(map(len, before.splitlines())) <= 80 and "--help" in before


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"mixtral {mixtral.__version__}\n"


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys; from mixtral.cli import main; main(['generate', '--help'])\n"
        "heavy = {'torch', 'numpy', 'rich', 'mistral_common', 'tokenizers'} & set(sys.modules)\n"
        "sys.exit(f'{heavy} loaded' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["inof"], "No such command 'inof'. Did you mean 'info'?"),
        (["info", "tiny", "--jsn"], "No such option: --jsn (Possible options: --json)"),
        (["info"], "Missing argument 'NAME_OR_FOLDER'."),
        (["info", "tiny", "--context", "many"], "Invalid value for '--context': "),
    ],
)
def test_misuse_is_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith(f"mixtral: {message}") and err.count("\n") == 1


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (UsageError("a: wrong;\n  b is right"), 2, "mixtral: a: wrong; b is right\n"),
        (MixtralError("disk full"), 1, "mixtral: disk full\n"),
        (OSError(36, "File name too long", "xx"), 1, "mixtral: xx: File name too long\n"),
        (ValueError("odd"), 1, f"mixtral: internal error: ValueError: odd; {HINT}\n"),
        (KeyboardInterrupt(), 130, ""),
        (PermissionError(13, "Permission denied", "a/config.json"), 1, "mixtral: a/config.json: Permission denied\n"),
        (MemoryError(), 1, "mixtral: not enough memory: the system gives no more\n"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 400 bytes.\nmore"), 1,
         "mixtral: not enough memory: DefaultCPUAllocator: can't allocate memory: you tried to allocate 400 bytes.\n"),
        (EOFError(), 1, None),
    ],
)
def test_failures_are_one_line(fail_with: Callable[[BaseException], None], capsys: pytest.CaptureFixture[str],
                               error: BaseException, code: int, line: str | None) -> None:
    fail_with(error)
    assert cli.main(["fail"]) == code
    out, err = capsys.readouterr()
    assert out == "before\n" and "Traceback" not in err
    assert line is None or err == line


def test_verbose_shows_the_traceback(fail_with: Callable[[BaseException], None],
                                     capsys: pytest.CaptureFixture[str]) -> None:
    fail_with(ValueError("odd"))
    assert cli.main(["--verbose", "fail"]) == 1
    assert "Traceback" in (err := capsys.readouterr().err) and err.endswith(f"{HINT}\n")


def test_a_reader_that_leaves_is_no_error() -> None:
    command = [sys.executable, "-c", "import sys; from mixtral.cli import main; sys.exit(main(['--help']))"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait() == 1
    process.stderr.close()


def test_other_libraries_are_quiet_unless_verbose() -> None:
    code = (
        "import logging, sys, types, warnings; from mixtral import cli\n"
        "nothing = lambda *_: None\n"  # the real one loads torch
        "sys.modules['mixtral.runtime'] = types.SimpleNamespace(setup_logging=nothing)\n"
        "def speak():\n"
        "    'Speak.\\n\\nExamples:\\nmixtral speak'\n"
        "    warnings.warn('a warning'); logging.getLogger('library').warning('a log line')\n"
        "cli._register(speak); sys.exit(cli.main(sys.argv[1:]))"
    )

    def said(*arguments: str) -> str:
        command = [sys.executable, "-c", code, *arguments, "speak"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stderr

    assert said() == ""
    verbose = said("--verbose")
    assert "a warning" in verbose and "a log line" in verbose


def test_the_page_of_commands_is_complete_and_names_no_other_options(capsys: pytest.CaptureFixture[str]) -> None:
    page = (Path(__file__).parent.parent / "docs/commands.md").read_text()
    assert re.findall(r"^## mixtral (\w+)$", page, re.MULTILINE) == NAMES
    for name in (None, *NAMES):
        cli.main([name, "--help"] if name else ["--help"])
    known = set(re.findall(r"--[a-z-]+", capsys.readouterr().out))
    assert set(re.findall(r"--[a-z-]+(?=[`\s])", page)) - known == set()


@pytest.mark.parametrize("arguments", [
    ["info", "{}"], ["info", "/{}"], ["runs", "{}"], ["generate", "--model", "{}", "a"], ["chat", "--model", "{}"],
    ["convert", "{}", "b", "--to", "hf"], ["quantize", "{}", "b"], ["train", "{}"], ["train", "--resume", "{}"],
    ["train", "--preset", "{}"], ["{}"], ["info", "--{}"], ["generate", "--model", "a", "--dtype", "{}", "a"],
])  # fmt: skip
@pytest.mark.parametrize("odd", ["x" * 5000, "\x1b[31m\n\u202e" * 9])
def test_odd_names_are_told_in_one_short_line(
    arguments: list[str], odd: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code = cli.main([argument.replace("{}", odd) for argument in arguments])
    err = capsys.readouterr().err
    assert code in (1, 2) and "internal error" not in err
    line = err.splitlines()[-1]
    assert len(line) < 600 and line.isprintable() and line.startswith("mixtral: ")
