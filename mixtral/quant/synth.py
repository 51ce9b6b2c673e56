"""Random models of a real shape, written tensor by tensor: what a size costs can be tried without its weights.

Quantised weights are random bits with one scale, so that writing is as fast as the disk. The others are bf16 of one
magnitude: random sign and fraction, and the exponent that brings them near the usual spread. Norms are ones.
"""

from __future__ import annotations

import math
import shutil
import zlib
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mixtral.config import ModelConfig
from mixtral.errors import MixtralError, UsageError, did_you_mean
from mixtral.files import atomic_folder
from mixtral.kernels.packing import GROUP_BYTES, LANES
from mixtral.quant.formats import QuantFormat
from mixtral.quant.load import open_packed
from mixtral.quant.quantize import write_quantised_config
from mixtral.quant.scheme import BITS, PACKED, QuantScheme, stored_shapes
from mixtral.weights.lazy_state import LazyState
from mixtral.weights.load import StateReader
from mixtral.weights.names import parameter_shapes
from mixtral.weights.progress import Progress, counter
from mixtral.weights.safetensors_file import Entry, write_safetensors
from mixtral.weights.save import check_free, write_hf
from mixtral.weights.shards import PACKED_FILE

_SCALES = 2 * LANES  # bytes at the end of each group: an fp16 scale for each lane
_SPREAD = (1e-4, 1e4)  # fp16 holds the scales that these give


def write_random(
    config: ModelConfig, dst: str | Path, bits: str, seed: int = 0, progress: Progress | None = None
) -> None:
    """Write a random model to the new folder `dst`: Hugging Face's format at "16", else as `mixtral quantize` does.

    `bits` is "16", or one of a QuantScheme's. Each tensor depends on seed and name alone. Headers and sizes are checked
    afterwards; the folder appears whole or not at all. Raises UsageError for other bits, for a spread that fp16
    scales do not hold, and when `dst` is there and not empty; MixtralError when the disk has too little room.
    """
    if bits not in (choices := ("16", *BITS)):
        raise UsageError(f"bits: unknown choice {bits!r}; {did_you_mean(bits, choices)}")
    if not _SPREAD[0] <= config.init_std <= _SPREAD[1]:
        raise UsageError(f"init_std {config.init_std:g}: random weights have a spread of {_SPREAD[0]} to {_SPREAD[1]}")
    scheme = None if bits == "16" else QuantScheme.of(bits)
    check_free(dst)
    state = _RandomState(config, seed)
    if scheme is None:
        _check_room(Path(dst), config.weight_bytes())
        with atomic_folder(dst) as new:
            write_hf(state, config, new, progress=progress)
            StateReader(new, config)  # raises unless names, shapes and sizes are right
        return
    entries = _entries(state, config, scheme, seed)
    total = sum(entry.nbytes for entry in entries)
    _check_room(Path(dst), total)
    with atomic_folder(dst) as new:
        write_safetensors(new / PACKED_FILE, entries, counter(progress, "writing", total))
        write_quantised_config(config, scheme, new)
        open_packed(new, config, scheme)  # raises likewise


def _check_room(dst: Path, needed: int) -> None:
    """Raise MixtralError unless the disk of `dst` has so many bytes left."""
    folder = next(parent for parent in dst.absolute().parents if parent.is_dir())
    if (free := shutil.disk_usage(folder).free) < needed:
        raise MixtralError(f"{dst}: {needed / 1e9:.1f} GB are needed, and {free / 1e9:.1f} GB are free on its disk")


class _RandomState(LazyState):
    """bf16 weights with the configuration's spread."""

    def __init__(self, config: ModelConfig, seed: int) -> None:
        super().__init__(parameter_shapes(config))
        self._seed = seed
        self._std = config.init_std

    def dtype(self, ours: str) -> torch.dtype:
        del ours
        return torch.bfloat16

    def read(self, ours: str) -> Tensor:
        shape = self.shapes[ours]
        if len(shape) == 1:
            return torch.ones(shape, dtype=torch.bfloat16)
        bits = random_bytes(self._seed, ours, 2 * math.prod(shape)).view(np.uint16)
        exponent = round(math.log2(self._std * math.sqrt(3 / 7)))  # 1 to 2 times 2^e has the mean square 7/3 * 4^e
        bits &= 0x807F  # sign and fraction
        bits |= np.uint16(127 + exponent << 7)
        return torch.from_numpy(bits).view(torch.bfloat16).view(shape)


def _entries(state: _RandomState, config: ModelConfig, scheme: QuantScheme, seed: int) -> list[Entry]:
    entries = []
    for stored, shape in stored_shapes(config, scheme).items():
        fmt = scheme.format(stored.removesuffix(PACKED))
        if fmt is None:
            entries.append(Entry(stored, torch.bfloat16, shape, partial(state.read, stored)))
        else:
            make = partial(_random_packed, fmt, seed, stored, shape, config.init_std)
            entries.append(Entry(stored, torch.uint8, shape, make))
    return entries


def _random_packed(fmt: QuantFormat, seed: int, name: str, shape: tuple[int, ...], std: float) -> Tensor:
    """Whole numbers of equal chance, and the scale that gives them the spread `std` -> uint8 [..., blocks, bytes].

    Of int8's 256 values only 255 are used: 0, which stands for -128, becomes -127. Padding would be filled as well;
    published shapes have none.
    """
    packed = random_bytes(seed, name, math.prod(shape))
    if fmt.name == "int8":
        np.maximum(packed, 1, out=packed)
    numbers = fmt.high - fmt.low + 1
    scale = np.float16(std / math.sqrt((numbers**2 - 1) / 12))
    packed.reshape(-1, GROUP_BYTES[fmt.name])[:, -_SCALES:] = np.full(LANES, scale, dtype="<f2").view(np.uint8)
    return torch.from_numpy(packed).view(shape)


def random_bytes(seed: int, name: str, count: int) -> np.ndarray:
    """uint8 [count], the same for the same seed and name."""
    random = np.random.Generator(np.random.SFC64([seed, zlib.crc32(name.encode())]))
    words = random.integers(0, 2**64 - 1, size=-(-count // 8), dtype=np.uint64, endpoint=True)
    return words.view(np.uint8)[:count]
