"""Reading the tensors of a GGUF file, quantised ones expanded to fp32.

Plain types are read here; expanding the others is left to the gguf package, a few rows at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from mixtral.errors import UsageError, WeightsError
from mixtral.gguf.header import GgufHeader, TensorInfo, read_gguf
from mixtral.weights.safetensors_file import DTYPES, Header

_CHUNK = 1 << 24  # numbers that are expanded at a time


class GgufFile:
    """The tensors of one file. A quantised one counts as bf16 where the dtype is not asked for, and is read as fp32."""

    def __init__(self, path: Path, header: GgufHeader) -> None:
        self.path = path
        self._infos = header.tensors
        self.headers: dict[str, Header] = {
            name: Header(DTYPES.get(info.type.name, torch.bfloat16), info.type.name, info.shape)
            for name, info in header.tensors.items()
        }
        if any(info.type.name not in DTYPES for info in header.tensors.values()):
            gguf_package()  # missing: said before anything is allocated

    def stream(self) -> Iterator[tuple[str, Tensor]]:
        """Each tensor in turn."""
        for name in self._infos:
            yield name, self.read(name)

    def read(self, name: str) -> Tensor:
        """One tensor, in memory of its own."""
        info = self._infos[name]
        with self.path.open("rb") as file:
            file.seek(info.start)
            if (dtype := DTYPES.get(info.type.name)) is None:
                return self._expanded(file, info)
            return self._bytes(file, info.nbytes).view(dtype).view(info.shape)

    def _expanded(self, file: BinaryIO, info: TensorInfo) -> Tensor:
        gguf = gguf_package()
        kind = gguf.GGMLQuantizationType[info.type.name]
        row = info.shape[-1]
        out = torch.empty(info.shape).view(-1, row)
        rows = max(1, _CHUNK // row)
        for part in out.split(rows):
            raw = self._bytes(file, part.numel() // info.type.block * info.type.nbytes)
            with np.errstate(all="ignore"):  # a scale may be infinite or NaN, and then its block is
                part.copy_(torch.from_numpy(gguf.quants.dequantize(raw.view(len(part), -1).numpy(), kind)))
        return out.view(info.shape)

    def _bytes(self, file: BinaryIO, count: int) -> Tensor:
        raw = torch.empty(count, dtype=torch.uint8)
        if file.readinto(raw.numpy().data) != count:  # type: ignore[attr-defined]
            raise WeightsError(f"{self.path}: truncated while it was being read")
        return raw


def open_gguf(path: Path) -> list[GgufFile]:
    """All parts of a model; raises WeightsError as `read_gguf` does, UsageError where the gguf package is missing."""
    return [GgufFile(part, header) for part, header in read_gguf(path)]


def gguf_package(what: str = "reading quantised GGUF") -> Any:
    """The gguf package, which `what` needs; raises UsageError where it is not installed."""
    try:
        import gguf
    except ImportError as error:
        raise UsageError(f'{what} needs the gguf package: pip install "mixtral[gguf]"') from error
    return gguf
