"""The header of a GGUF file as bytes: metadata, and where each tensor will lie. header.py has the format."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from mixtral.gguf.header import MAGIC, TYPES

ALIGNMENT = 32  # bytes: where tensors begin; readers take it for granted
_VERSION = 3
_NUMBERS = {known.name: number for number, known in TYPES.items()}
_FORMATS = {bool: (7, "?"), int: (4, "I"), float: (6, "f")}
_IN_LISTS = {**_FORMATS, int: (5, "i")}  # as the gguf package has them
_STRING, _ARRAY = 8, 9


class TensorEntry(NamedTuple):
    name: str
    type: str  # a name of TYPES
    shape: tuple[int, ...]  # outermost size first
    nbytes: int


def header_bytes(metadata: Mapping[str, Any], tensors: Sequence[TensorEntry]) -> bytes:
    """All that stands before the first tensor. Each tensor's bytes follow in order, padded to ALIGNMENT.

    Values of metadata are texts, truth values, numbers of 32 bits, or lists of those of one kind. An empty text or list
    is left out, as by other programs.
    """
    entries = {key: value for key, value in metadata.items() if value not in ("", [])}
    parts = [MAGIC, struct.pack("<IQQ", _VERSION, len(tensors), len(entries))]
    for key, value in entries.items():
        parts += [_text(key), _value(value)]
    offset = 0
    for name, kind, shape, nbytes in tensors:
        sizes = struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape))
        parts += [_text(name), sizes, struct.pack("<IQ", _NUMBERS[kind], offset)]
        offset += nbytes + padding(nbytes)
    header = b"".join(parts)
    return header + b"\0" * padding(len(header))


def padding(nbytes: int) -> int:
    """Bytes of zeros after so many, up to the next tensor."""
    return -nbytes % ALIGNMENT


def _text(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _value(value: Any) -> bytes:
    """Its type, and the value."""
    if isinstance(value, str):
        return struct.pack("<I", _STRING) + _text(value)
    if not isinstance(value, list):
        kind, code = _FORMATS[type(value)]
        return struct.pack(f"<I{code}", kind, value)
    if isinstance(value[0], str):
        return struct.pack("<IIQ", _ARRAY, _STRING, len(value)) + b"".join(map(_text, value))
    kind, code = _IN_LISTS[type(value[0])]
    return struct.pack(f"<IIQ{len(value)}{code}", _ARRAY, kind, len(value), *value)
