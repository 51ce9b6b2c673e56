"""The sentencepiece reader, held to the library's own answers."""

from __future__ import annotations

import io

import pytest
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer

from mixtral.tokenizer.spm_model import Kind, read_spm_model, write_spm_model
from tests.tokenizer.conftest import FILES, NAMES


@pytest.mark.parametrize("name", ["v1", "v3"])
def test_pieces_are_the_librarys(name: str) -> None:
    data = (FILES / NAMES[name]).read_bytes()
    library = SentencePieceProcessor(model_proto=data)
    pieces, dummy_prefix = read_spm_model(data)
    ids = range(library.vocab_size())
    assert [p.text for p in pieces] == [library.id_to_piece(i) for i in ids]
    assert [p.score for p in pieces] == [library.get_score(i) for i in ids]
    assert [p.kind == Kind.CONTROL for p in pieces] == [library.is_control(i) for i in ids]
    assert [p.kind == Kind.BYTE for p in pieces] == [library.is_byte(i) for i in ids]
    assert sum(p.kind == Kind.USER_DEFINED for p in pieces) == (20 if name == "v3" else 0)
    assert dummy_prefix


@pytest.mark.parametrize("name", ["v1", "v3"])
def test_writing_what_was_read(name: str) -> None:
    model = read_spm_model((FILES / NAMES[name]).read_bytes())
    data = write_spm_model(model, bos_id=1, eos_id=2)
    assert read_spm_model(data) == model
    library = SentencePieceProcessor(model_proto=data)
    assert (library.unk_id(), library.bos_id(), library.eos_id(), library.pad_id()) == (0, 1, 2, -1)
    with pytest.raises(ValueError, match="0 pieces stand for the unknown; exactly one must"):
        write_spm_model(model._replace(pieces=model.pieces[1:]), 0, 1)


def _train(**options: object) -> bytes:
    model = io.BytesIO()
    settings = {"vocab_size": 265, "model_type": "bpe", "byte_fallback": True, "normalization_rule_name": "identity",
                "remove_extra_whitespaces": False, "minloglevel": 2, **options}
    SentencePieceTrainer.train(sentence_iterator=iter(["a b c a b"]), model_writer=model, **settings)
    return model.getvalue()


def test_no_dummy_prefix() -> None:
    assert not read_spm_model(_train(add_dummy_prefix=False)).dummy_prefix


@pytest.mark.parametrize(("options", "reason"), [
    ({"model_type": "unigram", "hard_vocab_limit": False}, "only BPE models with byte fallback"),
    ({"byte_fallback": False, "vocab_size": 9}, "only BPE models with byte fallback"),
    ({"treat_whitespace_as_suffix": True}, "only BPE models with byte fallback"),
    ({"normalization_rule_name": "nmt_nfkc"}, "only models that keep the text as it is"),
    ({"remove_extra_whitespaces": True}, "only models that keep the text as it is"),
])
def test_models_of_another_family(options: dict[str, object], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        read_spm_model(_train(**options))


@pytest.mark.parametrize("data", [b"", b"garbage" * 9, b"\x0a", b"\x0a\x05ab", b"\x0b", b"\xff" * 40])
def test_other_bytes(data: bytes) -> None:
    with pytest.raises(ValueError, match="damaged or not a sentencepiece model"):
        read_spm_model(data)
