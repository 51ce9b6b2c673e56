"""Reading texts out of one file: plain text, JSON lines or Parquet, with every fault named by file and line."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mixtral.errors import DataError, UsageError, shown
from mixtral.files import open_regular
from mixtral.json_files import LARGE, parse

log = logging.getLogger(__name__)

JSON_SUFFIXES = frozenset({".jsonl", ".ndjson"})
TEXT_SUFFIXES = frozenset({
    ".txt", ".text", ".md", ".rst", ".tex", ".py", ".pyi", ".c", ".h", ".cc", ".cpp", ".hpp", ".rs", ".go",
    ".js", ".ts", ".java", ".sh", ".sql", ".html",
})
SUFFIXES = TEXT_SUFFIXES | JSON_SUFFIXES | {".parquet"}  # what a folder is searched for

# A plain file is not always one document: a whole book or a whole corpus comes as one file. Cut into pieces of at most
# this many characters, it can be shuffled, and a part of it can be held out.
PIECE_CHARS = 65_536

_NAMED = 10  # fields of a record, or columns, that an error names
SHOWN = 5  # skipped inputs that are logged one by one; the rest are only counted


class BadInput:
    """What happens at a fault: raise DataError, or (`skip`) count it and go on."""

    def __init__(self, skip: bool = False) -> None:
        self.skip = skip
        self.count = 0

    def __call__(self, where: str, reason: str) -> None:
        if not self.skip:
            raise DataError(f"{where}: {reason}")
        self.count += 1
        if self.count <= SHOWN:
            log.warning("skipped %s: %s", where, reason)


def read_texts(path: Path, field: str, bad: BadInput) -> Iterator[str]:
    """The texts of one file, in order; `field` is the key (JSON lines) or the column (Parquet) that holds them."""
    try:
        if path.stat().st_size == 0:
            bad(str(path), "the file is empty")
        elif path.suffix in JSON_SUFFIXES:
            yield from _read_json_lines(path, field, bad)
        elif path.suffix == ".parquet":
            yield from _read_parquet(path, field, bad)
        else:
            yield from _read_plain(path, bad)
    except OSError as error:
        bad(str(path), f"cannot be read: {error.strerror or error}")


def _read_plain(path: Path, bad: BadInput) -> Iterator[str]:
    with open_regular(path) as file:
        data = file.read()
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        bad(f"{path}, line {line}", f"not UTF-8 (byte 0x{data[error.start]:02x}); convert the file to UTF-8")
        return
    yield from pieces(text)


def pieces(text: str, limit: int = PIECE_CHARS) -> Iterator[str]:
    """Cut a long text after a blank line, else after a line, else at `limit` characters; nothing is lost."""
    start = 0
    while len(text) - start > limit:
        stop = start + limit
        for mark in ("\n\n", "\n"):
            # A cut in the first half would leave a needlessly short piece.
            found = text.rfind(mark, start + limit // 2, stop)
            if found >= 0:
                stop = found + len(mark)
                break
        yield text[start:stop]
        start = stop
    yield text[start:]


def _read_json_lines(path: Path, field: str, bad: BadInput) -> Iterator[str]:
    with open_regular(path) as file:
        for number, line in enumerate(iter(lambda: file.readline(LARGE + 1), b""), start=1):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            if len(line) > LARGE:
                bad(where, f"longer than the {LARGE:,} bytes that a line may have")
                while line and not line.endswith(b"\n"):
                    line = file.readline(LARGE)
                continue
            try:
                record = parse(line)
            except ValueError as error:
                bad(where, f"{error}; every line must be one JSON object in UTF-8")
            else:
                if (text := _field_of(record, field, where, bad)) is not None:
                    yield text


def _field_of(record: Any, field: str, where: str, bad: BadInput) -> str | None:
    """The text of one JSON record, or None after a fault that is skipped."""
    if not isinstance(record, dict):
        bad(where, f"a JSON {type(record).__name__}; every line must be one JSON object with a field {field!r}")
    elif field not in record:
        has = ", ".join(shown(key)[1:-1] for key in sorted(record)[:_NAMED]) or "none"
        bad(where, f"no field {field!r}; this record has: {has}")
    else:
        return checked_text(record[field], f"field {field!r}", where, bad)
    return None


def checked_text(value: Any, what: str, where: str, bad: BadInput) -> str | None:
    """`value` if it is a string that UTF-8 can hold, or None after a fault that is skipped."""
    if not isinstance(value, str):
        bad(where, f"{what} holds {type(value).__name__}, not a string")
        return None
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        bad(where, f"{what} holds half of a surrogate pair, which is no character")
        return None
    return value


def _read_parquet(path: Path, field: str, bad: BadInput) -> Iterator[str]:
    try:
        import pyarrow
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise UsageError(f'{path}: Parquet needs pyarrow: pip install "mixtral[data]"') from error
    try:
        open_regular(path).close()
        file = parquet.ParquetFile(path)
    except (pyarrow.ArrowException, ValueError):  # the latter: a column's name is no text
        bad(str(path), "not a whole Parquet file (truncated, or another format)")
        return
    with file:
        if field not in file.schema_arrow.names:
            has = ", ".join(shown(name)[1:-1] for name in file.schema_arrow.names[:_NAMED])
            bad(str(path), f"no column {field!r}; this file has: {has}")
            return
        row = 0
        try:
            for batch in file.iter_batches(batch_size=1024, columns=[field]):
                for value in batch.column(0).to_pylist():
                    row += 1
                    if (text := checked_text(value, f"column {field!r}", f"{path}, row {row}", bad)) is not None:
                        yield text
        except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:  # the latter: no Python value
            # A generator's own `yield` never lands here: only reading the next batch does.
            bad(f"{path}, after row {row}", f"damaged Parquet data: {error}")
