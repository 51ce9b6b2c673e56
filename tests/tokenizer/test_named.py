"""Tokens that the files beside a vocabulary name for a use, and that the vocabulary lacks: transformers adds them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from mixtral.errors import UsageError
from mixtral.lm import LM
from mixtral.model import Mixtral, initialise
from mixtral.presets import preset
from mixtral.tokenizer import load_tokenizer
from mixtral.tokenizer.gguf import tokenizer_metadata
from mixtral.tokenizer.mistral import SentencePieceTokenizer
from mixtral.tokenizer.tokenizer_json import JsonTokenizer
from tests.tokenizer.conftest import tokenizer_named
from tests.tokenizer.kinds import write

USUAL = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
SIZE = 1000  # of the own vocabulary
X: dict[str, Any] = {"1000": {"content": "<x>", "special": True}}
TYPED = {"__type": "AddedToken"}
CASES: dict[str, dict[str, dict[str, Any]]] = {  # what each file holds beside USUAL
    "end": {"config": {"eos_token": "<E>"}},
    "all": {"config": {"mask_token": "<M>", "cls_token": "<C>", "pad_token": "<P>", "sep_token": "<S>",
                       "unk_token": "<U>", "eos_token": "<E>", "bos_token": "<B>"}},
    "additional": {"config": {"additional_special_tokens": ["<t1>", "<t2>"], "pad_token": "[PAD]"}},
    "extra": {"config": {"extra_special_tokens": ["<t1>"], "additional_special_tokens": ["<t2>"]}},
    "a use each": {"config": {"extra_special_tokens": {"boi": "<boi>"}, "image_token": "<img>", "eos_token": "<E>"}},
    "flags": {"config": {"eos_token": {"content": "<E>", "lstrip": True, "normalized": True, **TYPED},
                         "pad_token": {"content": "<P>", "special": False, **TYPED}}},
    "after added": {"config": {"added_tokens_decoder": X, "eos_token": "<E>", "extra_special_tokens": ["<x>", "<z>"]}},
    "special though added": {"config": {"added_tokens_decoder": {"1000": {"content": "<E>"}}, "eos_token": "<E>"}},
    "twice": {"config": {"eos_token": "<E>", "pad_token": "<E>", "additional_special_tokens": ["<E>", "<A>"]}},
    "ordinary": {"config": {"pad_token": "in"}},
    "map": {"map": {"eos_token": {"content": "<E>", "lstrip": True}, "pad_token": "<P>"}},
    "map, extra": {"map": {"extra_special_tokens": ["<A>"], "image_token": "<img>"},
                   "config": {"extra_special_tokens": ["<B>"]}},
    "map, added": {"map": {"additional_special_tokens": ["<A>"], "eos_token": "<E>"}, "added": {"<A>": 1000}},
}  # fmt: skip
LINES = ["a", "x <E> y", " <E>", "in line", "<t1><t2> in", "a<A>b <A>", "<x> b<img>", "a <P>b"]


def _folder(case: str, folder: Path, vocabulary: str = "tokenizer__json") -> Path:
    own = tokenizer_named("own")._files()
    files = CASES[case]
    usual = {} if "map" in files else USUAL
    beside: dict[str, Any] = {"tokenizer_config__json": {**usual, **files.get("config", {})}}
    if "map" in files:
        beside["special_tokens_map__json"] = USUAL | files["map"]
    if "added" in files:
        beside["added_tokens__json"] = files["added"]
    name = {"tokenizer__json": "tokenizer.json", "own__model__v3": "own.model.v3"}[vocabulary]
    write(folder, **{vocabulary: own[name]}, config__json={"model_type": "mixtral"}, **beside)
    return folder


@pytest.mark.parametrize("case", CASES)
def test_ids_are_those_of_transformers(case: str, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(_folder(case, tmp_path))
    theirs = AutoTokenizer.from_pretrained(tmp_path, split_special_tokens=True)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (theirs.bos_token_id, theirs.eos_token_id)
    assert tokenizer.vocab_size == len(theirs)
    assert isinstance(tokenizer, JsonTokenizer)
    assert {i: tokenizer.texts[i] for i in theirs.added_tokens_decoder} == {
        i: token.content for i, token in theirs.added_tokens_decoder.items()
    }
    assert {i for i, token in theirs.added_tokens_decoder.items() if token.special} == tokenizer.control.keys()
    assert [tokenizer.encode(line) for line in LINES] == theirs(LINES)["input_ids"]
    tokenizer.save(tmp_path / "saved")
    again = load_tokenizer(tmp_path / "saved")
    assert again.fingerprint == tokenizer.fingerprint and again.eos_id == tokenizer.eos_id
    assert again.encode_batch(LINES) == tokenizer.encode_batch(LINES)


def test_beside_a_sentencepiece_model_too(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(_folder("end", tmp_path, "own__model__v3"))
    assert tokenizer.eos_id == SIZE and tokenizer.control[SIZE] == "<E>"
    assert tokenizer.encode("x <E> y") == tokenizer_named("own").encode("x <E> y")
    write(tmp_path, tokenizer_config__json=USUAL)
    assert isinstance(load_tokenizer(tmp_path), SentencePieceTokenizer)


def test_tokens_beyond_the_rows_of_a_model(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """They are never sampled, refused in a prompt, and left out of GGUF, unless a text begins or ends with them."""
    named = load_tokenizer(_folder("additional", tmp_path, "own__model__v3"))
    assert named.vocab_size == SIZE + 3
    assert len(tokenizer_metadata(named, SIZE)["tokenizer.ggml.tokens"]) == SIZE
    assert "the model has no row for '[PAD], <t1>, <t2>'" in caplog.text
    lm = LM(initialise(Mixtral(preset("tiny").replace(vocab_size=SIZE))), named)
    assert max(lm.generate([1, 5], max_tokens=40, ignore_eos=True, temperature=9.0, seed=0)) < SIZE
    with pytest.raises(UsageError, match=f"token id {SIZE} is out of range; the model knows ids 0 to {SIZE - 1}"):
        lm.generate([1, SIZE], max_tokens=1)
    end = load_tokenizer(_folder("end", tmp_path, "own__model__v3"))
    with pytest.raises(UsageError, match=f"has {SIZE + 1} pieces, more than the model's vocabulary of {SIZE}"):
        tokenizer_metadata(end, SIZE)
