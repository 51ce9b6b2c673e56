"""What `save` writes: transformers' AutoTokenizer gives the same ids on 10,000 lines."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from mixtral.tokenizer import load_tokenizer
from mixtral.tokenizer.export import byte_characters, merge_list
from tests.tokenizer.conftest import tokenizer_named

Saved = Callable[[str], Path]
AutoTokenizer = pytest.importorskip("transformers").AutoTokenizer


@pytest.mark.parametrize("name", ["v1", "v3", "own", "small-tekken"])
def test_transformers_gives_the_same_ids(name: str, saved: Saved, awkward_lines: list[str]) -> None:
    tokenizer = tokenizer_named(name)
    ours = tokenizer.encode_batch(awkward_lines)
    theirs = AutoTokenizer.from_pretrained(saved(name))  # no model's config.json beside it: tokenizer.json alone
    assert len(awkward_lines) == 10_000
    assert theirs(awkward_lines)["input_ids"] == ours
    assert theirs(awkward_lines[:100], add_special_tokens=False)["input_ids"] == [ids[1:] for ids in ours[:100]]
    assert len(theirs) == tokenizer.vocab_size
    assert (theirs.bos_token_id, theirs.eos_token_id) == (tokenizer.bos_id, tokenizer.eos_id)
    assert theirs.batch_decode(ours[::50], skip_special_tokens=True) == [tokenizer.decode(ids) for ids in ours[::50]]


@pytest.mark.parametrize("name", ["own", "small-tekken"])
def test_in_a_model_folder_too(name: str, saved: Saved, tmp_path: Path, awkward_lines: list[str]) -> None:
    shutil.copytree(saved(name), tmp_path, dirs_exist_ok=True)
    (tmp_path / "config.json").write_text('{"model_type": "mixtral"}')  # makes transformers prefer a tekken.json
    lines = awkward_lines[::20]
    assert AutoTokenizer.from_pretrained(tmp_path)(lines)["input_ids"] == tokenizer_named(name).encode_batch(lines)


def test_typed_control_tokens_are_the_known_difference(saved: Saved) -> None:
    own = tokenizer_named("own")
    inst = next(i for i, name in own.control.items() if name == "[INST]")
    assert inst in AutoTokenizer.from_pretrained(saved("own"))("[INST] a")["input_ids"]
    split = AutoTokenizer.from_pretrained(saved("own"), split_special_tokens=True)
    assert split("[INST] a</s>")["input_ids"] == own.encode("[INST] a</s>")


@pytest.mark.parametrize("name", ["v3", "own", "small-tekken"])
def test_the_exported_file_is_the_same_tokenizer(name: str, saved: Saved, awkward_lines: list[str]) -> None:
    tokenizer, exported = tokenizer_named(name), load_tokenizer(saved(name) / "tokenizer.json")
    assert exported.version == "json" and exported.fingerprint == tokenizer.fingerprint
    lines = [*awkward_lines[::10], "[INST] typed </s>"]
    assert exported.encode_batch(lines) == tokenizer.encode_batch(lines)
    assert (exported.byte_lengths() == tokenizer.byte_lengths()).all()


@pytest.mark.parametrize("name", ["v1", "own"])
def test_a_saved_folder_loads_as_the_same_tokenizer(name: str, saved: Saved) -> None:
    tokenizer, again = tokenizer_named(name), load_tokenizer(saved(name))
    assert (again.version, again.fingerprint) == (tokenizer.version, tokenizer.fingerprint)
    assert again.encode("  def f():\n") == tokenizer.encode("  def f():\n")


def test_merges_come_in_order() -> None:
    assert merge_list(["ab", "aab", "a", "b", "aa"]) == [("a", "b"), ("aa", "b"), ("a", "ab"), ("a", "a")]


def test_every_byte_has_a_character_of_its_own() -> None:
    table = byte_characters()
    assert len(set(table)) == 256 and table[ord("a")] == "a" and table[ord(" ")] == "Ġ" and table[ord("\n")] == "Ċ"
