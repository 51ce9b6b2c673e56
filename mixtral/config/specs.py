"""Specs: `NAME?option=value&option=value`, one line that names a thing and sets its options.

Routers and balancing objectives are chosen this way, on the command line and in configuration files alike. A table
maps each name to a frozen dataclass; the options are its fields, with its defaults and its own checks.
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal, TypeVar, get_args, get_origin

from mixtral.errors import ConfigError, did_you_mean, shown
from mixtral.extensions import look_for
from mixtral.json_files import is_broken, parse

T = TypeVar("T")


def parse_spec(text: str, table: Mapping[str, type[T]], what: str) -> T:
    """The dataclass that `text` names, with its options set.

    `what` ("router", say) begins the message of the ConfigError that an unknown name, an unknown option or a value of
    the wrong type raises.
    """
    name, mark, query = text.partition("?")
    look_for(name, table)
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
        value = parse(text.lower().encode())
    except ValueError:
        value = text
    if kind is int and isinstance(value, float) and value.is_integer():
        value = int(value)  # 1e6 steps
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{name}={text}: expected a finite number")
    try:
        return check_value(name, value, kind)
    except ConfigError:
        raise ConfigError(f"{name}={text}: expected {kind.__name__}") from None


_NAMES = {
    int: "a whole number", float: "a number", bool: "true or false", str: "a text", dict: "an object", list: "a list",
    type(None): "null",
}  # fmt: skip
_LONGEST_TEXT = 4096  # characters
_MOST_INTEGER = 1 << 63


def check_value(name: str, value: object, kind: Any) -> Any:
    """`value`, of a JSON document, as a field of type `kind`: a list as a tuple, a whole number as a float.

    Raises ConfigError, which begins with `name`, when it is not of that type, or too large to be held by it.
    """
    origin, inner = get_origin(kind), get_args(kind)
    if kind is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in inner:
            return None
        return check_value(name, value, next(k for k in inner if k is not type(None)))
    if isinstance(kind, type) and dataclasses.is_dataclass(kind) and isinstance(value, dict):
        return kind(**check_fields(name, value, kind))
    if origin is dict and isinstance(value, dict):
        return {key: check_value(f"{name}.{key}", entry, inner[1]) for key, entry in value.items()}
    if origin is list and isinstance(value, list):
        return [check_value(f"{name}[{i}]", entry, inner[0]) for i, entry in enumerate(value)]
    if origin is tuple and isinstance(value, list | tuple):
        kinds = [inner[0]] * len(value) if inner[-1] is Ellipsis else list(inner)
        if len(kinds) != len(value):
            raise ConfigError(f"{name} must be a list of {len(kinds)}, not {shown(value)}")
        return tuple(check_value(f"{name}[{i}]", v, k) for i, (v, k) in enumerate(zip(value, kinds, strict=True)))
    if origin is Literal:
        if not isinstance(value, str) or value not in inner:
            known = did_you_mean(value, inner) if isinstance(value, str) else f"known: {', '.join(inner)}"
            raise ConfigError(f"{name}: unknown choice {shown(value)}; {known}")
        return value
    wanted = {tuple: list}.get(origin, origin or kind)
    wanted = dict if dataclasses.is_dataclass(wanted) else wanted
    if wanted is float and type(value) is int and abs(value) < _MOST_INTEGER:
        value = float(value)
    bound = ""
    if isinstance(value, int) and abs(value) >= _MOST_INTEGER:
        bound = " below 2^63"
    elif isinstance(value, str) and len(value) > _LONGEST_TEXT:
        bound = f" of at most {_LONGEST_TEXT} characters"
    elif is_broken(value):  # a name of a file that is not UTF-8, as Python gives it
        bound = " that is UTF-8"
    if type(value) is not wanted:
        raise ConfigError(f"{name} must be {_NAMES[wanted]}, not {shown(value)}")
    if bound:
        raise ConfigError(f"{name} must be {_NAMES[wanted]}{bound}, not {shown(value)}")
    return value


def check_names(what: str, values: Mapping[str, Any], kind: type) -> None:
    """Raise ConfigError, which begins with `what`, unless the names are fields of a dataclass, and none is missing."""
    fields = {f.name: f for f in dataclasses.fields(kind) if f.init}
    for name in values:
        if name not in fields:
            raise ConfigError(f"{what}: unknown field {shown(name)}; {did_you_mean(name, fields)}")
    needed = {n for n, f in fields.items() if f.default is f.default_factory is dataclasses.MISSING}
    if missing := sorted(needed - values.keys()):
        raise ConfigError(f"{what}: missing {', '.join(missing)}")


def check_fields(what: str, values: Mapping[str, Any], kind: type) -> dict[str, Any]:
    """The values of a dataclass's fields as their types have them; ConfigError as check_names and check_value raise."""
    check_names(what, values, kind)
    types_of = typing.get_type_hints(kind)
    return {name: check_value(f"{what}: {name}", value, types_of[name]) for name, value in values.items()}
