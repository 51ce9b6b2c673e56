"""The lines of a run's metrics files, written and read back. Loads no torch: `mixtral runs` only reads them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from mixtral.config.specs import check_value
from mixtral.errors import ConfigError, MixtralError, shown
from mixtral.files import open_regular
from mixtral.json_files import parse


def json_line(line: Any) -> str:
    """One line of JSON, which has no NaN: a figure that is not finite, a statistic of a layer perhaps, is null."""
    try:
        return json.dumps(line, allow_nan=False)
    except ValueError:
        return json.dumps(_finite(line))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


# What is read back: key -> type. Other keys may hold anything.
_KINDS: dict[str, Any] = {
    "step": int, "tokens": int, "cross_entropy": float, "layers": list[dict[str, Any]],
    "val_cross_entropy": float, "val_bits_per_byte": float, "val_loads": list[list[float]],
    "tokens_per_second": float, "seconds": float, "share_of_peak": float, "memory_bytes": int,
}  # fmt: skip
_LAYER: dict[str, Any] = {"max_over_mean": float, "gini": float, "dead": int}


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics file; a last line cut off by a kill is left out.

    Raises MixtralError, with the number of the line, for any other that is no JSON object as `MetricsLog` writes it.
    """
    lines = []
    try:
        with open_regular(path) as file:
            for number, text in enumerate(file, start=1):
                try:
                    lines.append(_checked(parse(text)))
                except (ValueError, ConfigError) as error:
                    if text.endswith(b"\n"):
                        raise MixtralError(f"{path}, line {number}: {error}") from None
    except OSError as error:
        raise MixtralError(f"{path}: cannot be read: {error.strerror}") from error
    return lines


def _checked(line: Any) -> dict[str, Any]:
    if not isinstance(line, dict):
        raise ConfigError(f"a JSON object is wanted, not {shown(line)}")
    needed = {"step", "tokens"} if "cross_entropy" in line else {"step"}
    if missing := sorted(needed - line.keys()):
        raise ConfigError(f"missing {', '.join(missing)}")
    for key in line.keys() & _KINDS.keys():
        check_value(key, line[key], _KINDS[key])
    for number, layer in enumerate(line.get("layers", ())):
        for key, kind in _LAYER.items():
            check_value(f"layers[{number}].{key}", layer.get(key), kind)
    return line
