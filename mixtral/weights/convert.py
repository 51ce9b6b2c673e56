"""`mixtral convert`: a model of any format to a given format, its tokenizer along with it, one tensor at a time."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

from mixtral.config_formats import read_config, to_mistral
from mixtral.errors import UsageError, did_you_mean
from mixtral.files import atomic_folder
from mixtral.weights.gguf_tokenizer import read_template, read_tokenizer
from mixtral.weights.gguf_write import check_target, write_gguf
from mixtral.weights.load import StateReader
from mixtral.weights.progress import Progress
from mixtral.weights.save import check_free, write_hf, write_mistral

_FORMATS = ("hf", "mistral", "gguf")
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
    type: str | None = None,
    allow_nonfinite: bool = False,
) -> None:
    """Write the model in `src`, a folder or a GGUF file, to `dst`: a new folder ("hf", "mistral") or file ("gguf").

    Args:
        dtype: of the written weights; None keeps each tensor's, bf16 for those that GGUF had quantised.
        fused: experts as transformers 5 holds them, one tensor a layer; "hf" alone has that layout.
        progress: called after each tensor that is written.
        type: of the matrices of a GGUF file: "bf16" (None), "q8_0" or "q4_0"; such a file takes no dtype.
        allow_nonfinite: write weights that are NaN or infinite, or become so in the type that is written.

    Raises UsageError for an unknown format, what the format has not, a missing source, or a destination that is there
    and not empty; ConfigError and WeightsError as reading does, WeightsError for weights that would not be finite;
    MixtralError for a damaged tokenizer.
    """
    _check(to, dtype, fused, type)
    if to == "gguf":
        check_target(dst, type or "bf16")
    else:
        check_free(dst)
    config = read_config(src)
    if to == "mistral":
        to_mistral(config)  # raises before the weights are looked at
    state = StateReader(src, config)
    if to == "gguf":
        write_gguf(
            state, config, dst, type or "bf16", read_tokenizer(src), read_template(src), progress, allow_nonfinite
        )
        return
    with atomic_folder(dst) as new:
        if to == "hf":
            write_hf(state, config, new, dtype, fused, progress=progress, allow_nonfinite=allow_nonfinite)
        else:
            write_mistral(state, config, new, dtype, progress, allow_nonfinite)
        copy_tokenizer(src, new)


def copy_tokenizer(src: str | Path, dst: Path) -> None:
    """Write what a model holds besides configuration and weights: tokenizer, templates, generation defaults."""
    src = Path(src)
    if src.suffix == ".gguf":
        if (tokenizer := read_tokenizer(src)) is not None:
            tokenizer.save(dst)
        if (template := read_template(src)) is not None:
            (dst / "chat_template.jinja").write_text(template, encoding="utf-8")
        return
    for pattern in _COPIED:
        for file in filter(Path.is_file, src.glob(pattern)):
            shutil.copyfile(file, dst / file.name)


def _check(to: str, dtype: torch.dtype | None, fused: bool, type: str | None) -> None:
    if to not in _FORMATS:
        raise UsageError(f"unknown format {to!r}; {did_you_mean(to, _FORMATS)}")
    if fused and to != "hf":
        raise UsageError(f"format {to!r} has no fused experts; only 'hf' has")
    if to == "gguf" and dtype is not None:
        raise UsageError("format 'gguf' takes a type (bf16, q8_0, q4_0) and no dtype")
    if to != "gguf" and type is not None:
        raise UsageError(f"format {to!r} takes a dtype and no type; types are for 'gguf'")
