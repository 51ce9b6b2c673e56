"""What lies beside a vocabulary: the small files that add tokens, name begin and end, and hold templates and defaults.

They are kept as they are, so that whatever a folder says goes along when the tokenizer is saved; only what encoding
needs is read here. As transformers has it, `added_tokens_decoder` in tokenizer_config.json makes added_tokens.json and
special_tokens_map.json void.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
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
_MOST_NAME = 200  # bytes of a file's name; file systems have 255, and a file being written has a longer one
_NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_EXTRA, _ADDITIONAL = "extra_special_tokens", "additional_special_tokens"


class Special(NamedTuple):
    """A token that is named for some use; it is special, whatever is said of it elsewhere."""

    content: str
    flags: dict[str, bool]


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
    found = [file for name in names if os.path.lexists(file := folder / name)]  # a link that points nowhere is reported
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
    is_name = all(part != ".." and "\0" not in part and len(part.encode()) <= _MOST_NAME for part in path.parts)
    return is_name and any(
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

    @cached_property
    def _map(self) -> dict[str, Any]:
        """special_tokens_map.json, where it counts."""
        return {} if "added_tokens_decoder" in self.config else self._json("special_tokens_map.json")

    @property
    def _sources(self) -> dict[str, dict[str, Any]]:
        """The files that name tokens, the one that goes first first."""
        return {"special_tokens_map.json": self._map, "tokenizer_config.json": self.config}

    def name(self, role: str) -> str | None:
        """The token named as `role` (bos_token, eos_token, ...); None when none is."""
        return next((named.content for named in self._named(role)), None)

    def _named(self, role: str) -> Iterator[Special]:
        """What each file names as a role, the one that counts first."""
        found = (_special(values.get(role), f"{file}: {role}") for file, values in self._sources.items())
        return (named for named in found if named)

    def special(self) -> list[Special]:
        """The tokens that these files name for some use, in the order in which transformers adds those that are new."""
        return [*self.named(), *self._extra()]

    def named(self) -> list[Special]:
        """Those of a use each: the usual ones, then a model's own (`image_token`)."""
        others = {key: None for values in (self.config, self._map) for key, value in values.items()
                  if key.endswith("_token") and key not in _NAMED and isinstance(value, str | dict)}  # fmt: skip
        own = self.config.get(_EXTRA)
        own = own if isinstance(own, dict) else {}
        tokens = [next(self._named(role), None) for role in (*_NAMED, *others)]
        tokens += [_special(value, f"tokenizer_config.json: {_EXTRA}.{role}") for role, value in own.items()]
        return [token for token in tokens if token]

    def _extra(self, old: bool = True) -> list[Special]:
        """Those of extra_special_tokens, which additional_special_tokens was called before.

        `old`: the latter counts in special_tokens_map.json too, as it does for all but the flags of added_tokens.json.
        """
        extra = self._listed("tokenizer_config.json", _EXTRA) or self._listed("tokenizer_config.json", _ADDITIONAL)
        extra += self._listed("special_tokens_map.json", _EXTRA)
        return extra if extra or not old else self._listed("special_tokens_map.json", _ADDITIONAL)

    def _listed(self, file: str, key: str) -> list[Special]:
        values = self._sources[file].get(key) or []
        if isinstance(values, dict) and key == _EXTRA:
            return []  # a use each
        if not isinstance(values, list):
            raise MixtralError(f"{file}: {key} must be a list of tokens, not {shown(values)}")
        tokens = (_special(value, f"{file}: {key}[{number}]") for number, value in enumerate(values))
        return [token for token in tokens if token]

    def added(self) -> list[Added]:
        """The tokens that these files add, by their ids."""
        if "added_tokens_decoder" in self.config:
            return sorted(self._decoder(self.config["added_tokens_decoder"]), key=lambda token: token.id)
        special_names = {self.name(role) for role in _NAMED} | {token.content for token in self._extra(old=False)}
        tokens = []
        for content, token_id in self._json("added_tokens.json").items():
            key = f"added_tokens.json: {shown(content)}"
            if type(token_id) is not int or token_id < 0:
                raise MixtralError(f"{key} must have an id of at least 0, not {shown(token_id)}")
            special = content in special_names
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
            usual = {**FLAGS, "normalized": not value.get("special", False)}
            tokens.append(Added(int(token_id), value["content"], _flags(value, usual, key), key))
        return tokens


def _special(value: object, key: str) -> Special | None:
    """A token that is named by its text, or by an object with its flags; None for one without a text."""
    flags = value if isinstance(value, dict) else {}
    if isinstance(value, dict):
        value, key = value.get("content"), f"{key}.content"
    if value is not None and not isinstance(value, str):
        raise MixtralError(f"{key} must be a token's text, not {shown(value)}")
    if not value:
        return None
    usual = {**FLAGS, "normalized": False}
    return Special(value, {**_flags(flags, usual, key.removesuffix(".content")), "special": True})


def _flags(values: dict[str, Any], usual: dict[str, bool], key: str) -> dict[str, bool]:
    flags = {flag: values.get(flag, default) for flag, default in usual.items()}
    for flag, set_to in flags.items():
        if not isinstance(set_to, bool):
            raise MixtralError(f"{key}.{flag} must be true or false, not {shown(set_to)}")
    return flags
