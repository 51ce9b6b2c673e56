"""Writing shards: documents in, tokens and records on disk, with the tokenising spread over processes."""

from __future__ import annotations

import hashlib
import io
import json
import multiprocessing
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mixtral.cores import use_threads
from mixtral.data.store import FORMAT, Encoder, Shard
from mixtral.errors import DataError
from mixtral.files import atomic_write

BATCH_BYTES = 256 << 10  # of text: what a worker is given at a time, and how often progress is reported

Tokens = tuple[np.ndarray, np.ndarray]  # the tokens of a batch end to end, and the length of each document
Encode = Callable[[Iterable[list[str]]], Iterator[Tokens]]


class Progress(NamedTuple):
    """Called while preparing; the total is not known, as sources are streams."""

    documents: int
    text_bytes: int
    tokens: int


class Item(NamedTuple):
    """A document on its way into a shard."""

    text: str
    text_bytes: int
    digest: bytes
    source: int
    domain: int


class ShardWriter:
    """Fills shards with documents and writes each when it is full, or finds it finished by an earlier run."""

    def __init__(
        self,
        folder: Path,
        tokenizer: Encoder,
        encode: Encode,
        shard_bytes: int,
        progress: Callable[[Progress], None],
    ) -> None:
        self.folder = folder
        self.fingerprint = tokenizer.fingerprint
        self.dtype = token_dtype(tokenizer.vocab_size)
        self.encode = encode
        self.shard_bytes = shard_bytes
        self.progress = progress
        self.reported = Progress(0, 0, 0)

    def write(self, items: Iterable[tuple[str, Item]]) -> dict[str, list[Shard]]:
        shards: dict[str, list[Shard]] = {"train": [], "val": []}
        waiting: dict[str, list[Item]] = {"train": [], "val": []}
        sizes = {"train": 0, "val": 0}
        for split, item in items:
            waiting[split].append(item)
            sizes[split] += item.text_bytes
            if sizes[split] >= self.shard_bytes:
                shards[split].append(self._shard(split, len(shards[split]), waiting[split]))
                waiting[split], sizes[split] = [], 0
        for split, rest in waiting.items():
            if rest:
                shards[split].append(self._shard(split, len(shards[split]), rest))
        return shards

    def _shard(self, split: str, number: int, items: list[Item]) -> Shard:
        name = f"{split}-{number:05d}-{self._key(items)}"
        if (finished := self._finished(name)) is not None:
            self._tell(finished.documents, finished.text_bytes, finished.tokens)
            return finished
        tokens, lengths = [], []
        for part, (batch_tokens, batch_lengths) in zip(
            _batches(items), self.encode([item.text for item in part] for part in _batches(items)), strict=True
        ):
            tokens.append(batch_tokens.astype(self.dtype))
            lengths.append(batch_lengths)
            self._tell(len(part), sum(item.text_bytes for item in part), len(batch_tokens))
        origins = np.array([(item.source, item.domain) for item in items], dtype=np.int64)
        table = np.column_stack([np.concatenate(lengths), origins])
        arrays = {f"{name}.npy": np.concatenate(tokens), f"{name}.docs.npy": table}
        files = {file: self._save(file, array) for file, array in arrays.items()}
        text_bytes = sum(item.text_bytes for item in items)
        shard = Shard(name, int(table[:, 0].sum()), len(items), text_bytes, files)
        atomic_write(self.folder / f"{name}.json", json.dumps(asdict(shard)).encode())
        return shard

    def _key(self, items: list[Item]) -> str:
        digest = hashlib.sha256(f"{FORMAT} {self.fingerprint}".encode())
        for item in items:
            digest.update(item.digest + f"{item.source} {item.domain}".encode())
        return digest.hexdigest()[:12]

    def _finished(self, name: str) -> Shard | None:
        """The record of a shard that an earlier run wrote, when its files still have their checksums."""
        try:
            shard = Shard.read(self.folder / f"{name}.json")
            shard.check(self.folder, contents=True)
        except DataError:
            return None
        return shard

    def _save(self, file: str, array: np.ndarray) -> tuple[int, str]:
        buffer = io.BytesIO()
        np.save(buffer, array)
        content = buffer.getvalue()
        atomic_write(self.folder / file, content)
        return len(content), hashlib.sha256(content).hexdigest()

    def _tell(self, documents: int, text_bytes: int, tokens: int) -> None:
        now = self.reported
        self.reported = Progress(now.documents + documents, now.text_bytes + text_bytes, now.tokens + tokens)
        self.progress(self.reported)


def token_dtype(vocab_size: int) -> np.dtype:
    """The smallest of uint16 and uint32 that holds every id."""
    return np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)


def _batches(items: Sequence[Item]) -> Iterator[Sequence[Item]]:
    """Consecutive items with about BATCH_BYTES of text each."""
    first = size = 0
    for number, item in enumerate(items, start=1):
        size += item.text_bytes
        if size >= BATCH_BYTES or number == len(items):
            yield items[first:number]
            first, size = number, 0


def encode_batch(tokenizer: Encoder, texts: Sequence[str]) -> Tokens:
    """The tokens of `texts` end to end, BOS and EOS around each, and their lengths."""
    rows = tokenizer.encode_batch(texts, bos=True, eos=True)
    flat = [np.asarray(row, dtype=np.uint32) for row in rows]
    return np.concatenate(flat), np.array([len(row) for row in rows], dtype=np.int64)


# Set once in each worker process; sent along with every batch, the tokenizer would cost more than the batch.
_worker_tokenizer: Encoder | None = None


def _start_worker(tokenizer: Encoder) -> None:
    global _worker_tokenizer
    use_threads(1)  # there are as many workers as are wanted; each with threads of its own would be too many
    _worker_tokenizer = tokenizer


def _worker_encode(texts: list[str]) -> Tokens:
    assert _worker_tokenizer is not None
    return encode_batch(_worker_tokenizer, texts)


def encoder(tokenizer: Encoder, workers: int) -> AbstractContextManager[Encode]:
    """A function that encodes batches in order, here or in worker processes."""
    if workers == 1:
        return nullcontext(lambda batches: (encode_batch(tokenizer, texts) for texts in batches))
    return _Pool(tokenizer, workers)


class _Pool:
    """Worker processes, started afresh: a fork of a process whose libraries have threads can hang."""

    def __init__(self, tokenizer: Encoder, workers: int) -> None:
        self.pool = ProcessPoolExecutor(
            workers, multiprocessing.get_context("spawn"), initializer=_start_worker, initargs=(tokenizer,)
        )

    def __enter__(self) -> Encode:
        return lambda batches: self.pool.map(_worker_encode, batches)

    def __exit__(self, *_: object) -> None:
        self.pool.shutdown(wait=True, cancel_futures=True)
