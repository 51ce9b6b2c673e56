"""Element-wise work through torch.compile: fewer passes over memory, for seconds of compiling in every process.

Used when it is asked for (`use_backend("compiled")`, `compile=true` in training), never by default: it pays on a long
run alone. Products and attention stay with the libraries that have them.

Legend: T tokens, D model width, H heads, C head width, F expert hidden width, E experts, N routed rows, n an expert's.
"""

from __future__ import annotations

import functools
import os
import shutil
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mixtral.kernels import reference
from mixtral.kernels.torch.experts import Pointwise, experts_loop


def supports(device: torch.device, dtype: torch.dtype) -> str:
    """See table.Supports."""
    del dtype
    compiler = os.environ.get("CXX", "g++")
    if device.type == "cpu" and shutil.which(compiler) is None:
        return f"torch.compile needs a C++ compiler and {compiler} is not installed"
    return ""


@functools.cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, dynamic=True)


def rms_norm(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """See reference.rms_norm."""
    out_TD: Tensor = _compiled(reference.rms_norm)(x_TD, weight_D, eps)
    return out_TD


def rotary(x_THC: Tensor, cos_TC: Tensor, sin_TC: Tensor) -> Tensor:
    """See reference.rotary."""
    out_THC: Tensor = _compiled(reference.rotary)(x_THC, cos_TC, sin_TC)
    return out_THC


def _hidden(h_n2F: Tensor) -> Tensor:
    gate_nF, up_nF = h_n2F.chunk(2, dim=-1)
    return gate_nF * gate_nF.sigmoid() * up_nF


def _hidden_backward(grad_nF: Tensor, h_n2F: Tensor) -> tuple[Tensor, Tensor]:
    gate_nF, up_nF = h_n2F.chunk(2, dim=-1)
    sigmoid_nF = gate_nF.sigmoid()
    silu_nF = gate_nF * sigmoid_nF
    grad_gate_nF = grad_nF * up_nF * (sigmoid_nF + silu_nF * (1 - sigmoid_nF))
    return silu_nF * up_nF, torch.cat((grad_gate_nF, grad_nF * silu_nF), dim=-1)


def experts(rows_ND: Tensor, counts_E: Tensor, w13_E2FD: Tensor, w2_EDF: Tensor) -> Tensor:
    """See reference.experts."""
    pointwise = Pointwise(_compiled(_hidden), _compiled(_hidden_backward))
    return experts_loop(rows_ND, counts_E, w13_E2FD, w2_EDF, pointwise)
