"""Where training text comes from: one line names a source, one function streams its documents.

A source is written `NAME[?option=value&...][=WEIGHT]`, NAME one of

    stdlib[:PART]         the standard library's own sources, and the language reference that Python carries; the first
                          alone is `stdlib:code`, the second `stdlib:prose`; `stdlib:tests`: its own tests
    packages[:NAMES]      the sources of the installed packages; NAMES: of these alone, as they are imported, with `+`
                          between them, such as `numpy+torch`
    reasoning-gym[:PART]  generated tasks with their answers (an extra); PART: categories, such as `arithmetic` or
                          `logic`, and names of generators, such as `chain_sum`, with `+` between them
    debian                texts of installed Debian packages
    hf:NAME[:CONFIG]      the train split of a dataset of the `datasets` library (an extra), by name or saved folder
    PATH                  a text, JSON lines or Parquet file, or a folder of them

with the options `field` (JSON lines, Parquet, hf: where the text is), `max_bytes` (read no more than this), `seed` and
`level` (reasoning-gym: which tasks, and how hard, from 0 on, in place of the library's defaults) and `domain` (one name
for all its documents, in place of each one's own). The order of documents depends on names and contents alone.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple
from urllib.parse import parse_qsl

from mixtral.data.corpora import check_name, fingerprint, texts
from mixtral.data.readers import BadInput
from mixtral.errors import UsageError, did_you_mean

_WEIGHT = re.compile(r"(.+)=((?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?)", re.IGNORECASE)
_OPTIONS = {"field": str, "max_bytes": int, "seed": int, "level": int, "domain": str}
REASONING_GYM_BYTES = 4_000_000  # the generators never end: what is read without max_bytes


class Document(NamedTuple):
    """One text. Its domain groups texts for analysis: "code" or "prose", a language, a folder, a data set."""

    text: str
    source: str
    domain: str


@dataclass(frozen=True)
class Source:
    """One source of documents; see the top of this file for `name`.

    `weight` is the share of an epoch's tokens that this source gets, relative to the other sources' weights. With no
    weights at all, every document is seen once an epoch. (`data/loader.py` states the rule in full.)
    """

    name: str
    weight: float | None = None
    field: str = "text"
    max_bytes: int | None = None  # stop after the document that reaches this many bytes of text
    seed: int = 0
    level: int | None = None  # of the difficulty of generated tasks; None: the library's defaults
    domain: str | None = None  # of all its documents; None: each has its own

    def __post_init__(self) -> None:
        if not self.name:
            raise UsageError("data source: the name is empty; give a path or one of stdlib, packages, hf:NAME ...")
        if self.weight is not None and not (self.weight > 0 and math.isfinite(self.weight)):
            raise UsageError(f"data source {self.name}: the weight must be a positive number, not {self.weight!r}")
        if self.level is not None and self.level < 0:
            raise UsageError(f"data source {self.name}: level must be 0 or more, not {self.level}")
        if self.max_bytes is not None and self.max_bytes < 1:
            raise UsageError(f"data source {self.name}: max_bytes must be a positive number, not {self.max_bytes}")

    @classmethod
    def parse(cls, spec: str) -> Source:
        """From one line, e.g. `stdlib`, `notes.jsonl?field=body=0.3`, `packages?max_bytes=5000000=1`."""
        name, mark, query = spec.partition("?")
        weight: float | None = None
        # In "?max_bytes=9" the number is the option's value: a weight needs a second "=" after the last "&".
        tail = query.rsplit("&", 1)[-1] if mark else name
        if (found := _WEIGHT.fullmatch(tail)) and (not mark or "=" in found[1]):
            weight = float(found[2])
            spec = spec[: -len(found[2]) - 1]
            name, _, query = spec.partition("?")
        return cls(name, weight, **_options(query, spec))

    def inputs(self) -> dict[str, Any]:
        """What the documents depend on, to tell whether prepared data is still right. The weight is not part of it."""
        values = asdict(self)
        del values["weight"]
        return {**values, "content": fingerprint(self.name)}


def _options(query: str, spec: str) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key, value in parse_qsl(query, keep_blank_values=True):
        if key not in _OPTIONS:
            raise UsageError(f"data source {spec}: unknown option {key!r}; {did_you_mean(key, _OPTIONS)}")
        try:
            values[key] = _OPTIONS[key](value)
        except ValueError:
            raise UsageError(f"data source {spec}: {key} must be a whole number, not {value!r}") from None
    return values


def check_weights(sources: Sequence[Source]) -> None:
    """Raise UsageError when some sources have a weight and others none."""
    weights = [source.weight for source in sources]
    if None in weights and set(weights) != {None}:
        raise UsageError("data: some sources have a weight and some have none; give every one a weight, or none")


def check_sources(specs: Sequence[str]) -> None:
    """Raise what `documents` would of these sources, as far as it can be known without reading a text."""
    sources = [Source.parse(spec) for spec in specs]
    check_weights(sources)
    for source in sources:
        check_name(source.name)


def documents(source: Source, bad: BadInput) -> Iterator[Document]:
    """The non-empty documents of a source, in its fixed order, up to `max_bytes`.

    Raises DataError at a fault unless `bad` skips, UsageError for a missing path or package.
    """
    limit = source.max_bytes or (REASONING_GYM_BYTES if source.name.startswith("reasoning-gym") else math.inf)
    size = 0
    for text, domain in texts(source.name, source.field, source.seed, source.level, bad):
        if not text.strip():
            continue
        yield Document(text, source.name, source.domain or domain)
        size += len(text.encode())
        if size >= limit:
            return


def text_digest(text: str) -> bytes:
    """16 bytes that stand for a text: equal texts are found by it, and the held-out part is chosen by it."""
    return hashlib.blake2b(text.encode(), digest_size=16).digest()
