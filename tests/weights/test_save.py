"""Saving: round trips in every format, shards, and refusals that leave nothing behind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mixtral.config.formats import read_config
from mixtral.errors import MixtralError, UsageError, WeightsError
from mixtral.weights import load_state, save, save_hf, save_mistral
from tests.weights.weight_states import CONFIGS, SPARSE, assert_same, random_state


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_round_trip(name: str, fused: bool, dtype: torch.dtype, tmp_path: Path) -> None:
    config = CONFIGS[name]
    state = random_state(config, dtype)
    save_hf(state, config, tmp_path / "model", fused=fused)
    assert read_config(tmp_path / "model") == config
    assert_same(load_state(tmp_path / "model", config), state)
    held = load_file(tmp_path / "model" / "model.safetensors").keys()
    assert any("gate_up_proj" in key for key in held) == (fused and config.is_sparse)


@pytest.mark.parametrize("write", [save_hf, save_mistral])
@pytest.mark.parametrize("eos_id", [2, 7, (7, 2, 9)])
def test_all_end_tokens_are_saved(write: Any, eos_id: int | tuple[int, ...], tmp_path: Path) -> None:
    config = SPARSE.replace(eos_id=eos_id)
    write(random_state(config), config, tmp_path / "model")
    assert read_config(tmp_path / "model").eos_id == eos_id
    beside = (tmp_path / "model/generation_config.json").exists()
    assert beside == (write is save_mistral and eos_id != 2)


def test_shards_stay_within_their_limit(tmp_path: Path) -> None:
    limit = 5_000  # between an expert (2,880 bytes together) and the fused gate and up (9,600)
    save_hf(random_state(SPARSE), SPARSE, tmp_path / "model", fused=True, shard_bytes=limit)
    index = json.loads((tmp_path / "model" / "model.safetensors.index.json").read_text())
    files = sorted((tmp_path / "model").glob("*.safetensors"))
    assert files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    assert index["metadata"]["total_size"] == 4 * SPARSE.n_params()
    for file in files:
        held = load_file(file)
        assert held.keys() == {name for name, where in index["weight_map"].items() if where == file.name}
        assert len(held) == 1 or sum(tensor.nbytes for tensor in held.values()) <= limit


def test_parameters_can_be_saved(tmp_path: Path) -> None:
    """A model's state dict may hold tensors that ask for gradients."""
    state = {name: torch.nn.Parameter(tensor) for name, tensor in random_state(SPARSE).items()}
    save_mistral(dict(state), SPARSE, tmp_path / "model", dtype=torch.bfloat16)
    assert torch.equal(load_state(tmp_path / "model", SPARSE)["norm.weight"], state["norm.weight"].bfloat16())


@pytest.mark.parametrize("write", [save_hf, save_mistral])
def test_nothing_is_overwritten(write: object, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious").write_text("x")
    (tmp_path / "file").touch()
    for taken in ("full", "file"):
        with pytest.raises(UsageError, match=f"{taken}: exists already; a new or empty folder is wanted"):
            write(random_state(SPARSE), SPARSE, tmp_path / taken)  # type: ignore[operator]
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["precious"]
    (tmp_path / "empty").mkdir()
    write(random_state(SPARSE), SPARSE, tmp_path / "empty")  # type: ignore[operator]
    assert read_config(tmp_path / "empty").n_experts == 5


def test_a_state_that_is_not_the_configs(tmp_path: Path) -> None:
    state = random_state(SPARSE)
    cases = [
        ({**state, "extra": torch.ones(1)}, "state: extra is not a parameter of this config"),
        ({k: v for k, v in state.items() if k != "norm.weight"}, "state: norm.weight is missing"),
        ({**state, "norm.weight": torch.ones(5)}, r"state: norm.weight is \[5\], the config asks for \[24\]"),
        ({**state, "norm.weight": torch.ones(24).int()}, r"norm.weight as torch.int32 cannot be saved; give a float"),
    ]
    for wrong, message in cases:
        with pytest.raises(WeightsError, match=message):
            save_hf(wrong, SPARSE, tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_a_disk_that_fills_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is left over when writing fails half way."""

    def full(path: Path, *_: object) -> None:
        path.write_bytes(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(save, "write_safetensors", full)
    with pytest.raises(MixtralError, match="No space left on device"):
        save_hf(random_state(SPARSE), SPARSE, tmp_path / "model")
    assert not list(tmp_path.iterdir())
