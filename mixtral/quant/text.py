"""Text for calibration and comparison: the first tokens of a data source, cut into sequences."""

from __future__ import annotations

from mixtral.data.readers import BadInput
from mixtral.data.sources import Source, documents
from mixtral.errors import DataError
from mixtral.tokenizer import Tokenizer

LENGTH = 512  # tokens of a sequence at most: context enough for what is measured, and attention stays cheap


def read_sequences(spec: str, tokenizer: Tokenizer, limit: int, context: int) -> list[list[int]]:
    """Sequences of at most `LENGTH` and `context` tokens, `limit` tokens in all; no text crosses from one to another.

    Args:
        spec: a data source (data/sources.py): a file, a folder, or the name of a built-in corpus.

    Raises UsageError and DataError as reading a source does, DataError when it holds no text.
    """
    length = min(LENGTH, context)
    sequences: list[list[int]] = []
    for document in documents(Source.parse(spec), BadInput()):
        ids = tokenizer.encode(document.text)[:limit]
        cut = [ids[begin : begin + length] for begin in range(0, len(ids), length)]
        sequences += [sequence for sequence in cut if len(sequence) > 1]  # one token alone predicts nothing
        limit -= len(ids)
        if limit <= 1:
            break
    if not sequences:
        raise DataError(f"{spec}: no text in it; some hundred tokens at least are wanted")
    return sequences
