"""Every kind of run of the study trains, is measured and gets into the report; the parts by hand-computed cases."""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from corpus import build, split
from failures import PIECE, interleaved, shuffled
from figures import curve, mean_k, read_summaries, spread, training_flops
from measure import held_out, measure
from pace import measure_pace
from perform import finished, perform
from plan import BASE, SEEDS, Run, planned
from report import report
from run import Pace, study

from mixtral.data.store import NO_TARGET
from mixtral.errors import UsageError
from mixtral.model import Mixtral, initialise
from mixtral.tokenizer import load_tokenizer

SMALL = {"vocab_size": 320, "dim": 16, "n_heads": 2, "head_dim": 8}


def small(run: Run) -> Run:
    """The run with a model and batches small enough for a test."""
    shape = run.config.model.replace(**SMALL)
    config = run.config.replace(model=shape, steps=1, context=16, val_every=1, val_tokens=64, save_every=1)
    return dataclasses.replace(run, config=config)


@pytest.fixture(scope="module")
def runs(corpus: Path) -> dict[str, Run]:
    """Of the first seed, one of each sort; the others differ in names and numbers, checked as they are made."""
    made = [small(run) for run in planned(corpus, corpus.parent / "tokenizer", steps=500)]
    wanted = {BASE, "global 0.01", "threshold", "guided", "dense, equal total", "learned K"}
    return {run.kind.label: run for run in reversed(made) if run.kind.label in wanted}


def test_the_plan(corpus: Path) -> None:
    made = planned(corpus, corpus / "tokenizer", steps=500)
    assert len({run.name for run in made}) == len(made)
    active = {run.config.model.n_active_params() for run in made if run.kind.label != "dense, equal total"}
    assert max(active) / min(active) < 1.01
    by_label = {run.kind.label: run for run in made}
    whole = by_label["dense, equal total"].config.model.n_params()
    assert whole == pytest.approx(by_label[BASE].config.model.n_params(), rel=0.01)
    assert by_label["global 0.01"].cost == pytest.approx(by_label[BASE].cost * 4 / 3)
    assert [run.config.seed for run in made] == sorted(run.config.seed for run in made)
    assert sum(run.kind.label == BASE for run in made) == len(SEEDS)
    assert {run.kind.label for run in planned(corpus, corpus, 500, ("dense",))} == {
        BASE, "dense, equal active", "dense, equal total",
    }  # fmt: skip


@pytest.fixture(scope="module")
def folders(corpus: Path, runs: dict[str, Run], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Performed: OUT/runs/NAME."""
    out = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("measure.ROWS", 1)
        patch.setattr("mixtral.train.pretrain.PeakMatmul.measure", lambda *_: None)
        for run in runs.values():
            perform(run, out / "runs" / run.name, corpus, tokens=256)
    return out


def test_every_kind_is_trained_and_measured(folders: Path, runs: dict[str, Run]) -> None:
    for label, run in runs.items():
        folder = folders / "runs" / run.name
        summary = json.loads((folder / "summary.json").read_text())
        assert finished(folder, run) == summary and not (folder / "checkpoints").exists()
        assert [point["step"] for point in summary["trajectory"]] == [0, 1], label
        layers = summary["final"]["layers"]
        assert len(layers) == (0 if label.startswith("dense") else 3)
        for layer in layers:
            assert layer["token_information"] >= 0 and 0 <= layer["information"] <= layer["domain_entropy"] + 1e-9
            assert layer["domain_entropy"] == pytest.approx(2, abs=0.2)
        told = summary.get("failures", {})
        cases = {"plain", "joined", "mixed", "alone", "shuffled", "noise"} if "failure" in run.kind.groups else set()
        assert told.keys() == cases
        assert len({told[case]["targets"] for case in cases & {"plain", "joined", "mixed", "alone"}}) <= 1


def test_the_report_shows_every_kind(folders: Path, runs: dict[str, Run], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda _, path, dpi: path.write_text(str(dpi)))  # slow
    folder = report(folders)
    tables = (folder / "balancing_tables.md").read_text()
    assert all(f"| {label} | 1 |" in tables for label in runs)
    assert len(json.loads((folder / "balancing.json").read_text())) == len(runs)
    names = "objectives repetition domains dense experts failures"
    assert {path.stem for path in folder.glob("*.png")} == {f"balancing_{name}" for name in names.split()}


def test_the_pace_is_measured_once_and_told(
    folders: Path, runs: dict[str, Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pace.ROUNDS", 1)
    monkeypatch.setattr("pace.STEPS", 1)
    (tmp_path / "runs").symlink_to(folders / "runs")
    measure_pace(tmp_path, [runs[BASE], runs["dense, equal total"]])
    before = (tmp_path / "pace.json").read_text()
    measure_pace(tmp_path, [runs["guided"]])
    assert (tmp_path / "pace.json").read_text() == before
    seconds = {run["label"]: run.get("paced_seconds") for run in read_summaries(tmp_path)}
    assert seconds[BASE] == json.loads(before)[BASE] > 0 and seconds["guided"] is None  # runs of one step


def test_a_run_of_another_configuration_is_refused(folders: Path, runs: dict[str, Run]) -> None:
    run = runs[BASE]
    other = dataclasses.replace(run, config=run.config.replace(lr=1e-5))
    with pytest.raises(UsageError, match="is a run of another configuration; choose another --out"):
        finished(folders / "runs" / run.name, other)


def test_a_finished_run_is_not_done_again(folders: Path, runs: dict[str, Run], corpus: Path) -> None:
    folder = folders / "runs" / runs["guided"].name
    before = (folder / "summary.json").stat().st_mtime_ns
    assert perform(runs["guided"], folder, corpus, tokens=512)["label"] == "guided"
    assert (folder / "summary.json").stat().st_mtime_ns == before


def test_measuring_is_a_function_of_the_model(corpus: Path, runs: dict[str, Run]) -> None:
    tokenizer = load_tokenizer(corpus.parent / "tokenizer")
    model = initialise(Mixtral(runs[BASE].config.model), torch.Generator().manual_seed(0))
    batches = held_out(corpus, tokenizer, 512)
    first, again = (measure(model, batches) for _ in range(2))
    assert first == again
    assert first["loss"] == pytest.approx(sum(first["losses"].values()) / 4)
    assert all(sum(layer["load"]) == pytest.approx(1, abs=1e-4) for layer in first["layers"])


def test_what_is_held_out() -> None:
    texts = [f"{number:03} " + "x" * 96 for number in range(50)] + ["y" * 300]
    train, kept = split(texts, held_out_bytes=1000)
    assert sorted(train + kept) == sorted(texts) and sum(map(len, kept)) == 1000 and "y" * 300 in train
    assert split(texts[::-1], 1000) == (train, kept)


def test_a_corpus_that_is_there_stays(tmp_path: Path) -> None:
    (tmp_path / "corpus").mkdir()
    build(tmp_path / "corpus", 1000, 100)
    assert not list((tmp_path / "corpus").iterdir())


def test_pieces_of_the_domains_in_turn() -> None:
    a, b = (torch.full((2, PIECE), value) for value in (1, 2))
    tokens, targets = interleaved({"a": (a, a + 10), "b": (b, b + 10)})
    assert tokens[:, 0].tolist() == [1, 2, 1, 2] and targets[:, 0].tolist() == [11, 12, 11, 12]


def test_shuffled_tokens_have_what_follows_as_targets() -> None:
    tokens = torch.arange(24).view(2, 12)
    mixed, targets = shuffled(tokens)
    assert torch.equal(mixed.sort(1).values, tokens) and not torch.equal(mixed, tokens)
    assert torch.equal(targets[:, :-1], mixed[:, 1:]) and targets[:, -1].tolist() == [NO_TARGET] * 2


def test_the_budget(runs: dict[str, Run]) -> None:
    pace = Pace(time.monotonic() + 100)
    assert pace.allows(runs[BASE])  # nothing is known yet
    pace.add(runs[BASE], 60)
    assert pace.allows(runs[BASE]) and not pace.allows(runs["dense, equal total"])
    assert not Pace(time.monotonic() - 1).allows(runs[BASE])


def test_figures_by_hand() -> None:
    def run(loss: float, k: float) -> dict[str, Any]:
        model = {"dim": 2, "ffn_dim": 3, "n_layers": 5, "experts_per_token": 2}
        point = {"tokens": 10, "loss": loss}
        return {
            "model": model, "tokens": 100, "flops_per_token": 1000, "trajectory": [point],
            "final": {"loss": loss, "layers": [{"mean_k": k}, {"mean_k": k + 1}]},
        }  # fmt: skip

    two = [run(4.0, 2.0), run(3.0, 1.0)]
    assert spread(two, lambda summary: summary["final"]["loss"]) == (3.5, 0.5)
    assert curve(two, lambda point: point["loss"]) == ([10], [3.5])
    assert mean_k(two[0]) == 2.5
    assert training_flops(two[0]) == 100 * (1000 + 0.5 * 6 * 3 * 2 * 3 * 5)


def test_the_command_with_everything_done_only_reports(folders: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch,
                                                       capsys: pytest.CaptureFixture[str]) -> None:
    """No process is started: nothing is left to do within a budget of no minutes."""
    monkeypatch.setattr("run.prepare_corpus", lambda out, scale: corpus)  # noqa: ARG005
    options = argparse.Namespace(out=folders, quick=True, only=["dense"], jobs=1, budget_minutes=0)
    monkeypatch.setattr("run.planned", lambda *_: [])
    monkeypatch.setattr("run.report", lambda out: out / "report")
    assert study(options) == folders / "report"
    assert "0 runs, 0 of them done" in capsys.readouterr().out
