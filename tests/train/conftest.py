from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from mixtral.data.loader import Loader
from mixtral.data.shards import prepare
from mixtral.data.sources import Source
from mixtral.data.store import TokenData
from mixtral.tokenizer import Tokenizer, train_bpe
from mixtral.train.config import PretrainConfig
from mixtral.train.display import Display
from mixtral.train.loop import Run
from tests.train.tiny_run import VOCABULARY, Watching, make_run, texts


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return train_bpe(texts(), VOCABULARY)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one JSONL file."""
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts()))
    return folder


@pytest.fixture(scope="session")
def data(corpus: Path, tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> TokenData:
    return prepare([Source(str(corpus))], tokenizer, tmp_path_factory.mktemp("shards"), val_share=0.1)


@pytest.fixture
def loader(data: TokenData) -> Loader:
    """Four rows of 32 tokens a batch."""
    return Loader(data, rows=4, context=32)


@pytest.fixture
def run_in(data: TokenData, tokenizer: Tokenizer) -> Callable[..., Run]:
    """run_in(folder, config, display=None): a run at its start."""

    def make(folder: Path, config: PretrainConfig, display: Display | None = None) -> Run:
        return make_run(folder, config, data, tokenizer, display or Watching())

    return make
