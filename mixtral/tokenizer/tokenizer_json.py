"""A `tokenizer.json` of any byte-level, byte-fallback or Metaspace kind, through the tokenizers library.

The library encodes, so ids are what transformers' AutoTokenizer gives. Decoding is ours (base.py): the library's own
takes more spaces from the beginning of a text than its encoder put there.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from tokenizers import AddedToken
from tokenizers import Tokenizer as FastTokenizer

from mixtral.errors import MixtralError, shown
from mixtral.tokenizer.base import MOST_TOKENS, Tokenizer
from mixtral.tokenizer.export import template
from mixtral.tokenizer.json_decoder import JsonDecoder
from mixtral.tokenizer.json_post_processor import check_post_processor
from mixtral.tokenizer.mistral import SentencePieceTokenizer
from mixtral.tokenizer.side_files import Added, Beside, Special, parse_vocabulary

if TYPE_CHECKING:
    from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

log = logging.getLogger(__name__)

T = TypeVar("T")
USUAL_NAMES = {"bos_token": ("<s>", "<|begin_of_text|>", "<|endoftext|>"),
               "eos_token": ("</s>", "<|end_of_text|>", "<|endoftext|>")}
_NOT_ENCODED = "a text that it cannot encode"
_PROBES = ("a", "0", "e", "the", ".", "\n")


class JsonTokenizer(Tokenizer):
    """`sentencepiece` is the model of the same vocabulary that lies beside the file, if one does.

    Encoding does not use it: it gives what a tokenizer.json has not, mistral-common's chat formats and a form for GGUF.
    """

    def __init__(
        self, data: bytes, beside: Beside, file_name: str, sentencepiece: SentencePieceTokenizer | None = None
    ) -> None:  # fmt: skip
        """Raises MixtralError when the file is damaged, of another kind, or without beginning and end tokens."""
        document = parse_vocabulary(data, file_name)
        check_post_processor(document.get("post_processor"), file_name)
        self._file_name = file_name
        self._fast = _guarded(lambda: FastTokenizer.from_str(data.decode()), file_name)
        decoder = JsonDecoder.read(document, file_name)
        _check_ids(document, self._fast, file_name)
        grown = _add(self._fast, beside.added(), {token.content for token in beside.named()})
        grown = _add_special(self._fast, beside.special()) or grown
        vocab = self._fast.get_vocab(with_added_tokens=True)
        bos_id, eos_id = (_special_id(role, beside, vocab, file_name) for role in USUAL_NAMES)
        self.texts = {i: text for text, i in vocab.items()}
        self._add_named(document, {bos_id, eos_id}, vocab)
        self._data = self._fast.to_str().encode() if grown else data
        self._set_up()
        added = self._fast.get_added_tokens_decoder()
        special = {i: token.content for i, token in added.items() if token.special}
        control = {i: text for i, text in special.items() if not decoder.is_byte(text)}
        pieces = [b""] * (max(self.texts) + 1)
        for i, text in self.texts.items():
            if i not in control:
                plain = i in added and not decoder.is_byte(text)
                pieces[i] = text.encode() if plain else decoder.piece(text)
        self.sentencepiece = sentencepiece if sentencepiece and self._agrees(sentencepiece) else None
        version = self.sentencepiece.version if self.sentencepiece else "json"
        super().__init__(version, pieces, control, bos_id, eos_id, dummy_prefix=False)
        self._beside, self.side_files = beside, beside.files
        self.whole = frozenset(i for i, token in added.items() if i not in control and not token.normalized)
        self._find_frame()
        self.openers = frozenset(i for i in added if i not in control and self._opens(i))

    def _set_up(self) -> None:
        """What the library neither keeps in the file nor pickles."""
        self._fast.encode_special_tokens = True  # "[INST]" typed in a text stays text
        self._fast.no_truncation()
        self._fast.no_padding()

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._set_up()

    def _add_named(self, document: dict[str, Any], ids: set[int], vocab: dict[str, int]) -> None:
        """Beginning, end and unknown are special even where the file has them among the ordinary tokens."""
        if isinstance(name := document["model"].get("unk_token"), str) and (unknown := vocab.get(name)) is not None:
            ids = {*ids, unknown}
        named = [self.texts[i] for i in sorted(ids - self._fast.get_added_tokens_decoder().keys())]
        self._fast.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in named])

    def _agrees(self, spm: SentencePieceTokenizer) -> bool:
        """Whether a sentencepiece model has the same token for each of its ids."""
        agrees = all(self.texts.get(i) == piece.text for i, piece in enumerate(spm.spm.pieces))
        if not agrees:
            log.warning("%s holds another vocabulary than the tokenizer.json beside it, and is not used", spm.file_name)
        return agrees

    def _find_frame(self) -> None:
        """What the post-processor puts around a text, and whether the encoder begins it with a space."""
        file_name = self._file_name
        encoded = {text: self._encode(text) for text in _PROBES}
        text, ids = next((item for item in encoded.items() if item[1]), ("", []))
        framed: list[int] = _guarded(partial(self._fast.encode, text), file_name).ids
        starts = [k for k in range(len(framed) - len(ids) + 1) if framed[k : k + len(ids)] == ids]
        if not starts or not all(0 <= i < self.vocab_size for i in framed):
            raise MixtralError(f"{file_name}: post_processor: turns the tokens {shown(ids)} into {shown(framed)}; "
                               "one that puts known tokens before and after a text is wanted")
        self.prefix, self.suffix = tuple(framed[: starts[-1]]), tuple(framed[starts[-1] + len(ids) :])
        self._as_read = self.prefix, self.suffix
        self.dummy_prefix = b"".join(map(self.token_bytes, ids)).startswith(b" ")

    def _opens(self, token_id: int) -> bool:
        """Whether the text after an added token begins with a space that was not in it."""
        for after in ("a", "."):  # the latter for a token that is found as a whole word alone
            first, *rest = [*self._encode(self.texts[token_id] + after), -1]
            if first == token_id and b"".join(map(self.token_bytes, rest[:-1])).startswith(b" "):
                return True
        return False

    def _encode(self, text: str) -> list[int]:
        encode = partial(self._fast.encode, text, add_special_tokens=False)
        return _guarded(encode, self._file_name, _NOT_ENCODED).ids

    def _encode_batch(self, texts: list[str]) -> list[list[int]]:
        encode = partial(self._fast.encode_batch_fast, texts, add_special_tokens=False)
        return [encoding.ids for encoding in _guarded(encode, self._file_name, _NOT_ENCODED)]

    def _files(self) -> dict[str, bytes]:
        spm = self.sentencepiece
        return self.json_files() if spm is None else {**self.json_files(), spm.file_name: spm.data}

    def json_files(self) -> dict[str, bytes]:
        """The files that transformers needs, by name."""
        names = {"bos_token": self.texts[self.bos_id], "eos_token": self.texts[self.eos_id]}
        config = {"tokenizer_class": "PreTrainedTokenizerFast", **self._beside.config, **names}
        return {"tokenizer.json": self.to_json(), "tokenizer_config.json": json.dumps(config, indent=1).encode()}

    def to_json(self) -> bytes:
        """The file, with the tokens that the files beside it added, and with what is put around a text by now."""
        if (self.prefix, self.suffix) == self._as_read:
            return self._data
        post_processor = template(self.texts, self.prefix, self.suffix)
        document = json.loads(self._data) | {"post_processor": post_processor}
        return json.dumps(document, ensure_ascii=False).encode()

    @property
    def mistral(self) -> MistralTokenizer[Any, Any, Any, Any, Any] | None:
        return self.sentencepiece.mistral if self.sentencepiece else None


def _guarded(call: Callable[[], T], file_name: str, what: str = "damaged or not a tokenizer.json") -> T:
    """What a call into the library gives; it raises bare Exception, and panics with what is not even that."""
    try:
        return call()
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise MixtralError(f"{file_name}: {what}: {str(error)[:80]}") from None


def _check_ids(document: dict[str, Any], fast: FastTokenizer, file_name: str) -> None:
    """Refuse ids that no vocabulary has, and added tokens for which the library does not keep the id of the file."""
    vocab = fast.get_vocab(with_added_tokens=False)
    text = max(vocab, key=vocab.__getitem__, default="")
    if vocab and vocab[text] >= MOST_TOKENS:
        raise MixtralError(f"{file_name}: model.vocab: {shown(text)} has the id {vocab[text]}; "
                           f"ids below {MOST_TOKENS:,} are read")
    for number, token in enumerate(document.get("added_tokens") or []):
        if (known := fast.token_to_id(token["content"])) != token["id"]:
            raise MixtralError(f"{file_name}: added_tokens[{number}]: {shown(token['content'])} has the id "
                               f"{shown(token['id'])}, where the vocabulary goes on with {known}")


def _add(fast: FastTokenizer, tokens: list[Added], special: set[str]) -> bool:
    """Add tokens, as transformers does: the files beside decide the flags. -> whether new ids came of it."""
    there = {token.content: token for token in fast.get_added_tokens_decoder().values()}
    tokens = [token for token in tokens if not _same(there.get(token.content), token)]
    new = [token for token in tokens if fast.token_to_id(token.content) is None]
    flags = [{**token.flags, "special": token.flags["special"] or token.content in special} for token in tokens]
    # all at once: with each call the library builds its search for all of them again
    fast.add_tokens([AddedToken(token.content, **of) for token, of in zip(tokens, flags, strict=True)])
    for token in new:
        if (given := fast.token_to_id(token.content)) != token.id:
            raise MixtralError(f"{token.key}: has the id {token.id}, where the vocabulary goes on with {given}")
    return bool(new)


def _same(known: AddedToken | None, token: Added) -> bool:
    return known is not None and all(getattr(known, flag) == set_to for flag, set_to in token.flags.items())


def _add_special(fast: FastTokenizer, tokens: list[Special]) -> bool:
    """Add the named tokens that are not added yet, after all others. -> whether new ids came of it."""
    there = {token.content for token in fast.get_added_tokens_decoder().values()}
    new = {token.content: token.flags for token in tokens if token.content not in there}
    grown = any(fast.token_to_id(content) is None for content in new)
    fast.add_tokens([AddedToken(content, **flags) for content, flags in new.items()])
    return grown


def _special_id(role: str, beside: Beside, vocab: dict[str, int], file_name: str) -> int:
    named = beside.name(role)
    names = USUAL_NAMES[role] if named is None else (named,)
    for name in names:
        if name in vocab:
            return vocab[name]
    raise MixtralError(f"{file_name}: no {role}: none of {', '.join(names)} is in the vocabulary; "
                       f'name it in tokenizer_config.json beside it: "{role}": "..."')
