"""Mistral's own tokenizer files: sentencepiece models (v1, v2, v3, ...) and tekken."""

from __future__ import annotations

import copy
import json
import tempfile
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from sentencepiece import SentencePieceProcessor

from mixtral.cores import threads
from mixtral.errors import MixtralError, UsageError, shown
from mixtral.tokenizer.base import MOST_TOKENS, Tokenizer
from mixtral.tokenizer.export import hf_config, spm_to_json, tekken_to_json
from mixtral.tokenizer.side_files import Beside, parse_vocabulary
from mixtral.tokenizer.spm_model import Kind, Piece, SpmModel, read_spm_model

if TYPE_CHECKING:
    from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

T = TypeVar("T")
VERSIONS = ("v1", "v2", "v3", "v7", "v11", "v13", "v15")  # mistral-common's, which takes long to import
BARE_NAME_CLUES = {"[SYSTEM_PROMPT]": "v7", "[INST]": "v3"}  # the first control token found decides; v2 reads as v3


class SentencePieceTokenizer(Tokenizer):
    """A sentencepiece BPE model with byte fallback: every text encodes, and decodes to itself.

    One character is an exception, in every sentencepiece model: U+2581, which stands for the space inside pieces,
    decodes as a space.
    """

    def __init__(self, data: bytes, file_name: str, beside: Beside | None = None) -> None:
        """`file_name` names the version as mistral-common reads it: own.model.v3. Raises MixtralError, UsageError.

        What lies beside decides about <s> and </s> around a text (`add_bos_token`, `add_eos_token`).
        """
        try:
            pieces, dummy_prefix = read_spm_model(data)
            self._processor = SentencePieceProcessor(model_proto=data)
        except (ValueError, RuntimeError) as error:
            reason = error if isinstance(error, ValueError) else "the file is damaged"
            raise MixtralError(f"{file_name}: {reason}; expected a sentencepiece model such as tokenizer.model.v3") \
                from error
        control = {i: p.text for i, p in enumerate(pieces) if p.kind in (Kind.CONTROL, Kind.UNKNOWN)}
        bos_id, eos_id = self._processor.bos_id(), self._processor.eos_id()
        if bos_id < 0 or eos_id < 0:
            raise MixtralError(f"{file_name}: no <s> or no </s> among the pieces; a language model needs both")
        super().__init__(_spm_version(file_name, control), [_spm_bytes(p) for p in pieces], control, bos_id, eos_id,
                         dummy_prefix)
        self._beside = beside or Beside()
        self.side_files = self._beside.files
        self.frame(self._beside.flag("add_bos_token"), self._beside.flag("add_eos_token"))
        self.data = data
        stem = file_name.partition(".model")[0]
        suffix = file_name.rpartition(".model.")[2] if ".model." in file_name else self.version
        self.file_name = f"{stem}.model.{suffix}"

    @property
    def spm(self) -> SpmModel:
        """The pieces with their scores and kinds, as they stand in the file."""
        return read_spm_model(self.data)

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self._processor.encode(text)
        return ids

    def _encode_batch(self, texts: list[str]) -> list[list[int]]:
        ids: list[list[int]] = self._processor.encode(texts, num_threads=threads())
        return ids

    def _files(self) -> dict[str, bytes]:
        return {self.file_name: self.data, **self.json_files()}

    def json_files(self) -> dict[str, bytes]:
        """The files that transformers needs, by name."""
        return {"tokenizer.json": self.to_json(),
                "tokenizer_config.json": hf_config(self._beside.config, self.control, self.bos_id, self.eos_id)}

    def with_files(self, beside: Beside) -> SentencePieceTokenizer:
        """The same tokenizer, to be saved with these files."""
        same = copy.copy(self)
        same._beside, same.side_files = beside, beside.files
        return same

    def to_json(self) -> bytes:
        """The tokenizer.json that encodes as this model does."""
        return spm_to_json(self.spm, self.prefix, self.suffix)

    @cached_property
    def mistral(self) -> MistralTokenizer[Any, Any, Any, Any, Any]:
        return _mistral_tokenizer(self.data, self.file_name)


class TekkenTokenizer(Tokenizer):
    """Tekken: byte-level BPE (tiktoken) with its control tokens in front of the vocabulary."""

    def __init__(self, data: bytes, file_name: str, beside: Beside | None = None) -> None:
        """Raises MixtralError when the file is not a whole tekken file."""
        _check_sizes(parse_vocabulary(data, file_name), file_name)
        from mistral_common.tokens.tokenizers.tekken import Tekkenizer

        try:
            self._tekken = _from_file(Tekkenizer.from_file, data, "tekken.json")
            control = {i: self._tekken.id_to_piece(i) for i in sorted(self._tekken.special_ids)}
            "".join(control.values()).encode()  # ValueError for half of a surrogate pair
        except Exception as error:  # whatever the library stumbles over
            reason = str(error).partition("\n")[0][:80]
            raise MixtralError(f"{file_name}: damaged or not a tekken.json: {type(error).__name__}: {reason}") \
                from error
        pieces = [self._tekken.id_to_byte_piece(i) for i in range(self._tekken.n_words)]
        super().__init__("tekken", pieces, control, self._tekken.bos_id, self._tekken.eos_id, dummy_prefix=False)
        self._beside = beside or Beside()
        self.side_files = self._beside.files
        self._data = data

    def _encode(self, text: str) -> list[int]:
        return self._tekken.encode(text, bos=False, eos=False)

    def _files(self) -> dict[str, bytes]:
        return {"tekken.json": self._data,
                "tokenizer.json": self.to_json(),
                "tokenizer_config.json": hf_config(self._beside.config, self.control, self.bos_id, self.eos_id)}

    def to_json(self) -> bytes:
        """The tokenizer.json of the same ids."""
        pattern = json.loads(self._data)["config"]["pattern"]
        return tekken_to_json(self._pieces, self.control, pattern, self.prefix, self.suffix)

    @cached_property
    def mistral(self) -> MistralTokenizer[Any, Any, Any, Any, Any]:
        return _mistral_tokenizer(self._data, "tekken.json")


def _check_sizes(document: dict[str, Any], file_name: str) -> None:
    """Refuse numbers of tokens that no vocabulary has, before the library makes a name for each."""
    config = document.get("config")
    if not isinstance(config, dict):
        raise MixtralError(f"{file_name}: damaged or not a tekken.json: config must be an object, not {shown(config)}")
    most = MOST_TOKENS
    for key in ("default_vocab_size", "default_num_special_tokens"):
        value = config.get(key)
        if type(value) is not int or not 0 < value <= most:
            raise MixtralError(f"{file_name}: damaged or not a tekken.json: config.{key} must be a whole number from 1 "
                               f"to {most:,}, not {shown(value)}")
        most = value


def _spm_version(file_name: str, control: dict[int, str]) -> str:
    """As mistral-common reads it: own.model.v3, tokenizer.model.v7m1. A bare .model shows by its control tokens."""
    suffix = file_name.rpartition(".model")[2]
    if not suffix:
        return next((version for name, version in BARE_NAME_CLUES.items() if name in control.values()), "v1")
    version = suffix.removeprefix(".").partition("m")[0]
    if version not in VERSIONS:
        known = ", ".join(f".model.{name}" for name in VERSIONS)
        raise UsageError(f"{file_name}: unknown tokenizer version {version!r}; the name must end in .model or {known}")
    return version


def _spm_bytes(piece: Piece) -> bytes:
    if piece.kind in (Kind.CONTROL, Kind.UNKNOWN):
        return b""
    if piece.kind == Kind.BYTE:  # written <0x0A>
        return bytes([int(piece.text[3:5], 16)])
    return piece.text.replace("▁", " ").encode()


def _mistral_tokenizer(data: bytes, file_name: str) -> MistralTokenizer[Any, Any, Any, Any, Any]:
    from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

    return _from_file(MistralTokenizer.from_file, data, file_name)


def _from_file(read: Callable[[Path], T], data: bytes, file_name: str) -> T:
    """mistral-common reads files alone, and the version from their name."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / file_name
        path.write_bytes(data)
        return read(path)
