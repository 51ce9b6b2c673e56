"""generation_config.json, key by key: what a model's folder says of generating, and which keys are honoured here.

The tables name every key of transformers' GenerationConfig, each in one of them. The configuration takes the end tokens
(config_formats.py), the engine makes sampling parameters of the rest (engine/defaults.py); docs/generation.md says what
each key means.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mixtral.config.model import DEFAULT_EOS
from mixtral.errors import ConfigError, shown
from mixtral.json_files import parse_object, read_object

NAME = "generation_config.json"
GGUF_KEY = f"mixtral.file.{NAME}"  # where a GGUF file that we wrote keeps it, as text

HONOURED = {  # key -> field of SamplingParams
    "max_new_tokens": "max_tokens",
    "max_length": "max_length",
    "min_new_tokens": "min_tokens",
    "min_length": "min_length",
    "stop_strings": "stop",
    "repetition_penalty": "repetition_penalty",
    "no_repeat_ngram_size": "no_repeat_ngram_size",
    "bad_words_ids": "bad_words_ids",
    "suppress_tokens": "suppress_tokens",
    "begin_suppress_tokens": "begin_suppress_tokens",
}
SAMPLING = {  # honoured with `do_sample` alone: key, which is also the field -> value where the file says nothing
    "temperature": 1.0,
    "top_h": None,
    "top_k": 50,
    "top_p": 1.0,
    "min_p": 0.0,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
}
GGUF_SAMPLING = "general.sampling."  # what follows in a GGUF file -> key here
GGUF_KEYS = {"temp": "temperature", "top_k": "top_k", "top_p": "top_p", "min_p": "min_p"}
SWITCHES = frozenset({"do_sample", "eos_token_id"})  # read apart
_CACHES = ("dynamic", "static", "hybrid", "sliding_window", "hybrid_chunked", "paged")
NEUTRAL: dict[str, tuple[object, ...]] = {  # changes the result, not implemented -> values that ask for nothing
    "num_beams": (1,),
    "num_beam_groups": (1,),
    "num_return_sequences": (1,),
    "penalty_alpha": (0,),
    "guidance_scale": (1,),
    "encoder_repetition_penalty": (1,),
    "encoder_no_repeat_ngram_size": (0,),
    "sequence_bias": (),
    "exponential_decay_length_penalty": (),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "force_words_ids": (),
    "constraints": (),
    "remove_invalid_values": (False,),
    "token_healing": (False,),
    "watermarking_config": (),
    "dola_layers": (),
    "max_time": (),
    "cache_implementation": _CACHES + tuple(f"offloaded{end}" for end in ("", "_static", "_hybrid", "_hybrid_chunked")),
}
TOKEN_IDS = frozenset({"bos_token_id", "pad_token_id", "decoder_start_token_id"})  # not used; checked
HARMLESS = TOKEN_IDS | frozenset(
    {"renormalize_logits", "use_cache", "cache_config"}
    | {"max_cache_len", "prefill_chunk_size", "compile_config", "disable_compile", "continuous_batching_config"}
    # of beams, and of contrastive search: what switches these on is named
    | {"early_stopping", "length_penalty", "diversity_penalty", "low_memory"}
    # speculation, which changes the speed alone
    | {"use_mtp", "is_assistant", "num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_early_exit"}
    | {"assistant_confidence_threshold", "assistant_lookbehind", "target_lookbehind", "assistant_ensemble_weight"}
    | {"prompt_lookup_num_tokens", "max_matching_ngram_size", "speculation_type"}
    # what is returned beside the tokens, and where the file comes from
    | {"output_attentions", "output_hidden_states", "output_scores", "output_logits", "return_dict_in_generate"}
    | {"transformers_version", "_from_model_config", "_commit_hash"}
)
_MOST_FP32 = 3.4e38
KEYS = HONOURED.keys() | SAMPLING.keys() | SWITCHES | NEUTRAL.keys() | HARMLESS


def read_generation_config(folder: Path) -> tuple[Path, dict[str, Any]]:
    """(file, what it says) of a model's folder; a null says nothing, and is left out.

    Without generation_config.json, the keys of this kind in config.json: there old versions of transformers kept them,
    and the new ones still read them. Raises ConfigError when the file is damaged.
    """
    file = folder / NAME
    if os.path.lexists(file):  # a link that points nowhere is reported
        values = read_object(file)
    elif os.path.lexists(file := folder / "config.json"):
        values = {key: value for key, value in read_object(file).items() if key in KEYS}
    else:
        values = {}
    return file, {key: value for key, value in values.items() if value is not None}


def from_config_json(folder: Path) -> dict[str, Any]:
    """What generation_config.json would say for a folder that has none, but such keys in its config.json; else {}.

    The end tokens are among them, since transformers takes those from generation_config.json alone once there is one.
    """
    file, values = read_generation_config(folder)
    if file.name == NAME or not values.keys() - HARMLESS - {"eos_token_id"}:
        return {}
    if "eos_token_id" not in read_object(file):  # not even as null
        values["eos_token_id"] = DEFAULT_EOS
    return {key: value for key, value in values.items() if key not in HARMLESS or key.endswith("_token_id")}


def embedded(metadata: Mapping[str, Any], where: str = GGUF_KEY) -> dict[str, Any] | None:
    """What the generation_config.json says that a GGUF file holds, without nulls; None when it holds none.

    Raises ConfigError, which begins with `where`, when that is damaged.
    """
    if (text := metadata.get(GGUF_KEY)) is None:
        return None
    if not isinstance(text, str):
        raise ConfigError(f"{where} must be a text, not {shown(text)}")
    return {key: value for key, value in parse_object(text.encode(), where).items() if value is not None}


def from_gguf_sampling(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """What generation_config.json would say for a GGUF file's `general.sampling`; {} without a temperature, since then
    it has no effect. Raises ConfigError, which begins with the key, for what is no finite number."""
    names = {f"{GGUF_SAMPLING}{name}": key for name, key in GGUF_KEYS.items()}
    stated = {key: metadata[name] for name, key in names.items() if name in metadata}
    if "temperature" not in stated:
        return {}
    for name, key in names.items():
        if key in stated and (type(stated[key]) not in (int, float) or not abs(stated[key]) < _MOST_FP32):
            raise ConfigError(f"{name} must be a finite number, not {shown(stated[key])}")
    if stated["temperature"] == 0:  # greedy, as transformers says it
        return {"do_sample": False}
    return {"do_sample": True, "top_k": 0, **stated}


def to_gguf_sampling(values: Mapping[str, Any]) -> dict[str, Any]:
    """`general.sampling` of a GGUF file for what generation_config.json says, as far as there are keys for it."""
    if values.get("do_sample") is not True:
        return {}
    said = {key: value for key, value in values.items() if value is not None}
    stated = {name: said.get(key, SAMPLING[key]) for name, key in GGUF_KEYS.items()}
    return {
        f"{GGUF_SAMPLING}{name}": value if name == "top_k" else float(value) for name, value in stated.items()
        if (type(value) is int and 0 <= value < 1 << 31) or (type(value) is float and name != "top_k"
                                                             and abs(value) < _MOST_FP32)
    }  # fmt: skip
