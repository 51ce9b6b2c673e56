"""Models that are not plain Mixtral: their tensors and configuration in files."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mixtral.config.formats import from_hf, read_config, to_hf, to_mistral
from mixtral.errors import ConfigError, WeightsError
from mixtral.model import Mixtral, named_state
from mixtral.weights import convert, load_state, save_hf, save_mistral
from mixtral.weights.names import fixed_dtype, parameter_shapes, slots
from mixtral.weights.safetensors_file import Entry, SafetensorsFile, write_safetensors
from tests.moe.naive_routers import SPECS, config
from tests.weights.weight_states import assert_same, random_state

EACH = list({spec.partition("?")[0]: spec for spec in SPECS}.values())


def _state(spec: str, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    shape = config(spec, shared_experts=2)
    state = random_state(shape, dtype)
    for name, tensor in state.items():
        if fixed := fixed_dtype(name, shape):
            state[name] = (3 * tensor.float()).to(fixed)
    return state


@pytest.mark.parametrize("spec", EACH)
def test_the_table_knows_every_tensor_of_the_model(spec: str) -> None:
    shape = config(spec, shared_experts=2)
    with torch.device("meta"):
        model = Mixtral(shape)
    assert {name: tuple(t.shape) for name, t in named_state(model).items()} == parameter_shapes(shape)
    fixed = {name: t.dtype for name, t in model.named_buffers()}
    assert fixed == {name: fixed_dtype(name, shape) for name in parameter_shapes(shape) if fixed_dtype(name, shape)}
    assert sum(p.numel() for p in model.parameters()) == shape.n_params()
    for layout in ("per-expert", "fused"):
        filled = sum(math.prod(slot.shape) for slot in slots(shape, "hf", layout).values())
        assert filled == sum(math.prod(s) for s in parameter_shapes(shape).values())


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("spec", ["noisy?bias=true", "threshold", "token_k", "learned_k?most=3"])
def test_saved_and_loaded_with_buffers_in_their_own_dtype(spec: str, fused: bool, tmp_path: Path) -> None:
    shape, state = config(spec, shared_experts=2), _state(spec)
    save_hf(state, shape, tmp_path / "a", dtype=torch.bfloat16, fused=fused)
    assert read_config(tmp_path / "a") == shape
    expected = {name: t if fixed_dtype(name, shape) else t.bfloat16() for name, t in state.items()}
    assert_same(load_state(tmp_path / "a", shape), expected)
    assert_same(load_state(tmp_path / "a", shape, torch.bfloat16), expected)
    convert(tmp_path / "a", tmp_path / "b", to="hf", dtype=torch.float16)
    again = load_state(tmp_path / "b", shape)
    assert all(torch.equal(again[name], state[name]) for name in state if fixed_dtype(name, shape))


def test_transformers_refuses_it(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    save_hf(_state("sigmoid"), config("sigmoid", shared_experts=2), tmp_path / "a")
    written = json.loads((tmp_path / "a" / "config.json").read_text())
    assert written["architectures"] == ["MixtralResearchForCausalLM"]
    assert (written["router"], written["shared_experts"]) == ("sigmoid", 2)
    with pytest.raises(ValueError, match="mixtral_research"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "a")


def test_a_plain_model_has_no_key_of_ours() -> None:
    written = to_hf(config("topk"), "float32")
    assert written["model_type"] == "mixtral" and not {"router", "shared_experts"} & written.keys()
    assert from_hf(written) == config("topk")


@pytest.mark.parametrize("changes", [{"router": "sigmoid"}, {"shared_experts": 1}])
def test_mistrals_format_refuses_it(changes: dict[str, object], tmp_path: Path) -> None:
    shape = config("topk").replace(**changes)
    state = random_state(shape)
    with pytest.raises(ConfigError, match="holds plain Mixtral models alone"):
        to_mistral(shape)
    with pytest.raises(ConfigError, match="write it as 'hf'"):
        save_mistral(state, shape, tmp_path / "a")
    save_hf(state, shape, tmp_path / "b")
    with pytest.raises(ConfigError, match="write it as 'hf'"):
        convert(tmp_path / "b", tmp_path / "c", to="mistral")
    assert not (tmp_path / "a").exists() and not (tmp_path / "c").exists()


def test_a_router_of_a_file_must_be_a_text() -> None:
    with pytest.raises(ConfigError, match="router must be a text, not 3"):
        from_hf(to_hf(config("sigmoid"), "float32") | {"router": 3})


@pytest.mark.parametrize(("name", "dtype"), [("model.k_of_token", torch.float32), ("model.norm.weight", torch.int64)])
def test_whole_numbers_and_floats_are_not_taken_for_each_other(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    shape = config("token_k", shared_experts=2)
    save_hf(_state("token_k"), shape, tmp_path / "a")
    path = tmp_path / "a" / "model.safetensors"
    tensors = {key: t.clone() for key, t in SafetensorsFile(path).stream()}
    tensors[name] = tensors[name].to(dtype)
    path.unlink()
    write_safetensors(path, [Entry(k, t.dtype, tuple(t.shape), lambda t=t: t) for k, t in tensors.items()])
    wanted = "F32, not as I64" if dtype == torch.float32 else "I64, not as F64, F32, F16 or BF16"
    with pytest.raises(WeightsError, match=rf"1 stored as {wanted}: {name}"):
        load_state(tmp_path / "a", shape)
