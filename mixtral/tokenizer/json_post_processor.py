"""The post-processor of a `tokenizer.json`, checked: the library aborts the thread for one that contradicts itself."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from mixtral.errors import MixtralError, shown


def check_post_processor(document: Any, file_name: str) -> None:
    """Raises MixtralError for a template that names a special token without saying its ids.

    The library looks them up when it encodes, and prints a panic where they are missing. What else is wrong it refuses
    by itself when it reads the file.
    """
    for template in _templates(document):
        known = template.get("special_tokens")
        for key in ("single", "pair"):
            pieces = template.get(key)
            for name in filter(None, map(_special, pieces if isinstance(pieces, list) else ())):
                if not isinstance(known, dict) or name not in known:
                    raise MixtralError(f"{file_name}: post_processor.{key}: {shown(name)} is none of its "
                                       "special_tokens, which must say its ids")


def _templates(document: Any) -> Iterator[dict[str, Any]]:
    """The post-processor, or those of a sequence, that are templates; depth is what the library has read before."""
    waiting = [document]
    while waiting:
        part = waiting.pop()
        if isinstance(part, dict):
            if isinstance(inner := part.get("processors"), list):
                waiting.extend(inner)
            yield part


def _special(piece: Any) -> str | None:
    """The name of a piece that is a special token, None for another."""
    token = piece.get("SpecialToken") if isinstance(piece, dict) else None
    name = token.get("id") if isinstance(token, dict) else None
    return name if isinstance(name, str) else None
