"""The native step: one C call runs a range of layers for some rows, as a plan made here says (native/src/step.h).

The plan refers to tensors by raw pointer: weights by (pointer, format) for each matrix, keys and values by blocks of a
paged pool. So quantised weights, paging and a range of layers need no step of their own.

Arithmetic: products are those of packing.py; the residual stream, norms, rotary embedding, softmax and the weighted sum
of experts are fp32; keys and values are rounded to the pool's dtype. A row's bits depend on its own sequence alone.

Legend: T rows, D model width, E experts, K experts a row takes, G key/value heads, C head width, V vocabulary, L
layers, M sparse layers of a call, S slots of the pool, B blocks of a table, R rows whose logits are wanted, N spans.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mixtral.config import ModelConfig
from mixtral.errors import UsageError
from mixtral.kernels.native import library as native
from mixtral.kernels.native import plan
from mixtral.kernels.native.plan import CACHE_DTYPES, DTYPES, ExpertWeights, ModelWeights, Weight, matrix, pointer

# Rows of activations that weights of a format read: enum RowKind, rows_kind of native/src/packed.h.
ROW_KINDS = {"bf16": 0, "int8": 1, "int4": 1, "fp32": 2, "fp16": 2}
MOST_ROWS = 512  # a call's scratch grows with its rows; longer chunks are cut


class Span(NamedTuple):
    """The rows of one sequence in a call, in ascending positions."""

    begin: int  # the first row
    n: int  # rows
    first: int  # position of the first of them


class Pages(NamedTuple):
    """The pool of keys and values, and where each span's lie: position p in block tables[span, p // block_size].

    The step writes the rows' own keys and values into their slots. Blocks before a sliding window are not read.
    """

    pool_L2GSC: Tensor  # fp32 or bf16; all axes but the last may have any strides
    block_size: int
    tables_NB: Tensor  # int64 on the CPU, one row for each span


class Routed(NamedTuple):
    """The experts that the rows of a sparse layer take, each once, and their weights."""

    experts_TK: Tensor  # int64, -1 for none
    weights_TK: Tensor  # fp32


class Result(NamedTuple):
    x_TD: Tensor  # fp32, the residual stream after the last layer
    logits_RV: Tensor | None  # fp32; None without the output product
    router_logits_MTE: Tensor  # fp32, E the most of any layer; [0, T, E] when dense, and likewise the next two
    weights_MTK: Tensor  # fp32, the softmax over the chosen logits; 0 for unused slots
    experts_MTK: Tensor  # int64, sorted by logit, ties to the lower index; -1 for unused slots


class Step:
    """A model's weights in one table, ready for any number of calls, one at a time: they share their scratch.

    Holds the tensors that the table points to.

    Raises UsageError for weights whose shape, dtype or layout native code could not read, by name.
    """

    def __init__(self, config: ModelConfig, weights: ModelWeights) -> None:
        self.config = config
        self._held: list[Tensor | Weight | None] = [weights.embedding, weights.norm, weights.output]
        self._experts: list[list[ExpertWeights | None]] = []
        self._layers = (plan.Layer * config.n_layers)()
        self._tables = [
            self._fill_layer(i, layer, w) for i, (layer, w) in enumerate(zip(self._layers, weights.layers, strict=True))
        ]
        embedding, packed, dtype = _embedding(config, weights.embedding)
        self._model = plan.Model(
            config.dim, config.n_heads, config.n_kv_heads, config.head_dim,
            max(layer.ffn_dim for layer in self._layers), config.n_experts, 1,
            config.sliding_window or 0, dtype, config.norm_eps, self._layers, embedding, packed,
            pointer(weights.norm, "norm", (config.dim,), torch.float32),
            matrix(weights.output, "output", config.vocab_size, config.dim),
        )  # fmt: skip
        for i in range(config.n_layers):
            self._set_kinds(i)
        self._scratch = torch.empty(0, dtype=torch.uint8)

    def set_expert(self, layer: int, expert: int, weights: ExpertWeights | None) -> None:
        """From the next call on an expert has these weights, in any formats; None: none, and it adds nothing.

        Raises UsageError when they do not fit: nothing has changed then.
        """
        if not 0 <= layer < self.config.n_layers or not 0 <= expert < len(self._experts[layer]):
            raise UsageError(f"native step: there is no expert {expert} in layer {layer}")
        self._tables[layer][expert] = _expert(self.config, self._layers[layer].ffn_dim, expert, weights)
        self._experts[layer][expert] = weights
        self._set_kinds(layer)

    def run(
        self, source: Tensor, spans: Sequence[Span], pages: Pages, angles: tuple[Tensor, Tensor],
        wanted_R: Tensor | None, k: int | Tensor | None = None, layers: range | None = None,
        routed: Routed | None = None, to_router: bool = False,
    ) -> Result:  # fmt: skip
        """Run some rows through some layers.

        Args:
            source: int64 [T] tokens, or fp32 [T, D]: the rows as the layer before left them.
            spans: the sequences that the rows belong to, in the rows' order; their slots are written. A row between
                them is inactive: it writes nothing, takes no experts, and what comes out for it has no meaning.
            angles: rotary cos and sin, two fp32 [P, C/2], of the positions 0 .. P - 1.
            wanted_R: int64, the rows whose logits are wanted; None: stop after the last layer.
            k: experts a row takes, by default the configured number; or int64 [T], 0 for none; or fp32 [T], where a
                number between 0 and 1 means the fewest experts whose probabilities sum to it.
            layers: which, in steps of one; all by default.
            routed: begin behind the first layer's router, whose rows take these experts; `source` is fp32 then.
            to_router: end behind the last layer's router: x is then what its norm and experts read.

        Raises UsageError for anything that does not fit: nothing has been written then.
        """
        config, layers = self.config, range(self.config.n_layers) if layers is None else layers
        k = config.experts_per_token if k is None else k
        k, shares = self._shares(k, layers)
        rows, row_k = source.shape[0], k.to(torch.int32) if isinstance(k, Tensor) else None
        most_k = max(_most(k), 1 if routed is None else routed.experts_TK.shape[1])
        self._check(source, spans, pages, angles, wanted_R, layers)
        self._check_routing(rows, k, most_k, layers, routed)
        sparse = sum(bool(self._layers[i].router) for i in layers)
        x_TD = torch.empty(rows, config.dim) if source.dim() == 1 else source.clone()
        wanted_R = None if wanted_R is None else wanted_R.contiguous()
        result = Result(
            x_TD,
            None if wanted_R is None else torch.empty(wanted_R.shape[0], config.vocab_size),
            torch.empty(sparse, rows, config.n_experts),
            torch.empty(sparse, rows, most_k),
            torch.empty(sparse, rows, most_k, dtype=torch.int64),
        )
        if routed is not None:
            result.experts_MTK[0], result.weights_MTK[0] = routed.experts_TK, routed.weights_TK
        tables_NB = pages.tables_NB.contiguous()
        tokens, active = source.contiguous(), _active(spans, rows)
        call = plan.Plan(
            ctypes.pointer(self._model), rows, len(spans), 0 if wanted_R is None else wanted_R.shape[0], most_k,
            layers.start, layers.stop, routed is not None, to_router, DTYPES[pages.pool_L2GSC.dtype], _pages(pages),
            _sequences(spans, tables_NB), _address(row_k), _address(shares),
            _address(active),
            tokens.data_ptr() if source.dim() == 1 else None, angles[0].data_ptr(), angles[1].data_ptr(),
            _address(wanted_R), x_TD.data_ptr(), _address(result.logits_RV),
            *(t.data_ptr() if sparse else None for t in (result.router_logits_MTE, result.experts_MTK,
                                                         result.weights_MTK)), None,
        )  # fmt: skip
        if rows:
            self._call(call)
        return result

    def _call(self, call: plan.Plan) -> None:
        library, failed = native.library(), True
        library.mx_step_scratch.restype = ctypes.c_int64
        while failed:  # another thread has meanwhile asked for more threads
            size = library.mx_step_scratch(ctypes.byref(call))
            if self._scratch.shape[0] < size + 64:
                self._scratch = torch.empty(size + 64, dtype=torch.uint8)
            call.scratch = (self._scratch.data_ptr() + 63) // 64 * 64
            failed = bool(library.mx_step(ctypes.byref(call), ctypes.c_int64(size)))

    # -- the table -----------------------------------------------------------------------------------------------------

    def _fill_layer(self, number: int, layer: plan.Layer, weights: plan.LayerWeights) -> ctypes.Array:
        """Write one row of the table -> the table of its experts, which must live as long."""
        config, heads_dim = self.config, self.config.n_heads * self.config.head_dim
        layer.attention_norm = pointer(weights.attention_norm, "attention norm", (config.dim,), torch.float32)
        layer.ffn_norm = pointer(weights.ffn_norm, "ffn norm", (config.dim,), torch.float32)
        layer.wqkv = matrix(weights.wqkv, "wqkv", heads_dim + 2 * config.n_kv_heads * config.head_dim, config.dim)
        layer.wo = matrix(weights.wo, "wo", config.dim, heads_dim)
        layer.n_experts, layer.ffn_dim = config.layer(number)
        if len(weights.experts) != layer.n_experts or (weights.router is None) == (layer.n_experts > 1):
            router = "without" if weights.router is None else "with"
            raise UsageError(f"native step: layer {number} has {len(weights.experts)} experts {router} a router; the "
                             f"config asks for {layer.n_experts}")
        if weights.router is not None:
            layer.router = pointer(weights.router, "router", (layer.n_experts, config.dim), torch.float32)
        table = [_expert(config, layer.ffn_dim, e, expert) for e, expert in enumerate(weights.experts)]
        experts = (plan.Expert * layer.n_experts)(*table)
        layer.experts = experts
        self._held += [weights.attention_norm, weights.ffn_norm, weights.wqkv, weights.wo, weights.router]
        self._experts.append(list(weights.experts))
        return experts

    def _set_kinds(self, number: int) -> None:
        """Which kinds of rows a layer's experts read, after one of them has changed."""
        here, layer = [e for e in self._experts[number] if e is not None], self._layers[number]
        layer.in_kinds = _kinds(m for e in here for m in (e.gate, e.up))
        layer.out_kinds = _kinds(e.down for e in here)
        most = max(layer.in_kinds.bit_count(), layer.out_kinds.bit_count())
        self._model.most_kinds = max(self._model.most_kinds, most)

    # -- a call's arguments --------------------------------------------------------------------------------------------

    def _check(
        self, source: Tensor, spans: Sequence[Span], pages: Pages, angles: tuple[Tensor, Tensor],
        wanted_R: Tensor | None, layers: range,
    ) -> None:  # fmt: skip
        config, rows = self.config, source.shape[0]
        if source.dim() == 1:
            pointer(source.contiguous(), "tokens", (rows,), torch.int64)
            if not _all_within(source, config.vocab_size):
                raise UsageError(f"native step: a token id is not one of 0..{config.vocab_size - 1}")
        else:
            pointer(source.contiguous(), "rows", (rows, config.dim), torch.float32)
        ends = [0, *(span.begin + span.n for span in spans), rows]
        disjoint = all(end <= begin for end, begin in zip(ends, [*(span.begin for span in spans), rows], strict=False))
        if rows > MOST_ROWS or not disjoint or ends[-2] > rows or any(span.n < 1 for span in spans):
            have = [(span.begin, span.n) for span in spans]
            raise UsageError(f"native step: {rows} rows in the spans {have}; at most {MOST_ROWS} rows, and disjoint "
                             "spans of at least one of them, in order, are wanted")
        if layers.step != 1 or not 0 <= layers.start <= layers.stop <= config.n_layers:
            raise UsageError(f"native step: layers must be a range within 0..{config.n_layers}, not {layers}")
        if wanted_R is not None:
            pointer(wanted_R.contiguous(), "wanted rows", (wanted_R.shape[0],), torch.int64)
            if not _all_within(wanted_R, rows):
                raise UsageError(f"native step: a wanted row is not one of 0..{rows - 1}")
        _check_pages(spans, pages, config)
        last = max((span.first + span.n for span in spans), default=0)
        for table in angles:
            pointer(table, "rotary angles", (max(last, table.shape[0]), config.head_dim // 2), torch.float32)

    def _shares(self, k: int | Tensor, layers: range) -> tuple[int | Tensor, Tensor | None]:
        """(the most experts of each row, its share of the probability or 0; None: no row has one)."""
        if not isinstance(k, Tensor) or not k.is_floating_point():
            return k, None
        is_share = (k > 0) & (k < 1)
        most = min((self._layers[i].n_experts for i in layers if self._layers[i].router), default=1)
        return k.masked_fill(is_share, most).to(torch.int64), k.float().masked_fill(~is_share, 0.0).contiguous()

    def _check_routing(
        self, rows: int, k: int | Tensor, most_k: int, layers: range, routed: Routed | None
    ) -> None:
        fewest = min((self._layers[i].n_experts for i in layers if self._layers[i].router), default=0)
        if isinstance(k, Tensor):
            pointer(k.contiguous(), "k", (rows,), k.dtype)
            if rows and int(k.min()) < 0:
                raise UsageError("native step: k must lie in 0..the number of experts, for each row")
        if fewest and not 1 <= most_k <= fewest:
            raise UsageError(f"native step: k must lie in 1..{fewest} (the experts), not {most_k}")
        if routed is None:
            return
        if not layers or not self._layers[layers.start].router:
            raise UsageError("native step: a choice of experts was given for a layer without a router")
        shape, experts = (rows, routed.experts_TK.shape[1]), self._layers[layers.start].n_experts
        pointer(routed.experts_TK.contiguous(), "experts", shape, torch.int64)
        pointer(routed.weights_TK.contiguous(), "weights", shape, torch.float32)
        if not _all_within(routed.experts_TK.flatten() + 1, experts + 1):
            raise UsageError(f"native step: an expert is not one of 0..{experts - 1}, or -1 for none")


def _embedding(config: ModelConfig, embedding: Tensor | Weight) -> tuple[int | None, native.Matrix, int]:
    """(the plain embedding's address or None, the packed embedding, the plain one's dtype)."""
    if isinstance(embedding, Weight):
        if embedding.format not in ("fp32", "fp16", "bf16"):
            raise UsageError(f"native step: the embedding must be packed in fp32, fp16 or bf16, not {embedding.format}")
        return None, matrix(embedding, "embedding", config.vocab_size, config.dim), 0
    address = pointer(embedding, "embedding", (config.vocab_size, config.dim), *DTYPES)
    return address, native.Matrix(), DTYPES[embedding.dtype]


def _expert(config: ModelConfig, ffn_dim: int, number: int, weights: ExpertWeights | None) -> plan.Expert:
    if weights is None:
        none = (native.Matrix(None, 0, n, d) for n, d in ((ffn_dim, config.dim),) * 2 + ((config.dim, ffn_dim),))
        return plan.Expert(*none)
    return plan.Expert(
        matrix(weights.gate, f"expert {number} gate", ffn_dim, config.dim),
        matrix(weights.up, f"expert {number} up", ffn_dim, config.dim),
        matrix(weights.down, f"expert {number} down", config.dim, ffn_dim),
    )


def _most(k: int | Tensor) -> int:
    """The most experts that a row takes; 1 for no rows."""
    if isinstance(k, Tensor):
        return int(k.max()) if k.shape[0] else 1
    return k


def _kinds(weights: Iterable[Weight]) -> int:
    kinds = 0
    for weight in weights:
        kinds |= 1 << ROW_KINDS[weight.format]
    return kinds


def _all_within(ids: Tensor, n: int) -> bool:
    """Whether each lies in 0 .. n - 1. A call has few: a list is faster than the tensor's own minimum and maximum."""
    listed = ids.tolist()
    return not listed or 0 <= min(listed) <= max(listed) < n


def _check_pages(spans: Sequence[Span], pages: Pages, config: ModelConfig) -> None:
    pool, size, window = pages.pool_L2GSC, pages.block_size, config.sliding_window
    wanted = (config.n_layers, 2, config.n_kv_heads, config.head_dim)
    if pool.dim() != 5 or pool.dtype not in CACHE_DTYPES or pool.device.type != "cpu" or size < 1 \
            or (*pool.shape[:3], pool.shape[4]) != wanted or pool.stride(4) != 1:
        raise UsageError(
            f"native step: a pool must be fp32 or bf16 [{wanted[0]}, 2, {wanted[2]}, slots, {wanted[3]}] on the CPU, "
            f"its last axis in one piece; not {pool.dtype} {list(pool.shape)}"
        )
    tables_NB = pages.tables_NB
    if tables_NB.dtype != torch.int64 or tables_NB.dim() != 2 or tables_NB.shape[0] != len(spans):
        raise UsageError(f"native step: {len(spans)} spans need block tables int64 [{len(spans)}, blocks], not "
                         f"{tables_NB.dtype} {list(tables_NB.shape)}")
    blocks = pool.shape[3] // size
    for span, table in zip(spans, tables_NB.tolist(), strict=True):
        oldest = 0 if window is None else max(0, span.first - window + 1)
        needed = table[oldest // size : (span.first + span.n - 1) // size + 1]
        if span.first < 0 or len(table) * size < span.first + span.n:
            raise UsageError(f"native step: {len(table)} blocks of {size} for the positions {span.first}.."
                             f"{span.first + span.n - 1}")
        if not 0 <= min(needed) <= max(needed) < blocks:
            raise UsageError(f"native step: a block table names a block that is not one of 0..{blocks - 1}")


def _sequences(spans: Sequence[Span], tables_NB: Tensor) -> ctypes.Array:
    address, row_bytes, n = tables_NB.data_ptr(), 8 * tables_NB.shape[1], len(spans)
    fields = [value for i, span in enumerate(spans) for value in (*span, address + i * row_bytes)]
    return (plan.Sequence * n).from_buffer_copy(struct.pack("iiqQ" * n, *fields))  # a constructor each takes 2 us


def _pages(pages: Pages) -> plan.Pages:
    pool, size = pages.pool_L2GSC, pages.pool_L2GSC.element_size()
    layer, value, head, slot, _ = (size * stride for stride in pool.stride())
    return plan.Pages(pool.data_ptr(), pages.block_size, layer, value, slot, head)


def _active(spans: Sequence[Span], rows: int) -> Tensor | None:
    """uint8 [T], which rows some span has; None: all."""
    if sum(span.n for span in spans) == rows:
        return None
    active_T = torch.zeros(rows, dtype=torch.uint8)
    for span in spans:
        active_T[span.begin : span.begin + span.n] = 1
    return active_T


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
