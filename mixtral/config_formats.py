"""ModelConfig from and to the files of others: Hugging Face `config.json` and Mistral `params.json`.

Nested objects are flattened to dotted keys (`rope_parameters.rope_theta`, `moe.num_experts`) on reading, so that one
table a format (config_table.py) says everything.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from mixtral.config import ModelConfig, end_tokens
from mixtral.config_gguf import from_gguf
from mixtral.config_table import RESEARCH, FileFormat, build, flatten, warn_once, written
from mixtral.errors import ConfigError, shown
from mixtral.generation_config import KEYS as GENERATION_KEYS
from mixtral.generation_config import NAME as GENERATION_CONFIG
from mixtral.generation_config import read_generation_config
from mixtral.gguf_header import read_gguf
from mixtral.json_files import read_object

_HF = FileFormat(
    fields={
        "vocab_size": "vocab_size",
        "dim": "hidden_size",
        "n_layers": "num_hidden_layers",
        "n_heads": "num_attention_heads",
        "n_kv_heads": "num_key_value_heads",
        "head_dim": "head_dim",
        "ffn_dim": "intermediate_size",
        "n_experts": "num_local_experts",
        "experts_per_token": "num_experts_per_tok",
        "context": "max_position_embeddings",
        "sliding_window": "sliding_window",
        "norm_eps": "rms_norm_eps",
        "tie_embeddings": "tie_word_embeddings",
        "bos_id": "bos_token_id",
        "eos_id": "eos_token_id",
        "init_std": "initializer_range",
        **RESEARCH,
    },
    theta=("rope_parameters.rope_theta", "rope_theta", "rope_scaling.rope_theta"),
    neutral={
        "hidden_act": ("silu", "swish"),
        "attention_bias": (False, None),
        "mlp_bias": (False, None),
        "rope_parameters": (None, {}),
        "rope_scaling": (None, {}),
        "rope_parameters.rope_type": ("default",),
        "rope_parameters.type": ("default",),
        "rope_parameters.partial_rotary_factor": (1, None),
        "rope_scaling.rope_type": ("default",),
        "rope_scaling.type": ("default",),
        "partial_rotary_factor": (1, None),
        "layer_types": (None,),
        "quantization_config": (None, {}),
    },
    training_only=frozenset({"attention_dropout", "router_jitter_noise"}),
    harmless=frozenset(
        {"architectures", "model_type", "dtype", "torch_dtype", "transformers_version", "_name_or_path", "use_cache"}
        | {"unk_token_id", "output_router_logits", "router_aux_loss_coef"}
        | (GENERATION_KEYS - {"bos_token_id", "eos_token_id"})  # old files; engine/defaults.py reads them
    ),
    closed=("rope_parameters.", "rope_scaling.", "quantization_config."),
)

_MISTRAL = FileFormat(
    fields={
        "vocab_size": "vocab_size",
        "dim": "dim",
        "n_layers": "n_layers",
        "n_heads": "n_heads",
        "n_kv_heads": "n_kv_heads",
        "head_dim": "head_dim",
        "ffn_dim": "hidden_dim",
        "n_experts": "moe.num_experts",
        "experts_per_token": "moe.num_experts_per_tok",
        "context": "max_seq_len",
        "sliding_window": "sliding_window",
        "norm_eps": "norm_eps",
        "tie_embeddings": "tied_embeddings",
    },
    theta=("rope_theta",),
    neutral={
        "use_biases": (False, None),
        "causal": (True, None),
        "model_type": ("transformer", None),
        "rope_scaling": (None, {}),
        "yarn": (None, {}),
        "llama_4_scaling": (None, {}),
        "quantization": (None, {}),
        "lora": (None, {}),
        "vision_encoder": (None, {}),
        "moe.num_shared_experts": (0, None),
        "moe.first_k_dense_replace": (0, None),
        "moe.route_every_n": (1, None),
        "moe.routed_scale": (1, None),
    },
    training_only=frozenset(),
    harmless=frozenset({"moe", "max_batch_size", "moe.expert_parallel"}),
    closed=("rope_scaling.", "yarn.", "llama_4_scaling.", "quantization.", "lora.", "vision_encoder."),
)

# -- reading ---------------------------------------------------------------------------------------------------------


def read_config(path: str | Path) -> ModelConfig:
    """From a model folder (its `config.json`, else its `params.json`), from one such file, or from a GGUF file.

    Of a folder, the end tokens are those of generation_config.json where it names any.

    Raises ConfigError, one line with the file, when it is missing, broken, incomplete, or asks for what we lack;
    WeightsError for a damaged GGUF file.
    """
    file = _config_file(Path(path))
    headers = [header for _, header in read_gguf(file)] if file.suffix == ".gguf" else []
    values = {} if headers else read_object(file)
    try:
        if headers:
            return from_gguf(headers)
        config = from_mistral(values) if {"dim", "n_layers"} <= values.keys() else from_hf(values)
    except ConfigError as error:
        raise ConfigError(f"{file}: {str(error).removeprefix('config: ')}") from None
    return config if file == Path(path) else _with_end_tokens(config, file.parent)


_OURS = "mixtral_research"  # the model_type of what transformers would compute wrongly
QUANT_METHOD = "mixtral"  # the quant_method of folders that `mixtral quantize` wrote; quant/recipe.py reads the rest


def from_hf(values: dict[str, Any]) -> ModelConfig:
    """From the content of a `config.json` of model_type mixtral, mistral (transformers 4 or 5 keys) or ours."""
    kind = values.get("model_type")
    if kind not in ("mixtral", "mistral", _OURS):
        raise ConfigError(f"model_type must be 'mixtral' or 'mistral', not {shown(kind)}")
    flat = flatten(values)
    if flat.get("quantization_config.quant_method") == QUANT_METHOD:
        flat = {key: value for key, value in flat.items() if not key.startswith("quantization_config.")}
    if kind == "mistral" and "sliding_window" not in flat:
        flat["sliding_window"] = 4096
        warn_once("config.json of a mistral model without sliding_window: 4096 assumed, as transformers does")
    if flat.get("num_key_value_heads", 0) is None:
        flat["num_key_value_heads"] = flat.get("num_attention_heads")
    return build(flat, _HF, sparse=kind != "mistral")


def from_mistral(values: dict[str, Any]) -> ModelConfig:
    """From the content of a `params.json`; with a `moe` object the model is sparse."""
    return build(flatten(values), _MISTRAL, sparse=values.get("moe") is not None)


def _with_end_tokens(config: ModelConfig, folder: Path) -> ModelConfig:
    """With the end tokens of generation_config.json, which count before those of config.json."""
    file, values = read_generation_config(folder)
    if file.name != GENERATION_CONFIG:
        return config
    if "eos_token_id" not in values:
        if config.eos_ids:
            ids = ", ".join(map(str, config.eos_ids))
            warn_once(f"{file} names no eos_token_id: a text ends at {ids}; with transformers it would not end")
        return config
    return config.replace(eos_id=end_tokens(values["eos_token_id"], f"{file}: eos_token_id"))


def _config_file(path: Path) -> Path:
    if not os.path.exists(path):  # Path's own methods raise for names that are too long, or hold a zero
        raise ConfigError(f"{path}: no such file or folder; a model folder holds config.json or params.json")
    if not path.is_dir():
        return path
    for name in ("config.json", "params.json"):
        if (path / name).exists():
            return path / name
    raise ConfigError(f"{path}: neither config.json nor params.json is there")


# -- writing ---------------------------------------------------------------------------------------------------------


def to_hf(config: ModelConfig, dtype: str) -> dict[str, Any]:
    """The content of a `config.json`; `dtype` as in "bfloat16".

    transformers 4 and 5 both read it, unless the model has a router or shared experts that they do not know: its
    model_type is then our own, so that they refuse it instead of computing something else.
    """
    kind = "mixtral" if config.is_sparse else "mistral"
    architecture = kind.capitalize()
    if not config.is_plain:
        kind, architecture = _OURS, "MixtralResearch"
    return {
        "architectures": [f"{architecture}ForCausalLM"],
        "model_type": kind,
        **{key: getattr(config, ours) for ours, key in written(config, _HF)},
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        "rope_theta": config.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "torch_dtype": dtype,
        "dtype": dtype,
        "use_cache": True,
    }


def to_mistral(config: ModelConfig) -> dict[str, Any]:
    """The content of a `params.json`. It has no place for the ids of the first and last token: the tokenizer does.

    Raises ConfigError for a model that is not plain Mistral or Mixtral.
    """
    if not config.is_plain:
        what = f"router {config.router!r} and {config.shared_experts} shared experts"
        raise ConfigError(f"Mistral's format holds plain Mixtral models alone, not {what}; write it as 'hf'")
    flat = {key: getattr(config, ours) for ours, key in written(config, _MISTRAL)}
    moe = {key.removeprefix("moe."): flat.pop(key) for key in list(flat) if key.startswith("moe.")}
    return flat | {"rope_theta": config.rope_theta} | ({"moe": moe} if moe else {})


