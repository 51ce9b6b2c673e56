"""What routing alone does not show: how large the outputs of each expert are.

An expert can receive its share of tokens and still be dead, its outputs having faded to nothing.

Legend: N routed rows, D model width, E experts.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from mixtral.model import Mixtral
from mixtral.moe import MoE


@contextlib.contextmanager
def expert_output_norms(model: Mixtral) -> Iterator[list[Tensor]]:
    """Inside the block every forward pass fills the list: fp32 [E] a layer, the mean norm of each expert's rows.

    Rows are those computed, without what a capacity dropped; experts are whatever stands in the layer.
    """
    layers = [module.experts for module in model.modules() if isinstance(module, MoE)]
    norms: list[Tensor] = [torch.empty(0)] * len(layers)

    def watch(layer: int) -> Any:
        def hook(module: nn.Module, inputs: tuple[Tensor, Tensor], y_ND: Tensor) -> None:
            del module
            norms[layer] = mean_row_norms(y_ND.detach(), inputs[1])

        return hook

    handles = [experts.register_forward_hook(watch(layer)) for layer, experts in enumerate(layers)]
    compiled = [block._compiled_call_impl for block in model.layers]
    for block in model.layers:
        block._compiled_call_impl = None  # compiled code does not see hooks that were added after it
    try:
        yield norms
    finally:
        for handle in handles:
            handle.remove()
        for block, call in zip(model.layers, compiled, strict=True):
            block._compiled_call_impl = call


def mean_row_norms(y_ND: Tensor, counts_E: Tensor) -> Tensor:
    """Mean Euclidean norm of each expert's run of rows -> fp32 [E]; 0 for an expert without rows."""
    ends_E = counts_E.cumsum(0)
    total_N = torch.nn.functional.pad(y_ND.float().norm(dim=1).cumsum(0, dtype=torch.float64), (1, 0))
    return ((total_N[ends_E] - total_N[ends_E - counts_E]) / counts_E.clamp(min=1)).float()
