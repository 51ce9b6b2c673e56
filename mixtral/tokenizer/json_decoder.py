"""The decoder of a `tokenizer.json`: which bytes of text each of its tokens stands for."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from mixtral.errors import MixtralError, shown
from mixtral.tokenizer.export import byte_characters
from mixtral.tokenizer.spm_model import BYTE_PIECE

_BYTE_OF = {character: byte for byte, character in enumerate(byte_characters())}
_BYTES = {"ByteLevel", "ByteFallback", "Metaspace"}  # one of these says how bytes or spaces are written
_KINDS = {*_BYTES, "Replace", "Fuse", "Strip"}
_READ = "Replace of a text, and Strip of one leading space after Fuse are"


class JsonDecoder(NamedTuple):
    """How a token is written in the vocabulary."""

    byte_level: bool  # a character for each byte
    byte_fallback: bool  # <0x0A> is a byte
    replaced: tuple[tuple[str, str], ...]  # what stands for what, such as "▁" for " "

    @classmethod
    def read(cls, document: dict[str, Any], file_name: str) -> JsonDecoder:
        """Raises MixtralError for a kind whose tokens are no bytes of text, by its name."""
        parts = list(_parts(document.get("decoder"), file_name))
        kinds = {part["type"] for part in parts}
        replaced: list[tuple[str, str]] = []
        for part in parts:
            match part:
                case {"type": "ByteLevel" | "ByteFallback" | "Fuse"}:
                    pass
                case {"type": "Strip", "content": " ", "start": 0 | 1, "stop": 0} if "Fuse" in kinds:
                    pass  # whether there is a space to take away, the encoder says (tokenizer_json.py)
                case {"type": "Metaspace", "replacement": mark}:
                    replaced.append((mark, " "))
                case {"type": "Replace", "pattern": {"String": old}, "content": new} if old:
                    replaced.append((old, new))
                case {"type": "Strip" | "Replace" as kind, **options}:
                    what = f"a {kind!r} of {shown(options)}"
                    raise MixtralError(f"{file_name}: decoder: {what} is not supported; {_READ}")
        byte_level = "ByteLevel" in kinds
        if kinds - _KINDS or not kinds & _BYTES or (byte_level and kinds - {"ByteLevel", "Fuse"}):
            raise MixtralError(f"{file_name}: only byte-level, byte-fallback and Metaspace vocabularies are supported, "
                               f"not a {document['model'].get('type')} with decoder {sorted(kinds)}")
        return cls(byte_level, "ByteFallback" in kinds, tuple(replaced))

    def is_byte(self, text: str) -> bool:
        """Whether the token is a byte for characters that the vocabulary lacks, though it may be called special."""
        return self.byte_fallback and BYTE_PIECE.fullmatch(text) is not None

    def piece(self, text: str) -> bytes:
        """The bytes of a token. One that is not written in the alphabet of bytes stands for its own text."""
        if self.byte_level:
            values = [_BYTE_OF.get(character, -1) for character in text]
            return text.encode() if -1 in values else bytes(values)
        if self.byte_fallback and (match := BYTE_PIECE.fullmatch(text)):
            return bytes([int(match[1], 16)])
        for old, new in self.replaced:
            text = text.replace(old, new)
        return text.encode()


def _parts(decoder: Any, file_name: str) -> Iterator[dict[str, Any]]:
    """A decoder that is no sequence, or those of a sequence. The library reads some that do not say their type."""
    if decoder is None:
        return
    if not isinstance(decoder, dict) or not isinstance(decoder.get("type"), str):
        raise MixtralError(f"{file_name}: decoder: {shown(decoder)} must be an object with its type")
    if decoder["type"] != "Sequence":
        yield decoder
    for part in decoder.get("decoders") or ():
        yield from _parts(part, file_name)
