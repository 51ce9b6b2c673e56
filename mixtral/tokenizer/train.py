"""Trains an own BPE vocabulary, in the form of Mistral's sentencepiece files."""

from __future__ import annotations

import io
from collections.abc import Iterable

from sentencepiece import SentencePieceTrainer

from mixtral.errors import UsageError
from mixtral.tokenizer.base import Tokenizer, check_text
from mixtral.tokenizer.mistral import SentencePieceTokenizer

# The control tokens that a version's chat format uses, in the order of Mistral's file; <unk>, <s>, </s> come before.
CONTROL = {
    "v1": [],
    "v3": ["[INST]", "[/INST]", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]",
           "[/TOOL_RESULTS]", "[IMG]", "[PREFIX]", "[MIDDLE]", "[SUFFIX]"],
}
LONGEST_LINE = 1 << 14  # characters; longer lines are cut, because the trainer would leave them out


def check_size(vocab_size: int, version: str = "v3") -> None:
    """Raise UsageError when a vocabulary of this size cannot be learnt, whatever the text."""
    smallest = 3 + len(CONTROL[version]) + 256 + 1
    if vocab_size < smallest:
        raise UsageError(f"vocab_size {vocab_size} is too small: bytes and control tokens of {version} need {smallest}")


def train_bpe(texts: Iterable[str], vocab_size: int, version: str = "v3", name: str = "own") -> Tokenizer:
    """Byte-pair encoding learnt from `texts`, line by line; `save` names the file NAME.model.VERSION.

    Raises UsageError for an unknown version, an empty corpus, or a size that the corpus and the fixed tokens
    (3 + control tokens + 256 bytes) do not allow.
    """
    if version not in CONTROL:
        raise UsageError(f"tokenizer version {version!r} cannot be trained; known: {', '.join(CONTROL)}")
    check_size(vocab_size, version)
    lines = _lines(texts)
    if not lines:
        raise UsageError("cannot train a tokenizer: the corpus is empty; give it at least one line of text")
    model = io.BytesIO()
    try:
        SentencePieceTrainer.train(
            sentence_iterator=iter(lines), model_writer=model, vocab_size=vocab_size, model_type="bpe",
            control_symbols=CONTROL[version], pad_id=-1, byte_fallback=True, split_digits=True,
            normalization_rule_name="identity", remove_extra_whitespaces=False, allow_whitespace_only_pieces=True,
            character_coverage=0.99995, max_sentence_length=4 * LONGEST_LINE, minloglevel=2,
            num_threads=1,  # more make BPE no faster, and the number is written into the file: a machine's own there
        )
    except RuntimeError as error:
        reason = str(error).removeprefix("INTERNAL: ").partition("] ")[2].partition("\n")[0] or str(error)
        raise UsageError(f"cannot train a tokenizer of {vocab_size} pieces on this corpus: {reason}") from error
    return SentencePieceTokenizer(model.getvalue(), f"{name}.model.{version}")


def _lines(texts: Iterable[str]) -> list[str]:
    """Lines that are not blank: line ends are byte tokens, as in Mistral's vocabularies."""
    lines = []
    for text in texts:
        check_text(text)
        lines += [line[i : i + LONGEST_LINE] for line in text.split("\n") if line.strip()
                  for i in range(0, len(line), LONGEST_LINE)]
    return lines
