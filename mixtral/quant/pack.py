"""A model with all its matrices packed as they are, in fp32, fp16 or bf16: how it is held for generation on a CPU.

Legend: E experts, N outputs, D inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mixtral.config import ModelConfig
from mixtral.errors import UsageError
from mixtral.kernels.allocator import giving_back_freed_memory
from mixtral.kernels.packing import LANES, pack, unpack
from mixtral.model import Mixtral
from mixtral.model.embedding import Embedding
from mixtral.model.linear import Linear
from mixtral.moe import Experts, FeedForward
from mixtral.quant.formats import PLAIN, Format
from mixtral.quant.layers import PackedEmbedding, PackedExperts, PackedFeedForward, PackedLinear
from mixtral.quant.scheme import PACKED
from mixtral.weights.finite import require_range
from mixtral.weights.lazy_state import LazyState
from mixtral.weights.names import fixed_dtype, parameter_shapes

_ROWS = 64 * LANES  # of a matrix that are packed at once
ACTIVATIONS = torch.float32  # of a packed model: products sum in fp32, and nothing in between is rounded

_Packed = PackedLinear | PackedEmbedding | PackedExperts | PackedFeedForward


def pack_state(config: ModelConfig, state: Mapping[str, Tensor], dtype: torch.dtype) -> Mixtral:
    """A model whose matrices are packed in `dtype`, one after the other, so that no second copy is ever whole.

    Args:
        state: our parameters and buffers by name, such as a `StateReader`, read one at a time.
        dtype: torch.float32, float16 or bfloat16.

    Raises UsageError for another dtype; WeightsError for a weight that is too large for it.
    """
    with giving_back_freed_memory():
        return _pack_state(config, state, dtype)


def _pack_state(config: ModelConfig, state: Mapping[str, Tensor], dtype: torch.dtype) -> Mixtral:
    model = empty_packed(config, dtype)
    buffers = dict(model.named_buffers())
    plain: dict[str, Tensor] = {}
    for name in state:
        if name + PACKED in buffers:
            empty = torch.empty(buffers[name + PACKED].shape, dtype=torch.uint8)
            plain[name + PACKED] = _pack_into(empty, name, _slices(state, name), dtype)
            continue
        tensor = state[name]
        wanted = fixed_dtype(name, config) or (dtype if name == "embedding.weight" else ACTIVATIONS)
        require_range(name, tensor, wanted)
        plain[name] = tensor.to(wanted).clone() if tensor.dtype == wanted else tensor.to(wanted)
    model.load_state_dict(plain, assign=True)
    return model.eval().requires_grad_(False)


def empty_packed(config: ModelConfig, dtype: torch.dtype) -> Mixtral:
    """The model with packed modules in place, all on the meta device. A tied embedding is packed too."""
    if dtype not in PLAIN:
        raise UsageError(f"packed weights: fp32, fp16 or bf16 is wanted, not {str(dtype).removeprefix('torch.')}")
    with torch.device("meta"):
        model = Mixtral(config)
        replace_matrices(model, dict.fromkeys(parameter_shapes(config), PLAIN[dtype]).get, PLAIN[dtype], ACTIVATIONS)
    return model


def replace_matrices(
    model: Mixtral, format_of: Callable[[str], Format | None], embedding: Format, activations: torch.dtype
) -> None:
    """Put empty packed modules in the place of plain ones.

    Args:
        format_of: the format for a matrix of this name; None: it stays plain.
        embedding: the format of a tied embedding, without scales; others stay plain, to be read row by row.
        activations: the dtype that the embedding's rows take.
    """
    vocab_size, dim = model.embedding.weight.shape
    if model.output is None:
        model.set_submodule("embedding", PackedEmbedding(embedding, vocab_size, dim, activations))
    else:
        model.embedding = Embedding(vocab_size, dim, activations)
    for name, module in list(model.named_modules()):
        new: nn.Module | None = None
        if type(module) is Linear and (fmt := format_of(name + ".weight")):
            new = PackedLinear(fmt, *reversed(module.weight.shape))
        elif type(module) is Experts and (fmt := format_of(name + ".w2")):
            new = PackedExperts(fmt, *module.w2.shape)
        elif type(module) is FeedForward and (fmt := format_of(name + ".w2")):
            new = PackedFeedForward(fmt, *module.w2.shape)
        if new is not None:
            model.set_submodule(name, new)


class UnpackedState(LazyState):
    """The parameters and buffers of a model packed in plain formats, one at a time, bit for bit as they were packed.

    Raises UsageError for a quantised model, whose weights are no longer there.
    """

    def __init__(self, model: Mixtral) -> None:
        super().__init__(parameter_shapes(model.config))
        self._config = model.config
        self._tensors: dict[str, Tensor] = dict(model.state_dict(keep_vars=True))
        self._formats = {name + "." + key: module.format.name for name, module in packed_modules(model)
                         for key in dict(module.named_buffers())}  # fmt: skip
        dtypes = {format.name: dtype for dtype, format in PLAIN.items()}
        if quantised := set(self._formats.values()) - dtypes.keys():
            what = f"save: this model is quantised ({', '.join(sorted(quantised))})"
            raise UsageError(f"{what}; copy its folder, or save the model it was made from")
        self._dtype = dtypes[max(self._formats.values())]  # all have the same

    def dtype(self, ours: str) -> torch.dtype:
        return fixed_dtype(ours, self._config) or self._dtype

    def read(self, ours: str) -> Tensor:
        if ours + PACKED not in self._formats:
            return self._tensors[ours].detach().to(self.dtype(ours))
        n, d = self.shapes[ours][-2:]
        return unpack(self._tensors[ours + PACKED], self._formats[ours + PACKED], n, d)[0]


def packed_modules(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """The packed modules of a model by name."""
    for name, module in model.named_modules():
        if isinstance(module, _Packed):
            yield name, module


def _slices(state: Mapping[str, Tensor], name: str) -> Iterable[Tensor]:
    """What lies along a tensor's first axis, one at a time; a matrix: itself."""
    if isinstance(state, LazyState) and len(state.shapes[name]) > 2:
        return state.slices(name)
    tensor = state[name]
    return tensor if tensor.dim() > 2 else [tensor]


def _pack_into(packed: Tensor, name: str, slices: Iterable[Tensor], dtype: torch.dtype) -> Tensor:
    """Fill `packed` some rows at a time, so that no second copy of a matrix is ever whole."""
    matrices = packed.view(-1, *packed.shape[-2:])
    done = 0
    for part in slices:
        require_range(name, part, dtype)
        for w in part.reshape(-1, *part.shape[-2:]):
            for rows, to in zip(w.split(_ROWS), matrices[done].split(_ROWS // LANES), strict=True):
                to.copy_(pack(rows.to(dtype), PLAIN[dtype].name))
            done += 1
    return packed
