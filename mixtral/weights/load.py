"""Loading weights: every name and shape is checked against the table before the first tensor is read.

Our tensors are allocated once; foreign ones stream by and are copied into their slots, so the peak is the model plus
one tensor (`.pt` shards are memory-mapped: their pages are the system's to reclaim).
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from functools import reduce
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from mixtral.config import ModelConfig
from mixtral.errors import WeightsError
from mixtral.weights.finite import require_range
from mixtral.weights.lazy_state import LazyState
from mixtral.weights.names import Ffn, Format, Slot, fixed_dtype, layouts, output_name, parameter_shapes, slots
from mixtral.weights.progress import Progress, counter
from mixtral.weights.safetensors_file import DTYPES, Header
from mixtral.weights.scaled import with_scales
from mixtral.weights.shards import TensorFile, detect_format, open_files, some

log = logging.getLogger(__name__)

_LISTED = 50_000  # missing tensors are named up to such a number: more than any model has
_LONG = 250  # characters of complaints: beyond, each names one tensor alone
_FLOATS = "F64, F32, F16 or BF16"
# Rotary frequencies in old files; they follow from the configuration, which counts here as in transformers.
_FREQUENCIES = {"hf": r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq", "mistral": r"rope\.freqs"}


def load_state(
    folder: str | Path,
    config: ModelConfig,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
    opened: Opened | None = None,
) -> dict[str, Tensor]:
    """Our parameters and buffers (names and shapes of `parameter_shapes`) from a model folder of any format.

    A dtype of None keeps the file's; buffers have their own. `progress` is called after each tensor; `opened` is what
    `open_weights` gave for the same folder and config, where that was asked before.

    Raises WeightsError when tensors are missing, unknown, of the wrong shape or of a kind that we do not read, naming
    them, or when a file is damaged; nothing is allocated before that is known. WeightsError too for a weight that is
    too large for the dtype.
    """
    files, headers, found, output = opened or open_weights(folder, config)
    state = _allocate(headers, found, config, dtype, device)
    copy_of_embedding: Tensor | None = None
    done = counter(progress, "reading", sum(header.nbytes for header in headers.values()))
    for file in files:
        for name, tensor in file.stream():
            if name not in headers:  # rotary frequencies
                continue
            done(headers[name].nbytes)
            if name == output:
                copy_of_embedding = tensor.clone()  # compared below: the embedding itself may still be to come
                continue
            view = found[name].view(state[found[name].ours])
            require_range(name, tensor, view.dtype)
            view.copy_(tensor.reshape(view.shape))
    if copy_of_embedding is not None:
        _check_tied(state["embedding.weight"], copy_of_embedding, f"{folder}: {output}")
    return state


class StateReader(LazyState):
    """The tensors of a model folder or GGUF file, one at a time and in any order.

    Args:
        opened: as of `load_state`.
        wanted_dtype: of what is read; None: the file's. Buffers have their own.
        exact: without a wanted dtype, what the file holds quantised is read as fp32, which is exact, instead of bf16.

    Raises WeightsError as `load_state` does, before anything is read.
    """

    def __init__(
        self, folder: str | Path, config: ModelConfig, opened: Opened | None = None,
        wanted_dtype: torch.dtype | None = None, exact: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(parameter_shapes(config))
        self._folder, self.wanted_dtype, self._exact = Path(folder), wanted_dtype, exact
        files, self._headers, self._found, self._output = opened or open_weights(folder, config)
        self._file_of = {name: file for file in files for name in file.headers}
        self._sources: dict[str, list[str]] = {}  # ours -> the foreign tensors that it is put together from
        for name, slot in self._found.items():
            self._sources.setdefault(slot.ours, []).append(name)

    def dtype(self, ours: str) -> torch.dtype:
        """The wanted one, or the widest of the foreign tensors'."""
        sources = self._sources[ours]
        fixed = self._found[sources[0]].fixed_dtype
        if (decided := fixed or self.wanted_dtype) is not None:
            return decided
        return self.exact_dtype(ours) if self._exact else _widest([self._headers[name] for name in sources])

    def exact_dtype(self, ours: str) -> torch.dtype:
        """One that holds what the file says: fp32 for what is quantised there."""
        headers = [self._headers[name] for name in self._sources[ours]]
        if any(header.stored not in DTYPES for header in headers):
            return torch.float32
        return _widest(headers)

    def read(self, ours: str) -> Tensor:
        tensor = torch.empty(self.shapes[ours], dtype=self.dtype(ours))
        for name in self._sources[ours]:
            if name == self._output:
                _check_tied(tensor, self._file_of[name].read(name), f"{self._folder}: {name}")
            else:
                self._fill(name, self._found[name].view(tensor))
        return tensor

    def slices(self, ours: str) -> Iterator[Tensor]:
        """See LazyState; only one slice is in memory, but where one foreign tensor holds parts of several."""
        whole = torch.empty(self.shapes[ours], device="meta")
        size = whole[0].numel()
        views = {name: self._found[name].view(whole) for name in self._sources[ours]}
        if self._output in views or any(view.storage_offset() % size + _extent(view) > size for view in views.values()):
            yield from super().slices(ours)
            return
        for i in range(len(whole)):
            part = torch.empty(whole.shape[1:], dtype=self.dtype(ours))
            for name, view in views.items():
                if view.storage_offset() // size == i:
                    self._fill(name, part.as_strided(view.shape, view.stride(), view.storage_offset() % size))
            yield part

    def _fill(self, name: str, view: Tensor) -> None:
        foreign = self._file_of[name].read(name)
        require_range(name, foreign, view.dtype)
        view.copy_(foreign.reshape(view.shape))


# -- which files -------------------------------------------------------------------------------------------------------


class Opened(NamedTuple):
    """The files of a model, checked against its configuration; no tensor is read yet."""

    files: list[TensorFile]
    headers: dict[str, Header]  # what they hold
    found: dict[str, Slot]  # where each tensor belongs
    output: str | None  # the name of a tied output matrix, if there is one


def open_weights(folder: str | Path, config: ModelConfig) -> Opened:
    """Raises WeightsError as `load_state` does, before anything is read."""
    folder = Path(folder)
    format = detect_format(folder)
    files = with_scales(open_files(folder, format), folder)
    headers = _without_frequencies(_merge(files), files, config, format)
    found = _match(headers, config, format, folder)
    return Opened(files, headers, found, output_name(format) if config.tie_embeddings else None)


# -- do they fit -------------------------------------------------------------------------------------------------------


def _merge(files: list[TensorFile]) -> dict[str, Header]:
    headers: dict[str, Header] = {}
    for file in files:
        if twice := headers.keys() & file.headers.keys():
            raise WeightsError(f"{file.path}: tensors that an earlier shard holds too: {some(twice)}")
        headers |= file.headers
    return headers


def _without_frequencies(
    headers: dict[str, Header], files: list[TensorFile], config: ModelConfig, format: Format
) -> dict[str, Header]:
    """The headers of all but rotary frequencies. Says once that there are any, and which differ from rope_theta's."""
    pattern, half = _FREQUENCIES.get(format, "(?!)"), config.head_dim // 2
    names = [name for name, header in headers.items()
             if re.fullmatch(pattern, name) and header.shape == (half,) and _readable(header.dtype, None)]  # fmt: skip
    if not names:
        return headers
    exact = config.rope_theta ** (-torch.arange(half, dtype=torch.float64) / half)
    file_of = {name: file for file in files for name in file.headers}
    # what is rounded to bf16 is off by 2^-9; another base is seen in the last frequency most
    wrong = [n for n in names if not torch.allclose(file_of[n].read(n).double(), exact, rtol=2**-7, atol=1e-6)]
    if wrong:
        log.warning("%s: rotary frequencies that are not those of rope_theta %g, which counts: %s",
                    file_of[wrong[0]].path, config.rope_theta, some(wrong))  # fmt: skip
    log.info("%d tensors of rotary frequencies are not read: they follow from rope_theta", len(names))
    return {name: header for name, header in headers.items() if name not in set(names)}


def _match(headers: dict[str, Header], config: ModelConfig, format: Format, folder: Path) -> dict[str, Slot]:
    """The slots of the layout that the files are in; WeightsError unless each is filled by exactly one tensor."""
    candidates = [slots(config, format, ffn) for ffn in _possible(headers, config, format, folder)]
    found = max(candidates, key=lambda candidate: len(candidate.keys() & headers.keys()))
    if config.tie_embeddings and output_name(format) not in headers:
        del found[output_name(format)]
    if lora := [name for name in headers.keys() - found.keys() if ".lora_" in name]:
        what = f"{folder}: LoRA tensors that are not merged into the weights: {some(lora)}"
        raise WeightsError(f"{what}; merge them first")
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
        ffn: 3 * sum(config.experts_by_layer or (config.n_layers * config.n_experts,))
        if ffn == "per-expert"
        else 6 * config.n_layers
        for ffn in layouts(config, format)
    }
    there = sum(header.nbytes > 0 for header in headers.values())  # a header alone may list any number of empty ones
    possible = [ffn for ffn, count in least.items() if count <= max(_LISTED, there)]
    if not possible:
        shape = f"{config.n_layers:,} layers of {config.n_experts:,} experts"
        asked = f"the config asks for at least {min(least.values()):,} ({shape})"
        raise WeightsError(f"{folder}: {len(headers):,} tensors, where {asked}")
    return possible


def _complaints(headers: dict[str, Header], found: dict[str, Slot], names: int) -> list[str]:
    """What does not fit, with so many names each."""
    complaints = []
    if missing := found.keys() - headers.keys():
        complaints.append(f"{len(missing)} missing: {some(missing, names)}")
    if unknown := headers.keys() - found.keys():
        complaints.append(f"{len(unknown)} unknown: {some(unknown, names)}")
    common = found.keys() & headers.keys()
    if misshapen := [name for name in common if headers[name].shape != found[name].shape]:
        first = min(misshapen)
        shapes = f"{list(headers[first].shape)} where the config asks for {list(found[first].shape)}"
        which = first if names > 1 else "it"
        complaints.append(f"{len(misshapen)} misshapen: {some(misshapen, names)} ({which} is {shapes})")
    if foreign := [name for name in common if not _readable(headers[name].dtype, found[name].fixed_dtype)]:
        stored = ", ".join(sorted({headers[name].stored for name in foreign}))
        wanted = "I64" if all(found[name].fixed_dtype == torch.int64 for name in foreign) else _FLOATS
        complaints.append(f"{len(foreign)} stored as {stored}, not as {wanted}: {some(foreign, names)}")
    return complaints


def _readable(stored: torch.dtype | None, fixed: torch.dtype | None) -> bool:
    """Whether a tensor can be read as what it is to be: whole numbers as such, all others from any float dtype."""
    if stored is None:
        return False
    return stored == torch.int64 if fixed == torch.int64 else stored.is_floating_point


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
        ours: torch.empty(shape, dtype=fixed_dtype(ours, config) or dtype or _widest(sources[ours]), device=device)
        for ours, shape in parameter_shapes(config).items()
    }


def _widest(sources: list[Header]) -> torch.dtype:
    return reduce(torch.promote_types, (header.dtype for header in sources if header.dtype is not None))


def _extent(view: Tensor) -> int:
    """Elements of its storage from a view's first to its last."""
    return 1 + sum((n - 1) * stride for n, stride in zip(view.shape, view.stride(), strict=True))


def _check_tied(embedding: Tensor, output: Tensor, what: str) -> None:
    if not torch.equal(embedding, output.to(embedding)):
        raise WeightsError(f"{what} differs from the embedding, and the config ties the two: untie them there")
