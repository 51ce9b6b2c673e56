"""What the keys of a configuration file mean, as a table, and how ModelConfig is built from keys and table.

Every format of others (config_formats.py, config_gguf.py) is one such table: which key is which field, which values
mean "nothing special" for a key whose other values would change the computation (those are refused), and which keys say
nothing about the computation. A key in no table is reported once.
"""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from mixtral.config.model import FLOATS, ModelConfig, end_tokens
from mixtral.errors import ConfigError, one_line, shown

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class FileFormat:
    """What the keys of one kind of file mean."""

    fields: dict[str, str]  # field of ModelConfig -> key of the file
    theta: tuple[str, ...]  # keys that may hold the rotary base; all that are there must agree
    neutral: dict[str, tuple[object, ...]]  # key -> its values that ask for nothing we lack
    training_only: frozenset[str]  # change training alone; reported when set
    checked: frozenset[str]  # keys that the format's reader holds against others
    harmless: frozenset[str]  # keys, or objects with all that is in them
    closed: tuple[str, ...]  # objects in which an unknown key is refused, since it changes the computation
    aliases: dict[str, str]  # older name -> key
    repeated: dict[str, str]  # key -> the field of ModelConfig that it must equal, where it is there


# Ours alone; not in files of plain models.
RESEARCH = {name: name for name in ("router", "shared_experts", "experts_by_layer", "dense_ffn_dim")}

_REQUIRED = ("vocab_size", "dim", "n_layers", "n_heads", "n_kv_heads", "ffn_dim", "norm_eps")
EXPERTS = ("n_experts", "experts_per_token")
_BOOLS = ("tie_embeddings",)

# What a published shape implies when its file leaves it out. The 7B with a vocabulary of 32000 and no window (v0.2) is
# left out: it differs from a v0.1 with its window switched off in the rotary base alone.
_SHAPE = (
    *("dim", "n_layers", "n_heads", "n_kv_heads", "head_dim"),
    *("ffn_dim", "vocab_size", "n_experts", "sliding_window"),
)
_KNOWN: dict[tuple[int | None, ...], tuple[str, float, int]] = {  # -> name, rope_theta, context
    (4096, 32, 32, 8, 128, 14336, 32000, 1, 4096): ("Mistral 7B v0.1", 1e4, 32768),
    (4096, 32, 32, 8, 128, 14336, 32768, 1, None): ("Mistral 7B v0.3", 1e6, 32768),
    (4096, 32, 32, 8, 128, 14336, 32000, 8, None): ("Mixtral 8x7B v0.1", 1e6, 32768),
    (6144, 56, 48, 8, 128, 16384, 32000, 8, None): ("Mixtral 8x22B v0.1", 1e6, 65536),
    (6144, 56, 48, 8, 128, 16384, 32768, 8, None): ("Mixtral 8x22B v0.3", 1e6, 65536),
}


def build(flat: dict[str, Any], kind: FileFormat, sparse: bool, where: str) -> ModelConfig:
    """From a file's keys and values, which warnings call `where`.

    Raises ConfigError for what is missing, of the wrong type, or not implemented.
    """
    flat = _renamed(flat, kind)
    _refuse(flat, kind, where)
    fields = {ours: flat[key] for ours, key in kind.fields.items() if key in flat and (sparse or ours not in EXPERTS)}
    for ours in _REQUIRED + (EXPERTS if sparse else ()):
        if fields.get(ours) is None:
            raise ConfigError(f"{kind.fields[ours]} is missing")
    for ours, value in fields.items():
        _check_type(kind.fields[ours], ours, value)
    if sparse and fields["n_experts"] == 1:
        raise ConfigError(f"{kind.fields['n_experts']} is 1: a router over one expert is not supported; at least 2 are")
    if fields.get("head_dim") is None:
        fields["head_dim"] = _head_dim(fields["dim"], fields["n_heads"])
    fields["rope_theta"] = _theta(flat, kind)
    fields = {ours: value for ours, value in fields.items() if value is not None or ours in ("bos_id", "eos_id")}
    try:
        config = ModelConfig(**_complete(fields, kind, where))
    except ConfigError as error:
        raise ConfigError(_in_terms_of(kind, str(error))) from None
    for key, ours in kind.repeated.items():
        if flat.get(key) is not None and flat[key] != getattr(config, ours):
            wanted = f"{getattr(config, ours)}, the {ours.replace('_', ' ')}"
            raise ConfigError(f"{key} {shown(flat[key])} is not implemented; only {wanted}, is")
    return config


def _renamed(flat: dict[str, Any], kind: FileFormat) -> dict[str, Any]:
    """With the values of older names under today's. Both may be there and agree."""
    flat = dict(flat)
    for old, new in kind.aliases.items():
        value = flat.pop(old, None)
        if value is not None and flat.setdefault(new, value) != value:
            if flat[new] is not None:
                raise ConfigError(f"{old} {shown(value)} and {new} {shown(flat[new])} contradict each other")
            flat[new] = value
    return flat


def _in_terms_of(kind: FileFormat, message: str) -> str:
    """A message about our fields as one about the keys of the file."""
    keys = {**kind.fields, "rope_theta": kind.theta[0] if len(kind.theta) == 1 else "rope_theta"}
    return re.sub(rf"\b({'|'.join(keys)})\b", lambda field: keys[field[1]], message)


def _refuse(flat: dict[str, Any], kind: FileFormat, where: str) -> None:
    """Raise for what would change the computation, report what is not known to."""
    plain = tuple(f"{key}." for key in (*kind.fields.values(), *kind.theta, *kind.checked))
    closed = (*kind.closed, *(f"{key}." for key in (*kind.neutral, *kind.repeated)))
    for key, value in flat.items():
        if key in kind.neutral and value not in kind.neutral[key]:
            allowed = " or ".join(repr(v) for v in kind.neutral[key])
            raise ConfigError(f"{key} {shown(value)} is not implemented; only {allowed} is")
        if key.startswith(closed) and not is_known(key, kind):
            raise ConfigError(f"{key} is not implemented")
        if key.startswith(plain):
            raise ConfigError(f"{key} is unknown, since {key.rpartition('.')[0]} is no object")
        if key in kind.training_only and value:
            warn_once(f"{where}: {key} {shown(value)} is not applied")
    if unknown := [key for key in flat if not is_known(key, kind)]:
        warn_once(f"{where}: ignored unknown {', '.join(sorted(unknown))}")


def is_known(key: str, kind: FileFormat) -> bool:
    """Whether the table says what a key means."""
    tables = (kind.fields.values(), kind.theta, kind.neutral, kind.training_only, kind.repeated)
    return any(key in table for table in (*tables, kind.checked, kind.harmless)) or key.split(".")[0] in kind.harmless


def _complete(fields: dict[str, Any], kind: FileFormat, where: str) -> dict[str, Any]:
    """Fill in a rotary base and a context that the file left out, for a shape we know, and say so."""
    known = _KNOWN.get(tuple(fields.get(name, 1 if name == "n_experts" else None) for name in _SHAPE))
    if "rope_theta" not in fields:
        if known is None:
            raise ConfigError("rope_theta is missing, and 1e4 and 1e6 are both in use: add the one it was trained with")
        fields["rope_theta"] = known[1]
        warn_once(f"{where} without rope_theta: {known[1]:g} assumed, as the shape is that of {known[0]}")
    if "context" not in fields:
        fields["context"] = known[2] if known else 32768
        why = f"as the shape is that of {known[0]}" if known else "by default"
        warn_once(f"{where} without {kind.fields['context']}: a context of {fields['context']} tokens assumed, {why}")
    return fields


def _theta(flat: dict[str, Any], kind: FileFormat) -> float | None:
    found = {key: flat[key] for key in kind.theta if flat.get(key) is not None}
    for key, value in found.items():
        _check_type(key, "rope_theta", value)
    if len(set(found.values())) > 1:
        raise ConfigError(f"{' and '.join(f'{key} {value}' for key, value in found.items())} contradict each other")
    return float(next(iter(found.values()))) if found else None


def _check_type(key: str, ours: str, value: object) -> None:
    if ours == "eos_id":
        end_tokens(value, key)
        return
    want: Any = int
    name = "an integer"
    if ours in FLOATS:
        want, name = float | int, "a number"
    elif ours in _BOOLS:
        want, name = bool, "true or false"
    elif ours == "router":
        want, name = str, "a text"
    elif ours == "experts_by_layer":
        want, name = list, "a list of integers"
    if value is not None and (not isinstance(value, want) or (isinstance(value, bool) and ours not in _BOOLS)):
        raise ConfigError(f"{key} must be {name}, not {shown(value)}")


def _head_dim(dim: int, n_heads: int) -> int:
    if n_heads < 1 or dim % n_heads:
        raise ConfigError(f"head_dim is missing, and a width of {dim} does not divide into {n_heads} heads")
    return dim // n_heads


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"a": {"b": 1}}` to `{"a.b": 1}`."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        inner = isinstance(value, dict) and value  # an empty object stays one, for it says nothing of its kind
        flat |= flatten(value, f"{prefix}{key}.") if inner else {f"{prefix}{key}": value}
    return flat


@functools.cache
def warn_once(message: str) -> None:
    """Log a remark, the first time that it is made."""
    log.warning("%s", one_line(message))


def written(config: ModelConfig, kind: FileFormat) -> Iterable[tuple[str, str]]:
    """(field, key) of what a file of this model says."""
    left_out = (() if config.is_sparse else EXPERTS) + (tuple(RESEARCH) if config.is_plain else ())
    left_out += ("experts_by_layer",) * config.is_uniform + ("dense_ffn_dim",) * (config.dense_ffn_dim is None)
    return ((ours, key) for ours, key in kind.fields.items() if ours not in left_out)
