"""NativeRunner: the model's forward pass through the native step, on packed weights and a CPU.

Legend: T tokens, D model width, F expert hidden width, E experts, M sparse layers, R rows whose logits are wanted.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mixtral.config import ModelConfig
from mixtral.engine.pool import KVPool
from mixtral.errors import UsageError
from mixtral.kernels.native import library as native
from mixtral.kernels.native.plan import ExpertWeights, LayerWeights, ModelWeights, Weight
from mixtral.kernels.native.step import MOST_ROWS, Pages, Result, Span, Step
from mixtral.model import Mixtral, Output, Ragged
from mixtral.model.attention import Attention
from mixtral.model.embedding import Embedding
from mixtral.model.norm import RMSNorm
from mixtral.model.rope import rotary_angles
from mixtral.model.transformer import Block
from mixtral.moe import MoE, Routing, TopKRouter
from mixtral.moe.dispatch import LocalDispatcher, added_to
from mixtral.native_file import cannot_run
from mixtral.quant.layers import PackedEmbedding, PackedExperts, PackedFeedForward, PackedLinear

_KNOWN = {
    Mixtral, nn.ModuleList, Embedding, PackedEmbedding, Block, Attention, RMSNorm, MoE, TopKRouter, LocalDispatcher,
    PackedLinear, PackedExperts, PackedFeedForward,
}  # fmt: skip


def why_not(model: Mixtral) -> str:
    """Why the native step cannot run this model as it is; "" when it can."""
    if reason := native.available() or cannot_run(model.config, model.embedding.device.type):
        return reason
    for module in _modules(model):
        if type(module) not in _KNOWN:
            return f"it does not know {type(module).__name__} in the model"
        if added := added_to(module):
            return f"it would not call {added} in the model"
    return ""


class NativeRunner:
    """Runs a packed model (quant/pack.py) by the native step. Weights changed in place are seen by the next pass.

    Raises UsageError with the reason when the step cannot run the model.
    """

    name = "native"

    def __init__(self, model: Mixtral, pool: KVPool | None = None) -> None:
        if reason := why_not(model):
            raise UsageError(f"native step: {reason}")
        self.config, self.device = model.config, torch.device("cpu")
        self.pool = KVPool(model.config, cache_dtype(model)) if pool is None else pool
        self._step = Step(model.config, step_weights(model))
        self._angles = rotary_angles(torch.arange(0), model.config.head_dim, model.config.rope_theta)

    def run(
        self, batch: Ragged, rows: Tensor | None = None, k: int | Tensor | None = None, keep_routing: bool = True
    ) -> Output:
        """See Runner. Without `keep_routing` that is left empty, which saves a tenth of a millisecond."""
        return self._run(self.pool, batch, rows, k, keep_routing)

    def _run(
        self, pool: KVPool, batch: Ragged, rows: Tensor | None, k: int | Tensor | None, keep_routing: bool
    ) -> Output:
        assert batch.context_lens is not None
        n, last = batch.tokens_T.shape[0], max(batch.context_lens.tolist(), default=0)
        with torch.inference_mode(False), self.pool.lock:
            angles = self._angles_to(last)
            parts = [
                self._step.run(
                    batch.tokens_T[begin:end], piece.spans,
                    Pages(pool.pool_L2GSC, pool.block_size, _tables(batch, piece)), angles,
                    _within(rows, begin, end, n), k[begin:end] if isinstance(k, Tensor) else k,
                )
                for begin, end, piece in _pieces(batch)
            ]  # fmt: skip
        logits = _logits(parts, rows, self.config)
        return Output(logits=logits, routing=_routing(parts, self.config) if keep_routing else ())

    def read(self, token_ids: list[int], k: int | None = None) -> Output:
        """See Runner. In a pool of its own, as an engine may have taken all of the runner's."""
        pool = KVPool(self.config, self.pool.dtype)
        return self._run(pool, pool.batch([(pool.add(), token_ids)]), None, k, True)

    def cores(self) -> AbstractContextManager[None]:
        """See Runner."""
        return native.cores_for_library()

    def _angles_to(self, n: int) -> tuple[Tensor, Tensor]:
        """Rotary cos and sin of the positions 0 .. n - 1 at least, kept from call to call."""
        have = self._angles[0].shape[0]
        if n > have:
            positions = torch.arange(max(n, min(2 * have, self.config.context)))
            self._angles = rotary_angles(positions, self.config.head_dim, self.config.rope_theta)
        return self._angles


def cache_dtype(model: Mixtral) -> torch.dtype:
    """Of keys and values: bf16 when the weights are, else fp32."""
    formats = {m.format.name for m in model.modules() if isinstance(m, PackedLinear)}
    return torch.bfloat16 if "bf16" in formats or model.embedding.dtype == torch.bfloat16 else torch.float32


# -- a batch as the step wants it --------------------------------------------------------------------------------------


class _Piece(NamedTuple):
    spans: list[Span]
    sequences: list[int]  # their numbers in the batch


def _pieces(batch: Ragged) -> Iterator[tuple[int, int, _Piece]]:
    """(first token, end, spans) of calls of at most MOST_ROWS rows, in order; a longer sequence is cut."""
    assert batch.context_lens is not None
    begin, rows, piece = 0, 0, _Piece([], [])
    lengths = batch.context_lens.tolist()
    for i, (first_row, end_row) in enumerate(pairwise(batch.cu_seqlens.tolist())):
        done, count = 0, end_row - first_row
        while done < count:
            n = min(count - done, MOST_ROWS - rows)
            piece.spans.append(Span(rows, n, lengths[i] - count + done))
            piece.sequences.append(i)
            done, rows = done + n, rows + n
            if rows == MOST_ROWS:
                yield begin, begin + rows, piece
                begin, rows, piece = begin + rows, 0, _Piece([], [])
    if piece.spans:
        yield begin, begin + rows, piece


def _tables(batch: Ragged, piece: _Piece) -> Tensor:
    assert batch.block_tables is not None
    whole = piece.sequences == list(range(batch.block_tables.shape[0]))
    return batch.block_tables if whole else batch.block_tables[piece.sequences]


def _within(rows: Tensor | None, begin: int, end: int, n: int) -> Tensor:
    """The wanted rows among tokens begin .. end - 1 of n, counted from `begin`."""
    if rows is None:
        return torch.arange(end - begin)
    if end - begin == n:
        return rows
    return rows[(rows >= begin) & (rows < end)] - begin


def _logits(parts: list[Result], rows: Tensor | None, config: ModelConfig) -> Tensor:
    found = [part.logits_RV for part in parts if part.logits_RV is not None]
    if len(found) == 1:
        return found[0]
    logits = torch.cat(found) if found else torch.empty(0, config.vocab_size)
    if rows is None or not found:
        return logits
    # the parts' rows lie one after the other; in each, in the order asked for
    return logits[(rows // MOST_ROWS).argsort(stable=True).argsort()]


def _routing(parts: list[Result], config: ModelConfig) -> tuple[Routing, ...]:
    if not parts:
        return ()
    logits_MTE = torch.cat([part.router_logits_MTE for part in parts], dim=1)
    weights_MTK = torch.cat([part.weights_MTK for part in parts], dim=1)
    experts_MTK = torch.cat([part.experts_MTK for part in parts], dim=1)
    layers = []
    for i, number in enumerate(config.sparse_layers):
        logits_TE = logits_MTE[i, :, : config.layer(number).n_experts]
        layers.append(Routing(logits_TE, logits_TE.softmax(-1), weights_MTK[i], experts_MTK[i], experts_MTK[i]))
    return tuple(layers)


# -- a model's weights as the step wants them --------------------------------------------------------------------------


def _modules(model: Mixtral) -> Iterator[object]:
    """All that the step stands in for, and others may have replaced."""
    for module in model.modules():
        yield module
        if isinstance(module, MoE):
            yield module.dispatcher


def step_weights(model: Mixtral) -> ModelWeights:
    """Addresses of a packed model's weights; nothing is copied but norms and routers that are not fp32."""
    layers = tuple(_layer(block, model.config) for block in model.layers)  # type: ignore[arg-type]
    embedding, config = model.embedding, model.config
    table: Tensor | Weight = (
        Weight(embedding.weight_packed, embedding.format.name, config.vocab_size, config.dim)
        if isinstance(embedding, PackedEmbedding)
        else embedding.weight.detach()
    )
    output = embedding if model.output is None else model.output
    return ModelWeights(table, layers, _fp32(model.norm.weight), _matrix(output, config.vocab_size, config.dim))


def _layer(block: Block, config: ModelConfig) -> LayerWeights:
    ffn = block.ffn.experts if isinstance(block.ffn, MoE) else block.ffn
    assert isinstance(ffn, PackedExperts | PackedFeedForward)  # why_not refused others
    name, w13, w2 = ffn.format.name, ffn.w13_packed, ffn.w2_packed
    w13, w2 = w13.unflatten(0, (-1, 2)) if w13.dim() == 3 else w13, w2[None] if w2.dim() == 2 else w2
    experts = tuple(
        ExpertWeights(
            Weight(gate, name, ffn.ffn_dim, config.dim), Weight(up, name, ffn.ffn_dim, config.dim),
            Weight(down, name, config.dim, ffn.ffn_dim),
        )
        for (gate, up), down in zip(w13, w2, strict=True)
    )  # fmt: skip
    heads_dim, kv_dim = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    return LayerWeights(
        _fp32(block.attention_norm.weight), _fp32(block.ffn_norm.weight),
        _matrix(block.attention.wqkv, heads_dim + 2 * kv_dim, config.dim),
        _matrix(block.attention.wo, config.dim, heads_dim),
        _fp32(block.ffn.router.weight) if isinstance(block.ffn, MoE) else None, experts,
    )  # fmt: skip


def _matrix(module: nn.Module, n: int, d: int) -> Weight:
    assert isinstance(module, PackedLinear | PackedEmbedding)  # why_not refused others
    return Weight(module.weight_packed, module.format.name, n, d)


def _fp32(weight: Tensor) -> Tensor:
    return weight.detach().float().contiguous()
