"""Tokenise sources once into a folder of shards; interrupted, it goes on where it stopped.

The documents are read in order by one process, which also finds duplicates and holds out the validation part; only
tokenising is spread over workers, so the shards are the same for any number of them.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mixtral.data.readers import BadInput
from mixtral.data.sources import Source, check_weights, documents, text_digest
from mixtral.data.store import FORMAT, Encoder, Index, Shard, TokenData, is_shard_file
from mixtral.data.writer import Item, Progress, ShardWriter, encoder
from mixtral.errors import DataError, UsageError
from mixtral.files import atomic_write
from mixtral.json_files import LARGE, read_object

SHARD_BYTES = 16 << 20  # of text


def prepare(
    sources: Sequence[Source],
    tokenizer: Encoder,
    folder: Path,
    *,
    val_share: float = 0.02,
    seed: int = 0,
    skip_bad: bool = False,
    workers: int = 1,
    progress: Callable[[Progress], None] | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> TokenData:
    """Tokenise `sources` into `folder` and open it; a folder that was made from the same inputs is only opened.

    `val_share` of the documents is held out, chosen by `seed` and the text alone: a text stays on its side whatever
    else the corpus holds. When none falls into the share, the one nearest to it is held out.
    Raises DataError for bad input (unless `skip_bad`, which counts it) and for a corpus without text; UsageError for
    arguments out of range, and when the folder holds an index.json of something else.
    """
    if not sources:
        raise UsageError("data: no source given; name at least one, e.g. stdlib")
    if not 0 <= val_share < 1:
        raise UsageError(f"data: val_share must lie in [0, 1), not {val_share}")
    if workers < 1:
        raise UsageError(f"data: workers must be at least 1, not {workers}")
    _check_index(folder / "index.json")
    check_weights(sources)
    weights = [source.weight for source in sources]
    inputs = {
        "sources": [source.inputs() for source in sources],
        "tokenizer": tokenizer.fingerprint,
        "val_share": val_share,
        "seed": seed,
        "skip_bad": skip_bad,
        "shard_bytes": shard_bytes,
        "format": FORMAT,
    }
    if not _reusable(folder, inputs, weights):
        reading = _Reading(sources, val_share, seed, BadInput(skip_bad))
        with encoder(tokenizer, workers) as encode:
            writer = ShardWriter(folder, tokenizer, encode, shard_bytes, progress or (lambda _: None))
            shards = writer.write(reading.items())
        if not shards["train"]:
            names = ", ".join(source.name for source in sources)
            raise DataError(f"{names}: no text to train on ({reading.bad.count} inputs skipped); give more text")
        index = Index(inputs, weights, list(reading.domains), shards, reading.bad.count, reading.duplicates)
        atomic_write(folder / "index.json", index.to_json().encode())
        _remove_strangers(folder, shards)
    return TokenData(folder, tokenizer)


def _check_index(path: Path) -> None:
    """Raise UsageError when there is an index.json that no version of this program wrote: it would be overwritten."""
    if not os.path.lexists(path):
        return
    try:
        ours = {"format", "inputs", "shards"} <= read_object(path, DataError, LARGE).keys()
    except DataError:
        ours = False
    if not ours:
        raise UsageError(f"{path}: not an index of prepared data; remove it, or name another folder")


def _reusable(folder: Path, inputs: dict[str, Any], weights: list[float | None]) -> bool:
    """Whether the folder holds whole shards of these inputs; weights are no part of them and are brought up to date."""
    try:
        index = Index.read(folder)
        for shard in (shard for shards in index.shards.values() for shard in shards):
            shard.check(folder, contents=False)
    except DataError:
        return False
    if index.inputs != inputs:
        return False
    if index.weights != weights:
        atomic_write(folder / "index.json", replace(index, weights=weights).to_json().encode())
    return True


class _Reading:
    """One pass over the sources: numbers domains, drops repeated texts, and chooses what is held out."""

    def __init__(self, sources: Sequence[Source], val_share: float, seed: int, bad: BadInput) -> None:
        self.sources = sources
        self.val_share = val_share
        self.salt = f"split {seed}".encode()
        self.bad = bad
        self.domains: dict[str, int] = {}
        self.duplicates = 0

    def items(self) -> Iterator[tuple[str, Item]]:
        """(split, document), in order; at least one of two documents is held out unless `val_share` is 0."""
        nearest: tuple[float, Item] | None = None  # kept back while no document has fallen into the share
        held_out = self.val_share == 0
        trained = False
        for item in self._unique():
            place = self._place(item)
            if place < self.val_share:
                held_out = True
                yield "val", item
                continue
            released: Item | None = item
            if not held_out and (nearest is None or place < nearest[0]):
                released = nearest[1] if nearest else None
                nearest = place, item
            if released:
                trained = True
                yield "train", released
        if nearest:
            yield "train" if held_out or not trained else "val", nearest[1]

    def _unique(self) -> Iterator[Item]:
        seen: set[bytes] = set()
        for number, source in enumerate(self.sources):
            for document in documents(source, self.bad):
                digest = text_digest(document.text)
                if digest in seen:
                    self.duplicates += 1
                    continue
                seen.add(digest)
                domain = self.domains.setdefault(document.domain, len(self.domains))
                yield Item(document.text, len(document.text.encode()), digest, number, domain)

    def _place(self, item: Item) -> float:
        """In [0, 1): below `val_share` a document is held out."""
        return int.from_bytes(hashlib.blake2b(item.digest, key=self.salt, digest_size=6).digest(), "big") / 2**48


def _remove_strangers(folder: Path, shards: dict[str, list[Shard]]) -> None:
    """Delete shards of earlier preparations; nothing that is no shard is touched, whatever its name."""
    ours = {shard.name for split in shards.values() for shard in split}
    for path in folder.iterdir():
        match = re.fullmatch(r"((?:train|val)-\d{5}-[0-9a-f]{12})(?:\.json|(?:\.docs)?\.npy)", path.name)
        if match and match[1] not in ours and is_shard_file(path):
            path.unlink()
