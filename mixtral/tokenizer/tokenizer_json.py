"""A bare `tokenizer.json`: byte-level BPE, or BPE with byte fallback, through the tokenizers library."""

from __future__ import annotations

import json
import re
from typing import Any

from tokenizers import Tokenizer as FastTokenizer

from mixtral.errors import MixtralError
from mixtral.tokenizer.base import Tokenizer
from mixtral.tokenizer.export import SPACE, byte_characters

BYTE_PIECE = re.compile("<0x([0-9A-F]{2})>")
USUAL_NAMES = {"bos_token": ("<s>", "<|begin_of_text|>", "<|endoftext|>"),
               "eos_token": ("</s>", "<|end_of_text|>", "<|endoftext|>")}


class JsonTokenizer(Tokenizer):
    """`config` is the tokenizer_config.json beside the file ({} when there is none): it names <s> and </s>."""

    def __init__(self, data: bytes, config: dict[str, Any], file_name: str) -> None:
        """Raises MixtralError when the file is damaged, of another kind, or without beginning and end tokens."""
        try:
            document = json.loads(data)
            self._fast = FastTokenizer.from_str(data.decode())
        except Exception as error:  # the library raises bare Exception
            raise MixtralError(f"{file_name}: damaged or not a tokenizer.json: {str(error)[:80]}") from error
        self._fast.encode_special_tokens = True  # "[INST]" typed in a text stays text
        self._fast.no_truncation()
        self._fast.no_padding()
        added = {token["id"]: token for token in document.get("added_tokens", [])}
        control = {i: token["content"] for i, token in added.items() if token["special"]}
        types = _types(document.get("decoder"))
        if not types & {"ByteLevel", "ByteFallback"}:
            raise MixtralError(f"{file_name}: only byte-level and byte-fallback vocabularies are supported, "
                               f"not a {document['model'].get('type')} with decoder {sorted(types)}")
        vocab = self._fast.get_vocab(with_added_tokens=True)
        pieces = [b""] * (max(vocab.values()) + 1)
        for text, i in vocab.items():
            if i not in control:
                pieces[i] = text.encode() if i in added else _piece_bytes(text, byte_level="ByteLevel" in types)
        super().__init__("json", pieces, control, _special_id("bos_token", config, vocab, file_name),
                         _special_id("eos_token", config, vocab, file_name), dummy_prefix="Strip" in types)
        self._data = data
        self._config = config

    def _encode(self, text: str) -> list[int]:
        return self._fast.encode(text, add_special_tokens=False).ids

    def _encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self._fast.encode_batch_fast(texts, add_special_tokens=False)]

    def _files(self) -> dict[str, bytes]:
        names = {i: text for text, i in self._fast.get_vocab(with_added_tokens=True).items()}
        config = {"tokenizer_class": "PreTrainedTokenizerFast", **self._config,
                  "bos_token": names[self.bos_id], "eos_token": names[self.eos_id]}
        return {"tokenizer.json": self._data, "tokenizer_config.json": json.dumps(config, indent=1).encode()}


def _types(decoder: dict[str, Any] | None) -> set[str]:
    """The type of a decoder and of those in its sequence."""
    if decoder is None:
        return set()
    return {decoder["type"]}.union(*map(_types, decoder.get("decoders", [])))


_BYTE_OF = {character: byte for byte, character in enumerate(byte_characters())}


def _piece_bytes(text: str, byte_level: bool) -> bytes:
    if byte_level:
        return bytes(_BYTE_OF[character] for character in text)
    if match := BYTE_PIECE.fullmatch(text):
        return bytes([int(match[1], 16)])
    return text.replace(SPACE, " ").encode()


def _special_id(role: str, config: dict[str, Any], vocab: dict[str, int], file_name: str) -> int:
    named = config.get(role)
    names = [named["content"] if isinstance(named, dict) else named] if named else USUAL_NAMES[role]
    for name in names:
        if name in vocab:
            return vocab[name]
    raise MixtralError(f"{file_name}: no {role}: none of {', '.join(names)} is in the vocabulary; "
                       f'name it in tokenizer_config.json beside it: "{role}": "..."')
