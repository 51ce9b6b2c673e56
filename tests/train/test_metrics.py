"""JSON lines that survive kills, with results apart from times."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from mixtral.errors import MixtralError
from mixtral.train import metrics
from mixtral.train.lines import read_lines
from mixtral.train.metrics import MetricsLog, PeakMatmul


def test_lines_come_back_as_written(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, 0)
    lines = [{"step": 0, "loss": 0.1 + 0.2}, {"step": 1, "loss": 1e-300}]
    for line in lines:
        log.write("metrics", line)
    log.write("timings", {"step": 1, "seconds": 2.0})
    assert read_lines(tmp_path / "metrics.jsonl") == lines
    assert read_lines(tmp_path / "timings.jsonl") == [{"step": 1, "seconds": 2.0}]


def test_a_figure_that_is_not_finite_is_null(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, 0)
    layer = {"max_over_mean": 1.0, "gini": 0.0, "dead": 0, "entropy": math.nan, "output_norms": [math.inf, 1.0]}
    log.write("metrics", {"step": 1, "layers": [layer]})
    (line,) = read_lines(tmp_path / "metrics.jsonl")
    assert line["layers"] == [{**layer, "entropy": None, "output_norms": [None, 1.0]}]


def test_lines_of_later_steps_are_dropped(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, 0)
    for step in range(6):
        log.write("metrics", {"step": step, "loss": 1 / (step + 1)})
        log.write("timings", {"step": step, "seconds": 1.0})
    whole = (tmp_path / "metrics.jsonl").read_text()
    log = MetricsLog(tmp_path, 3)
    for name in ("metrics", "timings"):
        assert [line["step"] for line in read_lines(tmp_path / f"{name}.jsonl")] == [0, 1, 2, 3]
    for step in (4, 5):
        log.write("metrics", {"step": step, "loss": 1 / (step + 1)})
    assert (tmp_path / "metrics.jsonl").read_text() == whole


def test_opening_where_it_stopped_keeps_every_byte(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, 0)
    log.write("metrics", {"step": 2, "loss": 2 / 3, "loads": [[0.1, 1e-7]]})
    before = (tmp_path / "metrics.jsonl").read_bytes()
    MetricsLog(tmp_path, 2)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize("cut", ['{"step": 2, "lo', '{"step": 2}'[:-1], "{", '"'])
def test_a_cut_off_last_line_is_ignored(tmp_path: Path, cut: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n' + cut)
    assert read_lines(path) == [{"step": 1}]
    MetricsLog(tmp_path, 2).write("metrics", {"step": 2})
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'


def test_no_file_yet(tmp_path: Path) -> None:
    MetricsLog(tmp_path, 0)
    assert list(tmp_path.iterdir()) == []


def test_a_line_that_cannot_be_written_is_told_in_one_line(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "missing", 0)
    with pytest.raises(MixtralError, match=r"^cannot write [^\n]*metrics.jsonl: No such file or directory$"):
        log.write("metrics", json.loads('{"step": 1}'))


@pytest.mark.parametrize(("dtype", "rate"), [
    (torch.float32, PeakMatmul(5e9, "float32")), (torch.bfloat16, PeakMatmul(9e9, "bfloat16")),
    (torch.float16, PeakMatmul(5e9, "float32")),
])
def test_the_peak_matmul_is_the_faster_one(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype,
                                           rate: PeakMatmul) -> None:
    """And measuring leaves the global draws as they were."""

    def measure(kind: torch.dtype, device: torch.device) -> float:
        torch.randn(3, device=device)
        return {torch.float32: 5e9, torch.bfloat16: 9e9, torch.float16: 1e9}[kind]

    monkeypatch.setattr(metrics, "measure_matmul", measure)
    before = torch.get_rng_state()
    assert PeakMatmul.measure(dtype, torch.device("cpu")) == rate
    assert torch.equal(torch.get_rng_state(), before)
