"""Mistral's own files: the ids are mistral-common's, names tell versions, damage is told in one line."""

from __future__ import annotations

import io
import json

import pytest
from mistral_common.tokens.tokenizers.base import TokenizerVersion
from sentencepiece import SentencePieceTrainer

from mixtral.errors import MixtralError, UsageError
from mixtral.tokenizer.mistral import VERSIONS, SentencePieceTokenizer, TekkenTokenizer
from tests.tokenizer.conftest import FILES, NAMES, tokenizer_named


@pytest.mark.parametrize("name", [*NAMES, "own"])
def test_ids_and_text_are_mistral_commons(name: str, awkward_lines: list[str]) -> None:
    tokenizer = tokenizer_named(name)
    assert tokenizer.mistral is not None
    theirs = tokenizer.mistral.instruct_tokenizer.tokenizer
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (theirs.n_words, theirs.bos_id, theirs.eos_id)
    lines = awkward_lines[::10]
    ids = tokenizer.encode_batch(lines, eos=True)
    assert ids == [theirs.encode(line, bos=True, eos=True) for line in lines]
    assert [tokenizer.decode(i) for i in ids] == [theirs.decode(i) for i in ids]


@pytest.mark.parametrize(("name", "size"), [("v1", 32_000), ("v2", 32_768), ("v3", 32_768), ("tekken", 131_072)])
def test_versions_and_sizes(name: str, size: int) -> None:
    tokenizer = tokenizer_named(name)
    assert (tokenizer.version, tokenizer.vocab_size) == (name, size)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (1, 2)


def test_known_ids() -> None:
    assert tokenizer_named("v1").encode("Hello world") == [1, 22557, 1526]
    assert tokenizer_named("v3").control[3] == "[INST]"


@pytest.mark.parametrize(("name", "version"), [("v1", "v1"), ("v3", "v3")])
def test_a_bare_name_is_told_by_its_control_tokens(name: str, version: str) -> None:
    data = (FILES / NAMES[name]).read_bytes()
    tokenizer = SentencePieceTokenizer(data, "tokenizer.model")
    assert (tokenizer.version, tokenizer.file_name) == (version, f"tokenizer.model.{version}")


def test_the_versions_are_mistral_commons() -> None:
    assert list(VERSIONS) == list(TokenizerVersion.__members__)


def test_an_unknown_version() -> None:
    data = (FILES / NAMES["v1"]).read_bytes()
    with pytest.raises(UsageError, match=r"own.model.v99: unknown tokenizer version 'v99'; .*\.model\.v3"):
        SentencePieceTokenizer(data, "own.model.v99")


@pytest.mark.parametrize("keep", [0, 10, 1000, 400_000])
def test_a_damaged_sentencepiece_file(keep: int) -> None:
    data = (FILES / NAMES["v1"]).read_bytes()[:keep]
    with pytest.raises(MixtralError, match=r"cut.model.v1: the file is damaged or not a sentencepiece model; expected"):
        SentencePieceTokenizer(data, "cut.model.v1")


def test_no_beginning_token() -> None:
    model = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(["a b c"]), model_writer=model, vocab_size=264, model_type="bpe", byte_fallback=True,
        normalization_rule_name="identity", remove_extra_whitespaces=False, bos_id=-1, minloglevel=2)
    with pytest.raises(MixtralError, match=r"x\.model: no <s> or no </s> among the pieces"):
        SentencePieceTokenizer(model.getvalue(), "x.model")


@pytest.mark.parametrize("data", [b"", b"not json", b"[]", b"{}", json.dumps({"config": {"version": "v3"}}).encode()])
def test_a_damaged_tekken_file(data: bytes) -> None:
    reason = "(damaged or not a tekken.json: |not JSON: |must hold a JSON object)"
    with pytest.raises(MixtralError, match=rf"^tekken.json: {reason}[^\n]*$"):
        TekkenTokenizer(data, "tekken.json")
