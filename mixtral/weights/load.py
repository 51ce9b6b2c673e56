"""Loading weights: every name and shape is checked against the table before the first tensor is read.

Our tensors are allocated once; foreign ones stream by and are copied into their slots, so the peak is the model plus
one tensor (`.pt` shards are memory-mapped: their pages are the system's to reclaim).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import reduce
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from mixtral.config import ModelConfig
from mixtral.errors import UsageError, WeightsError, shown
from mixtral.json_files import LARGE, read_object
from mixtral.weights.gguf_file import open_gguf
from mixtral.weights.lazy import LazyState
from mixtral.weights.names import Ffn, Format, Slot, fixed_dtype, layouts, output_name, parameter_shapes, slots
from mixtral.weights.progress import Progress, counter
from mixtral.weights.safetensors_file import Header, SafetensorsFile
from mixtral.weights.torch_file import TorchFile

_LISTED = 50_000  # tensors that are missing are told by name up to such a number: more than any model has
_LONG = 250  # characters of complaints: beyond, each names one tensor alone
_FLOATS = "F64, F32, F16 or BF16"
_SINGLE, _INDEX, _NATIVE = "model.safetensors", "model.safetensors.index.json", "consolidated.safetensors"
PACKED_FILE = "packed.safetensors"  # what `mixtral quantize` writes; quant/load.py reads it


class TensorFile(Protocol):
    """A file of tensors that tells what it holds before it is read."""

    path: Path
    headers: dict[str, Header]

    def stream(self) -> Iterator[tuple[str, Tensor]]:
        """Each tensor in turn, valid until the next is asked for."""

    def read(self, name: str) -> Tensor:
        """One tensor."""


def detect_format(folder: str | Path) -> Format:
    """Which weights a model folder holds; Hugging Face's when it holds both. A file that ends in .gguf is one too.

    Raises UsageError when there is no such folder, WeightsError when it has no weights that we read.
    """
    folder = Path(folder)
    if folder.suffix == ".gguf" and os.path.exists(folder) and not folder.is_dir():
        return "gguf"
    if not os.path.isdir(folder):  # Path's own method raises for a name that is too long
        raise UsageError(f"{folder}: no such folder; a model folder with its weights, or a .gguf file, is wanted")
    if (folder / _SINGLE).is_file() or (folder / _INDEX).is_file():
        return "hf"
    if _native_files(folder):
        return "mistral"
    if (folder / PACKED_FILE).is_file():
        raise WeightsError(f"{folder}: quantised weights, good for running alone; give the folder they were made from")
    wanted = f"{_SINGLE}, {_INDEX}, {_NATIVE} or consolidated.NN.pt"
    raise WeightsError(f"{folder}: no weights that can be read; {wanted} is wanted")


def load_state(
    folder: str | Path,
    config: ModelConfig,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
) -> dict[str, Tensor]:
    """Our parameters and buffers (names and shapes of `parameter_shapes`) from a model folder of any format.

    A dtype of None keeps the file's; buffers have their own. `progress` is called after each tensor. Raises
    WeightsError when tensors are missing, unknown, of the wrong shape or of a kind that we do not read, naming them, or
    when a file is damaged; nothing is allocated before that is known.
    """
    files, headers, found, output = _open(Path(folder), config)
    state = _allocate(headers, found, config, dtype, device)
    copy_of_embedding: Tensor | None = None
    done = counter(progress, "reading", sum(header.nbytes for header in headers.values()))
    for file in files:
        for name, tensor in file.stream():
            done(headers[name].nbytes)
            if name == output:
                copy_of_embedding = tensor.clone()  # compared below: the embedding itself may still be to come
                continue
            view = found[name].view(state[found[name].ours])
            view.copy_(tensor.reshape(view.shape))
    if copy_of_embedding is not None:
        _check_tied(state["embedding.weight"], copy_of_embedding, f"{folder}: {output}")
    return state


class StateReader(LazyState):
    """The tensors of a model folder or GGUF file, one at a time and in any order.

    Raises WeightsError as `load_state` does, before anything is read.
    """

    def __init__(self, folder: str | Path, config: ModelConfig) -> None:
        super().__init__(parameter_shapes(config))
        self._folder = Path(folder)
        files, self._headers, self._found, self._output = _open(self._folder, config)
        self._file_of = {name: file for file in files for name in file.headers}
        self._sources: dict[str, list[str]] = {}  # ours -> the foreign tensors that it is put together from
        for name, slot in self._found.items():
            self._sources.setdefault(slot.ours, []).append(name)

    def dtype(self, ours: str) -> torch.dtype:
        """The widest of the foreign tensors'."""
        return fixed_dtype(ours) or _widest([self._headers[name] for name in self._sources[ours]])

    def read(self, ours: str) -> Tensor:
        tensor = torch.empty(self.shapes[ours], dtype=self.dtype(ours))
        for name in self._sources[ours]:
            foreign = self._file_of[name].read(name)
            if name == self._output:
                _check_tied(tensor, foreign, f"{self._folder}: {name}")
                continue
            view = self._found[name].view(tensor)
            view.copy_(foreign.reshape(view.shape))
        return tensor


# -- which files -------------------------------------------------------------------------------------------------------


def _open(
    folder: Path, config: ModelConfig
) -> tuple[list[TensorFile], dict[str, Header], dict[str, Slot], str | None]:
    """The files, what they hold, where each tensor belongs, and the name of a tied output matrix if there is one."""
    format = detect_format(folder)
    files = _files(folder, format)
    headers = _merge(files)
    found = _match(headers, config, format, folder)
    return files, headers, found, output_name(format) if config.tie_embeddings else None


def _files(folder: Path, format: Format) -> list[TensorFile]:
    if format == "gguf":
        return [*open_gguf(folder)]
    return _open_hf(folder) if format == "hf" else [_open_native(path) for path in _native_files(folder)]


def _native_files(folder: Path) -> list[Path]:
    single = folder / _NATIVE
    return [single] if single.is_file() else sorted(
        path for path in folder.glob("consolidated.[0-9]*") if path.suffix in (".pt", ".pth")
    )


def _open_native(path: Path) -> TensorFile:
    return SafetensorsFile(path) if path.suffix == ".safetensors" else TorchFile(path)


def _open_hf(folder: Path) -> list[TensorFile]:
    if (folder / _SINGLE).is_file():
        return [SafetensorsFile(folder / _SINGLE)]
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
            raise WeightsError(f"{file.path}: does not hold what {_INDEX} says: {_some(wrong)}")
        files.append(file)
    return files


def _read_index(path: Path) -> dict[str, str]:
    """Tensor name -> shard file name."""
    shard_of = read_object(path, WeightsError, LARGE).get("weight_map")
    if not isinstance(shard_of, dict) or not shard_of or not all(isinstance(s, str) for s in shard_of.values()):
        raise WeightsError(f'{path}: not an index; {{"weight_map": {{tensor: file}}}} is wanted')
    return shard_of


# -- do they fit -------------------------------------------------------------------------------------------------------


def _merge(files: list[TensorFile]) -> dict[str, Header]:
    headers: dict[str, Header] = {}
    for file in files:
        if twice := headers.keys() & file.headers.keys():
            raise WeightsError(f"{file.path}: tensors that an earlier shard holds too: {_some(twice)}")
        headers |= file.headers
    return headers


def _match(headers: dict[str, Header], config: ModelConfig, format: Format, folder: Path) -> dict[str, Slot]:
    """The slots of the layout that the files are in; WeightsError unless each is filled by exactly one tensor."""
    candidates = [slots(config, format, ffn) for ffn in _possible(headers, config, format, folder)]
    found = max(candidates, key=lambda candidate: len(candidate.keys() & headers.keys()))
    if config.tie_embeddings and output_name(format) not in headers:
        del found[output_name(format)]
    if complaints := "; ".join(_complaints(headers, found, 3)):
        if len(complaints) > _LONG:
            complaints = "; ".join(_complaints(headers, found, 1))
        raise WeightsError(f"{folder}: the tensors do not fit the config: {complaints}")
    return found


def _possible(headers: dict[str, Header], config: ModelConfig, format: Format, folder: Path) -> list[Ffn]:
    """The layouts in which such files may hold such a model.

    A configuration of a few bytes may ask for any number of tensors: before they are listed by name, their number is
    held against that of the files.
    """
    least = {
        ffn: config.n_layers * (3 * config.n_experts if ffn == "per-expert" else 6) for ffn in layouts(config, format)
    }
    possible = [ffn for ffn, count in least.items() if count <= _LISTED + 10 * len(headers)]
    if not possible:
        shape = f"{config.n_layers:,} layers of {config.n_experts:,} experts"
        asked = f"the config asks for at least {min(least.values()):,} ({shape})"
        raise WeightsError(f"{folder}: {len(headers):,} tensors, where {asked}")
    return possible


def _complaints(headers: dict[str, Header], found: dict[str, Slot], names: int) -> list[str]:
    """What does not fit, with so many names each."""
    complaints = []
    if missing := found.keys() - headers.keys():
        complaints.append(f"{len(missing)} missing: {_some(missing, names)}")
    if unknown := headers.keys() - found.keys():
        complaints.append(f"{len(unknown)} unknown: {_some(unknown, names)}")
    common = found.keys() & headers.keys()
    if misshapen := [name for name in common if headers[name].shape != found[name].shape]:
        first = min(misshapen)
        shapes = f"{list(headers[first].shape)} where the config asks for {list(found[first].shape)}"
        complaints.append(f"{len(misshapen)} misshapen: {_some(misshapen, names)} ({first} is {shapes})")
    if foreign := [name for name in common if not _readable(headers[name].dtype, fixed_dtype(found[name].ours))]:
        stored = ", ".join(sorted({headers[name].stored for name in foreign}))
        wanted = "I64" if all(fixed_dtype(found[name].ours) == torch.int64 for name in foreign) else _FLOATS
        complaints.append(f"{len(foreign)} stored as {stored}, not as {wanted}: {_some(foreign, names)}")
    return complaints


def _readable(stored: torch.dtype | None, fixed: torch.dtype | None) -> bool:
    """Whether a tensor can be read as what it is to be: whole numbers as such, all others from any float dtype."""
    if stored is None:
        return False
    return stored == torch.int64 if fixed == torch.int64 else stored.is_floating_point


def _some(names: set[str] | list[str], count: int = 3) -> str:
    """The first few of many names."""
    first = ", ".join(shown(name)[1:-1] for name in sorted(names)[:count])
    return first if len(names) <= count else f"{first} and {len(names) - count} more"


# -- filling -----------------------------------------------------------------------------------------------------------


def _allocate(
    headers: dict[str, Header],
    found: dict[str, Slot],
    config: ModelConfig,
    dtype: torch.dtype | None,
    device: torch.device | str,
) -> dict[str, Tensor]:
    """Our tensors, empty. Without a dtype each takes the widest of those that it is put together from."""
    sources: dict[str, list[Header]] = {}
    for name, slot in found.items():
        sources.setdefault(slot.ours, []).append(headers[name])
    return {
        ours: torch.empty(shape, dtype=fixed_dtype(ours) or dtype or _widest(sources[ours]), device=device)
        for ours, shape in parameter_shapes(config).items()
    }


def _widest(sources: list[Header]) -> torch.dtype:
    return reduce(torch.promote_types, (header.dtype for header in sources if header.dtype is not None))


def _check_tied(embedding: Tensor, output: Tensor, what: str) -> None:
    if not torch.equal(embedding, output.to(embedding)):
        raise WeightsError(f"{what} differs from the embedding, and the config ties the two: untie them there")
