"""How long torch's idle threads spin. Apart from runtime.py because it has to be said before torch is imported."""

from __future__ import annotations

import os

CALM = {"GOMP_SPINCOUNT": "10000"}


def calm_idle_threads() -> None:
    """Let idle OpenMP threads spin for about 0.3 ms, not 10, unless the user has set the variable.

    libgomp reads it when torch is first imported. A thread that spins takes a core from what else computes: numpy's
    products (kernels/products.py), a neighbour's process (docs/log.md, 2026-11-22).
    """
    for name, value in CALM.items():
        os.environ.setdefault(name, value)
