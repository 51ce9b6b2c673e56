"""Tokenizers and chat templates that go into GGUF files and come back."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import jinja2
import pytest
from mistral_common.protocol.instruct.messages import AssistantMessage, SystemMessage, UserMessage
from mistral_common.protocol.instruct.request import ChatCompletionRequest

from mixtral.config.formats import read_config
from mixtral.errors import MixtralError, UsageError
from mixtral.gguf.writer import TensorEntry, header_bytes
from mixtral.tokenizer import Tokenizer, load_tokenizer
from mixtral.tokenizer.chat_templates import TEMPLATES, folder_templates
from mixtral.tokenizer.gguf import read_metadata, side_files, tokenizer_metadata
from mixtral.tokenizer.load import find_tokenizer
from mixtral.weights import convert, save_hf
from mixtral.weights.gguf_write import write_gguf
from tests.tokenizer.conftest import tokenizer_named
from tests.tokenizer.kinds import KINDS
from tests.weights.weight_states import SPARSE, random_state

TEXT = "def f(a):\n        return  a  # été 日本 🙂 [INST] [REFERENCE_DOC_3] <s>\n"
KEY = "tokenizer.ggml."


@pytest.mark.parametrize("name", ["v1", "v3", "own"])
def test_there_and_back(name: str) -> None:
    tokenizer = tokenizer_named(name)
    metadata = tokenizer_metadata(tokenizer, tokenizer.vocab_size + 3)
    assert metadata[KEY + "model"] == "llama" and metadata[KEY + "tokens"][-1] == f"[PAD{tokenizer.vocab_size + 2}]"
    assert metadata[KEY + "token_type"][:3] == [2, 3, 3] and metadata[KEY + "token_type"][-1] == 5
    back = read_metadata(metadata)
    assert back.fingerprint == tokenizer.fingerprint and back.version == tokenizer.version
    assert (back.bos_id, back.eos_id, back.dummy_prefix) == (tokenizer.bos_id, tokenizer.eos_id, tokenizer.dummy_prefix)
    assert back.encode(TEXT) == tokenizer.encode(TEXT) and back.decode(back.encode(TEXT)) == TEXT


def test_files_by_way_of_gguf(tmp_path: Path) -> None:
    own, config = tokenizer_named("own"), SPARSE.replace(vocab_size=1000)
    save_hf(random_state(config), config, tmp_path / "src")
    own.save(tmp_path / "src")
    convert(tmp_path / "src", tmp_path / "a.gguf", "gguf")
    back = find_tokenizer(tmp_path / "a.gguf")
    assert back is not None and back.fingerprint == own.fingerprint
    convert(tmp_path / "a.gguf", tmp_path / "dst", "hf")
    assert load_tokenizer(tmp_path / "dst").fingerprint == own.fingerprint
    assert not (tmp_path / "dst/chat_template.jinja").exists()  # the file's was the version's own
    assert read_config(tmp_path / "dst") == config


@pytest.mark.parametrize("holder", ["chat_template.jinja", "tokenizer_config.json", "several"])
def test_a_template_goes_along(holder: str, tmp_path: Path) -> None:
    own, config, template = tokenizer_named("own"), SPARSE.replace(vocab_size=1000), "{{ messages }} \n ü"
    save_hf(random_state(config), config, tmp_path / "src")
    own.save(tmp_path / "src")
    if holder == "chat_template.jinja":
        (tmp_path / "src" / holder).write_text(template)
    else:
        several = [{"name": "rag", "template": "no"}, {"name": "default", "template": template}]
        told = {"chat_template": several if holder == "several" else template}
        (tmp_path / "src/tokenizer_config.json").write_text(json.dumps(told))
    convert(tmp_path / "src", tmp_path / "a.gguf", "gguf")
    assert folder_templates(side_files(tmp_path / "a.gguf"))["default"] == template
    convert(tmp_path / "a.gguf", tmp_path / "dst", "hf")
    assert folder_templates(side_files(tmp_path / "dst"))["default"] == template


def test_no_tokenizer(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_gguf(random_state(SPARSE), SPARSE, tmp_path / "a.gguf")
    assert find_tokenizer(tmp_path / "a.gguf") is None and not caplog.text
    assert find_tokenizer(tmp_path) is None and side_files(tmp_path) == {}


@pytest.mark.parametrize(("metadata", "reason"), [
    ({KEY + "model": "t5"}, "its tokenizer is of kind 't5', which is not read from GGUF; 'llama' and 'gpt2' are"),
    ({KEY + "model": "gpt2"}, "tokenizer.ggml.pre is None, a way to cut text into words that is not known; gpt-2, "),
    ({KEY + "model": "gpt2", KEY + "pre": "qwen2"}, "tokenizer.ggml.pre is 'qwen2', a way to cut text into words that"),
])  # fmt: skip
def test_what_is_not_read(
    metadata: dict[str, Any], reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    """The weights are loaded all the same; who asks for the tokenizer alone is told."""
    monkeypatch.setattr("mixtral.weights.gguf_write.tokenizer_metadata", lambda *_: metadata)
    write_gguf(random_state(SPARSE), SPARSE, tmp_path / "a.gguf")
    assert find_tokenizer(tmp_path / "a.gguf") is None
    assert f"a.gguf: {reason}" in caplog.text and caplog.text.endswith("are: the model has no tokenizer\n")
    with pytest.raises(UsageError, match=r"a\.gguf: no tokenizer that is read from GGUF"):
        load_tokenizer(tmp_path / "a.gguf")


def test_a_damaged_vocabulary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    metadata = {KEY + "model": "llama"}
    monkeypatch.setattr("mixtral.weights.gguf_write.tokenizer_metadata", lambda *_: metadata)
    write_gguf(random_state(SPARSE), SPARSE, tmp_path / "b.gguf")
    with pytest.raises(MixtralError, match=r"b\.gguf: its vocabulary cannot be used: tokenizer\.ggml\.tokens, "):
        find_tokenizer(tmp_path / "b.gguf")


def test_what_cannot_be_written() -> None:
    with pytest.raises(UsageError, match="the tokenizer has 1000 pieces, more than the model's vocabulary of 999"):
        tokenizer_metadata(tokenizer_named("own"), 999)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scores": [0.5]}, "must be lists of one length"),
        ({"token_type": 3}, "must be lists of one length"),
        ({"token_type": [9] * 1000}, "tokenizer.ggml.token_type\\[0\\] is 9, which is no kind"),
        ({"bos_token_id": -1}, "tokenizer.ggml.bos_token_id must be a token id, not -1"),
        ({"unknown_token_id": False}, "must be the id of one of its 1000 tokens, not False"),
        ({"unknown_token_id": 1000}, "must be the id of one of its 1000 tokens, not 1000"),
        ({"eos_token_id": [2]}, r"tokenizer.ggml.eos_token_id must be a token id, not \[2\]"),
        ({"tokens": 5}, "must be lists of one length"),
        ({"tokens": [5] * 1000}, r"tokenizer.ggml.tokens\[0\] is 5, which is no text"),
        ({"scores": ["x"] * 1000}, r"tokenizer.ggml.scores\[0\] is 'x', which is no score"),
        ({"scores": [1e300] * 1000}, r"scores\[0\] is 1e\+300, which is no score"),
        ({"scores": [float("nan")] * 1000}, r"scores\[0\] is nan, which is no score"),
        ({"token_type": [1, 3, 3] + [6] * 997}, "damaged"),  # bytes that are not written as such
        ({"add_bos_token": 1}, "tokenizer.ggml.add_bos_token must be true or false, not 1"),
        ({"add_space_prefix": "no"}, "tokenizer.ggml.add_space_prefix must be true or false, not 'no'"),
        ({"tokens": ["a"] * 1000}, r"tokenizer\.ggml\.tokens holds 'a' 1000 times"),
    ],
)
def test_damaged_vocabularies(change: dict[str, Any], message: str) -> None:
    metadata = tokenizer_metadata(tokenizer_named("own"), 1000) | {KEY + key: v for key, v in change.items()}
    with pytest.raises((MixtralError, ValueError), match=message):
        read_metadata(metadata)


@pytest.mark.parametrize("key", ["bos_token_id", "eos_token_id"])
@pytest.mark.parametrize("other", [0, 24, 300, 1000, 99_999])  # unknown, a byte, a word, in the padding, beyond
def test_a_models_end_that_is_no_control_token(key: str, other: int) -> None:
    """Files of others have one key for it and for the tokenizer's."""
    own = tokenizer_named("own")
    back = read_metadata(tokenizer_metadata(own, 1003) | {KEY + key: other})
    assert (back.bos_id, back.eos_id, back.fingerprint) == (1, 2, own.fingerprint)
    assert back.encode(TEXT) == own.encode(TEXT)


def test_an_added_end_that_is_not_called_control() -> None:
    metadata = tokenizer_metadata(tokenizer_named("own"), 1001) | {KEY + "eos_token_id": 1000}
    metadata[KEY + "tokens"][1000], metadata[KEY + "token_type"][1000] = "<|im_end|>", 4
    back = read_metadata(metadata)
    assert back.eos_id == 1000 and back.control[1000] == "<|im_end|>"


@pytest.mark.parametrize(("bos", "eos"), [(True, False), (False, False), (True, True), (False, True)])
def test_begin_and_end_travel_by_their_keys(bos: bool, eos: bool) -> None:
    own = copy.copy(tokenizer_named("own"))
    own.frame(bos, eos)
    metadata = tokenizer_metadata(own, 1000)
    assert (metadata[KEY + "add_bos_token"], metadata[KEY + "add_eos_token"]) == (bos, eos)
    back = read_metadata(metadata)
    assert back.encode("a") == own.encode("a") == [1] * bos + own.encode("a", bos=False, eos=False) + [2] * eos
    del metadata[KEY + "add_bos_token"], metadata[KEY + "add_eos_token"]
    assert read_metadata(metadata).prefix == (1,)  # as llama.cpp has it


@pytest.mark.parametrize("bos", [True, False])
def test_the_keys_go_before_the_tokenizer_json(bos: bool, tmp_path: Path) -> None:
    KINDS["added, tokenizer.json"].make(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    back = read_metadata(tokenizer_metadata(tokenizer, 1002, side_files(tmp_path)) | {KEY + "add_bos_token": bos})
    assert back.encode("a <tag>") == tokenizer.encode("a <tag>", bos=bos)
    back.save(tmp_path / "saved")
    assert load_tokenizer(tmp_path / "saved").encode("a <tag>") == back.encode("a <tag>")


def test_a_tokenizer_json_of_another_vocabulary_is_not_used(tmp_path: Path) -> None:
    KINDS["llama style"].make(tmp_path)
    document = (tmp_path / "tokenizer.json").read_text()
    own = tokenizer_named("own")
    back = read_metadata(tokenizer_metadata(own, 1000) | {"tokenizer.huggingface.json": document})
    assert back.encode(TEXT) == own.encode(TEXT)
    with pytest.raises(ValueError, match=r"tokenizer\.huggingface\.json must be a text, not 5"):
        read_metadata(tokenizer_metadata(own, 1000) | {"tokenizer.huggingface.json": 5})


def test_an_unknown_token_by_another_kind() -> None:
    """Files made from a tokenizer.json may call it a control token."""
    own = tokenizer_named("own")
    metadata = tokenizer_metadata(own, 1000)
    metadata[KEY + "token_type"][0] = 3
    assert read_metadata(metadata).fingerprint == own.fingerprint


def tokens_of(rendered: str, tokenizer: Tokenizer) -> list[int]:
    """As llama.cpp has it: control tokens are found in the text, and the text after each begins with a space."""
    ids, rest = [], rendered
    names = {name: i for i, name in tokenizer.control.items() if i != 0}
    while rest:
        at, name = min(((rest.find(name), name) for name in names if name in rest), default=(len(rest), ""))
        if at:
            ids += tokenizer.encode(rest[:at], bos=False)
        if name:
            ids.append(names[name])
        rest = rest[at + len(name) :]
    return ids


@pytest.mark.parametrize("system", ["", "Be brief."])
@pytest.mark.parametrize("version", TEMPLATES)
def test_templates_say_what_mistral_common_does(version: str, system: str) -> None:
    tokenizer = tokenizer_named(version)
    said = [("user", "Hello  there"), ("assistant", "Hi!"), ("user", "def f():\n  pass"), ("assistant", "ok")]
    said.append(("user", "?"))
    for turns in (said[:1], said[:3], said):
        roles = {"user": UserMessage, "assistant": AssistantMessage}
        messages: list[Any] = [roles[role](content=content) for role, content in turns]
        plain = [{"role": role, "content": content} for role, content in turns]
        if system:
            messages.insert(0, SystemMessage(content=system))
            plain.insert(0, {"role": "system", "content": system})
        assert tokenizer.mistral is not None
        expected = tokenizer.mistral.encode_chat_completion(ChatCompletionRequest(messages=messages)).tokens
        rendered = jinja2.Template(TEMPLATES[version]).render(messages=plain, bos_token="<s>", eos_token="</s>")
        assert tokens_of(rendered, tokenizer) == expected


@pytest.mark.parametrize(("document", "message"), [
    ({"decoder": {"pattern": {"String": "_"}, "content": " "}}, "must be an object with its type"),
    ({"model": {"type": "BPE", "vocab": {}, "merges": []}, "decoder": {"type": "Fuse"}}, "vocabular"),
])
def test_a_damaged_tokenizer_json_inside(document: dict[str, Any], message: str, tmp_path: Path) -> None:
    metadata = tokenizer_metadata(tokenizer_named("own"), 1000)
    whole = json.loads(tokenizer_named("own").to_json()) | document  # type: ignore[attr-defined]
    path = _file(tmp_path, metadata | {"tokenizer.huggingface.json": json.dumps(whole)})
    with pytest.raises(MixtralError, match=message) as caught:
        find_tokenizer(path)
    assert str(caught.value).startswith(f"{path}: its vocabulary ")


def test_a_library_that_fails_inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise KeyError("type")

    monkeypatch.setattr("mixtral.tokenizer.gguf.read_metadata", fail)
    with pytest.raises(MixtralError, match="its vocabulary is damaged: KeyError: 'type'"):
        find_tokenizer(_file(tmp_path, tokenizer_metadata(tokenizer_named("own"), 1000)))


@pytest.mark.parametrize(("count", "rows", "message"), [
    (600, 500, "has 600 tokens, more than the 500 rows of token_embd.weight"),
    (2000, 5000, "has 2,000 tokens, more than the 1,000 that are read"),
])
def test_more_tokens_than_the_model_has_rows(
    count: int, rows: int, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Refused before anything is built of them."""
    monkeypatch.setattr("mixtral.tokenizer.gguf.MOST_TOKENS", 1000)
    monkeypatch.setattr("mixtral.tokenizer.gguf.read_metadata", None)
    tokens = {"tokenizer.ggml.model": "llama", "tokenizer.ggml.tokens": [f"t{i}" for i in range(count)]}
    with pytest.raises(MixtralError, match=message):
        find_tokenizer(_file(tmp_path, tokens, rows))


def _file(folder: Path, metadata: dict[str, Any], rows: int = 1000) -> Path:
    """A GGUF file of an embedding one number wide."""
    header = header_bytes(metadata, [TensorEntry("token_embd.weight", "F32", (rows, 1), 4 * rows)])
    (folder / "a.gguf").write_bytes(header + bytes(4 * rows))
    return folder / "a.gguf"
