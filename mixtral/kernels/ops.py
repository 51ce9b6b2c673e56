"""Every op in torch.library, with a fake kernel and autograd: what torch.compile and fake tensors see of it.

Eager calls go straight to a backend (table.py): a registered op costs some microseconds a call, which a small model
would feel. Under the compiler `linear`, `swiglu`, `rms_norm` and `rotary` are plain torch for it to fuse; the others
are opaque. The gradient of a registered op runs the op again: its forward pass keeps nothing but its inputs.

torch.library.custom_op would import the compiler, three seconds, at its first call; the plain registry does not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mixtral.kernels import reference, table
from mixtral.kernels.torch import dense

_LIBRARY = torch.library.Library("mixtral", "FRAGMENT")


class Op(NamedTuple):
    """How an op is registered."""

    arguments: str  # in the schema language of torch.library
    fake: Callable[..., Tensor | None]  # the output without its data
    like: int = 0  # the argument with the device and dtype of the activations
    differentiable: tuple[int, ...] = ()  # the arguments that have gradients


def _like(n: int = 0) -> Callable[..., Tensor]:
    return lambda *args: torch.empty_like(args[n], memory_format=torch.contiguous_format)


def _fp32(*shape_of: tuple[int, int]) -> Callable[..., Tensor]:
    """fp32, each size that of (argument, axis)."""
    return lambda *args: args[0].new_empty([args[i].shape[axis] for i, axis in shape_of], dtype=torch.float32)


OPS: dict[str, Op] = {
    "linear": Op("Tensor x, Tensor w", lambda x, w: x.new_empty(*x.shape[:-1], w.shape[0]), 0, (0, 1)),
    "packed_linear": Op(
        "Tensor x, Tensor packed, str name, int n",
        lambda x, *rest: x.new_empty(x.shape[0], rest[2], dtype=torch.float32), 0, (0,),
    ),
    "packed_swiglu": Op("Tensor x, Tensor w13, Tensor w2, str name, int ffn_dim", _like(), 0, (0,)),
    "packed_experts": Op(
        "Tensor rows, Tensor counts, Tensor w13, Tensor w2, str name, int ffn_dim", _like(), 0, (0,),
    ),
    "swiglu": Op("Tensor x, Tensor w13, Tensor w2", _like(), 0, (0, 1, 2)),
    "rms_norm": Op("Tensor x, Tensor weight, float eps", _like(), 0, (0, 1)),
    "rotary": Op("Tensor x, Tensor cosines, Tensor sines", _like(), 0, (0,)),
    "attention": Op("Tensor q, Tensor k, Tensor v, Tensor cu_seqlens, int? window", _like(), 0, (0, 1, 2)),
    "write_kv": Op("Tensor(a!) pool, Tensor k, Tensor v, Tensor slots", lambda *_: None, 1),
    "paged_attention": Op(
        "Tensor q, Tensor pool, Tensor positions, Tensor cu_seqlens, Tensor block_tables, Tensor context_lens, "
        "int block_size, int? window", _like(), 0, (0,),
    ),
    "experts": Op("Tensor rows, Tensor counts, Tensor w13, Tensor w2", _like(), 0, (0, 2, 3)),
    "experts_decode": Op("Tensor x, Tensor weights, Tensor experts, Tensor w13, Tensor w2", _like()),
    "gather_rows": Op(
        "Tensor x, Tensor order, Tensor row", lambda x, *rest: x.new_empty(rest[0].shape[0], x.shape[1]), 0, (0,),
    ),
    "combine": Op(
        "Tensor y, Tensor weights, Tensor order, Tensor row",
        lambda y, *rest: y.new_empty(rest[2].shape[0], y.shape[1]), 0, (0, 1),
    ),
    "cross_entropy": Op("Tensor h, Tensor w, Tensor targets, Tensor? weights=None", _fp32(), 0, (0, 1)),
    "token_nll": Op("Tensor h, Tensor w, Tensor targets", _fp32((2, 0)), 0, (0, 1)),
    "log_sum_exp": Op("Tensor x", _fp32((0, 0))),
}  # fmt: skip

# Plain torch, which the compiler can look into and fuse.
_TRACED: dict[str, Callable[..., Any]] = {
    "linear": dense.linear, "swiglu": dense.swiglu, "rms_norm": reference.rms_norm, "rotary": reference.rotary,
}  # fmt: skip


def register_all() -> None:
    """Define, implement and fake each op, and its backward pass as an op of its own."""
    for name, op in OPS.items():
        _LIBRARY.define(f"{name}({op.arguments}) -> {'Tensor' if name != 'write_kv' else '()'}")
        _LIBRARY.impl(name, _forward(name, op), "CompositeExplicitAutograd")
        torch.library.register_fake(f"mixtral::{name}", op.fake, lib=_LIBRARY)
        if op.differentiable:
            _register_gradient(name, op)
        table.COMPILED[name] = _TRACED.get(name) or getattr(torch.ops.mixtral, name)


def _forward(name: str, op: Op) -> Callable[..., Any]:
    return lambda *args: table.run(name, args[op.like], *args)


def _register_gradient(name: str, op: Op) -> None:
    _LIBRARY.define(f"{name}_backward(Tensor grad, {op.arguments}) -> Tensor[]")

    def backward(grad: Tensor, *args: Any) -> list[Tensor]:
        """The gradients of the differentiable arguments, by running the op again."""
        leaves = {i: args[i].detach().requires_grad_() for i in op.differentiable}
        with torch.enable_grad():
            out = table.run(name, args[op.like], *(leaves.get(i, arg) for i, arg in enumerate(args)))
            found = torch.autograd.grad(out, list(leaves.values()), grad, materialize_grads=True)
        return [g.contiguous() for g in found]

    def fake(grad: Tensor, *args: Any) -> list[Tensor]:
        del grad
        return [_like(i)(*args) for i in op.differentiable]

    _LIBRARY.impl(f"{name}_backward", backward, "CompositeExplicitAutograd")
    torch.library.register_fake(f"mixtral::{name}_backward", fake, lib=_LIBRARY)

    def setup_context(ctx: Any, inputs: Sequence[Any], output: Tensor) -> None:
        del output
        ctx.rest = [None if isinstance(i, Tensor) else i for i in inputs]
        ctx.save_for_backward(*(i for i in inputs if isinstance(i, Tensor)))
        ctx.tensors = [isinstance(i, Tensor) for i in inputs]

    def gradient(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        saved = iter(ctx.saved_tensors)
        args = [next(saved) if tensor else rest for tensor, rest in zip(ctx.tensors, ctx.rest, strict=True)]
        found = dict(zip(op.differentiable, getattr(torch.ops.mixtral, f"{name}_backward")(grad, *args), strict=True))
        return tuple(found.get(i) for i in range(len(args)))

    torch.library.register_autograd(f"mixtral::{name}", gradient, setup_context=setup_context, lib=_LIBRARY)
