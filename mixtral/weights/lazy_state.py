"""A model's tensors that are made one at a time, for work that does not want them all in memory."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor


class LazyState(Mapping[str, Tensor], ABC):
    """Our parameters and buffers by name, each made when it is asked for; the one that was asked for last is kept."""

    def __init__(self, shapes: dict[str, tuple[int, ...]]) -> None:
        self.shapes = shapes
        self._last: tuple[str, Tensor] | None = None

    @abstractmethod
    def dtype(self, ours: str) -> torch.dtype:
        """What `read` returns."""

    @abstractmethod
    def read(self, ours: str) -> Tensor:
        """The tensor of that name, in new memory."""

    def slices(self, ours: str) -> Iterator[Tensor]:
        """The slices of a tensor along its first axis, in order: of a stack of experts, one expert at a time."""
        yield from self[ours]

    def described(self) -> dict[str, Tensor]:
        """Shapes and dtypes of all, as tensors without data."""
        return {name: torch.empty(shape, dtype=self.dtype(name), device="meta") for name, shape in self.shapes.items()}

    def __getitem__(self, ours: str) -> Tensor:
        if self._last is None or self._last[0] != ours:
            self._last = None  # so that the old one goes before the new one comes
            self._last = (ours, self.read(ours))
        return self._last[1]

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)
