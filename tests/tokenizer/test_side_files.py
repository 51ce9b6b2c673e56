"""The files beside a vocabulary: which decide, which win when they disagree, and what a stranger may have put there."""

from __future__ import annotations

import base64
import functools
import json
import logging
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mixtral.errors import MixtralError
from mixtral.tokenizer import load_tokenizer
from mixtral.tokenizer.mistral import SentencePieceTokenizer
from mixtral.tokenizer.side_files import is_side_file
from mixtral.tokenizer.spm_model import read_spm_model
from mixtral.tokenizer.tokenizer_json import JsonTokenizer
from tests.tokenizer.conftest import FILES, NAMES, tokenizer_named
from tests.tokenizer.kinds import IM_END, KINDS, auto_ids, write
from tests.tokenizer.lines import make_lines

LINES = make_lines(150, seed=5)


def _own_files(**changes: Any) -> dict[str, Any]:
    """The own tokenizer's three files, with changes of its tokenizer.json."""
    files = tokenizer_named("own")._files()
    document = json.loads(files["tokenizer.json"]) | changes
    content = json.dumps(document, ensure_ascii=False).encode() if changes else files["tokenizer.json"]
    return {"own__model__v3": files["own.model.v3"], "tokenizer__json": content,
            "tokenizer_config__json": json.loads(files["tokenizer_config.json"])}  # fmt: skip


@pytest.mark.parametrize(("config", "around"), [
    ({}, ((1,), ())), ({"add_bos_token": False}, ((), ())), ({"add_eos_token": True}, ((1,), (2,))),
])
def test_a_model_alone_is_framed_as_its_configuration_says(
    config: dict[str, bool], around: tuple[tuple[int, ...], tuple[int, ...]], tmp_path: Path
) -> None:
    files = _own_files()
    write(tmp_path, own__model__v3=files["own__model__v3"], tokenizer_config__json=config)
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.prefix, tokenizer.suffix) == around and isinstance(tokenizer, SentencePieceTokenizer)
    tokenizer.save(tmp_path / "saved")
    again = load_tokenizer(tmp_path / "saved")
    assert (again.prefix, again.suffix) == around and again.encode_batch(LINES) == tokenizer.encode_batch(LINES)
    write(tmp_path / "saved")
    assert auto_ids(tmp_path / "saved", LINES) == tokenizer.encode_batch(LINES)


def test_our_own_export_beside_a_model_is_the_model(tmp_path: Path) -> None:
    files = _own_files()
    write(tmp_path, **files)
    assert isinstance(load_tokenizer(tmp_path), SentencePieceTokenizer)
    config = {**files["tokenizer_config__json"], "add_bos_token": False}  # which the tokenizer.json makes void
    write(tmp_path, tokenizer_config__json=config)
    assert load_tokenizer(tmp_path).prefix == (1,)


DISAGREE: dict[str, dict[str, Any]] = {
    "no <s>": {"post_processor": None},
    "no leading space": {"normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}},
    "fewer merges": {"model": {**json.loads(tokenizer_named("own").to_json())["model"], "merges": []}},  # type: ignore[attr-defined]
}


@pytest.mark.parametrize("case", DISAGREE)
def test_tokenizer_json_wins_over_the_model(case: str, tmp_path: Path) -> None:
    write(tmp_path, **_own_files(**DISAGREE[case]))
    tokenizer = load_tokenizer(tmp_path)
    assert isinstance(tokenizer, JsonTokenizer) and tokenizer.version == "v3" and tokenizer.mistral is not None
    ids = tokenizer.encode_batch(LINES)
    assert ids == auto_ids(tmp_path, LINES) != tokenizer_named("own").encode_batch(LINES)
    assert [tokenizer.decode(i) for i in ids] == [line.replace("▁", " ") for line in LINES]


def test_another_vocabulary_beside_tokenizer_json(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    KINDS["llama style"].make(tmp_path)
    write(tmp_path, tokenizer__model=tokenizer_named("own")._files()["own.model.v3"])
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.version == "json" and tokenizer.mistral is None
    assert "holds another vocabulary than the tokenizer.json beside it" in caplog.text
    write(tmp_path, tokenizer__model=b"damaged")
    assert load_tokenizer(tmp_path).fingerprint == tokenizer.fingerprint
    assert "tokenizer.model: not used beside tokenizer.json" in caplog.text


def test_flags_of_the_configuration_hold(tmp_path: Path) -> None:
    """As in transformers: a token that both files have gets the flags of tokenizer_config.json."""
    KINDS["added, tokenizer.json"].make(tmp_path)
    assert 1001 in load_tokenizer(tmp_path).encode("a <tag>")
    config = {"added_tokens_decoder": {"1001": IM_END | {"content": "<tag>"}}, "eos_token": "<|im_end|>"}
    write(tmp_path, tokenizer_config__json=config)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.control[1001] == "<tag>" and 1001 not in tokenizer.encode("a <tag>")
    assert tokenizer.encode_batch(LINES) == auto_ids(tmp_path, LINES)


def test_a_piece_of_the_model_that_the_configuration_calls_special(tmp_path: Path) -> None:
    model = _own_files()["own__model__v3"]
    piece = next(p.text for p in tokenizer_named("own").spm.pieces[300:] if p.text.isalpha())  # type: ignore[attr-defined]
    token_id = next(i for i, p in enumerate(tokenizer_named("own").spm.pieces) if p.text == piece)  # type: ignore[attr-defined]
    decoder = {"1": IM_END | {"content": "<s>"}, str(token_id): IM_END | {"content": piece}}
    write(tmp_path, own__model__v3=model, tokenizer_config__json={"added_tokens_decoder": decoder})
    assert load_tokenizer(tmp_path).control[token_id] == piece
    del decoder[str(token_id)]  # what the model says itself changes nothing
    write(tmp_path, tokenizer_config__json={"added_tokens_decoder": decoder})
    assert isinstance(load_tokenizer(tmp_path), SentencePieceTokenizer)


@pytest.mark.parametrize(("name", "right"), [
    ("tokenizer_config.json", True), ("additional_chat_templates/rag.jinja", True), ("chat_template.jinja", True),
    ("../chat_template.jinja", False), ("additional_chat_templates/../x.jinja", False), ("x.jinja", False),
    ("a/additional_chat_templates/x.jinja", False), ("/tokenizer_config.json", False), ("model.safetensors", False),
])
def test_names_of_side_files(name: str, right: bool) -> None:
    assert is_side_file(name) == right


# -- what a stranger may have written ----------------------------------------------------------------------------------

TOKEN = {"1000": IM_END}
BAD_FILES: list[tuple[dict[str, Any], str]] = [
    ({"tokenizer_config__json": {"bos_token": 5}}, "tokenizer_config.json: bos_token must be a token's text, not 5"),
    ({"tokenizer_config__json": {"eos_token": {"content": []}}}, "json: eos_token.content must be a token's text"),
    ({"tokenizer_config__json": {"added_tokens_decoder": [1]}}, "added_tokens_decoder must be an object of tokens"),
    ({"tokenizer_config__json": {"added_tokens_decoder": {"x": IM_END}}}, "decoder.x: its ids must be whole numbers"),
    ({"tokenizer_config__json": {"added_tokens_decoder": {"9" * 99: IM_END}}}, "its ids must be whole numbers"),
    ({"tokenizer_config__json": {"added_tokens_decoder": {"1000": "<x>"}}}, "decoder.1000 must be an object with a"),
    ({"tokenizer_config__json": {"added_tokens_decoder": {"1000": IM_END | {"special": 1}}}},
     "added_tokens_decoder.1000.special must be true or false, not 1"),
    ({"tokenizer_config__json": {"added_tokens_decoder": {"1000000000": IM_END}}},
     "added_tokens_decoder.1000000000: has the id 1000000000, where the vocabulary goes on with 1000"),
    ({"added_tokens__json": {"<x>": "1000"}}, "added_tokens.json: '<x>' must have an id of at least 0, not '1000'"),
    ({"added_tokens__json": {"<x>": 10**9}}, "added_tokens.json: '<x>': has the id 1000000000, where the vocabulary"),
    ({"special_tokens_map__json": {"eos_token": [2]}}, "special_tokens_map.json: eos_token must be a token's text"),
    ({"tokenizer_config__json": {"extra_special_tokens": "<x>"}}, "extra_special_tokens must be a list of tokens, not"),
    ({"tokenizer_config__json": {"additional_special_tokens": [5]}}, "additional_special_tokens[0] must be a token's"),
    ({"tokenizer_config__json": {"pad_token": {"content": "<x>", "lstrip": 1}}}, "pad_token.lstrip must be true or"),
    ({"special_tokens_map__json": b"{"}, "special_tokens_map.json: not JSON"),
    ({"tokenizer__json": {**json.loads(tokenizer_named("own").to_json()), "added_tokens": 7}}, "damaged or not a"),  # type: ignore[attr-defined]
]  # fmt: skip


@pytest.mark.parametrize("rest", ["model", "json"])
@pytest.mark.parametrize(("files", "message"), BAD_FILES)
def test_wrong_values_are_told_by_file_and_key(
    files: dict[str, Any], message: str, rest: str, tmp_path: Path
) -> None:
    kept = {"model": "own__model__v3", "json": "tokenizer__json"}[rest]
    write(tmp_path, **{kept: _own_files()[kept], **files})
    with pytest.raises(MixtralError) as caught:
        load_tokenizer(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path}/") and message in str(caught.value)


def test_flags_of_a_model_alone(tmp_path: Path) -> None:
    write(tmp_path, own__model__v3=_own_files()["own__model__v3"], tokenizer_config__json={"add_bos_token": "yes"})
    with pytest.raises(MixtralError, match=r"tokenizer_config\.json: add_bos_token must be true or false, not 'yes'"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(("change", "message"), [
    ({"vocab": {"a": 10**9}}, "model.vocab: 'a' has the id 1000000000; ids below 524,288 are read"),
    ({"vocab": {"a": 2**40}}, "damaged or not a tokenizer.json"),
    ({"vocab": {"a": -1}}, "damaged or not a tokenizer.json"),
    ({"vocab": ["a"]}, "damaged or not a tokenizer.json"),
    ({"merges": [["a", 5]]}, "damaged or not a tokenizer.json"),
])
def test_wrong_vocabularies(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    model = json.loads(tokenizer_named("own").to_json())["model"] | {"merges": []} | change  # type: ignore[attr-defined]
    if "vocab" in change and isinstance(change["vocab"], dict):
        model["vocab"] = {"<unk>": 0, "<s>": 1, "</s>": 2, **change["vocab"]}
    write(tmp_path, tokenizer__json=_own_files(model=model, added_tokens=[])["tokenizer__json"])
    with pytest.raises(MixtralError, match=message):
        load_tokenizer(tmp_path)


def test_an_added_token_far_beyond_the_vocabulary(tmp_path: Path) -> None:
    added = json.loads(tokenizer_named("own").to_json())["added_tokens"]  # type: ignore[attr-defined]
    files = _own_files(added_tokens=[*added, IM_END | {"id": 10**9}])
    write(tmp_path, tokenizer__json=files["tokenizer__json"])
    with pytest.raises(MixtralError, match=r"json: added_tokens\[14\]: '<\|im_end\|>' has the id 1000000000, where"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(("change", "message"), [
    ({"default_vocab_size": 10**9}, "config.default_vocab_size must be a whole number from 1 to 524,288, not 1000"),
    ({"default_num_special_tokens": 10**9}, "config.default_num_special_tokens must be a whole number from 1 to 11"),
    ({"default_num_special_tokens": "1"}, "config.default_num_special_tokens must be"),
    ({"pattern": "("}, "damaged or not a tekken.json"),
])
def test_wrong_tekken_numbers(change: dict[str, Any], message: str) -> None:
    from mixtral.tokenizer.mistral import TekkenTokenizer

    document = json.loads(tokenizer_named("small-tekken")._files()["tekken.json"])
    document["config"] |= change
    with pytest.raises(MixtralError, match=message):
        TekkenTokenizer(json.dumps(document).encode(), "tekken.json")


def test_half_a_character_in_a_name(tmp_path: Path) -> None:
    document = json.loads(_tekken()["tekken.json"])
    names = {**tokenizer_named("small-tekken").control, 900: "\ud800"}
    document["special_tokens"] = [{"rank": i, "token_str": name, "is_control": True} for i, name in names.items()]
    write(tmp_path, tekken__json=document)
    with pytest.raises(MixtralError, match=r"tekken\.json: damaged or not a tekken\.json: UnicodeEncodeError"):
        load_tokenizer(tmp_path)
    document = json.loads(_own_json()["tokenizer.json"])
    document["added_tokens"][3]["content"] = "\ud800"
    write(tmp_path / "json", tokenizer__json=document)
    with pytest.raises(MixtralError, match=r"tokenizer\.json: damaged or not a tokenizer\.json"):
        load_tokenizer(tmp_path / "json")


def test_numbers_without_an_end_in_a_sentencepiece_model() -> None:
    """64 bits are the most; without that limit a file of such bytes would be added up for hours."""
    model = _own_files()["own__model__v3"]
    one = [bytes([15 << 3]), b"\x81", b"\x80" * 8, b"\x00"]  # field 15: the number 1, in ten bytes
    assert read_spm_model(model + b"".join(one)).pieces
    one.insert(2, b"\x80")
    with pytest.raises(ValueError, match="damaged or not a sentencepiece model"):
        read_spm_model(model + b"".join(one))


def _swap(rng: random.Random, node: Any) -> None:
    """Put something else at a random position of a JSON document."""
    others = (None, True, -1, 10**9, 1.5, "", "x", [], {}, [[]], {"type": "Sequence"}, "\x00")
    while True:
        keys = list(node) if isinstance(node, dict) else range(len(node))
        if not keys:
            return
        key = rng.choice(keys)
        if not (isinstance(node[key], dict | list) and node[key] and rng.random() < 0.8):
            node[key] = rng.choice(others)
            return
        node = node[key]


def _own_json() -> dict[str, bytes]:
    own = tokenizer_named("own")
    document = json.loads(own._files()["tokenizer.json"])
    document["model"]["vocab"] = dict(list(document["model"]["vocab"].items())[:290])
    document["model"]["merges"] = document["model"]["merges"][:5]
    first = IM_END | {"content": "<s>"}
    config = {"bos_token": "<s>", "eos_token": IM_END | {"content": "</s>"}, "added_tokens_decoder": {"1": first}}
    files = {"tokenizer.json": document, "tokenizer_config.json": config, "added_tokens.json": {"<s>": 1},
             "special_tokens_map.json": {"eos_token": {"content": "</s>"}}}  # fmt: skip
    return {name: json.dumps(value).encode() for name, value in files.items()}


@functools.cache
def _tekken() -> dict[str, bytes]:
    document = json.loads((FILES / NAMES["tekken"]).read_bytes())
    vocab = [{"rank": i, "token_bytes": base64.b64encode(bytes([i])).decode(), "token_str": None} for i in range(256)]
    document["config"] |= {"default_vocab_size": 1256, "default_num_special_tokens": 1000}
    return {"tekken.json": json.dumps({**document, "vocab": vocab, "multimodal": None}).encode()}


@pytest.mark.parametrize("make", [_own_json, _tekken])
def test_changed_files_are_read_or_refused_in_one_line(make: Callable[[], dict[str, bytes]], tmp_path: Path) -> None:
    logging.disable(logging.WARNING)
    rng, refused = random.Random(4), 0
    for _ in range(120):
        files = make()
        name = rng.choice(list(files))
        document = json.loads(files[name])
        for _ in range(rng.randint(1, 2)):
            _swap(rng, document)
        for other, content in {**files, name: json.dumps(document).encode()}.items():
            (tmp_path / other).write_bytes(content)
        try:
            tokenizer = load_tokenizer(tmp_path)
            tokenizer.decode(tokenizer.encode("a é\n"))
        except MixtralError as error:
            refused += 1
            assert "\n" not in str(error) and str(tmp_path) in str(error)
    logging.disable(logging.NOTSET)
    assert refused > 20
