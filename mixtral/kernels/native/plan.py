"""The structures of native/step.h for ctypes, field by field in its order, and their making from tensors.

Legend: D model width, E experts, V vocabulary.
"""

from __future__ import annotations

import ctypes
from ctypes import POINTER, c_float, c_int32, c_int64, c_void_p
from typing import NamedTuple

import torch
from torch import Tensor

from mixtral.errors import UsageError
from mixtral.kernels.native.library import FORMATS, Matrix
from mixtral.kernels.packing import check_packed

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # enum Dtype
CACHE_DTYPES = (torch.float32, torch.bfloat16)


class Expert(ctypes.Structure):
    _fields_ = (("gate", Matrix), ("up", Matrix), ("down", Matrix))


class Layer(ctypes.Structure):
    _fields_ = (
        ("attention_norm", c_void_p), ("ffn_norm", c_void_p), ("wqkv", Matrix), ("wo", Matrix), ("router", c_void_p),
        ("experts", POINTER(Expert)), ("n_experts", c_int32), ("ffn_dim", c_int32), ("in_kinds", c_int32),
        ("out_kinds", c_int32),
    )  # fmt: skip


class Model(ctypes.Structure):
    _fields_ = (
        ("dim", c_int32), ("n_heads", c_int32), ("n_kv_heads", c_int32), ("head_dim", c_int32), ("ffn_dim", c_int32),
        ("n_experts", c_int32), ("most_kinds", c_int32), ("window", c_int32), ("embedding_dtype", c_int32),
        ("norm_eps", c_float), ("layers", POINTER(Layer)), ("embedding", c_void_p), ("packed_embedding", Matrix),
        ("norm", c_void_p), ("output", Matrix),
    )  # fmt: skip


class Sequence(ctypes.Structure):
    _fields_ = (
        ("begin", c_int32), ("n", c_int32), ("first", c_int64), ("blocks", c_void_p),
    )  # fmt: skip


class Pages(ctypes.Structure):
    _fields_ = (
        ("pool", c_void_p), ("block_size", c_int64), ("layer_stride", c_int64), ("value_stride", c_int64),
        ("slot_stride", c_int64), ("head_stride", c_int64),
    )  # fmt: skip


class Plan(ctypes.Structure):
    _fields_ = (
        ("model", POINTER(Model)), ("rows", c_int32), ("n_sequences", c_int32), ("n_wanted", c_int32), ("k", c_int32),
        ("first_layer", c_int32), ("last_layer", c_int32), ("from_experts", c_int32), ("to_router", c_int32),
        ("cache_dtype", c_int32), ("pages", Pages), ("sequences", POINTER(Sequence)), ("row_k", c_void_p),
        ("row_share", c_void_p), ("active", c_void_p), ("tokens", c_void_p), ("cosines", c_void_p), ("sines", c_void_p),
        ("wanted", c_void_p), ("x", c_void_p), ("logits", c_void_p), ("router_logits", c_void_p),
        ("experts", c_void_p), ("weights", c_void_p), ("scratch", c_void_p),
    )  # fmt: skip


class Weight(NamedTuple):
    """A packed matrix [n outputs, d inputs] (packed.py)."""

    packed: Tensor
    format: str
    n: int
    d: int


class ExpertWeights(NamedTuple):
    """w2(silu(w1 x) * w3 x): gate (w1) and up (w3) are [F, D], down (w2) is [D, F]."""

    gate: Weight
    up: Weight
    down: Weight


class LayerWeights(NamedTuple):
    attention_norm: Tensor  # fp32 [D], like the other norm
    ffn_norm: Tensor
    wqkv: Weight  # [(H + 2 G) C, D], grouped by key/value head
    wo: Weight  # [D, H C]
    router: Tensor | None  # fp32 [E, D]; None: dense
    experts: tuple[ExpertWeights | None, ...]  # E, or one when dense; None: not here, adds nothing


class ModelWeights(NamedTuple):
    embedding: Tensor | Weight  # fp32, bf16 or fp16 [V, D], or packed in a format without scales
    layers: tuple[LayerWeights, ...]
    norm: Tensor  # fp32 [D]
    output: Weight  # [V, D]


def matrix(weight: Weight, name: str, n: int, d: int) -> Matrix:
    """Raises UsageError unless the weight is a packed [n, d] that native code can read."""
    if (weight.n, weight.d) != (n, d):
        raise UsageError(f"native step: {name} must be {n} x {d}, not {weight.n} x {weight.d}")
    check_packed(weight.packed, weight.format, n, d)
    if not weight.packed.is_contiguous() or weight.packed.device.type != "cpu":
        raise UsageError(f"native step: {name} must be a contiguous tensor on the CPU")
    return Matrix(weight.packed.data_ptr(), FORMATS[weight.format], n, d)


def pointer(tensor: Tensor, name: str, shape: tuple[int, ...], *dtypes: torch.dtype) -> int:
    """The address of a tensor's data; UsageError unless it has this shape and a dtype of these, on the CPU."""
    good = tensor.shape == shape and tensor.dtype in dtypes
    if not good or not tensor.is_contiguous() or tensor.device.type != "cpu":
        want = f"a contiguous {' or '.join(str(d).removeprefix('torch.') for d in dtypes)} {list(shape)} on the CPU"
        have = f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)} on {tensor.device}"
        raise UsageError(f"native step: {name} must be {want}, not {have}")
    return tensor.data_ptr()
