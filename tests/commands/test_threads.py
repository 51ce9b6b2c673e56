"""--threads on every command that computes: through the command line, on a tiny model."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from mixtral import cli, cores, runtime
from mixtral.commands import demo, doctor, train
from mixtral.train import pretrain
from mixtral.train.record import recorded_threads
from tests.commands.conftest import Run

WITHOUT = {"info", "runs", "pull"}  # they count, list and fetch
Arguments = Callable[[Path, Path], list[str]]  # of a model folder and a new path
COMMANDS: dict[str, Arguments] = {
    "demo": lambda *_: [],
    "doctor": lambda *_: ["--json"],
    "train": lambda _, new: ["tiny", "--out", str(new)],
    "generate": lambda model, _: ["--model", str(model), "--prompt", "To be", "--max-tokens", "2"],
    "score": lambda model, _: [str(model / "config.json"), "--model", str(model), "--skip-bad"],
    "chat": lambda model, _: ["--model", str(model), "--max-tokens", "2"],
    "convert": lambda model, new: [str(model), str(new), "--to", "mistral"],
    "quantize": lambda model, new: [str(model), str(new), "--bits", "8"],
    "synth": lambda _, new: ["tiny", str(new), "--bits", "4"],
}


@pytest.fixture(autouse=True)
def asked(monkeypatch: pytest.MonkeyPatch) -> list[int | str]:
    """Without the long work: what each training run was asked to go on with, "auto" being as recorded."""
    asked: list[int | str] = []
    monkeypatch.setattr(demo, "_shipped", lambda _: None)
    monkeypatch.setattr(doctor, "examine", lambda: {"environment": runtime.environment()["threads"]})
    monkeypatch.setattr(pretrain, "pretrain", lambda *given: asked.append(given[2] if len(given) > 2 else "auto"))
    monkeypatch.setattr(train, "_text", lambda _: "")
    monkeypatch.setattr("builtins.input", lambda _: (_ for _ in ()).throw(EOFError))
    monkeypatch.setattr(runtime, "cpu_count", lambda: 4)
    return asked


def test_every_command_that_computes_has_the_option() -> None:
    have = {f.__name__ for f in cli.COMMANDS if "threads" in inspect.signature(f).parameters}
    assert have == {f.__name__ for f in cli.COMMANDS} - WITHOUT == COMMANDS.keys()


@pytest.mark.parametrize("name", COMMANDS)
def test_the_number_is_used(name: str, run: Run, folder: Path, tmp_path: Path) -> None:
    done = run(name, *COMMANDS[name](folder, tmp_path / "new"), "--threads", "3")
    assert done.code == 0, done.err
    assert torch.get_num_threads() == cores.threads() == 3


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("bad", ["0", "4096", "all"])
def test_what_is_no_number_is_refused_before_any_work(
    name: str, bad: str, run: Run, folder: Path, tmp_path: Path
) -> None:
    done = run(name, *COMMANDS[name](folder, tmp_path / "new"), "--threads", bad)
    assert done[:2] == (2, "") and not (tmp_path / "new").exists()
    assert done.err == f"mixtral: threads: a number from 1 to 1024 is wanted, or auto, not {bad}\n"


def test_the_environment_counts_unless_told(run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    for options, threads in (([], 2), (["--threads", "auto"], 2), (["--threads", "3"], 3)):
        assert run("chat", "--model", folder, "--max-tokens", "2", *options).code == 0
        assert torch.get_num_threads() == threads
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr(runtime, "free_cores", lambda: 4)
    assert run("chat", "--model", folder, "--max-tokens", "2").code == 0 and torch.get_num_threads() == 4


def test_a_run_records_the_number_and_resuming_changes_it_only_when_told(
    run: Run, tmp_path: Path, asked: list[int | str]
) -> None:
    """`pretrain` records the change, once it has loaded what the run goes on from: tests/train/test_threads.py."""
    out = tmp_path / "run"
    assert run("train", "tiny", "--out", out, "--threads", "3").code == 0
    for options in ([], ["--threads", "auto"], ["--threads", "2"]):
        assert run("train", "--resume", out, *options).code == 0 and recorded_threads(out) == 3
    assert asked == ["auto", "auto", "auto", "2"]


def test_the_demo_records_it_too(
    run: Run, tmp_path: Path, asked: list[int | str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    monkeypatch.setattr("mixtral.commands.demo_train._figures", lambda _: {})
    for options in (["--threads", "3"], [], ["--threads", "2"]):
        assert run("demo", "--train", "--out", out, "--json", *options).code == 0 and recorded_threads(out) == 3
    assert asked == ["auto", "auto", "2"]


def test_text_does_not_depend_on_the_number(run: Run, folder: Path) -> None:
    options = ("--prompt", "To be", "--seed", "1", "--temperature", "1", "--dtype", "bf16", "--max-tokens", "30")
    texts = {run("generate", "--model", folder, *options, "--threads", threads).out for threads in ("1", "2", "3")}
    assert len(texts) == 1 and texts.pop().strip()
