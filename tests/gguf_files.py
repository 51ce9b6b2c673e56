"""GGUF files made byte by byte, so that any part of them can be wrong."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import NamedTuple

U32, I32, F32, STRING, ARRAY = 4, 5, 6, 8, 9  # types of metadata


class Tensor(NamedTuple):
    name: str
    dims: Sequence[int]  # innermost first, as files have them
    type: int
    offset: int


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def entry(key: str, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def file_bytes(
    entries: Sequence[bytes] = (),
    tensors: Sequence[Tensor] = (),
    data: bytes = b"",
    version: int = 3,
    counts: tuple[int, int] | None = None,
    alignment: int = 32,
) -> bytes:
    n_tensors, n_entries = counts or (len(tensors), len(entries))
    header = b"GGUF" + struct.pack("<IQQ", version, n_tensors, n_entries) + b"".join(entries)
    for name, dims, kind, offset in tensors:
        header += text(name) + struct.pack(f"<I{len(dims)}Q", len(dims), *dims) + struct.pack("<IQ", kind, offset)
    return header + b"\0" * (-len(header) % alignment) + data
