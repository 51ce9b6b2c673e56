"""Whether the memory suffices for a run, checked before any is allocated: a system that runs out kills silently."""

from __future__ import annotations

import torch

from mixtral.errors import MixtralError
from mixtral.hardware import free_memory_bytes
from mixtral.runtime import choose_device
from mixtral.train.config import PretrainConfig

BYTES_PER_PARAMETER = 12  # fp32 weight, its gradient, and one moment: the least of all optimisers (AdamW has two)
BYTES_PER_TOKEN = 24  # of a batch: int64 ids, positions, targets
BYTES_PER_PART = 1024  # of a batch: four tensors as objects


def least_bytes(config: PretrainConfig) -> int:
    """The least that a run takes: weights, gradients, moments, and each layer's input for the tokens of a part.

    An under-estimate, so that no run that fits is refused: what a layer computes inside comes on top.
    """
    model = config.model
    tokens = config.tokens_per_step // config.accumulation
    return BYTES_PER_PARAMETER * model.n_params() + 2 * tokens * model.dim * model.n_layers


def batch_bytes(config: PretrainConfig) -> int:
    """The least that a step's batch takes of the machine's memory: all parts are made before the first is computed."""
    return BYTES_PER_TOKEN * config.tokens_per_step + BYTES_PER_PART * config.accumulation


def check_memory(config: PretrainConfig) -> None:
    """Raise MixtralError, with both numbers, when there is less memory than the run takes at the least."""
    remedy = "choose a smaller model, or fewer rows or a larger accumulation"
    _check(least_bytes(config), choose_device(config.device), remedy)
    _check(batch_bytes(config), torch.device("cpu"), "choose fewer rows, or a shorter context")


def _check(needed: int, device: torch.device, remedy: str) -> None:
    free = free_memory_bytes(device)
    if needed > free:
        raise MixtralError(
            f"train: {needed / 2**30:,.1f} GiB of memory are needed at the least, and {free / 2**30:,.1f} GiB are "
            f"free; {remedy}"
        )
