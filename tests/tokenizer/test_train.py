"""Training an own vocabulary."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from mixtral.errors import DataError, UsageError
from mixtral.tokenizer import train_bpe
from mixtral.tokenizer.train import CONTROL, LONGEST_LINE
from tests.tokenizer.conftest import tokenizer_named

TEXTS = ["def add(a, b):\n    return a + b\n\n\nprint(add(1234, 5))\n" * 3, "naïve café 中"]


@pytest.mark.parametrize("version", CONTROL)
def test_control_tokens_stand_where_mistrals_do(version: str) -> None:
    own = train_bpe(TEXTS, 320, version)
    real = tokenizer_named(version)
    assert (own.version, own.vocab_size, own.bos_id, own.eos_id) == (version, 320, 1, 2)
    assert own.control == {i: real.control[i] for i in own.control}
    assert list(own.control) == list(range(3 + len(CONTROL[version])))


def test_what_is_learnt() -> None:
    own = train_bpe(TEXTS, 320, "v1")
    pieces = {own.token_bytes(i) for i in range(320)}
    assert b" add" in pieces or b"add" in pieces
    assert b"  " in pieces  # runs of spaces are pieces: indentation is cheap
    assert [own.token_bytes(i) for i in own.encode("1234", bos=False)][-4:] == [b"1", b"2", b"3", b"4"]


def test_training_repeats_itself() -> None:
    assert train_bpe(TEXTS, 320).fingerprint == train_bpe(iter(TEXTS), 320).fingerprint


def test_the_file_is_the_same_on_every_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found = set()
    for cores in (1, 5):
        monkeypatch.setattr(os, "cpu_count", lambda cores=cores: cores)
        monkeypatch.setattr("mixtral.cores._chosen", cores)
        train_bpe(TEXTS, 320).save(tmp_path)
        found.add((tmp_path / "own.model.v3").read_bytes())
    assert len(found) == 1


def test_many_texts_take_the_threads_that_were_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    own, taken = train_bpe(TEXTS, 320), list[int]()

    class Processor:
        def encode(self, texts: list[str], num_threads: int) -> list[list[int]]:
            taken.append(num_threads)
            return [[5] for _ in texts]

    monkeypatch.setattr(own, "_processor", Processor())
    monkeypatch.setattr("mixtral.cores._chosen", 3)
    assert own.encode_batch(TEXTS, bos=False) == [[5], [5]] and taken == [3]


def test_long_lines_are_learnt_too() -> None:
    own = train_bpe(["abcabcabd " * (LONGEST_LINE // 4)], 282)
    assert b"ab" in {own.token_bytes(i) for i in range(282)}


def test_the_chat_format_of_an_own_vocabulary() -> None:
    from mistral_common.protocol.instruct.messages import UserMessage
    from mistral_common.protocol.instruct.request import ChatCompletionRequest

    own = train_bpe(TEXTS, 320)
    assert own.mistral is not None
    chat = own.mistral.encode_chat_completion(ChatCompletionRequest(messages=[UserMessage(content="add")]))
    inst, end = (next(i for i, name in own.control.items() if name == text) for text in ("[INST]", "[/INST]"))
    assert chat.tokens == [1, inst, *own.encode("add", bos=False), end]


@pytest.mark.parametrize(("texts", "size", "version", "reason"), [
    (TEXTS, 320, "v9", "version 'v9' cannot be trained; known: v1, v3"),
    (TEXTS, 270, "v3", "vocab_size 270 is too small: bytes and control tokens of v3 need 271"),
    ([], 320, "v3", "the corpus is empty"),
    (["\n", "  \n"], 320, "v3", "the corpus is empty"),
    (TEXTS, 5000, "v3", "cannot train a tokenizer of 5000 pieces on this corpus: Vocabulary size too high"),
    (["abcdefghijklmnop"], 272, "v3", "cannot train a tokenizer of 272 pieces .*smaller than required_chars"),
    (["a\ud800"], 320, "v3", "half of a surrogate pair"),
])
def test_refusals(texts: list[str], size: int, version: str, reason: str) -> None:
    with pytest.raises(UsageError, match=rf"^[^\n]*{reason}[^\n]*$"):
        train_bpe(texts, size, version)


def test_the_corpus_own_errors_pass_through() -> None:
    def broken() -> Iterator[str]:
        yield "text"
        raise DataError("corpus.jsonl line 3: not JSON")

    with pytest.raises(DataError, match="line 3"):
        train_bpe(broken(), 320)
