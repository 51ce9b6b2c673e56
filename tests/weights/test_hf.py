"""Against transformers itself: its files load as they should, and it reads ours back to the same tensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import mixtral
from mixtral.config.formats import read_config
from mixtral.errors import ConfigError
from mixtral.weights import detect_format, load_state, save_hf
from tests.weights.weight_states import CONFIGS, assert_same, random_state

COMMON = {"vocab_size": 13, "hidden_size": 24, "intermediate_size": 12, "num_hidden_layers": 2, "head_dim": 4}
CASES: dict[str, tuple[dict[str, Any], bool]] = {  # config, fused
    "mixtral 4": ({"E": 4, "K": 1, "H": 8, "G": 2, "tied": False}, False),
    "mixtral 5 tied": ({"E": 5, "K": 3, "H": 6, "G": 3, "tied": True}, False),
    "mixtral 8 fused": ({"E": 8, "K": 2, "H": 6, "G": 3, "tied": False}, True),
    "mixtral 4 fused tied": ({"E": 4, "K": 2, "H": 8, "G": 2, "tied": True}, True),
    "mistral": ({"E": 1, "K": 1, "H": 8, "G": 2, "tied": False}, False),
    "mistral tied": ({"E": 1, "K": 1, "H": 6, "G": 3, "tied": True}, False),
}
LLAMAS: dict[str, dict[str, Any]] = {
    "grouped": {"num_key_value_heads": 3}, "no groups": {}, "tied": {"tie_word_embeddings": True},
    "theta": {"rope_theta": 5e5},
}


def make(E: int, K: int, H: int, G: int, tied: bool) -> Any:
    """A random fp32 model of transformers."""
    torch.manual_seed(0)
    heads = {"num_attention_heads": H, "num_key_value_heads": G, "sliding_window": 16, "tie_word_embeddings": tied}
    if E == 1:
        return transformers.MistralForCausalLM(transformers.MistralConfig(**COMMON, **heads))
    experts = {"num_local_experts": E, "num_experts_per_tok": K}
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(**COMMON, **heads, **experts))


def as_ours(model: Any, H: int, G: int, E: int, tied: bool) -> dict[str, Tensor]:
    """Our tensors from a live model of transformers, written out head by head and expert by expert."""
    theirs = model.state_dict()
    state = {"embedding.weight": theirs["model.embed_tokens.weight"]}
    for l in range(2):  # noqa: E741
        hf, ours = f"model.layers.{l}.", f"layers.{l}."
        q, k, v = (theirs[f"{hf}self_attn.{x}_proj.weight"].split(4) for x in "qkv")
        R = H // G
        rows = [row for g in range(G) for row in (*q[g * R : (g + 1) * R], k[g], v[g])]
        state[ours + "attention_norm.weight"] = theirs[hf + "input_layernorm.weight"]
        state[ours + "attention.wqkv.weight"] = torch.cat(rows)
        state[ours + "attention.wo.weight"] = theirs[hf + "self_attn.o_proj.weight"]
        state[ours + "ffn_norm.weight"] = theirs[hf + "post_attention_layernorm.weight"]
        if E == 1:
            gate, up = theirs[hf + "mlp.gate_proj.weight"], theirs[hf + "mlp.up_proj.weight"]
            state[ours + "ffn.w13"] = torch.stack([gate, up])
            state[ours + "ffn.w2"] = theirs[hf + "mlp.down_proj.weight"]
        else:
            gate_up = theirs[hf + "mlp.experts.gate_up_proj"]  # transformers splits it with chunk(2): gate, then up
            state[ours + "ffn.router.weight"] = theirs[hf + "mlp.gate.weight"]
            state[ours + "ffn.experts.w13"] = torch.stack([torch.stack([e[:12], e[12:]]) for e in gate_up])
            state[ours + "ffn.experts.w2"] = theirs[hf + "mlp.experts.down_proj"]
    state["norm.weight"] = theirs["model.norm.weight"]
    return state if tied else {**state, "output.weight": theirs["lm_head.weight"]}


@pytest.mark.parametrize("case", CASES)
def test_transformers_to_ours_and_back(case: str, tmp_path: Path) -> None:
    shape, fused = CASES[case]
    model = make(**shape)
    # shards of 20 kB, so that the index is read too
    model.save_pretrained(tmp_path / "hf", save_original_format=not fused, max_shard_size="20KB")
    assert (tmp_path / "hf" / "model.safetensors.index.json").is_file()
    config = read_config(tmp_path / "hf")
    assert config.sliding_window == 16 and config.tie_embeddings == shape["tied"]
    assert detect_format(tmp_path / "hf") == "hf"
    state = load_state(tmp_path / "hf", config)
    expected = as_ours(model, **{k: v for k, v in shape.items() if k != "K"})
    assert_same(state, expected)

    save_hf(state, config, tmp_path / "ours", fused=fused)
    back, report = type(model).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(report.values()), report
    assert back.dtype == torch.float32
    theirs = model.state_dict()
    assert back.state_dict().keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in back.state_dict().items())
    tokens = torch.arange(13)[None]
    assert torch.equal(back(tokens).logits, model(tokens).logits)  # so the config says the same too


@pytest.mark.parametrize("change", LLAMAS.values(), ids=LLAMAS)
def test_a_llama_without_biases_is_a_dense_model(change: dict[str, Any], tmp_path: Path) -> None:
    torch.manual_seed(0)
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**COMMON, num_attention_heads=6, **change)).eval()
    theirs.save_pretrained(tmp_path / "llama")
    lm = mixtral.load(tmp_path / "llama")
    assert not lm.config.is_sparse and lm.config.sliding_window is None
    tokens = torch.arange(13)
    torch.testing.assert_close(lm.logits(tokens), theirs(tokens[None]).logits[0], rtol=0, atol=1e-5)
    lm.save(tmp_path / "ours")
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours").eval()
    torch.testing.assert_close(back(tokens[None]).logits, theirs(tokens[None]).logits, rtol=0, atol=1e-5)


def test_a_llama_of_another_kind_is_refused(tmp_path: Path) -> None:
    for change, key in (({"attention_bias": True}, "attention_bias True"), ({"mlp_bias": True}, "mlp_bias True"),
                        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0,
                          "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}},
                         "rope_parameters")):  # fmt: skip
        transformers.LlamaConfig(**COMMON, num_attention_heads=6, **change).save_pretrained(tmp_path)
        with pytest.raises(ConfigError, match=f"{key}.* is not implemented"):
            read_config(tmp_path)


@pytest.mark.parametrize("fused", [False, True])
def test_gate_and_up_are_not_swapped(fused: bool, tmp_path: Path) -> None:
    """The computation, not the names: an expert applied by hand with our w13 is the one transformers applies."""
    model = make(E=4, K=4, H=6, G=3, tied=False)
    model.save_pretrained(tmp_path, save_original_format=not fused)
    state = load_state(tmp_path, read_config(tmp_path))
    (gate, up), down = state["layers.0.ffn.experts.w13"][2], state["layers.0.ffn.experts.w2"][2]
    x = torch.randn(3, 24)
    ours = (torch.nn.functional.silu(x @ gate.T) * (x @ up.T)) @ down.T
    only_third = torch.full((3, 1), 2), torch.ones(3, 1)
    theirs = model.model.layers[0].mlp.experts(x, *only_third)
    torch.testing.assert_close(ours, theirs)
    swapped = (torch.nn.functional.silu(x @ up.T) * (x @ gate.T)) @ down.T
    assert (swapped - theirs).abs().max() > 100 * (ours - theirs).abs().max()


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("fused", [False, True])
def test_config_is_read_by_transformers(name: str, fused: bool, tmp_path: Path) -> None:
    config = CONFIGS[name].replace(rope_theta=777.0)
    save_hf(random_state(config), config, tmp_path / "x", dtype=torch.bfloat16, fused=fused)
    theirs = transformers.AutoConfig.from_pretrained(tmp_path / "x")
    assert theirs.rope_parameters["rope_theta"] == 777.0
    assert theirs.dtype == torch.bfloat16
    assert (theirs.sliding_window, theirs.max_position_embeddings) == (config.sliding_window, config.context)
    theirs.save_pretrained(tmp_path / "y")
    assert read_config(tmp_path / "y") == config  # what transformers 5 writes of it
