"""ModelConfig from and to the metadata of a GGUF file: the architecture "llama", as which llama.cpp knows Mixtral."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from typing import Any

from mixtral.config.generation import GGUF_KEY, embedded
from mixtral.config.model import DEFAULT_EOS, ModelConfig, end_tokens, is_token_id
from mixtral.config.table import FileFormat, build, warn_once, written
from mixtral.errors import ConfigError, shown
from mixtral.gguf.header import GgufHeader

_ARCHITECTURE = "llama"
_WINDOW = "llama.attention.sliding_window"
_HEAD_DIM, _THETA = "llama.attention.key_length", "llama.rope.freq_base"
_IDS = {"bos_id": "tokenizer.ggml.bos_token_id", "eos_id": "tokenizer.ggml.eos_token_id"}
_ENDS = (_IDS["eos_id"], "tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id")  # of text, turn and message
_DEFAULT_THETA = 1e4  # llama.cpp's

_GGUF = FileFormat(
    fields={
        "vocab_size": "llama.vocab_size",
        "dim": "llama.embedding_length",
        "n_layers": "llama.block_count",
        "n_heads": "llama.attention.head_count",
        "n_kv_heads": "llama.attention.head_count_kv",
        "head_dim": _HEAD_DIM,
        "ffn_dim": "llama.feed_forward_length",
        "n_experts": "llama.expert_count",
        "experts_per_token": "llama.expert_used_count",
        "context": "llama.context_length",
        "sliding_window": _WINDOW,
        "norm_eps": "llama.attention.layer_norm_rms_epsilon",
        "tie_embeddings": "tie_embeddings",  # no key of the file: it has an output matrix or not
        **_IDS,
    },
    theta=(_THETA,),
    neutral={
        "llama.attention.causal": (True,),
        "llama.expert_gating_func": (0, 1),  # unset, softmax
        "llama.expert_shared_count": (0,),
        "llama.expert_weights_norm": (True,),
        "llama.expert_weights_scale": (0, 1),
        "llama.expert_group_count": (0, 1),
        "llama.expert_group_used_count": (0, 1),
        "llama.expert_shared_feed_forward_length": (0,),
        "llama.leading_dense_block_count": (0,),
        "llama.moe_every_n_layers": (0, 1),
        "llama.interleave_moe_layer_step": (0, 1),
        "llama.nextn_predict_layers": (0,),
        "llama.use_parallel_residual": (False,),
        "llama.logit_scale": (0, 1),
        "llama.embedding_scale": (0, 1),
        "llama.residual_scale": (0, 1),
        "llama.attn_logit_softcapping": (0,),
        "llama.router_logit_softcapping": (0,),
        "llama.final_logit_softcapping": (0,),
        "llama.attention.scale": (0,),
        "llama.attention.output_scale": (0, 1),
        "llama.attention.clamp_kqv": (0,),
        "llama.attention.max_alibi_bias": (0,),
        "llama.attention.shared_kv_layers": (0,),
        "llama.rope.scaling.type": ("none",),
        "llama.rope.scaling.factor": (0, 1),
        "llama.rope.scaling.attn_factor": (0, 1),
        "llama.rope.scale_linear": (0, 1),  # the older name of the factor
    },
    training_only=frozenset(),
    checked=frozenset(),
    harmless=frozenset({"llama.tensor_data_layout", "llama.rope.scaling.finetuned"}),
    closed=("llama.",),  # all there is in it are hyper-parameters
    aliases={},
    repeated={
        "llama.attention.value_length": "head_dim",
        "llama.rope.dimension_count": "head_dim",
        "llama.expert_feed_forward_length": "ffn_dim",
    },
)


def from_gguf(headers: Sequence[GgufHeader], where: str = "GGUF") -> ModelConfig:
    """From the headers of all parts of a model, which warnings call `where`; the first's metadata count."""
    metadata = headers[0].metadata
    if (kind := metadata.get("general.architecture")) != _ARCHITECTURE:
        wanted = f"{_ARCHITECTURE!r}, as for Mistral and Mixtral"
        raise ConfigError(f"general.architecture must be {wanted}, not {shown(kind)}")
    if (what := metadata.get("general.type", "model")) != "model":
        raise ConfigError(f"general.type must be 'model', not {shown(what)}; merge an adapter into its model first")
    flat = {key: _shortest(value) for key, value in metadata.items() if key.startswith("llama.")}
    flat |= {key: metadata[key] for key in _IDS.values() if key in metadata}
    if (ends := named_end_tokens(metadata)) is not None:
        flat[_ENDS[0]] = list(ends)
    flat["tie_embeddings"] = not any("output.weight" in header.tensors for header in headers)
    tokens = metadata.get("tokenizer.ggml.tokens")
    flat.setdefault("llama.vocab_size", len(tokens) if isinstance(tokens, list) and tokens else None)
    flat.setdefault("llama.attention.head_count_kv", flat.get("llama.attention.head_count"))
    if flat.get(_WINDOW) == 0:  # none
        del flat[_WINDOW]
    if _THETA not in flat:
        flat[_THETA] = _DEFAULT_THETA
        warn_once(f"{where} without {_THETA}: {_DEFAULT_THETA:g} assumed, as llama.cpp does")
    count = flat.get("llama.expert_count")
    return build(flat, _GGUF, sparse=count is not None and (type(count) is not int or count != 0), where=where)


def to_gguf(config: ModelConfig, text_end: int | None = None) -> dict[str, Any]:
    """Metadata that say the shape of a model, and which ids its first and last tokens have.

    `text_end` is the tokenizer's end token: it comes first, since GGUF has one key for both. `named_end_tokens` says
    whether the metadata say the model's end tokens exactly.
    llama.cpp's "llama" has no sliding window: such a model is written with it, and computed there without.
    Raises ConfigError for a model that is not plain Mistral or Mixtral.
    """
    if not config.is_plain:
        what = config.not_plain()
        raise ConfigError(f"GGUF holds plain Mixtral models alone, not {what}; write it as 'hf'")
    if config.sliding_window is not None:
        warn_once(f"llama.cpp will not apply the sliding window of {config.sliding_window} tokens")
    metadata = {key: getattr(config, field) for field, key in written(config, _GGUF) if field != "tie_embeddings"}
    metadata |= {key: config.head_dim for key, field in _GGUF.repeated.items() if field == "head_dim"}
    metadata[_THETA] = float(config.rope_theta)
    ends = list(dict.fromkeys(config.eos_ids if text_end is None else (text_end, *config.eos_ids)))
    metadata |= dict(zip(_ENDS, ends, strict=False))
    if left_out := ends[len(_ENDS) :]:
        warn_once(f"llama.cpp knows {len(_ENDS)} end tokens, and will not end at {', '.join(map(str, left_out))}")
    return {key: value for key, value in metadata.items() if value is not None}


def named_end_tokens(metadata: Mapping[str, Any]) -> tuple[int, ...] | None:
    """The end tokens that a file names; None when it names none.

    Those of the generation_config.json that it holds, else all that the format's keys name: llama.cpp ends at any.
    """
    values = embedded(metadata) or {}
    if "eos_token_id" in values:
        return _as_tuple(values["eos_token_id"], f"{GGUF_KEY}: eos_token_id")
    for key in (found := [key for key in _ENDS if key in metadata]):
        if not is_token_id(metadata[key]):
            raise ConfigError(f"{key} must be a token id, not {shown(metadata[key])}")
    if not found:
        return None
    return _as_tuple([metadata.get(_ENDS[0], DEFAULT_EOS), *(metadata[key] for key in found)], _ENDS[0])


def _as_tuple(value: object, name: str) -> tuple[int, ...]:
    ids = end_tokens(value, name)
    return () if ids is None else ids if isinstance(ids, tuple) else (ids,)


def _shortest(value: Any) -> Any:
    """Of a float that the file holds in 32 bits, the shortest decimal that it stands for: 1e-5, not 9.99999975e-06."""
    if not isinstance(value, float) or not abs(value) < 1e38:
        return value
    shorter = (float(f"{value:.{digits}g}") for digits in range(1, 17))
    return next((short for short in shorter if _in_32_bits(short) == value), value)


def _in_32_bits(value: float) -> float:
    return float(struct.unpack("<f", struct.pack("<f", value))[0])
