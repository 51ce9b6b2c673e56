"""ModelConfig from and to the files of others: Hugging Face `config.json` and Mistral `params.json`.

Nested objects are flattened to dotted keys (`rope_parameters.rope_theta`, `moe.num_experts`) on reading, so that one
table a format says everything: which key is which field, which values mean "nothing special" for a key whose other
values would change the computation (those are refused), and which keys say nothing about the computation. A key in no
table is reported once.
"""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mixtral.config import ModelConfig
from mixtral.errors import ConfigError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Format:
    """What the keys of one kind of file mean."""

    fields: dict[str, str]  # field of ModelConfig -> key of the file
    theta: tuple[str, ...]  # keys that may hold the rotary base; all that are there must agree
    neutral: dict[str, tuple[object, ...]]  # key -> its values that ask for nothing we lack
    training_only: frozenset[str]  # change training alone; reported when set
    harmless: frozenset[str]
    closed: tuple[str, ...]  # objects in which an unknown key is refused, since it changes the computation


_RESEARCH = {"router": "router", "shared_experts": "shared_experts"}  # ours alone; not in files of plain models

_HF = _Format(
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
        **_RESEARCH,
    },
    theta=("rope_parameters.rope_theta", "rope_theta", "rope_scaling.rope_theta"),
    neutral={
        "hidden_act": ("silu", "swish"),
        "attention_bias": (False, None),
        "mlp_bias": (False, None),
        "rope_parameters": (None,),
        "rope_scaling": (None,),
        "rope_parameters.rope_type": ("default",),
        "rope_parameters.type": ("default",),
        "rope_parameters.partial_rotary_factor": (1, None),
        "rope_scaling.rope_type": ("default",),
        "rope_scaling.type": ("default",),
        "partial_rotary_factor": (1, None),
        "layer_types": (None,),
        "quantization_config": (None,),
    },
    training_only=frozenset({"attention_dropout", "router_jitter_noise"}),
    harmless=frozenset(
        {"architectures", "model_type", "dtype", "torch_dtype", "transformers_version", "_name_or_path", "use_cache"}
        | {"pad_token_id", "unk_token_id", "output_router_logits", "router_aux_loss_coef"}
    ),
    closed=("rope_parameters.", "rope_scaling.", "quantization_config."),
)

_MISTRAL = _Format(
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
        "rope_scaling": (None,),
        "yarn": (None,),
        "llama_4_scaling": (None,),
        "quantization": (None,),
        "lora": (None,),
        "vision_encoder": (None,),
        "moe.num_shared_experts": (0, None),
        "moe.first_k_dense_replace": (0, None),
        "moe.route_every_n": (1, None),
        "moe.routed_scale": (1, None),
    },
    training_only=frozenset(),
    harmless=frozenset({"moe", "max_batch_size", "moe.expert_parallel"}),
    closed=("rope_scaling.", "yarn.", "llama_4_scaling.", "quantization.", "lora.", "vision_encoder."),
)

_REQUIRED = ("vocab_size", "dim", "n_layers", "n_heads", "n_kv_heads", "ffn_dim", "norm_eps")
_EXPERTS = ("n_experts", "experts_per_token")
_FLOATS = ("norm_eps", "rope_theta", "init_std")
_BOOLS = ("tie_embeddings",)

# What a published shape implies when its file leaves it out. The 7B with a vocabulary of 32000 and no window (v0.2) is
# left out: it differs from a v0.1 with its window switched off in the rotary base alone.
_SHAPE = (
    *("dim", "n_layers", "n_heads", "n_kv_heads", "head_dim"),
    *("ffn_dim", "vocab_size", "n_experts", "sliding_window"),
)
_KNOWN: dict[tuple[int | None, ...], tuple[str, float, int]] = {  # -> name, rope_theta, context
    (4096, 32, 32, 8, 128, 14336, 32000, 1, 4096): ("Mistral 7B v0.1", 1e4, 32768),
    (4096, 32, 32, 8, 128, 14336, 32768, 1, None): ("Mistral 7B v0.3", 1e6, 32768),
    (4096, 32, 32, 8, 128, 14336, 32000, 8, None): ("Mixtral 8x7B v0.1", 1e6, 32768),
    (6144, 56, 48, 8, 128, 16384, 32000, 8, None): ("Mixtral 8x22B v0.1", 1e6, 65536),
    (6144, 56, 48, 8, 128, 16384, 32768, 8, None): ("Mixtral 8x22B v0.3", 1e6, 65536),
}


# -- reading ---------------------------------------------------------------------------------------------------------


def read_config(path: str | Path) -> ModelConfig:
    """From a model folder (its `config.json`, else its `params.json`) or from one such file.

    Raises ConfigError, one line with the file, when it is missing, broken, incomplete, or asks for what we lack.
    """
    file = _config_file(Path(path))
    values = _read_json(file)
    try:
        return from_mistral(values) if {"dim", "n_layers"} <= values.keys() else from_hf(values)
    except ConfigError as error:
        raise ConfigError(f"{file}: {str(error).removeprefix('config: ')}") from None


_OURS = "mixtral_research"  # the model_type of what transformers would compute wrongly
QUANT_METHOD = "mixtral"  # the quant_method of folders that `mixtral quantize` wrote; quant/recipe.py reads the rest


def from_hf(values: dict[str, Any]) -> ModelConfig:
    """From the content of a `config.json` of model_type mixtral, mistral (transformers 4 or 5 keys) or ours."""
    kind = values.get("model_type")
    if kind not in ("mixtral", "mistral", _OURS):
        raise ConfigError(f"model_type must be 'mixtral' or 'mistral', not {kind!r}")
    flat = _flatten(values)
    if flat.get("quantization_config.quant_method") == QUANT_METHOD:
        flat = {key: value for key, value in flat.items() if not key.startswith("quantization_config.")}
    if kind == "mistral" and "sliding_window" not in flat:
        flat["sliding_window"] = 4096
        _warn_once("config.json of a mistral model without sliding_window: 4096 assumed, as transformers does")
    if isinstance(flat.get("eos_token_id"), list):
        flat["eos_token_id"] = _first_eos(flat["eos_token_id"])
    if flat.get("num_key_value_heads", 0) is None:
        flat["num_key_value_heads"] = flat.get("num_attention_heads")
    return _build(flat, _HF, sparse=kind != "mistral")


def from_mistral(values: dict[str, Any]) -> ModelConfig:
    """From the content of a `params.json`; with a `moe` object the model is sparse."""
    return _build(_flatten(values), _MISTRAL, sparse=values.get("moe") is not None)


def _build(flat: dict[str, Any], kind: _Format, sparse: bool) -> ModelConfig:
    _refuse(flat, kind)
    fields = {ours: flat[key] for ours, key in kind.fields.items() if key in flat and (sparse or ours not in _EXPERTS)}
    for ours in _REQUIRED + (_EXPERTS if sparse else ()):
        if fields.get(ours) is None:
            raise ConfigError(f"{kind.fields[ours]} is missing")
    for ours, value in fields.items():
        _check_type(kind.fields[ours], ours, value)
    if sparse and fields["n_experts"] == 1:
        raise ConfigError(f"{kind.fields['n_experts']} is 1: a router over one expert is not supported; at least 2 are")
    if fields.get("head_dim") is None:
        fields["head_dim"] = _head_dim(fields["dim"], fields["n_heads"])
    fields["rope_theta"] = _theta(flat, kind)
    fields = {ours: value for ours, value in fields.items() if value is not None or ours in ("bos_id", "eos_id")}
    return ModelConfig(**_complete(fields, kind))


def _refuse(flat: dict[str, Any], kind: _Format) -> None:
    """Raise for what would change the computation, report what is not known to."""
    for key, value in flat.items():
        if key in kind.neutral and value not in kind.neutral[key]:
            allowed = " or ".join(repr(v) for v in kind.neutral[key])
            raise ConfigError(f"{key} {value!r} is not implemented; only {allowed} is")
        if key.startswith(kind.closed) and key not in kind.neutral and key not in kind.theta:
            raise ConfigError(f"{key} is not implemented")
        if key in kind.training_only and value:
            _warn_once(f"config: {key} {value!r} is not applied")
    unknown = flat.keys() - set(kind.fields.values()) - set(kind.theta) - kind.neutral.keys()
    if unknown := unknown - kind.training_only - kind.harmless:
        _warn_once(f"config: ignored unknown {', '.join(sorted(unknown))}")


def _complete(fields: dict[str, Any], kind: _Format) -> dict[str, Any]:
    """Fill in a rotary base and a context that the file left out, for a shape we know, and say so."""
    known = _KNOWN.get(tuple(fields.get(name, 1 if name == "n_experts" else None) for name in _SHAPE))
    if "rope_theta" not in fields:
        if known is None:
            raise ConfigError("rope_theta is missing, and 1e4 and 1e6 are both in use: add the one it was trained with")
        fields["rope_theta"] = known[1]
        _warn_once(f"config without rope_theta: {known[1]:g} assumed, as the shape is that of {known[0]}")
    if "context" not in fields:
        fields["context"] = known[2] if known else 32768
        why = f"as the shape is that of {known[0]}" if known else "by default"
        _warn_once(f"config without {kind.fields['context']}: a context of {fields['context']} tokens assumed, {why}")
    return fields


def _theta(flat: dict[str, Any], kind: _Format) -> float | None:
    found = {key: flat[key] for key in kind.theta if flat.get(key) is not None}
    for key, value in found.items():
        _check_type(key, "rope_theta", value)
    if len(set(found.values())) > 1:
        raise ConfigError(f"{' and '.join(f'{key} {value}' for key, value in found.items())} contradict each other")
    return float(next(iter(found.values()))) if found else None


def _check_type(key: str, ours: str, value: object) -> None:
    want: Any = int
    name = "an integer"
    if ours in _FLOATS:
        want, name = float | int, "a number"
    elif ours in _BOOLS:
        want, name = bool, "true or false"
    elif ours == "router":
        want, name = str, "a text"
    if value is not None and (not isinstance(value, want) or (isinstance(value, bool) and ours not in _BOOLS)):
        raise ConfigError(f"{key} must be {name}, not {value!r}")


def _head_dim(dim: int, n_heads: int) -> int:
    if n_heads < 1 or dim % n_heads:
        raise ConfigError(f"head_dim is missing, and a width of {dim} does not divide into {n_heads} heads")
    return dim // n_heads


def _first_eos(ids: list[Any]) -> Any:
    if len(ids) > 1:
        _warn_once(f"config: of the end tokens {ids} only the first is used")
    return ids[0] if ids else None


def _flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"a": {"b": 1}}` to `{"a.b": 1}`."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


@functools.cache
def _warn_once(message: str) -> None:
    log.warning(message)


def _config_file(path: Path) -> Path:
    if not path.exists():
        raise ConfigError(f"{path}: no such file or folder; a model folder holds config.json or params.json")
    if path.is_file():
        return path
    for name in ("config.json", "params.json"):
        if (path / name).is_file():
            return path / name
    raise ConfigError(f"{path}: neither config.json nor params.json is there")


def _read_json(file: Path) -> dict[str, Any]:
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read: {error.strerror}") from None
    except ValueError as error:  # broken JSON, or not UTF-8
        raise ConfigError(f"{file}: not JSON: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{file}: must hold a JSON object, not a {type(values).__name__}")
    return values


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
        **{key: getattr(config, ours) for ours, key in _written(config, _HF)},
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
    flat = {key: getattr(config, ours) for ours, key in _written(config, _MISTRAL)}
    moe = {key.removeprefix("moe."): flat.pop(key) for key in list(flat) if key.startswith("moe.")}
    return flat | {"rope_theta": config.rope_theta} | ({"moe": moe} if moe else {})


def _written(config: ModelConfig, kind: _Format) -> Iterable[tuple[str, str]]:
    left_out = (() if config.is_sparse else _EXPERTS) + (tuple(_RESEARCH) if config.is_plain else ())
    return ((ours, key) for ours, key in kind.fields.items() if ours not in left_out)
