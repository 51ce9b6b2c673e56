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
from mixtral.files import atomic_file, atomic_folder, atomic_write, clear_leftovers, remove_folder


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


def test_a_file_that_is_written_piece_by_piece(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    with atomic_file(path) as new, new.open("wb") as file:
        file.write(b"one")
        assert not path.exists()
    with pytest.raises(KeyError), atomic_file(path) as new:
        new.write_bytes(b"half")
        raise KeyError
    assert path.read_bytes() == b"one" and names(tmp_path) == ["a.bin"]


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


def test_leftovers_of_an_earlier_process_with_our_id_are_cleared_up(tmp_path: Path) -> None:
    """In a container every run of a program may have the same process id."""
    for serial in range(1000):
        (tmp_path / f".model.{os.getpid()}-{serial}.tmp").mkdir()
    with atomic_folder(tmp_path / "model") as folder:
        assert names(tmp_path) == [folder.name]
        clear_leftovers(tmp_path)  # as another thread of this process may do meanwhile
        (folder / "one").write_text("1")
    assert names(tmp_path) == ["model"]


def test_leftovers_of_all_names(tmp_path: Path) -> None:
    dead = subprocess.Popen(["true"])
    dead.wait()
    gone = [f".a.{dead.pid}-0.tmp", f".b.txt.{dead.pid}-17.tmp"]
    kept = [f".a.{os.getppid()}-0.tmp", ".a.x-0.tmp", ".hidden", f"a.{dead.pid}-0.tmp"]
    for name in gone + kept:
        (tmp_path / name).write_text("")
    clear_leftovers(tmp_path)
    assert names(tmp_path) == sorted(kept)
    clear_leftovers(tmp_path / "nowhere")


def test_a_removed_folder_is_whole_or_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("1")
    remove_folder(tmp_path / "one")
    assert names(tmp_path) == ["two"]
    with pytest.raises(MixtralError, match=r"^cannot remove .*/one: No such file or directory$"):
        remove_folder(tmp_path / "one")

    def killed(path: Path, **_: object) -> None:
        (path / "file").unlink()
        raise KeyboardInterrupt

    monkeypatch.setattr("shutil.rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        remove_folder(tmp_path / "two")
    assert [name[:5] for name in names(tmp_path)] == [".two."]


def test_everything_is_on_disk_before_it_takes_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a crash of the machine could leave the name without the content."""
    done: list[object] = []
    replace, fsync = os.replace, os.fsync

    def record_replace(source: Path, target: Path) -> None:
        done.append("rename")
        replace(source, target)

    def record_sync(descriptor: int) -> None:
        done.append(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    monkeypatch.setattr(os, "replace", record_replace)
    monkeypatch.setattr(os, "fsync", record_sync)
    path = tmp_path / "new" / "model"
    with atomic_folder(path) as folder:
        (folder / "deep").mkdir()
        (folder / "deep" / "one").write_text("1")
    before, after = done[: done.index("rename")], done[done.index("rename") :]
    assert {p.stat().st_ino for p in (path, path / "deep", path / "deep" / "one")} == set(before)
    assert {p.stat().st_ino for p in (path.parent, tmp_path)} < set(after)


def test_other_errors_are_not_taken_for_write_failures() -> None:
    assert not files.is_write_failure(RuntimeError("shapes differ"))
