"""How many threads a run computes with: the choice by an injected clock, the record, and what a slow run is told."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from mixtral import cores, runtime
from mixtral.errors import ConfigError, MixtralError, UsageError
from mixtral.train import pretrain as pretraining
from mixtral.train import threads as module
from mixtral.train.config import PretrainConfig
from mixtral.train.lines import read_lines
from mixtral.train.metrics import PeakMatmul
from mixtral.train.pretrain import pretrain
from mixtral.train.record import checkpoints, recorded_config, recorded_threads
from mixtral.train.run_folder import begin
from mixtral.train.threads import (
    WINDOW,
    Pace,
    ThreadWatch,
    choose_threads,
    counts_to_try,
    fewest_of_the_fastest,
    measure_rates,
    measure_training,
    rates_text,
)
from tests.train.tiny_run import MakeRun, Watching, train_config


@pytest.fixture(autouse=True)
def _threads_are_put_back(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    before = torch.get_num_threads()
    monkeypatch.setattr(cores, "_chosen", None)
    monkeypatch.setenv("RAYON_NUM_THREADS", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "")  # nobody has asked for a number
    monkeypatch.setattr(pretraining, "keep_freed_memory", lambda: None)
    monkeypatch.setattr(PeakMatmul, "measure", lambda *_: PeakMatmul(1e12, "float32"))
    for users in (module, pretraining, runtime):
        monkeypatch.setattr(users, "cpu_count", lambda: 2)
    yield
    torch.set_num_threads(before)


def measured(monkeypatch: pytest.MonkeyPatch, rates: dict[int, float]) -> None:
    monkeypatch.setattr(module, "measure_training", lambda _, counts: {count: rates[count] for count in counts})


# -- measuring ---------------------------------------------------------------------------------------------------------


class Clock:
    """Time passes when `work` says so."""

    def __init__(self, seconds: dict[int, list[float]]) -> None:
        self.seconds, self.now, self.order = {n: iter(s) for n, s in seconds.items()}, 0.0, list[int]()

    def __call__(self) -> float:
        return self.now

    def work(self, threads: int) -> int:
        self.now += next(self.seconds[threads])
        self.order.append(threads)
        return 100


def test_rates_are_medians_of_rounds_in_turn_the_first_not_counted() -> None:
    clock = Clock({1: [0.2, 0.1, 0.2, 0.05], 2: [0.1, 0.1, 0.05, 0.3]})  # the fourth round ends after the budget
    assert measure_rates(clock.work, (1, 2), clock) == pytest.approx({1: 100 / 0.1, 2: 100 / 0.1})
    assert clock.order == [1, 2] * 4


def test_measuring_ends_soon() -> None:
    slow = Clock({1: [5.0] * 2, 2: [5.0] * 2})
    assert measure_rates(slow.work, (1, 2), slow) == {1: 20.0, 2: 20.0}
    assert slow.order == [1, 2]  # what warms up is all there is, then
    fast = Clock({1: [1e-6] * 99})
    measure_rates(fast.work, [1], fast)
    assert len(fast.order) == 1 + module.MOST_ROUNDS


@pytest.mark.parametrize(
    ("rates", "threads"),
    [({1: 100.0, 2: 190.0}, 2), ({1: 100.0, 2: 30.0}, 1), ({1: 100.0, 2: 104.0}, 1), ({1: 5.0, 4: 9.6, 8: 10.0}, 4)],
)
def test_the_fewest_threads_that_are_fast_enough(rates: dict[int, float], threads: int) -> None:
    assert fewest_of_the_fastest(rates) == threads


def test_one_some_and_all_are_tried() -> None:
    assert [counts_to_try(cores) for cores in (1, 2, 3, 8, 64)] == [[1], [1, 2], [1, 2, 3], [1, 4, 8], [1, 32, 64]]


@pytest.mark.parametrize("changes", [{}, {"dtype": "bf16", "optimizer": "muon", "rows": 1, "context": 3}])
def test_measuring_leaves_torch_as_it_was(changes: dict[str, Any]) -> None:
    config = train_config({"router": "noisy"}, balance=("micro_batch?layers=1&weight=0.1",), **changes)
    torch.set_num_threads(1)
    state = torch.get_rng_state()
    rates = measure_training(config, [1, 2])
    assert rates.keys() == {1, 2} and min(rates.values()) > 0
    assert torch.get_num_threads() == 1 and torch.equal(torch.get_rng_state(), state)


# -- the choice --------------------------------------------------------------------------------------------------------


def test_the_choice_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    measured(monkeypatch, {1: 5300.0, 2: 9100.4})
    view = Watching()
    assert choose_threads(train_config(), view) == 2
    assert view.said == ["threads: 2; measured now on one layer: 1 thread 5,300 tok/s, 2 threads 9,100"]
    assert rates_text({3: 1.0}) == "3 threads 1 tok/s"


def test_nothing_is_measured_where_it_is_no_question(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "measure_training", None)
    view = Watching()
    monkeypatch.setattr(module, "MOST_PARAMETERS", 1000)
    assert choose_threads(train_config(), view) == 2  # a model too large to try
    monkeypatch.undo()
    monkeypatch.setattr(module, "measure_training", None)
    monkeypatch.setattr(module, "cpu_count", lambda: 1)
    assert choose_threads(train_config(), view) == 1
    monkeypatch.setattr(module, "cpu_count", lambda: 4)
    monkeypatch.setattr(module, "choose_device", lambda _: torch.device("cuda"))
    assert choose_threads(train_config(), view) == 4 and view.said == []


# -- the record --------------------------------------------------------------------------------------------------------


def config_of(corpus: Path, **changes: Any) -> PretrainConfig:
    return train_config(data=(str(corpus),), **{"steps": 4, "val_every": 2, "save_every": 2, **changes})


def test_the_number_is_recorded_and_kept(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured(monkeypatch, {1: 1.0, 2: 2.0})
    begin(config_of(corpus), tmp_path / "run")
    assert recorded_threads(tmp_path / "run") == 2
    begin(config_of(corpus), tmp_path / "other", threads=3)  # asked for, it is not measured
    assert recorded_threads(tmp_path / "other") == 3
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    view = Watching()
    pretrain(tmp_path / "run", view)
    assert torch.get_num_threads() == 2 and cores.threads() == 2
    assert not [line for line in view.said if "threads" in line]  # it has only just begun
    assert read_lines(tmp_path / "run/timings.jsonl")[0]["threads"] == 2

    pretrain(checkpoints(tmp_path / "run")[0], view)
    assert torch.get_num_threads() == 2
    said = "threads: 2 as before, for the same bits; not OMP_NUM_THREADS=1; --resume with --threads N changes it"
    assert said in view.said


def test_fewer_cores_than_recorded_are_told(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begin(config_of(corpus), tmp_path / "run", threads=2)
    pretrain(tmp_path / "run", Watching())
    monkeypatch.setattr(pretraining, "cpu_count", lambda: 1)
    view = Watching()
    pretrain(tmp_path / "run", view)
    assert torch.get_num_threads() == 2
    assert ("threads: 2 as before, for the same bits; there is 1 core, so it is slower; "
            "--resume with --threads N changes it") in view.said  # fmt: skip


def test_equal_threads_give_equal_bits_and_a_change_is_kept(corpus: Path, tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for out in (whole, parts):
        begin(config_of(corpus), out, threads=2)
        pretrain(out, Watching())
    first = checkpoints(parts)[0]
    torch.set_num_threads(1)
    pretrain(first, Watching())
    metrics = (whole / "metrics.jsonl").read_bytes()
    assert (parts / "metrics.jsonl").read_bytes() == metrics
    assert (parts / "final/model.safetensors").read_bytes() == (whole / "final/model.safetensors").read_bytes()

    pretrain(checkpoints(parts)[0], Watching(), "1")
    assert recorded_threads(parts) == 1 and torch.get_num_threads() == 1
    assert recorded_config(parts) == config_of(corpus)


def test_the_record_changes_only_once_the_checkpoint_is_loaded(corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    begin(config_of(corpus), out, threads=2)
    pretrain(out, Watching())
    before = (out / "config.json").read_bytes()
    for damage, start in ((lambda: None, out / "checkpoints/step_000099"),
                          (lambda: (checkpoints(out)[-1] / "state.json").write_text("{"), out)):  # fmt: skip
        damage()
        with pytest.raises(MixtralError, match="checkpoint"):
            pretrain(start, Watching(), 1)
        assert (out / "config.json").read_bytes() == before
    pretrain(checkpoints(out)[0], Watching(), 1)
    assert recorded_threads(out) == 1


@pytest.mark.parametrize("value", ["2000", "abc", "0"])
def test_the_environment_does_not_stop_a_run_that_has_its_number(corpus: Path, tmp_path: Path, value: str,
                                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    begin(config_of(corpus, steps=1), tmp_path / "run", threads=2)
    monkeypatch.setenv("OMP_NUM_THREADS", value)
    for _ in range(2):
        pretrain(tmp_path / "run", Watching())
        assert torch.get_num_threads() == 2


def test_what_is_refused(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="threads: a number from 1 to 1024 is wanted, or auto, not 0"):
        begin(config_of(corpus), tmp_path / "run", threads=0)
    assert not (tmp_path / "run").exists()
    with pytest.raises(UsageError, match="is not a training run"):
        pretrain(tmp_path / "run", Watching(), 1)
    begin(config_of(corpus), tmp_path / "run", threads=1)
    before = (tmp_path / "run/config.json").read_text()
    with pytest.raises(UsageError, match="not many"):
        pretrain(tmp_path / "run", Watching(), "many")
    assert (tmp_path / "run/config.json").read_text() == before
    for bad in ("{}", '{"environment": {"threads": "two"}}', '{"environment": {"threads": null}}', "[]", "{"):
        (tmp_path / "run/config.json").write_text(bad)
        for act in (recorded_threads, lambda out: pretrain(out, Watching(), 2)):
            with pytest.raises(ConfigError, match=r"config\.json"):
                act(tmp_path / "run")


# -- watching ----------------------------------------------------------------------------------------------------------


def slumps(rates: list[float]) -> list[int]:
    pace = Pace()
    return [i for i, rate in enumerate(rates) if pace.add(rate)]


def test_a_pace_becomes_slow_once() -> None:
    assert slumps([100.0] * 20 + [60.0] * 20) == []
    assert slumps([100.0] * 20 + [10.0] * 3 + [100.0] * 20) == []  # a few slow steps are none
    fell = 20 + WINDOW // 2  # more than half of the window is slow
    assert slumps([100.0] * 20 + [40.0] * 50) == [fell]
    again = [100.0] * 20 + [40.0] * 20 + [60.0] * 20 + [40.0] * 20  # 60 is no recovery
    assert slumps(again) == [fell]
    assert slumps([100.0] * 20 + [40.0] * 20 + [90.0] * 20 + [40.0] * 20) == [fell, fell + 40]
    assert slumps([1.0] * WINDOW + [100.0] * 20) == []  # the first steps are often slow


@pytest.mark.parametrize(
    ("threads", "rates", "advice"),
    [
        (2, {1: 900.0, 2: 120.0},
         "measured now on one layer: 1 thread 900 tok/s, 2 threads 120; to go on with 1: Ctrl-C, then mixtral train "
         "--resume run --threads 1 (from there on the bits are no longer those of the run as it was begun)"),
        (2, {1: 100.0, 2: 120.0},
         "measured now on one layer: 1 thread 100 tok/s, 2 threads 120; another number of threads would be no faster"),
        (2, {1: 120.0, 2: 118.0},
         "measured now on one layer: 1 thread 120 tok/s, 2 threads 118; another number of threads would be no faster"),
        (1, None, "other processes may have the cores"),
    ],
)  # fmt: skip
def test_a_slow_run_is_told_what_would_be_faster(threads: int, rates: dict[int, float] | None, advice: str) -> None:
    said: list[str] = []
    watch = ThreadWatch(Path("run"), threads, None if rates is None else lambda: rates or {}, said.append)
    for rate in [2500.0] * WINDOW + [313.0] * WINDOW:
        watch.step(rate)
    assert said == [f"slow: 313 tok/s, after 2,500 before; {advice}"]


def test_a_run_asks_its_watch_after_each_step_and_keeps_its_threads(run_in: MakeRun, tmp_path: Path) -> None:
    """Its bits are those of a run that nobody watches."""
    torch.set_num_threads(1)
    told: list[float] = []
    for name in ("plain", "watched"):
        run = run_in(tmp_path / name, train_config(steps=2 * WINDOW))
        if name == "watched":
            measure = partial(measure_training, run.config, [1, 2])
            run.watch = ThreadWatch(run.folder, 1, measure, run.display.say)
            run.watch.pace.add = lambda rate: (told.append(rate), len(told) == WINDOW)[1]  # type: ignore[method-assign]
        run.train()
    assert len(told) == 2 * WINDOW and torch.get_num_threads() == 1
    assert [line for line in run.display.said if line.startswith("slow: ")] != []  # type: ignore[attr-defined]
    plain, watched = ((tmp_path / name / "metrics.jsonl").read_bytes() for name in ("plain", "watched"))
    assert plain == watched
