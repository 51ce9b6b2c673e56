"""The table of ops: which backends implement each, what they support, and which one serves a call and why.

A backend is chosen by what a call looks like, never by a race at run time: the same call on the same machine always
takes the same one, so that results repeat. Order of preference is the order of registration, `reference` always last.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mixtral.errors import UsageError, did_you_mean


class Call(NamedTuple):
    """What a backend may ask about a call before it says whether it can serve it."""

    device: torch.device
    dtype: torch.dtype  # of the activations
    shapes: tuple[tuple[int, ...], ...] = ()  # of the tensors among its arguments, in their order
    needs_grad: bool = False


class Implementation(NamedTuple):
    """One backend's form of an op. `supports` returns "" when it can serve, else the reason; None: it always can."""

    backend: str
    function: Callable[..., Any]
    supports: Callable[[Call], str] | None
    why: str


class Choice(NamedTuple):
    """The implementation in use and the reason, as `mixtral doctor` prints them."""

    implementation: Implementation
    reason: str


_OPS: dict[str, list[Implementation]] = {}
COMPILED: dict[str, Callable[..., Any]] = {}  # what serves an op under the compiler and on fake tensors (ops.py)
forced: str | None = None  # the backend of `use_backend`


def register(
    op: str, backend: str, function: Callable[..., Any], why: str, supports: Callable[[Call], str] | None = None
) -> None:
    """Add a backend for `op`, after those already there."""
    _OPS.setdefault(op, []).append(Implementation(backend, function, supports, why))


def ops() -> list[str]:
    return sorted(_OPS)


def backends(op: str) -> list[str]:
    return [i.backend for i in _OPS[op]]


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Inside the block every op that has backend `name` uses it, in every thread, and raises where it cannot serve."""
    global forced
    known = {i.backend for implementations in _OPS.values() for i in implementations}
    if name not in known:
        raise UsageError(f"unknown kernel backend {name!r}; {did_you_mean(name, known)}")
    before, forced = forced, name
    try:
        yield
    finally:
        forced = before


def choose(op: str, call: Call) -> Choice:
    """The implementation of `op` for such a call, with the reason for it."""
    implementation, refused = _first_that_serves(op, call)
    return Choice(implementation, "; ".join([implementation.why, *refused]))


def _first_that_serves(op: str, call: Call) -> tuple[Implementation, list[str]]:
    refused: list[str] = []
    for implementation in _candidates(op):
        reason = implementation.supports(call) if implementation.supports else ""
        if not reason:
            return implementation, refused
        refused.append(f"not {implementation.backend}: {reason}")
    raise UsageError(f"op {op!r} on {call.device.type} in {call.dtype}: {'; '.join(refused)}")


def _candidates(op: str) -> list[Implementation]:
    if forced is None:
        return _OPS[op]
    return [i for i in _OPS[op] if i.backend == forced] or _OPS[op]


def run(op: str, like: Tensor, *args: Any) -> Any:
    """Run `op` with the backend that serves this call; `like` has the device and dtype of its activations."""
    first = _candidates(op)[0]
    if first.supports is None:
        return first.function(*args)
    tensors = [a for a in args if isinstance(a, Tensor)]
    needs_grad = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    wanted = Call(like.device, like.dtype, tuple([t.shape for t in tensors]), needs_grad)
    return _first_that_serves(op, wanted)[0].function(*args)


def call(op: str, like: Tensor, *args: Any) -> Any:
    """Run `op`: by `run`, or under the compiler and on tensors without data by its form for those."""
    if torch.compiler.is_compiling() or like.is_meta or hasattr(like, "fake_mode"):
        return COMPILED[op](*args)
    return run(op, like, *args)
