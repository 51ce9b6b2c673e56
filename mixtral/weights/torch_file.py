"""Reading a `.pt` or `.pth` shard: a dictionary of tensors, memory-mapped, and never any code from the file."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mixtral.errors import WeightsError, shown
from mixtral.files import open_regular
from mixtral.weights.safetensors_file import DTYPES, Header

_MOST_RECORDS = 1_000_000
_MOST_NAMES = 64 << 20  # bytes of the record that names the tensors: the only one that is not mapped


class TorchFile:
    """The names and shapes in a shard, and its tensors as a stream.

    Raises WeightsError when the file is damaged, or holds anything but a flat dictionary of tensors.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.headers: dict[str, Header] = {}
        size = _check_archive(path)
        for name, tensor in self._load().items():
            if not isinstance(name, str) or not isinstance(tensor, Tensor):
                kind = type(tensor).__name__
                raise WeightsError(f"{path}: {shown(name)} is a {kind}; names with tensors are wanted")
            if tensor.layout != torch.strided or tensor.nbytes > min(size, tensor.untyped_storage().nbytes()):
                raise WeightsError(f"{path}: {shown(name)} is no plain tensor with its numbers in the file")
            known = tensor.dtype if tensor.dtype in DTYPES.values() else None
            self.headers[name] = Header(known, str(tensor.dtype), tuple(tensor.shape))
        if (promised := sum(header.nbytes for header in self.headers.values())) > 2 * size:  # 2: some may be shared
            raise WeightsError(f"{path}: its {size:,} bytes cannot hold the {promised:,} bytes of its tensors")

    def stream(self) -> Iterator[tuple[str, Tensor]]:
        """Each tensor in turn, mapped from the file."""
        yield from self._load().items()

    def read(self, name: str) -> Tensor:
        """One tensor, mapped from the file."""
        return self._load()[name]

    def _load(self) -> dict[Any, Any]:
        try:
            tensors = torch.load(self.path, map_location="cpu", weights_only=True, mmap=True)
        except Exception as error:  # torch raises half a dozen kinds for damaged files, some of them private
            reason = str(error).split("\n", 1)[0].rstrip(".")
            raise WeightsError(f"{self.path}: not a readable torch file of plain tensors: {reason}") from None
        if not isinstance(tensors, dict):
            raise WeightsError(f"{self.path}: must hold a dictionary of tensors, not a {type(tensors).__name__}")
        return tensors


def _check_archive(path: Path) -> int:
    """The size of the file, a zip archive that is no bomb: nothing in it is compressed, or lies outside it.

    Raises WeightsError for anything else: torch expands what is compressed before it looks at it.
    """
    what = f"{path}: not a readable torch file of plain tensors"
    try:
        with open_regular(path) as file, zipfile.ZipFile(file) as archive:
            size = os.fstat(file.fileno()).st_size
            records = archive.infolist()
    except OSError as error:
        raise WeightsError(f"{path}: cannot be read: {error.strerror or error}") from None
    except (ValueError, NotImplementedError, zipfile.BadZipFile, zipfile.LargeZipFile) as error:
        raise WeightsError(f"{what}: {error}") from None
    if any(record.compress_type != zipfile.ZIP_STORED for record in records):
        raise WeightsError(f"{what}: it is compressed")
    names = max((record.file_size for record in records if record.filename.endswith(".pkl")), default=0)
    if sum(record.file_size for record in records) > size or len(records) > _MOST_RECORDS or names > _MOST_NAMES:
        raise WeightsError(f"{what}: its records are larger than the file, or too many")
    return size
