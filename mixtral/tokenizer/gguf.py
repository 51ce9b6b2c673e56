"""Tokenizers in GGUF metadata, a sentencepiece vocabulary ("llama" there) or byte-level BPE ("gpt2"), and the chat
templates beside them."""

from __future__ import annotations

import json
import logging
import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mixtral.config.generation import NAME as GENERATION_CONFIG
from mixtral.config.generation import from_config_json, from_gguf_sampling
from mixtral.config.gguf import named_end_tokens
from mixtral.config.model import is_token_id
from mixtral.errors import MixtralError, UsageError, WeightsError, shown
from mixtral.gguf.header import TensorInfo, read_gguf_header
from mixtral.tokenizer.base import MOST_TOKENS, Tokenizer
from mixtral.tokenizer.chat_templates import (
    TEMPLATES,
    file_text,
    folder_templates,
    gguf_templates,
    metadata_templates,
    template_files,
)
from mixtral.tokenizer.gguf_bpe import (
    Vocabulary,
    adds_bos,
    check_vocabulary,
    known_pre_tokenizer,
    vocabulary_json,
    vocabulary_of,
)
from mixtral.tokenizer.mistral import SentencePieceTokenizer
from mixtral.tokenizer.side_files import Beside, is_side_file, read_side_files
from mixtral.tokenizer.spm_model import Kind, Piece, SpmModel, write_spm_model
from mixtral.tokenizer.tokenizer_json import JsonTokenizer

log = logging.getLogger(__name__)

_PREFIX = "tokenizer.ggml."
_KIND, _PRE, _MERGES = _PREFIX + "model", _PREFIX + "pre", _PREFIX + "merges"
_LISTS = (_PREFIX + "tokens", _PREFIX + "scores", _PREFIX + "token_type")
_BOS, _EOS, _UNKNOWN = _PREFIX + "bos_token_id", _PREFIX + "eos_token_id", _PREFIX + "unknown_token_id"
_SPACE, _ADD_BOS, _ADD_EOS = _PREFIX + "add_space_prefix", _PREFIX + "add_bos_token", _PREFIX + "add_eos_token"
_JSON = "tokenizer.huggingface.json"  # GGUF's name for a whole tokenizer.json
_FILE = "mixtral.file."  # ours: a folder's small files as they are, by name
_UNUSED_SCORE, _ADDED_SCORE = -10000.0, -1000.0  # llama.cpp's converter's


def tokenizer_metadata(
    tokenizer: Tokenizer | None, vocab_size: int, files: Mapping[str, bytes] | None = None
) -> dict[str, Any]:  # fmt: skip
    """What a file says of its tokenizer, filled up with unused tokens to the model's vocabulary.

    `files` are the small files of the model's folder (tokenizer/side_files.py), which come back when it is converted
    again; where no chat template is among them, the one of the tokenizer's version is written.

    Raises UsageError for a tokenizer that the format has no name for, or of more pieces than the model.
    """
    files = files or {}
    templates = folder_templates(files)
    kept = {_FILE + name: file_text(name, content) for name, content in files.items()}
    if tokenizer is None:
        return {_KIND: "none", **gguf_templates(templates), **kept}
    is_spm = isinstance(tokenizer, SentencePieceTokenizer) or (
        isinstance(tokenizer, JsonTokenizer) and tokenizer.sentencepiece is not None
    )
    metadata = _spm_metadata(tokenizer, vocab_size) if is_spm else _bpe_metadata(tokenizer, vocab_size)
    metadata |= {_BOS: tokenizer.bos_id, _EOS: tokenizer.eos_id}
    metadata |= {_ADD_BOS: tokenizer.adds_bos, _ADD_EOS: tokenizer.adds_eos}
    if isinstance(tokenizer, JsonTokenizer):
        metadata[_JSON] = tokenizer.to_json().decode()
    usual = {"default": TEMPLATES[tokenizer.version]} if tokenizer.version in TEMPLATES else {}
    return metadata | gguf_templates({**usual, **templates}) | kept


def _spm_metadata(tokenizer: Tokenizer, vocab_size: int) -> dict[str, Any]:
    pieces, dummy_prefix = _pieces(tokenizer)
    pieces = _within(pieces, tokenizer, vocab_size)
    pieces = pieces + [_unused(i) for i in range(len(pieces), vocab_size)]
    columns = ([p.text for p in pieces], [p.score for p in pieces], [int(p.kind) for p in pieces])
    unknown = next(i for i, piece in enumerate(pieces) if piece.kind == Kind.UNKNOWN)
    lists = dict(zip(_LISTS, columns, strict=True))
    return {_KIND: "llama", _PRE: "default", **lists, _SPACE: dummy_prefix, _UNKNOWN: unknown}


def _bpe_metadata(tokenizer: Tokenizer, vocab_size: int) -> dict[str, Any]:
    tokens, kinds, merges, pre = vocabulary_of(tokenizer)
    least = max((i + 1 for i, kind in enumerate(kinds) if kind == Kind.NORMAL), default=0)
    if max(least, tokenizer.bos_id + 1, tokenizer.eos_id + 1) > vocab_size:
        raise UsageError(f"the tokenizer has {len(tokens)} tokens, more than the model's vocabulary of {vocab_size}")
    if left_out := tokens[vocab_size:]:
        log.warning("the model has no row for %s: left out of the file's tokens", shown(", ".join(left_out)))
    tokens = tokens[:vocab_size] + [f"[PAD{i}]" for i in range(len(tokens), vocab_size)]
    kinds = kinds[:vocab_size] + [Kind.UNUSED] * (vocab_size - len(kinds))
    return {_KIND: "gpt2", _PRE: pre, _LISTS[0]: tokens, _LISTS[2]: [int(kind) for kind in kinds], _MERGES: merges}


def _pieces(tokenizer: Tokenizer) -> SpmModel:
    """The sentencepiece form of a vocabulary, with the tokens that were added to it."""
    if isinstance(tokenizer, SentencePieceTokenizer):
        return tokenizer.spm
    assert isinstance(tokenizer, JsonTokenizer) and tokenizer.sentencepiece is not None
    pieces, dummy_prefix = tokenizer.sentencepiece.spm
    for i in range(tokenizer.vocab_size):
        kind = Kind.CONTROL if i in tokenizer.control else Kind.USER_DEFINED
        if i >= len(pieces):
            text = tokenizer.texts.get(i)
            pieces.append(_unused(i) if text is None else Piece(text, _ADDED_SCORE, kind))
        elif kind == Kind.CONTROL and pieces[i].kind in (Kind.NORMAL, Kind.USER_DEFINED, Kind.UNUSED):
            pieces[i] = pieces[i]._replace(kind=kind)
    return SpmModel(pieces, dummy_prefix)


def _within(pieces: list[Piece], tokenizer: Tokenizer, vocab_size: int) -> list[Piece]:
    """Without added tokens for which the model has no row, such as a [PAD] that is only named beside it."""
    least = len(pieces)
    if isinstance(tokenizer, JsonTokenizer) and tokenizer.sentencepiece:
        least = max(tokenizer.sentencepiece.vocab_size, tokenizer.bos_id + 1, tokenizer.eos_id + 1)
    if least > vocab_size:
        raise UsageError(f"the tokenizer has {len(pieces)} pieces, more than the model's vocabulary of {vocab_size}")
    if left_out := [piece.text for piece in pieces[vocab_size:]]:
        log.warning("the model has no row for %s: left out of the file's tokens", shown(", ".join(left_out)))
    return pieces[:vocab_size]


def _unused(token_id: int) -> Piece:
    return Piece(f"[PAD{token_id}]", _UNUSED_SCORE, Kind.UNUSED)


def gguf_tokenizer(path: Path) -> Tokenizer | None:
    """The tokenizer of a GGUF file; None when it has none, or one that is not read from GGUF.

    Raises MixtralError when it is damaged, WeightsError when the GGUF file is.
    """
    header = read_gguf_header(path)
    metadata = header.metadata
    kind = metadata.get(_KIND, "none")
    if reason := _not_read(metadata):
        log.warning("%s: %s: the model has no tokenizer", path, reason)
    if reason or kind not in _READERS:
        return None
    try:
        _check_size(metadata, header.tensors.get("token_embd.weight"))
        return read_metadata(metadata)
    except (MixtralError, ValueError) as error:
        raise MixtralError(f"{path}: its vocabulary cannot be used: {error}") from None
    except Exception as error:  # of the libraries below, which check little
        raise MixtralError(f"{path}: its vocabulary is damaged: {type(error).__name__}: {error}") from error


def _not_read(metadata: Mapping[str, Any]) -> str:
    """Why a tokenizer that a file has is not read; "" when it is, or when there is none."""
    kind = metadata.get(_KIND, "none")
    if kind not in (*_READERS, "none", "no_vocab"):
        return f"its tokenizer is of kind {shown(kind)}, which is not read from GGUF; 'llama' and 'gpt2' are"
    try:
        if kind == "gpt2" and _JSON not in metadata:
            known_pre_tokenizer(metadata.get(_PRE))
    except ValueError as error:
        return str(error)
    return ""


def side_files(source: str | Path) -> dict[str, bytes]:
    """The small files beside the tokenizer of a model folder, or what a GGUF file holds of them, by name.

    Generation defaults that the model keeps elsewhere, in config.json or GGUF's `general.sampling`, come as a
    generation_config.json. Raises MixtralError, one line with the file, for one that cannot be read.
    """
    source = Path(source)
    if source.suffix != ".gguf":
        files = read_side_files(source) if source.is_dir() else {}
        return _with_defaults(files, {} if GENERATION_CONFIG in files else from_config_json(source))
    try:
        metadata = read_gguf_header(source).metadata
        files = _files(metadata)
        return _with_defaults(files, {} if GENERATION_CONFIG in files else _sampling(metadata))
    except (WeightsError, ValueError) as error:
        raise error if isinstance(error, WeightsError) else MixtralError(f"{source}: {error}") from None
    except MixtralError as error:
        raise MixtralError(f"{source}: {error}") from None


def _with_defaults(files: dict[str, bytes], values: dict[str, Any]) -> dict[str, bytes]:
    """With the generation defaults that were kept elsewhere, in the file of their own that every format takes along."""
    return files | ({GENERATION_CONFIG: json.dumps(values, indent=2).encode() + b"\n"} if values else {})


def _sampling(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """What `general.sampling` recommends, with the end tokens, which generation_config.json must name too."""
    values, ends = from_gguf_sampling(metadata), named_end_tokens(metadata)
    return values | ({"eos_token_id": list(ends)} if values and ends else {})


def _files(metadata: Mapping[str, Any]) -> dict[str, bytes]:
    """The files that ours hold as they are, and those of the chat templates, where these are not the same."""
    files = {}
    for key, text in metadata.items():
        if key.startswith(_FILE):
            name = key.removeprefix(_FILE)
            if not is_side_file(name) or not isinstance(text, str):
                raise ValueError(f"{shown(key)} must be the text of a file that goes along with a tokenizer")
            files[name] = text.encode()
    known, templates = folder_templates(files), metadata_templates(metadata)
    if "default" not in known and templates.get("default") in TEMPLATES.values():
        del templates["default"]  # written for want of another
    if templates != {name: text for name, text in known.items() if text}:  # GGUF writers leave out empty texts
        files = {name: content for name, content in files.items() if not name.endswith(".jinja")}
        files |= template_files(templates)
    return files


def _check_size(metadata: Mapping[str, Any], embedding: TensorInfo | None) -> None:
    """Refuse, before anything is built of them, more tokens than the model has rows for."""
    tokens, most, whose = metadata.get(_LISTS[0]), MOST_TOKENS, "that are read"
    if embedding is not None and embedding.shape and embedding.shape[0] < most:
        most, whose = embedding.shape[0], "rows of token_embd.weight"
    if isinstance(tokens, list) and len(tokens) > most:
        raise ValueError(f"{_LISTS[0]} has {len(tokens):,} tokens, more than the {most:,} {whose}")


def _bpe(metadata: Mapping[str, Any]) -> Tokenizer:
    """A tokenizer of kind "gpt2"."""
    tokens, kinds = metadata.get(_LISTS[0], []), metadata.get(_LISTS[2], [])
    check_vocabulary(tokens, kinds, metadata.get(_MERGES, []))
    n = _without_padding(tokens, kinds)
    eos = _token_id(metadata, _EOS, n)
    bos = _token_id(metadata, _BOS, n) if _BOS in metadata else eos
    kinds = [Kind.CONTROL if i in (bos, eos) else Kind(kind) for i, kind in enumerate(kinds[:n])]
    beside = _naming(Beside(_files(metadata)), tokens[bos], tokens[eos])
    document, usual = metadata.get(_JSON), None
    if document is None:
        pre = known_pre_tokenizer(metadata.get(_PRE))
        usual = adds_bos(pre)
        content = vocabulary_json(Vocabulary(tokens[:n], kinds, metadata.get(_MERGES, []), pre))
    else:
        content = _text(document, _JSON).encode()
    tokenizer = JsonTokenizer(content, beside, _JSON if document is not None else "tokenizer.json")
    for i, token in enumerate(tokens[:n]):
        if (text := tokenizer.texts.get(i, token)) != token:
            raise ValueError(f"{_JSON} has {shown(text)} where {_LISTS[0]} has {shown(token)}")
    _frame(tokenizer, metadata, usual, None if usual is None else False)
    return tokenizer


def _without_padding(tokens: list[str], kinds: list[int]) -> int:
    """How many tokens there are but for those that fill the vocabulary up to the model's."""
    n = len(tokens)
    while n and kinds[n - 1] == Kind.UNUSED and tokens[n - 1] == f"[PAD{n - 1}]":
        n -= 1
    return n


def _token_id(metadata: Mapping[str, Any], key: str, n: int) -> int:
    value = metadata.get(key)
    if type(value) is not int or not 0 <= value < n:
        raise ValueError(f"{key} must be the id of one of its {n} tokens, not {shown(value)}")
    return value


def _text(value: object, key: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{key} must be a text, not {shown(value)}")
    return value


def _frame(tokenizer: Tokenizer, metadata: Mapping[str, Any], bos: bool | None, eos: bool | None) -> None:
    """What the file's flags put around a text; where it has none `bos`, `eos`; None: as it is."""
    wanted = (
        (None if default is None and key not in metadata else _flag(metadata, key, bool(default)), now)
        for key, default, now in ((_ADD_BOS, bos, tokenizer.adds_bos), (_ADD_EOS, eos, tokenizer.adds_eos))
    )
    tokenizer.frame(*(None if flag == now else flag for flag, now in wanted))


def _sentencepiece(metadata: Mapping[str, Any]) -> Tokenizer:
    """A tokenizer of kind "llama"."""
    pieces = _read_pieces(metadata)
    unknown = metadata.get(_UNKNOWN, 0)
    if type(unknown) is not int or not 0 <= unknown < len(pieces):
        raise ValueError(f"{_UNKNOWN} must be the id of one of its {len(pieces)} tokens, not {shown(unknown)}")
    space = _flag(metadata, _SPACE, True)
    pieces = [piece._replace(kind=_kind(i, piece.kind, unknown)) for i, piece in enumerate(pieces)]
    bos, eos = (_text_end(metadata, key, pieces, *usual) for key, usual in ((_BOS, (1, "<s>")), (_EOS, (2, "</s>"))))
    for i in (bos, eos):
        pieces[i] = pieces[i]._replace(kind=Kind.CONTROL)
    beside = Beside(_files(metadata))
    spm = SentencePieceTokenizer(write_spm_model(SpmModel(pieces, space), bos, eos), "tokenizer.model")
    tokenizer: Tokenizer = spm.with_files(beside)
    if (document := metadata.get(_JSON)) is not None:
        named = _naming(beside, pieces[bos].text, pieces[eos].text)
        whole = JsonTokenizer(_text(document, _JSON).encode(), named, _JSON, spm)
        if whole.sentencepiece:
            tokenizer = whole
    _frame(tokenizer, metadata, True, False)
    return tokenizer


def read_metadata(metadata: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer that a file's metadata hold. Raises ValueError or MixtralError where they are damaged."""
    return _READERS[metadata[_KIND]](metadata)


_READERS = {"llama": _sentencepiece, "gpt2": _bpe}


def _naming(beside: Beside, bos: str, eos: str) -> Beside:
    """With the names of begin and end, where none of the files gives one."""
    missing = {role: name for role, name in {"bos_token": bos, "eos_token": eos}.items() if beside.name(role) is None}
    config = json.dumps(beside.config | missing).encode()
    return Beside({**beside.files, "tokenizer_config.json": config}) if missing else beside


def _text_end(metadata: Mapping[str, Any], key: str, pieces: list[Piece], usual: int, name: str) -> int:
    """The token with which a text begins or ends.

    The format has one key for it and for the model's own begin or end, which may be any token, even one that the
    vocabulary lacks: where it is no token of control and none that was added, the usual one counts.
    """
    value = metadata.get(key, usual)
    if not is_token_id(value):
        raise ValueError(f"{key} must be a token id, not {shown(value)}")
    named = [i for i, piece in enumerate(pieces) if piece.text == name and piece.kind != Kind.UNKNOWN]
    added = [i for i in (value, usual) if i < len(pieces) and pieces[i].kind in (Kind.CONTROL, Kind.USER_DEFINED)]
    if found := added[:1] if value in added else named or added:
        return found[0]
    raise ValueError(f"{key} is {value}, which is no control token, and there is no {name}")


def _read_pieces(metadata: Mapping[str, Any]) -> list[Piece]:
    """The vocabulary, without the tokens that fill it up. Raises ValueError naming the key that is wrong."""
    columns = [metadata.get(key) for key in _LISTS]
    if not all(isinstance(column, list) for column in columns) or len({len(column or ()) for column in columns}) != 1:
        raise ValueError(f"{', '.join(_LISTS)} must be lists of one length")
    tokens, scores, kinds = columns
    assert tokens is not None and scores is not None and kinds is not None
    for key, column, right in zip(_LISTS, columns, (_is_text, _is_score, _is_kind), strict=True):
        for i, value in enumerate(column or ()):
            if not right(value):
                raise ValueError(f"{key}[{i}] is {shown(value)}, which is no {right.__name__.removeprefix('_is_')}")
    pieces = [Piece(t, float(s), Kind(k)) for t, s, k in zip(tokens, scores, kinds, strict=True)]
    pieces = pieces[: _without_padding(tokens, kinds)]
    text, count = next(iter(Counter(piece.text for piece in pieces).most_common(1)), ("", 0))
    if count > 1:
        raise ValueError(f"{_LISTS[0]} holds {shown(text)} {count} times")
    return pieces


def _is_text(value: object) -> bool:
    return isinstance(value, str) and value != ""


def _is_score(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value) and abs(value) < 3e38  # sentencepiece has fp32


def _is_kind(value: object) -> bool:
    return type(value) is int and value in list(Kind)


def _flag(metadata: Mapping[str, Any], key: str, default: bool) -> bool:
    value = metadata.get(key, default)
    if not isinstance(value, bool):
        raise ValueError(f"{key} must be true or false, not {shown(value)}")
    return value


def _kind(token_id: int, kind: Kind, unknown: int) -> Kind:
    """Files made from a tokenizer.json may call the unknown token a control token, or several of them unknown."""
    if token_id == unknown:
        return Kind.UNKNOWN
    return Kind.CONTROL if kind == Kind.UNKNOWN else kind
