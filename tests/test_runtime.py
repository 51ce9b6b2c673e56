from __future__ import annotations

import logging
import subprocess
from pathlib import Path

import pytest
import torch

from mixtral import cores, runtime
from mixtral.errors import UsageError
from mixtral.logs import setup_logging


def test_device_by_name_and_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    assert runtime.choose_device("cpu") == torch.device("cpu")
    assert runtime.choose_device(torch.device("cpu")) == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for present in (True, False):
        monkeypatch.setattr(torch.cuda, "is_available", lambda present=present: present)
        assert runtime.choose_device().type == ("cuda" if present else "cpu")
        assert runtime.choose_device("auto") == runtime.choose_device(None)
    with pytest.raises(UsageError, match=r"torch sees 0 CUDA GPUs here; use cpu or auto"):
        runtime.choose_device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert runtime.choose_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(UsageError, match=r"cuda:2 asked for, but torch sees 2"):
        runtime.choose_device("cuda:2")


@pytest.mark.parametrize("name", ["gpu", "cuda:x", "", "tpu:0"])
def test_unknown_device(name: str) -> None:
    with pytest.raises(UsageError, match=r"device: unknown name .* known: auto, cpu, cuda, cuda:N"):
        runtime.choose_device(name)


def test_dtype_by_name_and_by_hardware(monkeypatch: pytest.MonkeyPatch) -> None:
    assert runtime.choose_dtype("bf16", "cpu") == torch.bfloat16
    assert runtime.choose_dtype(torch.float16, "cpu") == torch.float16
    for fast, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(runtime, "has_fast_bf16", lambda _, fast=fast: fast)
        assert runtime.choose_dtype(None, "cpu") == runtime.choose_dtype("auto", "cpu") == dtype
    with pytest.raises(UsageError, match=r"dtype: unknown name 'bfloat'; did you mean 'bfloat16'"):
        runtime.choose_dtype("bfloat", "cpu")
    with pytest.raises(UsageError, match=r"unknown name 'int8'"):
        runtime.choose_dtype(torch.int8, "cpu")


def test_threads_by_number_by_environment_and_by_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    monkeypatch.setattr(cores, "_chosen", None)
    monkeypatch.setenv("RAYON_NUM_THREADS", "1")
    try:
        assert runtime.set_threads(2) == torch.get_num_threads() == 2
        monkeypatch.setattr(runtime, "cpu_count", lambda: 3)
        monkeypatch.setenv("OMP_NUM_THREADS", "2")
        assert runtime.set_threads() == 2
        monkeypatch.delenv("OMP_NUM_THREADS")
        assert runtime.set_threads() == torch.get_num_threads() == 3
        assert cores.threads() == 3
        monkeypatch.setattr(runtime, "free_cores", lambda: 1)
        assert runtime.set_threads("auto") == torch.get_num_threads() == 1
        assert runtime.set_threads() == 3  # who asks from Python for all cores gets them
        assert runtime.set_threads("2") == cores.threads() == torch.get_num_threads() == 2
        with pytest.raises(UsageError, match=r"threads: a number from 1 to 1024 is wanted, or auto, not 0"):
            runtime.set_threads(0)
        assert cores.threads() == torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_more_threads_than_cores_are_a_warning_said_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    before = torch.get_num_threads()
    monkeypatch.setattr(cores, "_chosen", None)
    monkeypatch.setenv("RAYON_NUM_THREADS", "1")
    monkeypatch.setattr(runtime, "cpu_count", lambda: 2)
    monkeypatch.setattr(logging.getLogger("mixtral"), "handlers", [])  # pytest's too, once it does not propagate
    monkeypatch.setattr(logging.getLogger("mixtral"), "propagate", True)
    try:
        for _ in range(2):
            assert runtime.set_threads(3) == torch.get_num_threads() == 3
        runtime.set_threads(2)
    finally:
        torch.set_num_threads(before)
    assert caplog.messages == ["3 threads on 2 cores: they take turns, which is slower"]


def test_logging_says_each_line_once(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    ours = logging.getLogger("mixtral")
    monkeypatch.setattr(ours, "handlers", [])
    monkeypatch.setattr(ours, "propagate", True)
    monkeypatch.setattr(ours, "level", ours.level)
    log = logging.getLogger("mixtral.somewhere")
    setup_logging()
    log.info("hidden")
    log.warning("config.json: ignored unknown zebra")
    setup_logging(verbose=True)
    log.info("shown")
    wanted = "mixtral: warning: config.json: ignored unknown zebra\nINFO mixtral.somewhere: shown\n"
    assert capsys.readouterr().err == wanted


def test_environment_tells_versions_commit_and_hardware(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mixtral").mkdir()
    monkeypatch.setattr(runtime, "__file__", str(tmp_path / "mixtral/runtime.py"))
    found = runtime.environment()
    assert found["torch"] == torch.__version__ and found["threads"] == torch.get_num_threads()
    assert found["commit"] is None and found["dirty"] is False

    def git(*arguments: str) -> str:
        command = ["git", "-c", "user.name=t", "-c", "user.email=t@example.org", *arguments]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout.strip()

    git("init", "-q")
    (tmp_path / "file").write_text("one")
    git("add", "file")
    git("commit", "-qm", "first")
    found = runtime.environment()
    assert found["commit"] == git("rev-parse", "HEAD") and found["dirty"] is False
    (tmp_path / "file").write_text("two")
    assert runtime.environment()["dirty"] is True
