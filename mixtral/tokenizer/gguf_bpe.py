"""Byte-level BPE in GGUF metadata ("gpt2" there): tokens, merges, and a name for how text is cut into words first.

The names are llama.cpp's. Each stands for the `pre_tokenizer` of a tokenizer.json that the models of that name have,
and for whether a word that is a token is looked up before anything merges.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from itertools import chain
from typing import Any, NamedTuple

from mixtral.errors import UsageError, shown
from mixtral.tokenizer.base import Tokenizer
from mixtral.tokenizer.export import byte_bpe_to_json, split
from mixtral.tokenizer.mistral import TekkenTokenizer
from mixtral.tokenizer.spm_model import Kind
from mixtral.tokenizer.tokenizer_json import JsonTokenizer

_LETTER, _UPPER, _LOWER = r"[^\r\n\p{L}\p{N}]?", r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA_3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|" + _SPACES)
_TEKKEN = (
    rf"{_LETTER}{_UPPER}*{_LOWER}+|{_LETTER}{_UPPER}+{_LOWER}*|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|" + _SPACES
)
_DIGITS = {"type": "Digits", "individual_digits": True}
_GPT_2 = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
_BYTES = {**_GPT_2, "use_regex": False}


class PreTokenizer(NamedTuple):
    stages: tuple[dict[str, Any], ...]
    whole_words: bool = False  # `ignore_merges`: a word that is a token is that token


PRE_TOKENIZERS = {
    "gpt-2": PreTokenizer((_GPT_2,)),
    "smollm": PreTokenizer((_DIGITS, _GPT_2)),
    "llama-bpe": PreTokenizer((split(_LLAMA_3), _BYTES), whole_words=True),
    "tekken": PreTokenizer((split(_TEKKEN), _BYTES), whole_words=True),
}
_SAME = {"llama3": "llama-bpe", "llama-v3": "llama-bpe", "phi-2": "gpt-2"}  # other names for them
_ADD_BOS = {"llama-bpe", "tekken"}  # llama.cpp's default for add_bos_token


class Vocabulary(NamedTuple):
    """What the lists of the metadata hold."""

    tokens: list[str]  # bytes as the characters that stand for them; control and added tokens as they are
    kinds: list[Kind]
    merges: list[str]  # "left right"
    pre: str  # a key of PRE_TOKENIZERS


def known_pre_tokenizer(name: object) -> str:
    """The key of PRE_TOKENIZERS; raises ValueError, naming it, for one that is not known."""
    if not isinstance(name, str) or _SAME.get(name, name) not in PRE_TOKENIZERS:
        known = ", ".join(PRE_TOKENIZERS)
        raise ValueError(f"tokenizer.ggml.pre is {shown(name)}, a way to cut text into words that is not known; "
                         f"{known} are")
    return _SAME.get(name, name)


def adds_bos(pre: str) -> bool:
    """Whether <s> stands before a text where the file does not say."""
    return pre in _ADD_BOS


def vocabulary_json(vocabulary: Vocabulary) -> bytes:
    """The tokenizer.json of such a vocabulary."""
    pre, tokens = PRE_TOKENIZERS[vocabulary.pre], dict(enumerate(vocabulary.tokens))
    control = {i: tokens[i] for i, kind in enumerate(vocabulary.kinds) if kind in (Kind.CONTROL, Kind.UNKNOWN)}
    added = {i: tokens[i] for i, kind in enumerate(vocabulary.kinds) if kind == Kind.USER_DEFINED}
    pairs = [tuple(merge.split(" ", 1)) for merge in vocabulary.merges]
    return byte_bpe_to_json(tokens, pairs, control, added, list(pre.stages), pre.whole_words)


def vocabulary_of(tokenizer: Tokenizer) -> Vocabulary:
    """What GGUF says of a byte-level tokenizer. Raises UsageError, with its stages, where GGUF has no name for it."""
    document = _document(tokenizer)
    model = document["model"]
    found = [name for name, pre in PRE_TOKENIZERS.items() if _is(pre, document)]
    if model.get("type") != "BPE" or document.get("normalizer") is not None or not found:
        stages = ", ".join(_described(stage) for stage in _stages(document.get("pre_tokenizer"))) or "nothing"
        raise UsageError(f"this tokenizer cannot be written to GGUF: {model.get('type')} with text cut by {stages}; "
                         f"byte-level BPE cut as {', '.join(PRE_TOKENIZERS)} can be, or a sentencepiece model")
    added = {token["id"]: token for token in document.get("added_tokens") or ()}
    texts = {i: text for text, i in model["vocab"].items()} | {i: token["content"] for i, token in added.items()}
    tokens = [texts.get(i, f"[PAD{i}]") for i in range(max(texts) + 1)]
    kinds = [_kind(i, texts, added, tokenizer) for i in range(len(tokens))]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    return Vocabulary(tokens, kinds, merges, found[0])


def _document(tokenizer: Tokenizer) -> dict[str, Any]:
    if isinstance(tokenizer, JsonTokenizer | TekkenTokenizer):
        document: dict[str, Any] = json.loads(tokenizer.to_json())
        return document
    raise UsageError(f"a {tokenizer.version} tokenizer cannot be written to GGUF as byte-level BPE")


def _kind(token_id: int, texts: Mapping[int, str], added: Mapping[int, Any], tokenizer: Tokenizer) -> Kind:
    if token_id in tokenizer.control:
        return Kind.CONTROL
    if token_id in added:
        return Kind.USER_DEFINED
    return Kind.NORMAL if token_id in texts else Kind.UNUSED


def _is(pre: PreTokenizer, document: dict[str, Any]) -> bool:
    """Whether a tokenizer.json cuts text like this, and looks words up like this."""
    wanted = [_plain(stage) for stage in pre.stages]
    have = [_plain(stage) for stage in _stages(document.get("pre_tokenizer"))]
    return wanted == have and pre.whole_words == bool(document["model"].get("ignore_merges"))


def _stages(pre_tokenizer: dict[str, Any] | None) -> list[dict[str, Any]]:
    if pre_tokenizer is None:
        return []
    if pre_tokenizer.get("type") != "Sequence":
        return [pre_tokenizer]
    return list(chain.from_iterable(_stages(stage) for stage in pre_tokenizer.get("pretokenizers") or ()))


def _plain(stage: dict[str, Any]) -> dict[str, Any]:
    """Without what changes no id, and with what is left out at its default."""
    defaults = {"use_regex": True} if stage.get("type") == "ByteLevel" else {}
    return {key: value for key, value in {**defaults, **stage}.items() if key != "trim_offsets"}


def _described(stage: dict[str, Any]) -> str:
    pattern = stage.get("pattern")
    detail = f" {shown(pattern.get('Regex', pattern.get('String')))}" if isinstance(pattern, dict) else ""
    return f"{stage.get('type')}{detail}"


def check_vocabulary(tokens: list[Any], kinds: list[Any], merges: object) -> None:
    """Raises ValueError, naming the key and entry, for lists that are no vocabulary."""
    for key, column, right, what in (
        ("tokens", tokens, lambda value: isinstance(value, str) and value != "", "text"),
        ("token_type", kinds, lambda value: type(value) is int and value in list(Kind), "kind"),
        ("merges", merges, lambda value: isinstance(value, str) and value.count(" ") == 1, "pair of tokens"),
    ):
        if not isinstance(column, list):
            raise ValueError(f"tokenizer.ggml.{key} must be a list, not {shown(column)}")
        for i, value in enumerate(column):
            if not right(value):
                raise ValueError(f"tokenizer.ggml.{key}[{i}] is {shown(value)}, which is no {what}")
    if len(tokens) != len(kinds):
        raise ValueError(f"tokenizer.ggml.tokens has {len(tokens)} entries, tokenizer.ggml.token_type {len(kinds)}")
    text, count = next(iter(Counter(tokens).most_common(1)), ("", 0))
    if count > 1:
        raise ValueError(f"tokenizer.ggml.tokens holds {shown(text)} {count} times")
    if not any(kind == Kind.NORMAL for kind in kinds):
        raise ValueError("tokenizer.ggml.token_type names no normal token")
