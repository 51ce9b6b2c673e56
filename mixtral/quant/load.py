"""A quantised folder as a model: its file is mapped, and the packed weights stay in it until they are touched."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from mixtral.config import ModelConfig
from mixtral.errors import WeightsError
from mixtral.kernels.packing import pack
from mixtral.model import Mixtral
from mixtral.quant.formats import PLAIN, Format
from mixtral.quant.pack import replace_matrices
from mixtral.quant.scheme import PACKED, QuantScheme, stored_shapes
from mixtral.weights.finite import require_range
from mixtral.weights.names import fixed_dtype
from mixtral.weights.safetensors_file import SafetensorsFile
from mixtral.weights.shards import PACKED_FILE


def load_quantised(
    folder: str | Path, config: ModelConfig, scheme: QuantScheme, dtype: torch.dtype | None, device: torch.device | str
) -> Mixtral:
    """The model of a folder that `mixtral quantize` wrote.

    Args:
        dtype: of activations and of what is not quantised; None: the embedding's in the file, bf16.

    Raises WeightsError when the file is damaged, or holds other tensors than configuration and scheme ask for.
    """
    file = open_packed(folder, config, scheme)
    dtype = dtype or file.headers["embedding.weight"].dtype
    assert dtype is not None  # open_packed refused the others
    state = {}
    for name, raw_bytes in file.mapped().items():
        mapped = name.endswith(PACKED) or name == "embedding.weight"  # used as it lies in the file
        tensor = _tensor(file, name, raw_bytes if mapped else raw_bytes.clone())
        wanted = tensor.dtype if mapped else fixed_dtype(name, config) or dtype
        require_range(name, tensor, dtype if name == "embedding.weight" else wanted)
        state[name] = tensor.to(device, wanted)
    embedding = state["embedding.weight"]
    if config.tie_embeddings:
        state["embedding.weight" + PACKED] = pack(state.pop("embedding.weight"), PLAIN[embedding.dtype].name)
    model = empty_quantised(config, scheme, PLAIN[embedding.dtype], dtype)
    model.load_state_dict(state, assign=True)
    return model


def open_packed(folder: str | Path, config: ModelConfig, scheme: QuantScheme) -> SafetensorsFile:
    """The weights of a quantised folder, checked but for their values. Raises WeightsError as `load_quantised` does."""
    file = SafetensorsFile(Path(folder) / PACKED_FILE)
    _check(file, stored_shapes(config, scheme), config)
    return file


def empty_quantised(config: ModelConfig, scheme: QuantScheme, embedding: Format, activations: torch.dtype) -> Mixtral:
    """The model with its quantised modules in place, all on the meta device (replace_matrices)."""
    with torch.device("meta"):
        model = Mixtral(config)
        replace_matrices(model, scheme.format, embedding, activations)
    return model


def _tensor(file: SafetensorsFile, name: str, raw_bytes: Tensor) -> Tensor:
    header = file.headers[name]
    assert header.dtype is not None  # _check refused the others
    if raw_bytes.storage_offset() % header.dtype.itemsize:  # a header of another length than ours
        raw_bytes = raw_bytes.clone()
    return raw_bytes.view(header.dtype).view(header.shape)


def _check(file: SafetensorsFile, shapes: dict[str, tuple[int, ...]], config: ModelConfig) -> None:
    """Raise WeightsError, naming the first tensor that is wrong."""
    for name in sorted(shapes.keys() ^ file.headers.keys()):
        what = "is missing" if name in shapes else "is not a tensor of this model"
        raise WeightsError(f"{file.path}: {name} {what}; config.json and the file do not belong together")
    for name, shape in shapes.items():
        header = file.headers[name]
        if header.shape != shape:
            raise WeightsError(f"{file.path}: {name} is {list(header.shape)}, the config asks for {list(shape)}")
        fixed = fixed_dtype(name, config)
        right = header.dtype == torch.uint8 if name.endswith(PACKED) else _is_weight(header.dtype, fixed)
        if not right:
            raise WeightsError(f"{file.path}: {name} is stored as {header.stored}, which it cannot be")


def _is_weight(stored: torch.dtype | None, fixed: torch.dtype | None) -> bool:
    return stored is not None and (stored == torch.int64 if fixed == torch.int64 else stored.is_floating_point)
