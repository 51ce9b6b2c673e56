"""Every op the model needs, each by name through one table (table.py): the only place where a backend is chosen.

`reference` defines what is correct; `torch` is the fast road, `compiled` one to be asked for. An op's meaning and
shapes stand in reference.py.
"""

from __future__ import annotations

from torch import Tensor

from mixtral.kernels import reference, table
from mixtral.kernels.native import library as native
from mixtral.kernels.table import backends, choose, ops, use_backend
from mixtral.kernels.torch import attention as sdpa
from mixtral.kernels.torch import compiled, dense, dequantise, loss, permute
from mixtral.kernels.torch import experts as stacked

__all__ = [
    "attention", "backends", "choose", "combine", "cross_entropy", "experts", "experts_decode",
    "gather_rows", "linear", "ops", "packed_linear", "paged_attention", "rms_norm", "rotary", "swiglu", "use_backend",
    "write_kv",
]  # fmt: skip


def linear(x_TD: Tensor, w_OD: Tensor) -> Tensor:
    return table.call("linear", x_TD, x_TD, w_OD)


def packed_linear(x_TD: Tensor, packed_bytes: Tensor, name: str, n: int) -> Tensor:
    """x W^T -> fp32 [T, n] for a packed W (packed.py) of the format `name`."""
    return table.call("packed_linear", x_TD, x_TD, packed_bytes, name, n)


def swiglu(x_TD: Tensor, w13_2FD: Tensor, w2_DF: Tensor) -> Tensor:
    return table.call("swiglu", x_TD, x_TD, w13_2FD, w2_DF)


def rms_norm(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    return table.call("rms_norm", x_TD, x_TD, weight_D, eps)


def rotary(x_THC: Tensor, cos_TC: Tensor, sin_TC: Tensor) -> Tensor:
    return table.call("rotary", x_THC, x_THC, cos_TC, sin_TC)


def attention(q_THC: Tensor, k_TGC: Tensor, v_TGC: Tensor, cu_seqlens: Tensor, window: int | None) -> Tensor:
    return table.call("attention", q_THC, q_THC, k_TGC, v_TGC, cu_seqlens, window)


def write_kv(pool_2GSC: Tensor, k_TGC: Tensor, v_TGC: Tensor, slots_T: Tensor) -> None:
    table.call("write_kv", k_TGC, pool_2GSC, k_TGC, v_TGC, slots_T)


def paged_attention(
    q_THC: Tensor, pool_2GSC: Tensor, positions_T: Tensor, cu_seqlens: Tensor, block_tables: Tensor,
    context_lens: Tensor, block_size: int, window: int | None,
) -> Tensor:  # fmt: skip
    paging = cu_seqlens, block_tables, context_lens, block_size
    return table.call("paged_attention", q_THC, q_THC, pool_2GSC, positions_T, *paging, window)


def experts(rows_ND: Tensor, counts_E: Tensor, w13_E2FD: Tensor, w2_EDF: Tensor) -> Tensor:
    return table.call("experts", rows_ND, rows_ND, counts_E, w13_E2FD, w2_EDF)


def experts_decode(x_TD: Tensor, weights_TK: Tensor, experts_TK: Tensor, w13_E2FD: Tensor, w2_EDF: Tensor) -> Tensor:
    return table.call("experts_decode", x_TD, x_TD, weights_TK, experts_TK, w13_E2FD, w2_EDF)


def gather_rows(x_TD: Tensor, order_N: Tensor, place_TK: Tensor) -> Tensor:
    return table.call("gather_rows", x_TD, x_TD, order_N, place_TK)


def combine(y_ND: Tensor, weights_TK: Tensor, order_N: Tensor, place_TK: Tensor) -> Tensor:
    return table.call("combine", y_ND, y_ND, weights_TK, order_N, place_TK)


def cross_entropy(h_TD: Tensor, w_VD: Tensor, targets_T: Tensor) -> Tensor:
    return table.call("cross_entropy", h_TD, h_TD, w_VD, targets_T)


def _register_all() -> None:
    why = "one launch for all experts"
    table.register("experts", "grouped", stacked.experts_grouped, why, stacked.grouped_supports)
    table.register("experts", "torch", stacked.experts_loop, "a product an expert, gradients written in place")
    table.register("experts_decode", "torch", stacked.experts_decode, "matrix-vector products, no sorting")
    table.register("linear", "torch", dense.linear, "F.linear, through fp32 where bf16 is slow")
    table.register("packed_linear", "native", native.packed_linear, "the C++ library", native.supports)
    table.register("packed_linear", "torch", dequantise.packed_linear, "expands a matrix for each product")
    table.register("swiglu", "torch", dense.swiglu, "gate and up in one product")
    table.register("rms_norm", "torch", dense.rms_norm, "backward by formula")
    table.register("rotary", "torch", dense.rotary, "backward is the opposite rotation")
    table.register("attention", "torch", sdpa.attention, "scaled_dot_product_attention")
    table.register("write_kv", "torch", sdpa.write_kv, "one indexed copy")
    table.register("paged_attention", "torch", sdpa.paged_attention, "scaled_dot_product_attention")
    table.register("gather_rows", "torch", permute.gather_rows, "gathers both ways, deterministic")
    table.register("combine", "torch", permute.combine, "gathers both ways, deterministic")
    table.register("cross_entropy", "torch", loss.cross_entropy, "fused with the output projection, by blocks")
    why = "element-wise work through torch.compile"
    for op in ("experts", "rms_norm", "rotary"):
        table.register(op, "compiled", getattr(compiled, op), why, compiled.supports)
    for op in table.ops():
        table.register(op, "reference", getattr(reference, op), "the definition of correct")


_register_all()
