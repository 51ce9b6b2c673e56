"""Finds and reads the tokenizer of a model folder."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from mixtral.errors import MixtralError, UsageError
from mixtral.json_files import LARGE, read_object, read_regular
from mixtral.tokenizer.base import Tokenizer
from mixtral.tokenizer.mistral import SentencePieceTokenizer, TekkenTokenizer
from mixtral.tokenizer.tokenizer_json import JsonTokenizer

WANTED = "tekken.json, *.model.v1 (v2, v3, ...), *.model, tokenizer.json"
_PATTERNS = ("tekken.json", "*.model", "*.model.v*", "tokenizer.json")


def load_tokenizer(path: Path | str) -> Tokenizer:
    """The tokenizer of a model folder, or of one tokenizer file.

    Of several files in a folder the first of these is read: tekken.json, a sentencepiece model that tells its version
    (own.model.v3), one that does not (tokenizer.model), tokenizer.json. Raises UsageError when there is none or the
    choice is not clear, MixtralError when the file is damaged.
    """
    path = Path(path)
    if os.path.isdir(path):
        path = _choose(path)
    if not os.path.isfile(path):
        raise UsageError(f"{path}: no such file or folder; expected a model folder or one of {WANTED}")
    data = read_regular(path, MixtralError, LARGE)
    config = _read_config(path.with_name("tokenizer_config.json"))
    try:
        return _read(path.name, data, config)
    except MixtralError as error:  # the readers know the file by its name alone
        raise type(error)(f"{path.parent}/{error}") from error
    except Exception as error:  # of the libraries below, which check little
        raise MixtralError(f"{path}: damaged: {type(error).__name__}: {error}") from error


def has_tokenizer(folder: Path | str) -> bool:
    """Whether a model folder holds a tokenizer file."""
    return any(any(Path(folder).glob(pattern)) for pattern in _PATTERNS)


def _choose(folder: Path) -> Path:
    """The one file of the folder that is to be read."""
    models = sorted(folder.glob("*.model*"))
    versioned = [p for p in models if p.suffix != ".model"]
    bare = [p for p in models if p.suffix == ".model"]
    for candidates in ([folder / "tekken.json"], versioned, bare, [folder / "tokenizer.json"]):
        found = [p for p in candidates if p.is_file()]
        if len(found) > 1:
            raise UsageError(f"{folder}: several tokenizers ({', '.join(p.name for p in found)}); name one file")
        if found:
            return found[0]
    raise UsageError(f"{folder}: no tokenizer in this folder; looked for {WANTED}")


def _read(name: str, data: bytes, config: dict[str, Any]) -> Tokenizer:
    if name.endswith(".json"):
        return TekkenTokenizer(data, name) if "tekken" in name else JsonTokenizer(data, config, name)
    if ".model" in name:
        return SentencePieceTokenizer(data, name)
    raise UsageError(f"{name}: not the name of a tokenizer file; expected one of {WANTED}")


def _read_config(path: Path) -> dict[str, Any]:
    """tokenizer_config.json, {} when there is none."""
    return read_object(path, MixtralError) if os.path.isfile(path) else {}
