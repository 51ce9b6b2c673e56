"""Every command that writes, sent to where something of the user's lies, or where nothing can be written."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from mixtral import cli
from tests.commands.conftest import Run

WRITING = {
    "convert hf": ["convert", "{source}", "{target}", "--to", "hf"],
    "convert mistral": ["convert", "{source}", "{target}", "--to", "mistral"],
    "convert gguf": ["convert", "{source}", "{target}.gguf", "--to", "gguf"],
    "quantize": ["quantize", "{source}", "{target}", "--bits", "4"],
    "synth": ["synth", "tiny", "{target}", "--bits", "4"],
    "train": ["train", "tiny", "--out", "{target}"],
    "demo": ["demo", "--train", "--out", "{target}"],
    "runs": ["runs", "{run}", "--plot", "{target}.png"],
}
READING = {"doctor", "info", "generate", "score", "chat", "pull"}  # pull writes into the hub's own cache
FILES = {"config.json": '{"hidden_size": 8}', "tokenizer/tokenizer.json": "{}", "data/corpus.txt": "years of work"}


def test_every_command_is_known_here() -> None:
    writing = {words[0] for words in WRITING.values()}
    assert {function.__name__ for function in cli.COMMANDS} == writing | READING and not writing & READING


def contents(folder: Path) -> dict[str, object]:
    """All that lies below a folder: links by where they point, files by their bytes."""
    return {
        str(p.relative_to(folder)): os.readlink(p) if p.is_symlink() else p.read_bytes() if p.is_file() else None
        for p in folder.rglob("*")
    }


def full(folder: Path) -> None:
    for name, text in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def a_folder(target: Path) -> None:
    full(target)


def a_file(target: Path) -> None:
    target.write_text("precious")


def a_link_to_a_folder(target: Path) -> None:
    full(target.parent / "real")
    target.symlink_to(target.parent / "real")


def a_link_to_a_file(target: Path) -> None:
    (target.parent / "real").write_text("precious")
    target.symlink_to(target.parent / "real")


def below_a_file(target: Path) -> None:
    target.parent.rmdir()
    target.parent.write_text("precious")


def filled(name: str, source: Path, run: Path, target: Path) -> list[str]:
    return [word.format(source=source, run=run, target=target) for word in WRITING[name]]


@pytest.mark.parametrize("put", [a_folder, a_file, a_link_to_a_folder, a_link_to_a_file, below_a_file])
@pytest.mark.parametrize("name", WRITING)
def test_what_is_there_is_kept(run: Run, folder: Path, a_run: Path, tmp_path: Path, name: str,
                               put: Callable[[Path], None]) -> None:
    pytest.importorskip("matplotlib")
    target = tmp_path / "mine" / "target"
    target.parent.mkdir()
    words = filled(name, folder, a_run, target)
    put(next(Path(word) for word in words if word.startswith(str(target))))
    before = contents(tmp_path)
    got = run(*words)
    assert got.code == (1 if put is below_a_file else 2) and got.out == "" and got.err.count("\n") == 1, got
    assert "internal" not in got.err and contents(tmp_path) == before


@pytest.mark.parametrize("name", WRITING)
def test_where_nothing_can_be_written(run: Run, folder: Path, a_run: Path, name: str) -> None:
    """/proc refuses root too."""
    pytest.importorskip("matplotlib")
    got = run(*filled(name, folder, a_run, Path("/proc/mixtral")))
    assert got.code == 1 and got.out == "" and got.err.startswith("mixtral: cannot write /proc/mixtral"), got
    assert got.err.count("\n") == 1


@pytest.mark.parametrize("name", [name for name, words in WRITING.items() if "{source}" in words])
def test_the_source_is_kept(run: Run, folder: Path, a_run: Path, name: str) -> None:
    """As a target it is refused, and a new folder below it is no part of it."""
    pytest.importorskip("gguf")
    before = contents(folder)
    if name != "convert gguf":
        got = run(*filled(name, folder, a_run, folder))
        assert got.code == 2 and "exists already" in got.err and contents(folder) == before
    inside = folder / "inside"
    words = filled(name, folder, a_run, inside)
    assert run(*words).code == 0
    assert {path: value for path, value in contents(folder).items() if not path.startswith("inside")} == before
    for path in sorted(folder.glob("inside*/**/*"), reverse=True) + list(folder.glob("inside*")):
        path.unlink() if path.is_file() else path.rmdir()
    assert contents(folder) == before


@pytest.mark.parametrize("name", ["convert hf", "quantize", "synth"])
def test_a_link_to_an_empty_folder_is_filled(run: Run, folder: Path, a_run: Path, tmp_path: Path, name: str) -> None:
    """And stays a link: the folder may lie on another disk, which has the room."""
    (tmp_path / "disk").mkdir()
    (tmp_path / "target").symlink_to(tmp_path / "disk")
    assert run(*filled(name, folder, a_run, tmp_path / "target")).code == 0
    assert (tmp_path / "target").is_symlink() and (tmp_path / "disk" / "config.json").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk", "target"]
