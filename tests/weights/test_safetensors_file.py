"""Our reader and writer against the safetensors package, and every kind of damage."""

from __future__ import annotations

import json
import os
import struct
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from mixtral.errors import WeightsError
from mixtral.weights import safetensors_file
from mixtral.weights.safetensors_file import DTYPES, Entry, Header, SafetensorsFile, write_safetensors

TENSORS = {
    "b": torch.randn(3, 5).bfloat16(),
    "a": torch.randn(2, 2, 2),
    "scalar": torch.tensor(3.5),
    "empty": torch.zeros(0, 4, dtype=torch.float16),
    "d": torch.randn(7, dtype=torch.float64),
    "h": torch.randn(3).half(),
}


def test_reads_what_the_package_writes(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "x", metadata={"anything": "goes"})
    file = SafetensorsFile(tmp_path / "x")
    expected = {name: (tensor.dtype, tensor.shape) for name, tensor in TENSORS.items()}
    assert {name: (head.dtype, head.shape) for name, head in file.headers.items()} == expected
    read = {name: tensor.clone() for name, tensor in file.stream()}
    assert read.keys() == TENSORS.keys()
    assert all(torch.equal(read[name], tensor) and read[name].dtype == tensor.dtype for name, tensor in TENSORS.items())


def test_writes_what_the_package_reads(tmp_path: Path) -> None:
    entries = [Entry(n, t.dtype, tuple(t.shape), lambda t=t: t) for n, t in TENSORS.items()]
    write_safetensors(tmp_path / "x", entries)
    assert sum(entry.nbytes for entry in entries) < (tmp_path / "x").stat().st_size
    with safe_open(tmp_path / "x", "pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert list(file.keys()) == sorted(TENSORS)
        assert all(torch.equal(file.get_tensor(name), tensor) for name, tensor in TENSORS.items())
    with pytest.raises(FileExistsError):
        write_safetensors(tmp_path / "x", entries)


def test_one_tensor_and_the_mapped_file(tmp_path: Path) -> None:
    held = {**TENSORS, "bytes": torch.arange(7, dtype=torch.uint8)}
    write_safetensors(tmp_path / "x", [Entry(n, t.dtype, tuple(t.shape), lambda t=t: t) for n, t in held.items()])
    file = SafetensorsFile(tmp_path / "x")
    mapped = file.mapped()
    for name, tensor in held.items():
        assert torch.equal(file.read(name), tensor) and file.read(name).dtype == tensor.dtype
        assert torch.equal(mapped[name].clone().view(tensor.dtype).view(tensor.shape), tensor)
    mapped["bytes"].zero_()  # a private copy
    assert torch.equal(file.read("bytes"), held["bytes"])


def test_tensors_start_on_a_cache_line(tmp_path: Path) -> None:
    for length in range(1, 64, 9):
        write_safetensors(tmp_path / f"{length}", [Entry("n" * length, torch.uint8, (1,), lambda: torch.ones(1))])
        assert ((tmp_path / f"{length}").stat().st_size - 1) % 64 == 0


def test_casts_on_writing(tmp_path: Path) -> None:
    strided = torch.randn(4, 3).T
    write_safetensors(tmp_path / "x", [Entry("w", torch.bfloat16, (3, 4), lambda: strided)])
    assert torch.equal(dict(SafetensorsFile(tmp_path / "x").stream())["w"], strided.bfloat16())


def test_a_foreign_dtype_is_a_header_without_one(tmp_path: Path) -> None:
    save_file({"q": torch.ones(3, dtype=torch.int8)}, tmp_path / "x")
    assert SafetensorsFile(tmp_path / "x").headers == {"q": Header(None, "I8", (3,))}
    assert torch.int8 not in DTYPES.values()


def pack(header: object, data: int = 0) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(data)


def entry(first: int, last: int, shape: object = (2,), **more: Any) -> dict[str, Any]:
    return {"dtype": "F32", "shape": shape, "data_offsets": [first, last], **more}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a safetensors file, or cut off inside its header (0 bytes)"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "not a safetensors file, or cut off inside"),
        (b"<!DOCTYPE html>" * 100, "not a safetensors file, or cut off inside its header (1,500 bytes)"),
        (pack({"a": entry(0, 8)})[:20], "not a safetensors file, or cut off inside its header (20 bytes)"),
        (pack(b"{no json"), "not a safetensors file, or a damaged one: bad header"),
        (pack(b'{"a": "\xff"}'), "not a safetensors file, or a damaged one: bad header"),
        (pack([1]), "not a safetensors file, or a damaged one: bad header: must hold a JSON object, not"),
        (pack({"a": {"dtype": "F32"}}), "bad header: a must have dtype, shape and data_offsets, not {'dtype': 'F32'}"),
        (pack({"a": entry(0, 8, [-2])}, 8), "bad header: a: shape must be a list of at most 16 sizes, not [-2]"),
        (pack({"a": entry(0, 8)}, 7), "truncated: the header promises 8 bytes of tensors, 7 are there"),
        (pack({"a": entry(0, 8)}, 9), "damaged: the header promises 8 bytes of tensors, 9 are there"),
        (pack({"a": entry(0, 12)}, 12), "damaged: the byte range of a does not fit its shape and place"),
        (pack({"a": entry(0, 8), "b": entry(4, 12)}, 12), "damaged: the byte range of b does not fit"),
        (pack({"a": entry(0, 8), "b": entry(12, 20)}, 20), "damaged: the byte range of b does not fit"),
        (pack({"a": entry(0, 8, [1 << 40])}, 8), "damaged: the byte range of a does not fit"),
    ],
)
def test_damage(content: bytes, message: str, tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    file.write_bytes(content)
    with pytest.raises(WeightsError) as error:
        SafetensorsFile(file)
    assert str(error.value).startswith(f"{file}: ") and message in str(error.value) and "\n" not in str(error.value)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="cannot be read: No such file or directory"):
        SafetensorsFile(tmp_path / "x")


def test_cut_off_after_it_was_opened(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "x")
    file = SafetensorsFile(tmp_path / "x")
    (tmp_path / "x").write_bytes((tmp_path / "x").read_bytes()[:-1])
    with pytest.raises(WeightsError, match="truncated while it was being read"):
        list(file.stream())


def test_short_reads_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The system may hand over less than was asked for; here at most 3 bytes at a time."""

    class Slow:
        def __init__(self, file: Any) -> None:
            self.file = file

        def readinto(self, buffer: memoryview) -> int:
            return int(self.file.readinto(buffer[:3]))

    whole = safetensors_file._read_into
    monkeypatch.setattr(safetensors_file, "_read_into", lambda file, buffer, path: whole(Slow(file), buffer, path))
    save_file(TENSORS, tmp_path / "x")
    assert all(torch.equal(tensor, TENSORS[name]) for name, tensor in SafetensorsFile(tmp_path / "x").stream())


@pytest.mark.skipif(sys.platform != "linux", reason="other systems count mapped memory otherwise")
def test_a_file_larger_than_memory_is_mapped(tmp_path: Path) -> None:
    """A sparse one: its tensor is zeros that take no room on the disk."""
    size = 2 * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    header = json.dumps({"w": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode()
    with (tmp_path / "a.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + size)
    assert SafetensorsFile(tmp_path / "a.safetensors").mapped()["w"][-1] == 0


def test_a_header_that_is_no_plain_json(tmp_path: Path) -> None:
    wrong = {
        b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], "more": 1}}': "must have dtype, shape",
        b'{"a": {}, "a": {}}': "key 'a' stands twice",
        b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}": "nested more than 64 deep",
        b'{"a": 1e400}': "no finite number",
        b'{"%s": 1}' % (b"x" * 5000): "must have dtype, shape and data_offsets, not 1",
    }
    for header, message in wrong.items():
        (tmp_path / "x").write_bytes(pack(header, 8))
        with pytest.raises(WeightsError) as error:
            SafetensorsFile(tmp_path / "x")
        assert message in str(error.value) and len(str(error.value)) < 400


def test_a_pipe_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x")
    with pytest.raises(WeightsError, match="cannot be read: not a regular file"):
        SafetensorsFile(tmp_path / "x")
