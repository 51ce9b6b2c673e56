"""Attention on torch's scaled_dot_product_attention: flash kernels, no [T, T] scores or masks.

Legend: T tokens, H query heads, G key/value heads, C head width, Q queries, S keys, B sequences of one length.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from mixtral.kernels.reference import visible
from mixtral.kernels.torch.matmul import upcasts


def _sdpa(q_QHC: Tensor, k_SGC: Tensor, v_SGC: Tensor, mask_QS: Tensor | None, causal: bool) -> Tensor:
    """One sequence, or B of one length when the inputs have a leading axis [B, Q, H, C] -> the shape of q."""
    q, k, v = (t.transpose(-3, -2) for t in (q_QHC, k_SGC, v_SGC))
    if q.dim() == 3:
        q, k, v = q[None], k[None], v[None]
    grouped = q.shape[1] != k.shape[1]
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask_QS, is_causal=causal, enable_gqa=grouped)
    return out.transpose(1, 2).reshape(q_QHC.shape)


def _windowed(q_QHC: Tensor, k_SGC: Tensor, v_SGC: Tensor, window: int) -> Tensor:
    """Causal attention with a window, in blocks of `window` queries: masks are [window, 2 * window] at most."""
    out, length = [], len(q_QHC)
    place = torch.arange(length, device=q_QHC.device)
    for begin in range(0, length, window):
        end, first = min(begin + window, length), max(0, begin - window + 1)
        mask = visible(place[begin:end], place[first:end], window)
        out.append(_sdpa(q_QHC[begin:end], k_SGC[first:end], v_SGC[first:end], mask, causal=False))
    return torch.cat(out)


def attention(q_THC: Tensor, k_TGC: Tensor, v_TGC: Tensor, cu_seqlens: Tensor, window: int | None) -> Tensor:
    """See reference.attention. Sequences of one length go as one batch, others one after another."""
    if upcasts(q_THC.device, q_THC.dtype):
        return attention(q_THC.float(), k_TGC.float(), v_TGC.float(), cu_seqlens, window).to(q_THC.dtype)
    ends = cu_seqlens.tolist()
    lengths = {end - begin for begin, end in pairwise(ends)}
    if len(lengths) == 1 and (window is None or max(lengths) <= window):
        shape = (len(ends) - 1, lengths.pop())
        q, k, v = (t.unflatten(0, shape) for t in (q_THC, k_TGC, v_TGC))
        return _sdpa(q, k, v, None, causal=True).flatten(0, 1)
    out = []
    for begin, end in pairwise(ends):
        q, k, v = q_THC[begin:end], k_TGC[begin:end], v_TGC[begin:end]
        if window is None or end - begin <= window:
            out.append(_sdpa(q, k, v, None, causal=True))
        else:
            out.append(_windowed(q, k, v, window))
    return torch.cat(out) if out else q_THC


def write_kv(pool_2GSC: Tensor, k_TGC: Tensor, v_TGC: Tensor, slots_T: Tensor) -> None:
    """See reference.write_kv."""
    pool_2GSC[:, :, slots_T] = torch.stack((k_TGC, v_TGC)).transpose(1, 2).to(pool_2GSC.dtype)


def paged_attention(
    q_THC: Tensor, pool_2GSC: Tensor, positions_T: Tensor, cu_seqlens: Tensor, block_tables: Tensor,
    context_lens: Tensor, block_size: int, window: int | None,
) -> Tensor:  # fmt: skip
    """See reference.paged_attention. One sequence after the other; blocks that follow each other are read in place."""
    out, ends, length_of = [], cu_seqlens.tolist(), context_lens.tolist()
    dtype = torch.float32 if upcasts(q_THC.device, q_THC.dtype) else q_THC.dtype
    for i, (begin, end) in enumerate(pairwise(ends)):
        length = length_of[i]
        oldest = 0 if window is None else max(0, length - (end - begin) - window + 1)
        k_GSC, v_GSC = _seen(pool_2GSC, block_tables[i], oldest, length, block_size).to(dtype)
        at = torch.arange(oldest, length, device=q_THC.device)
        mask = visible(positions_T[begin:end], at, window)
        k_SGC, v_SGC = k_GSC.transpose(0, 1), v_GSC.transpose(0, 1)
        out.append(_sdpa(q_THC[begin:end].to(dtype), k_SGC, v_SGC, mask, causal=False).to(q_THC.dtype))
    return torch.cat(out) if out else q_THC


def _seen(pool_2GSC: Tensor, table: Tensor, oldest: int, length: int, block_size: int) -> Tensor:
    """Keys and values of the positions oldest .. length - 1 -> [2, G, S, C], a view where their blocks are in a row."""
    first = oldest // block_size
    blocks = table[first : -(-length // block_size)].tolist()
    skipped, n = oldest - first * block_size, length - oldest
    start = blocks[0] if blocks else 0
    if blocks == list(range(start, start + len(blocks))):
        begin = start * block_size + skipped
        return pool_2GSC[:, :, begin : begin + n]
    paged = pool_2GSC.unflatten(2, (-1, block_size))[:, :, blocks].flatten(2, 3)
    return paged[:, :, skipped : skipped + n]
