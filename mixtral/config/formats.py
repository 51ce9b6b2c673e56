"""ModelConfig from and to the files of others: Hugging Face `config.json` and Mistral `params.json`.

Nested objects are flattened to dotted keys (`rope_parameters.rope_theta`, `moe.num_experts`) on reading, so that one
table a format (config_table.py) says everything.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from mixtral.config.fp8 import read_fp8
from mixtral.config.generation import KEYS as GENERATION_KEYS
from mixtral.config.generation import NAME as GENERATION_CONFIG
from mixtral.config.generation import read_generation_config
from mixtral.config.gguf import from_gguf
from mixtral.config.model import ModelConfig, end_tokens
from mixtral.config.table import RESEARCH, FileFormat, build, flatten, warn_once, written
from mixtral.errors import ConfigError, shown
from mixtral.gguf.header import read_gguf
from mixtral.hub import is_name
from mixtral.json_files import read_object

# What Hugging Face's and Mistral's files call the fields of ModelConfig.
_HF_FIELDS = {
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
}
_MISTRAL_FIELDS = {
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
}
_OTHER_NAMES = {  # of the same fields, in files of related models and of older tools
    "num_experts": "n_experts", "num_experts_per_token": "experts_per_token", "moe_top_k": "experts_per_token",
    "top_k_experts": "experts_per_token", "num_selected_experts": "experts_per_token",
    "layer_norm_eps": "norm_eps", "layer_norm_epsilon": "norm_eps", "rms_norm_epsilon": "norm_eps",
    "rotary_base": "rope_theta", "rope_base": "rope_theta", "rotary_emb_base": "rope_theta",
    "window_size": "sliding_window", "attention_window": "sliding_window", "tie_embeddings": "tie_embeddings",
    "moe_intermediate_size": "ffn_dim", "moe.expert_hidden_dim": "ffn_dim",
    "query_pre_attn_scalar": "head_dim", "rotary_dim": "head_dim", "v_head_dim": "head_dim",
    "qk_rope_head_dim": "head_dim",
}  # fmt: skip

# Keys of either format and of related models, and the values with which those compute what Mistral and Mixtral do.
_NO, _ONE, _SILU = (False, 0, None), (1, None), ("silu", "swish", None)
_NEUTRAL: dict[str, tuple[object, ...]] = {
    "hidden_act": ("silu", "swish"), "hidden_activation": _SILU, "activation_function": _SILU, "activation": _SILU,
    "ffn_act": _SILU, "norm_type": ("rmsnorm", "rms_norm", "RMSNorm", None),
    "attention_bias": _NO, "attn_bias": _NO, "mlp_bias": _NO, "qkv_bias": _NO, "use_bias": _NO, "use_biases": _NO,
    "use_qkv_bias": _NO, "lm_head_bias": _NO, "use_qk_norm": _NO, "qk_norm": _NO, "qk_layernorm": _NO,
    "clip_qkv": _NO, "alibi": _NO, "use_parallel_residual": _NO, "parallel_attn": _NO, "multi_query": _NO,
    "scale_attn_weights": (True, None), "causal": (True, None), "residual_in_fp32": _NO,
    "attn_logit_softcapping": _NO, "router_logit_softcapping": _NO, "final_logit_softcapping": _NO,
    "attention_multiplier": (None,), "embedding_multiplier": _ONE, "residual_multiplier": _ONE,
    "logits_scaling": _ONE, "logit_scale": _ONE, "output_multiplier": _ONE, "mup_scale": _ONE,
    "attention_chunk_size": _NO, "attn_temperature_tuning": _NO, "no_rope_layers": ([], None),
    "rope_parameters": (None, {}), "rope_parameters.rope_type": ("default",), "rope_parameters.type": ("default",),
    "rope_parameters.partial_rotary_factor": _ONE, "partial_rotary_factor": _ONE, "rotary_percent": _ONE,
    "rotary_pct": _ONE, "rope_pct": _ONE, "rope_interleave": _NO, "rope_local_base_freq": (None,),
    "rope_scaling": (None, {}), "rope_scaling.rope_type": ("default",), "rope_scaling.type": ("default",),
    "use_scaled_rope": _NO, "rope_scaling_factor": _ONE, "rope_scaling_type": ("none", "default", None),
    "yarn": (None, {}), "llama_4_scaling": (None, {}), "position_embedding_type": ("rope", "rotary", None),
    "norm_topk_prob": (True, None), "normalize_expert_weights": (True, None),
    "moe_normalize_expert_weights": (True, None), "routed_scaling_factor": _ONE, "router_scaling": _ONE,
    "scoring_func": ("softmax", None), "topk_method": ("greedy", None), "n_group": (*_ONE, 0), "topk_group": (*_ONE, 0),
    "n_routed_experts": (None,), "n_shared_experts": _NO, "num_shared_experts": _NO,
    "shared_expert_intermediate_size": _NO, "first_k_dense_replace": _NO, "decoder_sparse_step": _ONE,
    "moe_layer_freq": _ONE, "interleave_moe_layer_step": _ONE, "mlp_only_layers": ([], None),
    "num_nextn_predict_layers": _NO, "q_lora_rank": _NO, "kv_lora_rank": _NO, "add_cross_attention": _NO,
    "is_encoder_decoder": _NO, "per_layer_config": (None, {}), "pruned_heads": (None, {}),
    "quantization_config": (None, {}), "compression_config": (None, {}), "quantization": (None, {}),
}  # fmt: skip
_TRAINING_ONLY = frozenset(
    {"attention_dropout", "hidden_dropout", "resid_pdrop", "embd_pdrop", "attn_pdrop", "layerdrop"}
    | {"router_jitter_noise", "jitter_noise", "router_z_loss_coef"}
)
# Which layers have the window, in files of related models: all.
_WITH_WINDOW = {"use_sliding_window": (True, None), "max_window_layers": (0, None), "sliding_window_pattern": (None,)}
_WINDOWS = frozenset({*_WITH_WINDOW, "layer_types"})


def _other_names(own: dict[str, str], aliases: dict[str, str]) -> dict[str, str]:
    """Names of fields that are not a format's own: where one is there, it must say the same. -> key -> field."""
    fields = [(key, ours) for names in (_HF_FIELDS, _MISTRAL_FIELDS) for ours, key in names.items()]
    known = {*own.values(), *aliases}
    return {key: ours for key, ours in (*fields, *_OTHER_NAMES.items()) if ours not in _LENIENT and key not in known}


_LENIENT = ("context", "init_std", "bos_id", "eos_id")  # no forward pass depends on them: another's are reported
_HF_ALIASES = {"num_experts": "num_local_experts", "num_experts_per_token": "num_experts_per_tok"}
_HF = FileFormat(
    fields=_HF_FIELDS,
    theta=("rope_parameters.rope_theta", "rope_theta", "rope_scaling.rope_theta"),
    neutral=_NEUTRAL,
    training_only=_TRAINING_ONLY,
    harmless=frozenset(
        {"architectures", "model_type", "dtype", "torch_dtype", "transformers_version", "_name_or_path", "use_cache"}
        | {"pad_token_id", "unk_token_id", "sep_token_id", "output_router_logits", "router_aux_loss_coef", "auto_map"}
        | {"output_hidden_states", "output_attentions", "return_dict", "chunk_size_feed_forward", "problem_type"}
        | {"id2label", "label2id", "num_labels", "finetuning_task", "task_specific_params", "tokenizer_class", "prefix"}
        | {"torchscript", "use_bfloat16", "pretraining_tp", "attn_implementation", "_attn_implementation_autoset"}
        | (GENERATION_KEYS - {"bos_token_id", "eos_token_id"})  # old files; engine/defaults.py reads them
    ),
    checked=_WINDOWS,
    closed=("moe.",),
    aliases=_HF_ALIASES,
    repeated=_other_names(_HF_FIELDS, _HF_ALIASES),
)
_MISTRAL_ALIASES = {"_sliding_window": "sliding_window"}
_MISTRAL = FileFormat(
    fields=_MISTRAL_FIELDS,
    theta=("rope_theta", "rope_parameters.rope_theta", "rope_scaling.rope_theta"),
    neutral={
        **_NEUTRAL,
        "model_type": ("transformer", None),
        "vision_encoder": (None, {}),
        "multimodal": (None, {}),
        "moe.num_shared_experts": (0, None),
        "moe.first_k_dense_replace": (0, None),
        "moe.route_every_n": _ONE,
        "moe.routed_scale": _ONE,
        "moe.num_expert_groups": _ONE,
        "moe.num_expert_groups_per_tok": _ONE,
    },
    training_only=_TRAINING_ONLY,
    checked=_WINDOWS,
    # "lora" says how the model was trained; tensors of it that are not merged are refused when weights are read
    harmless=frozenset(
        {"max_batch_size", "max_position_embeddings", "lora", "moe.expert_parallel", "moe.expert_model_parallel"}
    ),
    closed=("moe.",),
    aliases=_MISTRAL_ALIASES,
    repeated=_other_names(_MISTRAL_FIELDS, _MISTRAL_ALIASES),
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
    if values.keys() == {"train", "environment"}:  # what train/run_folder.py writes
        raise ConfigError(f"{file.parent} is a training run; {_model_of_run(file.parent)}")
    try:
        if headers:
            return from_gguf(headers, str(file))
        if values.get("vocab_size") == -1:
            values["vocab_size"] = _embedding_rows(file)
        reads = from_mistral if {"dim", "n_layers"} <= values.keys() else from_hf
        config = reads(values, str(file))
    except ConfigError as error:
        raise ConfigError(f"{file}: {str(error).removeprefix('config: ')}") from None
    return config if file == Path(path) else _with_end_tokens(config, file.parent)


_OURS = "mixtral_research"  # the model_type of what transformers would compute wrongly
QUANT_METHOD = "mixtral"  # the quant_method of folders that `mixtral quantize` wrote; quant/scheme.py reads the rest


def from_hf(values: dict[str, Any], where: str = "config") -> ModelConfig:
    """From the content of a `config.json` of model_type mixtral, mistral or llama (transformers 4 or 5 keys), or ours.

    A llama without biases and scaling is Mistral's dense architecture.

    `where` is what warnings call it.
    """
    kind = values.get("model_type")
    if kind not in ("mixtral", "mistral", "llama", _OURS):
        raise ConfigError(f"model_type must be 'mixtral', 'mistral' or 'llama', not {shown(kind)}")
    flat = flatten(values)
    if flat.get("quantization_config.quant_method") == QUANT_METHOD:
        flat = _without(flat, "quantization_config")
    if fp8 := read_fp8(values):
        flat = _without(flat, fp8.key)
    if kind == "mistral" and "sliding_window" not in flat:
        flat["sliding_window"] = 4096
        warn_once(f"{where} of a mistral model without sliding_window: 4096 assumed, as transformers does")
    _check_window(flat, flat.get("num_hidden_layers"))
    if flat.get("num_key_value_heads", None if kind == "llama" else 0) is None:
        flat["num_key_value_heads"] = flat.get("num_attention_heads")
    if kind == "llama" and not any(flat.get(key) for key in _HF.theta):
        flat["rope_theta"] = 1e4
        warn_once(f"{where} of a llama model without rope_theta: 1e4 assumed, as transformers does")
    dense = kind in ("mistral", "llama")
    if dense and any(flat.get(key) not in (None, 0, 1) for key in ("num_local_experts", "num_experts")):
        raise ConfigError(f"num_local_experts: a model of model_type {kind!r} has none; that of 'mixtral' has")
    return build(flat, _HF, sparse=not dense, where=where)


def from_mistral(values: dict[str, Any], where: str = "config") -> ModelConfig:
    """From the content of a `params.json`, which warnings call `where`; with a `moe` object the model is sparse."""
    flat = flatten(values)
    if fp8 := read_fp8(values):
        flat = _without(flat, fp8.key)
    if flat.get("moe", 0) is None:
        del flat["moe"]
    if flat.get("max_seq_len") is None:
        flat["max_seq_len"] = flat.get("max_position_embeddings")
    for key in ("sliding_window", "_sliding_window"):
        if isinstance(flat.get(key), list):
            flat[key] = _one_window(key, flat[key], flat.get("n_layers"))
    _check_window(flat, flat.get("n_layers"))
    return build(flat, _MISTRAL, sparse=values.get("moe") is not None, where=where)


def _without(flat: dict[str, Any], object_key: str) -> dict[str, Any]:
    return {key: value for key, value in flat.items() if not key.startswith(f"{object_key}.")}


def _one_window(key: str, windows: list[Any], n_layers: object) -> Any:
    """Of the windows of layers that take turns, which must be one: a list whose length divides the layers."""
    whole = type(n_layers) is int and windows and n_layers % len(windows) == 0
    if not whole or any(window != windows[0] for window in windows):
        raise ConfigError(f"{key} {shown(windows)} is not implemented; only one number, or null, for all layers is")
    return windows[0]


def _embedding_rows(file: Path) -> int:
    """The vocabulary of a params.json that leaves it to the tokenizer: as many tokens as the embedding has rows."""
    from mixtral.weights.safetensors_file import SafetensorsFile  # not at the top: their package imports this file
    from mixtral.weights.torch_file import TorchFile

    readers: dict[str, type[SafetensorsFile] | type[TorchFile]]
    readers = {".safetensors": SafetensorsFile, ".pt": TorchFile, ".pth": TorchFile}
    for path in sorted(file.parent.glob("consolidated*")):
        header = reader(path).headers.get("tok_embeddings.weight") if (reader := readers.get(path.suffix)) else None
        if header and header.shape:
            warn_once(f"{file} with vocab_size -1: {header.shape[0]} taken, the rows of the embedding")
            return header.shape[0]
    raise ConfigError("vocab_size is -1, and beside it is no consolidated file with an embedding to take it from")


def _check_window(flat: dict[str, Any], n_layers: object) -> None:
    """Refuse keys that let some layers have another window than sliding_window says."""
    window, types = flat.get("sliding_window", flat.get("_sliding_window")), flat.get("layer_types")
    wanted = ("full_attention", "attention") if window is None else ("sliding_attention",)
    fits = isinstance(types, list) and len(types) == n_layers and all(kind in wanted for kind in types)
    if types is not None and not fits:
        only = f"only {wanted[0]!r} for each of {n_layers} layers is with sliding_window {window}"
        raise ConfigError(f"layer_types {shown(types)} is not implemented; {only}")
    if window is None:
        return
    for key, allowed in _WITH_WINDOW.items():
        if flat.get(key) not in allowed:
            said = " or ".join(map(repr, allowed))
            raise ConfigError(f"{key} {shown(flat[key])} with a sliding_window is not implemented; only {said} is")


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
        hub = f"; `mixtral pull {path}` fetches a model of the hub" if is_name(str(path)) else ""
        raise ConfigError(f"{path}: no such file or folder; a model folder holds config.json or params.json{hub}")
    if not path.is_dir():
        _check_name(path)
        return path
    for name in ("config.json", "params.json"):
        if (path / name).exists():
            return path / name
    if path.parent.name == "checkpoints":
        raise ConfigError(f"{path} is a checkpoint of a training run; {_model_of_run(path.parent.parent)}")
    raise ConfigError(f"{path}: neither config.json nor params.json is there")


def _check_name(file: Path) -> None:
    """Raise ConfigError for a file that by its name holds no configuration."""
    if file.suffix in _WEIGHTS or file.name.endswith(".index.json"):
        raise ConfigError(f"{file}: a file of weights; give its folder, {file.parent}")
    if file.suffix not in (".json", ".gguf"):
        raise ConfigError(f"{file}: no model; a model folder, config.json, params.json or a .gguf file is wanted")


_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")


def _model_of_run(run: Path) -> str:
    """Where the model of a training run is, as the end of a sentence."""
    final = run / "final"
    return f"its model is {final}" if (final / "config.json").is_file() else "it has no finished model yet"


# -- writing ---------------------------------------------------------------------------------------------------------


def to_hf(config: ModelConfig, dtype: str) -> dict[str, Any]:
    """The content of a `config.json`; `dtype` as in "bfloat16".

    transformers 4 and 5 both read it, unless the model has a router, shared experts or layers that they do not know:
    its model_type is then our own, so that they refuse it instead of computing something else.
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
        what = config.not_plain()
        raise ConfigError(f"Mistral's format holds plain Mixtral models alone, not {what}; write it as 'hf'")
    flat = {key: getattr(config, ours) for ours, key in written(config, _MISTRAL)}
    moe = {key.removeprefix("moe."): flat.pop(key) for key in list(flat) if key.startswith("moe.")}
    return flat | {"rope_theta": config.rope_theta} | ({"moe": moe} if moe else {})
