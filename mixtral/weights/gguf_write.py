"""Writing a GGUF file, tensor by tensor, as llama.cpp's converter lays out Mistral and Mixtral.

Norms and gates are fp32. Of the matrices, "q4_0" keeps embedding and output at 8 bits, and what has rows that are no
multiple of a block of 32 stays bf16.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mixtral.config import ModelConfig
from mixtral.config.generation import NAME as GENERATION_CONFIG
from mixtral.config.generation import to_gguf_sampling
from mixtral.config.gguf import named_end_tokens, to_gguf
from mixtral.errors import UsageError, did_you_mean
from mixtral.files import atomic_file, check_writable
from mixtral.gguf.header import TYPES
from mixtral.gguf.writer import TensorEntry, header_bytes, padding
from mixtral.json_files import parse_object
from mixtral.tokenizer import Tokenizer
from mixtral.tokenizer.gguf import tokenizer_metadata
from mixtral.weights.finite import require_finite
from mixtral.weights.gguf_file import gguf_package
from mixtral.weights.names import Slot, layouts, output_name, slots
from mixtral.weights.progress import Progress, counter
from mixtral.weights.save import State, check_state, described, taken

GGUF_TYPES = ("bf16", "q8_0", "q4_0")
_FILE_TYPES = {"bf16": 32, "q8_0": 7, "q4_0": 2}  # general.file_type, which llama.cpp shows
_SIZES = {known.name: known for known in TYPES.values()}
_CHUNK = 1 << 24  # numbers that are rounded at a time


def write_gguf(
    state: State,
    config: ModelConfig,
    path: str | Path,
    type: str = "bf16",
    tokenizer: Tokenizer | None = None,
    files: Mapping[str, bytes] | None = None,
    progress: Progress | None = None,
    allow_nonfinite: bool = False,
) -> None:
    """Write a model as one GGUF file, whole or not at all.

    Args:
        type: of the matrices: "bf16", "q8_0" (8.5 bits a weight) or "q4_0" (4.5).
        files: the small files of the model's folder: chat templates, generation defaults (tokenizer/side_files.py).
        progress: called after each tensor.
        allow_nonfinite: write weights that are not finite, and blocks whose scale is too large for fp16.

    Raises UsageError for an unknown type, a name that does not end in .gguf, a file that exists, a tokenizer that GGUF
    cannot hold, or where the gguf package is missing, which rounds to q8_0 and q4_0; ConfigError for a model that is
    not plain Mistral or Mixtral; WeightsError when the state is not this config's, and, naming the tensor, for weights
    that are not finite.
    """
    check_target(path, type)
    if type != "bf16":
        gguf_package("writing quantised GGUF")
    metadata = _metadata(config, tokenizer, files or {})
    check_state(described(state), config, torch.float32)
    found = slots(config, "gguf", layouts(config, "gguf")[0])
    if config.tie_embeddings:
        del found[output_name("gguf")]
    stored = {name: _stored(slot, type) for name, slot in found.items()}
    sizes = {name: _nbytes(slot.shape, stored[name]) for name, slot in found.items()}
    done = counter(progress, "writing", sum(sizes.values()))
    metadata = {"general.architecture": "llama", **metadata}
    metadata |= {"general.file_type": _FILE_TYPES[type], "general.quantization_version": 2}
    entries = [TensorEntry(name, stored[name], slot.shape, sizes[name]) for name, slot in found.items()]
    with atomic_file(path) as new, new.open("wb") as file:
        file.write(header_bytes(metadata, entries))
        for name, slot in found.items():
            tensor = taken(state, slot)
            rounded = _rounded(tensor, stored[name])
            if not allow_nonfinite:
                require_finite(name, tensor, _scales(rounded, stored[name]), stored[name], "bf16 holds larger ones")
            file.write(rounded.data)
            file.write(b"\0" * padding(sizes[name]))
            done(sizes[name])


def _metadata(config: ModelConfig, tokenizer: Tokenizer | None, files: Mapping[str, bytes]) -> dict[str, Any]:
    """What the file says besides its tensors. Begin and end of a text are the tokenizer's, where there is one.

    End tokens that the format's keys cannot say are put into the generation_config.json that the file holds.
    """
    shape = to_gguf(config, tokenizer.eos_id if tokenizer else None)
    generation = parse_object(files.get(GENERATION_CONFIG, b"{}"), GENERATION_CONFIG)
    if generation.get("eos_token_id") is None and config.eos_ids and named_end_tokens(shape) != config.eos_ids:
        generation["eos_token_id"] = list(config.eos_ids)
        files = {**files, GENERATION_CONFIG: json.dumps(generation, indent=2).encode()}
    return to_gguf_sampling(generation) | shape | tokenizer_metadata(tokenizer, config.vocab_size, files)


def check_target(path: str | Path, type: str) -> None:
    """Raise UsageError unless a GGUF file of this type can be put here without overwriting anything; MixtralError when
    the system refuses."""
    path = Path(path)
    if type not in GGUF_TYPES:
        raise UsageError(f"unknown GGUF type {type!r}; {did_you_mean(type, GGUF_TYPES)}")
    if path.suffix != ".gguf":
        raise UsageError(f"{path}: GGUF is one file; a name that ends in .gguf is wanted")
    check_writable(path)
    if path.exists():
        raise UsageError(f"{path}: exists already; the name of a new file is wanted")


def _stored(slot: Slot, type: str) -> str:
    """The type of one tensor."""
    if len(slot.shape) == 1 or slot.ours.endswith(".router.weight"):
        return "F32"
    if type == "q4_0" and slot.ours in ("embedding.weight", "output.weight"):
        type = "q8_0"
    return "BF16" if slot.shape[-1] % _SIZES[type.upper()].block else type.upper()


def _nbytes(shape: tuple[int, ...], stored: str) -> int:
    return math.prod(shape) // _SIZES[stored].block * _SIZES[stored].nbytes


def _rounded(tensor: Tensor, stored: str) -> np.ndarray:
    """The bytes of the file, by row [rows, bytes]; fp32 as it is."""
    if stored == "F32":
        return tensor.float().contiguous().numpy()
    rows = tensor.reshape(-1, tensor.shape[-1])
    if stored == "BF16":
        return rows.to(torch.bfloat16).contiguous().view(torch.uint8).numpy()
    gguf = gguf_package("writing quantised GGUF")
    out = np.empty((len(rows), _nbytes((rows.shape[1],), stored)), dtype=np.uint8)
    step = max(1, _CHUNK // rows.shape[1])
    for begin in range(0, len(rows), step):
        part = rows[begin : begin + step].float().contiguous().numpy()
        with np.errstate(all="ignore"):  # what is not finite is reported by `require_finite`, or allowed
            out[begin : begin + step] = gguf.quants.quantize(part, gguf.GGMLQuantizationType[stored])
    return out


def _scales(rounded: np.ndarray, stored: str) -> Tensor:
    """What of a written tensor may not be finite: the numbers themselves, or the fp16 that each block begins with."""
    if stored == "F32":
        return torch.from_numpy(rounded)
    if stored == "BF16":
        return torch.from_numpy(rounded).view(torch.bfloat16)
    blocks = torch.from_numpy(rounded).view(-1, _SIZES[stored].nbytes)
    return blocks[:, :2].contiguous().view(torch.float16)
