"""fp8 checkpoints, each layout of scales, against weights rounded and scaled by hand."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import mixtral
from mixtral.config.formats import read_config, to_hf
from mixtral.config.fp8 import read_fp8
from mixtral.errors import ConfigError, WeightsError
from mixtral.quant.quantize import quantise_folder
from mixtral.quant.scheme import QuantScheme
from mixtral.weights import convert, load_state, save_hf
from mixtral.weights.names import slots
from tests.weights.weight_states import DENSE, SPARSE, random_state

Layout = Callable[[Tensor], tuple[Tensor, Tensor]]  # weight -> scale as it is stored, and one for each number
BLOCK = (8, 16)  # divides none of the sizes
FP8 = torch.float8_e4m3fn


def by_tensor(weight: Tensor) -> tuple[Tensor, Tensor]:
    scale = weight.abs().amax() / 448
    return scale, scale.expand_as(weight)


def by_row(weight: Tensor) -> tuple[Tensor, Tensor]:
    scale = weight.abs().amax(-1, keepdim=True) / 448
    return scale, scale.expand_as(weight)


def by_block(weight: Tensor) -> tuple[Tensor, Tensor]:
    n, k = weight.shape
    scale, whole = torch.empty(-(-n // BLOCK[0]), -(-k // BLOCK[1])), torch.empty(n, k)
    for i in range(scale.shape[0]):
        for j in range(scale.shape[1]):
            part = (slice(i * BLOCK[0], (i + 1) * BLOCK[0]), slice(j * BLOCK[1], (j + 1) * BLOCK[1]))
            scale[i, j] = weight[part].abs().amax() / 448
            whole[part] = scale[i, j]
    return scale, whole


def compressed(strategy: str, **more: Any) -> dict[str, Any]:
    weights = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": strategy, "dynamic": False, **more}
    groups = {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": None}}
    return {"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": groups}


# quantization_config, layout, suffix of the scale's name
CASES: dict[str, tuple[dict[str, Any], Layout, str]] = {
    "transformers, blocks": ({"quant_method": "fp8", "weight_block_size": list(BLOCK)}, by_block, "_scale_inv"),
    "transformers, tensors": (
        {"quant_method": "fp8", "activation_scheme": "static", "weight_block_size": None}, by_tensor, "_scale_inv"
    ),
    "vLLM, tensors": ({"quant_method": "fp8", "activation_scheme": "static"}, by_tensor, "_scale"),
    "compressed-tensors, tensors": (compressed("tensor"), by_tensor, "_scale"),
    "compressed-tensors, rows": (compressed("channel"), by_row, "_scale"),
    "compressed-tensors, blocks": (compressed("block", block_structure=list(BLOCK)), by_block, "_scale"),
    "compressed-tensors, blocks as text": (compressed("block", block_structure="8x16"), by_block, "_scale"),
}  # fmt: skip


def write(folder: Path, case: str, name: str = "sparse") -> dict[str, Tensor]:
    """An fp8 folder of Hugging Face's -> our tensors as they should be read."""
    config = {"sparse": SPARSE, "dense": DENSE}[name]
    said, layout, suffix = CASES[case]
    state = random_state(config)
    save_hf(state, config, folder, dtype=torch.float32)
    file = folder / "model.safetensors"
    plain, stored = load_file(file), dict[str, Tensor]()
    kept = ("embed_tokens", "lm_head", "norm", "block_sparse_moe.gate.")
    for key, weight in plain.items():
        if any(part in key for part in kept):
            stored[key] = weight
            continue
        scale, whole = layout(weight)
        stored[key] = (weight / whole).to(FP8)
        stored[key + suffix] = scale
        stored[key.removesuffix("weight") + "input_scale"] = torch.tensor(1.0)
        plain[key] = stored[key].float() * whole
    save_file(stored, file)
    (folder / "config.json").write_text(json.dumps(to_hf(config, "bfloat16") | {"quantization_config": said}))
    ffn = "per-expert" if config.is_sparse else "dense"
    for key, slot in slots(config, "hf", ffn).items():
        slot.view(state[slot.ours]).copy_(plain[key].reshape(slot.view(state[slot.ours]).shape))
    return state


@pytest.mark.parametrize("name", ["sparse", "dense"])
@pytest.mark.parametrize("case", CASES)
def test_weights_are_multiplied_by_their_scales(case: str, name: str, tmp_path: Path) -> None:
    wanted = write(tmp_path / "fp8", case, name)
    config = read_config(tmp_path / "fp8")
    assert config == {"sparse": SPARSE, "dense": DENSE}[name]
    read = load_state(tmp_path / "fp8", config, torch.float32)
    for key, tensor in wanted.items():
        assert torch.equal(read[key], tensor), key


def test_generates_as_the_expanded_model(tmp_path: Path) -> None:
    wanted = write(tmp_path / "fp8", "transformers, blocks")
    save_hf(wanted, SPARSE, tmp_path / "fp32")
    fp8, fp32 = mixtral.load(tmp_path / "fp8"), mixtral.load(tmp_path / "fp32")
    assert torch.equal(fp8.logits([1, 2, 3]), fp32.logits([1, 2, 3]))
    assert load_state(tmp_path / "fp8", SPARSE)["layers.0.attention.wo.weight"].dtype == torch.bfloat16
    fp8.save(tmp_path / "saved")
    assert torch.equal(mixtral.load(tmp_path / "saved").logits([1, 2, 3]), fp32.logits([1, 2, 3]))


def test_stacks_of_experts(tmp_path: Path) -> None:
    """As transformers 5 holds them: blocks of each expert's matrix, or one scale for each expert."""
    save_hf(random_state(SPARSE), SPARSE, tmp_path, fused=True)
    plain = load_file(tmp_path / "model.safetensors")
    stored = dict(plain)
    for key, weight in plain.items():
        if "gate_up_proj" in key:
            made = [by_block(expert) for expert in weight]
            scale, whole = (torch.stack(parts) for parts in zip(*made, strict=True))
        elif "down_proj" in key:
            scale = weight.abs().amax((1, 2), keepdim=True) / 448
            whole = scale.expand_as(weight)
        else:
            continue
        stored |= {key: (weight / whole).to(FP8), key + "_scale_inv": scale.contiguous()}
        plain[key] = stored[key].float() * whole
    said = {"quant_method": "fp8", "weight_block_size": list(BLOCK)}
    (tmp_path / "config.json").write_text(json.dumps(to_hf(SPARSE, "float32") | {"quantization_config": said}))
    save_file(plain, tmp_path / "model.safetensors")
    wanted = load_state(tmp_path, SPARSE)
    save_file(stored, tmp_path / "model.safetensors")
    read = load_state(tmp_path, SPARSE, torch.float32)
    assert all(torch.equal(read[key], tensor) for key, tensor in wanted.items())


def test_mistrals_own_files(tmp_path: Path) -> None:
    mixtral.weights.save_mistral(random_state(DENSE), DENSE, tmp_path, torch.float32)
    file = tmp_path / "consolidated.safetensors"
    plain = load_file(file)
    stored = dict(plain)
    for key, weight in plain.items():
        if "attention.w" in key or "feed_forward" in key:
            scale, whole = by_tensor(weight)
            stem, one = key.removesuffix("weight"), torch.ones(())
            stored |= {key: (weight / whole).to(FP8), stem + "qscale_weight": scale, stem + "qscale_act": one}
            plain[key] = stored[key].float() * whole
    save_file(plain, file)
    wanted = load_state(tmp_path, DENSE)
    save_file(stored, file)
    values = json.loads((tmp_path / "params.json").read_bytes())
    values["quantization"] = {"qformat_weight": "fp8_e4m3", "qscheme_act": "TENSOR"}
    (tmp_path / "params.json").write_text(json.dumps(values))
    assert read_config(tmp_path).dim == DENSE.dim
    read = load_state(tmp_path, DENSE, torch.float32)
    assert all(torch.equal(read[key], tensor) for key, tensor in wanted.items())


def test_a_scale_that_is_missing_or_does_not_fit(tmp_path: Path) -> None:
    write(tmp_path, "transformers, blocks")
    file, scale = tmp_path / "model.safetensors", "model.layers.1.self_attn.o_proj.weight_scale_inv"
    stored = load_file(file)
    save_file({key: value for key, value in stored.items() if key != scale}, file)
    what = r"1 stored as F8_E4M3, not as .*: model\.layers\.1\.self_attn\.o_proj\.weight$"
    with pytest.raises(WeightsError, match=what):
        load_state(tmp_path, SPARSE)
    save_file({**stored, scale: torch.ones(2, 2)}, file)
    what = rf"model\.safetensors: {scale} is F32 \[2, 2\]; for a weight \[24, 24\] one number, .* or \[3, 2\], one for "
    save_file({**stored, scale: torch.ones(2, 3)}, file)
    with pytest.raises(WeightsError, match=what.replace(r"\[2, 2\]", r"\[2, 3\]")):
        load_state(tmp_path, SPARSE)
    save_file({**stored, scale: torch.ones(3, 2, dtype=torch.int64)}, file)
    with pytest.raises(WeightsError, match=rf"{scale} is I64 \[3, 2\]"):
        load_state(tmp_path, SPARSE)


@pytest.mark.parametrize(("said", "message"), [
    ({"quant_method": "fp8", "fmt": "e5m2"}, "quantization_config.fmt 'e5m2' is not implemented; only 'e4m3' is"),
    ({"quant_method": "fp8", "weight_block_size": [128]}, r"block_size must be two positive numbers, not \[128\]"),
    (compressed("tensor", num_bits=4), "config_groups.group_0.weights.num_bits 4 is not implemented; only 8 is"),
    (compressed("tensor", type="int"), "weights.type 'int' is not implemented; only 'float' is"),
    (compressed("tensor_group"), "weights.strategy 'tensor_group' is not implemented; only 'tensor' or 'channel' or"),
    (compressed("block", block_structure="8y16"), "block_structure must be two positive numbers, not '8y16'"),
    ({"quant_method": "compressed-tensors"}, "config_groups must say how weights were rounded, not None"),
    ({"quant_method": "compressed-tensors", "config_groups": {"a": 1}}, "config_groups.a.weights must be an object"),
])  # fmt: skip
def test_what_is_refused(said: dict[str, Any], message: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(to_hf(SPARSE, "bfloat16") | {"quantization_config": said}))
    with pytest.raises(ConfigError, match=message):
        read_config(tmp_path)


def test_another_quantisation_beside_it_is_refused(tmp_path: Path) -> None:
    values = to_hf(SPARSE, "bfloat16") | {"quantization_config": CASES["vLLM, tensors"][0], "quantization": {"bits": 4}}
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(ConfigError, match=r"quantization\.bits is not implemented"):
        read_config(tmp_path)


def test_quantised_and_converted_as_the_expanded_model(tmp_path: Path) -> None:
    save_hf(write(tmp_path / "fp8", "transformers, blocks"), SPARSE, tmp_path / "fp32")
    for name in ("fp8", "fp32"):
        quantise_folder(tmp_path / name, tmp_path / f"{name}-int8", QuantScheme.of("8"))
        convert(tmp_path / name, tmp_path / f"{name}.gguf", "gguf")
    for file in ("{}-int8/packed.safetensors", "{}.gguf"):
        assert (tmp_path / file.format("fp8")).read_bytes() == (tmp_path / file.format("fp32")).read_bytes()


def test_blocks_of_two_sizes_are_refused() -> None:
    said = compressed("block", block_structure=[8, 16])
    said["config_groups"]["group_1"] = compressed("block", block_structure=[4, 4])["config_groups"]["group_0"]
    with pytest.raises(ConfigError, match="blocks of several sizes are not implemented"):
        read_fp8({"quantization_config": said})
