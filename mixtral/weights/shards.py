"""Which files of a model folder hold its weights, and whether all of them are there."""

from __future__ import annotations

import heapq
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from torch import Tensor

from mixtral.errors import UsageError, WeightsError, shown
from mixtral.json_files import LARGE, read_object
from mixtral.weights.gguf_file import open_gguf
from mixtral.weights.names import Format
from mixtral.weights.safetensors_file import Header, SafetensorsFile
from mixtral.weights.torch_file import TorchFile

PACKED_FILE = "packed.safetensors"  # what `mixtral quantize` writes; quant/load.py reads it
_SINGLE, _INDEX, _NATIVE = "model.safetensors", "model.safetensors.index.json", "consolidated.safetensors"
_COUNTED = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.safetensors")  # counted from 1
_NUMBERED = re.compile(r"consolidated\.(?P<number>\d+)\.(safetensors|pth?)")  # counted from 0; how many is not said
_ADAPTERS = (  # Mistral's, PEFT's and MLX's
    *("lora.safetensors", "adapter_model.safetensors", "adapter_model.bin"),
    *("adapters.safetensors", "adapters.npz"),
)


class TensorFile(Protocol):
    """A file of tensors that says what it holds before it is read."""

    path: Path
    headers: dict[str, Header]

    def stream(self) -> Iterator[tuple[str, Tensor]]:
        """Each tensor in turn, valid until the next is asked for."""

    def read(self, name: str) -> Tensor:
        """One tensor."""


def detect_format(folder: str | Path) -> Format:
    """Which weights a model folder holds; Hugging Face's when it holds both. A file that ends in .gguf is one too.

    Raises UsageError when there is no such folder or it is quantised, WeightsError when it has no weights that we read.
    """
    folder = Path(folder)
    if folder.suffix == ".gguf" and os.path.exists(folder) and not folder.is_dir():
        return "gguf"
    if not os.path.isdir(folder):  # Path's own method raises for a name that is too long
        what = "a file" if os.path.exists(folder) else "no such folder"
        raise UsageError(f"{folder}: {what}; a model folder with its weights, or a .gguf file, is wanted")
    if (folder / _SINGLE).is_file() or (folder / _INDEX).is_file() or _counted(folder, "model"):
        return "hf"
    if (folder / _NATIVE).is_file() or _counted(folder, "consolidated") or _numbered(folder):
        return "mistral"
    if (folder / PACKED_FILE).is_file():
        raise UsageError(f"{folder}: quantised weights, good for running alone; give the folder they were made from")
    _refuse_adapters(folder)
    if pickles := sorted(path.name for path in folder.glob("pytorch_model*.bin")):
        why = "refused, as reading it can run code; convert it to model.safetensors in transformers (save_pretrained)"
        raise WeightsError(f"{folder / pickles[0]}: {why}")
    wanted = f"{_SINGLE}, {_INDEX}, {_NATIVE} or consolidated.NN.pt"
    raise WeightsError(f"{folder}: no weights that can be read; {wanted} is wanted")


def open_files(folder: Path, format: Format) -> list[TensorFile]:
    """The files of a model, their headers read. Raises WeightsError for one that is missing or damaged, by name."""
    if format == "gguf":
        return [*open_gguf(folder)]
    _refuse_adapters(folder)
    if format == "mistral":
        return [_open(path) for path in _native_paths(folder)]
    if (folder / _SINGLE).is_file():
        return [SafetensorsFile(folder / _SINGLE)]
    if (folder / _INDEX).is_file():
        return _open_indexed(folder)
    return [SafetensorsFile(path) for path in _complete(_counted(folder, "model"))]


def some(names: set[str] | list[str], count: int = 3) -> str:
    """The first few of many names."""
    first = ", ".join(shown(name)[1:-1] for name in heapq.nsmallest(count, names))
    return first if len(names) <= count else f"{first} and {len(names) - count} more"


def _open(path: Path) -> TensorFile:
    return SafetensorsFile(path) if path.suffix == ".safetensors" else TorchFile(path)


def _refuse_adapters(folder: Path) -> None:
    """Raise WeightsError where low-rank adapters lie beside the weights: without them the model is another one."""
    for name in _ADAPTERS:
        if (folder / name).is_file():
            raise WeightsError(f"{folder / name}: adapters are not applied; merge them into the weights, or remove it")


# -- shards that an index names ----------------------------------------------------------------------------------------


def _open_indexed(folder: Path) -> list[TensorFile]:
    shard_of = _read_index(folder / _INDEX)
    files: list[TensorFile] = []
    for shard in sorted(set(shard_of.values())):
        if Path(shard).name != shard:
            raise WeightsError(f"{folder / _INDEX}: a shard must be a file name, not {shard!r}")
        if not os.path.isfile(folder / shard):
            raise WeightsError(f"{folder / _INDEX}: points at {shard}, which is not there")
        file = SafetensorsFile(folder / shard)
        promised = {name for name, where in shard_of.items() if where == shard}
        if wrong := promised ^ file.headers.keys():
            raise WeightsError(f"{file.path}: does not hold what {_INDEX} says: {some(wrong)}")
        files.append(file)
    return files


def _read_index(path: Path) -> dict[str, str]:
    """Tensor name -> shard file name."""
    shard_of = read_object(path, WeightsError, LARGE).get("weight_map")
    if not isinstance(shard_of, dict) or not shard_of or not all(isinstance(s, str) for s in shard_of.values()):
        raise WeightsError(f'{path}: not an index; {{"weight_map": {{tensor: file}}}} is wanted')
    return shard_of


# -- shards that their own names count ---------------------------------------------------------------------------------


def _native_paths(folder: Path) -> list[Path]:
    if (folder / _NATIVE).is_file():
        return [folder / _NATIVE]
    if counted := _counted(folder, "consolidated"):
        return _complete(counted)
    paths = _numbered(folder)
    for number, path in enumerate(paths):
        if (found := int(_NUMBERED.fullmatch(path.name)["number"])) > number:  # type: ignore[index]
            digits = len(path.name.split(".")[1])
            raise WeightsError(f"{path}: consolidated.{number:0{digits}}{path.suffix} is missing before it")
        if found < number:
            raise WeightsError(f"{path}: {paths[number - 1].name} has the same number; one of the two is too much")
    return paths


def _numbered(folder: Path) -> list[Path]:
    """consolidated.00.pth, consolidated.01.pth, ..., in the order of their numbers."""
    found = [(match, path) for path in folder.glob("consolidated.*") if (match := _NUMBERED.fullmatch(path.name))]
    return [path for _, path in sorted(found, key=lambda pair: (int(pair[0]["number"]), pair[1].name))]


def _counted(folder: Path, stem: str) -> list[Path]:
    """Files named STEM-00001-of-00002.safetensors, whether or not all of them are there."""
    names = (_COUNTED.fullmatch(path.name) for path in folder.glob(f"{stem}-*"))
    return sorted(folder / match.string for match in names if match and match["stem"] == stem)


def _complete(paths: list[Path]) -> list[Path]:
    """`paths`, if they are all that their names count. Raises WeightsError, naming what is missing."""
    matches = [_COUNTED.fullmatch(path.name) for path in paths]
    counts = sorted({match["count"] for match in matches if match})
    folder, first = paths[0].parent, paths[0].name
    if len(counts) > 1:
        raise WeightsError(f"{folder}: shards of {counts[0]} and of {counts[1]} files, and no index; remove the others")
    stem, there = first.split("-")[0], {path.name for path in paths}
    wanted = [f"{stem}-{number:05d}-of-{counts[0]}.safetensors" for number in range(1, int(counts[0]) + 1)]
    if missing := [name for name in wanted if name not in there]:
        raise WeightsError(f"{folder}: of {int(counts[0])} shards {len(missing)} are missing: {some(missing)}")
    if extra := there - set(wanted):
        raise WeightsError(f"{folder}: shards that are not of these {int(counts[0])}: {some(extra)}")
    return paths
