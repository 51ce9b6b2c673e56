"""Activation checkpointing: recomputed, never re-routed (pytorch 171355, transformers 47467)."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from mixtral.model import Mixtral
from tests.model import small


def _keep_choice(_: Any, op: Any, *__: Any, **___: Any) -> CheckpointPolicy:
    chosen = op is torch.ops.mixtral.choose_experts.default
    return CheckpointPolicy.MUST_SAVE if chosen else CheckpointPolicy.PREFER_RECOMPUTE


def _checkpointed(model: Mixtral) -> Mixtral:
    contexts = functools.partial(create_selective_checkpoint_contexts, _keep_choice)
    for block in model.layers:
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False, context_fn=contexts)
    return model


def _loss(model: Mixtral) -> Tensor:
    batch = small.batch(50, 9, 7)
    return model(batch, targets=small.targets(batch, 50), loss_weights="mean").loss


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", small.SHAPES)
def test_loss_and_gradients_are_bit_identical(shape: str, dtype: torch.dtype) -> None:
    config = small.config(**{**small.SHAPES[shape], "vocab_size": 50})
    plain, saved = small.model(config).to(dtype), _checkpointed(small.model(config).to(dtype))
    losses = [_loss(model) for model in (plain, saved)]
    assert torch.equal(*losses)
    grads = [torch.autograd.grad(loss, list(m.parameters())) for loss, m in zip(losses, (plain, saved), strict=True)]
    for (name, _), a, b in zip(plain.named_parameters(), *grads, strict=True):
        assert torch.equal(a, b), name


def test_the_choice_is_saved_and_not_made_again() -> None:
    """Routers turned round between forward and backward would choose other experts, if they were asked again."""
    model = _checkpointed(small.model(small.config(n_experts=16, experts_per_token=1)))
    batch = small.batch(50, 6)
    out = model(batch, targets=small.targets(batch, 50), loss_weights="mean")
    for block in model.layers:
        block.ffn.router.weight.data.neg_()  # `.data`: unseen by autograd's version counter
    out.loss.backward()
    for block, routing in zip(model.layers, out.routing, strict=True):
        with_gradient = block.ffn.experts.w2.grad.flatten(1).any(-1).nonzero().flatten()
        assert with_gradient.tolist() == routing.experts_TK.unique().tolist()
