from __future__ import annotations

import os
import resource
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mixtral import files
from mixtral.errors import MixtralError
from mixtral.files import atomic_folder, atomic_write


@pytest.fixture
def full_disk() -> Iterator[None]:
    """No file may grow past 1 kB: the system refuses the write, as it does when the disk is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_file_is_written_and_replaced(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.json"
    atomic_write(path, "grüße\n")
    assert path.read_bytes() == "grüße\n".encode()
    atomic_write(str(path), b"\x00\x01")
    assert path.read_bytes() == b"\x00\x01"
    assert names(path.parent) == ["a.json"]


@pytest.mark.usefixtures("full_disk")
def test_full_disk_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    atomic_write(path, "old")
    with pytest.raises(MixtralError, match=r"cannot write .*a\.txt: File too large$"):
        atomic_write(path, "x" * 5000)
    assert path.read_text() == "old" and names(tmp_path) == ["a.txt"]


def test_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(MixtralError, match=r"cannot write .*/file/a.txt: "):
        atomic_write(tmp_path / "file" / "a.txt", "x")
    with pytest.raises(MixtralError, match=r"cannot write .*/file/model: "), atomic_folder(tmp_path / "file" / "model"):
        pass
    (tmp_path / "folder").mkdir()
    with pytest.raises(MixtralError, match=r"cannot write .*/folder: Is a directory"):
        atomic_write(tmp_path / "folder", "x")
    assert names(tmp_path) == ["file", "folder"]


def test_folder_appears_whole_and_replaces_whole(tmp_path: Path) -> None:
    path = tmp_path / "model"
    with atomic_folder(path) as folder:
        (folder / "one").write_text("1")
        assert not path.exists()
    assert names(path) == ["one"]
    with atomic_folder(path) as folder:
        (folder / "deep").mkdir()
        (folder / "deep" / "two").write_text("2")
        assert names(path) == ["one"]
    assert names(path) == ["deep"] and names(tmp_path) == ["model"]


@pytest.mark.parametrize("error", [ValueError("ours"), KeyboardInterrupt()])
def test_error_inside_keeps_the_old_folder(tmp_path: Path, error: BaseException) -> None:
    path = tmp_path / "model"
    with atomic_folder(path) as folder:
        (folder / "one").write_text("1")
    with pytest.raises(type(error)), atomic_folder(path) as folder:
        (folder / "two").write_text("2")
        raise error
    assert names(path) == ["one"] and names(tmp_path) == ["model"]


@pytest.mark.usefixtures("full_disk")
@pytest.mark.parametrize("library", ["python", "safetensors", "torch"])
def test_full_disk_keeps_the_old_folder(tmp_path: Path, library: str) -> None:
    path = tmp_path / "model"
    with atomic_folder(path) as folder:
        (folder / "one").write_text("1")
    tensors = {"w": torch.zeros(5000)}
    with pytest.raises(MixtralError, match=r"^cannot write .*model: [^\n]+$"), atomic_folder(path) as folder:
        if library == "python":
            (folder / "two").write_bytes(bytes(5000))
        elif library == "safetensors":
            save_file(tensors, folder / "two")
        else:
            torch.save(tensors, folder / "two")
    assert names(path) == ["one"] and names(tmp_path) == ["model"]


def test_failed_swap_puts_the_old_folder_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model"
    with atomic_folder(path) as folder:
        (folder / "one").write_text("1")
    rename = os.replace

    def refuse_new(source: Path, target: Path) -> None:
        if str(source).endswith(".tmp"):
            raise OSError(5, "Input/output error")
        rename(source, target)

    monkeypatch.setattr(os, "replace", refuse_new)
    with pytest.raises(MixtralError, match=r"cannot write .*model: Input/output error"), atomic_folder(path):
        pass
    assert names(path) == ["one"] and names(tmp_path) == ["model"]


def test_what_a_killed_process_left_is_cleared_up(tmp_path: Path) -> None:
    dead = subprocess.Popen(["true"])
    dead.wait()
    left, living = tmp_path / f".model.{dead.pid}-0.tmp", tmp_path / f".model.{os.getppid()}-0.tmp"
    for folder in (left, living):
        folder.mkdir()
    (tmp_path / ".model.old").mkdir()  # killed between the two renames: the old folder waits under this name
    (tmp_path / ".model.old" / "one").write_text("1")
    with pytest.raises(ValueError), atomic_folder(tmp_path / "model"):
        raise ValueError
    assert names(tmp_path) == [living.name, "model"] and names(tmp_path / "model") == ["one"]


def test_other_errors_are_not_taken_for_write_failures() -> None:
    assert not files.is_write_failure(RuntimeError("shapes differ"))
