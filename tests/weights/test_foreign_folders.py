"""Folders as others leave them: old tensors, old keys, blocks about how a model was trained."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

import mixtral
from mixtral.config import table
from mixtral.config.formats import read_config
from mixtral.errors import ConfigError, WeightsError
from mixtral.weights import load_state, save_hf, save_mistral
from mixtral.weights.load import StateReader
from tests.weights.weight_states import DENSE, SPARSE, assert_same, random_state

STATE = random_state(SPARSE)
HALF = SPARSE.head_dim // 2


@pytest.fixture(autouse=True)
def _warnings_afresh() -> None:
    table.warn_once.cache_clear()


def change_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def add(path: Path, tensors: dict[str, Tensor]) -> None:
    save_file(load_file(path) | tensors, path)


def frequencies(theta: float, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.tensor([theta ** (-i / HALF) for i in range(HALF)]).to(dtype)


# -- rotary frequencies ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("format", "names"),
    [
        ("hf", [f"model.layers.{layer}.self_attn.rotary_emb.inv_freq" for layer in range(2)]),
        ("hf", ["model.rotary_emb.inv_freq"]),
        ("mistral", ["rope.freqs"]),
    ],
)
def test_rotary_frequencies_are_not_weights(
    format: str, names: list[str], dtype: torch.dtype, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="mixtral")
    (save_hf if format == "hf" else save_mistral)(STATE, SPARSE, tmp_path)
    (file,) = tmp_path.glob("*.safetensors")
    add(file, {name: frequencies(SPARSE.rope_theta, dtype) for name in names})
    assert_same(load_state(tmp_path, SPARSE), STATE)
    assert torch.equal(StateReader(tmp_path, SPARSE)["norm.weight"], STATE["norm.weight"])
    assert f"{len(names)} tensors of rotary frequencies are not read" in caplog.text
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_other_frequencies_than_the_configurations(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save_hf(STATE, SPARSE, tmp_path)
    names = [f"model.layers.{layer}.self_attn.rotary_emb.inv_freq" for layer in range(2)]
    add(tmp_path / "model.safetensors", {names[0]: frequencies(1e4), names[1]: frequencies(1e6)})
    assert_same(load_state(tmp_path, SPARSE), STATE)
    said = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(said) == 1 and names[1] in said[0] and names[0] not in said[0]
    assert "rotary frequencies that are not those of rope_theta 10000, which counts" in said[0]


@pytest.mark.parametrize("bad", [torch.ones(HALF + 1), torch.ones(HALF, dtype=torch.int32)])
def test_what_cannot_be_frequencies_is_refused(bad: Tensor, tmp_path: Path) -> None:
    save_hf(STATE, SPARSE, tmp_path)
    add(tmp_path / "model.safetensors", {"model.layers.0.self_attn.rotary_emb.inv_freq": bad})
    with pytest.raises(WeightsError, match=r"1 unknown: model\.layers\.0\.self_attn\.rotary_emb\.inv_freq"):
        load_state(tmp_path, SPARSE)


# -- fine-tuned exports ------------------------------------------------------------------------------------------------


def test_a_merged_fine_tuned_model(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save_mistral(STATE, SPARSE, tmp_path)
    change_json(tmp_path / "params.json", lora={"enable": True, "rank": 64, "dropout": 0.0, "scaling": 2.0})
    assert read_config(tmp_path) == SPARSE
    assert_same(load_state(tmp_path, SPARSE), STATE)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_adapters_that_are_not_merged(tmp_path: Path) -> None:
    save_mistral(STATE, SPARSE, tmp_path)
    names = ["layers.0.attention.wq.lora_A.weight", "layers.0.attention.wq.lora_B.weight"]
    add(tmp_path / "consolidated.safetensors", {name: torch.ones(4, 24) for name in names})
    with pytest.raises(WeightsError, match=r"LoRA tensors that are not merged") as error:
        load_state(tmp_path, SPARSE)
    assert all(name in str(error.value) for name in names)


# -- a vocabulary left to the tokenizer --------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["safetensors", "00.pth", "00.pt"])
def test_a_vocabulary_of_minus_one(suffix: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save_mistral(STATE, SPARSE, tmp_path)
    change_json(tmp_path / "params.json", vocab_size=-1)
    if suffix != "safetensors":
        torch.save(load_file(tmp_path / "consolidated.safetensors"), tmp_path / f"consolidated.{suffix}")
        (tmp_path / "consolidated.safetensors").unlink()
    assert read_config(tmp_path) == read_config(tmp_path / "params.json") == SPARSE
    assert "params.json with vocab_size -1: 11 taken, the rows of the embedding" in caplog.text
    assert mixtral.load(tmp_path, dtype="fp32", device="cpu").config == SPARSE


def test_a_vocabulary_of_minus_one_without_weights(tmp_path: Path) -> None:
    save_mistral(STATE, SPARSE, tmp_path)
    change_json(tmp_path / "params.json", vocab_size=-1)
    (tmp_path / "consolidated.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"params\.json: vocab_size is -1, and beside it is no consolidated file"):
        read_config(tmp_path)
    save_hf(STATE, SPARSE, tmp_path / "hf")
    change_json(tmp_path / "hf/config.json", vocab_size=-1)
    with pytest.raises(ConfigError, match="vocab_size"):
        read_config(tmp_path / "hf")


# -- all of it at once, against transformers ---------------------------------------------------------------------------


@pytest.mark.parametrize("sparse", [True, False])
def test_an_old_folder_computes_what_transformers_does(sparse: bool, tmp_path: Path) -> None:
    """Older names of keys, layer_types, frequencies among the weights, shards without an index."""
    config = (SPARSE if sparse else DENSE).replace(rope_theta=5e4, ffn_dim=12)
    save_hf({n: 0.3 * t for n, t in random_state(config).items()}, config, tmp_path, shard_bytes=5_000)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    (tmp_path / "model.safetensors.index.json").unlink()
    values = json.loads((tmp_path / "config.json").read_text())
    for new, old in (("num_local_experts", "num_experts"), ("num_experts_per_tok", "num_experts_per_token")):
        if new in values:
            values[old] = values.pop(new)
    del values["rope_parameters"]
    kind = "full_attention" if config.sliding_window is None else "sliding_attention"
    (tmp_path / "config.json").write_text(json.dumps(values | {"layer_types": [kind] * 2}))
    inv_freq = torch.tensor([5e4 ** (-i / HALF) for i in range(HALF)])
    add(tmp_path / min(p.name for p in tmp_path.glob("model-*")), {"model.rotary_emb.inv_freq": inv_freq})
    lm = mixtral.load(tmp_path, dtype="fp32", device="cpu")
    assert lm.config == config
    ids = torch.arange(40) % config.vocab_size
    with torch.no_grad():
        want = theirs(ids[None]).logits[0]
    assert math.isclose(float((lm.logits(ids) - want).abs().max()), 0.0, abs_tol=1e-4 * float(want.abs().max()))
