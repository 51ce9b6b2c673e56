"""What does not fit is refused before anything is read, by name; what fits takes no more memory than it must."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mixtral.config.model import LIMITS, ModelConfig
from mixtral.errors import UsageError, WeightsError
from mixtral.weights import detect_format, load, load_state, save_hf, save_mistral
from mixtral.weights.load import StateReader, _possible
from mixtral.weights.names import slots
from mixtral.weights.safetensors_file import Header, SafetensorsFile
from mixtral.weights.shards import PACKED_FILE
from tests.weights.weight_states import CONFIGS, DENSE, SPARSE, assert_same, random_state

Q = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A dense model in one file."""
    save_hf(random_state(DENSE), DENSE, tmp_path / "model")
    return tmp_path / "model"


def change(folder: Path, **tensors: Tensor | None) -> None:
    """Replace tensors of the file; None takes one away. Names are given with __ for a dot."""
    held = load_file(folder / "model.safetensors")
    held |= {name.replace("__", "."): tensor for name, tensor in tensors.items() if tensor is not None}
    for name in (name for name, tensor in tensors.items() if tensor is None):
        del held[name.replace("__", ".")]
    save_file(held, folder / "model.safetensors")


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """A sparse model in many files."""
    save_hf(random_state(SPARSE), SPARSE, tmp_path / "model", shard_bytes=10_000)
    return tmp_path / "model"


def refusal(folder: Path, config: object = DENSE) -> str:
    with pytest.raises(WeightsError) as error:
        load_state(folder, config)  # type: ignore[arg-type]
    assert "\n" not in str(error.value)
    return str(error.value)


def test_missing_and_unknown_tensors(folder: Path) -> None:
    change(folder, **{"model__norm__weight": None, "lm_head__weight": None, "extra": torch.ones(1)})
    message = refusal(folder)
    assert message.startswith(f"{folder}: the tensors do not fit the config: ")
    assert message.endswith("2 missing: lm_head.weight, model.norm.weight; 1 unknown: extra")


def test_a_config_that_contradicts_the_tensors(folder: Path) -> None:
    assert "2 misshapen: lm_head.weight, model.embed_tokens.weight (lm_head.weight is [11, 24] where the config asks " \
           "for [12, 24])" in refusal(folder, DENSE.replace(vocab_size=12))  # fmt: skip
    assert "9 missing: model.layers.2.input_layernorm.weight" in refusal(folder, DENSE.replace(n_layers=3))
    assert "9 unknown: model.layers.1.input_layernorm.weight" in refusal(folder, DENSE.replace(n_layers=1))
    assert "unknown: model.layers.0.mlp.down_proj.weight" in refusal(folder, SPARSE)
    # the same number of elements in another shape is refused as well
    change(folder, **{Q.replace(".", "__"): torch.ones(24, 32)})
    assert f"1 misshapen: {Q} ({Q} is [24, 32] where the config asks for [32, 24])" in refusal(folder)


def test_quantised_tensors(folder: Path) -> None:
    change(folder, **{Q.replace(".", "__"): torch.ones(32, 24, dtype=torch.int8)})
    assert f"1 stored as I8, not as F64, F32, F16 or BF16: {Q}" in refusal(folder)
    change(folder, **{Q.replace(".", "__"): torch.ones(32, 24, dtype=torch.uint8)})
    assert f"1 stored as U8, not as F64, F32, F16 or BF16: {Q}" in refusal(folder)


def test_nothing_is_allocated_for_what_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object) -> None:
        raise AssertionError("allocated before it was checked")

    monkeypatch.setattr(load, "_allocate", never)
    change(folder, extra=torch.ones(1))
    assert "1 unknown: extra" in refusal(folder)
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    assert refusal(folder).startswith(f"{file}: truncated: ")


def test_tied_embeddings_with_and_without_an_output(tmp_path: Path) -> None:
    tied = CONFIGS["dense-tied"]
    state = random_state(tied)
    save_hf(state, tied, tmp_path / "model")
    assert "lm_head.weight" not in load_file(tmp_path / "model" / "model.safetensors")
    assert_same(load_state(tmp_path / "model", tied), state)
    change(tmp_path / "model", lm_head__weight=state["embedding.weight"])
    assert_same(load_state(tmp_path / "model", tied), state)
    change(tmp_path / "model", lm_head__weight=state["embedding.weight"] + 1)
    assert "lm_head.weight differs from the embedding, and the config ties the two" in refusal(tmp_path / "model", tied)


def test_dtypes(folder: Path) -> None:
    state = random_state(DENSE)
    assert all(tensor.dtype == torch.float32 for tensor in load_state(folder, DENSE).values())
    expected = {name: tensor.bfloat16() for name, tensor in state.items()}
    assert_same(load_state(folder, DENSE, dtype=torch.bfloat16), expected)
    # without a dtype one of ours takes the widest of its sources, so that nothing is lost
    half = {Q.replace(".", "__"): torch.ones(32, 24).half(), "model__norm__weight": torch.ones(24).bfloat16()}
    change(folder, **half)
    loaded = load_state(folder, DENSE)
    assert loaded["layers.0.attention.wqkv.weight"].dtype == torch.float32
    assert loaded["norm.weight"].dtype == torch.bfloat16


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("format", ["hf", "fused", "shards", "mistral", "pt"])
def test_one_tensor_at_a_time(config: ModelConfig, format: str, tmp_path: Path) -> None:
    state, folder = random_state(config), tmp_path / "model"
    if format in ("mistral", "pt"):
        save_mistral(state, config, folder)
    else:
        save_hf(state, config, folder, fused=format == "fused", shard_bytes=10_000 if format == "shards" else 10**9)
    if format == "pt":
        torch.save(load_file(folder / "consolidated.safetensors"), folder / "consolidated.00.pt")
        (folder / "consolidated.safetensors").unlink()
    reader = StateReader(folder, config)
    assert_same({name: reader.read(name) for name in state}, state)
    for name, tensor in state.items():
        if tensor.dim() > 2:
            slices = list(reader.slices(name))
            assert_same({name: torch.stack(slices)}, {name: tensor})
            one_each = format in ("hf", "shards") or not config.is_sparse  # else a foreign tensor holds all experts
            if one_each:
                assert {part.untyped_storage().nbytes() for part in slices} == {tensor[0].nbytes}


def test_one_tensor_at_a_time_is_checked_as_all_are(tmp_path: Path) -> None:
    tied = CONFIGS["dense-tied"]
    state = random_state(tied)
    save_hf(state, tied, tmp_path / "model")
    half = {Q.replace(".", "__"): torch.ones(32, 24).half(), "model__norm__weight": torch.ones(24).bfloat16()}
    change(tmp_path / "model", lm_head__weight=state["embedding.weight"] + 1, **half)
    reader = StateReader(tmp_path / "model", tied)
    with pytest.raises(WeightsError, match="differs from the embedding"):
        reader.read("embedding.weight")
    assert reader.read("layers.0.attention.wqkv.weight").dtype == torch.float32  # the widest of its sources
    assert reader.dtype("norm.weight") == reader.read("norm.weight").dtype == torch.bfloat16
    with pytest.raises(WeightsError, match="the tensors do not fit the config"):
        StateReader(tmp_path / "model", tied.replace(n_layers=3))


def test_device(folder: Path) -> None:
    assert {tensor.device.type for tensor in load_state(folder, DENSE, device="meta").values()} == {"meta"}


def test_shards(shards: Path) -> None:
    assert len(list(shards.glob("*.safetensors"))) > 3
    assert_same(load_state(shards, SPARSE), random_state(SPARSE))


def test_a_missing_shard(shards: Path) -> None:
    gone = sorted(shards.glob("model-*"))[1]
    gone.unlink()
    index = shards / "model.safetensors.index.json"
    assert refusal(shards, SPARSE) == f"{index}: points at {gone.name}, which is not there"


def test_an_index_that_lies(shards: Path) -> None:
    index = shards / "model.safetensors.index.json"
    values = json.loads(index.read_text())
    first = values["weight_map"]["model.norm.weight"]
    values["weight_map"]["extra"] = first
    index.write_text(json.dumps(values))
    assert refusal(shards, SPARSE).endswith(f"{first}: does not hold what {index.name} says: extra")
    values["weight_map"]["extra"] = "../elsewhere.safetensors"
    index.write_text(json.dumps(values))
    assert "a shard must be a file name, not '../elsewhere.safetensors'" in refusal(shards, SPARSE)


def test_a_broken_index(shards: Path) -> None:
    for content in ("{}", '{"weight_map": {}}', '{"weight_map": [1]}', '{"weight_map": {"a": 1}}'):
        (shards / "model.safetensors.index.json").write_text(content)
        assert "model.safetensors.index.json: not an index; " in refusal(shards, SPARSE)
    for content in ("", "[]", '{"weight_map": ' + "[" * 10_000):
        (shards / "model.safetensors.index.json").write_text(content)
        assert "model.safetensors.index.json: " in refusal(shards, SPARSE)


def test_a_config_of_any_number_of_tensors_is_refused_at_once(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A configuration may claim what it likes: nothing is listed, let alone built, that the files cannot hold."""
    start = time.process_time()
    claim = SPARSE.replace(n_layers=LIMITS["n_layers"], n_experts=LIMITS["n_experts"])
    assert " missing: model.layers.0." in refusal(folder, claim)  # as transformers 5 stacks experts
    assert " missing: model.layers.10." in refusal(folder, DENSE.replace(n_layers=LIMITS["n_layers"]))
    monkeypatch.setattr("mixtral.weights.load._LISTED", 1000)
    message = refusal(folder, claim)
    assert message.endswith("21 tensors, where the config asks for at least 24,576 (4,096 layers of 65,536 experts)")
    assert time.process_time() - start < 2


def test_empty_tensors_do_not_make_room_for_a_larger_claim(tmp_path: Path) -> None:
    """A header of 5 MB once bought a list of a million names."""
    empty = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    header = json.dumps({f"t{i}": empty for i in range(20_000)}).encode()
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    claim = SPARSE.replace(n_layers=LIMITS["n_layers"], n_experts=16)
    found = slots(SPARSE, "hf", "per-expert")
    headers = SafetensorsFile(tmp_path / "model.safetensors").headers
    assert _possible(headers, claim, "hf", tmp_path) == ["fused"]  # 200,000 tensors when each expert has its own
    full = {name: Header(torch.float32, "F32", slot.shape) for name, slot in found.items()}
    assert _possible(full, SPARSE, "hf", tmp_path) == ["per-expert", "fused"]


def test_folders_without_weights(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"nowhere: no such folder; a model folder with its weights, or a \.gguf"):
        detect_format(tmp_path / "nowhere")
    (tmp_path / "consolidated.00.pt.part").touch()
    with pytest.raises(UsageError, match=r"\.part: a file; a model folder with its weights, or a \.gguf"):
        detect_format(tmp_path / "consolidated.00.pt.part")
    (tmp_path / "training_args.bin").touch()
    with pytest.raises(WeightsError, match=r"no weights that can be read; model\.safetensors, .* is wanted"):
        detect_format(tmp_path)
    (tmp_path / PACKED_FILE).touch()
    with pytest.raises(UsageError, match="quantised weights, good for running alone; give the folder they were"):
        detect_format(tmp_path)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin"])
def test_pickled_weights_are_refused_by_name(name: str, tmp_path: Path) -> None:
    for extra in (name, "pytorch_model.bin.index.json", "pytorch_model-00002-of-00002.bin"):
        (tmp_path / extra).touch()
    if name == "pytorch_model.bin":
        (tmp_path / "pytorch_model-00002-of-00002.bin").unlink()
    with pytest.raises(WeightsError, match=rf"{name}: refused, as reading it can run code; convert it to model\.saf"):
        detect_format(tmp_path)
    (tmp_path / "consolidated.safetensors").touch()  # what can be read counts
    assert detect_format(tmp_path) == "mistral"


PEAK = """
import re, sys, torch
from mixtral.config.model import LIMITS, ModelConfig
from mixtral.weights import load_state, parameter_shapes, save_hf, save_mistral
from mixtral.weights.finite import is_finite

def peak():
    # MiB; getrusage would tell the peak of the process that started this one, when that is higher
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024

# some 56 MiB in fp32; the largest tensor of a file has 4 MiB
config = ModelConfig(vocab_size=1024, dim=1024, n_layers=3, n_heads=16, n_kv_heads=4, head_dim=64, ffn_dim=512)
is_finite(torch.ones(1024, 1024)), is_finite(torch.ones(1024, 1024).to(torch.bfloat16))  # what torch sets up once
state = {name: torch.ones(shape) for name, shape in parameter_shapes(config).items()}
before = peak()
save_hf(state, config, sys.argv[1] + "/hf", shard_bytes=30 << 20)
save_mistral(state, config, sys.argv[1] + "/mistral", dtype=torch.bfloat16)
saving = peak() - before
del state
for name in ("hf", "mistral"):
    state = load_state(sys.argv[1] + "/" + name, config, torch.float32)
    del state
print(saving, peak() - before, config.weight_bytes(32) / 2**20)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
def test_peak_memory(tmp_path: Path) -> None:
    """Saving adds one tensor to the model, and loading has its peak at the model and one tensor."""
    command = [sys.executable, "-c", PEAK, str(tmp_path)]
    # glibc would keep what is freed for later: have it hand back every tensor at once, so that the peak is what lives
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    saving, loading, model = map(float, done.stdout.split())
    assert model > 50
    assert saving < 10, "a tensor of the file, 4 MiB, its cast, 2 MiB, and some slack"
    assert loading < 10, "the model was in memory before, too: one tensor may come on top, 4 MiB, and some slack"
