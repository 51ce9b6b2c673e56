from __future__ import annotations

from pathlib import Path

import pytest

from mixtral.errors import DataError, UsageError
from mixtral.quant.text import read_sequences
from mixtral.tokenizer import Tokenizer, train_bpe


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_bpe(["abcdefghijklmnopqrst " * 5], 300)


def test_sequences_of_one_text_each_up_to_a_limit(tmp_path: Path, tokenizer: Tokenizer) -> None:
    lines = ['{"text": "abcdefg"}', '{"text": "hij"}', '{"text": "klmnopqrst"}']
    (tmp_path / "t.jsonl").write_text("\n".join(lines))
    whole = [tokenizer.encode(text) for text in ("abcdefg", "hij", "klmnopqrst")]
    assert read_sequences(str(tmp_path / "t.jsonl"), tokenizer, 1000, 512) == whole
    assert min(map(len, whole)) > 2
    limit = len(whole[0]) + len(whole[1]) + 2
    assert read_sequences(str(tmp_path / "t.jsonl"), tokenizer, limit, 512) == [*whole[:2], whole[2][:2]]
    cut = read_sequences(str(tmp_path / "t.jsonl"), tokenizer, len(whole[0]), 2)
    pairs = [whole[0][i : i + 2] for i in range(0, len(whole[0]), 2)]
    assert cut == [pair for pair in pairs if len(pair) == 2]


def test_a_source_without_text(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "t.txt").write_text("\n \n")
    with pytest.raises(DataError, match=r"t\.txt: no text in it; some hundred tokens at least are wanted"):
        read_sequences(str(tmp_path / "t.txt"), tokenizer, 100, 512)
    with pytest.raises(UsageError):
        read_sequences(str(tmp_path / "nowhere.txt"), tokenizer, 100, 512)
