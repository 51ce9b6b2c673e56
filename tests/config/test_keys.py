"""No key is silently dropped: every one that transformers' configurations, GGUF and Mistral's files know is in a table,
and any value that would change the numbers is honoured or refused by name."""

from __future__ import annotations

import dataclasses
import json
import logging
from typing import Any

import gguf
import pytest
import transformers

from mixtral.config import ModelConfig, formats, table
from mixtral.config.formats import from_hf, from_mistral, to_hf, to_mistral
from mixtral.config.gguf import _GGUF, from_gguf, to_gguf
from mixtral.config.table import FileFormat, flatten, is_known
from mixtral.errors import ConfigError
from mixtral.gguf.header import TYPES, GgufHeader, TensorInfo
from mixtral.presets import preset

HF, MISTRAL = formats._HF, formats._MISTRAL
SPARSE, DENSE = preset("mixtral-8x7b"), preset("mistral-7b")
THEIRS = {"mixtral": transformers.MixtralConfig, "mistral": transformers.MistralConfig}


@pytest.fixture(autouse=True)
def _warnings_afresh() -> None:
    table.warn_once.cache_clear()


def gguf_keys() -> list[str]:
    """All hyper-parameters that the gguf package names."""

    def walk(owner: type) -> list[str]:
        found = [value for name, value in vars(owner).items() if not name.startswith("_")]
        inner = [key for value in found if isinstance(value, type) for key in walk(value)]
        return inner + [value for value in found if isinstance(value, str)]

    return sorted({key.format(arch="llama", dense="dense_2") for key in walk(gguf.constants.Keys) if "{arch}" in key})


# What modelling code of transformers reads of a Mixtral or Mistral configuration, besides what its class declares.
READ_BESIDES = ["rope_theta", "rope_scaling", "partial_rotary_factor", "num_experts", "layer_types", "torch_dtype",
                "quantization_config", "per_layer_config", "attn_implementation"]  # fmt: skip


@pytest.mark.parametrize("kind", THEIRS)
def test_transformers_keys_are_in_the_table(kind: str) -> None:
    keys = {*flatten(json.loads(THEIRS[kind]().to_json_string(use_diff=False))), *READ_BESIDES}
    keys |= {*THEIRS[kind].attribute_map, *(field.name for field in dataclasses.fields(THEIRS[kind]))}
    assert len(keys) > 35
    assert not [key for key in sorted(keys) if not is_known(key, HF) and key not in HF.aliases]


@pytest.mark.parametrize("kind", THEIRS)
def test_what_transformers_writes_is_read_without_a_remark(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="mixtral")
    written = json.loads(THEIRS[kind]().to_json_string(use_diff=False))
    config, theirs = from_hf(written), THEIRS[kind]()
    assert not caplog.records
    assert (config.rope_theta, config.sliding_window) == (theirs.rope_parameters["rope_theta"], theirs.sliding_window)
    assert (config.norm_eps, config.head_dim, config.context) == (theirs.rms_norm_eps, 128, 131072)


def strange(value: object) -> list[object]:
    """Values that a key has in no model of ours."""
    if isinstance(value, bool):
        return [not value]
    return ["strange", 7] if isinstance(value, str) else [7, 0.37]


def changes(values: dict[str, Any], read: Any, want: ModelConfig) -> bool:
    """Whether what is read differs, or is refused."""
    try:
        return bool(read(values) != want)
    except ConfigError:
        return True


SAYS_NOTHING = HF.harmless | HF.training_only | HF.checked  # the last are tested below


@pytest.mark.parametrize("kind", THEIRS)
def test_a_strange_value_changes_what_is_read_or_is_refused(kind: str) -> None:
    """Of every key that transformers declares, and every one in our table."""
    want = SPARSE if kind == "mixtral" else DENSE
    values = to_hf(want, "bfloat16")
    assert from_hf(values) == want
    declared = {**{key: None for key in HF.neutral}, **THEIRS[kind]().to_dict(), **dict.fromkeys(HF.repeated)}
    keys = declared.keys() - SAYS_NOTHING - {"rope_parameters.partial_rotary_factor"}
    if kind == "mistral":
        keys -= {"num_experts_per_tok"}  # of no meaning without experts
    for key in sorted(key for key in keys if key.split(".")[0] not in SAYS_NOTHING):
        for value in strange(declared[key]):
            nested = values
            for part in reversed(key.split(".")):
                nested, value = {part: value}, {part: value}
            assert changes(values | nested, from_hf, want), (key, nested)


@pytest.mark.parametrize("kind", [HF, MISTRAL, _GGUF])
def test_a_key_is_in_one_table(kind: FileFormat) -> None:
    tables = [{*kind.fields.values()}, {*kind.theta}, {*kind.neutral}, kind.training_only, kind.harmless, kind.checked,
              {*kind.repeated}, {*kind.aliases}]  # fmt: skip
    both = {key for one in tables for other in tables if one is not other for key in one & other}
    assert not both


def read_gguf(metadata: dict[str, Any]) -> ModelConfig:
    tensors = {"output.weight": TensorInfo(TYPES[0], (4, 4), 0, 64)}
    return from_gguf([GgufHeader({"general.architecture": "llama", **metadata}, tensors)])


@pytest.mark.parametrize("key", gguf_keys())
def test_gguf_keys_are_honoured_or_refused(key: str) -> None:
    metadata = to_gguf(SPARSE)
    want = read_gguf(metadata)
    if key not in _GGUF.harmless:
        for value in (7, 0.37, "strange"):
            assert changes(metadata | {key: value}, read_gguf, want), (key, value)


def test_gguf_keys_that_say_nothing_special() -> None:
    metadata = to_gguf(SPARSE)
    for key, values in _GGUF.neutral.items():
        for value in values:
            assert read_gguf(metadata | {key: value}) == SPARSE, (key, value)
    assert read_gguf(metadata | {"llama.attention.sliding_window": 0}) == SPARSE
    with pytest.raises(ConfigError, match=r"llama\.attention\.key_length_mla is not implemented"):
        read_gguf(metadata | {"llama.attention.key_length_mla": 128})
    with pytest.raises(ConfigError, match=r"general\.type must be 'model', not 'adapter'"):
        read_gguf(metadata | {"general.type": "adapter"})


# -- Mistral's files: the keys of mistral-inference's arguments and of its larger models' files ------------------------


@pytest.mark.parametrize(
    ("change", "refused"),
    [
        ({"moe": {"num_experts": 8, "num_experts_per_tok": 2, "zebra": 1}}, "moe.zebra is not implemented"),
        ({"moe": {"num_experts": 8, "num_experts_per_tok": 2, "num_expert_groups": 2}}, "moe.num_expert_groups 2"),
        ({"moe": {"num_experts": 8, "num_experts_per_tok": 2, "expert_hidden_dim": 9}}, "moe.expert_hidden_dim 9"),
        ({"yarn": {"factor": 16, "alpha": 1, "beta": 32}}, "yarn.factor is not implemented"),
        ({"llama_4_scaling": {"beta": 0.1}}, "llama_4_scaling.beta is not implemented"),
        ({"quantization": {"qformat_weight": "nvfp4"}}, "quantization.qformat_weight is not implemented"),
        ({"model_type": "mamba"}, "model_type 'mamba' is not implemented"),
        ({"activation": "gelu"}, "activation 'gelu' is not implemented"),
        ({"multimodal": {"whisper_model_args": {}}}, "multimodal.whisper_model_args is not implemented"),
        ({"vision_encoder": {"hidden_size": 1024}}, "vision_encoder.hidden_size is not implemented"),
        ({"q_lora_rank": 1536}, "q_lora_rank 1536 is not implemented"),
        ({"qk_rope_head_dim": 64}, "qk_rope_head_dim 64 is not implemented; only 128, the head dim, is"),
        ({"v_head_dim": 64}, "v_head_dim 64 is not implemented"),
        ({"causal": False}, "causal False is not implemented"),
        ({"sliding_window": [4096, None]}, "sliding_window [4096, None] is not implemented; only one number, or null"),
        ({"sliding_window": []}, "sliding_window [] is not implemented"),
        ({"sliding_window": [77] * 3}, "sliding_window [77, 77, 77] is not implemented"),
        ({"_sliding_window": [4096, 1024]}, "_sliding_window [4096, 1024] is not implemented"),
        ({"sliding_window": 4096, "_sliding_window": 77}, "_sliding_window 77 and sliding_window 4096 contradict"),
    ],
)
def test_mistral_refusals(change: dict[str, Any], refused: str) -> None:
    with pytest.raises(ConfigError) as error:
        from_mistral(to_mistral(SPARSE) | change)
    assert refused in str(error.value)


@pytest.mark.parametrize(
    ("change", "field", "value"),
    [
        ({"sliding_window": [4096, 4096]}, "sliding_window", 4096),
        ({"sliding_window": [None]}, "sliding_window", None),
        ({"_sliding_window": 77}, "sliding_window", 77),
        ({"_sliding_window": [77, 77, 77, 77]}, "sliding_window", 77),
        ({"tied_embeddings": True}, "tie_embeddings", True),
        ({"max_seq_len": None, "max_position_embeddings": 99}, "context", 99),
        ({"max_seq_len": 98, "max_position_embeddings": 99}, "context", 98),
        ({"model_type": "transformer", "activation": "silu", "lora": None, "vision_encoder": None}, "dim", 4096),
        ({"lora": {"rank": 64, "scaling": 2.0, "enable": True}}, "dim", 4096),
        ({"v_head_dim": 128, "q_lora_rank": None, "yarn": None}, "dim", 4096),
    ],
)
def test_mistral_keys_that_are_honoured(
    change: dict[str, Any], field: str, value: object, caplog: pytest.LogCaptureFixture
) -> None:
    config = from_mistral(to_mistral(SPARSE) | change)
    assert getattr(config, field) == value and not caplog.records
    assert config.replace(**{field: getattr(SPARSE, field)}) == SPARSE
    dense = from_mistral(to_mistral(DENSE.replace(sliding_window=None)) | {"moe": None} | change)
    assert getattr(dense, field) == value and not dense.is_sparse


# -- windows by layer, and older names, in config.json -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("window", "change", "works"),
    [
        (None, {"layer_types": ["full_attention"] * 32}, True),
        (None, {"layer_types": ["attention"] * 32}, True),
        (4096, {"layer_types": ["sliding_attention"] * 32}, True),
        (None, {"layer_types": ["sliding_attention"] * 32}, False),
        (4096, {"layer_types": ["full_attention"] * 32}, False),
        (4096, {"layer_types": ["sliding_attention", "full_attention"] * 16}, False),
        (None, {"layer_types": ["full_attention"] * 31}, False),
        (None, {"layer_types": "full_attention"}, False),
        (None, {"layer_types": 32}, False),
        (4096, {"use_sliding_window": True, "max_window_layers": 0}, True),
        (4096, {"use_sliding_window": False}, False),
        (4096, {"max_window_layers": 28}, False),
        (4096, {"sliding_window_pattern": 2}, False),
        (None, {"use_sliding_window": False, "max_window_layers": 28, "sliding_window_pattern": 6}, True),
    ],
)
@pytest.mark.parametrize("preset_", [SPARSE, DENSE])
def test_windows_by_layer(preset_: ModelConfig, window: int | None, change: dict[str, Any], works: bool) -> None:
    config = preset_.replace(sliding_window=window)
    values = to_hf(config, "bfloat16") | change
    if works:
        assert from_hf(values) == config
        return
    with pytest.raises(ConfigError) as error:
        from_hf(values)
    assert str(error.value).startswith(tuple(change))


def test_older_names() -> None:
    values = to_hf(SPARSE, "bfloat16")
    old = {key: value for key, value in values.items() if key not in ("num_local_experts", "num_experts_per_tok")}
    assert from_hf(old | {"num_experts": 8, "num_experts_per_token": 2}) == SPARSE
    assert from_hf(values | {"num_experts": 8}) == SPARSE
    assert from_hf(values | {"num_experts": None, "num_local_experts": 4}).n_experts == 4
    assert from_hf(values | {"num_experts": 4, "num_local_experts": None}).n_experts == 4
    with pytest.raises(ConfigError, match="num_experts 4 and num_local_experts 8 contradict each other"):
        from_hf(values | {"num_experts": 4})
    for key in ("num_experts", "num_local_experts"):
        with pytest.raises(ConfigError, match="num_local_experts: a model of model_type 'mistral' has none"):
            from_hf(to_hf(DENSE, "bfloat16") | {key: 8})
        assert from_hf(to_hf(DENSE, "bfloat16") | {key: 1}) == DENSE


FILES = {
    "config.json": (HF, from_hf, to_hf(SPARSE, "bfloat16")),
    "params.json": (MISTRAL, from_mistral, to_mistral(SPARSE)),
}


@pytest.mark.parametrize("file", FILES)
def test_keys_of_related_models(file: str) -> None:
    """Their neutral values are taken, others refused by name, in either format."""
    table, read, values = FILES[file]
    for key in (key for key in table.neutral if not key.startswith("moe.")):
        outer, _, inner = key.partition(".")
        for value in table.neutral[key]:
            assert read(values | {outer: {inner: value} if inner else value}) == SPARSE, (key, value)
        with pytest.raises(ConfigError, match=f"^{key} 0.37 is not implemented; only"):
            read(values | {outer: {inner: 0.37} if inner else 0.37})


@pytest.mark.parametrize("file", FILES)
def test_other_names_of_a_field_must_say_the_same(file: str, caplog: pytest.LogCaptureFixture) -> None:
    """Those of the other format, and of related models."""
    table, read, values = FILES[file]
    for key, field in table.repeated.items():
        outer, _, inner = key.partition(".")
        beside = values.get(outer, {})
        for value in (getattr(SPARSE, field), 7):
            changed = values | {outer: {**beside, inner: value} if inner else value}
            if value != 7:
                assert read(changed) == SPARSE and not caplog.records, key
                continue
            with pytest.raises(ConfigError, match=f"^{key} 7 is not implemented; only .*, the .*, is"):
                read(changed)
    others = HF if table is MISTRAL else MISTRAL
    unsaid = {*others.fields.values()} - {*table.fields.values()} - {*table.repeated}
    assert unsaid <= {"max_position_embeddings", "max_seq_len", "initializer_range", "bos_token_id", "eos_token_id"}


CHANGES: list[dict[str, Any]] = [
    {"use_scaled_rope": True}, {"rope_scaling_factor": 8.0}, {"qk_norm": True}, {"qkv_bias": True}, {"attn_bias": True},
    {"attn_logit_softcapping": 30.0}, {"embedding_multiplier": 2.0}, {"partial_rotary_factor": 0.5},
    {"hidden_act": "gelu"}, {"norm_type": "layernorm"}, {"sliding_window_pattern": 2, "sliding_window": 4096},
    {"quantization_config": {"quant_method": "awq"}}, {"rope_parameters": {"rope_type": "yarn", "factor": 4}},
    {"layer_types": ["full_attention", "sliding_attention"] * 16}, {"layer_norm_eps": 1e-3}, {"moe_top_k": 1},
]  # fmt: skip
OF_HF: list[dict[str, Any]] = [
    {"num_key_value_heads": 1}, {"num_experts_per_tok": 1}, {"num_experts": 5}, {"tie_word_embeddings": True},
    {"rms_norm_eps": 1e-3}, {"router": "sigmoid"}, {"shared_experts": 1},
]  # fmt: skip


@pytest.mark.parametrize(("file", "change"), [
    *((file, change) for file in FILES for change in CHANGES), *(("params.json", change) for change in OF_HF),
    ("config.json", {"moe": {"num_experts_per_tok": 1}}), ("config.json", {"moe": {"zebra": 1}}),
    ("config.json", {"norm_eps": 1e-3}), ("config.json", {"n_kv_heads": 1}),
])  # fmt: skip
def test_what_would_change_the_numbers_is_refused_in_either_file(file: str, change: dict[str, Any]) -> None:
    _, read, values = FILES[file]
    with pytest.raises(ConfigError, match=rf"^{next(iter(change))}\b.* is not implemented"):
        read(values | change)


def test_widths_of_related_models() -> None:
    values = to_hf(SPARSE, "bfloat16")
    assert from_hf(values | {"query_pre_attn_scalar": 128, "moe_intermediate_size": 14336}) == SPARSE
    with pytest.raises(ConfigError, match="query_pre_attn_scalar 256 is not implemented; only 128, the head dim, is"):
        from_hf(values | {"query_pre_attn_scalar": 256})


@pytest.mark.parametrize(
    ("change", "refused"),
    [
        ({"per_layer_config": {"0": {"num_local_experts": 4}}}, "per_layer_config.0.num_local_experts is not"),
        ({"pruned_heads": {"0": [1]}}, "pruned_heads.0 is not implemented"),
        ({"sliding_window": {"a": 1}}, "sliding_window.a is unknown, since sliding_window is no object"),
        ({"hidden_act": {"a": "silu"}}, "hidden_act.a is not implemented"),
        ({"compression_config": {"format": "int-quantized"}}, "compression_config.format is not implemented"),
    ],
)
def test_objects_that_change_layers(change: dict[str, Any], refused: str) -> None:
    with pytest.raises(ConfigError, match=refused):
        from_hf(to_hf(SPARSE, "bfloat16") | change)


def test_what_changes_training_alone_is_said(caplog: pytest.LogCaptureFixture) -> None:
    for key in sorted(HF.training_only):
        assert from_hf(to_hf(SPARSE, "bfloat16") | {key: 0.1}) == SPARSE
        assert f"config: {key} 0.1 is not applied" in caplog.text
