from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from mixtral.data.shards import prepare
from mixtral.data.sources import Source
from mixtral.data.store import TokenData
from tests.data.byte_tokenizer import ByteTokenizer


@pytest.fixture
def tokenizer() -> ByteTokenizer:
    return ByteTokenizer()


@pytest.fixture
def jsonl(tmp_path: Path) -> Callable[..., Path]:
    """Write texts as JSON lines and give the path."""

    def write(name: str, texts: list[str]) -> Path:
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        return path

    return write


@pytest.fixture
def make_data(jsonl: Callable[..., Path], tmp_path: Path, tokenizer: ByteTokenizer) -> Callable[..., TokenData]:
    """Prepared data of the given texts, one source for each list; all for training unless `val_share` is given."""

    def make(*corpora: list[str], weights: list[float] | None = None, val_share: float = 0.0) -> TokenData:
        sources = [
            Source(str(jsonl(f"corpus{number}", texts)), weights[number] if weights else None)
            for number, texts in enumerate(corpora)
        ]
        return prepare(sources, tokenizer, tmp_path / "prepared", val_share=val_share, shard_bytes=200)

    return make
