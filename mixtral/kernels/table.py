"""The table of ops: which backends implement each, what they support, and which one is used here and why.

A backend is chosen by device type and dtype alone, never by a race at run time: the same machine always takes the
same road, so that results repeat. Order of preference is the order of registration, `reference` always last.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch

from mixtral.errors import UsageError, did_you_mean

Supports = Callable[[torch.device, torch.dtype], str]


class Implementation(NamedTuple):
    """One backend's form of an op. `supports` returns "" when it can serve, else the reason why it cannot."""

    backend: str
    function: Callable[..., Any]
    supports: Supports
    why: str


class Choice(NamedTuple):
    """The implementation in use and the reason, as `mixtral doctor` prints them."""

    implementation: Implementation
    reason: str


_OPS: dict[str, list[Implementation]] = {}
_FORCED: ContextVar[str | None] = ContextVar("mixtral_backend", default=None)
_CHOSEN: dict[tuple[str, str, torch.dtype, str | None], Choice] = {}


def everywhere(device: torch.device, dtype: torch.dtype) -> str:
    """The `supports` of a backend without limits."""
    del device, dtype
    return ""


def register(op: str, backend: str, function: Callable[..., Any], why: str, supports: Supports = everywhere) -> None:
    """Add a backend for `op`, after those already there."""
    _OPS.setdefault(op, []).append(Implementation(backend, function, supports, why))


def ops() -> list[str]:
    return sorted(_OPS)


def backends(op: str) -> list[str]:
    return [i.backend for i in _OPS[op]]


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Inside the block every op that has backend `name` uses it, and raises where that backend cannot serve."""
    known = {i.backend for implementations in _OPS.values() for i in implementations}
    if name not in known:
        raise UsageError(f"unknown kernel backend {name!r}; {did_you_mean(name, known)}")
    token = _FORCED.set(name)
    try:
        yield
    finally:
        _FORCED.reset(token)


def choose(op: str, device: torch.device, dtype: torch.dtype) -> Choice:
    """The implementation of `op` for this device and dtype, with the reason for it."""
    forced = _FORCED.get()
    key = (op, device.type, dtype, forced)
    if key not in _CHOSEN:
        _CHOSEN[key] = _choose(op, device, dtype, forced)
    return _CHOSEN[key]


def _choose(op: str, device: torch.device, dtype: torch.dtype, forced: str | None) -> Choice:
    refused: list[str] = []
    for implementation in _OPS[op]:
        wanted = forced in (None, implementation.backend) or forced not in backends(op)
        if not wanted:
            continue
        reason = implementation.supports(device, dtype)
        if not reason:
            return Choice(implementation, "; ".join([implementation.why, *refused]))
        refused.append(f"not {implementation.backend}: {reason}")
    raise UsageError(f"op {op!r} on {device.type} in {dtype}: {'; '.join(refused)}")


def call(op: str, like: torch.Tensor, *args: Any) -> Any:
    """Run `op` with the backend chosen for the device and dtype of `like`."""
    return choose(op, like.device, like.dtype).implementation.function(*args)
