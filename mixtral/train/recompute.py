"""Activation checkpointing: a layer's activations are computed again in the backward pass instead of kept.

The choice of experts is kept, never made twice: recomputed logits may differ in the last bit, and near a tie a token
would then be sent to another expert than the one its gradient belongs to.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from mixtral.model import Mixtral


def recompute_layers(model: Mixtral) -> Mixtral:
    """Make every layer of `model` checkpoint itself (arXiv 1604.06174), in place; loss and gradients stay bit-equal."""
    for block in model.layers:
        contexts = functools.partial(create_selective_checkpoint_contexts, _policy)
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False, context_fn=contexts)
    return model


def _policy(context: Any, op: Any, *args: Any, **options: Any) -> CheckpointPolicy:
    del context, args, options
    choice = op == torch.ops.mixtral.choose_experts.default
    return CheckpointPolicy.MUST_SAVE if choice else CheckpointPolicy.PREFER_RECOMPUTE
