"""A quantised folder: its size, what is in it, what it computes, and how it fails."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import mixtral
from mixtral.config.formats import read_config
from mixtral.errors import ConfigError, MixtralError, UsageError, WeightsError
from mixtral.kernels.torch.dequantise import expand
from mixtral.lm import load
from mixtral.quant.formats import INT4, quantise
from mixtral.quant.layers import PackedExperts, PackedFeedForward, PackedLinear
from mixtral.quant.quantize import for_each_matrix, quantise_folder
from mixtral.quant.scheme import QuantScheme
from mixtral.weights import convert, load_state
from mixtral.weights.load import StateReader
from mixtral.weights.safetensors_file import SafetensorsFile
from tests.quant.models import SHAPES, make_folder, tokens


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_folder(tmp_path / "model")


@pytest.mark.parametrize("bits", ["8", "4", "mixed"])
def test_size_and_contents(tmp_path: Path, bits: str) -> None:
    folder = make_folder(tmp_path / "model", torch.bfloat16)
    size = quantise_folder(folder, tmp_path / "q", QuantScheme.of(bits))
    assert size.written == pytest.approx(size.theory, rel=0.01)
    headers = SafetensorsFile(tmp_path / "q/packed.safetensors").headers
    assert size.written == sum(header.nbytes for header in headers.values())
    assert headers["embedding.weight"].dtype == torch.bfloat16
    gates = [name for name in headers if "router" in name]
    assert len(gates) == 2 and all(headers[name].dtype == torch.bfloat16 for name in gates)  # as they were
    experts = headers["layers.1.ffn.experts.w13_packed"]  # the fused experts are not passed over
    assert experts.shape == (4, 2, 6, 2 * (544 if bits == "8" else 288)) and experts.dtype == torch.uint8
    assert headers["output.weight_packed"].shape == (20, 2 * (288 if bits == "4" else 544))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("bits", "bound"), [("8", 0.03), ("4", 0.3)])
def test_loads_without_a_flag_and_computes_nearly_the_same(tmp_path: Path, shape: str, bits: str, bound: float) -> None:
    folder = make_folder(tmp_path / "model", **SHAPES[shape])
    quantise_folder(folder, tmp_path / "q", QuantScheme.of(bits))
    plain, quantised = load(folder, dtype="fp32", device="cpu"), mixtral.load(tmp_path / "q", "fp32", "cpu")
    assert quantised.config == plain.config == read_config(tmp_path / "q")
    assert quantised.dtype == torch.float32 and quantised.device.type == "cpu"
    got, want = quantised.logits(tokens(30)), plain.logits(tokens(30))
    assert 0 < (got - want).norm() <= bound * want.norm()
    assert len(quantised.generate(tokens(5), max_tokens=4, ignore_eos=True)) == 4


def test_the_modules_of_a_quantised_model(folder: Path, tmp_path: Path) -> None:
    quantise_folder(folder, tmp_path / "q", QuantScheme.of("mixed"))
    model = load(tmp_path / "q", device="cpu").model
    assert isinstance(model.output, PackedLinear) and model.output.format.name == "int8"
    for block in model.layers:
        assert isinstance(block.ffn.experts, PackedExperts) and block.ffn.experts.format is INT4
        assert isinstance(block.attention.wqkv, PackedLinear) and isinstance(block.attention.wo, PackedLinear)
    assert {name.rsplit(".", 2)[-2] for name, _ in model.named_parameters()} == {
        "embedding", "attention_norm", "ffn_norm", "router", "norm",
    }  # fmt: skip
    quantise_folder(make_folder(tmp_path / "dense", **SHAPES["dense"]), tmp_path / "q2", QuantScheme.of("4"))
    assert isinstance(load(tmp_path / "q2", device="cpu").model.layers[0].ffn, PackedFeedForward)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_what_is_not_quantised_is_what_it_was(tmp_path: Path, stored: torch.dtype) -> None:
    make_folder(tmp_path / "model", stored)
    quantise_folder(tmp_path / "model", tmp_path / "q", QuantScheme.of("4"))
    state = load_state(tmp_path / "model", read_config(tmp_path / "model"))
    quantised = load(tmp_path / "q", dtype="fp32", device="cpu").model.state_dict()
    for name in ("layers.0.ffn.router.weight", "layers.1.attention_norm.weight", "norm.weight"):
        assert torch.equal(quantised[name], state[name].float())
    assert torch.equal(quantised["embedding.weight"], state["embedding.weight"].bfloat16().float())
    w13 = expand(quantised["layers.0.ffn.experts.w13_packed"], "int4", 96, 64)
    assert 0 < (w13 - state["layers.0.ffn.experts.w13"].float()).norm() < 0.1 * w13.norm()


def test_the_weights_stay_in_the_file_until_they_are_touched(folder: Path, tmp_path: Path) -> None:
    """All packed tensors are views of one mapping of the file."""
    quantise_folder(folder, tmp_path / "q", QuantScheme.of("4"))
    buffers = dict(load(tmp_path / "q", device="cpu").model.named_buffers())
    assert len(buffers) == 9 and len({b.untyped_storage().data_ptr() for b in buffers.values()}) == 1
    file = (tmp_path / "q/packed.safetensors").stat().st_size
    assert next(iter(buffers.values())).untyped_storage().nbytes() == file


def test_importance_reaches_each_expert(folder: Path, tmp_path: Path) -> None:
    name = "layers.0.ffn.experts.w13"
    importance_ED = torch.ones(4, 64)
    importance_ED[2, ::8] = 1000
    quantise_folder(folder, tmp_path / "plain", QuantScheme.of("4"))
    quantise_folder(folder, tmp_path / "aware", QuantScheme.of("4"), {name: importance_ED})
    plain, aware = (SafetensorsFile(tmp_path / q / "packed.safetensors") for q in ("plain", "aware"))
    same_E2 = (plain.read(name + "_packed") == aware.read(name + "_packed")).flatten(2).all(-1)
    assert same_E2.tolist() == [[True] * 2, [True] * 2, [False] * 2, [True] * 2]
    other = "layers.1.ffn.experts.w2_packed"
    assert torch.equal(plain.read(other), aware.read(other))


def test_one_importance_for_each_matrix() -> None:
    for own, shape in [((), (2, 5, 3)), ((4,), (4, 5, 3)), ((4,), (4, 2, 5, 3)), ((), (5, 3)), ((), (4, 2, 5, 3))]:
        importance = torch.arange(float(torch.Size((*own, 3)).numel())).view(*own, 3)
        got = for_each_matrix(importance, shape)
        assert got.shape == (torch.Size(shape[:-2]).numel(), 3)
        assert torch.equal(got[-1], importance.view(-1, 3)[-1]) and torch.equal(got[0], importance.view(-1, 3)[0])


def test_second_moments_of_a_matrix_that_is_in_no_stack(folder: Path, tmp_path: Path) -> None:
    x_nD = torch.randn(200, 64, generator=torch.Generator().manual_seed(0)) @ torch.ones(64, 64).tril()
    moments_DD = x_nD.T @ x_nD / 200
    assert torch.equal(for_each_matrix(moments_DD, (9, 64)), moments_DD[None])
    name = "layers.0.attention.wqkv.weight"
    quantise_folder(folder, tmp_path / "aware", QuantScheme.of("4"), {name: moments_DD})
    stored = SafetensorsFile(tmp_path / "aware/packed.safetensors").read(name + "_packed")
    w_ND = StateReader(folder, read_config(folder)).read(name)
    assert torch.equal(stored, quantise(w_ND, INT4, moments_DD)) and not torch.equal(stored, quantise(w_ND, INT4))


def test_progress(folder: Path, tmp_path: Path) -> None:
    told: list[tuple[str, int, int]] = []
    quantise_folder(folder, tmp_path / "q", QuantScheme.of("4"), progress=lambda *args: told.append(args))
    assert len(told) == 2 * (2 + 4 * 3) + 1 and {what for what, _, _ in told} == {"quantising"}
    assert told[-1][1] == told[-1][2] and told[0][1] < told[1][1]


PEAK = """
import re, sys, torch
from mixtral.config import ModelConfig
from mixtral.lm import load
from mixtral.quant.calibrate import second_moments
from mixtral.quant.quantize import quantise_folder
from mixtral.quant.scheme import QuantScheme
from mixtral.weights import parameter_shapes, save_hf
from mixtral.weights.load import StateReader

def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024

def shape(vocab_size, n_layers, ffn_dim):
    return ModelConfig(vocab_size=vocab_size, dim=256, n_layers=n_layers, n_heads=4, n_kv_heads=2, head_dim=64,
                       ffn_dim=ffn_dim, n_experts=8, experts_per_token=2)

# 91 MiB in fp32; the largest of our tensors has 8 MiB, a layer 13 MiB. And a small one, for what is set up once
configs = {"large": shape(1024, 7, 512), "small": shape(128, 1, 32)}
"""

MAKE = PEAK + """
random = torch.Generator().manual_seed(0)
for name, config in configs.items():
    state = {n: torch.randn(s, generator=random) for n, s in parameter_shapes(config).items()}
    save_hf(state, config, f"{sys.argv[1]}/{name}")
print(configs["large"].weight_bytes(32) / 2**20)
"""

QUANTISE = PEAK + """
def quantise(name):
    src = f"{sys.argv[1]}/{name}"
    moments = second_moments(StateReader(src, configs[name]), configs[name], [list(range(3, 67))])
    quantise_folder(src, src + "-8", QuantScheme.of("8"), moments)

# Pages of libraries count as memory when their code first runs, and how many depends on the system's file cache.
quantise("small")
load(f"{sys.argv[1]}/small-8", device="cpu")
before = peak()
quantise("large")
quantising = peak() - before
load(f"{sys.argv[1]}/large-8", device="cpu")
print(quantising, peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
def test_peak_memory(tmp_path: Path) -> None:
    """Calibrating and quantising take some tensors' memory, not the model's; loading takes next to none."""
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}

    def run(code: str) -> list[float]:
        command = [sys.executable, "-c", code, str(tmp_path)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        return [float(figure) for figure in done.stdout.split()]

    (model,) = run(MAKE)
    quantising, loading = run(QUANTISE)
    assert model > 90
    assert quantising < 25, "a layer, 13 MiB, what is computed with it, and some slack"
    assert loading < 25


# -- refusals ----------------------------------------------------------------------------------------------------------


def test_other_roads_refuse_a_quantised_folder(folder: Path, tmp_path: Path) -> None:
    quantise_folder(folder, tmp_path / "q", QuantScheme.of("4"))
    for road in (
        lambda: convert(tmp_path / "q", tmp_path / "out", "hf"),
        lambda: load_state(tmp_path / "q", read_config(tmp_path / "q")),
        lambda: quantise_folder(tmp_path / "q", tmp_path / "out", QuantScheme.of("4")),
    ):
        with pytest.raises(UsageError, match="quantised weights, good for running alone"):
            road()
    with pytest.raises(UsageError, match=r"save: this model is quantised \(int4\); copy its folder"):
        load(tmp_path / "q", device="cpu").save(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_transformers_refuses_it_too(folder: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    quantise_folder(folder, tmp_path / "q", QuantScheme.of("4"))
    with pytest.raises(OSError, match="no file named model"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "q", local_files_only=True)


def test_weights_that_cannot_be_quantised_are_named_and_nothing_is_left(folder: Path, tmp_path: Path) -> None:
    lm = load(folder, device="cpu", runner="torch")
    lm.model.layers[1].ffn.experts.w2[3, 0, 0] = float("inf")
    lm.save(tmp_path / "bad", allow_nonfinite=True)
    with pytest.raises(WeightsError, match=r"^layers\.1\.ffn\.experts\.w2: weights that are not finite"):
        quantise_folder(tmp_path / "bad", tmp_path / "q", QuantScheme.of("4"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad", "model"]
    (tmp_path / "full").mkdir()
    (tmp_path / "full/kept").touch()
    with pytest.raises(UsageError, match="full: exists already"):
        quantise_folder(folder, tmp_path / "full", QuantScheme.of("4"))


def test_damaged_folders(folder: Path, tmp_path: Path) -> None:
    quantise_folder(folder, tmp_path / "q", QuantScheme.of("4"))
    config, file = tmp_path / "q/config.json", tmp_path / "q/packed.safetensors"
    values, whole = json.loads(config.read_text()), file.read_bytes()

    def refused(kind: type[MixtralError], message: str) -> None:
        with pytest.raises(kind) as error:
            load(tmp_path / "q", device="cpu")
        assert message in str(error.value) and "\n" not in str(error.value)

    file.write_bytes(whole[:-1])
    refused(WeightsError, "packed.safetensors: truncated")
    file.unlink()
    refused(WeightsError, "packed.safetensors: cannot be read: No such file")
    file.write_bytes(whole)
    for change, message in [
        ({"num_hidden_layers": 3}, "layers.2.attention.wo.weight_packed is missing; config.json and the file do not"),
        ({"num_hidden_layers": 1}, "layers.1.attention.wo.weight_packed is not a tensor of this model"),
        ({"vocab_size": 640}, "output.weight_packed is [20, 576], the config asks for [40, 576]"),
    ]:
        config.write_text(json.dumps(values | change))
        refused(WeightsError, message)
    config.write_text(json.dumps(values | {"quantization_config": {"quant_method": "mixtral"}}))
    refused(ConfigError, "config.json: quantisation: group must be 32, not None")
    header = whole.replace(b'"weight_packed":{"dtype":"U8"', b'')
    file.write_bytes(header.replace(b'"BF16"', b'"I16" ', 1))
    config.write_text(json.dumps(values))
    refused(WeightsError, "embedding.weight is stored as I16, which it cannot be")
