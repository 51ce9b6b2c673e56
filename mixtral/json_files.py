"""Reading JSON that a stranger may have written: a regular file of bounded size, UTF-8, an object, nothing twice.

What a document may hold is stated here once: so many bytes, so many lists and objects, so deep, numbers that are
finite, text that UTF-8 can hold. Whoever reads a value checks its type (specs.check_value) and its range.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mixtral.errors import ConfigError, MixtralError, shown
from mixtral.files import once, open_regular

SMALL = 4 << 20  # bytes: configurations
LARGE = 64 << 20  # bytes: vocabularies, and lists of tensors or shards
_MOST_CONTAINERS = 2_000_000  # lists and objects; each takes some 20 times the memory of its text
_MOST_DEPTH = 64
_SURROGATE = re.compile("[\ud800-\udfff]")
_MOST_NUMBER = 1.7e308  # a whole number beyond it has no float

_Path = tuple[Any, ...]  # (path of the parent, key or index); () is the document itself


def read_object(path: str | Path, error: type[MixtralError] = ConfigError, most_bytes: int = SMALL) -> dict[str, Any]:
    """The JSON object in a file. Raises `error`, one line with the file and where in it, for anything else."""
    return parse_object(read_regular(path, error, most_bytes), str(path), error)


def parse_object(data: bytes, where: str, error: type[MixtralError] = ConfigError) -> dict[str, Any]:
    """The JSON object in `data`. Raises `error`, which begins with `where`, for anything else."""
    try:
        document = parse(data)
        if not isinstance(document, dict):
            raise ValueError(f"must hold a JSON object, not a {_kind(document)}")
        _check(document, surrogates=b"\\u" in data)
    except ValueError as reason:
        raise error(f"{where}: {reason}") from None
    return document


def parse(data: bytes) -> Any:
    """Any one JSON value, with NaN and Infinity as Python has them; ValueError, one line, for anything else."""
    if data.startswith(b"\xef\xbb\xbf"):
        raise ValueError("not JSON: it begins with a byte order mark; save it as UTF-8 without one")
    if data.count(b"[") + data.count(b"{") > _MOST_CONTAINERS:
        raise ValueError(f"holds more than {_MOST_CONTAINERS:,} lists and objects")
    try:
        return _DECODER.decode(data.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 (byte 0x{data[error.start]:02x}) at {error.start:,}") from None
    except RecursionError:
        raise ValueError(f"nested more than {_MOST_DEPTH} deep") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error}") from None


def read_regular(path: str | Path, error: type[MixtralError], most_bytes: int) -> bytes:
    """The content of a regular file (no folder, pipe or device) of at most `most_bytes`; else raises `error`."""
    return once(("bytes", str(path), most_bytes), lambda: _read_regular(path, error, most_bytes))


def _read_regular(path: str | Path, error: type[MixtralError], most_bytes: int) -> bytes:
    try:
        with open_regular(path) as file:
            data = file.read(most_bytes + 1)  # its size may change meanwhile, or say nothing, as in /proc
    except OSError as reason:
        raise error(f"{path}: cannot be read: {reason.strerror}") from None
    if len(data) > most_bytes:
        raise error(f"{path}: larger than the {most_bytes:,} bytes that such a file may have")
    return data


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"key {shown(twice)} stands twice")
    return found


def _integer(text: str) -> int | float:
    return int(text) if len(text) <= 309 else float(text)  # inf: Python converts no more than 4,300 digits


_DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_int=_integer)


def _check(document: dict[str, Any], surrogates: bool) -> None:
    """Refuse what is nested too deep, numbers that are not finite, and (`surrogates`: look) text that is no Unicode."""
    level: list[tuple[_Path, Any]] = [((), document)]
    for _ in range(_MOST_DEPTH):
        deeper: list[tuple[_Path, Any]] = []
        for path, container in level:
            for key, value in _entries(container):
                kind = type(value)
                if kind is dict or kind is list:
                    if value:
                        deeper.append(((path, key), value))
                elif (kind is float or kind is int) and not -_MOST_NUMBER < value < _MOST_NUMBER:
                    raise ValueError(f"{_name((path, key))} is {shown(value)}: no finite number")
                if surrogates and (is_broken(key) or is_broken(value)):
                    raise ValueError(f"{_name((path, key))} holds half of a surrogate pair, which is no character")
        level = deeper
    if level:
        raise ValueError(f"nested more than {_MOST_DEPTH} deep")


def _entries(container: Any) -> Iterator[tuple[Any, Any]]:
    return iter(container.items()) if type(container) is dict else enumerate(container)


def is_broken(text: Any) -> bool:
    """Whether a value is a text that UTF-8 cannot hold, and that no file of ours may: half of a surrogate pair."""
    return type(text) is str and _SURROGATE.search(text) is not None


def _name(path: _Path) -> str:
    """`rope_parameters.rope_theta`, `eos_token_id[1]`."""
    keys: list[str] = []
    while path:
        path, key = path
        keys.append(f"[{key}]" if isinstance(key, int) else f".{shown(key)[1:-1]}")
    return "".join(reversed(keys)).removeprefix(".")


def _kind(value: Any) -> str:
    names = {list: "list", str: "text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "number")
