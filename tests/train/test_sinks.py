"""Trackers are told the numbers of the JSON lines, and can neither stop a run nor change it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from mixtral.errors import UsageError
from mixtral.train.lines import read_lines
from mixtral.train.sinks import Trackers, flatten, require_packages
from tests.train.tiny_run import Killed, MakeRun, Watching, kill_after, train_config

STAND_IN = """
import json, pathlib

class Settings:
    def __init__(self, **options):
        self.options = options

class Run:
    def __init__(self, file):
        self.file = file
    def log(self, values, step):
        if (self.file.parent / "broken").exists():
            raise OSError("no network\\nand more")
        self.write({"step": step, "values": values})
    def finish(self):
        self.write("finish")
    def write(self, line):
        with open(self.file, "a") as file:
            file.write(json.dumps(line) + "\\n")

def init(*, settings, **options):
    run = Run(pathlib.Path(options["dir"]) / "told.jsonl")
    run.write({"init": options, "console": settings.options["console"]})
    return run
"""


@pytest.fixture
def wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A module that writes what it is told to FOLDER/told.jsonl."""
    (tmp_path / "wandb.py").write_text(STAND_IN)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "wandb", raising=False)


def told(folder: Path) -> list[Any]:
    return [json.loads(line) for line in (folder / "told.jsonl").read_text().splitlines()]


def as_one(folder: Path, layers: tuple[int, ...] = (0, 1)) -> dict[int, dict[str, float]]:
    """The lines of both files by step, with flat names."""
    steps: dict[int, dict[str, float]] = {}
    for name, prefix in (("metrics", ""), ("timings", "timing")):
        for line in read_lines(folder / f"{name}.jsonl"):
            steps.setdefault(line["step"], {}).update(flatten(line, prefix, layers))
    return steps


def scalars(folder: Path) -> dict[int, dict[str, float]]:
    """What TensorBoard shows of a run, by step; a value shown twice is an error."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    steps: dict[int, dict[str, float]] = {}
    for tag in events.Tags()["scalars"]:
        for event in events.Scalars(tag):
            assert tag not in steps.setdefault(event.step, {}), (tag, event.step)
            steps[event.step][tag] = event.value
    return steps


def close_to(steps: dict[int, dict[str, float]]) -> dict[int, Any]:
    return {step: pytest.approx(values, rel=1e-6) for step, values in steps.items()}  # event files hold fp32


def test_flat_names() -> None:
    line = {"step": 3, "cross_entropy": 1.5, "aux": {"z_loss": 0.5}, "val_loads": [[0.25], [0.75]],
            "layers": [{"gini": 0.1, "load": [0.5, 0.5]}, {"gini": 0.2, "output_norms": None}]}  # fmt: skip
    assert flatten(line, layers=(1, 3)) == {  # layers 0 and 2 are dense
        "cross_entropy": 1.5, "aux/z_loss": 0.5, "layer1/val_load/0": 0.25, "layer3/val_load/0": 0.75,
        "layer1/gini": 0.1, "layer1/load/0": 0.5, "layer1/load/1": 0.5, "layer3/gini": 0.2}  # fmt: skip
    timing = {"step": 3, "seconds": 2.0, "peak_matmul_dtype": "float32"}
    assert flatten(timing, "timing") == {"timing/seconds": 2.0}


def test_tensorboard_shows_what_the_lines_say(run_in: MakeRun, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    config = train_config(steps=6, stats_every=2, trackers=("tensorboard",))
    run_in(tmp_path / "run", config).train()
    assert scalars(tmp_path / "run") == close_to(as_one(tmp_path / "run"))
    assert {"cross_entropy", "bits_per_byte", "layer1/gini", "layer0/load/3", "timing/memory_bytes"} < set(
        scalars(tmp_path / "run")[6]
    )
    run_in(tmp_path / "plain", config.replace(trackers=())).train()
    assert (tmp_path / "run/metrics.jsonl").read_bytes() == (tmp_path / "plain/metrics.jsonl").read_bytes()


def test_tensorboard_names_layers_by_their_number_in_the_model(run_in: MakeRun, tmp_path: Path) -> None:
    """Of four layers 0 and 2 are dense: what stands first in a line is layer 1's."""
    pytest.importorskip("tensorboard")
    shape = {"n_layers": 4, "experts_by_layer": (1, 4, 1, 4)}
    run_in(tmp_path, train_config(shape, steps=2, stats_every=2, trackers=("tensorboard",))).train()
    shown = scalars(tmp_path)
    assert shown == close_to(as_one(tmp_path, layers=(1, 3)))
    assert {tag.split("/")[0] for tag in shown[2] if tag.startswith("layer")} == {"layer1", "layer3"}


def test_tensorboard_after_a_kill_has_no_step_twice(run_in: MakeRun, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    config = train_config(steps=8, trackers=("tensorboard",))
    with pytest.raises(Killed):
        run_in(tmp_path, config, kill_after(7)).train()
    run = run_in(tmp_path, config)
    run.resume(tmp_path / "checkpoints/step_000004")
    run.train()
    assert len(list((tmp_path / "tensorboard").iterdir())) == 2
    assert scalars(tmp_path) == close_to(as_one(tmp_path))


@pytest.mark.usefixtures("wandb")
def test_wandb_goes_on_in_the_same_run(run_in: MakeRun, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    config = train_config(steps=8, trackers=("wandb",))
    with pytest.raises(Killed):
        run_in(folder, config, kill_after(6)).train()
    assert told(folder)[-1] == "finish"
    run = run_in(folder, config)
    run.resume(folder / "checkpoints/step_000004")
    run.train()
    first, again = (line for line in told(folder) if "init" in line)
    assert first == again and first["console"] == "off"
    started = first["init"]
    assert (started["id"], started["resume"]) == ((folder / "wandb_id").read_text(), "allow")
    assert (started["project"], started["name"], started["config"]["lr"]) == ("mixtral", "run", config.lr)
    steps: dict[int, dict[str, float]] = {}
    for line in told(folder):
        if "values" in line:
            steps.setdefault(line["step"], {}).update(line["values"])
    assert steps == as_one(folder)


@pytest.mark.usefixtures("wandb")
def test_one_that_fails_is_left_out_and_told_of_once(run_in: MakeRun, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    view = Watching(lambda step: (folder / "broken").touch() if step == 2 else None)
    run_in(folder, train_config(steps=5, trackers=("wandb",)), view).train()
    assert view.said == ["wandb is left out from here on: no network; the run goes on, its lines are in metrics.jsonl"]
    assert max(line["step"] for line in told(folder) if "step" in line) == 2 and len(view.losses) == 5


@pytest.mark.usefixtures("wandb")
def test_one_that_cannot_be_opened_is_left_out(tmp_path: Path) -> None:
    said: list[str] = []
    (tmp_path / "told.jsonl").mkdir()
    trackers = Trackers(tmp_path, train_config(trackers=("wandb",)), -1, said.append)
    trackers.log(1, {"loss": 1.0})
    trackers.close()
    assert len(said) == 1 and "Is a directory" in said[0]


def test_a_missing_package_is_named_with_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder of that name, which wandb leaves behind, is not the package."""
    (tmp_path / "wandb").mkdir()
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    require_packages(())
    with pytest.raises(UsageError) as caught:
        require_packages(["wandb"])
    assert str(caught.value) == (
        'trackers: wandb is not installed; pip install "mixtral[wandb]", or leave it out of trackers'
    )
