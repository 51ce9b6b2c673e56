"""Torch shards from strangers: no code, nothing compressed, no tensor larger than the file."""

from __future__ import annotations

import io
import os
import pickle
import zipfile
from pathlib import Path

import pytest
import torch

from mixtral.errors import WeightsError
from mixtral.weights.torch_file import TorchFile


def saved(path: Path, content: object) -> Path:
    torch.save(content, path)
    return path


def refused(path: Path) -> str:
    with pytest.raises(WeightsError) as caught:
        TorchFile(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ") and len(message) < 400 and message.isprintable()
    return message


def test_tensors_of_any_layout_that_the_file_holds(tmp_path: Path) -> None:
    base = torch.arange(12.0).view(3, 4)
    file = TorchFile(saved(tmp_path / "a.pth", {"whole": base, "turned": base.T, "again": base, "none": torch.ones(0)}))
    assert {name: header.shape for name, header in file.headers.items()} == {
        "whole": (3, 4), "turned": (4, 3), "again": (3, 4), "none": (0,),
    }  # fmt: skip
    assert torch.equal(file.read("turned"), base.T)


@pytest.mark.parametrize("huge", [torch.ones(1).expand(1 << 40), torch.ones(1, 4).expand(1 << 38, 4)])
def test_a_tensor_of_one_number_and_many_sizes(tmp_path: Path, huge: torch.Tensor) -> None:
    assert "'a' is no plain tensor with its numbers in the file" in refused(saved(tmp_path / "a.pth", {"a": huge}))


def test_many_names_of_one_tensor(tmp_path: Path) -> None:
    tensor = torch.ones(100_000)
    message = refused(saved(tmp_path / "a.pth", {str(n): tensor for n in range(100)}))
    assert "bytes cannot hold the 40,000,000 bytes of its tensors" in message


@pytest.mark.parametrize("content", [
    {"a": torch.ones(3).to_sparse()}, {"a": 1}, {1: torch.ones(1)}, [torch.ones(1)], torch.ones(1),
    {"x" * 5000: 1}, {"a": {"b": torch.ones(1)}},
])  # fmt: skip
def test_what_is_no_dictionary_of_plain_tensors(tmp_path: Path, content: object) -> None:
    refused(saved(tmp_path / "a.pth", content))


def test_a_compressed_record_is_not_expanded(tmp_path: Path) -> None:
    """Of ten kilobytes, and ten megabytes when it is expanded."""
    torch.save({"a": torch.ones(1)}, buffer := io.BytesIO())
    with zipfile.ZipFile(buffer) as old, zipfile.ZipFile(tmp_path / "a.pth", "w", zipfile.ZIP_DEFLATED) as new:
        for info in old.infolist():
            bomb = info.filename.endswith("data.pkl")
            new.writestr(info.filename, b"\0" * 10_000_000 if bomb else old.read(info))
    assert "it is compressed" in refused(tmp_path / "a.pth")


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"text", pickle.dumps({"a": 1}), b"\0" * 1000])
def test_what_is_no_archive(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.pth").write_bytes(content)
    assert "not a readable torch file of plain tensors" in refused(tmp_path / "a.pth")


def test_code_is_not_run(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[object, ...]:
            return os.mkdir, (str(tmp_path / "done"),)

    refused(saved(tmp_path / "a.pth", {"a": Evil()}))
    assert not (tmp_path / "done").exists()


def test_a_pipe_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.pth")
    assert "cannot be read: not a regular file" in refused(tmp_path / "a.pth")
