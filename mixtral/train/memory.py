"""Whether the memory suffices for a run, checked before any is allocated: a system that runs out kills silently."""

from __future__ import annotations

from mixtral.errors import MixtralError
from mixtral.hardware import free_memory_bytes
from mixtral.runtime import choose_device
from mixtral.train.config import TrainConfig

BYTES_PER_PARAMETER = 12  # fp32 weight, its gradient, and one moment: the least of all optimisers (AdamW has two)


def least_bytes(config: TrainConfig) -> int:
    """The least that a run takes: weights, gradients, moments, and each layer's input for the tokens of a part.

    An under-estimate, so that no run that fits is refused: what a layer computes inside comes on top.
    """
    model = config.model
    tokens = config.tokens_per_step // config.accumulation
    return BYTES_PER_PARAMETER * model.n_params() + 2 * tokens * model.dim * model.n_layers


def check_memory(config: TrainConfig) -> None:
    """Raise MixtralError, with both numbers, when the device has less memory than the run takes at the least."""
    free = free_memory_bytes(choose_device(config.device))
    if (needed := least_bytes(config)) > free:
        raise MixtralError(
            f"train: {needed / 2**30:,.1f} GiB of memory are needed at the least, and {free / 2**30:,.1f} GiB are "
            "free; choose a smaller model, or fewer rows or a larger accumulation"
        )
