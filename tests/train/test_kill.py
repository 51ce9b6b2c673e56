"""A run that is killed and goes on ends as the uninterrupted one, bit for bit (tools/kill_and_resume.py, made fast).

Runs are forked from a process that has imported torch already, as importing takes longer than all of such a run.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import sys
from collections.abc import Iterator
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mixtral.cli import main
from tools import kill_and_resume
from tools.kill_and_resume import Failed, Start, compare_runs, differences, finish, plan, wait_for

IMPORTED_ONCE = ["torch._dynamo", "mixtral.commands.train", "mixtral.recipes", "mixtral.train.pretrain"]
STEPS = 12


class Forked:
    """A run in a forked process, seen as subprocess.Popen shows one."""

    def __init__(self, process: BaseProcess) -> None:
        self.process = process
        process.start()
        self.kill = process.kill

    def poll(self) -> int | None:
        return self.process.exitcode

    def wait(self) -> int:
        self.process.join()
        assert self.process.exitcode is not None
        return self.process.exitcode


def command(arguments: list[str], log: Path) -> None:
    with log.open("a") as out:
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
    sys.exit(main(arguments))


@pytest.fixture(scope="module")
def start() -> Iterator[Start]:
    context: ForkServerContext = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED_ONCE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        yield lambda arguments, log: Forked(context.Process(target=command, args=(arguments, log)))


class Ended:
    """A run that has ended already."""

    def __init__(self, code: int) -> None:
        self.code = code

    def poll(self) -> int:
        return self.code

    wait = poll

    def kill(self) -> None:
        pass


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_two_kills_one_in_a_save(tmp_path: Path, start: Start, dtype: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert compare_runs(tmp_path, kills=2, dtype=dtype, seed=1, steps=STEPS, start=start) == []
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 3 and sum("resumes from step" in line for line in said) == 2
    assert "equal bit for bit: checkpoints/step_" in said[-1] and "metrics.jsonl" in said[-1]


# -- the script would tell ---------------------------------------------------------------------------------------------


def test_what_differs_and_what_is_left_over_is_told(tmp_path: Path) -> None:
    runs = [tmp_path / "whole", tmp_path / "killed"]
    for run in runs:
        (run / "checkpoints/step_000002").mkdir(parents=True)
        (run / "metrics.jsonl").write_text('{"step": 1}\n')
        save_file({"weight": torch.tensor([0.0])}, run / "checkpoints/step_000002/model.safetensors")
    assert differences(*runs) == []
    save_file({"weight": torch.tensor([-0.0])}, runs[1] / "checkpoints/step_000002/model.safetensors")
    save_file({}, runs[0] / "other.safetensors")
    (runs[1] / "metrics.jsonl").write_text('{"step": 2}\n')
    (runs[1] / "checkpoints/.step_000004.mixtral-0123abcd.tmp").mkdir()
    assert differences(*runs) == [
        "other.safetensors is not in both",
        "checkpoints/step_000002/model.safetensors differs",
        "metrics.jsonl differs",
        f"{runs[1]}/checkpoints/.step_000004.mixtral-0123abcd.tmp is left over",
    ]


def test_a_run_that_fails_or_ends_early_is_told(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("learning\nno text to train on\n")
    with pytest.raises(Failed, match=r"ended with code 1: \['no text to train on'\]"):
        finish(Ended(1), log)
    with pytest.raises(Failed, match="ended before its kill"):
        wait_for(lambda: False, Ended(0), log)


def test_one_kill_of_ten_comes_before_the_steps_and_a_third_in_saves() -> None:
    kinds = plan(20, random.Random(0))
    assert kinds[:2] == ["preparing"] * 2 and "preparing" not in kinds[2:]
    assert kinds.count("saving") == 7 and kinds.count("step") == 11 and len(kinds) == 20
    assert sorted(plan(2, random.Random(0))) == ["saving", "step"]


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 1 for a difference and for a run that fails."""

    def outcome(found: list[str] | Failed) -> int:
        def compared(*_: object) -> list[str]:
            if isinstance(found, Failed):
                raise found
            return found

        monkeypatch.setattr(kill_and_resume, "compare_runs", compared)
        monkeypatch.setattr("sys.argv", ["kill_and_resume.py", "--work", str(tmp_path / "new")])
        return kill_and_resume.main()

    assert [outcome([]), outcome(["metrics.jsonl differs"]), outcome(Failed("it hangs"))] == [0, 1, 1]
    assert capsys.readouterr().out == "failed: it hangs\n"


def test_the_command_keeps_what_lies_in_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "0.txt").write_text("precious")
    monkeypatch.setattr("sys.argv", ["kill_and_resume.py", "--work", str(tmp_path)])
    monkeypatch.setattr(kill_and_resume, "compare_runs", lambda *_: pytest.fail("it would write there"))
    with pytest.raises(SystemExit) as caught:
        kill_and_resume.main()
    assert caught.value.code == 2
