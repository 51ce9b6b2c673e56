"""Runners: what runs a model's forward pass for generation, with its pool of keys and values.

A runner may be used by several threads: each pass takes the pool's lock, and nothing is held between passes.

Legend: T tokens, R rows whose logits are wanted.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import torch
from torch import Tensor

from mixtral.config import ModelConfig
from mixtral.engine.pool import KVPool
from mixtral.model import Mixtral, Output, Ragged


class Runner(Protocol):
    """Runs batches that its pool has laid out."""

    name: str  # "torch" or "native"
    config: ModelConfig
    pool: KVPool
    device: torch.device

    def run(
        self, batch: Ragged, rows: Tensor | None = None, k: int | Tensor | None = None, keep_routing: bool = True
    ) -> Output:
        """One pass over a batch of `pool.batch`.

        Args:
            rows: int64 [R], the tokens whose logits are wanted; all by default.
            k: how many experts a token takes, in every layer: a number, or int64 [T].
            keep_routing: else `Output.routing` may be empty, which can save time.
        """
        ...

    def read(self, token_ids: list[int], k: int | None = None) -> Output:
        """One pass over a whole sequence: the logits and the routing of all its tokens. Nothing stays in the pool."""
        ...

    def cores(self) -> AbstractContextManager[None]:
        """Entered by whoever computes with torch between passes: keeps torch's threads out of the runner's way."""
        ...


class TorchRunner:
    """The model itself, on any device and with any parts."""

    name = "torch"

    def __init__(self, model: Mixtral, pool: KVPool | None = None) -> None:
        self.model, self.config = model, model.config
        self.device = model.embedding.device
        self.pool = KVPool(model.config, model.embedding.dtype, self.device) if pool is None else pool

    @torch.inference_mode()
    def run(
        self, batch: Ragged, rows: Tensor | None = None, k: int | Tensor | None = None, keep_routing: bool = True
    ) -> Output:
        """See Runner."""
        del keep_routing  # the model always has it
        with self.pool.lock:
            return self.model(batch, self.pool, rows=rows, k=k)

    @torch.no_grad()  # not inference_mode: what comes back is the caller's, to change as he likes
    def read(self, token_ids: list[int], k: int | None = None) -> Output:
        """See Runner."""
        return self.model(Ragged.of([token_ids], device=self.device), k=k)

    def cores(self) -> AbstractContextManager[None]:
        """See Runner."""
        return nullcontext()
