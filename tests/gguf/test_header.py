"""GGUF headers: what the gguf package writes is read, and everything that can be wrong is refused in one line."""

from __future__ import annotations

import os
import struct
import time
from pathlib import Path

import gguf
import numpy as np
import pytest

from mixtral.errors import WeightsError
from mixtral.gguf.header import TYPES, read_gguf, read_gguf_header
from tests.gguf_files import ARRAY, F32, STRING, U32, Tensor, entry, file_bytes, text


def test_what_the_package_writes(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
    writer.add_uint8("u8", 200)
    writer.add_int64("i64", -(2**40))
    writer.add_float64("f64", 0.1)
    writer.add_bool("yes", True)
    writer.add_string("name", "größer")
    writer.add_array("tokens", ["▁a", "", "b"])
    writer.add_array("scores", [0.5, -1.0])
    writer.add_custom_alignment(64)
    first, second = np.arange(6, dtype=np.float32).reshape(2, 3), np.zeros((4, 2, 34), dtype=np.uint8)
    writer.add_tensor("first", first)
    writer.add_tensor("second", second, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    metadata, tensors = read_gguf_header(tmp_path / "a.gguf")
    told = {"u8": 200, "i64": -(2**40), "f64": 0.1, "yes": True, "name": "größer", "tokens": ["▁a", "", "b"]}
    told |= {"scores": [0.5, -1.0], "general.alignment": 64, "general.architecture": "llama"}
    assert metadata == told
    assert {name: (t.type.name, t.shape, t.nbytes) for name, t in tensors.items()} == {
        "first": ("F32", (2, 3), 24), "second": ("Q8_0", (4, 2, 32), 272),
    }  # fmt: skip
    data = (tmp_path / "a.gguf").read_bytes()
    assert data[tensors["first"].start :][:24] == first.tobytes()
    assert all(tensor.start % 64 == 0 for tensor in tensors.values())


def test_the_packages_sizes() -> None:
    for number, ours in TYPES.items():
        kind = gguf.GGMLQuantizationType(number)
        assert (kind.name, *gguf.GGML_QUANT_SIZES[kind]) == ours


def test_every_cut_is_noticed(tmp_path: Path) -> None:
    values = entry("array", ARRAY, struct.pack("<IQ", STRING, 2) + text("one") + text("two"))
    whole = file_bytes([values, entry("n", U32, b"\1\0\0\0")], [Tensor("w", [3, 2], 0, 0)], b"x" * 24)
    path = tmp_path / "cut.gguf"
    path.write_bytes(whole)
    assert read_gguf_header(path).tensors["w"].shape == (2, 3)
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(WeightsError, match=r"cut\.gguf: (truncated: |not a GGUF file; )"):
            read_gguf_header(path)


HUGE = 2**62
FAULTS = {
    "no-gguf": (b"PK\3\4" + b"\0" * 40, "not a GGUF file; one begins with the letters GGUF"),
    "version": (file_bytes(version=1), r"GGUF version 1 \(or a big-endian file\) is not read; versions 2 and 3 are"),
    "big-endian": (file_bytes(version=3 << 24), "big-endian"),
    "entries": (file_bytes(counts=(0, HUGE)), "truncated: its header goes on after the 32 bytes"),
    "tensors": (file_bytes(counts=(HUGE, 0)), "truncated: its header goes on"),
    "text": (file_bytes([struct.pack("<Q", HUGE)]), "truncated: its header goes on"),
    "array": (file_bytes([entry("a", ARRAY, struct.pack("<IQ", U32, HUGE))]), "truncated: its header goes on"),
    "twice": (file_bytes([entry("a", U32, b"1234")] * 2), "damaged: a stands twice in its metadata"),
    "kind": (file_bytes([entry("a", 77, b"")]), "damaged: its metadata has a value of unknown type 77"),
    "nested": (file_bytes([entry("a", ARRAY, struct.pack("<IQ", ARRAY, 1))]), "a value of unknown type 9"),
    "no-text": (file_bytes([struct.pack("<Q", 2) + b"\xff\xff"]), "'utf-8' codec can't decode"),
    "alignment": (
        file_bytes([entry("general.alignment", U32, b"\0\0\0\0")]), "general.alignment must be a positive number",
    ),
    "dimensions": (file_bytes([], [Tensor("w", [1] * 5, 0, 0)]), "damaged: w has 5 dimensions, at most 4 are possible"),
    "unread": (file_bytes([], [Tensor("w", [256], 28, 0)]), "w is stored as F64, which is not read; F32, F16"),
    "unknown": (file_bytes([], [Tensor("w", [256], 99, 0)]), "w is stored as unknown type 99, which is not read"),
    "rows": (file_bytes([], [Tensor("w", [33], 8, 0)]), "rows of w have 33 numbers, not a multiple of Q8_0's block"),
    "names": (file_bytes([], [Tensor("w", [1], 0, 0)] * 2, b"x" * 36), "damaged: it holds w twice"),
    "overlap": (
        file_bytes([], [Tensor("v", [9], 0, 0), Tensor("w", [1], 0, 32)], b"x" * 36),
        "damaged: the place of w does not fit its neighbours",
    ),
    "unaligned": (file_bytes([], [Tensor("w", [1], 0, 4)], b"x" * 36), "damaged: the place of w does not fit"),
    "size": (file_bytes([], [Tensor("w", [HUGE], 0, 0)], b"x" * 36), "truncated: its header promises 18,446,744,073"),
    "offset": (file_bytes([], [Tensor("w", [1], 0, HUGE)], b"x" * 36), "truncated: its header promises"),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_faults(name: str, tmp_path: Path) -> None:
    content, message = FAULTS[name]
    (tmp_path / "bad.gguf").write_bytes(content)
    with pytest.raises(WeightsError, match=message) as caught:
        read_gguf_header(tmp_path / "bad.gguf")
    assert str(caught.value).startswith(str(tmp_path / "bad.gguf")) and "\n" not in str(caught.value)


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"none\.gguf: cannot be read: No such file"):
        read_gguf_header(tmp_path / "none.gguf")


def test_parts(tmp_path: Path) -> None:
    def part(number: int) -> Path:
        return tmp_path / f"m-{number:05d}-of-00002.gguf"

    count = entry("split.count", U32, struct.pack("<I", 2))
    for number in (1, 2):
        part(number).write_bytes(file_bytes([count], [Tensor(f"w{number}", [1], 0, 0)], b"1234"))
    found = [(path, list(header.tensors)) for path, header in read_gguf(part(1))]
    assert found == [(part(1), ["w1"]), (part(2), ["w2"])]
    with pytest.raises(WeightsError, match=r"one of 2 parts .*; the one whose name ends in -00001-of-00002\.gguf"):
        read_gguf(part(2))
    part(2).unlink()
    with pytest.raises(WeightsError, match=r"m-00002-of-00002\.gguf: cannot be read: No such file"):
        read_gguf(part(1))


@pytest.mark.parametrize("count", [
    (STRING, text("two")), (F32, struct.pack("<f", float("nan"))), (10, struct.pack("<Q", 2**64 - 1)), (7, b"\1"),
    (11, struct.pack("<q", -1)), (ARRAY, struct.pack("<IQ", U32, 0)),
])  # fmt: skip
def test_a_number_of_parts_that_is_none(tmp_path: Path, count: tuple[int, bytes]) -> None:
    (tmp_path / "m.gguf").write_bytes(file_bytes([entry("split.count", *count)]))
    with pytest.raises(WeightsError, match=r"m\.gguf: split\.count must be a number of files, not "):
        read_gguf(tmp_path / "m.gguf")


def test_what_a_header_may_have_at_most(tmp_path: Path) -> None:
    """In a file with room for all that it promises: a hole, which costs whoever makes it nothing."""
    start = time.process_time()
    contents = [
        file_bytes(counts=(0, 10**9)),
        file_bytes(counts=(10**9, 0)),
        file_bytes([entry("a", ARRAY, struct.pack("<IQ", U32, 10**9))]),
        file_bytes([entry("a", ARRAY, struct.pack("<IQ", STRING, 10**9))]),
        file_bytes([entry("a", STRING, struct.pack("<Q", 10**9))]),
        file_bytes([entry(str(i), ARRAY, struct.pack("<IQ", 7, 10**6) + b"\0" * 10**6) for i in range(5)]),
    ]
    for content in contents:
        with (tmp_path / "a.gguf").open("wb") as file:
            file.write(content)
            file.truncate(1 << 40)
        with pytest.raises(WeightsError, match=r"has more than the 134,217,728 bytes or 4,000,000 values allowed"):
            read_gguf_header(tmp_path / "a.gguf")
    assert time.process_time() - start < 2


def test_a_pipe_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.gguf")
    with pytest.raises(WeightsError, match="cannot be read: not a regular file"):
        read_gguf_header(tmp_path / "a.gguf")
