"""Commands are run in this process, through `main`, on a tiny model made once."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from mixtral import cli, cores
from mixtral.config import ModelConfig
from mixtral.lm import LM
from mixtral.model import Mixtral, initialise
from mixtral.presets import preset
from mixtral.quant.quantize import quantise_folder
from mixtral.quant.scheme import QuantScheme
from mixtral.tokenizer import train_bpe
from mixtral.train.config import PretrainConfig
from mixtral.train.run_folder import begin

TEXT = ["To be, or not to be, that is the question:", "def add(a, b):\n    return a + b", "Whether 'tis nobler"] * 20


class Outcome(NamedTuple):
    code: int
    out: str
    err: str


Run = Callable[..., Outcome]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Run]:
    """Run `mixtral ARGUMENTS` at 80 columns; logging and threads of the test process stay as they are."""
    monkeypatch.setattr(cli, "_prepare", lambda: None)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(cores, "_chosen", None)
    monkeypatch.setenv("RAYON_NUM_THREADS", "1")
    level, threads = logging.getLogger("mixtral").level, torch.get_num_threads()

    def call(*arguments: str | Path) -> Outcome:
        capsys.readouterr()
        code = cli.main([str(argument) for argument in arguments])
        return Outcome(code, *capsys.readouterr())

    yield call
    torch.set_num_threads(threads)
    logging.getLogger("mixtral").setLevel(level)


def config(**changes: object) -> ModelConfig:
    shape = dict(vocab_size=320, dim=32, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=8, ffn_dim=48, n_experts=4,
                 experts_per_token=2, context=64, init_std=0.3)  # fmt: skip
    return ModelConfig.from_dict({**shape, **changes})


def make(folder: Path, **changes: object) -> Path:
    model = initialise(Mixtral(config(**changes)), torch.Generator().manual_seed(0))
    LM(model, train_bpe(TEXT, 320)).save(folder)
    return folder


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("sparse") / "model")


@pytest.fixture(scope="session")
def dense_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("dense") / "model", n_experts=1, experts_per_token=1)


@pytest.fixture(scope="session")
def quantised(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("quantised") / "model"
    quantise_folder(folder, target, QuantScheme.of("4"))
    return target


@pytest.fixture(scope="session")
def a_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training run that has not trained yet."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    begin(PretrainConfig(model=preset("tiny")), folder)
    return folder
