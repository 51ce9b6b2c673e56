"""Specs: `NAME?option=value&option=value`, one line that names a thing and sets its options.

Routers and balancing objectives are chosen this way, on the command line and in configuration files alike. A table
maps each name to a frozen dataclass; the options are its fields, with its defaults and its own checks.
"""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal, TypeVar, get_args, get_origin

from mixtral.errors import ConfigError, did_you_mean

T = TypeVar("T")


def parse_spec(text: str, table: Mapping[str, type[T]], what: str) -> T:
    """The dataclass that `text` names, with its options set.

    `what` ("router", say) begins the message of the ConfigError that an unknown name, an unknown option or a value of
    the wrong type raises.
    """
    name, mark, query = text.partition("?")
    if name not in table:
        raise ConfigError(f"{what}: unknown {name!r}; {did_you_mean(name, table)}")
    kind = table[name]
    types_of = typing.get_type_hints(kind)
    known = {f.name: types_of[f.name] for f in dataclasses.fields(kind)}  # type: ignore[arg-type]
    values: dict[str, Any] = {}
    for part in query.split("&") if mark else []:
        option, equals, value = part.partition("=")
        if option not in known or not equals:
            options = did_you_mean(option, known) if known else "it has no options"
            raise ConfigError(f"{what} {text}: unknown option {part!r}; {options}")
        values[option] = parse_value(f"{what} {text}: {option}", value, known[option])
    return kind(**values)


def parse_value(name: str, text: str, kind: Any) -> Any:
    """The value of `text` as a field of type `kind`; ConfigError, which begins with `name`, when it is not one."""
    if get_origin(kind) in (typing.Union, types.UnionType):
        if text.lower() in ("none", "null"):
            return None
        kind = next(k for k in get_args(kind) if k is not type(None))
    if get_origin(kind) is tuple:
        inner = get_args(kind)[0]
        return tuple(parse_value(name, part, inner) for part in text.split(",") if text)
    if kind is str or get_origin(kind) is Literal:
        return text
    try:
        value = json.loads(text.lower())
    except ValueError:  # no JSON, or a number of thousands of digits
        value = text
    if kind is int and isinstance(value, float) and value.is_integer():
        value = int(value)  # 1e6 steps
    if type(value) is int and not -(2**63) <= value < 2**63:
        raise ConfigError(f"{name}: {text} is too large; a number of at most 64 bits is wanted")
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if type(value) is not kind:
        raise ConfigError(f"{name}={text}: expected {kind.__name__}")
    return value
