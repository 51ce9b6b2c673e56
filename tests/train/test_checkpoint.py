"""A checkpoint is whole or not there, comes back exactly, and a damaged one is refused in one line."""

from __future__ import annotations

import contextlib
import json
import os
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest

from mixtral.data.loader import Loader
from mixtral.errors import MixtralError
from mixtral.model import Mixtral
from mixtral.train.checkpoint import CheckpointWriter, drop_later, load_checkpoint
from mixtral.train.config import PretrainConfig
from mixtral.train.objective import next_token
from mixtral.train.record import checkpoints, latest_checkpoint
from mixtral.train.state import TrainState
from mixtral.train.step import train_step
from tests.train.tiny_run import fresh_state, same, train_config, weights


def trained(loader: Loader, config: PretrainConfig, steps: int = 2) -> tuple[Mixtral, TrainState]:
    model, train_state = fresh_state(config)
    for step in range(steps):
        train_step(train_state, [loader.batch(step)], next_token, config, step, False)
    return model, train_state


def save(folder: Path, train_state: TrainState, step: int, best_step: int | None = None, keep: int = 2) -> str | None:
    """-> the failure, if any."""
    writer = CheckpointWriter(folder, keep)
    writer.save(train_state, {"step": step, "best_step": best_step})
    writer.wait()
    return writer.failure()


def names(folder: Path) -> list[str]:
    """Everything in the checkpoints' folder, hidden leftovers too."""
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_checkpoint_comes_back_exactly(loader: Loader, tmp_path: Path, dtype: str, optimizer: str) -> None:
    config = train_config(dtype=dtype, optimizer=optimizer)
    model, saved = trained(loader, config)
    assert save(tmp_path, saved, 2) is None
    other_model, other = fresh_state(config)
    assert load_checkpoint(tmp_path / "checkpoints/step_000002", other) == {"step": 2, "best_step": None}
    assert same(weights(other_model), weights(model))
    for part, found in saved.state_dict().items():
        assert same(*({n: t.detach() for n, t in state.items()} for state in (other.state_dict()[part], found)))


def test_before_the_first_step_there_is_no_optimiser_state(tmp_path: Path) -> None:
    model, train_state = fresh_state(train_config())
    assert save(tmp_path, train_state, 0) is None
    other_model, other = fresh_state(train_config(seed=1))
    load_checkpoint(tmp_path / "checkpoints/step_000000", other)
    assert other.optimizer.state() == {} and same(weights(other_model), weights(model))


def test_training_may_go_on_while_it_is_written(loader: Loader, tmp_path: Path) -> None:
    config = train_config()
    model, train_state = trained(loader, config)
    before = weights(model)
    writer = CheckpointWriter(tmp_path, 2)
    writer.save(train_state, {"step": 2, "best_step": None})
    train_step(train_state, [loader.batch(2)], next_token, config, 2, False)
    writer.wait()
    other_model, other = fresh_state(config)
    load_checkpoint(tmp_path / "checkpoints/step_000002", other)
    assert same(weights(other_model), before)


def test_the_last_ones_and_the_best_are_kept(tmp_path: Path) -> None:
    _, train_state = fresh_state(train_config())
    for step, best in [(0, None), (4, 4), (8, 4), (12, 4), (16, 4)]:
        save(tmp_path, train_state, step, best)
    assert names(tmp_path) == ["step_000004", "step_000012", "step_000016"]
    save(tmp_path, train_state, 1000000, 12)
    assert names(tmp_path) == ["step_000012", "step_000016", "step_1000000"]
    assert [path.name for path in checkpoints(tmp_path)] == names(tmp_path)  # by number: 16 comes before a million
    save(tmp_path, train_state, 1000001, 1000001, keep=1)
    assert names(tmp_path) == ["step_1000001"]


def test_the_best_one_stays_when_the_save_of_a_better_one_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_state = fresh_state(train_config())[1]
    save(tmp_path, train_state, 1, 1, keep=1)
    with monkeypatch.context() as patch:
        patch.setattr("mixtral.train.checkpoint.write_checkpoint", lambda *_: 1 / 0)
        assert save(tmp_path, train_state, 2, 2, keep=1) == "division by zero"
    for step in (3, 4):
        save(tmp_path, train_state, step, 2, keep=1)
    assert [path.name for path in checkpoints(tmp_path)] == ["step_000001", "step_000004"]


def test_only_finished_checkpoints_are_found(tmp_path: Path) -> None:
    for name in ("step_000003", ".step_000007.mixtral-0123abcd.tmp", "step_4", "step_final", "step_"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert [path.name for path in checkpoints(tmp_path)] == ["step_000003"]
    assert checkpoints(tmp_path / "nowhere") == []
    assert latest_checkpoint(tmp_path / "nowhere") is None


def test_the_latest_and_those_after_a_step(tmp_path: Path) -> None:
    _, train_state = fresh_state(train_config())
    for step in (0, 4, 8):
        save(tmp_path, train_state, step, keep=9)
    assert latest_checkpoint(tmp_path) == tmp_path / "checkpoints/step_000008"
    drop_later(tmp_path, 4)
    assert names(tmp_path) == ["step_000000", "step_000004"]


# -- kills and crashes -------------------------------------------------------------------------------------------------


def test_what_kills_left_goes_when_a_run_goes_on(tmp_path: Path) -> None:
    """Also of steps that it will not save again, such as one at which Ctrl-C came."""
    _, train_state = fresh_state(train_config())
    save(tmp_path, train_state, 4)
    for name in (".step_000007.mixtral-0123abcd.tmp", ".step_000004.mixtral-4567cdef.tmp"):
        (tmp_path / "checkpoints" / name / "model").mkdir(parents=True)
    assert latest_checkpoint(tmp_path) == tmp_path / "checkpoints/step_000004"
    drop_later(tmp_path, 4)
    assert names(tmp_path) == ["step_000004"]


def test_a_kill_while_later_ones_are_dropped_leaves_no_half(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, train_state = fresh_state(train_config())
    for step in (0, 4, 8):
        save(tmp_path, train_state, step, keep=9)

    def killed(path: Path, **_: object) -> None:
        (path / "state.json").unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("shutil.rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            drop_later(tmp_path, 0)
    for path in checkpoints(tmp_path):
        load_checkpoint(path, fresh_state(train_config())[1])
    assert [path.name for path in checkpoints(tmp_path)] == ["step_000000", "step_000008"]


def test_the_disk_has_files_and_logs_before_the_checkpoint_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that a crash of the machine leaves the checkpoint before, or this one with every line up to it."""
    (tmp_path / "metrics.jsonl").write_text('{"step": 0}\n')
    synced: set[int] = set()
    replace = os.replace
    at_rename: list[set[int]] = []

    def record(source: Path, target: Path) -> None:
        at_rename.append(set(synced))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.add(os.fstat(descriptor).st_ino))
    monkeypatch.setattr(os, "replace", record)
    assert save(tmp_path, fresh_state(train_config())[1], 0) is None
    whole = [tmp_path / "metrics.jsonl", *(tmp_path / "checkpoints/step_000000").rglob("*")]
    assert len(whole) > 3 and at_rename and {path.stat().st_ino for path in whole} <= at_rename[0]


# -- damage ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(loader: Loader, tmp_path: Path) -> Path:
    assert save(tmp_path, trained(loader, train_config())[1], 2) is None
    return tmp_path / "checkpoints/step_000002"


def refused(path: Path, config: PretrainConfig | None = None) -> str:
    with pytest.raises(MixtralError) as caught:
        load_checkpoint(path, fresh_state(config or train_config())[1])
    message = str(caught.value)
    assert message.startswith(f"checkpoint {path}") and "\n" not in message
    assert message.endswith("resume from an earlier one")
    return message


def tensor_file(path: Path, part: str) -> Path:
    (found,) = (path / part).glob("*.safetensors")
    return found


@pytest.mark.parametrize("part", ["model", "optimizer"])
def test_a_truncated_file_is_refused(saved: Path, part: str) -> None:
    file = tensor_file(saved, part)
    size = file.stat().st_size
    file.write_bytes(file.read_bytes()[:-1])
    assert f"{part}/{file.name} has {size - 1} bytes, not {size}" in refused(saved)


@pytest.mark.parametrize("part", ["model", "optimizer"])
def test_a_missing_file_is_refused(saved: Path, part: str) -> None:
    tensor_file(saved, part).unlink()
    assert "No such file" in refused(saved)


@pytest.mark.parametrize("part", ["model", "optimizer"])
def test_a_foreign_file_of_the_right_size_is_refused(saved: Path, part: str) -> None:
    file = tensor_file(saved, part)
    file.write_bytes(b"\xff" * file.stat().st_size)
    assert "cannot be read (" in refused(saved)


@pytest.mark.parametrize("text", ['{"step": 2, "si', "", "{}", "[]", "7", '{"step": 2, "sizes": 3}'])
def test_a_broken_state_is_refused(saved: Path, text: str) -> None:
    (saved / "state.json").write_text(text)
    assert "cannot be read (" in refused(saved)


def test_a_missing_state_is_refused(saved: Path) -> None:
    (saved / "state.json").unlink()
    assert "No such file" in refused(saved)


def test_another_model_s_checkpoint_is_refused(saved: Path) -> None:
    refused(saved, train_config(model={"dim": 40}))
    refused(saved, train_config(model={"n_layers": 3}))


# -- failing writes ----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def disk_for(n_bytes: int) -> Iterator[None]:
    """Every file that grows beyond `n_bytes` fails, as on a full disk (File too large in place of No space left)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_failure_in_the_middle_leaves_the_one_before(saved: Path, loader: Loader) -> None:
    folder = saved.parent.parent
    _, train_state = trained(loader, train_config(), steps=4)
    size = tensor_file(saved, "model").stat().st_size
    with disk_for(size + 100):  # the weights fit, the optimiser's state does not
        failure = save(folder, train_state, 4)
    path = folder / "checkpoints/step_000004"
    assert failure == f"cannot write {path}: File too large"
    assert names(folder) == ["step_000002"]
    assert load_checkpoint(saved, fresh_state(train_config())[1])["step"] == 2
    assert save(folder, train_state, 4) is None  # and with room again the next one works
    assert names(folder) == ["step_000002", "step_000004"]


def test_a_full_disk_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("torch.distributed.checkpoint.save", full)
    failure = save(tmp_path, fresh_state(train_config())[1], 0)
    assert failure == f"cannot write {tmp_path}/checkpoints/step_000000: No space left on device"
    assert names(tmp_path) == []


def test_a_failure_is_told_once(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("a file, where a folder is wanted")
    writer = CheckpointWriter(tmp_path, 1)
    writer.save(fresh_state(train_config())[1], {"step": 0, "best_step": None})
    writer.wait()
    assert (writer.failure() or "").startswith("cannot write ") and writer.failure() is None


def test_the_state_is_readable_json(saved: Path) -> None:
    state = json.loads((saved / "state.json").read_text())
    assert state["step"] == 2 and all((saved / name).stat().st_size == size for name, size in state["sizes"].items())
