"""llama.cpp's programs on our models: its quantised files, and what its llama-perplexity says of them.

llama-perplexity cuts a text into windows that begin with <s> in the place of their first token, and counts the second
half of each; `windows` cuts the same ones, so that models that run here can be measured on the same tokens.
"""

from __future__ import annotations

import contextlib
import math
import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from mixtral.data.store import NO_TARGET
from mixtral.errors import MixtralError
from mixtral.model import Ragged

_STATISTICS = ("Mean PPL(base)", "Mean PPL(Q)", "Mean    KLD", "Same top p")
_TRIES = 4


@dataclass(frozen=True)
class Statistics:
    """What llama-perplexity says of a quantised file; losses in nats a token, KL divergence to the base."""

    base_loss: float
    loss: float
    kl: float
    agreement: float


def run_program(*command: object) -> str:
    """What a program prints. Raises MixtralError with its last line when it fails."""
    try:
        done = subprocess.run([str(part) for part in command], capture_output=True, text=True, errors="replace")
    except OSError as error:
        raise MixtralError(f"{command[0]}: cannot be run: {error.strerror}") from None
    if done.returncode:
        last = (done.stderr.strip() or "no message").splitlines()[-1]
        raise MixtralError(f"{command[0]} failed: {last}")
    return done.stdout


def windows(ids: Sequence[int], context: int, bos_id: int) -> list[tuple[Ragged, Tensor]]:
    """A text's whole windows, each with its targets: of the tokens behind its middle alone.

    Raises MixtralError for less than two windows, as llama-perplexity does.
    """
    if len(ids) < 2 * context:
        raise MixtralError(f"llama-perplexity wants two windows of {context} tokens; the text has {len(ids)}")
    found = []
    for begin in range(0, len(ids) - context + 1, context):
        window = [bos_id, *ids[begin + 1 : begin + context]]
        targets_T = torch.tensor([*window[1:], NO_TARGET])
        targets_T[: context // 2] = NO_TARGET
        found.append((Ragged.of([window]), targets_T))
    return found


def perplexity(
    programs: Path, base: Path, files: Sequence[Path], text: str, context: int, scratch: Path
) -> list[Statistics]:
    """Of each file against `base`, on a text. Raises MixtralError where the program fails."""
    source, logits, program = scratch / "text.txt", scratch / "logits", programs / "llama-perplexity"
    source.write_text(text, encoding="utf-8")
    options = ["--kl-divergence-base", logits, "-c", context, "-b", context, "-t", 1, "--no-warmup"]
    run_program(program, "-m", base, "-f", source, *options)
    return [_statistics(program, "-m", file, "--kl-divergence", *options) for file in files]


def _statistics(*command: object) -> Statistics:
    """On a busy machine the program now and then ends before its log is out; it is then run again."""
    for _ in range(_TRIES - 1):
        with contextlib.suppress(MixtralError):
            return read_statistics(run_program(*command))
    return read_statistics(run_program(*command))


def read_statistics(printed: str) -> Statistics:
    """From what `llama-perplexity --kl-divergence` prints at its end. Raises MixtralError when it is not there."""
    figures = []
    for label in _STATISTICS:
        match = re.search(rf"^{re.escape(label)} *: +(-?[\d.]+)", printed, re.MULTILINE)
        if match is None:
            last = (printed.strip() or "nothing").splitlines()[-1]
            raise MixtralError(f"llama-perplexity: its output has no number for {label!r}, and ends in: {last}")
        figures.append(float(match[1]))
    base, quantised, kl, agreement = figures
    return Statistics(math.log(base), math.log(quantised), kl, agreement / 100)
