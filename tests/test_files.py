from __future__ import annotations

import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mixtral import files
from mixtral.errors import MixtralError, UsageError
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


def test_folder_appears_whole_and_gives_way_whole(tmp_path: Path) -> None:
    path = tmp_path / "model"
    with atomic_folder(path) as folder:
        (folder / "one").write_text("1")
        assert not path.exists()
    assert names(path) == ["one"]
    with atomic_folder(path, replace=True) as folder:
        (folder / "one").write_text("new")
        (folder / "deep").mkdir()
        (folder / "deep" / "two").write_text("2")
        assert names(path) == ["one"]
    assert names(path) == ["deep", "one"] and (path / "one").read_text() == "new" and names(tmp_path) == ["model"]


def test_what_was_put_into_a_folder_stays_when_it_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "model"
    (path / "mine").mkdir(parents=True)
    (path / "mine" / "notes").write_text("precious")
    (path / "one").write_text("old")
    (path / "link").symlink_to("nowhere")
    with atomic_folder(path, replace=True) as folder:
        (folder / "one").write_text("new")
    assert names(path) == ["link", "mine", "one"] and (path / "link").is_symlink()
    assert (path / "mine" / "notes").read_text() == "precious" and (path / "one").read_text() == "new"


def test_what_came_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    """Hours may lie between a look at the destination and the end of the writing."""
    (tmp_path / "model").mkdir()
    path = tmp_path / "model"
    with pytest.raises(MixtralError, match=r"cannot write .*model: Directory not empty"), atomic_folder(path):
        (tmp_path / "model" / "mine").write_text("precious")
    with pytest.raises(MixtralError, match=r"cannot write .*a\.gguf: File exists"), atomic_file(tmp_path / "a.gguf"):
        (tmp_path / "a.gguf").write_text("precious")
    assert names(tmp_path) == ["a.gguf", "model"] and names(tmp_path / "model") == ["mine"]
    assert (tmp_path / "a.gguf").read_text() == "precious"


def test_a_link_stays_and_what_it_points_to_is_written(tmp_path: Path) -> None:
    """The big disk, perhaps, of which the link alone lies here."""
    (tmp_path / "disk" / "empty").mkdir(parents=True)
    (tmp_path / "folder").symlink_to(tmp_path / "disk" / "empty")
    (tmp_path / "new").symlink_to(tmp_path / "disk" / "new")
    (tmp_path / "file").symlink_to(tmp_path / "disk" / "file")
    for name in ("folder", "new"):
        with atomic_folder(tmp_path / name) as folder:
            (folder / "one").write_text("1")
            assert folder.parent == tmp_path / "disk"
    atomic_write(tmp_path / "file", "1")
    assert all(path.is_symlink() for path in tmp_path.iterdir() if path.name != "disk")
    assert names(tmp_path / "disk") == ["empty", "file", "new"] and names(tmp_path / "disk" / "empty") == ["one"]


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
    with pytest.raises(MixtralError, match=r"^cannot write .*model: [^\n]+$"), atomic_folder(path, True) as folder:
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
    with (
        pytest.raises(MixtralError, match=r"cannot write .*model: Input/output error"),
        atomic_folder(path, replace=True),
    ):
        pass
    assert names(path) == ["one"] and names(tmp_path) == ["model"]


# -- what kills left ---------------------------------------------------------------------------------------------------


def killed_in(tmp_path: Path, code: str) -> None:
    """Run code that gives itself a SIGKILL."""
    head = "import os, signal; from pathlib import Path; from mixtral.files import *; here = Path(os.sys.argv[1])\n"
    die = "os.kill(os.getpid(), signal.SIGKILL)"
    done = subprocess.run([sys.executable, "-c", head + code.replace("DIE", die), str(tmp_path)], check=False)
    assert done.returncode == -9


def test_what_a_killed_process_left_is_cleared_up(tmp_path: Path) -> None:
    killed_in(tmp_path, "with atomic_folder(here / 'model') as new:\n (new / 'half').write_text('1')\n DIE")
    assert len(names(tmp_path)) == 1 and all(files.is_temporary(name) for name in names(tmp_path))
    atomic_write(tmp_path / "other", "1")
    assert len(names(tmp_path)) == 2
    with atomic_folder(tmp_path / "model") as folder:
        assert names(tmp_path) == [folder.name, "other"]
        clear_leftovers(tmp_path)  # as another thread, or another process, may do meanwhile
        (folder / "one").write_text("1")
    assert names(tmp_path) == ["model", "other"]


def test_a_kill_between_the_two_renames_loses_nothing(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "one").write_text("1")
    code = "rename = os.replace\ndef die(a, b):\n if str(a).endswith('.tmp'): DIE\n rename(a, b)\nos.replace = die\n"
    killed_in(tmp_path, code + "with atomic_folder(here / 'model', replace=True): pass")
    assert "model" not in names(tmp_path)
    with pytest.raises(ValueError), atomic_folder(tmp_path / "model", replace=True):
        raise ValueError
    assert names(tmp_path) == ["model"] and names(tmp_path / "model") == ["one"]


def test_a_kill_before_all_is_taken_over_loses_nothing(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        (tmp_path / "model" / name).mkdir(parents=True)
    code = "from itertools import count; n = count(1); rename = os.replace\n"
    code += "def die(a, b):\n if next(n) == 4: DIE\n rename(a, b)\nos.replace = die\n"
    killed_in(tmp_path, code + "with atomic_folder(here / 'model', replace=True) as new: (new / 'own').mkdir()")
    assert len(names(tmp_path / "model")) == 2
    with pytest.raises(ValueError), atomic_folder(tmp_path / "model", replace=True):
        raise ValueError
    assert names(tmp_path) == ["model"] and names(tmp_path / "model") == ["a", "b", "c", "own"]


def test_only_names_of_ours_are_cleared_up(tmp_path: Path) -> None:
    """Whatever a user's files are called, also like the one that is written."""
    gone = [".a.mixtral-0123abcd.tmp", ".b.txt.mixtral-89abcdef.tmp"]
    kept = [".a.old", ".a.tmp", ".a.1-0.tmp", f".a.{2**22}-0.tmp", ".a.mixtral-0123.tmp", ".hidden", "a.tmp", "x.old"]
    for name in gone + kept:
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("1")
    for name in ("a", "[ab]", "*"):  # the last two are no patterns
        with atomic_folder(tmp_path / name):
            pass
        remove_folder(tmp_path / name)
        assert not (tmp_path / gone[0]).exists() and (tmp_path / gone[1]).exists()
    clear_leftovers(tmp_path)
    assert names(tmp_path) == sorted(kept) and all(names(tmp_path / name) == ["file"] for name in kept)
    clear_leftovers(tmp_path / "nowhere")


def test_without_locks_nothing_is_cleared_and_all_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: object) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr("fcntl.flock", none)
    (tmp_path / ".a.mixtral-0123abcd.tmp").mkdir()
    with atomic_folder(tmp_path / "a"):
        clear_leftovers(tmp_path)
    files.lock_folder(tmp_path / "a")
    files.unlock_folder(tmp_path / "a")
    assert names(tmp_path) == [".a.mixtral-0123abcd.tmp", "a"]


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


def test_a_look_before_long_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files.check_writable(tmp_path / "new" / "deep" / "model")
    assert names(tmp_path) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(MixtralError, match=r"^cannot write .*/file/model: Not a directory$"):
        files.check_writable(tmp_path / "file" / "model")
    for path in ("/proc/model", "/proc/self/model"):  # where root may not write either
        with pytest.raises(MixtralError, match=f"^cannot write {path}: "):
            files.check_writable(Path(path))
    monkeypatch.setattr(os.path, "ismount", lambda path: str(path) == str(tmp_path))
    with pytest.raises(UsageError, match="is a mount point, which no folder can take the place of; name a new folder"):
        files.check_writable(tmp_path)
