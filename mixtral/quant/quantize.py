"""Quantising a model folder, tensor by tensor: the peak of memory is one of our tensors and what it becomes."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from mixtral.config import ModelConfig
from mixtral.config.formats import read_config, to_hf
from mixtral.errors import WeightsError
from mixtral.files import atomic_folder
from mixtral.quant.formats import QuantFormat, quantise
from mixtral.quant.scheme import PACKED, QuantScheme, stored_shapes, theoretical_bytes
from mixtral.weights.convert import copy_tokenizer, with_token_ids
from mixtral.weights.load import StateReader
from mixtral.weights.progress import Progress, counter
from mixtral.weights.safetensors_file import Entry, write_safetensors
from mixtral.weights.save import check_free
from mixtral.weights.shards import PACKED_FILE


@dataclass(frozen=True)
class Size:
    """Bytes of tensors: as written, as the formats' bits a weight promise, and with 16 bits for all."""

    written: int
    theory: float
    bf16: int


def quantise_folder(
    src: str | Path, dst: str | Path, scheme: QuantScheme, importance: Mapping[str, Tensor] | None = None,
    progress: Progress | None = None, allow_nonfinite: bool = False,
) -> Size:  # fmt: skip
    """Write the model of the folder `src` to the new folder `dst`, quantised; `mixtral.load` reads it with no flag.

    Args:
        importance: by our parameter's name, how much an error in each input's weights counts: [D] for all matrices of
            a stack, or [E, D] for each expert's; [D, D], the mean of x x^T, for a matrix that is in no stack. What is
            not named is rounded with all inputs alike.
        progress: called after each matrix with the bytes that were packed.
        allow_nonfinite: write weights that are not finite; `quantise` says what becomes of them.

    The folder appears whole or not at all. Raises UsageError when `dst` is there and not empty, ConfigError and
    WeightsError as reading does, WeightsError for weights that cannot be quantised.
    """
    check_free(dst)
    config = with_token_ids(read_config(src), src)
    reader = StateReader(src, config, exact=True)
    entries = _entries(reader, config, scheme, importance or {}, progress, allow_nonfinite)
    with atomic_folder(dst) as new:
        write_safetensors(new / PACKED_FILE, entries, allow_nonfinite=allow_nonfinite)
        write_quantised_config(config, scheme, new)
        copy_tokenizer(src, new)
    written = sum(entry.nbytes for entry in entries)
    return Size(written, theoretical_bytes(config, scheme), config.weight_bytes())


def write_quantised_config(config: ModelConfig, scheme: QuantScheme, folder: Path) -> None:
    """config.json with the scheme inside."""
    values = to_hf(config, "bfloat16") | {"quantization_config": scheme.to_dict()}
    (folder / "config.json").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def _entries(
    reader: StateReader, config: ModelConfig, scheme: QuantScheme, importance: Mapping[str, Tensor],
    progress: Progress | None, allow_nonfinite: bool,
) -> list[Entry]:  # fmt: skip
    shapes = stored_shapes(config, scheme)
    total = sum(torch.Size(shape).numel() for name, shape in shapes.items() if name.endswith(PACKED))
    done = counter(progress, "quantising", total)
    entries = []
    for stored, shape in shapes.items():
        name = stored.removesuffix(PACKED)
        fmt = scheme.format(name)
        if fmt is not None:
            make = partial(pack_parameter, reader, name, fmt, shape, importance.get(name), done, allow_nonfinite)
            entries.append(Entry(stored, torch.uint8, shape, make))
        else:
            dtype = torch.bfloat16 if name == "embedding.weight" else reader.dtype(name)
            entries.append(Entry(name, dtype, shape, partial(reader.read, name)))
    return entries


class _Readable(Protocol):
    def read(self, ours: str) -> Tensor: ...


def pack_parameter(
    reader: _Readable, name: str, fmt: QuantFormat, shape: tuple[int, ...], importance: Tensor | None = None,
    done: Callable[[int], object] | None = None, allow_nonfinite: bool = False,
) -> Tensor:  # fmt: skip
    """All matrices of one parameter, packed one after the other -> uint8 [..., blocks, bytes of a block]."""
    w = reader.read(name)
    each = [None] * w[..., 0, 0].numel() if importance is None else for_each_matrix(importance, w.shape)
    packed = torch.empty(shape, dtype=torch.uint8)
    matrices = zip(w.view(-1, *w.shape[-2:]), packed.view(-1, *shape[-2:]), each, strict=True)
    for w_ND, packed_ND, importance_D in matrices:
        try:
            packed_ND.copy_(quantise(w_ND, fmt, importance_D, allow_nonfinite))
        except WeightsError as error:
            raise WeightsError(f"{name}: {error}") from None
        if done is not None:
            done(packed_ND.numel())
    return packed


def for_each_matrix(importance: Tensor, shape: tuple[int, ...]) -> Tensor:
    """[D] or [E, D], for a stack of matrices [E, ..., N, D] -> [matrices, D]; [D, D], for one matrix -> [1, D, D]."""
    *lead, _, d = shape
    *own, _ = importance.shape
    if not lead and own:
        return importance[None]
    ones = [1] * (len(lead) - len(own))
    return importance.view(*own, *ones, d).expand(*lead, d).reshape(-1, d)
