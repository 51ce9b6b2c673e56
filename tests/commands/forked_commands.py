"""Runs many commands, each in a forked process with standard streams of its own: a start of Python takes seconds.

Standard input is JSON, a list of [arguments, {"0" | "1" | "2": what that stream is}]; standard output gets, as JSON, a
list of [exit code, standard output, standard error] ("" for a stream that is not a file).
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import sys
import tempfile
from pathlib import Path

from mixtral import cli, hardware, lm, weights  # imported once
from mixtral.commands import demo
from mixtral.quant import quantize, synth
from mixtral.train import compare, display, pretrain

ONCE = (lm, weights, quantize, synth, compare, pretrain, display)


def connect(number: int, kind: str, file: Path) -> None:
    """Make a standard stream `full`, `broken` (a pipe without a reader), `unreadable` (open for writing) or `file`."""
    if kind == "broken":
        reader, found = os.pipe()
        os.close(reader)
    else:
        flags = os.O_RDONLY if number == 0 and kind != "unreadable" else os.O_WRONLY
        found = os.open("/dev/full" if kind == "full" else file, flags)
    os.dup2(found, number)
    os.close(found)


def python_streams(kinds: dict[str, str]) -> None:
    """What Python makes of them when it starts."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        stream = None
        if kinds.get(str(number)) != "closed":
            raw = os.fdopen(number, "rb" if number == 0 else "wb", closefd=False)
            errors = "backslashreplace" if number == 2 else "strict"
            stream = io.TextIOWrapper(raw, encoding="utf-8", errors=errors, line_buffering=number == 2)
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)


def child(arguments: list[str], kinds: dict[str, str], files: list[Path]) -> int:
    for number, file in enumerate(files):
        connect(number, kinds.get(str(number), "file"), file)
    for number in kinds:
        if kinds[number] == "closed":
            os.close(int(number))
    python_streams(kinds)
    try:
        code = cli.main(arguments)
    except SystemExit as error:
        code = int(error.code or 0)
    try:  # as Python does at its end
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
    except OSError:
        return 120
    return code


def outcome(arguments: list[str], kinds: dict[str, str], text: str) -> tuple[int, str, str]:
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / name for name in ("in", "out", "err")]
        for file in files:
            file.write_text("")
        files[0].write_text(text)
        if (pid := os.fork()) == 0:
            code = 121
            try:
                code = child(arguments, kinds, files)
            finally:
                os._exit(code)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        return code, files[1].read_text(), files[2].read_text()


def main() -> None:
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)  # as Python has it
    demo.SAMPLING["max_tokens"] = 2
    hardware.MEASURE_SECONDS = 0.01
    with contextlib.redirect_stdout(io.StringIO()):
        cli.main(["info", "tiny"])  # loads what every command loads when it first reads its options
    print(json.dumps([outcome(*case) for case in json.load(sys.stdin)]))


if __name__ == "__main__":
    main()
