"""The one reader of JSON: what it takes, and what it refuses in one short line that names file and key."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from mixtral.errors import ConfigError, DataError
from mixtral.json_files import SMALL, parse, parse_object, read_object

BROKEN = {
    "empty": (b"", "not JSON"),
    "cut": (b'{"a": [1, 2', "not JSON"),
    "two": (b"{} {}", "not JSON: Extra data"),
    "list": (b"[1]", "must hold a JSON object, not a list"),
    "number": (b"1e5", "not a number"),
    "text": (b'"a"', "not a text"),
    "null": (b"null", "not a null"),
    "deep list": (b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested more than 64 deep"),
    "deep object": (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "nested more than 64 deep"),
    "somewhat deep": (b'{"a": ' + b"[" * 100 + b"1" + b"]" * 100 + b"}", "nested more than 64 deep"),
    "mark": (b'\xef\xbb\xbf{"a": 1}', "byte order mark"),
    "utf-16": ('{"a": 1}'.encode("utf-16"), "not UTF-8 (byte 0xff) at 0"),
    "latin-1": ('{"a": "\xe9"}'.encode("latin-1"), "not UTF-8 (byte 0xe9) at 7"),
    "twice": (b'{"b": {"a": 1, "a": 2}}', "key 'a' stands twice"),
    "long key twice": (b'{"%s": 1, "%s": 2}' % (b"a" * 5000, b"a" * 5000), "stands twice"),
    "nan": (b'{"b": {"a": [1, NaN]}}', "b.a[1] is nan: no finite number"),
    "infinity": (b'{"a": -Infinity}', "a is -inf: no finite number"),
    "large float": (b'{"a": 1e400}', "a is inf: no finite number"),
    "large integer": (b'{"a": 1' + b"0" * 400 + b"}", "a is inf: no finite number"),
    "larger integer": (b'{"a": -1' + b"0" * 5000 + b"}", "a is -inf: no finite number"),
    "just too large": (b'{"a": 2' + b"0" * 308 + b"}", "no finite number"),
    "surrogate": (rb'{"a": ["\ud800"]}', "a[0] holds half of a surrogate pair"),
    "surrogate key": (rb'{"\uDFFF": 1}', "holds half of a surrogate pair"),
    "many lists": (b'{"a": [' + b"[]," * 2_000_001 + b"[]]}", "more than 2,000,000 lists and objects"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_refused(tmp_path: Path, name: str) -> None:
    data, reason = BROKEN[name]
    file = tmp_path / "a.json"
    file.write_bytes(data)
    with pytest.raises(DataError) as caught:
        read_object(file, DataError, 1 << 24)
    message = str(caught.value)
    assert message.startswith(f"{file}: ") and reason in message
    assert len(message) < 400 and message.isprintable()


def test_what_is_taken() -> None:
    document = {"a": [1, -2.5, True, None, "\U0001f600", 10**30], "b": {"c": {}, "d": []}, "": "x"}
    assert parse_object(json.dumps(document).encode(), "a.json") == document
    deepest = b'{"a": ' + b"[" * 63 + b"1" + b"]" * 63 + b"}"
    assert parse_object(deepest, "a.json")


def test_one_value_with_what_python_calls_numbers() -> None:
    assert parse(b'[NaN, Infinity, "\\ud800"]')[1:] == [float("inf"), "\ud800"]


def test_only_regular_files_of_bounded_size(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "large").write_bytes(b" " * (SMALL + 1))
    with (tmp_path / "huge").open("wb") as file:
        file.truncate(1 << 40)  # a hole: it takes no room on disk
    start = time.perf_counter()
    for path, reason in {
        tmp_path / "pipe": "not a regular file",
        tmp_path / "folder": "not a regular file",
        Path("/dev/zero"): "not a regular file",
        tmp_path / "large": "larger than the 4,194,304 bytes",
        tmp_path / "huge": "larger than the 4,194,304 bytes",
        tmp_path / "none": "No such file",
        tmp_path / ("x" * 5000): "too long",
        Path("a\0b"): "null byte",
        Path("/proc/self/mem"): "cannot be read: Input/output error",
    }.items():
        with pytest.raises(ConfigError, match=reason) as caught:
            read_object(path)
        assert len(str(caught.value)) < 400
    assert time.perf_counter() - start < 2
