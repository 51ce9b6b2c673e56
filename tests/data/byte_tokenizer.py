"""A tokenizer small enough to check by eye: token = byte + 3. In its own module so that worker processes find it."""

from __future__ import annotations

import os
from collections.abc import Sequence

from mixtral.cores import threads


class ByteTokenizer:
    vocab_size = 259
    bos_id = 1
    eos_id = 2

    def __init__(self, fingerprint: str = "bytes") -> None:
        self.fingerprint = fingerprint
        self.calls = 0

    def encode_batch(self, texts: Sequence[str], bos: bool = True, eos: bool = False) -> list[list[int]]:
        self.calls += 1
        return [[self.bos_id] * bos + [byte + 3 for byte in text.encode()] + [self.eos_id] * eos for text in texts]


class ThreadTeller(ByteTokenizer):
    """A text's tokens are the numbers of threads that the process it is encoded in may use, ours and the library's."""

    def encode_batch(self, texts: Sequence[str], bos: bool = True, eos: bool = False) -> list[list[int]]:
        del bos, eos
        return [[threads(), int(os.environ["RAYON_NUM_THREADS"])] for _ in texts]
