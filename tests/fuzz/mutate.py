"""Damage: bytes flipped, cut, repeated and exchanged, and for JSON values and keys that nobody expects."""

from __future__ import annotations

import copy
import io
import json
import random
import struct
import zipfile
from collections.abc import Callable, Iterator
from typing import Any

# Values that no key expects. The marks become text that json.dumps does not write.
_RAW = {"@deep@": "[" * 100_000 + "]" * 100_000, "@wide@": "1" + "0" * 400, "@half@": '"\\ud800"', "@twice@": "{}"}
ABSURD: list[Any] = [
    None, True, False, "", "a", "x" * 5000, "\x1b[31m\n", "../../etc/passwd", "a\0b", -1, 0, 1, 2, 1.5, 1e30, -1e300,
    2**31, 2**32, 2**63, 2**64, 10**30, float("nan"), float("inf"), [], {}, [1], ["a"], [[]], {"a": 1}, [None] * 100,
    3_000_000, *_RAW,
]  # fmt: skip


def damaged(data: bytes, kind: str, rng: random.Random) -> bytes:
    """`data` with one to three changes; `kind`, a key of _STRUCTURAL below or "bytes", tells its structure."""
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        change = _STRUCTURAL.get(kind) if rng.random() < 0.7 else None
        data = (change or _bytes)(data, rng)
    return data


# -- bytes -------------------------------------------------------------------------------------------------------------


def _bytes(data: bytes, rng: random.Random) -> bytes:
    size = len(data)
    at = rng.randrange(min(size, 600) if rng.random() < 0.6 else size) if size else 0  # headers matter more
    length = rng.choice((1, 4, 8, 64, 1000))
    block = data[at : at + length]
    change = rng.randrange(8)
    if change == 0:
        return data[:at]
    if change == 1:
        return data[:at] + rng.randbytes(length) + data[at:]
    if change == 2:
        return data[:at] + data[at + length :]
    if change == 3:
        return data[:at] + block * rng.choice((2, 3, 50)) + data[at + length :]
    if change == 4:
        number = rng.choice((0, 1, size, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**62, 2**63 - 1, 2**64 - 1))
        word = struct.pack("<Q", number)[: rng.choice((2, 4, 8))]
        return data[:at] + word + data[at + len(word) :]
    if change == 5:
        other = rng.randrange(size) if size else 0
        first, second = sorted((at, other))
        words = data[first : first + 8], data[second : second + 8]
        return data[:first] + words[1] + data[first + 8 : second] + words[0] + data[second + 8 :]
    flipped = bytearray(data)
    for _ in range(rng.choice((1, 2, 8)) if size else 0):
        flipped[min(size - 1, at + rng.randrange(16))] ^= 1 << rng.randrange(8) if change == 6 else rng.randrange(256)
    return bytes(flipped)


# -- JSON --------------------------------------------------------------------------------------------------------------


def _json(data: bytes, rng: random.Random) -> bytes:
    try:
        document = json.loads(data)
    except (ValueError, RecursionError):
        return _bytes(data, rng)
    if rng.random() < 0.06:
        other = data.decode(errors="replace").encode("utf-16")
        return rng.choice((b"\xef\xbb\xbf" + data, other, b"[" + data + b"]", b"", data + data))
    return dumped(_changed(document, rng))


def dumped(document: Any) -> bytes:
    text = json.dumps(document, ensure_ascii=False)
    for mark, raw in _RAW.items():
        text = text.replace(f'"{mark}"', raw)
    return text.encode("utf-8", "surrogatepass")


def _changed(document: Any, rng: random.Random) -> Any:
    document = copy.deepcopy(document)
    containers = [found for found in _containers(document) if found]
    if not containers:
        return rng.choice(ABSURD)
    container = rng.choice(containers)
    keys = list(container) if isinstance(container, dict) else list(range(len(container)))
    key, other = rng.choice(keys), rng.choice(keys)
    change = rng.randrange(8)
    if change == 0:
        del container[key]
    elif change == 1 and isinstance(container, dict):
        container[rng.choice(("x" * 5000, "a", f"{key}_", "\x1b[2J"))] = container.pop(key)
    elif change == 2:
        container[key], container[other] = container[other], container[key]
    elif change == 3 and isinstance(container[key], int | float):
        container[key] = rng.choice((container[key] + 1, -container[key], container[key] * 1000, str(container[key])))
    elif change == 4 and isinstance(container, list):
        container.extend(container[: rng.choice((1, 100))])
    else:
        container[key] = copy.deepcopy(rng.choice(ABSURD))
    return document


def _containers(node: Any) -> Iterator[Any]:
    """All lists and objects; of a long list the first few alone."""
    if isinstance(node, dict | list):
        yield node
        for inner in list(node.values())[:200] if isinstance(node, dict) else node[:20]:
            yield from _containers(inner)


def _lines(data: bytes, rng: random.Random) -> bytes:
    lines = data.splitlines(keepends=True)
    if not lines:
        return data
    at = rng.randrange(len(lines))
    lines[at] = _json(lines[at], rng).replace(b"\n", b" ") + b"\n"
    return b"".join(lines)


# -- files with parts --------------------------------------------------------------------------------------------------


def _safetensors(data: bytes, rng: random.Random) -> bytes:
    """A changed header behind its right length."""
    length = int.from_bytes(data[:8], "little")
    if not 2 <= length <= len(data) - 8:
        return _bytes(data, rng)
    header = _json(data[8 : 8 + length], rng)
    return struct.pack("<Q", len(header)) + header + data[8 + length :]


def _zip(data: bytes, rng: random.Random) -> bytes:
    """One record changed, with its right checksum; now and then all compressed."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            records = [(info.filename, archive.read(info)) for info in archive.infolist()]
    except Exception:  # whatever an earlier change has done to it
        return _bytes(data, rng)
    at = rng.randrange(len(records))
    if rng.random() < 0.6:
        at = next((i for i, (name, _) in enumerate(records) if name.endswith(".pkl")), at)
    name, content = records[at]
    records[at] = name, _bytes(content, rng)
    kind = zipfile.ZIP_DEFLATED if rng.random() < 0.1 else zipfile.ZIP_STORED
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", kind) as archive:
        for name, content in records:
            archive.writestr(name, content)
    return out.getvalue()


def _protobuf(data: bytes, rng: random.Random) -> bytes:
    """One field of a message left out, repeated, moved, or changed behind its right length."""
    fields = _message(data)
    if not fields:
        return _bytes(data, rng)
    at = rng.randrange(len(fields)) if rng.random() < 0.5 else rng.randrange(max(0, len(fields) - 4), len(fields))
    key, content = fields[at]
    change = rng.randrange(6)
    if change == 0:
        del fields[at]
    elif change == 1:
        fields.insert(rng.randrange(len(fields)), fields[at])
    elif change == 2:
        fields[at], fields[-1] = fields[-1], fields[at]
    elif change == 3 and key & 7 == 0:
        fields[at] = key, _varint(rng.choice((0, 1, 2, 3, 1000, 2**31 - 1, 2**32, 2**63, 2**64 - 1)))
    else:
        inner = _protobuf(content, rng) if key & 7 == 2 and rng.random() < 0.6 else _bytes(content, rng)
        fields[at] = key, inner
    return b"".join(
        _varint(key) + (_varint(len(content)) if key & 7 == 2 else b"") + content for key, content in fields
    )


def _message(data: bytes) -> list[tuple[int, bytes]]:
    """(key, content) of each field; [] for what is no message."""
    fields, position = [], 0

    def varint() -> int:
        nonlocal position
        number = shift = 0
        while True:
            byte = data[position]
            position += 1
            number |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return number

    try:
        while position < len(data):
            key = varint()
            begin = position
            size = varint() if key & 7 in (0, 2) else {1: 8, 5: 4}[key & 7]
            if key & 7 != 0:
                begin = position if key & 7 == 2 else begin
                position = begin + size
            fields.append((key, data[begin:position]))
    except (IndexError, KeyError):
        return []
    return fields if position == len(data) else []


def _varint(number: int) -> bytes:
    out = bytearray()
    while number > 127:
        out.append(number & 127 | 128)
        number >>= 7
    return bytes([*out, number])


# -- GGUF --------------------------------------------------------------------------------------------------------------

_TEXT, _LIST = 8, 9
_WIDTHS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # bytes of each type of number


def _gguf(data: bytes, rng: random.Random) -> bytes:
    """The value of one key changed behind its right length and type; or one of the files that it holds as text."""
    try:
        entries, end = _entries(data)
        return _joined(data[:16], _entry_changed(entries, rng), data[end:], struct.unpack_from("<Q", data, 8)[0])
    except (struct.error, KeyError, IndexError, OverflowError):  # whatever an earlier change has done to it
        return _bytes(data, rng)


def _entry_changed(entries: list[tuple[bytes, int, bytes]], rng: random.Random) -> list[tuple[bytes, int, bytes]]:
    texts = [i for i, (_, kind, _) in enumerate(entries) if kind == _TEXT]
    at = rng.choice(texts) if texts and rng.random() < 0.5 else rng.randrange(len(entries))
    key, kind, value = entries[at]
    change = rng.randrange(8)
    if change == 0:
        del entries[at]
    elif change == 1:
        key = rng.choice((key + b"_", b"general.alignment", b"split.count", b"mixtral.file.tokenizer_config.json"))
    elif change == 2:
        kind, value = rng.choice(entries)[1:]
    elif kind == _TEXT:
        text = value[8:]
        text = _json(text, rng) if text[:1] == b"{" else _bytes(text, rng) if change > 4 else rng.choice(
            (b"", b"a", b"x" * 5000, b"\xff", b"a\0b", b"{", b"llama", b"none", b"\x1b[2J"))  # fmt: skip
        value = struct.pack("<Q", len(text)) + text
    elif kind == _LIST:
        inner, count = struct.unpack_from("<IQ", value)
        width = _WIDTHS.get(inner, 0)
        cut = rng.randrange(count) if count else 0
        if width and change > 4:
            value = struct.pack("<IQ", inner, cut) + value[12 : 12 + cut * width]
        else:
            value = value[:12] + _bytes(value[12:], rng)
    else:
        value = rng.choice((bytes(8), b"\xff" * 8, rng.randbytes(8), b"\1" + bytes(7)))[: _WIDTHS[kind]]
    if change:
        entries[at] = key, kind, value
    return entries


def _joined(begin: bytes, entries: list[tuple[bytes, int, bytes]], rest: bytes, n_tensors: int) -> bytes:
    """The file of these entries, its tensors at a multiple of 32 bytes again."""
    header = b"".join(struct.pack("<Q", len(k)) + k + struct.pack("<I", t) + v for k, t, v in entries)
    start, end = 24 + len(header), 0
    for _ in range(n_tensors):
        (size,) = struct.unpack_from("<Q", rest, end)
        (dimensions,) = struct.unpack_from("<I", rest, end + 8 + size)
        end += 8 + size + 4 + 8 * dimensions + 12
    n_data = (len(rest) - end) // 32 * 32
    infos = rest[:end] + bytes(-(start + end) % 32)
    return begin + struct.pack("<Q", len(entries)) + header + infos + rest[len(rest) - n_data :]


def _entries(data: bytes) -> tuple[list[tuple[bytes, int, bytes]], int]:
    """(key, type, bytes of the value) of each, and where they end."""
    (count,) = struct.unpack_from("<Q", data, 16)
    entries, at = [], 24
    for _ in range(min(count, 10_000)):
        (size,) = struct.unpack_from("<Q", data, at)
        key = data[at + 8 : at + 8 + size]
        at += 8 + size
        (kind,) = struct.unpack_from("<I", data, at)
        end = _value_end(data, at + 4, kind)
        entries.append((key, kind, data[at + 4 : end]))
        at = end
    return entries, at


def _value_end(data: bytes, at: int, kind: int) -> int:
    if kind == _TEXT:
        return at + 8 + int(struct.unpack_from("<Q", data, at)[0])
    if kind != _LIST:
        return at + _WIDTHS[kind]
    inner, count = struct.unpack_from("<IQ", data, at)
    at += 12
    if inner != _TEXT:
        return at + int(count) * _WIDTHS[inner]
    for _ in range(min(count, 100_000)):
        at = _value_end(data, at, _TEXT)
    return at


_STRUCTURAL: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "json": _json, "lines": _lines, "safetensors": _safetensors, "zip": _zip,
    "protobuf": _protobuf, "gguf": _gguf,
}  # fmt: skip
