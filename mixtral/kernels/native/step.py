"""The native step: one C call runs a range of layers for some rows, as a plan made here says (native/step.h).

What the plan names, it names by address: weights by (pointer, format) for each matrix, keys and values by blocks of a
paged cache. So quantised weights, paging and a range of layers need no step of their own.

Arithmetic: products are those of packed.py; the residual stream, norms, rotary embedding, softmax and the weighted sum
of experts are fp32; keys and values are rounded to the cache's dtype. A row's bits depend on its own sequence alone.

Legend: T rows, D model width, E experts, K experts a row takes, G key/value heads, C head width, V vocabulary, L
layers, S slots of a block, B blocks, R rows whose logits are wanted.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mixtral.config import ModelConfig
from mixtral.errors import UsageError
from mixtral.kernels.native import library as native
from mixtral.kernels.native import plan
from mixtral.kernels.native.plan import DTYPES, ModelWeights, matrix, pointer

# Rows of activations that weights of a format read: equal names, equal rows (rows_kind of native/src/packed.h).
ROWS = {"fp32": "fp32", "fp16": "fp32", "bf16": "bf16", "int8": "int8", "int4": "int8"}
MOST_ROWS = 512  # a call's scratch grows with its rows; longer chunks are cut


class Span(NamedTuple):
    """The rows of one sequence in a call, in ascending positions, and the paged cache of what came before them.

    Position p lies in slot p mod (len(table) * S), slot s in block table[s // S] of the pool. The step writes the rows'
    own keys and values into their slots.
    """

    n: int  # rows
    first: int  # position of the first of them
    pool_LB2SGC: Tensor  # fp32 or bf16, keys and values; all axes but the last may have any strides
    table: Sequence[int]


class Result(NamedTuple):
    x_TD: Tensor  # fp32, the residual stream after the last layer
    logits_RV: Tensor | None  # fp32; None without the output product
    router_logits_LTE: Tensor  # fp32; [0, T, E] when dense, and likewise the next two
    weights_LTK: Tensor  # fp32, the softmax over the chosen logits
    experts_LTK: Tensor  # int64, sorted by logit, ties to the lower index


class Step:
    """A model's weights in one table, ready for any number of calls, one at a time: they share their scratch.

    Holds the tensors that the table points to.

    Raises UsageError for weights whose shape, dtype or layout native code could not read, by name.
    """

    def __init__(self, config: ModelConfig, weights: ModelWeights) -> None:
        self.config, self._weights = config, weights
        self._layers = (plan.Layer * config.n_layers)()
        self._experts = [_fill_layer(config, *pair) for pair in zip(self._layers, weights.layers, strict=True)]
        self._model = plan.Model(
            config.dim, config.n_heads, config.n_kv_heads, config.head_dim, config.ffn_dim, config.n_experts,
            config.sliding_window or 0, DTYPES.get(weights.embedding.dtype, -1), config.norm_eps, self._layers,
            pointer(weights.embedding, "embedding", (config.vocab_size, config.dim), *DTYPES),
            pointer(weights.norm, "norm", (config.dim,), torch.float32),
            matrix(weights.output, "output", config.vocab_size, config.dim),
        )  # fmt: skip
        self._scratch = torch.empty(0, dtype=torch.uint8)

    def run(
        self, source: Tensor, spans: Sequence[Span], angles: tuple[Tensor, Tensor], wanted_R: Tensor | None,
        k: int | None = None, layers: range | None = None,
    ) -> Result:  # fmt: skip
        """Run some rows through some layers.

        Args:
            source: int64 [T] tokens, or fp32 [T, D]: the rows as the layer before left them.
            spans: the sequences that the rows belong to, in the rows' order; their pools are written.
            angles: rotary cos and sin, two fp32 [P, C/2], of the positions 0 .. P - 1.
            wanted_R: int64, the rows whose logits are wanted; None: stop after the last layer.
            k: experts a row takes, by default the configured number.
            layers: which, in steps of one; all by default.

        Raises UsageError for anything that does not fit: nothing has been written then.
        """
        config, layers = self.config, range(self.config.n_layers) if layers is None else layers
        k = config.experts_per_token if k is None else k
        rows = len(source)
        self._check(source, spans, angles, wanted_R, k, layers)
        sparse = len(layers) if config.is_sparse else 0
        x_TD = torch.empty(rows, config.dim) if source.dim() == 1 else source.clone()
        wanted_R = None if wanted_R is None else wanted_R.contiguous()
        result = Result(
            x_TD,
            None if wanted_R is None else torch.empty(len(wanted_R), config.vocab_size),
            torch.empty(sparse, rows, config.n_experts),
            torch.empty(sparse, rows, k),
            torch.empty(sparse, rows, k, dtype=torch.int64),
        )
        sequences, kept = _sequences(spans)
        tokens = source.contiguous()
        call = plan.Plan(
            ctypes.pointer(self._model), rows, len(spans), 0 if wanted_R is None else len(wanted_R), k,
            layers.start, layers.stop, DTYPES[spans[0].pool_LB2SGC.dtype] if spans else 0, sequences,
            tokens.data_ptr() if source.dim() == 1 else None, angles[0].data_ptr(), angles[1].data_ptr(),
            None if wanted_R is None else wanted_R.data_ptr(), x_TD.data_ptr(), _address(result.logits_RV),
            *(t.data_ptr() if sparse else None for t in (result.router_logits_LTE, result.experts_LTK,
                                                         result.weights_LTK)),
        )  # fmt: skip
        self._call(call)
        del kept
        return result

    def _call(self, call: plan.Plan) -> None:
        library, failed = native.library(), True
        library.mx_step_scratch.restype = ctypes.c_int64
        while failed:  # another thread has meanwhile asked for more threads
            size = library.mx_step_scratch(ctypes.byref(call))
            if len(self._scratch) < size + 64:
                self._scratch = torch.empty(size + 64, dtype=torch.uint8)
            call.scratch = (self._scratch.data_ptr() + 63) // 64 * 64
            failed = bool(library.mx_step(ctypes.byref(call), ctypes.c_int64(size)))

    def _check(
        self, source: Tensor, spans: Sequence[Span], angles: tuple[Tensor, Tensor], wanted_R: Tensor | None, k: int,
        layers: range,
    ) -> None:  # fmt: skip
        config, rows = self.config, len(source)
        if source.dim() == 1:
            pointer(source.contiguous(), "tokens", (rows,), torch.int64)
            if not _all_within(source, config.vocab_size):
                raise UsageError(f"native step: a token id is not one of 0..{config.vocab_size - 1}")
        else:
            pointer(source.contiguous(), "rows", (rows, config.dim), torch.float32)
        if rows > MOST_ROWS or sum(span.n for span in spans) != rows or any(span.n < 1 for span in spans):
            raise UsageError(
                f"native step: {rows} rows in spans of {[span.n for span in spans]}; at most {MOST_ROWS} rows, "
                "and spans of at least one that cover them, are wanted"
            )
        if layers.step != 1 or not 0 <= layers.start <= layers.stop <= config.n_layers:
            raise UsageError(f"native step: layers must be a range within 0..{config.n_layers}, not {layers}")
        if config.is_sparse and not 1 <= k <= config.n_experts:
            raise UsageError(f"native step: k must lie in 1..{config.n_experts} (the experts), not {k}")
        if wanted_R is not None:
            pointer(wanted_R.contiguous(), "wanted rows", (len(wanted_R),), torch.int64)
            if not _all_within(wanted_R, rows):
                raise UsageError(f"native step: a wanted row is not one of 0..{rows - 1}")
        for span in spans:
            _check_span(span, spans[0].pool_LB2SGC.dtype, config)
        last = max((span.first + span.n for span in spans), default=0)
        for table in angles:
            pointer(table, "rotary angles", (max(last, len(table)), config.head_dim // 2), torch.float32)


def _fill_layer(config: ModelConfig, layer: plan.Layer, weights: plan.LayerWeights) -> ctypes.Array:
    """Write one row of the table -> the table of its experts, which must live as long."""
    dim, ffn_dim, heads_dim = config.dim, config.ffn_dim, config.n_heads * config.head_dim
    layer.attention_norm = pointer(weights.attention_norm, "attention norm", (dim,), torch.float32)
    layer.ffn_norm = pointer(weights.ffn_norm, "ffn norm", (dim,), torch.float32)
    layer.wqkv = matrix(weights.wqkv, "wqkv", heads_dim + 2 * config.n_kv_heads * config.head_dim, dim)
    layer.wo = matrix(weights.wo, "wo", dim, heads_dim)
    if len(weights.experts) != config.n_experts or (weights.gate is None) == config.is_sparse:
        raise UsageError(f"native step: {len(weights.experts)} experts {'without' if weights.gate is None else 'with'} "
                         f"a gate given for a model of {config.n_experts}")
    for parts in (("gate", "up"), ("down",)):
        if len({ROWS[getattr(expert, part).format] for expert in weights.experts for part in parts}) > 1:
            raise UsageError(f"native step: a layer's {' and '.join(parts)} weights read the same rounded rows; they "
                             "must be bf16 in all its experts, or fp32 or fp16 in all, or int8 or int4 in all")
    if weights.gate is not None:
        layer.gate = pointer(weights.gate, "gate", (config.n_experts, dim), torch.float32)
    experts = (plan.Expert * config.n_experts)(*(
        plan.Expert(
            matrix(expert.gate, f"expert {e} gate", ffn_dim, dim), matrix(expert.up, f"expert {e} up", ffn_dim, dim),
            matrix(expert.down, f"expert {e} down", dim, ffn_dim),
        )
        for e, expert in enumerate(weights.experts)
    ))  # fmt: skip
    layer.experts = experts
    return experts


def _all_within(ids: Tensor, n: int) -> bool:
    """Whether each lies in 0 .. n - 1. A call has few: a list is faster than the tensor's own minimum and maximum."""
    listed = ids.tolist()
    return not listed or 0 <= min(listed) <= max(listed) < n


def _check_span(span: Span, dtype: torch.dtype, config: ModelConfig) -> None:
    pool = span.pool_LB2SGC
    wanted = (config.n_layers, 2, config.n_kv_heads, config.head_dim)
    if pool.dim() != 6 or pool.dtype != dtype or dtype not in DTYPES or pool.device.type != "cpu" \
            or (pool.shape[0], pool.shape[2], *pool.shape[4:]) != wanted or pool.stride(5) != 1:
        raise UsageError(
            f"native step: a cache must be fp32 or bf16 [{wanted[0]}, blocks, 2, slots, {wanted[2]}, {wanted[3]}] on "
            f"the CPU, one dtype for all, its last axis in one piece; not {pool.dtype} {list(pool.shape)}"
        )
    slots, needed = len(span.table) * pool.shape[3], span.first + span.n
    if config.sliding_window is not None:
        needed = min(needed, config.sliding_window)
    if span.first < 0 or slots < needed:
        raise UsageError(f"native step: {slots} slots for positions {span.first}..{span.first + span.n - 1}; "
                         f"{needed} are needed")
    if not all(0 <= block < pool.shape[1] for block in span.table):
        raise UsageError(f"native step: a block table names a block that is not one of 0..{pool.shape[1] - 1}")


def _sequences(spans: Sequence[Span]) -> tuple[ctypes.Array, list[ctypes.Array]]:
    """-> the C structures, and the tables of addresses that they point to, which must live as long."""
    sequences, tables, begin = (plan.Sequence * len(spans))(), [], 0
    for sequence, span in zip(sequences, spans, strict=True):
        pool = span.pool_LB2SGC
        start, size = pool.data_ptr(), pool.element_size()
        layer, block, value, slot, head, _ = (size * stride for stride in pool.stride())
        table = (ctypes.c_void_p * len(span.table))(*(start + block * b for b in span.table))
        sequence.begin, sequence.n, sequence.first = begin, span.n, span.first
        sequence.n_blocks, sequence.block_size = len(span.table), pool.shape[3]
        sequence.layer_stride, sequence.value_stride, sequence.blocks = layer, value, table
        sequence.slot_stride, sequence.head_stride = slot, head
        tables.append(table)
        begin += span.n
    return sequences, tables


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
