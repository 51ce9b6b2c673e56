"""GGUF files: there and back for every shape of model, rounding within its bounds, types, layouts, and refusals."""

from __future__ import annotations

import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from torch import Tensor

from mixtral.config import ModelConfig
from mixtral.config.formats import read_config
from mixtral.errors import ConfigError, UsageError, WeightsError
from mixtral.gguf.header import TYPES, read_gguf_header
from mixtral.quant.quantize import quantise_folder
from mixtral.quant.scheme import QuantScheme
from mixtral.weights import convert, detect_format, load_state, save_hf
from mixtral.weights.gguf_file import GgufFile
from mixtral.weights.gguf_write import write_gguf
from mixtral.weights.names import slots
from tests.weights.weight_states import CONFIGS, DENSE, SPARSE, assert_same, random_state

# Every row a multiple of 32, so that all matrices can be quantised.
EVEN = SPARSE.replace(dim=64, n_heads=4, n_kv_heads=2, head_dim=16, ffn_dim=32, vocab_size=40)


def values(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.float() for name, tensor in state.items()}


@pytest.mark.parametrize("name", CONFIGS)
def test_there_and_back(name: str, tmp_path: Path) -> None:
    config, path = CONFIGS[name], tmp_path / "model.gguf"
    state = random_state(config, torch.bfloat16)
    write_gguf(state, config, path)
    assert detect_format(path) == "gguf" and read_config(path) == config
    assert_same(values(load_state(path, config)), values(state))
    assert_same(load_state(path, config, torch.bfloat16), state)


@pytest.mark.parametrize("to", ["hf", "mistral"])
@pytest.mark.parametrize("name", CONFIGS)
def test_conversion_there_and_back(name: str, to: str, tmp_path: Path) -> None:
    config, state = CONFIGS[name], random_state(CONFIGS[name], torch.bfloat16)
    save_hf(state, config, tmp_path / "src")
    told: list[tuple[str, int, int]] = []
    convert(tmp_path / "src", tmp_path / "model.gguf", "gguf", progress=lambda *at: told.append(at))
    assert told[-1][1] == told[-1][2] and {what for what, _, _ in told} == {"writing"}
    convert(tmp_path / "model.gguf", tmp_path / "dst", to, torch.bfloat16)
    assert read_config(tmp_path / "dst") == config
    assert_same(load_state(tmp_path / "dst", config), state)


def test_names_and_types(tmp_path: Path) -> None:
    """As llama.cpp's converter has them: norms and gates in fp32, experts stacked."""
    kinds = {}
    for type in ("bf16", "q8_0", "q4_0"):
        write_gguf(random_state(EVEN), EVEN, tmp_path / f"{type}.gguf", type)
        tensors = read_gguf_header(tmp_path / f"{type}.gguf").tensors
        kinds[type] = {name: info.type.name for name, info in tensors.items()}
    assert kinds["bf16"]["token_embd.weight"] == kinds["bf16"]["output.weight"] == "BF16"
    assert tensors["blk.1.ffn_gate_exps.weight"].shape == (5, 32, 64)
    assert tensors["blk.1.ffn_down_exps.weight"].shape == (5, 64, 32)
    for type, found in kinds.items():
        assert {found[f"{name}.weight"] for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_gate_inp")} == {"F32"}
        assert {found[f"blk.0.{part}.weight"] for part in ("attn_k", "ffn_up_exps", "ffn_down_exps")} == {type.upper()}
    assert kinds["q4_0"]["token_embd.weight"] == kinds["q4_0"]["output.weight"] == "Q8_0"


def test_gate_and_up_are_not_swapped() -> None:
    """A file written wrongly would be read back wrongly, and nothing else would tell."""
    sparse, dense = random_state(SPARSE), random_state(DENSE)
    w13_E2FD, w13_2FD = sparse["layers.1.ffn.experts.w13"], dense["layers.1.ffn.w13"]
    stacked, single = slots(SPARSE, "gguf", "stacked"), slots(SPARSE, "gguf", "per-expert")
    for index, part in enumerate(("gate", "up")):
        assert stacked[f"blk.1.ffn_{part}_exps.weight"].view(w13_E2FD).equal(w13_E2FD[:, index])
        assert single[f"blk.1.ffn_{part}.3.weight"].view(w13_E2FD).equal(w13_E2FD[3, index])
        assert slots(DENSE, "gguf", "dense")[f"blk.1.ffn_{part}.weight"].view(w13_2FD).equal(w13_2FD[index])


@pytest.mark.parametrize(("type", "bits", "levels"), [("q8_0", 8.5, 127), ("q4_0", 4.5, 8)])
def test_rounding(type: str, bits: float, levels: int, tmp_path: Path) -> None:
    """8 bits: half a step of the block's scale, and what fp16 takes off the scale. 4 bits: a step, at the short end."""
    state, path = random_state(EVEN), tmp_path / "model.gguf"
    write_gguf(state, EVEN, path, type)
    info = read_gguf_header(path).tensors["blk.0.attn_q.weight"]
    assert info.nbytes * 8 == bits * 64 * 64
    back = load_state(path, EVEN, torch.float32)
    assert back["layers.0.ffn.router.weight"].equal(state["layers.0.ffn.router.weight"])
    for name in ("layers.1.ffn.experts.w13", "layers.1.ffn.experts.w2", "layers.0.attention.wo.weight"):
        blocks, rounded = state[name].view(-1, 32), back[name].view(-1, 32)
        step = blocks.abs().amax(-1, keepdim=True) / levels
        limit = step * (0.57 if type == "q8_0" else 1.01)
        error = (blocks - rounded).abs()
        assert (error <= limit).all() and (error > step / 4).any(), name
    assert {tensor.dtype for tensor in load_state(path, EVEN).values()} == {torch.bfloat16, torch.float32}


def test_rows_that_no_block_divides(tmp_path: Path) -> None:
    write_gguf(random_state(SPARSE), SPARSE, tmp_path / "model.gguf", "q8_0")
    kinds = {info.type.name for info in read_gguf_header(tmp_path / "model.gguf").tensors.values()}
    assert kinds == {"F32", "BF16"}
    assert_same(load_state(tmp_path / "model.gguf", SPARSE, torch.bfloat16), random_state(SPARSE, torch.bfloat16))


def test_the_first_files_of_mixtral(tmp_path: Path) -> None:
    """One tensor an expert, gates in fp16."""
    state = random_state(SPARSE, torch.float16)
    writer = gguf.GGUFWriter(tmp_path / "old.gguf", "llama")
    for name, slot in slots(SPARSE, "gguf", "per-expert").items():
        writer.add_tensor(name, slot.view(state[slot.ours]).reshape(slot.shape).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert "blk.1.ffn_down.4.weight" in read_gguf_header(tmp_path / "old.gguf").tensors
    assert_same(load_state(tmp_path / "old.gguf", SPARSE), state)


EXPANDED = [known.name for known in TYPES.values() if known.block > 1]


def test_every_type_that_the_package_expands_is_read() -> None:
    expands = {kind.name for kind in gguf.quants._type_traits}
    assert expands - {"BF16"} == set(EXPANDED)


@pytest.mark.parametrize("kind", EXPANDED)
def test_types_that_are_expanded(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Random blocks, in parts of a few rows, against the package's own expansion of the whole."""
    monkeypatch.setattr("mixtral.weights.gguf_file._CHUNK", 1024)
    number = gguf.GGMLQuantizationType[kind]
    block, nbytes = gguf.GGML_QUANT_SIZES[number]
    raw = np.random.default_rng(0).integers(0, 256, (2, 3, 512 // block * nbytes), dtype=np.uint8)
    if kind != "IQ1_M":  # the four bytes of whose scale lie apart
        raw = np.where((raw & 0x7C) == 0x7C, raw & 0x3F, raw)  # no scale is infinite or NaN
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
    writer.add_tensor("w", raw, raw_dtype=number)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = GgufFile(tmp_path / "a.gguf", read_gguf_header(tmp_path / "a.gguf"))
    read = file.read("w")
    assert read.shape == file.headers["w"].shape == (2, 3, 512) and read.dtype == torch.float32
    assert read.isfinite().all() and read.unique().numel() > 16
    assert torch.equal(read, torch.from_numpy(gguf.quants.dequantize(raw, number)))


def test_q8_0_and_q4_0_by_hand() -> None:
    """The two formats that are written, told independently: one scale a block, q from -127 or from -8."""
    x = np.linspace(-1, 0.9, 32, dtype=np.float32)[None]
    q8 = gguf.quants.quantize(x, gguf.GGMLQuantizationType.Q8_0)[0]
    assert np.allclose(q8[:2].view(np.float16) * q8[2:].view(np.int8).astype(np.float32), x, atol=0.51 / 127)
    q4 = gguf.quants.quantize(x, gguf.GGMLQuantizationType.Q4_0)[0]
    nibbles = np.concatenate([q4[2:] & 15, q4[2:] >> 4]).astype(np.float32)
    assert np.allclose(q4[:2].view(np.float16) * (nibbles - 8), x, atol=1.01 / 8)


def test_tensors_that_do_not_fit(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write_gguf(random_state(SPARSE), SPARSE, path)
    with pytest.raises(WeightsError, match=r"model\.gguf: the tensors do not fit the config: 10 missing: blk\.2\."):
        load_state(path, SPARSE.replace(n_layers=3))
    with pytest.raises(WeightsError, match=r"10 unknown: blk\.1\.attn_k\.weight, "):
        load_state(path, SPARSE.replace(n_layers=1))
    with pytest.raises(WeightsError, match=r"blk\.0\.ffn_down_exps\.weight is \[5, 24, 10\] where the config asks for"):
        load_state(path, SPARSE.replace(ffn_dim=12))


def test_without_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_gguf(random_state(EVEN), EVEN, tmp_path / "bf16.gguf")
    write_gguf(random_state(EVEN), EVEN, tmp_path / "q8_0.gguf", "q8_0")
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert load_state(tmp_path / "bf16.gguf", EVEN)["output.weight"].shape == (40, 64)
    needs = r'needs the gguf package: pip install "mixtral\[gguf\]"'
    with pytest.raises(UsageError, match=f"^reading quantised GGUF {needs}"):
        load_state(tmp_path / "q8_0.gguf", EVEN)
    save(EVEN, tmp_path / "plain.gguf")  # bf16 needs no package, one way or the other
    assert (tmp_path / "plain.gguf").read_bytes() == (tmp_path / "bf16.gguf").read_bytes()
    with pytest.raises(UsageError, match=f"^writing quantised GGUF {needs}"):
        save(EVEN, tmp_path / "new.gguf", "q8_0")


def save(config: ModelConfig, path: Path, type: str = "bf16") -> None:
    write_gguf(random_state(config), config, path, type)


def test_refusals(tmp_path: Path) -> None:
    (tmp_path / "old.gguf").write_text("precious")
    for path, type, message in (
        ("a.gguf", "q5_0", "unknown GGUF type 'q5_0'; did you mean"),
        ("a", "bf16", r"a: GGUF is one file; a name that ends in \.gguf is wanted"),
        ("old.gguf", "bf16", r"old\.gguf: exists already"),
    ):
        with pytest.raises(UsageError, match=message):
            save(SPARSE, tmp_path / path, type)
    with pytest.raises(ConfigError, match="GGUF holds plain Mixtral models alone"):
        save(SPARSE.replace(shared_experts=1), tmp_path / "a.gguf")
    with pytest.raises(WeightsError, match="the config asks for"):
        write_gguf(random_state(SPARSE.replace(ffn_dim=12)), SPARSE, tmp_path / "a.gguf")
    for options, message in (
        ({"to": "gguf", "dtype": torch.float32}, "format 'gguf' takes a type .* and no dtype"),
        ({"to": "hf", "type": "q8_0"}, "format 'hf' takes a dtype and no type; types are for 'gguf'"),
        ({"to": "gguf", "fused": True}, "format 'gguf' has no fused experts"),
        ({"to": "gguf", "type": "q9"}, "unknown GGUF type 'q9'"),
    ):
        with pytest.raises(UsageError, match=message):
            convert(tmp_path, tmp_path / "a.gguf", **options)
    assert [path.name for path in tmp_path.iterdir()] == ["old.gguf"]
    assert (tmp_path / "old.gguf").read_text() == "precious"


def test_quantised_weights_are_rounded_once(tmp_path: Path) -> None:
    """From what the file holds to what is written, with no step by way of bf16."""
    source = tmp_path / "q8.gguf"
    write_gguf(random_state(EVEN), EVEN, source, "q8_0")
    exact = load_state(source, EVEN, torch.float32)
    convert(source, tmp_path / "fp32", "hf", dtype=torch.float32)
    assert_same(load_state(tmp_path / "fp32", EVEN), exact)
    convert(source, tmp_path / "again.gguf", "gguf", type="q8_0")
    assert_same(load_state(tmp_path / "again.gguf", EVEN, torch.float32), exact)
    convert(source, tmp_path / "bf16", "hf")
    rounded = {name: tensor.bfloat16() for name, tensor in exact.items()}
    assert_same(load_state(tmp_path / "bf16", EVEN, torch.bfloat16), rounded)
    quantise_folder(source, tmp_path / "a", QuantScheme.of("4"))
    quantise_folder(tmp_path / "fp32", tmp_path / "b", QuantScheme.of("4"))
    assert (tmp_path / "a/packed.safetensors").read_bytes() == (tmp_path / "b/packed.safetensors").read_bytes()
