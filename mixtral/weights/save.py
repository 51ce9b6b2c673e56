"""Saving weights in the formats of others: each foreign tensor is read out of ours as its turn to be written comes.

A folder appears whole or not at all, and nothing that exists is overwritten.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mixtral.config.formats import to_hf, to_mistral
from mixtral.config.generation import NAME as GENERATION_CONFIG
from mixtral.config.generation import read_generation_config
from mixtral.config.model import DEFAULT_EOS, ModelConfig
from mixtral.errors import MixtralError, UsageError, WeightsError
from mixtral.files import atomic_folder, check_writable
from mixtral.weights.lazy_state import LazyState
from mixtral.weights.names import Ffn, Format, Slot, fixed_dtype, layouts, output_name, parameter_shapes, slots
from mixtral.weights.progress import Progress, counter
from mixtral.weights.safetensors_file import FLOATS, Entry, write_safetensors

State = Mapping[str, Tensor]


def save_hf(
    state: State,
    config: ModelConfig,
    folder: str | Path,
    dtype: torch.dtype | None = None,
    fused: bool = False,
    shard_bytes: int = 5_000_000_000,
    allow_nonfinite: bool = False,
) -> None:
    """Write `config.json` and safetensors shards of at most `shard_bytes` (a larger tensor gets a shard of its own).

    Expert by expert, which every tool reads, or `fused` as transformers 5 holds them (it reads both). A dtype of None
    keeps each tensor's. Raises UsageError when the folder exists and is not empty, WeightsError when the state is not
    this config's, and for weights that are not finite in the written dtype unless `allow_nonfinite`.
    """
    check_free(folder)
    with atomic_folder(folder) as new:
        write_hf(state, config, new, dtype, fused, shard_bytes, allow_nonfinite=allow_nonfinite)


def save_mistral(
    state: State,
    config: ModelConfig,
    folder: str | Path,
    dtype: torch.dtype | None = None,
    allow_nonfinite: bool = False,
) -> None:
    """Write `params.json` and `consolidated.safetensors`; dtype and errors as for `save_hf`.

    Raises ConfigError too, for a model that is not plain Mistral or Mixtral.
    """
    check_free(folder)
    with atomic_folder(folder) as new:
        write_mistral(state, config, new, dtype, allow_nonfinite=allow_nonfinite)
        write_end_tokens(config, new)


def check_free(folder: str | Path) -> None:
    """Raise UsageError unless a new folder can be put here without overwriting anything; MixtralError when the system
    refuses."""
    folder = Path(folder)
    try:
        taken = folder.exists() and (not folder.is_dir() or any(folder.iterdir()))
    except OSError as error:  # it may not be looked into
        raise MixtralError(f"{folder}: {error.strerror}; a new or empty folder is wanted") from error
    if taken:
        raise UsageError(f"{folder}: exists already; a new or empty folder is wanted")
    check_writable(folder)


def write_hf(
    state: State,
    config: ModelConfig,
    folder: Path,
    dtype: torch.dtype | None = None,
    fused: bool = False,
    shard_bytes: int = 5_000_000_000,
    progress: Progress | None = None,
    allow_nonfinite: bool = False,
) -> None:
    """`save_hf` into a folder that is there; `progress` is called after each tensor."""
    layout: Ffn = "fused" if fused and config.is_sparse else layouts(config, "hf")[0]
    entries = _entries(state, config, "hf", layout, dtype)
    shards = list(_shards(entries, shard_bytes))
    total = sum(entry.nbytes for entry in entries)
    done = counter(progress, "writing", total)
    index: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else "model.safetensors"
        write_safetensors(folder / name, shard, done, allow_nonfinite)
        index |= {entry.name: name for entry in shard}
    if len(shards) > 1:
        _write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": index})
    embedding = dtype or described(state)["embedding.weight"].dtype
    _write_json(folder / "config.json", to_hf(config, str(embedding).removeprefix("torch.")))


def write_mistral(
    state: State,
    config: ModelConfig,
    folder: Path,
    dtype: torch.dtype | None = None,
    progress: Progress | None = None,
    allow_nonfinite: bool = False,
) -> None:
    """`save_mistral` into a folder that is there; `progress` is called after each tensor."""
    params = to_mistral(config)
    entries = _entries(state, config, "mistral", layouts(config, "mistral")[0], dtype)
    done = counter(progress, "writing", sum(entry.nbytes for entry in entries))
    write_safetensors(folder / "consolidated.safetensors", entries, done, allow_nonfinite)
    _write_json(folder / "params.json", params)


def write_end_tokens(config: ModelConfig, folder: Path, assumed: int = DEFAULT_EOS) -> None:
    """Say in generation_config.json what params.json cannot: end tokens other than the one a reader would assume, which
    is the tokenizer's where the folder has one."""
    file, values = folder / GENERATION_CONFIG, read_generation_config(folder)[1]
    if "eos_token_id" not in values and config.eos_ids not in ((), (assumed,)):
        _write_json(file, {**values, "eos_token_id": config.eos_id})


def _entries(state: State, config: ModelConfig, format: Format, ffn: Ffn, dtype: torch.dtype | None) -> list[Entry]:
    """What to write, in the order of the model; a tied output matrix is left out."""
    known = described(state)
    check_state(known, config, dtype)
    found = slots(config, format, ffn)
    if config.tie_embeddings:
        del found[output_name(format)]
    return [
        Entry(name, slot.fixed_dtype or dtype or known[slot.ours].dtype, slot.shape, partial(taken, state, slot))
        for name, slot in found.items()
    ]


def described(state: State) -> dict[str, Tensor]:
    """Tensors that tell shapes and dtypes: those of the state, or stand-ins for what is still to be made."""
    return state.described() if isinstance(state, LazyState) else dict(state)


def taken(state: State, slot: Slot) -> Tensor:
    """A foreign tensor out of ours. The small view is to be cast, not our whole tensor: `reshape` makes one copy."""
    return slot.view(state[slot.ours].detach()).reshape(slot.shape)


def check_state(state: dict[str, Tensor], config: ModelConfig, dtype: torch.dtype | None) -> None:
    """Raise WeightsError, naming the first tensor that is wrong, unless the state is exactly this config's."""
    shapes = parameter_shapes(config)
    for name in shapes.keys() ^ state.keys():
        raise WeightsError(f"state: {name} is {'missing' if name in shapes else 'not a parameter of this config'}")
    for name, shape in shapes.items():
        if tuple(state[name].shape) != shape:
            raise WeightsError(f"state: {name} is {list(state[name].shape)}, the config asks for {list(shape)}")
        if (dtype or state[name].dtype) not in FLOATS and fixed_dtype(name, config) is None:
            raise WeightsError(f"state: {name} as {dtype or state[name].dtype} cannot be saved; give a float dtype")


def _shards(entries: list[Entry], limit: int) -> Iterator[list[Entry]]:
    """Runs of entries that stay within `limit` bytes where they can."""
    shard: list[Entry] = []
    for entry in entries:
        if shard and sum(e.nbytes for e in shard) + entry.nbytes > limit:
            yield shard
            shard = []
        shard.append(entry)
    yield shard


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
