"""Writes sentencepiece and tekken vocabularies as the `tokenizer.json` that transformers reads, with the same ids.

Both encode by merging the best-ranked pair of neighbours, the leftmost first where two rank the same. A
`tokenizer.json` states the same as a list of pairs, in which no two rank the same.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from mixtral.tokenizer.spm_model import Kind, SpmModel

SPACE = "▁"
_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}


def merge_list(pieces: Sequence[str]) -> list[tuple[str, str]]:
    """Every pair of pieces that makes another one, `pieces` given in the order in which they are to be made.

    Of the splits of one piece the one with the longest left part stands first: in a run of one character the
    leftmost merge is the one that extends what was merged before.
    """
    known = set(pieces)
    return [(piece[:i], piece[i:]) for piece in pieces for i in range(len(piece) - 1, 0, -1)
            if piece[:i] in known and piece[i:] in known]


def spm_to_json(spm: SpmModel, prefix: Sequence[int], suffix: Sequence[int]) -> bytes:
    """The tokenizer.json of a BPE model with byte fallback that leaves text as it is; prefix, suffix: around a text."""
    pieces = spm.pieces
    # Runs of spaces all share one score in Mistral's files, so that the leftmost run grows to its full length before
    # the next one starts: the longest first has the same effect.
    normal = [p for p in pieces if p.kind == Kind.NORMAL]
    normal.sort(key=lambda p: (-p.score, -len(p.text)))
    whole = sorted([p.text for p in pieces if p.kind == Kind.USER_DEFINED], key=len, reverse=True)  # the longest wins
    control = {i: p.text for i, p in enumerate(pieces) if p.kind in (Kind.CONTROL, Kind.UNKNOWN)}
    prepend = [{"type": "Prepend", "prepend": SPACE}] if spm.dummy_prefix else []
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if spm.dummy_prefix else []
    return _document(
        control,
        prefix,
        suffix,
        normalizer=_sequence("normalizers", [*prepend, _replace(" ", SPACE)]),
        # User-defined pieces are found in the text before anything merges. They are no "added tokens" here, because
        # the text after one of those would be given another leading space.
        pre_tokenizer=split("|".join(map(re.escape, whole))) if whole else None,
        decoder=_sequence("decoders", [_replace(SPACE, " "), {"type": "ByteFallback"}, {"type": "Fuse"}, *strip]),
        model={
            "unk_token": next(p.text for p in pieces if p.kind == Kind.UNKNOWN),
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": bool(whole),  # a user-defined piece is looked up as a whole
            "vocab": {p.text: i for i, p in enumerate(pieces)},
            "merges": merge_list([p.text for p in normal]),
        },
    )


def tekken_to_json(
    pieces: Sequence[bytes], control: Mapping[int, str], pattern: str, prefix: Sequence[int], suffix: Sequence[int]
) -> bytes:  # fmt: skip
    """The tokenizer.json of tekken's byte-level BPE: its rank is the order of the vocabulary."""
    table = byte_characters()
    texts = {i: "".join(table[byte] for byte in piece) for i, piece in enumerate(pieces) if i not in control}
    stages = [split(pattern), _BYTE_LEVEL]  # tiktoken looks a word up before it merges
    merges = merge_list(list(texts.values()))
    return byte_bpe_to_json({**control, **texts}, merges, control, {}, stages, True, prefix, suffix)


def byte_bpe_to_json(
    texts: Mapping[int, str], merges: Sequence[tuple[str, ...]], control: Mapping[int, str], added: Mapping[int, str],
    stages: list[dict[str, Any]], whole_words: bool, prefix: Sequence[int] = (), suffix: Sequence[int] = (),
) -> bytes:  # fmt: skip
    """The tokenizer.json of a byte-level BPE.

    Args:
        texts: all tokens by id, bytes as the characters that stand for them; `control` and `added` are among them.
        merges: pairs of tokens, the first to merge first.
        added: tokens found in the text before it is cut, which are no control tokens.
        stages: the pre-tokenizers that cut the text, ByteLevel the last.
        whole_words: a word that is a token is looked up before anything merges.
    """
    return _document(
        control,
        prefix,
        suffix,
        added,
        normalizer=None,
        pre_tokenizer=_sequence("pretokenizers", stages),
        decoder=_BYTE_LEVEL,
        model={
            "unk_token": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": whole_words,
            "vocab": {text: i for i, text in texts.items()},
            "merges": list(merges),
        },
    )


def hf_config(config: Mapping[str, Any], control: Mapping[int, str], bos_id: int, eos_id: int) -> bytes:
    """tokenizer_config.json: what it said before, and the names that transformers needs beside tokenizer.json."""
    config = {
        "model_max_length": 10**30,
        **config,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": control[bos_id],
        "eos_token": control[eos_id],
        "clean_up_tokenization_spaces": False,
    }
    if "<unk>" in control.values():
        config["unk_token"] = "<unk>"
    return json.dumps(config, indent=1).encode()


def byte_characters() -> list[str]:
    """The character by which a byte-level tokenizer.json writes each byte: itself where it prints, else U+0100 on."""
    printing = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in printing else next(others)) for byte in range(256)]


def _document(
    control: Mapping[int, str], prefix: Sequence[int], suffix: Sequence[int], added: Mapping[int, str] | None = None, *,
    model: dict[str, Any], **stages: Any,
) -> bytes:  # fmt: skip
    """The whole file, from its stages and its model. `control` tokens are special, `added` ones are not."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    tokens = sorted({**control, **(added or {})}.items())
    document = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, "content": name, **flags, "special": i in control} for i, name in tokens],
        "post_processor": template(control, prefix, suffix) if prefix or suffix else None,
        **stages,
        "model": {"type": "BPE", "dropout": None, "continuing_subword_prefix": None, "end_of_word_suffix": None,
                  **model},
    }
    return json.dumps(document, ensure_ascii=False).encode()


def template(texts: Mapping[int, str], prefix: Sequence[int], suffix: Sequence[int]) -> dict[str, Any]:
    """The post-processor that puts tokens before and after every text."""

    def framed(name: str, type_id: int) -> list[dict[str, Any]]:
        before, after = ([{"SpecialToken": {"id": texts[i], "type_id": type_id}} for i in ids]
                         for ids in (prefix, suffix))  # fmt: skip
        return [*before, {"Sequence": {"id": name, "type_id": type_id}}, *after]

    names = {i: texts[i] for i in (*prefix, *suffix)}
    return {
        "type": "TemplateProcessing",
        "single": framed("A", 0),
        "pair": framed("A", 0) + framed("B", 1),
        "special_tokens": {name: {"id": name, "ids": [i], "tokens": [name]} for i, name in names.items()},
    }


def _sequence(member: str, items: list[dict[str, Any]]) -> dict[str, Any]:
    return {"type": "Sequence", member: items}


def _replace(old: str, new: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": {"String": old}, "content": new}


def split(pattern: str) -> dict[str, Any]:
    """The pre-tokenizer that cuts text at each match of a regular expression."""
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
