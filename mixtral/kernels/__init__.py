"""Every op the model needs, each by name through one table (table.py): the only place where a backend is chosen.

`reference` defines what is correct: an op's meaning and shapes stand in reference.py. `torch` and `native` are fast;
ops.py registers each op for the compiler.
"""

from __future__ import annotations

from torch import Tensor

from mixtral.kernels import ops as registered
from mixtral.kernels import reference, table
from mixtral.kernels.native import library as native
from mixtral.kernels.table import Call, backends, choose, ops, use_backend
from mixtral.kernels.torch import attention as sdpa
from mixtral.kernels.torch import dense, dequantise, loss, permute
from mixtral.kernels.torch import experts as stacked
from mixtral.kernels.torch import packed_experts as packed_experts_

__all__ = [
    "Call", "attention", "backends", "choose", "combine", "cross_entropy", "experts", "experts_decode", "gather_rows",
    "linear", "log_sum_exp", "ops", "packed_experts", "packed_linear", "packed_swiglu",
    "paged_attention", "rms_norm", "rotary", "swiglu", "token_nll",
    "use_backend", "write_kv",
]  # fmt: skip


def linear(x_TD: Tensor, w_OD: Tensor) -> Tensor:
    return table.call("linear", x_TD, x_TD, w_OD)


def packed_linear(x_TD: Tensor, packed_bytes: Tensor, name: str, n: int) -> Tensor:
    """x W^T -> fp32 [T, n] for a packed W (packed.py) of the format `name`."""
    return table.call("packed_linear", x_TD, x_TD, packed_bytes, name, n)


def packed_swiglu(x_TD: Tensor, w13_packed: Tensor, w2_packed: Tensor, name: str, ffn_dim: int) -> Tensor:
    return table.call("packed_swiglu", x_TD, x_TD, w13_packed, w2_packed, name, ffn_dim)


def packed_experts(
    rows_ND: Tensor, counts_E: Tensor, w13_packed: Tensor, w2_packed: Tensor, name: str, ffn_dim: int
) -> Tensor:
    return table.call("packed_experts", rows_ND, rows_ND, counts_E, w13_packed, w2_packed, name, ffn_dim)


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


def cross_entropy(h_TD: Tensor, w_VD: Tensor, targets_T: Tensor, weights_T: Tensor | None = None) -> Tensor:
    return table.call("cross_entropy", h_TD, h_TD, w_VD, targets_T, weights_T)


def token_nll(h_TD: Tensor, w_VD: Tensor, targets_T: Tensor) -> Tensor:
    return table.call("token_nll", h_TD, h_TD, w_VD, targets_T)


def log_sum_exp(x_RN: Tensor) -> Tensor:
    return table.call("log_sum_exp", x_RN, x_RN)


def _register_all() -> None:
    why = "one launch for all experts"
    table.register("experts", "grouped", stacked.experts_grouped, why, stacked.grouped_supports)
    table.register("experts", "torch", stacked.experts_loop, "a product an expert, gradients written in place")
    table.register("experts_decode", "torch", stacked.experts_decode, "matrix-vector products, no sorting")
    table.register("linear", "torch", dense.linear, "F.linear, through fp32 where bf16 is slow")
    table.register("packed_linear", "native", native.packed_linear, "the C++ library", native.supports)
    table.register("packed_linear", "torch", dequantise.packed_linear, "expands a matrix for each product")
    table.register("packed_swiglu", "torch", packed_experts_.packed_swiglu, "gate and up in one packed product")
    table.register("packed_experts", "torch", packed_experts_.packed_experts, "two packed products an expert")
    table.register("swiglu", "torch", dense.swiglu, "gate and up in one product")
    table.register("rms_norm", "torch", dense.rms_norm, "backward by formula")
    table.register("rotary", "torch", dense.rotary, "backward is the opposite rotation")
    table.register("attention", "torch", sdpa.attention, "scaled_dot_product_attention")
    table.register("write_kv", "torch", sdpa.write_kv, "one indexed copy")
    table.register("paged_attention", "torch", sdpa.paged_attention, "scaled_dot_product_attention")
    table.register("gather_rows", "torch", permute.gather_rows, "gathers both ways, deterministic")
    table.register("combine", "torch", permute.combine, "gathers both ways, deterministic")
    table.register("cross_entropy", "torch", loss.cross_entropy, "fused with the output projection, by blocks")
    table.register("token_nll", "torch", loss.token_nll, "fused with the output projection, by blocks")
    table.register("log_sum_exp", "native", native.log_sum_exp, "the C++ library", native.supports_log_sum_exp)
    table.register("log_sum_exp", "torch", loss.log_sum_exp, "torch.logsumexp")
    for op in table.ops():
        table.register(op, "reference", getattr(reference, op), "the definition of correct")


_register_all()
registered.register_all()
