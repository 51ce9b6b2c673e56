"""What a model recommends of its own generation: generation_config.json, or the metadata of a GGUF file.

Three sources, the first that says something counts: what is asked for, what the model recommends, the defaults of
SamplingParams. Python and command line take them alike.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mixtral.config.generation import (
    GGUF_KEY,
    GGUF_KEYS,
    HONOURED,
    KEYS,
    NEUTRAL,
    SAMPLING,
    TOKEN_IDS,
    embedded,
    read_generation_config,
)
from mixtral.config.generation import GGUF_SAMPLING as _GGUF
from mixtral.config.table import warn_once
from mixtral.engine.params import TOKEN_FIELDS, SamplingParams
from mixtral.errors import ConfigError, UsageError, one_line, shown
from mixtral.gguf.header import read_gguf_header


def recommended(path: str | Path) -> dict[str, Any]:
    """What a model folder or GGUF file recommends -> fields of SamplingParams; without a temperature it is greedy.

    What would change the result and is not applied is named in one warning. Raises ConfigError, naming file and key,
    for values that are damaged; WeightsError for a damaged GGUF file.
    """
    path = Path(path)
    if path.suffix != ".gguf":
        return _of_json(*read_generation_config(path))
    metadata = read_gguf_header(path).metadata
    where = f"{path}: {GGUF_KEY}"
    if (values := embedded(metadata, where)) is not None:
        return _of_json(where, values)
    return _of_gguf(path, metadata)


def within_vocabulary(model: Mapping[str, Any], vocab_size: int) -> dict[str, Any]:
    """What a model recommends, without the ids of tokens to be ruled out that lie beyond its vocabulary: they rule out
    nothing, and other tools accept them."""
    found = dict(model)
    for name in TOKEN_FIELDS:
        if name in found:
            kept = tuple(v for v in found[name] if max(v if isinstance(v, tuple) else (v,)) < vocab_size)
            if kept != found[name]:
                warn_once(f"{name} that the model recommends: ids beyond its vocabulary of {vocab_size} are left out")
            found[name] = kept
    return found


def with_recommended(asked: Mapping[str, Any], model: Mapping[str, Any]) -> dict[str, Any]:
    """`asked` and, where it says nothing, what the model recommends.

    A number of new tokens that is asked for also stands in for a recommended number of all tokens, and a number of all
    tokens for that and for the number of new ones that came of it (`recommended`). `stop` may be one string.
    """
    if isinstance(stop := asked.get("stop"), str):
        asked = {**asked, "stop": (stop,)}
    instead = {"max_tokens": "max_length", "min_tokens": "min_length"}
    replaced = {whole for new, whole in instead.items() if new in asked}
    if "max_length" in model and "max_length" in asked:
        replaced |= {"max_length", "max_tokens"}
        asked = ({"max_tokens": asked["max_length"]} if asked["max_length"] is not None else {}) | dict(asked)
    return {name: value for name, value in model.items() if name not in replaced} | dict(asked)


def _of_json(file: Path | str, values: dict[str, Any]) -> dict[str, Any]:
    samples = values.get("do_sample", False)
    if not isinstance(samples, bool):
        raise ConfigError(f"{file}: do_sample must be true or false, not {shown(samples)}")
    _warn(file, {
        "not applied": [f"{key} {shown(v)}" for key, v in values.items() if key in NEUTRAL and v not in NEUTRAL[key]],
        "no effect without do_sample": [
            key for key, neutral in SAMPLING.items() if not samples and values.get(key, neutral) != neutral
        ],
        "unknown": [key for key in values if key not in KEYS],
    })  # fmt: skip
    for key in TOKEN_IDS & values.keys():
        ids = values[key] if isinstance(values[key], list) else [values[key]]
        if not all(type(i) is int for i in ids):
            raise ConfigError(f"{file}: {key} must be a token id or a list of them, not {shown(values[key])}")
    if isinstance(stop := values.get("stop_strings"), str):
        values["stop_strings"] = [stop]
    if "max_new_tokens" in values:
        values.pop("max_length", None)
    if "min_new_tokens" in values:
        values.pop("min_length", None)
    found = {HONOURED[key]: _checked(file, key, HONOURED[key], v) for key, v in values.items() if key in HONOURED}
    if "max_length" in found:
        found["max_tokens"] = found["max_length"]  # no bound of its own on the new ones
    sampling = _sampling(file, values)  # checked even where it has no effect
    return found | (sampling if samples else {})


def _sampling(file: Path | str, values: dict[str, Any]) -> dict[str, Any]:
    stated = {key: values.get(key, otherwise) for key, otherwise in SAMPLING.items()}
    if stated["top_k"] == 0:  # as transformers writes "no such filter"
        stated["top_k"] = None
    neutral = SamplingParams()
    found = {key: _checked(file, key, key, value) for key, value in stated.items()}
    return {key: value for key, value in found.items() if key == "temperature" or value != getattr(neutral, key)}


def _of_gguf(file: Path | str, metadata: dict[str, Any]) -> dict[str, Any]:
    values = {key.removeprefix(_GGUF): value for key, value in metadata.items() if key.startswith(_GGUF)}
    samples = "temp" in values
    _warn(file, {
        "not applied": [f"{_GGUF}{key} {shown(value)}" for key, value in values.items() if key not in GGUF_KEYS],
        f"no effect without {_GGUF}temp": [f"{_GGUF}{key}" for key in values if not samples and key in GGUF_KEYS],
    })  # fmt: skip
    if values.get("top_k") == 0:
        del values["top_k"]
    found = {
        field: _checked(file, f"{_GGUF}{key}", field, values[key]) for key, field in GGUF_KEYS.items() if key in values
    }
    return found if samples else {}


def _checked(file: Path | str, key: str, field: str, value: Any) -> Any:
    """The value as SamplingParams holds it."""
    try:
        return getattr(SamplingParams(**{field: value}), field)
    except UsageError as error:
        raise ConfigError(f"{file}: {str(error).replace(f'sampling: {field}', f'sampling: {key}', 1)}") from None


def _warn(file: Path | str, groups: dict[str, list[str]]) -> None:
    parts = "; ".join(f"{what}: {', '.join(names)}" for what, names in groups.items() if names)
    if parts:
        warn_once(one_line(f"{file}: {parts}"))
