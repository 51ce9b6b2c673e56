"""Files of prompts or texts, one a line: text as it is, or JSON objects."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from mixtral.commands.common import say
from mixtral.commands.streams import text_input
from mixtral.errors import MixtralError, UsageError
from mixtral.files import open_regular
from mixtral.json_files import parse

T = TypeVar("T")


def parsed_lines(source: str, key: str, read: Callable[[dict[str, Any]], T], skip_bad: bool) -> list[T]:
    """What `read` makes of each line that is not blank: of {key: line}, or of the object that it holds.

    Lines are JSON in a file that ends in .jsonl, or whose first character is "{"; "-" is standard input.

    Raises UsageError, with the file and the line, where `read` raises MixtralError, or says so and goes on.
    """
    lines = _lines(source)
    as_json = source.endswith(".jsonl") or next((line for line in lines if line), "").startswith("{")
    name = "standard input" if source == "-" else source
    found = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            found.append(read(_object(line, key) if as_json else {key: line}))
        except (MixtralError, ValueError) as error:
            what = f"{name}, line {number}: {error}"
            if not skip_bad:
                raise UsageError(f"{what}; --skip-bad leaves it out") from None
            say(f"left out: {what}")
    return found


def _lines(source: str) -> list[str]:
    if source == "-":
        with text_input(whole=True) as file:
            return file.read().splitlines()
    try:
        with open_regular(source) as file:
            return file.read().decode().removeprefix("\ufeff").splitlines()
    except OSError as error:
        raise UsageError(f"{source}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UsageError(f"{source}: not UTF-8 text at byte {error.start}") from None


def _object(line: str, key: str) -> dict[str, Any]:
    values = parse(line.encode())
    if not isinstance(values, dict):
        raise ValueError(f'a JSON object is wanted, such as {{"{key}": "..."}}')
    return values
