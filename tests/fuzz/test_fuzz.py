"""A fixed sample of the damaged files that `make soak` loads, and the harness's own judgement."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from mixtral.errors import MixtralError
from tests.fuzz.harness import MOST_MEMORY, run
from tests.fuzz.mutate import ABSURD, damaged, dumped
from tests.fuzz.samples import Sample, make_samples


def test_damaged_files_load_or_are_refused_in_one_line(tmp_path: Path) -> None:
    samples = make_samples(tmp_path / "samples")
    outcomes = list(run(samples, 1, range(300), tmp_path / "work"))
    assert [outcome.number for outcome in outcomes] == list(range(300))
    assert {outcome.format for outcome in outcomes} == set(samples)
    bad = [outcome for outcome in outcomes if outcome.verdict not in ("accepted", "refused")]
    assert not bad, "\n".join(map(str, bad))
    assert sum(outcome.verdict == "accepted" for outcome in outcomes) > 30  # damage is not always harm


def _raise(error: BaseException) -> None:
    raise error


HARM: dict[str, tuple[Callable[[Path], object], str]] = {
    "accepted": (lambda _: None, "accepted"),
    "refused": (lambda _: _raise(MixtralError("a: wrong")), "refused"),
    "long": (lambda _: _raise(_unchecked("x " * 300)), "says no short line"),
    "two lines": (lambda _: _raise(_unchecked("x\ny")), "says no short line"),
    "traceback": (lambda _: _raise(KeyError("a")), "raises KeyError"),
    "panic": (lambda _: _raise(BaseException("a")), "raises BaseException"),
    "crash": (lambda _: os.kill(os.getpid(), signal.SIGKILL), "dies"),
    "memory": (lambda _: torch.ones(MOST_MEMORY // 3), "raises RuntimeError"),
    "after a death": (lambda _: None, "accepted"),
    "panic of a library": (lambda _: os.write(2, b"thread panicked") and None, "writes to standard error"),
    "loop": (lambda _: _spin(0.3), "takes"),
    "hang": (lambda _: time.sleep(60), "hangs"),
}


def _unchecked(message: str) -> MixtralError:
    error = MixtralError("")
    error.args = (message,)
    return error


def _spin(seconds: float) -> None:
    start = time.process_time()
    while time.process_time() - start < seconds:
        pass


def test_every_kind_of_harm_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.fuzz.harness.LONGEST", 0.2)
    monkeypatch.setattr("tests.fuzz.harness._PATIENCE", 5.0)
    (tmp_path / "sample").mkdir()
    (tmp_path / "sample/a").write_text("content")
    samples = {name: Sample(tmp_path / "sample", "a", "bytes", load) for name, (load, _) in HARM.items()}
    found = {outcome.format: outcome.verdict for outcome in run(samples, 0, range(len(HARM)), tmp_path / "work")}
    assert found.keys() == HARM.keys()
    assert all(found[name].startswith(verdict) for name, (_, verdict) in HARM.items()), found


def test_a_case_follows_from_seed_and_number() -> None:
    import random

    content = json.dumps({"a": [1, 2, {"b": "text"}], "c": 1.5}).encode()
    for kind in ("json", "lines", "safetensors", "zip", "protobuf", "gguf", "bytes"):
        first = [damaged(content, kind, random.Random(f"3/{n}")) for n in range(50)]
        assert first == [damaged(content, kind, random.Random(f"3/{n}")) for n in range(50)]
        assert len(set(first)) > 25


def test_marks_become_text_that_json_does_not_write() -> None:
    text = dumped(ABSURD)
    assert b"[[[[" in text and b"0" * 400 in text and b"@" not in text and b"\\ud800" in text
