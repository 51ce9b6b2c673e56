"""Every fault of every format is named by file and line; skipped faults are counted."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mixtral.data.readers import BadInput, pieces, read_texts
from mixtral.errors import DataError

GOOD = json.dumps({"text": "good"}).encode() + b"\n"


def parquet(path: Path, column: object, name: str = "text", rows: int = 4) -> bytes:
    pq.write_table(pa.table({name: column}), path, row_group_size=rows)
    return path.read_bytes()


@pytest.mark.parametrize(
    ("name", "content", "line", "reason"),
    [
        ("a.txt", b"", "", "empty"),
        ("a.txt", b"one\ntwo \xff\n", "line 2", "not UTF-8 (byte 0xff)"),
        ("a.jsonl", b"", "", "empty"),
        ("a.jsonl", GOOD + b'{"text": "cut', "line 2", "not JSON"),
        ("a.jsonl", GOOD + b"\n[1]\n", "line 3", "a JSON list"),
        ("a.jsonl", GOOD + b'{"body": "x", "id": 1}\n', "line 2", "no field 'text'; this record has: body, id"),
        ("a.jsonl", GOOD + b'{"text": 7}\n', "line 2", "holds int, not a string"),
        ("a.jsonl", GOOD + b'{"text": "\xe9"}\n', "line 2", "not UTF-8 (byte 0xe9)"),
        ("a.jsonl", GOOD + b'{"text": "\\ud800"}\n', "line 2", "surrogate"),
        ("a.parquet", b"", "", "empty"),
        ("a.parquet", b"PAR1 but no more", "", "not a whole Parquet file"),
    ],
)
def test_fault_is_named(tmp_path: Path, name: str, content: bytes, line: str, reason: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        list(read_texts(path, "text", BadInput()))
    message = str(caught.value)
    assert str(path) in message and line in message and reason in message and "\n" not in message
    bad = BadInput(skip=True)
    assert list(read_texts(path, "text", bad)) == (["good"] if content.startswith(GOOD) else [])
    assert bad.count == 1


def test_parquet_reads_and_names_faults(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    whole = parquet(path, ["a", "b", "c"])
    assert list(read_texts(path, "text", BadInput())) == ["a", "b", "c"]
    with pytest.raises(DataError, match="no column 'body'; this file has: text"):
        list(read_texts(path, "body", BadInput()))
    path.write_bytes(whole[:-10])
    with pytest.raises(DataError, match="not a whole Parquet file"):
        list(read_texts(path, "text", BadInput()))
    parquet(path, ["a", None])
    with pytest.raises(DataError, match="row 2: column 'text' holds NoneType"):
        list(read_texts(path, "text", BadInput()))
    parquet(path, [1, 2])
    with pytest.raises(DataError, match="row 1: column 'text' holds int"):
        list(read_texts(path, "text", BadInput()))


def test_parquet_damaged_in_the_middle(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    whole = bytearray(parquet(path, [f"{number} " * 50 for number in range(4000)], rows=1000))
    whole[len(whole) // 3 : 2 * len(whole) // 3] = bytes(len(whole) // 3)
    path.write_bytes(whole)
    with pytest.raises(DataError, match=r"a\.parquet, after row \d+: damaged Parquet data"):
        list(read_texts(path, "text", BadInput()))


def test_unreadable_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gone\.txt: cannot be read"):
        list(read_texts(tmp_path / "gone.txt", "text", BadInput()))


def test_other_field(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"body": "x"}\n\n{"body": "y"}')
    assert list(read_texts(path, "body", BadInput())) == ["x", "y"]


@settings(max_examples=60)
@given(st.text(alphabet="ab\n", max_size=60), st.integers(2, 20))
def test_pieces_lose_nothing(text: str, limit: int) -> None:
    cut = list(pieces(text, limit))
    assert "".join(cut) == text
    assert all(len(piece) <= limit for piece in cut)


def test_pieces_cut_after_lines() -> None:
    assert list(pieces("aaaaaa\n\nb\ncc", 10)) == ["aaaaaa\n\n", "b\ncc"]
    assert list(pieces("aaaaaa\nbb\ncc", 8)) == ["aaaaaa\n", "bb\ncc"]


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.parquet"])
def test_a_pipe_is_refused_at_once(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / name)
    with pytest.raises(DataError, match=rf"{name}: (cannot be read: not a regular file|the file is empty)"):
        list(read_texts(tmp_path / name, "text", BadInput()))


def test_a_line_without_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mixtral.data.readers.LARGE", 1000)
    (tmp_path / "a.jsonl").write_bytes(GOOD + b'{"text": "' + b"x" * 5000 + b'"}\n' + GOOD)
    with pytest.raises(DataError, match=r"a\.jsonl, line 2: longer than the 1,000 bytes that a line may have"):
        list(read_texts(tmp_path / "a.jsonl", "text", BadInput()))
    assert list(read_texts(tmp_path / "a.jsonl", "text", BadInput(skip=True))) == ["good", "good"]


@pytest.mark.parametrize("content", [b'{"text": ' + b"[" * 100_000, b'{"text": "a", "text": "b"}', b"\xef\xbb\xbf{}"])
def test_odd_lines_are_told(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.jsonl").write_bytes(GOOD + content + b"\n" + GOOD)
    with pytest.raises(DataError, match=r"a\.jsonl, line 2: .*every line must be one JSON object in UTF-8"):
        list(read_texts(tmp_path / "a.jsonl", "text", BadInput()))
    assert list(read_texts(tmp_path / "a.jsonl", "text", BadInput(skip=True))) == ["good", "good"]


def test_text_of_a_column_that_is_not_utf_8(tmp_path: Path) -> None:
    column = pa.Array.from_buffers(
        pa.string(), 1, [None, pa.array([0, 2], pa.int32()).buffers()[1], pa.py_buffer(b"\xff\xfe")]
    )
    pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a\.parquet, after row 0: damaged Parquet data"):
        list(read_texts(tmp_path / "a.parquet", "text", BadInput()))
