"""`mixtral convert`: a model of any format to a given format, its tokenizer along with it, one tensor at a time."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch

from mixtral.config.formats import read_config, to_mistral
from mixtral.config.generation import read_generation_config
from mixtral.config.model import DEFAULT_EOS, ModelConfig
from mixtral.errors import MixtralError, UsageError, did_you_mean
from mixtral.files import atomic_folder, atomic_write, open_regular
from mixtral.tokenizer import Tokenizer
from mixtral.tokenizer.gguf import side_files
from mixtral.tokenizer.load import find_tokenizer
from mixtral.tokenizer.mistral import SentencePieceTokenizer
from mixtral.tokenizer.tokenizer_json import JsonTokenizer
from mixtral.weights.gguf_write import check_target, write_gguf
from mixtral.weights.load import StateReader
from mixtral.weights.progress import Progress
from mixtral.weights.save import check_free, write_end_tokens, write_hf, write_mistral

_FORMATS = ("hf", "mistral", "gguf")
log = logging.getLogger(__name__)

_VOCABULARIES = ("*.model", "*.model.v*", "tekken.json", "tokenizer.json")


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
    config = with_token_ids(read_config(src), src)
    if to == "mistral":
        to_mistral(config)  # raises before the weights are looked at
    # a weight that is rounded here is rounded once: from what the file holds to what is written
    state = StateReader(src, config, exact=dtype is not None or type in ("q8_0", "q4_0"))
    if to == "gguf":
        write_gguf(
            state, config, dst, type or "bf16", find_tokenizer(src), side_files(src), progress, allow_nonfinite
        )
        return
    with atomic_folder(dst) as new:
        if to == "hf":
            write_hf(state, config, new, dtype, fused, progress=progress, allow_nonfinite=allow_nonfinite)
        else:
            write_mistral(state, config, new, dtype, progress, allow_nonfinite)
        copy_tokenizer(src, new)
        if to == "hf":
            _add_tokenizer_json(new)
        if to == "mistral":
            assumed = with_token_ids(config.replace(eos_id=DEFAULT_EOS), new).eos_ids[0]
            write_end_tokens(config, new, assumed)  # the copied file may name none


def _add_tokenizer_json(folder: Path) -> None:
    """Give a folder the tokenizer.json that transformers needs: a sentencepiece model alone it reads wrongly."""
    tokenizer = None if (folder / "tokenizer.json").exists() else _tokenizer(folder)
    if isinstance(tokenizer, SentencePieceTokenizer | JsonTokenizer):
        for name, content in tokenizer.json_files().items():
            atomic_write(folder / name, content)


def _tokenizer(folder: Path) -> Tokenizer | None:
    """The tokenizer of a folder, unless it has none that is read: its files are copied all the same."""
    try:
        return find_tokenizer(folder)
    except MixtralError as error:
        log.warning("its tokenizer is copied without being read: %s", error)
        return None


def with_token_ids(config: ModelConfig, src: str | Path, tokenizer: Tokenizer | None = None) -> ModelConfig:
    """The configuration with its tokenizer's begin and end, where its own file, params.json, cannot name them."""
    src = Path(src)
    if src.is_file() or (src / "config.json").is_file():
        return config
    if (tokenizer := tokenizer or _tokenizer(src)) is None:
        return config
    ids = {"bos_id": tokenizer.bos_id, "eos_id": tokenizer.eos_id}
    if "eos_token_id" in read_generation_config(src)[1]:  # which `read_config` goes by
        del ids["eos_id"]
    return config.replace(**{name: i for name, i in ids.items() if i < config.vocab_size})


def copy_tokenizer(src: str | Path, dst: Path) -> None:
    """Write what a model holds besides configuration and weights: tokenizer, templates, generation defaults."""
    src = Path(src)
    if src.suffix == ".gguf":
        write_tokenizer(find_tokenizer(src), side_files(src), dst)
        return
    write_tokenizer(None, side_files(src), dst)
    for pattern in _VOCABULARIES:
        for file in src.glob(pattern):
            if not file.is_dir():
                _copy(file, dst / file.name)


def _copy(file: Path, to: Path) -> None:
    """Copy a regular file; MixtralError for what is none, or points nowhere."""
    try:
        with open_regular(file) as source, to.open("wb") as target:
            shutil.copyfileobj(source, target)
    except OSError as error:
        raise MixtralError(f"{file}: cannot be copied: {error.strerror}") from None


def write_tokenizer(tokenizer: Tokenizer | None, files: Mapping[str, bytes], dst: Path) -> None:
    """Write a tokenizer, and those of a model's small files that it does not write itself."""
    if tokenizer is not None:
        tokenizer.save(dst)
    for name, content in files.items():
        if not (dst / name).exists():
            atomic_write(dst / name, content)


def _check(to: str, dtype: torch.dtype | None, fused: bool, type: str | None) -> None:
    if to not in _FORMATS:
        raise UsageError(f"unknown format {to!r}; {did_you_mean(to, _FORMATS)}")
    if fused and to != "hf":
        raise UsageError(f"format {to!r} has no fused experts; only 'hf' has")
    if to == "gguf" and dtype is not None:
        raise UsageError("format 'gguf' takes a type (bf16, q8_0, q4_0) and no dtype")
    if to != "gguf" and type is not None:
        raise UsageError(f"format {to!r} takes a dtype and no type; types are for 'gguf'")
