"""The definition of correct: every op in a few plain lines, in the order of its formula. Slow on purpose.

Legend: T tokens, D model width, F expert hidden width, E experts, K experts a token, N routed rows (T * K), H query
heads, G key/value heads, C head width, V vocabulary, Q queries, S keys.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mixtral.kernels.packing import packed_linear as packed_linear  # an op like the others, beside its layouts


def linear(x_TD: Tensor, w_OD: Tensor) -> Tensor:
    """x W^T -> [T, O]: summed in fp32, rounded once to the dtype of `x`."""
    return (x_TD.float() @ w_OD.float().T).to(x_TD.dtype)


def rms_norm(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """x / rms(x) * weight (arXiv 1910.07467); the mean square in fp32, rounded to `x`'s dtype before the weight."""
    x = x_TD.float()
    normed = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    return weight_D * normed.to(x_TD.dtype)


def rotary(x_THC: Tensor, cos_TC: Tensor, sin_TC: Tensor) -> Tensor:
    """Rotate each pair (i, i + C/2) by its position's angle (arXiv 2104.09864); cos and sin are [T, C/2]."""
    first, second = x_THC.chunk(2, dim=-1)
    cos, sin = cos_TC[:, None].to(x_THC.dtype), sin_TC[:, None].to(x_THC.dtype)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def attend(q_QHC: Tensor, k_SGC: Tensor, v_SGC: Tensor, visible_QS: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(C)) v over the visible keys of one sequence -> [Q, H, C]; query head h reads h // (H/G)."""
    repeats = q_QHC.shape[1] // k_SGC.shape[1]
    k_SHC, v_SHC = (t.float().repeat_interleave(repeats, dim=1) for t in (k_SGC, v_SGC))
    scores_HQS = torch.einsum("qhc,shc->hqs", q_QHC.float(), k_SHC) / q_QHC.shape[-1] ** 0.5
    weights_HQS = scores_HQS.masked_fill(~visible_QS, float("-inf")).softmax(-1)
    return torch.einsum("hqs,shc->qhc", weights_HQS, v_SHC).to(q_QHC.dtype)


def visible(q_positions_Q: Tensor, k_positions_S: Tensor, window: int | None) -> Tensor:
    """Which keys a query may see -> bool [Q, S]: itself and before, `window` positions in all if there is one."""
    distance = q_positions_Q[:, None] - k_positions_S[None, :]
    return (distance >= 0) if window is None else (distance >= 0) & (distance < window)


def attention(q_THC: Tensor, k_TGC: Tensor, v_TGC: Tensor, cu_seqlens: Tensor, window: int | None) -> Tensor:
    """Causal self-attention inside each packed sequence, never across two -> [T, H, C]."""
    out = []
    for begin, end in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True):
        place = torch.arange(end - begin, device=q_THC.device)
        out.append(attend(q_THC[begin:end], k_TGC[begin:end], v_TGC[begin:end], visible(place, place, window)))
    return torch.cat(out) if out else q_THC


def write_kv(pool_2GSC: Tensor, k_TGC: Tensor, v_TGC: Tensor, slots_T: Tensor) -> None:
    """Each token's key and value into its slot of the pool, in place."""
    for t, slot in enumerate(slots_T.tolist()):
        pool_2GSC[0, :, slot], pool_2GSC[1, :, slot] = k_TGC[t], v_TGC[t]


def paged_attention(
    q_THC: Tensor, pool_2GSC: Tensor, positions_T: Tensor, cu_seqlens: Tensor, block_tables: Tensor,
    context_lens: Tensor, block_size: int, window: int | None,
) -> Tensor:  # fmt: skip
    """Attention of each sequence's new tokens, at `positions_T`, over all its positions so far -> [T, H, C].

    Position p of sequence i lies in slot block_tables[i, p // block_size] * block_size + p % block_size of the pool,
    which holds keys and values in its own dtype; blocks that no token of the batch sees any more may be missing (-1).
    """
    out = []
    for i, length in enumerate(context_lens.tolist()):
        rows = slice(int(cu_seqlens[i]), int(cu_seqlens[i + 1]))
        oldest = 0 if window is None else max(0, length - (rows.stop - rows.start) - window + 1)
        seen = range(oldest, length)
        slots = [int(block_tables[i, p // block_size]) * block_size + p % block_size for p in seen]
        k_SGC, v_SGC = (t[:, slots].transpose(0, 1) for t in pool_2GSC)
        at = torch.tensor(seen, device=q_THC.device)
        out.append(attend(q_THC[rows], k_SGC, v_SGC, visible(positions_T[rows], at, window)))
    return torch.cat(out) if out else q_THC


def swiglu(x_TD: Tensor, w13_2FD: Tensor, w2_DF: Tensor) -> Tensor:
    """w2(silu(w1 x) * w3 x): one SwiGLU network (arXiv 2002.05202), no biases; w13 stacks gate (w1) and up (w3)."""
    gate_TF, up_TF = linear(x_TD, w13_2FD[0]), linear(x_TD, w13_2FD[1])
    return linear((torch.nn.functional.silu(gate_TF.float()) * up_TF.float()).to(x_TD.dtype), w2_DF)


def experts(rows_ND: Tensor, counts_E: Tensor, w13_E2FD: Tensor, w2_EDF: Tensor) -> Tensor:
    """Each expert on its own run of rows, which lie grouped by expert; rows past the last run give zeros -> [N, D]."""
    out, begin = [], 0
    for e, count in enumerate(counts_E.tolist()):
        out.append(swiglu(rows_ND[begin : begin + count], w13_E2FD[e], w2_EDF[e]))
        begin += count
    return torch.cat([*out, torch.zeros_like(rows_ND[begin:])])


def packed_swiglu(x_TD: Tensor, w13_packed: Tensor, w2_packed: Tensor, name: str, ffn_dim: int) -> Tensor:
    """swiglu of packed weights (packing.py): [2, blocks, bytes] and [blocks, bytes]; fp32 up to its output."""
    gate_TF, up_TF = (packed_linear(x_TD, w, name, ffn_dim) for w in w13_packed)
    return packed_linear(torch.nn.functional.silu(gate_TF) * up_TF, w2_packed, name, x_TD.shape[1]).to(x_TD.dtype)


def packed_experts(
    rows_ND: Tensor, counts_E: Tensor, w13_packed: Tensor, w2_packed: Tensor, name: str, ffn_dim: int
) -> Tensor:
    """experts of packed weights, [E, 2, blocks, bytes] and [E, blocks, bytes] -> [N, D]."""
    out, begin = [], 0
    for e, count in enumerate(counts_E.tolist()):
        rows = rows_ND[begin : begin + count]
        out.append(packed_swiglu(rows, w13_packed[e], w2_packed[e], name, ffn_dim))
        begin += count
    return torch.cat([*out, torch.zeros_like(rows_ND[begin:])])


def gather_rows(x_TD: Tensor, order_N: Tensor, place_TK: Tensor) -> Tensor:
    """Row n is the token of flat assignment order[n] (token * K + choice) -> [N, D]."""
    return x_TD[order_N // place_TK.shape[1]]


def combine(y_ND: Tensor, weights_TK: Tensor, order_N: Tensor, place_TK: Tensor) -> Tensor:
    """Sum over k of weight * expert output, in fp32 and in the order of the choices, then rounded -> [T, D]."""
    del order_N  # the fast backward needs it; the formula does not
    out_TD = torch.zeros(place_TK.shape[0], y_ND.shape[1], dtype=torch.float32, device=y_ND.device)
    for k in range(place_TK.shape[1]):
        out_TD = out_TD + weights_TK[:, k, None] * y_ND[place_TK[:, k]].float()
    return out_TD.to(y_ND.dtype)


def cross_entropy(h_TD: Tensor, w_VD: Tensor, targets_T: Tensor, weights_T: Tensor | None = None) -> Tensor:
    """The mean of `token_nll` over the tokens that have a target; 0 when there are none. With weights their sum of
    weight * nll."""
    nll_T = token_nll(h_TD, w_VD, targets_T)
    if weights_T is not None:
        return (nll_T * weights_T).sum()
    return nll_T.sum() / (targets_T != -100).sum().clamp(min=1)


def token_nll(h_TD: Tensor, w_VD: Tensor, targets_T: Tensor) -> Tensor:
    """-log softmax(h W^T)[target] of each token -> fp32 [T]; 0 where the target is -100, for none."""
    logits_TV = h_TD.float() @ w_VD.float().T
    return torch.nn.functional.cross_entropy(logits_TV, targets_T, ignore_index=-100, reduction="none")


def log_sum_exp(x_RN: Tensor) -> Tensor:
    """log of the sum of e^x along each row -> fp32 [R]; not finite when some number of a row is NaN or +infinity."""
    most_R1 = x_RN.float().amax(-1, keepdim=True)
    return (x_RN.float() - most_R1).exp().sum(-1).log() + most_R1[:, 0]


def experts_decode(x_TD: Tensor, weights_TK: Tensor, experts_TK: Tensor, w13_E2FD: Tensor, w2_EDF: Tensor) -> Tensor:
    """The sum over a token's experts of weight * expert(x), token by token; slots of expert -1 add nothing."""
    out = []
    for x_D, weights_K, experts_K in zip(x_TD, weights_TK, experts_TK.tolist(), strict=True):
        y_D = torch.zeros(x_D.shape, dtype=torch.float32, device=x_D.device)
        for weight, e in zip(weights_K, experts_K, strict=True):
            if e >= 0:
                y_D = y_D + weight * swiglu(x_D[None], w13_E2FD[e], w2_EDF[e])[0].float()
        out.append(y_D.to(x_TD.dtype))
    return torch.stack(out) if out else x_TD
