"""Byte-level BPE that goes into GGUF metadata and comes back, and that others put there."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as FastTokenizer
from transformers import GPT2Tokenizer, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import TikTokenConverter

from mixtral.errors import MixtralError, UsageError
from mixtral.tokenizer import Tokenizer, load_tokenizer
from mixtral.tokenizer.gguf import read_metadata, tokenizer_metadata
from mixtral.tokenizer.gguf_bpe import PRE_TOKENIZERS, Vocabulary, vocabulary_json
from mixtral.tokenizer.spm_model import Kind
from mixtral.tokenizer.tokenizer_json import JsonTokenizer
from tests.tokenizer.conftest import FILES, NAMES, STDLIB, tokenizer_named
from tests.tokenizer.lines import make_lines

KEY = "tokenizer.ggml."
TEXT = "def f(a):\n        return  a1234  # été 日本 🙂 it's <|im_end|> <tag>\n"
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


def _tekken_pattern() -> str:
    pattern: str = json.loads((FILES / NAMES["tekken"]).read_bytes())["config"]["pattern"]
    return pattern


def _split(pattern: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(pattern), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False),
    ])  # fmt: skip


# What cuts text in the tokenizers of these names, as the libraries and files of others have it.
THEIRS: dict[str, tuple[Callable[[], pre_tokenizers.PreTokenizer], bool]] = {
    "gpt-2": (lambda: GPT2Tokenizer().backend_tokenizer.pre_tokenizer, False),
    "smollm": (lambda: pre_tokenizers.Sequence([pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(False)]), False),
    "llama-bpe": (lambda: _split(TikTokenConverter().pattern), True),
    "tekken": (lambda: _split(_tekken_pattern()), True),
}


@functools.cache
def trained(pre: str) -> FastTokenizer:
    """A small vocabulary of this kind, learnt from a few sources of the standard library."""
    fast = FastTokenizer(models.BPE(ignore_merges=THEIRS[pre][1]))
    fast.pre_tokenizer, fast.decoder = THEIRS[pre][0](), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=1500, special_tokens=list(SPECIAL), initial_alphabet=alphabet)
    fast.train([str(STDLIB / name) for name in ("ast.py", "textwrap.py", "json/decoder.py")], trainer)
    fast.add_tokens([AddedToken("<tag>", normalized=False)])
    return fast


@pytest.fixture
def folder(tmp_path: Path) -> Callable[[str], Path]:
    def save(pre: str) -> Path:
        names = {"bos_token": SPECIAL[1], "eos_token": SPECIAL[2]}
        PreTrainedTokenizerFast(tokenizer_object=trained(pre), **names).save_pretrained(tmp_path / pre)
        return tmp_path / pre

    return save


def bare(tokenizer: Tokenizer, vocab_size: int = 1600) -> dict[str, Any]:
    """The metadata without the tokenizer.json, as other programs write them."""
    metadata = tokenizer_metadata(tokenizer, vocab_size)
    del metadata["tokenizer.huggingface.json"]
    return metadata


def test_every_name_is_held_to_another_s() -> None:
    assert THEIRS.keys() == PRE_TOKENIZERS.keys()


@pytest.mark.parametrize("pre", PRE_TOKENIZERS)
def test_ids_by_way_of_gguf_are_transformers(pre: str, folder: Callable[[str], Path]) -> None:
    path, lines = folder(pre), make_lines(10_000)
    theirs = PreTrainedTokenizerFast.from_pretrained(path)
    metadata = bare(load_tokenizer(path))
    assert metadata[KEY + "model"] == "gpt2" and metadata[KEY + "pre"] == pre
    back = read_metadata(metadata)
    wanted = theirs(lines, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert back.encode_batch(lines, bos=False, eos=False) == wanted
    assert all(back.decode(ids) == line for ids, line in zip(wanted, lines, strict=True))


@pytest.mark.parametrize("pre", PRE_TOKENIZERS)
def test_there_and_back(pre: str, folder: Callable[[str], Path]) -> None:
    tokenizer = load_tokenizer(folder(pre))
    for metadata in (tokenizer_metadata(tokenizer, 1600), bare(tokenizer)):
        back = read_metadata(metadata)
        assert back.fingerprint == tokenizer.fingerprint
        assert (back.bos_id, back.eos_id, back.adds_bos, back.adds_eos) == (1, 2, False, False)
        assert back.encode(TEXT) == tokenizer.encode(TEXT) and back.decode(back.encode(TEXT)) == TEXT
    kinds = metadata[KEY + "token_type"]
    assert [kinds[i] for i in (0, 2, 3, 1500, 1501)] == [3, 3, 1, 4, 5]
    assert metadata[KEY + "tokens"][1501] == "[PAD1501]" and len(kinds) == 1600


def test_tekken_becomes_gguf() -> None:
    tekken = tokenizer_named("small-tekken")
    metadata = tokenizer_metadata(tekken, 11_000)
    assert metadata[KEY + "pre"] == "tekken"
    back, lines = read_metadata(metadata), make_lines(300)
    assert back.fingerprint == tekken.fingerprint and back.adds_bos
    assert back.encode_batch(lines) == tekken.encode_batch(lines)


@pytest.mark.parametrize(("pre", "flag", "adds"), [
    ("gpt-2", None, False), ("smollm", None, False), ("llama-bpe", None, True), ("tekken", None, True),
    ("llama3", None, True), ("smollm", True, True), ("tekken", False, False),
])  # fmt: skip
def test_what_stands_before_a_text(pre: str, flag: bool | None, adds: bool) -> None:
    metadata = small() | {KEY + "pre": pre} | ({} if flag is None else {KEY + "add_bos_token": flag})
    assert read_metadata(metadata).encode("ab") == [0] * adds + [4]


def small() -> dict[str, Any]:
    return {
        KEY + "model": "gpt2", KEY + "pre": "smollm", KEY + "tokens": ["<s>", "</s>", "a", "b", "ab"],
        KEY + "token_type": [3, 3, 1, 1, 1], KEY + "merges": ["a b"], KEY + "bos_token_id": 0,
        KEY + "eos_token_id": 1,
    }  # fmt: skip


def test_begin_is_the_end_where_none_is_named() -> None:
    metadata = small()
    del metadata[KEY + "bos_token_id"]
    tokenizer = read_metadata(metadata)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (1, 1) and tokenizer.encode("ab") == [4]


@pytest.mark.parametrize(("change", "message"), [
    ({"tokens": "abc"}, r"tokenizer\.ggml\.tokens must be a list, not 'abc'"),
    ({"tokens": ["<s>", "</s>", "a", "b", ""]}, r"tokenizer\.ggml\.tokens\[4\] is '', which is no text"),
    ({"tokens": ["<s>", "</s>", "a", "b", "a"]}, r"tokenizer\.ggml\.tokens holds 'a' 2 times"),
    ({"token_type": [3, 3, 1, 1]}, r"tokenizer\.ggml\.tokens has 5 entries, tokenizer\.ggml\.token_type 4"),
    ({"token_type": [3, 3, 1, 1, 9]}, r"tokenizer\.ggml\.token_type\[4\] is 9, which is no kind"),
    ({"token_type": [3, 3, 3, 3, 3]}, r"tokenizer\.ggml\.token_type names no normal token"),
    ({"merges": ["ab"]}, r"tokenizer\.ggml\.merges\[0\] is 'ab', which is no pair of tokens"),
    ({"merges": ["a c"]}, "damaged or not a tokenizer.json"),
    ({"eos_token_id": 5}, r"tokenizer\.ggml\.eos_token_id must be the id of one of its 5 tokens, not 5"),
    ({"eos_token_id": None}, r"tokenizer\.ggml\.eos_token_id must be the id of one of its 5 tokens, not None"),
    ({"bos_token_id": -1}, r"tokenizer\.ggml\.bos_token_id must be the id of one of its 5 tokens, not -1"),
    ({"add_bos_token": 1}, r"tokenizer\.ggml\.add_bos_token must be true or false, not 1"),
    ({"pre": "qwen2"}, r"tokenizer\.ggml\.pre is 'qwen2', a way to cut text into words that is not known; gpt-2, "),
])  # fmt: skip
def test_damaged_metadata(change: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, MixtralError), match=message):
        read_metadata(small() | {KEY + key: value for key, value in change.items()})


def test_a_json_that_is_of_another_vocabulary() -> None:
    other = Vocabulary(["<s>", "</s>", "a", "c", "b"], [Kind.CONTROL] * 2 + [Kind.NORMAL] * 3, [], "smollm")
    document = vocabulary_json(other).decode()
    with pytest.raises(ValueError, match=r"tokenizer\.huggingface\.json has 'c' where tokenizer\.ggml\.tokens has 'b'"):
        read_metadata(small() | {"tokenizer.huggingface.json": document})
    first = Vocabulary(["<b>", "</s>", "a", "b", "ab"], [Kind.CONTROL] * 2 + [Kind.NORMAL] * 3, [], "smollm")
    named = {"mixtral.file.tokenizer_config.json": '{"bos_token": "<b>", "eos_token": "</s>"}'}
    document = vocabulary_json(first).decode()
    with pytest.raises(ValueError, match=r"tokenizer\.huggingface\.json has '<b>' where tokenizer\.ggml\.tokens has"):
        read_metadata(small() | named | {"tokenizer.huggingface.json": document})
    with pytest.raises(ValueError, match=r"tokenizer\.huggingface\.json must be a text, not 5"):
        read_metadata(small() | {"tokenizer.huggingface.json": 5})


def test_what_gguf_has_no_name_for(folder: Callable[[str], Path]) -> None:
    path = folder("smollm")
    document = json.loads((path / "tokenizer.json").read_bytes())
    for change, what in (
        ({"pre_tokenizer": None}, "BPE with text cut by nothing"),
        ({"normalizer": {"type": "NFC"}}, "BPE with text cut by Digits, ByteLevel"),
    ):
        (path / "tokenizer.json").write_text(json.dumps(document | change))
        with pytest.raises(UsageError, match=f"cannot be written to GGUF: {what}; byte-level BPE cut as gpt-2, smollm"):
            tokenizer_metadata(load_tokenizer(path), 1600)


def test_more_tokens_than_rows(folder: Callable[[str], Path], caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = load_tokenizer(folder("gpt-2"))
    assert isinstance(tokenizer, JsonTokenizer)
    with pytest.raises(UsageError, match="the tokenizer has 1501 tokens, more than the model's vocabulary of 1499"):
        tokenizer_metadata(tokenizer, 1499)
    assert len(tokenizer_metadata(tokenizer, 1500)[KEY + "tokens"]) == 1500
    assert "the model has no row for '<tag>'" in caplog.text
