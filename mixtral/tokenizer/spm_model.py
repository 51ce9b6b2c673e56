"""A sentencepiece model file: its pieces with scores and kinds, and the settings that decide how it encodes.

The sentencepiece library gives neither settings nor user-defined pieces, and its own reader wants the protobuf
package; the wire format is simple enough to read here.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from enum import IntEnum
from typing import NamedTuple

# Field numbers of sentencepiece's ModelProto, TrainerSpec and NormalizerSpec messages.
PIECE, TRAINER, NORMALIZER = 1, 2, 3
MODEL_TYPE, VOCAB_SIZE, SUFFIX_SPACES, BYTE_FALLBACK = 3, 4, 24, 35
_UNKNOWN, _BOS, _EOS, PAD_ID = (40, 45), (41, 46), (42, 47), 43  # each one's id, and its text
NAME, CHARSMAP, DUMMY_PREFIX, SQUEEZE_SPACES, ESCAPE_SPACES = 1, 2, 3, 4, 5
BPE = 2
BYTE_PIECE = re.compile("<0x([0-9A-Fa-f]{2})>")
_SCORE = bytes([2 << 3 | 5])  # what stands before the four bytes of a piece's score


class Kind(IntEnum):
    NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)


class Piece(NamedTuple):
    text: str  # spaces written as U+2581
    score: float  # pairs merge best score first
    kind: Kind


class SpmModel(NamedTuple):
    pieces: list[Piece]
    dummy_prefix: bool


def read_spm_model(data: bytes) -> SpmModel:
    """Raises ValueError, with the reason, for what is not a model of Mistral's family (BPE that loses nothing)."""
    try:
        fields = list(_fields(data))
        pieces = [_piece(value) for number, value in fields if number == PIECE and isinstance(value, bytes)]
        specs = {number: dict(_fields(value)) for number, value in fields
                 if number in (TRAINER, NORMALIZER) and isinstance(value, bytes)}
    except (IndexError, struct.error, ValueError) as error:
        raise ValueError("the file is damaged or not a sentencepiece model") from error
    if not pieces or len(specs) < 2:
        raise ValueError("the file is damaged or not a sentencepiece model")
    trainer, normalizer = specs[TRAINER], specs[NORMALIZER]
    if trainer.get(MODEL_TYPE) != BPE or not trainer.get(BYTE_FALLBACK) or trainer.get(SUFFIX_SPACES):
        raise ValueError("only BPE models with byte fallback are supported")
    if normalizer.get(CHARSMAP) or normalizer.get(SQUEEZE_SPACES, 1) or not normalizer.get(ESCAPE_SPACES, 1):
        raise ValueError("only models that keep the text as it is (identity normaliser, all spaces) are supported")
    return SpmModel(pieces, dummy_prefix=bool(normalizer.get(DUMMY_PREFIX, 1)))


def write_spm_model(model: SpmModel, bos_id: int, eos_id: int) -> bytes:
    """The file of such a model. Raises ValueError unless exactly one piece stands for the unknown."""
    unknown = [i for i, piece in enumerate(model.pieces) if piece.kind == Kind.UNKNOWN]
    if len(unknown) != 1:
        raise ValueError(f"{len(unknown)} pieces stand for the unknown; exactly one must")
    pieces = [_field(1, text.encode()) + _SCORE + struct.pack("<f", score) + _field(3, int(kind))
              for text, score, kind in model.pieces]  # fmt: skip
    trainer: dict[int, int | bytes] = {MODEL_TYPE: BPE, VOCAB_SIZE: len(pieces), BYTE_FALLBACK: 1}
    for (id_field, name_field), i in {_UNKNOWN: unknown[0], _BOS: bos_id, _EOS: eos_id}.items():
        trainer |= {id_field: i, name_field: model.pieces[i].text.encode()}
    trainer[PAD_ID] = 2**64 - 1  # none: -1 as protobuf writes it
    normalizer: dict[int, int | bytes] = {NAME: b"identity", SQUEEZE_SPACES: 0, ESCAPE_SPACES: 1}
    normalizer[DUMMY_PREFIX] = int(model.dummy_prefix)
    specs = _field(TRAINER, _message(trainer)) + _field(NORMALIZER, _message(normalizer))
    return b"".join(_field(PIECE, piece) for piece in pieces) + specs


def _message(fields: dict[int, int | bytes]) -> bytes:
    return b"".join(_field(number, value) for number, value in fields.items())


def _field(number: int, value: int | bytes) -> bytes:
    """A whole number, or bytes after their length."""
    if isinstance(value, int):
        return _as_varint(number << 3) + _as_varint(value)
    return _as_varint(number << 3 | 2) + _as_varint(len(value)) + value


def _as_varint(number: int) -> bytes:
    """Seven bits a byte, the lowest first; the eighth says that more follow."""
    out = bytearray()
    while number > 127:
        out.append(number & 127 | 128)
        number >>= 7
    return bytes([*out, number])


def _piece(data: bytes) -> Piece:
    fields = dict(_fields(data))
    text, score, kind = fields.get(1, b""), fields.get(2, b"\0\0\0\0"), fields.get(3, 1)
    if not isinstance(text, bytes) or not isinstance(score, bytes) or not isinstance(kind, int):
        raise ValueError("a piece's fields have the wrong wire types")
    piece = Piece(text.decode(), struct.unpack("<f", score)[0], Kind(kind))
    if piece.kind == Kind.BYTE and not BYTE_PIECE.fullmatch(piece.text):
        raise ValueError("a byte's piece is not written as <0x0A> is")
    return piece


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """(field number, value) of one protobuf message: numbers as int, everything else as its bytes."""
    position = 0
    while position < len(data):
        key, position = _varint(data, position)
        wire_type = key & 7
        if wire_type == 0:
            value, position = _varint(data, position)
            yield key >> 3, value
            continue
        if wire_type == 2:
            size, position = _varint(data, position)
        elif wire_type in (1, 5):
            size = 8 if wire_type == 1 else 4
        else:
            raise ValueError(f"unknown wire type {wire_type}")
        if position + size > len(data):
            raise ValueError("the message ends early")
        yield key >> 3, data[position : position + size]
        position += size


def _varint(data: bytes, position: int) -> tuple[int, int]:
    """The number that starts at `position`, seven bits a byte, and where it ends."""
    number = shift = 0
    while True:
        byte = data[position]
        if shift > 63:
            raise ValueError("a number of more than 64 bits")
        number |= (byte & 127) << shift
        position += 1
        shift += 7
        if byte < 128:
            return number, position
