"""Prepared token data on disk: a folder of memory-mapped shards and an index that says what they are.

    index.json                    what went in, which tokenizer, counts, and a record of every shard
    SPLIT-NNNNN-KEY.npy           tokens of whole documents end to end, uint16 or uint32; each is BOS + text + EOS
    SPLIT-NNNNN-KEY.docs.npy      int64 [documents, 3]: tokens, source, domain
    SPLIT-NNNNN-KEY.json          the shard's record, written last: a shard without it is not finished

KEY is a digest of what the shard is made from, so a shard is never overwritten by another one, and the folder's old
content stays whole until index.json is replaced.

Legend: N tokens, M documents.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from mixtral.config.specs import check_value
from mixtral.errors import ConfigError, DataError, shown
from mixtral.json_files import LARGE, read_object

FORMAT = 1  # raised when the layout of the folder changes
_MOST_WEIGHT = 1e30
_REMEDY = "prepare the data again"
NO_TARGET = -100  # torch's cross-entropy ignores this target


class Encoder(Protocol):
    """What the data needs of a tokenizer."""

    vocab_size: int
    bos_id: int
    eos_id: int

    @property
    def fingerprint(self) -> str: ...

    def encode_batch(self, texts: Sequence[str], bos: bool = True, eos: bool = False) -> list[list[int]]: ...


@dataclass(frozen=True)
class Shard:
    """The record of one shard."""

    name: str
    tokens: int
    documents: int
    text_bytes: int
    files: dict[str, tuple[int, str]]  # file name: (bytes, sha256)

    @classmethod
    def read(cls, path: Path) -> Shard:
        """DataError when the file holds no record of a shard."""
        try:
            shard: Shard = check_value("shard", read_object(path, DataError, LARGE), cls)
        except ConfigError as error:
            raise DataError(f"{path}: {error}") from None
        return shard

    def check(self, folder: Path, contents: bool) -> None:
        """DataError unless every file is there in its full size and, with `contents`, with its checksum."""
        if self.files.keys() != {f"{self.name}.npy", f"{self.name}.docs.npy"} or Path(self.name).name != self.name:
            raise DataError(f"{folder}: the files of shard {self.name} are not those that a shard has; {_REMEDY}")
        for name, (size, digest) in self.files.items():
            path = folder / name
            if not os.path.isfile(path):
                raise DataError(f"{path}: a shard of the prepared data is missing; {_REMEDY}")
            if path.stat().st_size != size:
                raise DataError(f"{path}: {path.stat().st_size} bytes instead of {size}; {_REMEDY}")
            if contents and sha256(path) != digest:
                raise DataError(f"{path}: damaged, its checksum differs from the recorded one; {_REMEDY}")


@dataclass(frozen=True)
class Index:
    """What index.json holds."""

    inputs: dict[str, Any]  # everything that the shards depend on; equal inputs, equal shards
    weights: list[float | None]  # of the sources, in order
    domains: list[str]  # in the order in which they came
    shards: dict[str, list[Shard]]  # split: its shards, in order
    skipped: int = 0  # faulty inputs
    duplicates: int = 0  # documents that an earlier one equals
    format: int = field(default=FORMAT)

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1)

    @classmethod
    def read(cls, folder: Path) -> Index:
        """DataError when the folder holds no index that this version understands."""
        path = folder / "index.json"
        if not os.path.isfile(path):
            raise DataError(f"{folder}: no prepared data here (index.json cannot be read)")
        values = read_object(path, DataError, LARGE)
        if values.get("format") != FORMAT:
            raise DataError(f"{path}: format {shown(values.get('format'))}, not {FORMAT}; {_REMEDY}")
        try:
            index: Index = check_value("index", values, cls)
            index._check()
        except ConfigError as error:
            raise DataError(f"{path}: not an index of prepared data ({error}); {_REMEDY}") from error
        return index

    def _check(self) -> None:
        """Raise ConfigError for values that do not fit each other."""
        if self.shards.keys() != {"train", "val"}:
            raise ConfigError(f"shards must be those of train and val, not of {shown(list(self.shards))}")
        check_value("inputs.tokenizer", self.inputs.get("tokenizer"), str)
        sources = check_value("inputs.sources", self.inputs.get("sources"), list[dict[str, Any]])
        for number, source in enumerate(sources):
            check_value(f"inputs.sources[{number}].name", source.get("name"), str)
        if len(self.weights) != len(sources):
            raise ConfigError(f"{len(self.weights)} weights for {len(sources)} sources")
        for weight in self.weights:
            if weight is not None and not 0 < weight < _MOST_WEIGHT:
                raise ConfigError(f"weights must be positive numbers, not {shown(weight)}")


class Documents(NamedTuple):
    """All documents of a split: document m is `shards[shard_M[m]][first_M[m] : first_M[m] + length_M[m]]`."""

    shards: list[np.ndarray]  # memory-mapped tokens
    shard_M: np.ndarray
    first_M: np.ndarray
    length_M: np.ndarray  # tokens, BOS and EOS counted
    source_M: np.ndarray  # index into the sources
    domain_M: np.ndarray  # index into TokenData.domains, -1: unknown

    def tokens(self, document: int) -> np.ndarray:
        first = self.first_M[document]
        tokens: np.ndarray = self.shards[self.shard_M[document]][first : first + self.length_M[document]]
        return tokens


class TokenData:
    """Opened token data. `train` and `val` are its two splits."""

    def __init__(self, folder: Path, tokenizer: Encoder, verify: bool = False) -> None:
        """Open a prepared folder; sizes are checked always, checksums with `verify`.

        Raises DataError for a missing, damaged or incomplete folder, and for one made with another tokenizer.
        """
        self.folder = folder
        self.vocab_size = tokenizer.vocab_size
        self.index = Index.read(folder)
        made_with = self.index.inputs["tokenizer"]
        if made_with != tokenizer.fingerprint:
            raise DataError(
                f"{folder}: prepared with tokenizer {made_with[:12]}, not with this {tokenizer.fingerprint[:12]}; "
                "prepare the data again, or load the tokenizer it was made with"
            )
        for shards in self.index.shards.values():
            for shard in shards:
                shard.check(folder, contents=verify)
        self.train = self._documents("train")
        self.val = self._documents("val")

    @property
    def weights(self) -> list[float | None]:
        return self.index.weights

    @property
    def domains(self) -> list[str]:
        """The domains of the documents of both splits, sorted, whatever order they came in."""
        return sorted(self.index.domains)

    def _documents(self, split: str) -> Documents:
        shards, tables = [], [np.empty((0, 3), np.int64)]
        for record in self.index.shards[split]:
            tokens, table = (_mapped(self.folder / f"{record.name}{suffix}") for suffix in (".npy", ".docs.npy"))
            self._check_shard(record, tokens, table)
            shards.append(tokens)
            tables.append(np.array(table))
        shard_M = np.repeat(np.arange(len(shards)), np.array([len(table) for table in tables[1:]], np.int64))
        first_M = np.concatenate([np.cumsum(table[:, 0]) - table[:, 0] for table in tables])
        length_M, source_M, domain_M = np.concatenate(tables).T
        place = [self.domains.index(name) for name in self.index.domains]
        known_M = (domain_M >= 0) & (domain_M < len(place))
        domain_M = np.array([*place, -1])[np.where(known_M, domain_M, -1)]  # unknown ones find the -1 at the end
        return Documents(shards, shard_M, first_M, length_M, source_M, domain_M)

    def _check_shard(self, record: Shard, tokens: np.ndarray, table: np.ndarray) -> None:
        """DataError unless a shard's arrays are what its record and the index say."""
        sources = len(self.index.weights)
        good = (
            tokens.dtype in (np.uint16, np.uint32) and tokens.shape == (record.tokens,)
            and table.dtype == np.int64 and table.shape == (record.documents, 3)
            and (table[:, 0] > 0).all() and int(table[:, 0].sum()) == record.tokens
            and ((table[:, 1] >= 0) & (table[:, 1] < sources)).all()
        )  # fmt: skip
        if not good:
            raise DataError(f"{self.folder / record.name}.npy: damaged, it is not what the index says; {_REMEDY}")

    def documents(self, split: str) -> Documents:
        """DataError when the split is empty."""
        documents = {"train": self.train, "val": self.val}[split]
        if not len(documents.length_M):
            raise DataError(f"{self.folder}: no {split} documents; give more text, or another share for validation")
        return documents

    def pairs(self, split: str) -> list[tuple[np.ndarray, np.ndarray]]:
        """(inputs_N, targets_N) of each shard of a split: int64, NO_TARGET at the last token of each document."""
        documents = self.documents(split)
        pairs = []
        for number, tokens in enumerate(documents.shards):
            inputs_N = np.asarray(tokens, dtype=np.int64)
            targets_N = np.append(inputs_N[1:], NO_TARGET)
            here = documents.shard_M == number
            targets_N[documents.first_M[here] + documents.length_M[here] - 1] = NO_TARGET
            pairs.append((inputs_N, targets_N))
        return pairs

    def summary(self) -> dict[str, Any]:
        """Counts to show: documents, tokens and bytes of text by split, skipped, duplicates, tokens by source."""
        splits = {
            split: {
                key: sum(getattr(shard, key) for shard in shards) for key in ("documents", "tokens", "text_bytes")
            }
            for split, shards in self.index.shards.items()
        }
        sources = [source["name"] for source in self.index.inputs["sources"]]
        tokens = np.bincount(self.train.source_M, weights=self.train.length_M, minlength=len(sources))
        by_source = [{"source": name, "train_tokens": int(n)} for name, n in zip(sources, tokens, strict=True)]
        counts = {"skipped": self.index.skipped, "duplicates": self.index.duplicates}
        return {**splits, **counts, "sources": by_source}


def is_shard_file(path: Path) -> bool:
    """Whether a file of a shard's name holds what a shard's does: the record of that name, or an array of its kind."""
    if path.is_symlink() or not path.is_file():
        return False
    try:
        if path.suffix == ".json":
            return Shard.read(path).name == path.stem
        array = _mapped(path)
    except DataError:
        return False
    if path.name.endswith(".docs.npy"):
        return array.dtype == np.int64 and array.ndim == 2 and array.shape[1] == 3
    return array.dtype in (np.uint16, np.uint32) and array.ndim == 1


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _mapped(path: Path) -> np.ndarray:
    """An array's file, mapped: nothing is allocated for what its header promises, and no pickle is read."""
    try:
        return np.lib.format.open_memmap(path, mode="r")
    except Exception as error:  # numpy evaluates the header as Python, which may raise anything
        raise DataError(f"{path}: damaged ({type(error).__name__}: {error}); {_REMEDY}") from None
