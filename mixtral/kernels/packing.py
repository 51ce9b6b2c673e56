"""Packed weights in plain torch: the layout of every format, and the arithmetic that native code must reproduce.

A weight matrix W [N outputs, D inputs] serves x W^T. It is cut into blocks of 16 outputs ("lanes") and groups of 32
consecutive inputs; N and D are padded with zeros to whole blocks and groups. Packed, it is a contiguous little-endian
uint8 tensor [..., N/16, bytes of a block]; leading dimensions are stacked matrices. A block holds its groups in order:

    fp32   32 inputs x 16 lanes: 2048 bytes
    fp16   32 inputs x 16 lanes: 1024 bytes
    bf16   16 pairs of inputs x 16 lanes x 2 values: 1024 bytes
    int8    8 quads of inputs x 16 lanes x 4 bytes q + 128, then 16 fp16 scales: 544 bytes, 8.5 bits a weight
    int4    4 registers of 64 bytes, number j with quad j in its low nibbles and quad j + 4 in its high ones, each
           16 lanes x 4 of q + 8, then 16 fp16 scales: 288 bytes, 4.5 bits a weight

Lanes lie next to each other because dot-product instructions (VDPBF16PS, VPDPBUSD) sum pairs and quads inside a lane.
The same bytes serve every instruction set and every number of rows, and lie so in files.

Legend: N outputs, D inputs, T rows, G groups of 32 inputs.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mixtral.errors import UsageError, did_you_mean

LANES, GROUP = 16, 32
GROUP_BYTES = {"fp32": 2048, "fp16": 1024, "bf16": 1024, "int8": 544, "int4": 288}  # of a group in a block, with scales
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}  # of the formats without scales
_TOGETHER = {"fp32": 1, "fp16": 1, "bf16": 2}  # inputs that lie side by side in a lane
_OFFSET = {"int8": 128, "int4": 8}  # what is added to q, so that its bytes are unsigned
_MOST = {"int8": 127, "int4": 7}


def packed_shape(name: str, n: int, d: int) -> tuple[int, int]:
    """The shape of one packed matrix [n, d]: (blocks, bytes of a block). Raises UsageError for an unknown format."""
    if name not in GROUP_BYTES:
        raise UsageError(f"weight format: unknown name {name!r}; {did_you_mean(name, GROUP_BYTES)}")
    return math.ceil(n / LANES), math.ceil(d / GROUP) * GROUP_BYTES[name]


def pack(values_ND: Tensor, name: str, scale_NG: Tensor | None = None) -> Tensor:
    """Values [..., N, D] and their scales [..., N, G] -> uint8 [..., N/16, bytes of a block].

    `values_ND` has the dtype of fp32, fp16 or bf16; for the others it is int8 in -127..127 or -8..7 with scales
    (rounded to fp16): w = scale * q.
    Raises UsageError when dtypes, range or shapes are others.
    """
    n, d = values_ND.shape[-2:]
    shape = packed_shape(name, n, d)
    _check_values(values_ND, name, scale_NG)
    padded = torch.nn.functional.pad(values_ND, (0, -d % GROUP, 0, -n % LANES))
    if scale_NG is None:
        steps = padded.unflatten(-1, (-1, _TOGETHER[name])).unflatten(-3, (-1, LANES))  # [..., N/16, 16, D/2, 2]
        return steps.transpose(-3, -2).contiguous().view(torch.uint8).flatten(-3)
    quads = padded.unflatten(-1, (-1, 8, 4)).unflatten(-4, (-1, LANES)).movedim(-4, -2)  # [..., N/16, G, 8, 16, 4]
    unsigned = (quads.to(torch.int16) + _OFFSET[name]).to(torch.uint8)
    if name == "int4":
        unsigned = unsigned[..., :4, :, :] | unsigned[..., 4:, :, :] << 4
    scale = torch.nn.functional.pad(scale_NG.to(torch.float16), (0, 0, 0, -n % LANES))
    by_block = scale.unflatten(-2, (-1, LANES)).transpose(-2, -1).contiguous()  # [..., N/16, G, 16]
    groups = torch.cat((unsigned.flatten(-3), by_block.view(torch.uint8)), dim=-1)
    return groups.flatten(-2).view(*values_ND.shape[:-2], *shape)


def unpack(packed: Tensor, name: str, n: int, d: int) -> tuple[Tensor, Tensor | None]:
    """The inverse of `pack`: (values [..., n, d], None), or (q int8 [..., n, d], scales fp32 [..., n, G]).

    Raises UsageError when `packed` is not a packed [n, d] matrix, or several.
    """
    check_packed(packed, name, n, d)
    if name in DTYPES:
        values_ND = _steps(packed, name).transpose(-3, -2).flatten(-2).flatten(-3, -2)
        return values_ND[..., :n, :d].contiguous(), None
    groups = packed.unflatten(-1, (-1, GROUP_BYTES[name]))
    unsigned = groups[..., : -2 * LANES].unflatten(-1, (-1, LANES, 4))
    if name == "int4":
        unsigned = torch.cat((unsigned & 15, unsigned >> 4), dim=-3)
    q = (unsigned.to(torch.int16) - _OFFSET[name]).to(torch.int8)
    q_ND = q.movedim(-2, -4).flatten(-3).flatten(-3, -2)
    scale = groups[..., -2 * LANES :].contiguous().view(torch.float16).float()
    return q_ND[..., :n, :d].contiguous(), scale.transpose(-2, -1).flatten(-3, -2)[..., :n, :].contiguous()


def unpack_rows(packed: Tensor, name: str, n: int, d: int, ids_T: Tensor) -> Tensor:
    """Rows of one packed matrix, as an embedding reads them -> [T, d]: the format's dtype, or fp32 for int8 and int4.

    Raises UsageError when `packed` is not one packed [n, d] matrix.
    """
    if packed.dim() != 2:
        raise UsageError(f"packed rows: one matrix [blocks, bytes of a block] is wanted, not {list(packed.shape)}")
    check_packed(packed, name, n, d)
    block_T, lane_T = ids_T // LANES, ids_T % LANES
    if name in DTYPES:
        return _steps(packed, name)[block_T, :, lane_T].flatten(1)[:, :d]
    q_TLD, scale_TLG = unpack(packed[block_T, None], name, LANES, d)  # all lanes of each row's block
    assert scale_TLG is not None
    rows_T = torch.arange(len(ids_T))
    return q_TLD[rows_T, lane_T] * scale_TLG[rows_T, lane_T].repeat_interleave(GROUP, dim=-1)[:, :d]


def check_packed(packed: Tensor, name: str, n: int, d: int) -> None:
    """Raises UsageError unless `packed` holds one or more packed matrices [n, d]."""
    shape = packed_shape(name, n, d)
    if packed.dtype != torch.uint8 or tuple(packed.shape[-2:]) != shape:
        have = f"{_plain(packed.dtype)} {list(packed.shape)}"
        raise UsageError(f"packed {name} weight of {n} x {d}: must be uint8 [..., {shape[0]}, {shape[1]}], not {have}")


def _plain(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _steps(packed: Tensor, name: str) -> Tensor:
    """A view of a format without scales: [..., blocks, D / 2, 16 lanes, 2] for bf16, whose inputs lie in pairs."""
    return packed.contiguous().view(DTYPES[name]).unflatten(-1, (-1, LANES, _TOGETHER[name]))


def _check_values(values_ND: Tensor, name: str, scale_NG: Tensor | None) -> None:
    if (scale_NG is None) != (name in DTYPES):
        raise UsageError(f"packing {name}: scales are {'missing' if scale_NG is None else 'not part of this format'}")
    if scale_NG is None:
        if values_ND.dtype != DTYPES[name]:
            raise UsageError(f"packing {name}: values must be {_plain(DTYPES[name])}, not {_plain(values_ND.dtype)}")
        return
    low, high = (-_MOST[name] - (name == "int4"), _MOST[name])
    if values_ND.dtype != torch.int8 or (values_ND.numel() and not low <= values_ND.amin() <= values_ND.amax() <= high):
        raise UsageError(f"packing {name}: values must be int8 in {low}..{high}")
    want = (*values_ND.shape[:-1], math.ceil(values_ND.shape[-1] / GROUP))
    if tuple(scale_NG.shape) != want:
        raise UsageError(f"packing {name}: scales must have the shape {list(want)}, not {list(scale_NG.shape)}")


# -- the arithmetic ----------------------------------------------------------------------------------------------------


def packed_linear(x_TD: Tensor, packed: Tensor, name: str, n: int) -> Tensor:
    """x W^T in fp32 [T, n], W packed: every addition in the order, and with the rounding, that native code has.

    fp32, fp16: x in fp32 as it is; for each input acc = fma(x, w, acc).
    bf16: x rounded to bf16; for each pair of inputs acc = fma(x1, w1, acc), then fma(x0, w0, acc), as VDPBF16PS does.
    int8, int4: x quantised by group (`quantise_rows`); acc = fma(exact integer dot product, sx * sw, acc).
    Inputs, pairs and groups ascend. It is the oracle: slow, with a Python loop over the inputs.
    Raises UsageError when `packed` does not fit x and n.
    """
    values_ND, scale_NG = unpack(packed, name, n, x_TD.shape[1])
    acc_TN = torch.zeros(x_TD.shape[0], n)
    if scale_NG is None:
        x_TD, w_ND = (x_TD.to(torch.bfloat16) if name == "bf16" else x_TD).float(), values_ND.float()
        for d in sorted(range(x_TD.shape[1]), key=lambda d: (d // _TOGETHER[name], -d)):  # of a pair the second first
            acc_TN = fma(x_TD[:, d, None], w_ND[:, d], acc_TN)
        return acc_TN + 0.0 if x_TD.shape[1] % GROUP else acc_TN  # padding adds zeros, with which -0 becomes 0
    qx_TD, sx_TG = quantise_rows(x_TD)
    for g in range(sx_TG.shape[1]):
        inputs = slice(g * GROUP, (g + 1) * GROUP)
        dot_TN = qx_TD[:, inputs].int() @ values_ND[:, inputs].int().T
        acc_TN = fma(dot_TN.float(), sx_TG[:, g, None] * scale_NG[:, g], acc_TN)
    return acc_TN


def quantise_rows(x_TD: Tensor) -> tuple[Tensor, Tensor]:
    """Rows in int8 by groups of 32: (qx [T, D], sx fp32 [T, G]), x close to sx * qx.

    sx = max|x| / 127 and qx = x / sx rounded half to even, at most 127 in size; where sx is 0, so is qx.
    """
    t, d = x_TD.shape
    groups_TGi = torch.nn.functional.pad(x_TD.float(), (0, -d % GROUP)).view(t, math.ceil(d / GROUP), GROUP)
    sx_TG = groups_TGi.abs().amax(-1) / 127
    qx_TGi = (groups_TGi / torch.where(sx_TG == 0, 1, sx_TG)[..., None]).round().clamp(-127, 127)
    return qx_TGi.nan_to_num(0).to(torch.int8).flatten(1)[:, :d], sx_TG


def fma(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """a * b + c of fp32 tensors, rounded once to fp32.

    The product is exact in fp64. The sum is rounded there to odd (Boldo and Melquiond, "Emulation of FMA and
    correctly rounded sums", IEEE Trans. Computers 57(4), 2008): its last bit is set where anything was lost, so that
    the second rounding, to fp32, cannot fall on a tie that is none.
    """
    product, c = a.double() * b.double(), c.double()
    total = product + c
    back = total - product  # the error of a sum, exactly (Knuth's two-sum)
    lost = (product - (total - back)) + (c - back)
    bits = total.view(torch.int64)
    towards = torch.where((lost > 0) == (total > 0), 1, -1)
    odd = torch.where((lost != 0) & (bits % 2 == 0) & total.isfinite(), bits + towards, bits)
    return odd.view(torch.float64).float()
