"""Shards that no index names: complete by their own names, or refused with the name of what is missing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mixtral.config.formats import read_config
from mixtral.errors import WeightsError
from mixtral.weights import detect_format, load_state, save_hf, save_mistral
from mixtral.weights.load import StateReader
from tests.weights.weight_states import SPARSE, assert_same, random_state

STATE = random_state(SPARSE)
NAMES = {
    "hf": ("hf", "model-{n:05d}-of-{count:05d}.safetensors", 1),
    "counted mistral": ("mistral", "consolidated-{n:05d}-of-{count:05d}.safetensors", 1),
    "numbered mistral": ("mistral", "consolidated.{n:02d}.safetensors", 0),
    "pth": ("mistral", "consolidated.{n:02d}.pth", 0),
}


def write(folder: Path, kind: str, count: int = 3) -> list[Path]:
    """The model in so many shards, without an index."""
    format, name, first = NAMES[kind]
    save: Callable[..., None] = save_hf if format == "hf" else save_mistral
    save(STATE, SPARSE, folder)
    (whole,) = folder.glob("*.safetensors")
    tensors = [*load_file(whole).items()]
    whole.unlink()
    paths = [folder / name.format(n=n, count=count) for n in range(first, first + count)]
    for number, path in enumerate(paths):
        part: dict[str, Tensor] = dict(tensors[number::count])
        torch.save(part, path) if path.suffix == ".pth" else save_file(part, path)
    return paths


@pytest.mark.parametrize("kind", NAMES)
@pytest.mark.parametrize("count", [1, 3, 11])
def test_complete(kind: str, count: int, tmp_path: Path) -> None:
    write(tmp_path, kind, count)
    assert detect_format(tmp_path) == NAMES[kind][0]
    assert_same(load_state(tmp_path, read_config(tmp_path)), STATE)
    reader = StateReader(tmp_path, SPARSE)
    assert all(torch.equal(reader[name], tensor) for name, tensor in STATE.items())


@pytest.mark.parametrize("kind", NAMES)
@pytest.mark.parametrize("lost", [0, 1])
def test_a_missing_one_is_named(kind: str, lost: int, tmp_path: Path) -> None:
    paths = write(tmp_path, kind)
    paths[lost].unlink()
    assert detect_format(tmp_path) == NAMES[kind][0]
    with pytest.raises(WeightsError) as error:
        load_state(tmp_path, SPARSE)
    assert paths[lost].name in str(error.value) and "missing" in str(error.value) and "\n" not in str(error.value)


def test_the_last_one(tmp_path: Path) -> None:
    """Names that are counted tell that it is missing; of others the tensors do."""
    write(tmp_path / "hf", "hf")[-1].unlink()
    with pytest.raises(WeightsError, match=r"of 3 shards 1 are missing: model-00003-of-00003\.safetensors"):
        load_state(tmp_path / "hf", SPARSE)
    write(tmp_path / "pth", "pth")[-1].unlink()
    with pytest.raises(WeightsError, match=r"\d missing: layers\.0"):
        load_state(tmp_path / "pth", SPARSE)


def test_shards_of_two_models(tmp_path: Path) -> None:
    write(tmp_path, "hf")
    (tmp_path / "model-00001-of-00002.safetensors").touch()
    with pytest.raises(WeightsError, match="shards of 00002 and of 00003 files, and no index; remove the others"):
        load_state(tmp_path, SPARSE)
    (tmp_path / "model-00001-of-00002.safetensors").unlink()
    (tmp_path / "model-00007-of-00003.safetensors").touch()
    with pytest.raises(WeightsError, match=r"shards that are not of these 3: model-00007-of-00003\.safetensors"):
        load_state(tmp_path, SPARSE)


def test_one_number_twice(tmp_path: Path) -> None:
    paths = write(tmp_path, "pth")
    paths[1].with_suffix(".pt").touch()
    with pytest.raises(WeightsError, match=r"consolidated\.01\.pth: consolidated\.01\.pt has the same number"):
        load_state(tmp_path, SPARSE)


ADAPTERS = ["lora.safetensors", "adapter_model.safetensors", "adapter_model.bin", "adapters.safetensors",
            "adapters.npz"]


@pytest.mark.parametrize("name", ADAPTERS)
@pytest.mark.parametrize("save", [save_hf, save_mistral])
def test_adapters_beside_the_weights(name: str, save: Callable[..., None], tmp_path: Path) -> None:
    save(STATE, SPARSE, tmp_path)
    (tmp_path / name).touch()
    with pytest.raises(WeightsError, match=f"{name}: adapters are not applied; merge them"):
        load_state(tmp_path, SPARSE)
    for file in [*tmp_path.glob("model*"), *tmp_path.glob("consolidated*")]:
        file.unlink()
    with pytest.raises(WeightsError, match=f"{name}: adapters are not applied; merge them"):
        load_state(tmp_path, SPARSE)
