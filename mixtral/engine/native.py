"""The native step in the model's place: the same batches, caches and outputs, for generating on a CPU.

It runs packed weights (kernels/packing.py): those of a quantised model as they are, others rounded to bf16.

Legend: T tokens, D model width, F expert hidden width, E experts, G key/value heads, C head width, S slots of a cache,
L layers.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mixtral.config import ModelConfig
from mixtral.engine.kv_cache import FullCache
from mixtral.errors import UsageError
from mixtral.kernels.native import library as native
from mixtral.kernels.native import plan
from mixtral.kernels.native.plan import ExpertWeights, LayerWeights, ModelWeights, Weight
from mixtral.kernels.native.step import MOST_ROWS, Result, Span, Step
from mixtral.kernels.packing import pack, unpack
from mixtral.model import Mixtral, Output, Ragged
from mixtral.model.attention import Attention
from mixtral.model.linear import Linear
from mixtral.model.norm import RMSNorm
from mixtral.model.rope import rotary_angles
from mixtral.model.transformer import Block
from mixtral.moe import Experts, FeedForward, MoE, Routing
from mixtral.moe.dispatch import LocalDispatcher, added_to
from mixtral.moe.router import Router
from mixtral.quant.layers import PackedExperts, PackedFeedForward, PackedLinear


def why_not(model: Mixtral) -> str:
    """Why the native step cannot stand in for this model here; "" when it can."""
    if reason := native.available():
        return reason
    if not model.config.is_plain:
        return "it knows Mixtral's own router alone, and no shared experts"
    if model.embedding.weight.device.type != "cpu":
        return "it runs on the CPU alone"
    if model.embedding.weight.dtype not in plan.DTYPES:
        return f"it takes fp32 and bf16, not {str(model.embedding.weight.dtype).removeprefix('torch.')}"
    for part in _parts(model):
        if type(part) not in _KNOWN:
            return f"it does not know {type(part).__name__} in the model"
        if added := added_to(part):
            return f"it would not call {added} in the model"
    return ""


def suits(model: Mixtral) -> bool:
    """Whether generation is to use the step unasked: it can, and packing rounds no weight."""
    quantised = any(isinstance(part, PackedLinear | PackedExperts | PackedFeedForward) for part in _parts(model))
    return (quantised or model.embedding.weight.dtype == torch.bfloat16) and not why_not(model)


class NativeModel:
    """What runs a model's forward pass, without gradients, through the native step.

    Holds a packed bf16 copy of every matrix that is not packed yet. Later changes of the model's weights do not reach
    it. Raises UsageError with the reason when the step cannot stand in for the model.

    Args:
        release: free each of the model's own bf16 matrices once it is packed; until `restore`, the model itself cannot
            be run.
    """

    def __init__(self, model: Mixtral, release: bool = False) -> None:
        if reason := why_not(model):
            raise UsageError(f"native step: {reason}")
        self.config = model.config
        self._released: list[_Released] = []
        try:
            with torch.no_grad():
                self._step = Step(model.config, step_weights(model, self._released if release else None))
        except BaseException:  # Ctrl-C too: whoever catches it goes on with the model
            self.restore()
            raise
        self._angles = rotary_angles(torch.arange(0), model.config.head_dim, model.config.rope_theta)

    @torch.inference_mode(False)  # what an inference tensor holds could not be changed later
    def restore(self) -> None:
        """Give the model back the matrices that were released, bit for bit; the packed ones stay beside them."""
        while self._released:
            parameter, packed, n, d = self._released[-1]
            parameter.data = unpack(packed, "bf16", n, d)[0]
            self._released.pop()

    def __call__(
        self, batch: Ragged, cache: FullCache, rows: Tensor | None = None, k: int | None = None, routing: bool = True
    ) -> Output:
        """What Mixtral.forward returns for the same arguments; without `routing` that is left empty, which saves
        a tenth of a millisecond."""
        spans = _spans(batch, cache)
        last = max((span.first + span.n for span in spans), default=0)
        n = len(batch.tokens_T)
        parts = [
            self._step.run(batch.tokens_T[begin:end], piece, self._angles_to(last), _within(rows, begin, end, n), k)
            for begin, end, piece in _pieces(spans)
        ]
        return Output(_logits(parts, rows, self.config), None, _routing(parts) if routing else ())

    def _angles_to(self, n: int) -> tuple[Tensor, Tensor]:
        """Rotary cos and sin of the positions 0 .. n - 1 at least, kept from call to call."""
        have = len(self._angles[0])
        if n > have:
            positions = torch.arange(max(n, min(2 * have, self.config.context)))
            self._angles = rotary_angles(positions, self.config.head_dim, self.config.rope_theta)
        return self._angles


# -- a batch as the step wants it --------------------------------------------------------------------------------------


def _spans(batch: Ragged, cache: FullCache) -> list[Span]:
    """Each sequence's buffer as a pool of one block."""
    ends = batch.cu_seqlens.tolist()
    counts = [end - begin for begin, end in pairwise(ends)]
    firsts = cache.lengths
    pools = [kv_2LSGC.transpose(0, 1)[:, None] for kv_2LSGC in cache.grow(counts)]
    return [Span(*row) for row in zip(counts, firsts, pools, [[0]] * len(counts), strict=True)]


def _pieces(spans: list[Span]) -> Iterator[tuple[int, int, list[Span]]]:
    """(first token, end, spans) of calls of at most MOST_ROWS rows, in order; a longer sequence is cut."""
    begin, rows, piece = 0, 0, []
    for span in spans:
        done = 0
        while done < span.n:
            n = min(span.n - done, MOST_ROWS - rows)
            piece.append(span._replace(n=n, first=span.first + done))
            done, rows = done + n, rows + n
            if rows == MOST_ROWS:
                yield begin, begin + rows, piece
                begin, rows, piece = begin + rows, 0, []
    if piece:
        yield begin, begin + rows, piece


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


def _routing(parts: list[Result]) -> tuple[Routing, ...]:
    if not parts:
        return ()
    logits_LTE = torch.cat([part.router_logits_LTE for part in parts], dim=1)
    weights_LTK = torch.cat([part.weights_LTK for part in parts], dim=1)
    experts_LTK = torch.cat([part.experts_LTK for part in parts], dim=1)
    layers = zip(logits_LTE, logits_LTE.softmax(-1), weights_LTK, experts_LTK, experts_LTK, strict=True)
    return tuple(Routing(*layer) for layer in layers)


# -- a model's weights as the step wants them --------------------------------------------------------------------------

_KNOWN = {
    Mixtral, nn.ModuleList, nn.Embedding, Block, Attention, RMSNorm, Linear, MoE, Router, LocalDispatcher, Experts,
    FeedForward, PackedLinear, PackedExperts, PackedFeedForward,
}  # fmt: skip


def _parts(model: Mixtral) -> Iterator[object]:
    """All that the step stands in for, and others may have exchanged."""
    for module in model.modules():
        yield module
        if isinstance(module, MoE):
            yield module.dispatcher


def _blocks(model: Mixtral) -> Iterator[Block]:
    for block in model.layers:
        assert isinstance(block, Block)
        yield block


class _Released(NamedTuple):
    """A parameter that was emptied, and the packed [n, d] matrices that stand for it."""

    parameter: nn.Parameter
    packed: Tensor
    n: int
    d: int


def step_weights(model: Mixtral, released: list[_Released] | None = None) -> ModelWeights:
    """Every matrix packed: those of quantised parts as they are, others rounded to bf16.

    Given a list, each bf16 parameter is emptied once it is packed, and what it held is added there.
    """
    config, embedding = model.config, model.embedding.weight.detach()
    layers = tuple(_layer(block, config, released) for block in _blocks(model))
    if model.output is None:
        output = Weight(pack(embedding.to(torch.bfloat16), "bf16"), "bf16", config.vocab_size, config.dim)
    else:
        output = _linear(model.output, config.vocab_size, config.dim, released)
    return ModelWeights(embedding.contiguous(), layers, _fp32(model.norm.weight), output)


def _layer(block: Block, config: ModelConfig, released: list[_Released] | None) -> LayerWeights:
    heads_dim, kv_dim = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    ffn = block.ffn.experts if isinstance(block.ffn, MoE) else block.ffn
    w13, name = _packed(ffn, "w13", released)
    w2, _ = _packed(ffn, "w2", released)
    w13, w2 = w13.unflatten(0, (-1, 2)) if w13.dim() == 3 else w13, w2[None] if w2.dim() == 2 else w2
    experts = tuple(
        ExpertWeights(
            Weight(gate, name, config.ffn_dim, config.dim), Weight(up, name, config.ffn_dim, config.dim),
            Weight(down, name, config.dim, config.ffn_dim),
        )
        for (gate, up), down in zip(w13, w2, strict=True)
    )  # fmt: skip
    return LayerWeights(
        _fp32(block.attention_norm.weight), _fp32(block.ffn_norm.weight),
        _linear(block.attention.wqkv, heads_dim + 2 * kv_dim, config.dim, released),
        _linear(block.attention.wo, config.dim, heads_dim, released),
        _fp32(block.ffn.router.weight) if isinstance(block.ffn, MoE) else None, experts,
    )  # fmt: skip


def _linear(linear: nn.Module, n: int, d: int, released: list[_Released] | None) -> Weight:
    packed, name = _packed(linear, "weight", released)
    return Weight(packed, name, n, d)


def _packed(module: nn.Module, name: str, released: list[_Released] | None) -> tuple[Tensor, str]:
    """A module's matrix or stack of them, packed, and its format."""
    if isinstance(module, PackedLinear | PackedExperts | PackedFeedForward):
        return getattr(module, f"{name}_packed"), module.format.name
    parameter: nn.Parameter = getattr(module, name)
    packed = _pack_one_by_one(parameter.detach())
    if released is not None and parameter.dtype == torch.bfloat16:
        released.append(_Released(parameter, packed, *parameter.shape[-2:]))
        parameter.data = parameter.new_empty(0)
    return packed, "bf16"


def _pack_one_by_one(w: Tensor) -> Tensor:
    """[..., N, D] -> packed bf16; matrix by matrix, so that no second copy of a stack is ever whole."""
    if w.dim() == 2:
        return pack(w.to(torch.bfloat16), "bf16")
    first = _pack_one_by_one(w[0])
    packed = first.new_empty(len(w), *first.shape)
    packed[0] = first
    for i in range(1, len(w)):
        packed[i] = _pack_one_by_one(w[i])
    return packed


def _fp32(weight: Tensor) -> Tensor:
    return weight.detach().float().contiguous()
