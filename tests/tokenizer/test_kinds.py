"""Every kind of tokenizer: transformers' ids, and the text back. tools/check_tokenizers.py holds 10,000 lines to it."""

from __future__ import annotations

from pathlib import Path

import pytest

from mixtral.tokenizer import load_tokenizer
from tests.tokenizer.kinds import GGUF, KINDS, check, check_gguf
from tests.tokenizer.lines import SENTENCES, TYPED, make_lines

pytest.importorskip("transformers")
LINES = make_lines(300, seed=1)
SLOW = {"tekken", "v2 alone", "v1 saved", "v3 saved"}  # seconds each; left to the script


@pytest.mark.parametrize("name", [name for name in KINDS if name not in SLOW])
def test_ids_and_text(name: str, tmp_path: Path) -> None:
    KINDS[name].make(tmp_path)
    oracle, other_ids, other_texts = check(name, tmp_path, LINES)
    assert (other_ids, other_texts) == (0, 0), oracle


@pytest.mark.parametrize("name", [name for name in GGUF if "alone" not in name])
def test_by_way_of_gguf(name: str, tmp_path: Path) -> None:
    KINDS[name].make(tmp_path)
    assert check_gguf(name, tmp_path, LINES)[1:] == (0, 0)


@pytest.mark.parametrize("name", ["byte-level framed", "metaspace first", "added, added_tokens.json"])
def test_saved_again_it_is_the_same(name: str, tmp_path: Path) -> None:
    KINDS[name].make(tmp_path / "first")
    first = load_tokenizer(tmp_path / "first")
    first.save(tmp_path / "second")
    second = load_tokenizer(tmp_path / "second")
    assert (second.fingerprint, second.bos_id, second.eos_id) == (first.fingerprint, first.bos_id, first.eos_id)
    assert second.encode_batch(LINES) == first.encode_batch(LINES)
    assert (second.prefix, second.suffix, second.version) == (first.prefix, first.suffix, first.version)


def test_lines_are_the_same_every_time() -> None:
    assert make_lines(300, seed=1) == LINES != make_lines(300, seed=2)
    assert len(LINES) == 300 and set(TYPED) <= set(LINES)
    assert {text for texts in SENTENCES.values() for text in texts} <= set(LINES)
