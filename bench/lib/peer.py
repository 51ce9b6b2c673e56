"""transformers' Mixtral with our weights: the peer of the model and training benchmarks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, MixtralConfig
from transformers.initialization import no_init_weights

from mixtral.config import ModelConfig
from mixtral.config.formats import to_hf
from mixtral.model import Mixtral

# Its third way, batched_mm, gathers an expert's weights for every routed row: 15 GB a layer at 2,048 tokens here.
EXPERTS = ("eager", "grouped_mm")


def peer(model: Mixtral, dtype: torch.dtype, experts: str) -> nn.Module:
    """A transformers model holding a copy of `model`'s weights in `dtype`; `experts` is its experts implementation."""
    config = MixtralConfig(**to_hf(model.config, str(dtype).removeprefix("torch.")))
    with no_init_weights():  # drawing numbers to overwrite them takes longer than the trial
        made: nn.Module = AutoModelForCausalLM.from_config(
            config, attn_implementation="sdpa", experts_implementation=experts, dtype=dtype
        )
    made.load_state_dict(_state(model), strict=True)
    return made


def _state(model: Mixtral) -> dict[str, Tensor]:
    config: ModelConfig = model.config
    state = {
        "model.embed_tokens.weight": model.embedding.weight,
        "model.norm.weight": model.norm.weight,
        "lm_head.weight": model.output_weight,
    }
    for i, block in enumerate(model.layers):
        parts: dict[str, Any] = {
            "input_layernorm.weight": block.attention_norm.weight,
            "post_attention_layernorm.weight": block.ffn_norm.weight,
            "self_attn.o_proj.weight": block.attention.wo.weight,
            "mlp.gate.weight": block.ffn.router.weight,
            "mlp.experts.gate_up_proj": block.ffn.experts.w13.flatten(1, 2),
            "mlp.experts.down_proj": block.ffn.experts.w2,
        }
        heads = block.attention.wqkv.weight.unflatten(0, (config.n_kv_heads, -1, config.head_dim))
        for name, rows in (("q", heads[:, :-2]), ("k", heads[:, -2]), ("v", heads[:, -1])):
            parts[f"self_attn.{name}_proj.weight"] = rows.reshape(-1, config.dim)
        state |= {f"model.layers.{i}.{name}": value.detach() for name, value in parts.items()}
    return state
