"""A run may be stopped anywhere and goes on as if nothing had happened."""

from __future__ import annotations

import itertools
import json
import math
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from mixtral.data.store import TokenData
from mixtral.errors import Interrupted
from mixtral.tokenizer import Tokenizer
from mixtral.train import loop as module
from mixtral.train.checkpoint import load_checkpoint
from mixtral.train.config import PretrainConfig
from mixtral.train.lines import read_lines
from mixtral.train.loop import Progress
from mixtral.train.metrics import MetricsLog, PeakMatmul
from mixtral.train.record import checkpoints
from mixtral.train.step import NonFiniteLoss, Validation
from tests.train.tiny_run import MakeRun, Watching, make_run, same, train_config, weights


class Killed(BaseException):
    """Stands for kill -9: nothing catches it."""


def kill_after(*steps: int) -> Watching:
    def at(step: int) -> None:
        if step in steps:
            raise Killed

    return Watching(at)


def ctrl_c_after(step: int) -> Watching:
    return Watching(lambda now: os.kill(os.getpid(), signal.SIGINT) if now == step else None)


def resume(
    run_in: MakeRun, folder: Path, config: PretrainConfig, view: Watching | None = None
) -> dict[str, torch.Tensor]:
    """Go on, as another process would, to the end; -> the weights."""
    run = run_in(folder, config, view)
    if found := checkpoints(folder):
        run.resume(found[-1])
    try:
        run.train()
    finally:
        run.writer.wait()
    return {name: p.detach().clone() for name, p in run.state.optimizer.params.items()}


class Whole(NamedTuple):
    """What an uninterrupted run leaves."""

    weights: dict[str, torch.Tensor]
    metrics: bytes


@pytest.fixture(scope="module")
def whole(data: TokenData, tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Whole]:
    """Each configuration's uninterrupted run, made once for all tests."""
    made: dict[PretrainConfig, Whole] = {}

    def run(config: PretrainConfig) -> Whole:
        if config not in made:
            folder = tmp_path_factory.mktemp("whole")
            weights = resume(lambda *a: make_run(a[0], a[1], data, tokenizer), folder, config)
            made[config] = Whole(weights, (folder / "metrics.jsonl").read_bytes())
        return made[config]

    return run


CONFIGS = [
    train_config(),
    train_config(dtype="bf16", accumulation=2),
    train_config(optimizer="muon", schedule="wsd", recompute=True),
]


@pytest.mark.parametrize("config", CONFIGS, ids=["fp32", "bf16 in two parts", "muon"])
def test_killed_and_resumed_is_bit_identical(run_in: MakeRun, tmp_path: Path, whole: Callable[..., Whole],
                                             config: PretrainConfig) -> None:
    for step in (1, 6):
        folder = tmp_path / f"killed-{step}"
        run = run_in(folder, config, kill_after(step))
        with pytest.raises(Killed):
            run.train()
        run.writer.wait()
        assert same(resume(run_in, folder, config), whole(config).weights), step
        assert (folder / "metrics.jsonl").read_bytes() == whole(config).metrics, step


def test_killed_again_and_again(run_in: MakeRun, tmp_path: Path) -> None:
    config = train_config(steps=5, save_every=1, keep=1)
    whole = resume(run_in, tmp_path / "whole", config)
    for step in range(1, 5):
        with pytest.raises(Killed):
            resume(run_in, tmp_path / "killed", config, kill_after(step))
    assert same(resume(run_in, tmp_path / "killed", config), whole)
    assert (tmp_path / "killed/metrics.jsonl").read_bytes() == (tmp_path / "whole/metrics.jsonl").read_bytes()


def test_going_on_from_an_earlier_checkpoint(run_in: MakeRun, tmp_path: Path) -> None:
    """The later ones must not be taken for the new run's, even when that is killed too."""
    config = train_config(keep=1)
    whole = resume(run_in, tmp_path, config.replace(keep=9))
    metrics = (tmp_path / "metrics.jsonl").read_bytes()
    run = run_in(tmp_path, config, kill_after(9))
    run.resume(tmp_path / "checkpoints/step_000004")
    assert [path.name for path in checkpoints(tmp_path)] == ["step_000000", "step_000004"]
    with pytest.raises(Killed):
        run.train()
    run.writer.wait()
    assert [path.name for path in checkpoints(tmp_path)] == ["step_000008"]
    assert same(resume(run_in, tmp_path, config), whole) and (tmp_path / "metrics.jsonl").read_bytes() == metrics


def test_killed_before_the_first_checkpoint(run_in: MakeRun, tmp_path: Path, whole: Callable[..., Whole],
                                            monkeypatch: pytest.MonkeyPatch) -> None:
    config = train_config()
    run = run_in(tmp_path / "killed", config, kill_after(2))
    with monkeypatch.context() as patch:
        patch.setattr(run.writer, "save", lambda *_: None)
        with pytest.raises(Killed):
            run.train()
    assert len(read_lines(tmp_path / "killed/metrics.jsonl")) == 3
    assert same(resume(run_in, tmp_path / "killed", config), whole(config).weights)
    assert (tmp_path / "killed/metrics.jsonl").read_bytes() == whole(config).metrics


@pytest.mark.parametrize("step", [2, 4])
def test_ctrl_c_leaves_a_checkpoint_of_the_step(run_in: MakeRun, tmp_path: Path, whole: Callable[..., Whole],
                                                step: int) -> None:
    config = train_config()
    folder = tmp_path / "stopped"
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(Interrupted) as caught:
        run_in(folder, config, ctrl_c_after(step)).train()
    assert str(caught.value) == f"stopped after step {step}; go on with: mixtral train --resume {folder}"
    assert caught.value.exit_code == 130 and signal.getsignal(signal.SIGINT) is before
    assert checkpoints(folder)[-1].name == f"step_{step:06d}"
    assert same(resume(run_in, folder, config), whole(config).weights)
    assert (folder / "metrics.jsonl").read_bytes() == whole(config).metrics


def test_ctrl_c_before_the_first_step(run_in: MakeRun, tmp_path: Path, whole: Callable[..., Whole],
                                      monkeypatch: pytest.MonkeyPatch) -> None:
    """During the first validation: it is kept, and no step follows."""
    config, folder = train_config(), tmp_path / "stopped"
    run = run_in(folder, config)
    validate = run._validate

    def interrupted(log: MetricsLog) -> Validation:
        signal.raise_signal(signal.SIGINT)
        return validate(log)

    monkeypatch.setattr(run, "_validate", interrupted)
    with pytest.raises(Interrupted) as caught:
        run.train()
    assert str(caught.value) == f"stopped before the first step; go on with: mixtral train --resume {folder}"
    assert [path.name for path in checkpoints(folder)] == ["step_000000"]
    assert same(resume(run_in, folder, config), whole(config).weights)
    assert (folder / "metrics.jsonl").read_bytes() == whole(config).metrics


def test_ctrl_c_at_the_last_step_ends_the_run_as_usual(run_in: MakeRun, tmp_path: Path) -> None:
    config = train_config(steps=3)
    run = run_in(tmp_path, config, ctrl_c_after(3))
    run.train()
    assert run.progress.step == 3


def test_a_second_ctrl_c_stops_at_once(run_in: MakeRun, tmp_path: Path) -> None:
    def twice(step: int) -> None:
        if step == 2:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

    run = run_in(tmp_path, train_config(), Watching(twice))
    with pytest.raises(KeyboardInterrupt):
        run.train()
    run.writer.wait()
    assert run.progress.step == 2 and checkpoints(tmp_path)[-1].name == "step_000000"


def test_training_in_a_thread_leaves_signals_alone(run_in: MakeRun, tmp_path: Path) -> None:
    run = run_in(tmp_path, train_config(steps=1))
    thread = threading.Thread(target=run.train)
    thread.start()
    thread.join()
    assert run.progress.step == 1


# -- what a run writes -------------------------------------------------------------------------------------------------


def test_lines_of_metrics(run_in: MakeRun, tmp_path: Path) -> None:
    config = train_config()
    run = run_in(tmp_path, config)
    last = run.train()
    lines = read_lines(tmp_path / "metrics.jsonl")
    steps = [line for line in lines if "lr" in line]
    validations = [line for line in lines if "val_cross_entropy" in line]
    assert [line["step"] for line in steps] == list(range(1, 11)) and steps[-1]["tokens"] == 10 * 128
    assert [line["step"] for line in validations] == [0, 4, 8, 10]
    assert [line["step"] for line in steps if "layers" in line] == [5, 10]
    assert validations[-1] == {"step": 10, "val_cross_entropy": last.cross_entropy,
                               "val_bits_per_byte": last.bits_per_byte, "val_loads": last.loads}  # fmt: skip
    assert {"cross_entropy", "micro_batch", "z_loss", "grad_norm"} < set(steps[0])
    assert run.progress.start_loss == validations[0]["val_cross_entropy"]
    assert last.cross_entropy < 0.9 * run.progress.start_loss


def test_times_stand_apart(run_in: MakeRun, tmp_path: Path) -> None:
    run_in(tmp_path, train_config(steps=3)).train()
    assert "second" not in (tmp_path / "metrics.jsonl").read_text()
    timings = read_lines(tmp_path / "timings.jsonl")
    assert [line["step"] for line in timings] == [1, 2, 3] and all(line["tokens_per_second"] > 0 for line in timings)
    assert all(line["memory_bytes"] > 0 and "share_of_peak" not in line for line in timings)


def test_steps_as_a_share_of_the_peak_matmul(run_in: MakeRun, tmp_path: Path) -> None:
    config = train_config(steps=2)
    run = run_in(tmp_path, config)
    run.peak_matmul = PeakMatmul(1e9, "float32")
    run.train()
    rate, *timings = read_lines(tmp_path / "timings.jsonl")
    assert rate == {"step": 0, "peak_matmul": 1e9, "peak_matmul_dtype": "float32", "threads": 1}
    for line in timings:
        flops = line["tokens_per_second"] * config.model.flops_per_token(32, backward=True)
        assert line["share_of_peak"] == pytest.approx(flops / 1e9, rel=1e-2)


def test_bits_a_byte_of_a_step_are_those_of_its_targets(run_in: MakeRun, tmp_path: Path) -> None:
    config = train_config(steps=1, accumulation=2)
    run = run_in(tmp_path, config)
    run.train()
    line = next(line for line in read_lines(tmp_path / "metrics.jsonl") if "lr" in line)
    targets = [t for part in (0, 1) for t in run.loader.batch(0, part, 2).targets_T.tolist() if t != -100]
    n_bytes = sum(int(run.byte_lengths_V[t]) for t in targets)
    assert line["bits_per_byte"] == pytest.approx(line["cross_entropy"] * len(targets) / math.log(2) / n_bytes)


def test_routing_statistics_are_of_the_step(run_in: MakeRun, tmp_path: Path) -> None:
    run_in(tmp_path, train_config(steps=2, stats_every=1)).train()
    for line, layer in itertools.product(read_lines(tmp_path / "metrics.jsonl"), range(2)):
        if "layers" in line:
            assert sum(line["layers"][layer]["load"]) == pytest.approx(1, abs=1e-5)


def test_the_best_checkpoint_is_kept(run_in: MakeRun, tmp_path: Path) -> None:
    """After step 5 the model is spoilt at every step, so that no later validation beats the one of step 4."""
    config = train_config(steps=14, save_every=2, val_every=2, keep=1, lr=1e-2)
    run = run_in(tmp_path, config)
    ruined = Watching(lambda step: run.model.output_weight.data.zero_() if step >= 5 else None)
    run.display = ruined
    run.train()
    losses = {step: v.cross_entropy for step, v in ruined.validations if step}
    best = min(losses, key=losses.__getitem__)
    assert run.progress.best_step == best == 4 and run.progress.best_loss == losses[best]
    assert [path.name for path in checkpoints(tmp_path)] == ["step_000004", "step_000014"]


@pytest.mark.parametrize(("val_every", "spoilt_after", "best"), [(4, 4, 4), (5, 5, 5), (1, 7, 4)])
def test_the_best_validation_is_saved_as_well(run_in: MakeRun, tmp_path: Path, val_every: int, spoilt_after: int,
                                              best: int) -> None:
    """None of these steps is due. Of validations at every step, those under half of save_every apart are not saved."""
    run = run_in(tmp_path, train_config(steps=9, save_every=8, val_every=val_every, keep=1))
    run.display = Watching(lambda step: run.model.output_weight.data.zero_() if step > spoilt_after else None)
    run.train()
    assert run.progress.best_step == best
    assert [path.name for path in checkpoints(tmp_path)] == [f"step_{best:06d}", "step_000009"]


def test_a_finished_run_only_validates(run_in: MakeRun, tmp_path: Path) -> None:
    config = train_config(steps=2)
    first = run_in(tmp_path, config)
    last = first.train()
    before = (tmp_path / "metrics.jsonl").read_bytes()
    run = run_in(tmp_path, config)
    run.resume(checkpoints(tmp_path)[-1])
    assert run.train() == last and same(weights(run.model), weights(first.model))
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_a_failed_checkpoint_is_told_and_the_run_goes_on(run_in: MakeRun, tmp_path: Path,
                                                         monkeypatch: pytest.MonkeyPatch) -> None:
    import torch.distributed.checkpoint as dcp

    real = dcp.save

    def full(*arguments: object, **options: object) -> object:
        if view.losses:
            raise OSError(28, "No space left on device")
        return real(*arguments, **options)  # type: ignore[arg-type]

    view = Watching()
    run = run_in(tmp_path, train_config(), view)
    start_writing = run.writer.save
    monkeypatch.setattr(dcp, "save", full)
    monkeypatch.setattr(run.writer, "save", lambda *a: (start_writing(*a), run.writer.wait()))
    run.train()
    assert run.progress.step == 10 and [path.name for path in checkpoints(tmp_path)] == ["step_000000"]
    assert len(view.said) == 3 and all("No space left on device" in line for line in view.said)


@pytest.mark.parametrize(("saved", "told"), [
    (True, "stopped after step 2, which is not saved; the last whole checkpoint is step_000000; go on with: "),
    (False, "stopped after step 2, with no checkpoint; go on with: "),
])
def test_ctrl_c_whose_checkpoint_fails(run_in: MakeRun, tmp_path: Path, saved: bool, told: str,
                                       monkeypatch: pytest.MonkeyPatch) -> None:
    import torch.distributed.checkpoint as dcp

    real, view = dcp.save, ctrl_c_after(2)

    def full(*arguments: object, **options: object) -> object:
        if view.losses or not saved:
            raise OSError(28, "No space left on device")
        return real(*arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(dcp, "save", full)
    with pytest.raises(Interrupted) as caught:
        run_in(tmp_path, train_config(), view).train()
    assert str(caught.value) == f"{told}mixtral train --resume {tmp_path}"
    assert any("No space left on device" in line for line in view.said)


def test_nothing_is_being_written_once_an_error_arrives(run_in: MakeRun, tmp_path: Path,
                                                        monkeypatch: pytest.MonkeyPatch) -> None:
    import torch.distributed.checkpoint as dcp

    real = dcp.save

    def slow(*arguments: object, **options: object) -> object:
        time.sleep(0.2)
        return real(*arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(dcp, "save", slow)
    with pytest.raises(Killed):
        run_in(tmp_path, train_config(), kill_after(1)).train()
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_000000"]


def test_a_non_finite_loss_leaves_the_last_checkpoint(run_in: MakeRun, tmp_path: Path) -> None:
    run = run_in(tmp_path, train_config())
    run.display = Watching(lambda step: run.model.norm.weight.data.fill_(float("nan")) if step == 6 else None)
    with pytest.raises(NonFiniteLoss, match=r"^step 7: cross_entropy is nan"):
        run.train()
    run.writer.wait()
    fresh = run_in(tmp_path, train_config())
    assert load_checkpoint(checkpoints(tmp_path)[-1], fresh.state)["step"] == 4
    assert all(p.isfinite().all() for p in fresh.model.parameters())


def saved(folder: Path) -> list[str]:
    return [path.name for path in checkpoints(folder)]


@pytest.mark.parametrize("bad", ["nan", "inf"])
def test_a_validation_that_is_not_finite_is_no_best_one_and_stops_the_run(run_in: MakeRun, tmp_path: Path,
                                                                          monkeypatch: pytest.MonkeyPatch,
                                                                          bad: str) -> None:
    config = train_config(val_every=1, save_every=1, steps=4, keep=1)
    run, real = run_in(tmp_path, config), module.validate

    def broken(*arguments: Any) -> Validation:
        result = real(*arguments)
        return result._replace(cross_entropy=float(bad)) if run.progress.step == 3 else result

    monkeypatch.setattr(module, "validate", broken)
    with pytest.raises(NonFiniteLoss, match=rf"^step 3: the cross_entropy of the validation is {bad}; [^\n]+$"):
        run.train()
    assert saved(tmp_path) == ["step_000002"] and bad not in (tmp_path / "metrics.jsonl").read_text().lower()
    monkeypatch.undo()
    resume(run_in, tmp_path, config)
    assert saved(tmp_path) == ["step_000004"]


def test_weights_that_are_not_finite_are_not_saved(run_in: MakeRun, tmp_path: Path) -> None:
    """Validations are rarer than checkpoints, and the loss of the step was taken before its update."""
    config = train_config(val_every=4, save_every=2, keep=1)
    run = run_in(tmp_path, config)
    run.display = Watching(lambda step: run.model.norm.weight.data.fill_(float("inf")) if step == 2 else None)
    with pytest.raises(NonFiniteLoss, match=r"^step 2: norm\.weight is not finite, and not saved; lower the"):
        run.train()
    assert saved(tmp_path) == ["step_000000"]
    resume(run_in, tmp_path, config)


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_progress_writes_no_number_that_json_has_not(loss: float) -> None:
    text = json.dumps(Progress(2, 1, loss).to_dict(), allow_nan=False)
    assert Progress.from_dict(json.loads(text)) == Progress(2, 1)


@pytest.mark.parametrize("progress", [Progress(), Progress(8, 4, 2.5, 5.7)])
def test_progress_passes_through_json_values(progress: Progress) -> None:
    assert Progress.from_dict(progress.to_dict()) == progress
