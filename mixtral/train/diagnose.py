"""After a loss or gradient that is not finite: which layer it came from, and the batch that caused it, kept."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from mixtral.data.loader import TrainBatch
from mixtral.files import atomic_file
from mixtral.model import Mixtral
from mixtral.model.transformer import Block


def keep_batch(parts: Sequence[TrainBatch], folder: Path, step: int) -> Path:
    """Write a step's whole batch to FOLDER/nonfinite_step_N.safetensors: tokens, positions, targets, boundaries."""
    path = folder / f"nonfinite_step_{step:06d}.safetensors"
    tensors: dict[str, Tensor] = {}
    for i, (batch, targets_T, _) in enumerate(parts):
        tensors |= {f"{i}.tokens": batch.tokens_T, f"{i}.positions": batch.positions_T, f"{i}.targets": targets_T}
        tensors[f"{i}.cu_seqlens"] = batch.cu_seqlens
    with atomic_file(path, replace=True) as new:  # a run that went on from before this step wrote it already
        save_file(tensors, new)
    return path


@torch.no_grad()
def first_bad_layer(model: Mixtral, parts: Sequence[TrainBatch]) -> str:
    """Run the batch again, forward only -> where the first value that is not finite appears, in words."""
    found: list[str] = []

    def watch(name: str) -> Any:
        def hook(module: torch.nn.Module, inputs: Any, output: Any) -> None:
            del module, inputs
            x: Tensor = output[0] if isinstance(output, tuple) else output
            if not found and not x.isfinite().all():
                found.append(name)

        return hook

    watched: list[tuple[str, torch.nn.Module]] = [("the embedding", model.embedding)]
    for i, block in enumerate(model.layers):
        assert isinstance(block, Block)
        watched += [(f"layer {i}'s attention", block.attention), (f"layer {i}'s feed-forward", block.ffn)]
    handles = [module.register_forward_hook(watch(name)) for name, module in watched]
    try:
        for part in parts:
            part = part.to(model.embedding.device)
            model(part.batch, targets=part.targets_T, loss_weights="mean")
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else "the loss or the backward pass; every layer's output is finite"
