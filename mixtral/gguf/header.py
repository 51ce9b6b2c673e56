"""The header of a GGUF file: its metadata, and where each tensor lies, checked against the size of the file.

The format (github.com/ggml-org/ggml, docs/gguf.md), little-endian: "GGUF", version (uint32), numbers of tensors and of
metadata entries (uint64); the entries (key, type, value); the tensors' names, sizes, types and offsets; padding; data.
Nothing is allocated for what the file promises and does not hold.
"""

from __future__ import annotations

import math
import os
import struct
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from mixtral.errors import WeightsError, shown
from mixtral.files import once, open_regular

MAGIC = b"GGUF"
_VERSIONS = (2, 3)  # they differ in what a big-endian file would look like
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_MOST_DIMENSIONS = 4
_ALIGNMENT = 32  # bytes, unless general.alignment says otherwise
# What a header may have: above every model there is. Python holds a header in some ten times its bytes.
_MOST_BYTES = 128 << 20
_MOST_VALUES = 4_000_000  # of all lists: a vocabulary has three, and its merges; also entries, and tensors
_MOST_PARTS = 99_999


class TensorType(NamedTuple):
    """How numbers are stored: in blocks of `block` along a row, each of `nbytes` bytes."""

    name: str
    block: int
    nbytes: int


TYPES = {
    0: TensorType("F32", 1, 4), 1: TensorType("F16", 1, 2), 30: TensorType("BF16", 1, 2),
    2: TensorType("Q4_0", 32, 18), 3: TensorType("Q4_1", 32, 20), 6: TensorType("Q5_0", 32, 22),
    7: TensorType("Q5_1", 32, 24), 8: TensorType("Q8_0", 32, 34),
    10: TensorType("Q2_K", 256, 84), 11: TensorType("Q3_K", 256, 110), 12: TensorType("Q4_K", 256, 144),
    13: TensorType("Q5_K", 256, 176), 14: TensorType("Q6_K", 256, 210),
    16: TensorType("IQ2_XXS", 256, 66), 17: TensorType("IQ2_XS", 256, 74), 18: TensorType("IQ3_XXS", 256, 98),
    19: TensorType("IQ1_S", 256, 50), 20: TensorType("IQ4_NL", 32, 18), 21: TensorType("IQ3_S", 256, 110),
    22: TensorType("IQ2_S", 256, 82), 23: TensorType("IQ4_XS", 256, 136), 29: TensorType("IQ1_M", 256, 56),
    34: TensorType("TQ1_0", 256, 54), 35: TensorType("TQ2_0", 256, 66), 39: TensorType("MXFP4", 32, 17),
    40: TensorType("NVFP4", 64, 36),
}  # fmt: skip
# Of no weights (8-bit rows of activations, whole numbers), or not expanded by the gguf package.
_UNREAD = {9: "Q8_1", 15: "Q8_K", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64", 41: "Q1_0"}


class TensorInfo(NamedTuple):
    type: TensorType
    shape: tuple[int, ...]  # outermost size first, as torch has it; files have it the other way round
    start: int  # byte of the file
    nbytes: int


class GgufHeader(NamedTuple):
    metadata: dict[str, Any]
    tensors: dict[str, TensorInfo]  # in the order of the file


def read_gguf_header(path: Path) -> GgufHeader:
    """Raises WeightsError, one line, for what is no GGUF file, is cut off, damaged, or holds types that we lack."""
    return once(("gguf", str(path)), lambda: _read_header(path))


def _read_header(path: Path) -> GgufHeader:
    try:
        with open_regular(path) as file:
            return _read(_Reader(file, os.fstat(file.fileno()).st_size))
    except OSError as error:
        raise WeightsError(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError as error:  # of ours, or a text that is not UTF-8
        raise WeightsError(f"{path}: {error}") from None


def read_gguf(path: Path) -> list[tuple[Path, GgufHeader]]:
    """The files of a model and their headers: one, or all parts of one that was split, whose first is to be given.

    The first's metadata are the model's. Raises WeightsError when a part is missing or damaged.
    """
    header = read_gguf_header(path)
    count = header.metadata.get("split.count", 1)
    if type(count) is not int or not 0 <= count <= _MOST_PARTS:
        raise WeightsError(f"{path}: split.count must be a number of files, not {shown(count)}")
    if count in (0, 1):
        return [(path, header)]
    first, last = f"-00001-of-{count:05d}.gguf", f"-of-{count:05d}.gguf"
    if not path.name.endswith(first):
        raise WeightsError(f"{path}: one of {count} parts of a model; the one whose name ends in {first} is wanted")
    parts = (path.with_name(f"{path.name.removesuffix(first)}-{number:05d}{last}") for number in range(2, count + 1))
    return [(path, header), *((part, read_gguf_header(part)) for part in parts)]


class _Reader:
    """Reads a file forwards; raises ValueError before it reads what the file has not."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file = file
        self.size = size
        self.position = 0
        self._values = 0  # of lists

    def take(self, count: int) -> bytes:
        self.foresee(count)
        self.position += count
        return self._file.read(count)

    def foresee(self, count: int, most: int = _MOST_BYTES) -> None:
        """Refuse so many bytes, or values of a byte or more, as the file has not, or are more than `most`."""
        if count > self.size - self.position:
            raise ValueError(f"truncated: its header goes on after the {self.size:,} bytes of the file")
        if count > most or self.position + count > _MOST_BYTES:
            raise ValueError(f"its header has more than the {_MOST_BYTES:,} bytes or {_MOST_VALUES:,} values allowed")

    def number(self, code: str) -> Any:
        return struct.unpack(f"<{code}", self.take(struct.calcsize(f"<{code}")))[0]

    def text(self) -> str:
        return self.take(self.number("Q")).decode()

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.text()
        if kind != _ARRAY:
            return self.number(_code(kind))
        kind, count = self.number("I"), self.number("Q")
        self.foresee(count, _MOST_VALUES - self._values)
        self._values += count
        if kind == _STRING:
            return [self.text() for _ in range(count)]
        code = _code(kind)
        return list(struct.unpack(f"<{count}{code}", self.take(count * struct.calcsize(f"<{code}"))))


def _code(kind: int) -> str:
    if kind not in _SCALARS:
        raise ValueError(f"damaged: its metadata has a value of unknown type {kind}")
    return _SCALARS[kind]


def _read(reader: _Reader) -> GgufHeader:
    if reader.size < 24 or reader.take(4) != MAGIC:
        raise ValueError(f"not a GGUF file; one begins with the letters {MAGIC.decode()}")
    version = reader.number("I")
    if version not in _VERSIONS:
        raise ValueError(f"GGUF version {version} (or a big-endian file) is not read; versions 2 and 3 are")
    n_tensors, n_entries = reader.number("Q"), reader.number("Q")
    reader.foresee(max(n_tensors, n_entries), _MOST_VALUES)
    metadata: dict[str, Any] = {}
    for _ in range(n_entries):
        key = reader.text()
        if key in metadata:
            raise ValueError(f"damaged: {key} stands twice in its metadata")
        metadata[key] = reader.value(reader.number("I"))
    infos: dict[str, TensorInfo] = {}
    for _ in range(n_tensors):
        name = reader.text()
        if name in infos:
            raise ValueError(f"damaged: it holds {name} twice")
        infos[name] = _tensor_info(reader, name)
    alignment = metadata.get("general.alignment", _ALIGNMENT)
    if type(alignment) is not int or alignment < 1:
        raise ValueError(f"damaged: general.alignment must be a positive number of bytes, not {shown(alignment)}")
    start = math.ceil(reader.position / alignment) * alignment
    return GgufHeader(metadata, _placed(infos, start, alignment, reader.size))


def _tensor_info(reader: _Reader, name: str) -> TensorInfo:
    """What the header says of one tensor; its place is still counted from the end of the header."""
    n_dimensions = reader.number("I")
    if n_dimensions > _MOST_DIMENSIONS:
        raise ValueError(f"damaged: {name} has {n_dimensions} dimensions, at most {_MOST_DIMENSIONS} are possible")
    shape = tuple(reversed([reader.number("Q") for _ in range(n_dimensions)]))
    kind, offset = reader.number("I"), reader.number("Q")
    if kind not in TYPES:
        read = ", ".join(known.name for known in TYPES.values())
        stored = _UNREAD.get(kind, f"unknown type {kind}")
        raise ValueError(f"{name} is stored as {stored}, which is not read; {read} are")
    row = shape[-1] if shape else 1
    if row % TYPES[kind].block:
        raise ValueError(f"damaged: rows of {name} have {row} numbers, not a multiple of {TYPES[kind].name}'s block")
    return TensorInfo(TYPES[kind], shape, offset, math.prod(shape) // TYPES[kind].block * TYPES[kind].nbytes)


def _placed(infos: dict[str, TensorInfo], start: int, alignment: int, size: int) -> dict[str, TensorInfo]:
    """With places counted from the beginning of the file; refuses what overlaps or lies beyond its end."""
    tensors, end = {}, 0
    for name, info in sorted(infos.items(), key=lambda item: item[1].start):
        if info.start < end or info.start % alignment:
            raise ValueError(f"damaged: the place of {name} does not fit its neighbours")
        end = info.start + info.nbytes
        tensors[name] = info._replace(start=start + info.start)
    if start + end > size:
        raise ValueError(f"truncated: its header promises {start + end:,} bytes, {size:,} are there")
    return tensors
