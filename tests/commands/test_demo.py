"""The demo: of the shipped model, and with a training on a small corpus for a few steps."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import mixtral.recipes
from mixtral.config import ModelConfig
from mixtral.train import display, pretrain
from mixtral.train.config import PretrainConfig
from mixtral.train.metrics import PeakMatmul

if TYPE_CHECKING:
    from tests.commands.conftest import Run

WORDS = "def return value name self node list key class import for in if not else print".split()


@pytest.fixture(autouse=True)
def _small_recipe(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = random.Random(0)
    corpus = tmp_path_factory.mktemp("corpus") / "texts.jsonl"
    texts = [" ".join(draw.choice(WORDS) for _ in range(30)) + f" {i}" for i in range(80)]
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    shape = ModelConfig(vocab_size=320, dim=32, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=8, ffn_dim=48,
                        n_experts=4, experts_per_token=2, context=512)  # fmt: skip
    small = PretrainConfig(
        model=shape, data=(str(corpus),), steps=8, rows=4, context=32, dtype="fp32",
        device="cpu", lr=1e-2, val_every=4, val_tokens=128, save_every=4)  # fmt: skip
    monkeypatch.setitem(mixtral.recipes.RECIPES, "tiny", lambda: small)
    monkeypatch.setattr(pretrain, "set_threads", lambda *_: None)
    monkeypatch.setattr(PeakMatmul, "measure", lambda *_: PeakMatmul(1e12, "float32"))


def after_step(monkeypatch: pytest.MonkeyPatch, step: int, act: Callable[[], None]) -> None:
    real = display.TerminalDisplay.step

    def stepped(self: display.TerminalDisplay, now: int, *arguments: object) -> None:
        real(self, now, *arguments)  # type: ignore[arg-type]
        if now == step:
            act()

    monkeypatch.setattr(display.TerminalDisplay, "step", stepped)


def ctrl_c() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def test_it_trains_writes_and_shows(run: Run, tmp_path: Path) -> None:
    out = tmp_path / "demo"
    first = run("demo", "--train", "--out", out, "--max-steps", "6")
    assert first.code == 0
    for wanted in ("def __init__(self", "Where the held-out tokens went", "held-out text", "bits a byte",
                   "a bigram model", "expert loads",
                   f"mixtral generate --model {out}/final", f"mixtral chat --model {out}/final",
                   f"mixtral info {out}/final", "mixtral convert", "mixtral train"):  # fmt: skip
        assert wanted in first.out, wanted
    assert "step 6: validation" in first.err and "step 6: validation" not in first.out
    metrics = (out / "metrics.jsonl").read_bytes()

    second = run("demo", "--train", "--out", out)
    assert second.code == 0 and second.out == first.out and "step 6: validation" not in second.err
    assert (out / "metrics.jsonl").read_bytes() == metrics

    told = json.loads(run("demo", "--train", "--out", out, "--json").out)
    assert told["steps"] == 6 and told["tokens"] == 6 * 128 and told["model"] == str(out / "final")
    assert told["val_cross_entropy"] < told["start_cross_entropy"]
    assert 0 < told["bigram_bits_per_byte"] < 8 and told["prompt"].startswith("def __init__") and told["text"]


def test_steps_of_a_run_that_was_begun_are_refused(run: Run, tmp_path: Path) -> None:
    out = str(tmp_path / "demo")
    assert run("demo", "--train", "--out", out, "--max-steps", "2").code == 0
    again = run("demo", "--train", "--out", out, "--max-steps", "3")
    assert again.code == 2 and "was begun with its own number" in again.err


def test_an_interrupted_demo_goes_on(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "demo"
    with monkeypatch.context() as patch:
        after_step(patch, 3, ctrl_c)
        code, printed, err = run("demo", "--train", "--out", out)
    assert (code, printed) == (130, "")
    assert err.splitlines()[-1] == f"mixtral: stopped after step 3; go on with: mixtral train --resume {out}"
    assert json.loads(run("demo", "--train", "--out", out, "--json").out)["steps"] == 8


def test_training_and_going_on_from_the_command_line(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, out = tmp_path / "whole", tmp_path / "stopped"
    told = json.loads(run("train", "tiny", "--out", whole, "--set", "lr=2e-2", "--json").out)
    assert told["steps"] == 8 and len(told["val_loads"]) == 2
    with monkeypatch.context() as patch:
        after_step(patch, 5, ctrl_c)
        code, _, err = run("train", "tiny", "--out", out, "--set", "lr=2e-2")
    assert code == 130 and err.splitlines()[-1].endswith(f"go on with: mixtral train --resume {out}")
    done = run("train", "--resume", out)
    assert done.code == 0 and f"model: {out}/final" in done.out and "bits a byte" in done.out
    for name in ("metrics.jsonl", "final/model.safetensors"):
        assert (out / name).read_bytes() == (whole / name).read_bytes()
    assert run("train", "tiny", "--out", out).code == 2  # nothing is overwritten


def states(out: Path) -> dict[Path, tuple[int, int]]:
    """Differs when anything below a folder is written anew."""
    return {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in out.rglob("*")}


def test_a_finished_run_is_shown_again_and_left_alone(run: Run, tmp_path: Path) -> None:
    out = tmp_path / "run"
    first = run("train", "tiny", "--out", out)
    before = states(out)
    again = run("train", "--resume", out, "--threads", "2")
    assert (again.code, again.out) == (0, first.out)
    assert again.err == f"done already: all 8 steps; the model is in {out}/final\n"
    told = json.loads(run("train", "--resume", out, "--json").out)
    assert told["steps"] == 8 and told["tokens"] == 8 * 128 and len(told["val_loads"]) == 2
    assert run("train", "--resume", out, "--threads", "all").code == 2
    assert states(out) == before
    shutil.rmtree(out / "final")
    assert run("train", "--resume", out).out == first.out and (out / "final/model.safetensors").is_file()


def test_the_demo_of_a_finished_run_keeps_its_record(run: Run, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert run("demo", "--train", "--out", out, "--max-steps", "1", "--threads", "3").code == 0
    before = (out / "config.json").read_bytes()
    assert run("demo", "--train", "--out", out, "--threads", "2").code == 0
    assert (out / "config.json").read_bytes() == before


def test_a_folder_that_is_no_run_is_left_alone(run: Run, tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("kept")
    code, _, err = run("demo", "--train", "--out", tmp_path)
    assert code == 2 and f"{tmp_path} is not empty" in err and [p.name for p in tmp_path.iterdir()] == ["precious"]


def test_the_shipped_model_writes_and_shows_its_routing(run: Run) -> None:
    code, out, _ = run("demo")
    assert code == 0
    for wanted in ("def fibonacci(n):", "Which experts took what", "code", "prose", "arithmetic",
                   "layer 3", "mixtral generate --prompt", "mixtral chat", "mixtral demo --train"):  # fmt: skip
        assert wanted in out, wanted
    head = out.splitlines().index(next(line for line in out.splitlines() if "layer 3" in line))
    assert all(len(line) <= 80 for line in out.splitlines()[head : head + 4])  # whatever the path of the card above


def test_the_shipped_models_figures_as_json(run: Run) -> None:
    told = json.loads(run("demo", "--json").out)
    assert told["parameters"] > told["active_parameters"] and told["text"]
    for layers in told["loads"].values():
        assert len(layers) == 4 and all(sum(load) == pytest.approx(1) for load in layers)


@pytest.mark.parametrize("option", [("--out", "x"), ("--max-steps", "3")])
def test_options_of_a_training_without_one_are_refused(run: Run, option: tuple[str, str]) -> None:
    code, _, err = run("demo", *option)
    assert code == 2 and "add --train" in err
