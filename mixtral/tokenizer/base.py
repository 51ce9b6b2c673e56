"""Tokenizer: text to ids and back. Decoding is the same for every kind of file: a table of bytes, one row a token."""

from __future__ import annotations

import codecs
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mixtral.errors import UsageError
from mixtral.files import atomic_write

if TYPE_CHECKING:
    from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

MOST_TOKENS = 1 << 19  # of a vocabulary; the largest published ones have half of it


class Tokenizer(ABC):
    """What every tokenizer offers; a subclass adds `_encode` and `_files`.

    `pieces`: the bytes each id stands for, b"" for control tokens.
    `control`: the names of the control tokens by id, such as {1: "<s>", 2: "</s>"}.
    `dummy_prefix`: the encoder puts a space before every text, which decoding takes away again.
    `whole`: tokens that are found before the encoder puts such a space; one at their begin is their own.
    `openers`: tokens after which the encoder begins a text anew, with such a space.
    `prefix`, `suffix`: the ids that the files put before and after every text; by default <s> and nothing.
    `side_files`: the small files beside the vocabulary (tokenizer/side_files.py), which `save` writes too.
    """

    def __init__(self, version: str, pieces: Sequence[bytes], control: Mapping[int, str], bos_id: int, eos_id: int,
                 dummy_prefix: bool) -> None:
        self.version = version  # "v1", "v2", "v3", ...: Mistral's sentencepiece files; "tekken"; "json"
        self.vocab_size = len(pieces)
        self.bos_id = bos_id
        self.eos_id = eos_id
        self.control = dict(control)
        self.dummy_prefix = dummy_prefix
        self.whole: frozenset[int] = frozenset()
        self.openers: frozenset[int] = frozenset()
        self.prefix: tuple[int, ...] = (bos_id,)
        self.suffix: tuple[int, ...] = ()
        self.side_files: Mapping[str, bytes] = {}
        self._pieces = list(pieces)

    # -- text to ids -------------------------------------------------------------------------------------------------

    @abstractmethod
    def _encode(self, text: str) -> list[int]:
        """The ids of valid text, without <s> and </s>."""

    def _encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [self._encode(text) for text in texts]

    def encode(self, text: str, bos: bool | None = None, eos: bool | None = None) -> list[int]:
        """The ids of `text`. A control token's name typed in the text ("[INST]") stays text.

        Args:
            bos, eos: whether <s> stands before the text, </s> after it; None: as the tokenizer's files decide.

        Raises UsageError for a lone surrogate, which no UTF-8 text holds.
        """
        check_text(text)
        return self._framed(self._encode(text), bos, eos)

    def encode_batch(
        self, texts: Sequence[str], bos: bool | None = None, eos: bool | None = None
    ) -> list[list[int]]:  # fmt: skip
        """The ids of each text, on all processors where the library below can do so."""
        for text in texts:
            check_text(text)
        return [self._framed(ids, bos, eos) for ids in self._encode_batch(list(texts))]

    def _framed(self, ids: list[int], bos: bool | None, eos: bool | None) -> list[int]:
        before = self.prefix if bos is None else [self.bos_id] * bos
        after = self.suffix if eos is None else [self.eos_id] * eos
        return [*before, *ids, *after]

    def frame(self, bos: bool | None, eos: bool | None) -> None:
        """Let <s> stand before every text, </s> after it, or not; None: as it was."""
        self.prefix = self.prefix if bos is None else (self.bos_id,) * bos
        self.suffix = self.suffix if eos is None else (self.eos_id,) * eos

    @property
    def adds_bos(self) -> bool:
        """Whether <s> stands before every text."""
        return self.bos_id in self.prefix

    @property
    def adds_eos(self) -> bool:
        """Whether </s> stands after every text."""
        return self.eos_id in self.suffix

    # -- ids to text -------------------------------------------------------------------------------------------------

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes the token stands for; b"" for control tokens. Raises UsageError for an id out of range."""
        if not 0 <= token_id < self.vocab_size:
            raise UsageError(f"token id {token_id} is out of range: this vocabulary has ids 0 to {self.vocab_size - 1}")
        return self._pieces[token_id]

    def byte_lengths(self) -> np.ndarray:
        """int64 [vocab_size]: how many bytes of text each token stands for (0 for control tokens)."""
        return np.array([len(piece) for piece in self._pieces], dtype=np.int64)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`: control tokens are skipped, bytes that are not UTF-8 become U+FFFD."""
        stream = self.stream()
        return "".join([stream.add(token_id) for token_id in ids]) + stream.flush()

    def stream(self, after: Sequence[int] = ()) -> TextStream:
        """Incremental decoding: of a text of its own, or of one that goes on after the ids of a prompt."""
        stream = TextStream(self)
        for token_id in after:
            stream.add(token_id)
        return stream

    # -- identity, files, chat ---------------------------------------------------------------------------------------

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of the vocabulary: equal for equal token tables, whichever kind of file they were read from."""
        digest = hashlib.sha256()
        for token_id, piece in enumerate(self._pieces):
            kind, name = (b"c", self.control[token_id].encode()) if token_id in self.control else (b"t", piece)
            digest.update(kind + len(name).to_bytes(4, "little") + name)
        return digest.hexdigest()

    @abstractmethod
    def _files(self) -> dict[str, bytes]:
        """The files that `load_tokenizer` and transformers' AutoTokenizer need, by name."""

    def files(self) -> dict[str, bytes]:
        """What `save` writes, by the path in the folder."""
        return {**self.side_files, **self._files()}

    def save(self, folder: Path | str) -> None:
        """Write those files into `folder`, which is made when missing.

        Raises UsageError, with nothing written, when one of them is there with other content; MixtralError when it
        cannot write.
        """
        files = {Path(folder) / name: content for name, content in self.files().items()}
        for path, content in files.items():
            if path.exists() and path.read_bytes() != content:
                raise UsageError(f"{path}: exists already, and is of another tokenizer; name another folder")
        for path, content in files.items():
            atomic_write(path, content)

    @property
    def mistral(self) -> MistralTokenizer[Any, Any, Any, Any, Any] | None:
        """mistral-common's tokenizer of the same file, for its chat formats; None for a bare tokenizer.json."""
        return None

    def __getstate__(self) -> dict[str, Any]:
        """Without mistral-common's object, which is read again where it is needed."""
        return {name: value for name, value in self.__dict__.items() if name != "mistral"}


class TextStream:
    """Decodes token by token. The strings it returns only ever extend the text, and together equal `decode`."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._drop_space = tokenizer.dummy_prefix

    def add(self, token_id: int) -> str:
        """The text that `token_id` completes; "" while a character still lacks bytes, and for control tokens."""
        piece = self._tokenizer.token_bytes(token_id)
        if self._drop_space and piece:
            piece = piece if token_id in self._tokenizer.whole else piece.removeprefix(b" ")
            self._drop_space = False
        self._drop_space = self._drop_space or token_id in self._tokenizer.openers
        return self._decoder.decode(piece)

    def flush(self) -> str:
        """What is left at the end of the text: an unfinished character becomes U+FFFD."""
        return self._decoder.decode(b"", final=True)


def check_text(text: str) -> None:
    """Raises UsageError for a lone surrogate."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UsageError(f"text: character {error.start} is {text[error.start]!r}, half of a surrogate pair; "
                         "only valid Unicode can be encoded") from error
