"""fp8 weights with the scales beside them, as files of plain ones: a weight is multiplied by its scale as it is read.

Scales lie beside a weight under a name of its own, in any of the files: one for the tensor, one for a row, or one for a
block of rows and columns. Those of activations are left out.

Legend: N rows, K columns of a weight, before them any number of axes (experts).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from mixtral.config.fp8 import Fp8, read_fp8
from mixtral.errors import ConfigError, WeightsError
from mixtral.json_files import read_object
from mixtral.weights.safetensors_file import FP8, Header
from mixtral.weights.shards import TensorFile

_OF_ACTIVATIONS = re.compile(r".+[._](input_scale|activation_scale|qscale_act|k_scale|v_scale|kv_scale|output_scale)")
_SUFFIXES = ("_scale_inv", "_scale")  # of a weight's own name: transformers and DeepSeek, compressed-tensors and vLLM


class ScaledFile:
    """A file some of whose weights are fp8. They count as bf16 where no dtype is asked for, and are read as fp32."""

    def __init__(self, file: TensorFile, scales: Mapping[str, tuple[TensorFile, str]], hidden: set[str], fp8: Fp8):
        self.path, self._file, self._scales, self._fp8 = file.path, file, scales, fp8
        self.headers = {
            name: Header(torch.bfloat16, *header[1:]) if name in scales else header
            for name, header in file.headers.items()
            if name not in hidden
        }
        for name in self.headers.keys() & scales.keys():
            scale_file, scale = scales[name]
            _layout(self.headers[name].shape, scale_file.headers[scale], fp8, f"{scale_file.path}: {scale}")

    def stream(self) -> Iterator[tuple[str, Tensor]]:
        """Each tensor in turn."""
        for name in self.headers:
            yield name, self.read(name)

    def read(self, name: str) -> Tensor:
        """One tensor, in memory of its own."""
        tensor = self._file.read(name)
        if name not in self._scales:
            return tensor
        file, scale = self._scales[name]
        return expand(tensor, file.read(scale).float(), self._fp8)


def with_scales(files: list[TensorFile], folder: Path) -> list[TensorFile]:
    """The files as they are, or where some weight is fp8 with the scales applied.

    Raises WeightsError, naming it, for a scale whose shape does not fit its weight. A weight without one stays fp8.
    """
    where = {name: file for file in files for name in file.headers}
    fp8 = [name for name, file in where.items() if file.headers[name].stored in FP8]
    if not fp8:
        return files
    scales = {name: (where[scale], scale) for name in fp8 for scale in _names(name) if scale in where}
    hidden = {scale for _, scale in scales.values()} | {name for name in where if _OF_ACTIVATIONS.fullmatch(name)}
    said = _said(folder)
    return [ScaledFile(file, scales, hidden, said) for file in files]


def expand(weight: Tensor, scale: Tensor, fp8: Fp8) -> Tensor:
    """weight [..., N, K] times its scale, one of `_layout`'s shapes -> fp32 [..., N, K]."""
    expanded = weight.float()
    if scale.numel() == 1:
        return expanded.mul_(scale.view(()))
    if scale.shape == _blocks(weight.shape, fp8):
        for axis, size in zip((-2, -1), fp8.block, strict=True):
            scale = scale.repeat_interleave(size, axis).narrow(axis, 0, weight.shape[axis])
        return expanded.mul_(scale)
    return expanded.mul_(scale.view(*scale.shape, *[1] * (weight.dim() - scale.dim())))


def _layout(weight: tuple[int, ...], scale: Header, fp8: Fp8, what: str) -> None:
    """Refuse a scale that is neither one number, nor one for each block, row or expert."""
    of_rows = [weight[:i] + (1,) * n for i in range(1, len(weight)) for n in range(len(weight) - i + 1)]
    right = scale.shape in ((), (1,), _blocks(weight, fp8), *of_rows)
    if scale.dtype is None or not scale.dtype.is_floating_point or not right:
        raise WeightsError(
            f"{what} is {scale.stored} {list(scale.shape)}; for a weight {list(weight)} one number, one for each row, "
            f"or {list(_blocks(weight, fp8))}, one for each block of {fp8.block[0]} x {fp8.block[1]}, is wanted"
        )


def _blocks(weight: tuple[int, ...], fp8: Fp8) -> tuple[int, ...]:
    if len(weight) < 2:
        return weight
    (rows, columns), (n, k) = fp8.block, weight[-2:]
    return (*weight[:-2], -(-n // rows), -(-k // columns))


def _names(weight: str) -> list[str]:
    """What the scale of a weight may be called."""
    return [*(weight + suffix for suffix in _SUFFIXES), weight.removesuffix("weight") + "qscale_weight"]


def _said(folder: Path) -> Fp8:
    """What the model's configuration says; transformers' blocks where it says nothing."""
    for name in ("config.json", "params.json"):
        try:
            found = read_fp8(read_object(folder / name))
        except ConfigError:  # what is wrong with it, read_config says
            continue
        if found:
            return found
    return Fp8((128, 128))
