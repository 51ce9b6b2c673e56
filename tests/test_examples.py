"""Every example runs and prints what it promises."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest
import torch

from mixtral.lm import LM
from mixtral.model import Mixtral, initialise
from mixtral.presets import preset
from mixtral.tokenizer import train_bpe

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with a tokenizer of its own."""
    shape = dict(vocab_size=320, dim=32, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=8, ffn_dim=48, n_experts=4)
    model = initialise(Mixtral(preset("tiny").replace(**shape)), torch.Generator().manual_seed(0))
    path = tmp_path_factory.mktemp("example") / "model"
    lines = ["def add(a, b):", "    return a + b", "to be, or not to be, that is the question"] * 20
    LM(model, train_bpe(lines, 320)).save(path)
    return path


RUNS = {
    "routing.py {folder}": ["def ", "Routing of", "\n<s> "],
    "layer.py": ["largest difference from the formula: ", "replayed: the same, bit for bit", "gradient of the router"],
    "counting.py": ["parameters 46,702,792,704", "takes 2: 12,879,925,248 (28%)", "with 16 experts: "],
    "counting.py {folder}": ["2 layers, 4 experts, 2 a token", "   512 tokens of context"],
}


@pytest.mark.parametrize("command", RUNS)
def test_it_runs(command: str, folder: Path, capsys: pytest.CaptureFixture[str],
                 monkeypatch: pytest.MonkeyPatch) -> None:
    script, *arguments = command.split()
    monkeypatch.setattr(sys, "argv", [script, *(a.format(folder=folder) for a in arguments)])
    runpy.run_path(str(EXAMPLES / script), run_name="__main__")
    out = capsys.readouterr().out
    for wanted in RUNS[command]:
        assert wanted in out, wanted


def test_every_example_is_run() -> None:
    run = {command.split()[0] for command in RUNS} | {"walkthrough.ipynb"}  # by test_walkthrough.py
    assert {path.name for path in EXAMPLES.iterdir() if path.is_file()} == run
