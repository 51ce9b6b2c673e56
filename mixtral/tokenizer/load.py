"""The door to every tokenizer: of a model folder, of one tokenizer file, of a GGUF file."""

from __future__ import annotations

import logging
import os
from pathlib import Path

from mixtral.errors import MixtralError, UsageError
from mixtral.json_files import LARGE, read_regular
from mixtral.tokenizer.base import Tokenizer
from mixtral.tokenizer.gguf import gguf_tokenizer
from mixtral.tokenizer.mistral import SentencePieceTokenizer, TekkenTokenizer
from mixtral.tokenizer.side_files import Beside, read_side_files
from mixtral.tokenizer.spm_model import Kind
from mixtral.tokenizer.tokenizer_json import JsonTokenizer

log = logging.getLogger(__name__)

WANTED = "tekken.json, *.model.v1 (v2, v3, ...), *.model, tokenizer.json"
_PATTERNS = ("tekken.json", "*.model", "*.model.v*", "tokenizer.json")


def load_tokenizer(path: Path | str) -> Tokenizer:
    """The tokenizer of a model folder, of a GGUF file, or of one tokenizer file, with the files beside it
    (tokenizer/side_files.py).

    Of several files in a folder the first of these decides the ids, as in transformers: tekken.json, tokenizer.json, a
    sentencepiece model whose name has its version (own.model.v3), one that does not (tokenizer.model). A sentencepiece
    model of the same vocabulary beside a tokenizer.json gives the chat formats, and encodes where the tokenizer.json is
    what we would write for it. Raises UsageError when there is none or the choice is not clear, MixtralError when the
    file is damaged.
    """
    path = Path(path)
    if path.suffix == ".gguf":
        if (tokenizer := gguf_tokenizer(path)) is None:
            raise UsageError(f"{path}: no tokenizer that is read from GGUF; a sentencepiece vocabulary is")
        return tokenizer
    folder, spm = path.parent, None
    if os.path.isdir(path):  # not Path's, which raises for names that are too long
        folder, path, spm = path, *_choose(path)
    if not os.path.lexists(path):  # what is no regular file is reported below
        raise UsageError(f"{path}: no such file or folder; expected a model folder or one of {WANTED}")
    data, beside = read_regular(path, MixtralError, LARGE), Beside(read_side_files(folder))
    try:
        return _read(path.name, data, beside, spm)
    except MixtralError as error:  # the readers know the file by its name alone
        raise type(error)(f"{folder}/{error}") from error
    except Exception as error:  # of the libraries below, which check little
        raise MixtralError(f"{path}: damaged: {type(error).__name__}: {error}") from error


def find_tokenizer(path: Path | str) -> Tokenizer | None:
    """The tokenizer of a model folder or GGUF file; None when it holds none that is read. Raises as `load_tokenizer`
    does for one that is damaged."""
    path = Path(path)
    if path.suffix == ".gguf":
        return gguf_tokenizer(path)
    there = any(not file.is_dir() for pattern in _PATTERNS for file in path.glob(pattern))
    return load_tokenizer(path) if there else None


def _choose(folder: Path) -> tuple[Path, Path | None]:
    """The file of the folder that decides the ids, and the sentencepiece model beside a tokenizer.json."""
    models = sorted(path for path in folder.glob("*.model*") if not path.is_dir())
    bare = [path for path in models if path.suffix == ".model"]
    found = [path for path in models if path.suffix != ".model"] or bare
    if os.path.lexists(folder / "tekken.json"):
        return folder / "tekken.json", None
    if len(found) > 1:
        raise UsageError(f"{folder}: several tokenizers ({', '.join(p.name for p in found)}); name one file")
    spm = found[0] if found else None
    if os.path.lexists(folder / "tokenizer.json"):
        return folder / "tokenizer.json", spm
    if spm is None:
        raise UsageError(f"{folder}: no tokenizer in this folder; looked for {WANTED}")
    return spm, None


def _read(name: str, data: bytes, beside: Beside, spm: Path | None) -> Tokenizer:
    if name.endswith(".json"):
        return TekkenTokenizer(data, name, beside) if "tekken" in name else _with_spm(data, beside, name, spm)
    if ".model" not in name:
        raise UsageError(f"{name}: not the name of a tokenizer file; expected one of {WANTED}")
    return _bare(SentencePieceTokenizer(data, name, beside), beside)


def _with_spm(data: bytes, beside: Beside, name: str, path: Path | None) -> Tokenizer:
    """The tokenizer of a tokenizer.json; of the sentencepiece model beside it, where that is sure to be the same."""
    if path is None:
        return JsonTokenizer(data, beside, name)
    try:
        spm = SentencePieceTokenizer(read_regular(path, MixtralError, LARGE), path.name)
    except MixtralError as error:  # the ids do not need it
        log.warning("%s: not used beside tokenizer.json: %s", path, error)
        return JsonTokenizer(data, beside, name)
    ours = data.startswith(b'{"version": "1.0", "trunc')  # all in one line; to_json takes longer to tell
    if ours and _says_all(spm, beside) and data == spm.to_json():
        return spm.with_files(beside)
    return JsonTokenizer(data, beside, name, spm)


def _bare(spm: SentencePieceTokenizer, beside: Beside) -> Tokenizer:
    """The tokenizer of a sentencepiece model; a tokenizer.json of both where the files beside it say more."""
    return spm if _says_all(spm, beside) else JsonTokenizer(spm.to_json(), beside, "tokenizer.json", spm)


def _says_all(spm: SentencePieceTokenizer, beside: Beside) -> bool:
    """Whether the files beside a sentencepiece model add and name no token that it lacks or calls otherwise."""
    special = {piece.text: piece.kind in (Kind.CONTROL, Kind.UNKNOWN) for piece in spm.spm.pieces}
    named = {"bos_token": spm.control[spm.bos_id], "eos_token": spm.control[spm.eos_id]}
    return (
        all(special.get(token.content) == token.flags["special"] for token in beside.added())
        and all(special.get(token.content) for token in beside.special())
        and all(beside.name(role) in (None, name) for role, name in named.items())
    )
