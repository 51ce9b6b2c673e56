"""Reading a `.pt` or `.pth` shard: a dictionary of tensors, memory-mapped, and never any code from the file."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from mixtral.errors import WeightsError
from mixtral.weights.safetensors_file import DTYPES, Header


class TorchFile:
    """The names and shapes in a shard, and its tensors as a stream.

    Raises WeightsError when the file is damaged, or holds anything but a flat dictionary of tensors.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.headers: dict[str, Header] = {}
        for name, tensor in self._load().items():
            if not isinstance(name, str) or not isinstance(tensor, Tensor):
                raise WeightsError(f"{path}: {name!r} is a {type(tensor).__name__}; names with tensors are wanted")
            known = tensor.dtype if tensor.dtype in DTYPES.values() else None
            self.headers[name] = Header(known, str(tensor.dtype), tuple(tensor.shape))

    def stream(self) -> Iterator[tuple[str, Tensor]]:
        """Each tensor in turn, mapped from the file."""
        yield from self._load().items()

    def read(self, name: str) -> Tensor:
        """One tensor, mapped from the file."""
        return self._load()[name]

    def _load(self) -> dict[str, Tensor]:
        try:
            tensors = torch.load(self.path, map_location="cpu", weights_only=True, mmap=True)
        except Exception as error:  # torch raises half a dozen kinds for damaged files, some of them private
            reason = str(error).split("\n", 1)[0].rstrip(".")
            raise WeightsError(f"{self.path}: not a readable torch file of plain tensors: {reason}") from None
        if not isinstance(tensors, dict):
            raise WeightsError(f"{self.path}: must hold a dictionary of tensors, not a {type(tensors).__name__}")
        return tensors
