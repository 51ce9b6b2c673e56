"""Encoding, decoding and streaming, for every kind of tokenizer alike."""

from __future__ import annotations

import pickle
import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from mixtral.errors import MixtralError, UsageError
from mixtral.tokenizer import Tokenizer
from tests.tokenizer.conftest import tokenizer_named

EVERY = ["v1", "v3", "small-tekken", "own"]
TEXT = st.text(alphabet=st.characters(exclude_categories=["Cs"], exclude_characters="▁"))


@pytest.mark.parametrize("name", EVERY)
@given(text=TEXT)
@example("")
@example(" ")
@example("  a  \n\t b")
@example("[INST] x [/INST]</s><unk><0x0A>[REF]")
def test_every_text_survives(name: str, text: str) -> None:
    tokenizer = tokenizer_named(name)
    ids = tokenizer.encode(text, eos=True)
    assert ids[0] == tokenizer.bos_id and ids[-1] == tokenizer.eos_id
    assert tokenizer.decode(ids) == text
    assert sum(tokenizer.byte_lengths()[ids]) == len(text.encode()) + (tokenizer.dummy_prefix and text != "")


def test_the_space_mark_is_the_one_exception(own: Tokenizer) -> None:
    assert own.decode(own.encode("a▁b")) == "a b"  # every sentencepiece model does this, Mistral's too


@pytest.mark.parametrize("name", EVERY)
def test_typed_control_tokens_stay_text(name: str) -> None:
    tokenizer = tokenizer_named(name)
    ids = tokenizer.encode("<s>[INST] hello [/INST]</s><unk>[TOOL_CALLS]", bos=False)
    assert not set(ids) & set(tokenizer.control)


@pytest.mark.parametrize("name", EVERY)
def test_a_stream_only_grows_and_equals_decode(name: str) -> None:
    tokenizer = tokenizer_named(name)
    rng = random.Random(1)
    for _ in range(30):
        ids = rng.choices(range(tokenizer.vocab_size), k=20) + tokenizer.encode("é 🙂")[:-1]  # ends inside a character
        stream = tokenizer.stream()
        parts = [stream.add(i) for i in ids]
        assert "".join(parts) + stream.flush() == tokenizer.decode(ids)


def test_no_half_characters(own: Tokenizer) -> None:
    stream = own.stream()
    parts = [stream.add(i) for i in own.encode("🙂")]
    assert parts == ["", "", "", "", "", "🙂"]  # <s>, the leading space, four bytes
    assert stream.flush() == ""
    stream = own.stream()
    assert "".join(map(stream.add, own.encode("a🙂")[:-1])) == "a"
    assert stream.flush() == "�"


def test_a_stream_goes_on_after_a_prompt(own: Tokenizer) -> None:
    prompt, rest = own.encode("def"), own.encode("def main")[len(own.encode("def")):]
    stream = own.stream(after=prompt)
    assert "".join(map(stream.add, rest)) + stream.flush() == " main"


@pytest.mark.parametrize("name", EVERY)
def test_a_batch_equals_one_by_one(name: str) -> None:
    tokenizer = tokenizer_named(name)
    texts = ["", " a", "def f():\n    return 1\n", "日本語"]
    assert tokenizer.encode_batch(texts, bos=False, eos=True) == [tokenizer.encode(t, False, True) for t in texts]
    assert tokenizer.encode_batch([]) == []


def test_control_tokens_have_no_bytes(own: Tokenizer) -> None:
    lengths = own.byte_lengths()
    assert lengths.dtype == np.int64 and lengths.shape == (own.vocab_size,)
    assert own.token_bytes(own.bos_id) == b"" and lengths[own.eos_id] == 0
    newline = own.encode("\n")[-1]
    assert own.token_bytes(newline) == b"\n" and lengths[newline] == 1


@pytest.mark.parametrize("token_id", [-1, 1000])
def test_ids_out_of_range(own: Tokenizer, token_id: int) -> None:
    with pytest.raises(UsageError, match=rf"token id {token_id} is out of range: .* ids 0 to 999"):
        own.decode([5, token_id])


def test_lone_surrogates(own: Tokenizer) -> None:
    for encode in (own.encode, lambda text: own.encode_batch(["a", text])):
        with pytest.raises(UsageError, match=r"character 1 is '\\ud800', half of a surrogate pair"):
            encode("a\ud800b")


@pytest.mark.parametrize("name", ["own", "small-tekken"])
def test_a_tokenizer_travels_to_another_process(name: str) -> None:
    tokenizer = tokenizer_named(name)
    assert tokenizer.mistral is not None
    copy = pickle.loads(pickle.dumps(tokenizer))
    assert copy.encode("def f(): é") == tokenizer.encode("def f(): é")
    assert copy.fingerprint == tokenizer.fingerprint and copy.mistral is not None


def test_fingerprints_tell_vocabularies_apart() -> None:
    assert len({tokenizer_named(name).fingerprint for name in [*EVERY, "v2"]}) == 5


def test_an_unwritable_folder(own: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(MixtralError, match=r"cannot write .*file"):
        own.save(tmp_path / "file" / "sub")


def test_saving_keeps_the_files_of_another_tokenizer(own: Tokenizer, tmp_path: Path) -> None:
    own.save(tmp_path)
    own.save(tmp_path)  # the same files again
    (tmp_path / "tokenizer_config.json").write_text("{}")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(UsageError, match=r"tokenizer_config\.json: exists already, and is of another tokenizer"):
        own.save(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    (tmp_path / "tokenizer_config.json").rename(tmp_path / "tokenizer.json")
    (tmp_path / own.file_name).unlink()  # type: ignore[attr-defined]
    with pytest.raises(UsageError, match="is of another tokenizer"):
        own.save(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer.json"]
