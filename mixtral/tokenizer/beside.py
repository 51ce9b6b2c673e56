"""What lies beside a vocabulary: the small files that add tokens, name begin and end, and hold templates and defaults.

They are kept as they are, so that whatever a folder says goes along when the tokenizer is saved; only what encoding
needs is read here. As transformers has it, `added_tokens_decoder` in tokenizer_config.json makes added_tokens.json and
special_tokens_map.json void.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from mixtral.errors import MixtralError, shown
from mixtral.json_files import SMALL, parse, parse_object, read_regular

TEMPLATES = "additional_chat_templates"  # a folder
SIDE_FILES = (
    *("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "generation_config.json"),
    *("chat_template.jinja", "chat_template.json", f"{TEMPLATES}/*.jinja"),
)
FLAGS = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": True, "special": False}
_NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class Added(NamedTuple):
    """A token that is added to a vocabulary."""

    id: int
    content: str
    flags: dict[str, bool]  # those of FLAGS
    key: str  # the file and key that say so


def read_side_files(folder: Path | str) -> dict[str, bytes]:
    """The files of SIDE_FILES in a folder, by their path in it. Raises MixtralError for one that cannot be read."""
    folder = Path(folder)
    templates = folder / TEMPLATES
    if os.path.lexists(templates) and not templates.is_dir():
        raise MixtralError(f"{templates}: must be a folder of templates")
    names = (name for name in SIDE_FILES if "*" not in name)
    found = [file for name in names if os.path.lexists(file := folder / name)]  # a link that points nowhere is told of
    found += sorted(templates.glob("*.jinja"))
    return {file.relative_to(folder).as_posix(): read_regular(file, MixtralError, SMALL) for file in found}


def parse_vocabulary(data: bytes, name: str) -> dict[str, Any]:
    """The JSON object of a large vocabulary file. Raises MixtralError with its name.

    Text and depth are left to the library that reads the same bytes next: looking at every token takes seconds.
    """
    try:
        document = parse(data)
    except ValueError as reason:
        raise MixtralError(f"{name}: {reason}") from None
    if not isinstance(document, dict):
        raise MixtralError(f"{name}: must hold a JSON object, not {shown(document)}")
    return document


def is_side_file(name: str) -> bool:
    """Whether a path inside a folder is one of SIDE_FILES."""
    path = PurePosixPath(name)
    return ".." not in path.parts and any(
        len(path.parts) == len(PurePosixPath(pattern).parts) and path.match(pattern) for pattern in SIDE_FILES
    )


class Beside:
    """The side files of one folder, read as far as a tokenizer needs. Values of a wrong type raise MixtralError."""

    def __init__(self, files: Mapping[str, bytes] | None = None) -> None:
        self.files = dict(files or {})

    @cached_property
    def config(self) -> dict[str, Any]:
        """tokenizer_config.json, {} when there is none."""
        return self._json("tokenizer_config.json")

    def _json(self, name: str) -> dict[str, Any]:
        return parse_object(self.files[name], name, MixtralError) if name in self.files else {}

    def flag(self, key: str) -> bool | None:
        """`add_bos_token` or `add_eos_token`; None when the folder does not say."""
        value = self.config.get(key)
        if value is not None and not isinstance(value, bool):
            raise MixtralError(f"tokenizer_config.json: {key} must be true or false, not {shown(value)}")
        return value

    def name(self, role: str) -> str | None:
        """The token named as `role` (bos_token, eos_token, ...); None when none is."""
        sources = {"tokenizer_config.json": self.config}
        if "added_tokens_decoder" not in self.config:
            sources = {"special_tokens_map.json": self._json("special_tokens_map.json"), **sources}
        for file, values in sources.items():
            value = values.get(role)
            if isinstance(value, dict):
                value = value.get("content")
                role = f"{role}.content"
            if value is not None and not isinstance(value, str):
                raise MixtralError(f"{file}: {role} must be a token's text, not {shown(value)}")
            if value:
                return value
        return None

    def added(self) -> list[Added]:
        """The tokens that these files add, by their ids."""
        if "added_tokens_decoder" in self.config:
            return sorted(self._decoder(self.config["added_tokens_decoder"]), key=lambda token: token.id)
        named = {self.name(role) for role in _NAMED}
        tokens = []
        for content, token_id in self._json("added_tokens.json").items():
            key = f"added_tokens.json: {shown(content)}"
            if type(token_id) is not int or token_id < 0:
                raise MixtralError(f"{key} must have an id of at least 0, not {shown(token_id)}")
            special = content in named
            tokens.append(Added(token_id, content, {**FLAGS, "normalized": not special, "special": special}, key))
        return sorted(tokens, key=lambda token: token.id)

    def _decoder(self, values: object) -> list[Added]:
        where = "tokenizer_config.json: added_tokens_decoder"
        if not isinstance(values, dict):
            raise MixtralError(f"{where} must be an object of tokens by id, not {shown(values)}")
        tokens = []
        for token_id, value in values.items():
            key = f"{where}.{shown(token_id)[1:-1]}"
            if not (token_id.isascii() and token_id.isdigit() and len(token_id) < 12):
                raise MixtralError(f"{key}: its ids must be whole numbers")
            if not isinstance(value, dict) or not isinstance(value.get("content"), str):
                raise MixtralError(f"{key} must be an object with a text as content, not {shown(value)}")
            flags = {flag: value.get(flag, default) for flag, default in FLAGS.items()}
            for flag, set_to in flags.items():
                if not isinstance(set_to, bool):
                    raise MixtralError(f"{key}.{flag} must be true or false, not {shown(set_to)}")
            tokens.append(Added(int(token_id), value["content"], flags, key))
        return tokens
