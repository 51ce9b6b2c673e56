"""`mixtral convert`: a model folder of any format to one of a given format, its tokenizer's files along with it."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

from mixtral.config_formats import read_config, to_mistral
from mixtral.errors import UsageError, did_you_mean
from mixtral.files import atomic_folder
from mixtral.weights.load import load_state
from mixtral.weights.progress import Progress
from mixtral.weights.save import check_free, write_hf, write_mistral

_FORMATS = ("hf", "mistral")
_COPIED = (
    *("*.model", "*.model.v*", "tekken.json", "tokenizer*.json", "special_tokens_map.json"),
    *("generation_config.json", "chat_template*"),
)


def convert(
    src: str | Path,
    dst: str | Path,
    to: str,
    dtype: torch.dtype | None = None,
    fused: bool = False,
    progress: Progress | None = None,
) -> None:
    """Write the model in `src` to the new folder `dst` as "hf" or "mistral".

    Args:
        dtype: of the written weights; None keeps each tensor's.
        fused: experts as transformers 5 holds them, one tensor a layer; "hf" alone has that layout.
        progress: called after each tensor that is read, then after each that is written.

    Raises UsageError for an unknown format, a layout that the format has not, a missing source, or a destination that
    is there and not empty; ConfigError and WeightsError as reading does.
    """
    if to not in _FORMATS:
        raise UsageError(f"unknown format {to!r}; {did_you_mean(to, _FORMATS)}")
    if fused and to != "hf":
        raise UsageError(f"format {to!r} has no fused experts; only 'hf' has")
    check_free(dst)
    config = read_config(src)
    if to == "mistral":
        to_mistral(config)  # raises before the weights are read
    state = load_state(src, config, progress=progress)
    with atomic_folder(dst) as new:
        if to == "hf":
            write_hf(state, config, new, dtype, fused, progress=progress)
        else:
            write_mistral(state, config, new, dtype, progress=progress)
        copy_tokenizer(src, new)


def copy_tokenizer(src: str | Path, dst: Path) -> None:
    """Copy what a model folder holds besides configuration and weights: tokenizer, templates, generation defaults."""
    for pattern in _COPIED:
        for file in filter(Path.is_file, Path(src).glob(pattern)):
            shutil.copyfile(file, dst / file.name)
