"""Reading and writing one safetensors file, tensor by tensor.

The safetensors package maps a file into memory, where its pages count against the process, and wants all tensors of a
file at once to write it. Streaming both ways keeps the peak at one tensor. The format: 8 bytes with the length of the
header (little-endian), the header as JSON (name -> dtype, shape, byte range), the tensors one after another.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import struct
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from mixtral.errors import WeightsError, shown
from mixtral.files import open_regular
from mixtral.json_files import parse_object
from mixtral.weights.finite import require_finite

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "U8": torch.uint8,
}  # fmt: skip
FP8 = {"F8_E4M3": torch.float8_e4m3fn}  # weights of this type are read with their scales (scaled.py)
FLOATS = [dtype for dtype in DTYPES.values() if dtype.is_floating_point]
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_HEADER_LIMIT = 100_000_000  # bytes; the reference implementation's
_MOST_DIMENSIONS = 16
# Else Linux refuses to map a file larger than memory, as all might be written to. Python names the flag from 3.13 on.
_NO_RESERVE: int = getattr(mmap, "MAP_NORESERVE", 0x4000 if sys.platform == "linux" else 0)
_BAD_HEADER = "not a safetensors file, or a damaged one: bad header"
_ALIGN = 64  # bytes: where the first tensor starts, a line of the processor's cache


class Header(NamedTuple):
    """What a file says of one tensor before it is read."""

    dtype: torch.dtype | None  # None: a kind of number that we do not read
    stored: str  # the file's name for it
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """0 for a kind of number that we do not read."""
        return math.prod(self.shape) * self.dtype.itemsize if self.dtype else 0


@dataclass(frozen=True)
class Entry:
    """A tensor to be written; `make` is called when its turn comes."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    make: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class SafetensorsFile:
    """The headers of a file, checked against its size, and its tensors as a stream in file order.

    Raises WeightsError when the file is truncated, or is no safetensors file at all.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with open_regular(path) as file:
                size = os.fstat(file.fileno()).st_size
                header, self._start = _read_header(file, size, path)
        except OSError as error:
            raise WeightsError(f"{path}: cannot be read: {error.strerror}") from None
        try:
            ranges = {name: _parse(name, value) for name, value in header.items() if name != "__metadata__"}
        except ValueError as error:
            raise WeightsError(f"{path}: {_BAD_HEADER}: {error}") from None
        self._ranges = dict(sorted(ranges.items(), key=lambda item: item[1][1]))
        self._check(size - self._start)
        self.headers: dict[str, Header] = {name: head for name, (head, _, _) in self._ranges.items()}

    def _check(self, size: int) -> None:
        """Refuse byte ranges that overlap, leave gaps, or do not match the shapes or the size of the file."""
        end = 0
        for name, (head, first, last) in self._ranges.items():
            dtype = head.dtype or FP8.get(head.stored)
            width = dtype.itemsize if dtype else None
            if first != end or last < first or (width and last - first != math.prod(head.shape) * width):
                raise WeightsError(f"{self.path}: damaged: the byte range of {name} does not fit its shape and place")
            end = last
        if end != size:
            what = "truncated" if size < end else "damaged"
            raise WeightsError(f"{self.path}: {what}: the header promises {end:,} bytes of tensors, {size:,} are there")

    def stream(self) -> Iterator[tuple[str, Tensor]]:
        """Each tensor in turn, all in one buffer: valid until the next. Only dtypes of `DTYPES` may be streamed."""
        longest = max((last - first for _, first, last in self._ranges.values()), default=0)
        buffer = torch.empty(longest, dtype=torch.uint8)
        with self.path.open("rb") as file:
            file.seek(self._start)
            for name, (head, first, last) in self._ranges.items():
                raw = buffer[: last - first]
                _read_into(file, raw.numpy().data, self.path)
                assert head.dtype is not None  # whoever streams has refused the others by name
                yield name, raw.view(head.dtype).view(head.shape)

    def read(self, name: str) -> Tensor:
        """One tensor, in memory of its own; of a dtype of `DTYPES`, as for `stream`, or of `FP8`."""
        head, first, last = self._ranges[name]
        raw = torch.empty(last - first, dtype=torch.uint8)
        with self.path.open("rb") as file:
            file.seek(self._start + first)
            _read_into(file, raw.numpy().data, self.path)
        dtype = head.dtype or FP8[head.stored]
        return raw.view(dtype).view(head.shape)

    def mapped(self) -> dict[str, Tensor]:
        """Each tensor's bytes, uint8 [nbytes], in the file mapped into memory: read when they are first touched.

        What is written to them stays in this process.
        """
        with self.path.open("rb") as file:
            pages = mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE | _NO_RESERVE)
        raw = torch.frombuffer(pages, dtype=torch.uint8)
        return {name: raw[self._start + first : self._start + last] for name, (_, first, last) in self._ranges.items()}


def write_safetensors(
    path: Path, entries: Iterable[Entry], done: Callable[[int], None] = lambda _: None, allow_nonfinite: bool = False
) -> None:
    """Write tensors to a new file, one in memory at a time; `done` is called with the bytes of each.

    Raises WeightsError, naming the tensor, for numbers that are not finite or not in the dtype to be written, unless
    `allow_nonfinite`.
    """
    entries = list(entries)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # what transformers looks for
    end = 0
    for entry in entries:
        offsets = [end, end + entry.nbytes]
        header[entry.name] = {"dtype": _NAMES[entry.dtype], "shape": list(entry.shape), "data_offsets": offsets}
        end += entry.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % _ALIGN)
    with path.open("xb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for entry in entries:
            file.write(_bytes(entry, allow_nonfinite))
            done(entry.nbytes)


def _bytes(entry: Entry, allow_nonfinite: bool) -> memoryview:
    source = entry.make()
    tensor = source.to("cpu", entry.dtype).contiguous()
    if tensor.is_floating_point() and not allow_nonfinite:
        kind = str(entry.dtype).removeprefix("torch.")
        require_finite(entry.name, source, tensor, kind, "bf16 and fp32 hold larger ones")
    return tensor.view(-1).view(torch.uint8).numpy().data


def _read_header(file: BinaryIO, size: int, path: Path) -> tuple[dict[str, Any], int]:
    """The header, and the offset of the first tensor."""
    length = int.from_bytes(file.read(8), "little")
    if size < 8 or not 2 <= length <= min(size - 8, _HEADER_LIMIT):
        raise WeightsError(f"{path}: not a safetensors file, or cut off inside its header ({size:,} bytes)")
    return parse_object(file.read(length), f"{path}: {_BAD_HEADER}", WeightsError), 8 + length


def _parse(name: str, value: object) -> tuple[Header, int, int]:
    """A header's entry: what the tensor is, and its first and last byte, counted from the end of the header."""
    if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{name} must have dtype, shape and data_offsets, not {shown(value)}")
    stored, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(stored, str):
        raise ValueError(f"{name}: dtype must be a text, not {shown(stored)}")
    if not _are_sizes(shape) or len(shape) > _MOST_DIMENSIONS:
        raise ValueError(f"{name}: shape must be a list of at most {_MOST_DIMENSIONS} sizes, not {shown(shape)}")
    if not _are_sizes(offsets) or len(offsets) != 2:
        raise ValueError(f"{name}: data_offsets must be a list of two sizes, not {shown(offsets)}")
    return Header(DTYPES.get(stored), shown(stored)[1:-1], tuple(shape)), *offsets


def _are_sizes(value: object) -> bool:
    return isinstance(value, list) and all(type(n) is int and 0 <= n < 1 << 63 for n in value)


def _read_into(file: BinaryIO, buffer: memoryview, path: Path) -> None:
    """Fill the buffer; one call may read less than asked for (2 GB at most on Linux)."""
    done = 0
    while done < len(buffer):
        count = file.readinto(buffer[done:])  # type: ignore[attr-defined]
        if not count:
            raise WeightsError(f"{path}: truncated while it was being read")
        done += count
