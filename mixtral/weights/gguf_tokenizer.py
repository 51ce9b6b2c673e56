"""Tokenizers in GGUF metadata: a sentencepiece vocabulary ("llama" there), and the chat template beside it."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from mixtral.errors import MixtralError, UsageError
from mixtral.gguf_header import read_gguf_header
from mixtral.json_files import read_object
from mixtral.tokenizer import Tokenizer, load_tokenizer
from mixtral.tokenizer.load import has_tokenizer
from mixtral.tokenizer.mistral import SentencePieceTokenizer
from mixtral.tokenizer.spm_model import Kind, Piece, SpmModel, write_spm_model
from mixtral.weights.chat_templates import TEMPLATES

log = logging.getLogger(__name__)

_PREFIX = "tokenizer.ggml."
_LISTS = (_PREFIX + "tokens", _PREFIX + "scores", _PREFIX + "token_type")
_BOS, _EOS, _UNKNOWN = _PREFIX + "bos_token_id", _PREFIX + "eos_token_id", _PREFIX + "unknown_token_id"
_SPACE = _PREFIX + "add_space_prefix"
_TEMPLATE = "tokenizer.chat_template"
_UNUSED_SCORE = -10000.0  # llama.cpp's converter's


def tokenizer_metadata(tokenizer: Tokenizer | None, vocab_size: int, template: str | None) -> dict[str, Any]:
    """What a file says of its tokenizer, filled up with unused tokens to the model's vocabulary.

    Without a `template` the one of the tokenizer's version is written. Raises UsageError for a tokenizer that is not
    sentencepiece, or has more pieces than the model.
    """
    if tokenizer is None:
        return {_PREFIX + "model": "none"}
    if not isinstance(tokenizer, SentencePieceTokenizer):
        raise UsageError(f"a {tokenizer.version} tokenizer cannot be written to GGUF; a sentencepiece model can")
    pieces, dummy_prefix = tokenizer.spm
    if len(pieces) > vocab_size:
        raise UsageError(f"the tokenizer has {len(pieces)} pieces, more than the model's vocabulary of {vocab_size}")
    pieces = pieces + [Piece(f"[PAD{i}]", _UNUSED_SCORE, Kind.UNUSED) for i in range(len(pieces), vocab_size)]
    metadata: dict[str, Any] = {_PREFIX + "model": "llama", _PREFIX + "pre": "default"}
    columns = ([p.text for p in pieces], [p.score for p in pieces], [int(p.kind) for p in pieces])
    metadata |= zip(_LISTS, columns, strict=True)
    metadata |= {_BOS: tokenizer.bos_id, _EOS: tokenizer.eos_id, _SPACE: dummy_prefix}
    metadata[_UNKNOWN] = next(i for i, piece in enumerate(pieces) if piece.kind == Kind.UNKNOWN)
    metadata |= {_PREFIX + "add_bos_token": True, _PREFIX + "add_eos_token": False}
    template = template or TEMPLATES.get(tokenizer.version)
    return metadata if template is None else {**metadata, _TEMPLATE: template}


def read_tokenizer(path: str | Path) -> Tokenizer | None:
    """The tokenizer of a model folder or a GGUF file; None when it has none, or one that is not read from GGUF.

    Raises MixtralError when it is damaged, WeightsError when the GGUF file is.
    """
    path = Path(path)
    if path.suffix != ".gguf":
        return load_tokenizer(path) if has_tokenizer(path) else None
    metadata = read_gguf_header(path).metadata
    kind = metadata.get(_PREFIX + "model", "none")
    if kind != "llama":
        if kind not in ("none", "no_vocab"):
            log.warning("%s: its tokenizer is of kind %r, which is not read from GGUF; only 'llama' is", path, kind)
        return None
    try:
        return _rebuilt(metadata)
    except (MixtralError, ValueError) as error:
        raise MixtralError(f"{path}: its vocabulary cannot be used: {error}") from None


def _rebuilt(metadata: dict[str, Any]) -> Tokenizer:
    columns = [metadata.get(key) for key in _LISTS]
    if not all(isinstance(column, list) for column in columns) or len({len(column or ()) for column in columns}) != 1:
        raise ValueError(f"{', '.join(_LISTS)} must be lists of one length")
    tokens, scores, kinds = columns
    assert tokens is not None and scores is not None and kinds is not None
    pieces = [Piece(str(t), float(s), Kind(k)) for t, s, k in zip(tokens, scores, kinds, strict=True)]
    while pieces and pieces[-1].kind == Kind.UNUSED and pieces[-1].text == f"[PAD{len(pieces) - 1}]":
        pieces.pop()
    bos, eos, unknown = (metadata.get(key, default) for key, default in ((_BOS, 1), (_EOS, 2), (_UNKNOWN, 0)))
    if not all(isinstance(i, int) and i < len(pieces) for i in (bos, eos, unknown)):
        raise ValueError(f"{_BOS}, {_EOS} and {_UNKNOWN} must be ids of its {len(pieces)} tokens")
    pieces = [piece._replace(kind=_kind(i, piece.kind, unknown)) for i, piece in enumerate(pieces)]
    data = write_spm_model(SpmModel(pieces, bool(metadata.get(_SPACE, True))), bos, eos)
    return SentencePieceTokenizer(data, "tokenizer.model")


def _kind(token_id: int, kind: Kind, unknown: int) -> Kind:
    """Files made from a tokenizer.json may call the unknown token a control token, or several of them unknown."""
    if token_id == unknown:
        return Kind.UNKNOWN
    return Kind.CONTROL if kind == Kind.UNKNOWN else kind


# -- chat templates ----------------------------------------------------------------------------------------------------


def read_template(source: str | Path) -> str | None:
    """The chat template of a model folder or a GGUF file; None when it has none of its own.

    Raises MixtralError for a damaged tokenizer_config.json.
    """
    source = Path(source)
    if source.suffix == ".gguf":
        template = read_gguf_header(source).metadata.get(_TEMPLATE)
        return None if template in TEMPLATES.values() else template
    if (source / "chat_template.jinja").is_file():
        return (source / "chat_template.jinja").read_text(encoding="utf-8")
    file = source / "tokenizer_config.json"
    if not file.is_file():
        return None
    template = read_object(file, MixtralError).get("chat_template")
    if isinstance(template, list):  # several, by name
        template = next((entry["template"] for entry in template if entry["name"] == "default"), None)
    return template
