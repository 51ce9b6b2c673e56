"""`mixtral runs`: the table, the JSON and the plot of runs in any state."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mixtral.cli import main
from mixtral.presets import preset
from mixtral.train.compare import figure_of
from mixtral.train.config import PretrainConfig
from mixtral.train.run_folder import begin

LAYER = {"load": [0.5, 0.5], "max_over_mean": 1.0, "gini": 0.1, "entropy": 0.9, "repeats": 0.1, "dead": 1}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run of two steps of 4 x 256 tokens that logged by hand-written lines."""
    folder = tmp_path / "run"
    begin(PretrainConfig(model=preset("tiny"), rows=4, context=256, steps=9), folder)
    metrics = [
        {"step": 0, "val_cross_entropy": 7.0, "val_bits_per_byte": 3.0},
        {"step": 1, "tokens": 1024, "cross_entropy": 6.5, "layers": [LAYER, LAYER | {"gini": 0.3}]},
        {"step": 2, "tokens": 2048, "cross_entropy": 6.0},
        {"step": 2, "val_cross_entropy": 7.5, "val_bits_per_byte": 3.2},
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics))
    times = [
        {"step": 0, "peak_matmul": 1e9, "peak_matmul_dtype": "float32"},
        {"step": 1, "tokens_per_second": 100.0, "share_of_peak": 0.2, "memory_bytes": 3 * 10**9},
        {"step": 2, "tokens_per_second": 300.0, "share_of_peak": 0.4, "memory_bytes": 2 * 10**9},
    ]
    (folder / "timings.jsonl").write_text("".join(json.dumps(line) + "\n" for line in times))
    return folder


def test_figures(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["runs", str(run), "--json"]) == 0
    (figures,) = json.loads(capsys.readouterr().out)
    assert figures["parameters"] == preset("tiny").n_params()
    wanted = {"step": 2, "steps": 9, "tokens": 2048, "cross_entropy": 6.0, "val_cross_entropy": 7.5, "gini": 0.3}
    assert wanted.items() <= figures.items()
    assert (figures["best_val_cross_entropy"], figures["best_val_bits_per_byte"]) == (7.0, 3.0)
    assert (figures["max_over_mean"], figures["dead"]) == (1.0, 2)
    assert (figures["tokens_per_second"], figures["memory_bytes"]) == (200.0, 3 * 10**9)
    assert figures["share_of_peak"] == pytest.approx(0.3)


def test_a_validation_that_is_not_finite(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In the log of an earlier version: it is never the best, and no NaN is printed, which JSON has not."""
    lines = (run / "metrics.jsonl").read_text()
    bad = '{"step": %d, "val_cross_entropy": NaN, "val_bits_per_byte": NaN}\n'
    (run / "metrics.jsonl").write_text(bad % 0 + lines + bad % 2)
    assert main(["runs", str(run), "--json"]) == 0
    out = capsys.readouterr().out
    (figures,) = json.loads(out)
    assert "NaN" not in out and figures["val_cross_entropy"] is None and figures["best_val_cross_entropy"] == 7.0


def test_the_table_has_a_run_on_a_line(run: Path, capsys: pytest.CaptureFixture[str],
                                                      monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.chdir(run.parent)
    assert main(["runs", "run"]) == 0
    head, row = capsys.readouterr().out.splitlines()
    assert head.split() == "run size step loss val b/B tok/s matmul mem max dead".split()
    assert row.split()[2:] == "2/9 6.000 7.000 3.000 200 30% 3.0GB 1.00 2".split()


def test_runs_from_before_these_figures_were_logged(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "timings.jsonl").write_text('{"step": 1, "tokens_per_second": 50.0}\n')
    assert main(["runs", str(run), "--json"]) == 0
    (figures,) = json.loads(capsys.readouterr().out)
    assert (figures["tokens_per_second"], figures["share_of_peak"], figures["memory_bytes"]) == (50.0, None, None)


def test_a_run_that_has_logged_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    begin(PretrainConfig(model=preset("tiny")), tmp_path / "new")
    assert main(["runs", str(tmp_path / "new")]) == 0
    assert "0/1000" in capsys.readouterr().out


def test_plot(run: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    assert main(["runs", str(run), "--plot", str(tmp_path / "curves.png")]) == 0
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_a_plot_takes_the_place_of_a_plot_alone(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    figure = pytest.importorskip("matplotlib.figure").Figure()
    path = tmp_path / "curves.png"
    for _ in range(2):
        assert main(["runs", str(run), "--plot", str(path)]) == 0
    figure.savefig(path)
    (tmp_path / "notes.pdf").write_text("precious")
    capsys.readouterr()
    for name, message in (("curves.png", "is no plot of runs; name another file"), ("notes.pdf", "ends in .png")):
        before = (tmp_path / name).read_bytes()
        assert main(["runs", str(run), "--plot", str(tmp_path / name)]) == 2
        out, err = capsys.readouterr()
        assert (tmp_path / name).read_bytes() == before and out == "" and message in err and err.count("\n") == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["curves.png", "notes.pdf", "run"]


def test_what_is_no_run_is_named_and_left_out(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "notes.txt").write_text("")
    (tmp_path / "empty").mkdir()
    others = [str(tmp_path / name) for name in ("empty", "notes.txt", "nothere")]
    assert main(["runs", *others, str(run), "--json"]) == 0
    out, err = capsys.readouterr()
    assert [figures["name"] for figures in json.loads(out)] == [str(run)]
    reasons = ("it has no config.json", "it is a file", "no such folder")
    lines = [f"left out: {name} is not a training run: {why}" for name, why in zip(others, reasons, strict=True)]
    assert err.splitlines() == lines
    assert main(["runs", *others]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.splitlines() == [*lines, "mixtral: none of these 3 is a training run"]
    assert main(["runs", others[2]]) == 2
    assert capsys.readouterr().err == f"mixtral: {others[2]} is not a training run: no such folder\n"


def test_errors(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["runs", str(tmp_path)]) == 2
    assert "is not a training run" in capsys.readouterr().err
    pytest.importorskip("matplotlib")
    assert main(["runs", str(run), "--plot", str(tmp_path / "no" / "curves.png")]) == 1
    assert "cannot write" in capsys.readouterr().err


def test_the_fields_in_which_runs_differ(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wide = preset("tiny").replace(dim=256)
    begin(PretrainConfig(model=wide, rows=4, context=256, steps=9, lr=2e-3), tmp_path / "wide")
    assert main(["runs", str(run), str(run)]) == 0
    assert "They differ in" not in capsys.readouterr().out
    assert main(["runs", str(run), str(tmp_path / "wide")]) == 0
    out = capsys.readouterr().out
    _, _, told = out.partition("They differ in")
    assert [line.split() for line in told.splitlines()[1:]] == [
        ["field", "run", "wide"], ["lr", "0.001", "0.002"], ["model.dim", "128", "256"],
    ]  # fmt: skip


def test_a_plot_of_runs_of_two_vocabularies_is_in_bits_a_byte(run: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    other = tmp_path / "other"
    begin(PretrainConfig(model=preset("tiny").replace(vocab_size=2048), rows=4, context=256, steps=9), other)
    for name in ("metrics", "timings"):
        (other / f"{name}.jsonl").write_bytes((run / f"{name}.jsonl").read_bytes())
    loss, *_ = figure_of([run, run]).axes
    assert loss.get_ylabel() == "nats a token" and len(loss.lines) == 4
    loss, *_ = figure_of([run, other]).axes
    assert loss.get_ylabel() == "bits a byte"
    assert [list(line.get_ydata()) for line in loss.lines] == [[3.0, 3.2], [3.0, 3.2]]
