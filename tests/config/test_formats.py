"""Reading and writing config.json and params.json: each key, each refusal, and what a missing key means."""

import json
import logging
from pathlib import Path

import pytest

from mixtral.config import ModelConfig, table
from mixtral.config.formats import from_hf, from_mistral, read_config, to_hf, to_mistral
from mixtral.errors import ConfigError
from mixtral.presets import PRESETS, preset

# as published with Mixtral 8x7B v0.1 (transformers 4)
HF_8X7B = {
    "architectures": ["MixtralForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 1, "eos_token_id": 2,
    "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 14336,
    "max_position_embeddings": 32768, "model_type": "mixtral", "num_attention_heads": 32, "num_experts_per_tok": 2,
    "num_hidden_layers": 32, "num_key_value_heads": 8, "num_local_experts": 8, "output_router_logits": False,
    "rms_norm_eps": 1e-05, "rope_theta": 1000000.0, "router_aux_loss_coef": 0.02, "sliding_window": None,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16", "transformers_version": "4.36.0.dev0", "use_cache": True,
    "vocab_size": 32000,
}  # fmt: skip
MISTRAL_8X7B = {
    "dim": 4096, "n_layers": 32, "head_dim": 128, "hidden_dim": 14336, "n_heads": 32, "n_kv_heads": 8,
    "norm_eps": 1e-05, "vocab_size": 32000, "moe": {"num_experts_per_tok": 2, "num_experts": 8},
}  # fmt: skip
V5 = {"rope_theta": None, "torch_dtype": None, "dtype": "float32", "head_dim": None}
DENSE = {"model_type": "mistral", "num_local_experts": None, "num_experts_per_tok": None}


@pytest.fixture(autouse=True)
def _warnings_afresh() -> None:
    table.warn_once.cache_clear()


def write(folder: Path, name: str, values: object) -> Path:
    (folder / name).write_text(values if isinstance(values, str) else json.dumps(values))
    return folder / name


def test_hf_v4_and_v5_keys(caplog: pytest.LogCaptureFixture) -> None:
    assert from_hf(HF_8X7B) == preset("mixtral-8x7b")
    rope = {"rope_type": "default", "rope_theta": 5e5}
    assert from_hf({**HF_8X7B, **V5, "rope_parameters": rope}).rope_theta == 5e5
    assert from_hf({**HF_8X7B, "rope_scaling": {"type": "default"}}).rope_theta == 1e6
    assert not caplog.records


def test_hf_dense_is_mistral() -> None:
    config = from_hf({**HF_8X7B, **DENSE, "sliding_window": 4096, "rope_theta": 10000})
    assert config == preset("mistral-7b")
    assert not config.is_sparse


def test_hf_every_field_is_read() -> None:
    config = ModelConfig(
        vocab_size=11, dim=24, n_layers=3, n_heads=6, n_kv_heads=3, head_dim=8, ffn_dim=10, n_experts=5,
        experts_per_token=3, rope_theta=123.0, context=99, sliding_window=17, norm_eps=1e-6, tie_embeddings=True,
        bos_id=None, eos_id=4, init_std=0.2,
    )  # fmt: skip
    assert from_hf(to_hf(config, "float32")) == config
    dense = config.replace(n_experts=1, experts_per_token=1)
    written = to_hf(dense, "float32")
    assert from_hf(written) == dense
    assert "num_local_experts" not in written
    plain = {"bos_id": 1, "eos_id": 2, "init_std": 0.02}  # params.json has no place for these
    assert from_mistral(to_mistral(config)) == config.replace(**plain)
    assert from_mistral(to_mistral(dense)) == dense.replace(**plain)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_survive_both_formats(name: str) -> None:
    assert from_hf(to_hf(preset(name), "bfloat16")) == preset(name)
    plain = preset(name).replace(init_std=0.02)  # params.json has no place for it
    assert from_mistral(to_mistral(preset(name))) == plain


@pytest.mark.parametrize("name", [name for name in PRESETS if name not in ("tiny", "small")])
def test_what_a_published_shape_implies(name: str, caplog: pytest.LogCaptureFixture) -> None:
    """A file without rope_theta and context, as Mistral's own are, gives the preset, and says what it assumed."""
    values = to_mistral(preset(name))
    del values["rope_theta"], values["max_seq_len"]
    assert from_mistral(values) == preset(name)
    assert from_mistral(values) == preset(name)
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 2  # each said once
    assert "rope_theta" in messages[0] and "assumed, as the shape is that of Mi" in messages[0]
    assert "max_seq_len" in messages[1]


def test_theta_is_not_guessed() -> None:
    values = {k: v for k, v in HF_8X7B.items() if k != "rope_theta"}
    assert from_hf(values).rope_theta == 1e6
    with pytest.raises(ConfigError, match="rope_theta is missing, and 1e4 and 1e6 are both in use"):
        from_hf({**values, "num_hidden_layers": 31})
    with pytest.raises(ConfigError, match="rope_theta is missing"):  # 7B v0.2, or v0.1 without its window
        from_hf({**values, **DENSE, "sliding_window": None})


def test_context_by_default(caplog: pytest.LogCaptureFixture) -> None:
    assert from_mistral({**MISTRAL_8X7B, "n_layers": 2, "rope_theta": 1e6}).context == 32768
    assert "config without max_seq_len: a context of 32768 tokens assumed, by default" in caplog.text


def test_sliding_window_is_honoured(caplog: pytest.LogCaptureFixture) -> None:
    assert from_hf({**HF_8X7B, "sliding_window": 4096}).sliding_window == 4096
    assert from_mistral({**MISTRAL_8X7B, "sliding_window": 77, "rope_theta": 1e6}).sliding_window == 77
    without = {k: v for k, v in HF_8X7B.items() if k != "sliding_window"}
    assert from_hf(without).sliding_window is None
    assert not [r for r in caplog.records if "sliding_window" in r.getMessage()]
    assert from_hf({**without, **DENSE}).sliding_window == 4096
    assert "without sliding_window: 4096 assumed" in caplog.text


def test_optional_keys(caplog: pytest.LogCaptureFixture) -> None:
    optional = ("tie_word_embeddings", "bos_token_id", "initializer_range")
    without = {k: v for k, v in HF_8X7B.items() if k not in optional}
    assert from_hf(without) == preset("mixtral-8x7b")
    assert from_hf({**HF_8X7B, "num_key_value_heads": None}).n_kv_heads == 32
    assert from_hf({**HF_8X7B, "eos_token_id": [7]}).eos_id == 7
    several = from_hf({**HF_8X7B, "eos_token_id": [7, 8]})
    assert several.eos_ids == (7, 8) and from_hf(to_hf(several, "float32")) == several
    assert from_hf({**HF_8X7B, "do_sample": True, "max_length": 20}) == preset("mixtral-8x7b")  # engine/defaults.py's
    assert not caplog.records


def test_our_own_quantisation_does_not_change_the_shape(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    quantised = {**HF_8X7B, "quantization_config": {"quant_method": "mixtral", "experts": "int4", "calibration": {}}}
    assert from_hf(quantised) == from_hf(HF_8X7B) and not caplog.records


def test_remarks_name_the_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    changed = {**HF_8X7B, **DENSE, "zebra": 1, "attention_dropout": 0.1, "max_position_embeddings": None}
    file = write(tmp_path, "config.json", {key: value for key, value in changed.items() if key != "sliding_window"})
    read_config(tmp_path)
    params = write(tmp_path, "params.json", {**MISTRAL_8X7B, "lion": 1})
    assumed = "assumed, as the shape is that of"
    read_config(params)
    assert caplog.messages == [
        f"{file} of a mistral model without sliding_window: 4096 assumed, as transformers does",
        f"{file}: attention_dropout 0.1 is not applied",
        f"{file}: ignored unknown zebra",
        f"{file} without max_position_embeddings: a context of 32768 tokens {assumed} Mistral 7B v0.1",
        f"{params}: ignored unknown lion",
        f"{params} without rope_theta: 1e+06 {assumed} Mixtral 8x7B v0.1",
        f"{params} without max_seq_len: a context of 32768 tokens {assumed} Mixtral 8x7B v0.1",
    ]


def test_unknown_keys_are_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    for _ in range(2):
        from_hf({**HF_8X7B, "zebra": 1, "apple": {"core": 2}, "attention_dropout": 0.1})
    messages = [record.getMessage() for record in caplog.records]
    assert messages == ["config: attention_dropout 0.1 is not applied", "config: ignored unknown apple.core, zebra"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "mamba"}, "model_type must be 'mixtral', 'mistral' or 'llama', not 'mamba'"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not implemented; only 'silu' or 'swish' is"),
        ({"attention_bias": True}, "attention_bias True is not implemented"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope_scaling.type 'yarn' is not implemented"),
        ({"rope_scaling": "yarn"}, "rope_scaling 'yarn' is not implemented"),
        ({"rope_parameters": {"rope_type": "llama3"}}, "rope_parameters.rope_type 'llama3' is not implemented"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1}}}, "rope_parameters.full_attention.rope_theta is"),
        ({"rope_parameters": {"rope_theta": 5.0}}, "rope_theta 5.0 and rope_theta 1000000.0 contradict each other"),
        ({"layer_types": ["full_attention"]}, "layer_types ['full_attention'] is not implemented"),
        ({"quantization_config": {"bits": 4}}, "quantization_config.bits is not implemented"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantization_config.quant_method is not implemented"),
        ({"num_local_experts": 1, "num_experts_per_tok": 1}, "num_local_experts is 1: a router over one expert"),
        ({"num_local_experts": None}, "num_local_experts is missing"),
        ({"vocab_size": None}, "vocab_size is missing"),
        ({"hidden_size": "4096"}, "hidden_size must be an integer, not '4096'"),
        ({"hidden_size": True}, "hidden_size must be an integer, not True"),
        ({"rms_norm_eps": "1e-5"}, "rms_norm_eps must be a number, not '1e-5'"),
        ({"rope_theta": "1e6"}, "rope_theta must be a number, not '1e6'"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings must be true or false, not 1"),
        ({"num_attention_heads": 24}, "head_dim is missing, and a width of 4096 does not divide into 24 heads"),
        ({"num_experts_per_tok": 9}, "num_experts_per_tok 9 is more than num_local_experts 8"),
    ],
)
def test_hf_refusals(change: dict, message: str, tmp_path: Path) -> None:
    file = write(tmp_path, "config.json", {**HF_8X7B, **change})
    with pytest.raises(ConfigError) as error:
        read_config(tmp_path)
    assert message in str(error.value)
    assert str(error.value).startswith(f"{file}: ") and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"moe": {"num_experts": 8}}, "moe.num_experts_per_tok is missing"),
        ({"moe": {**MISTRAL_8X7B["moe"], "num_shared_experts": 1}}, "moe.num_shared_experts 1 is not implemented"),
        ({"use_biases": True}, "use_biases True is not implemented"),
        ({"yarn": {"factor": 2}}, "yarn.factor is not implemented"),
        ({"sliding_window": [4096, None]}, "sliding_window [4096, None] is not implemented; only one number, or null"),
        ({"n_kv_heads": None}, "n_kv_heads is missing"),
    ],
)
def test_mistral_refusals(change: dict, message: str, tmp_path: Path) -> None:
    file = write(tmp_path, "params.json", {**MISTRAL_8X7B, **change})
    with pytest.raises(ConfigError) as error:
        read_config(file)
    assert message in str(error.value) and str(error.value).startswith(f"{file}: ")


def test_which_file_is_read(tmp_path: Path) -> None:
    params = write(tmp_path, "params.json", MISTRAL_8X7B)
    assert read_config(tmp_path) == read_config(params) == preset("mixtral-8x7b")
    write(tmp_path, "config.json", {**HF_8X7B, "vocab_size": 5})
    assert read_config(tmp_path).vocab_size == 5


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file or folder; a model folder holds"):
        read_config(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=r"neither config.json nor params.json is there"):
        read_config(tmp_path)
    file = write(tmp_path, "config.json", '{"vocab_size": ')
    with pytest.raises(ConfigError, match=r"config\.json: not JSON: "):
        read_config(file)
    file.write_bytes(b'{"a": "\xff"}')
    with pytest.raises(ConfigError, match=r"not UTF-8 \(byte 0xff\) at 7"):
        read_config(file)
    write(tmp_path, "config.json", "[1]")
    with pytest.raises(ConfigError, match="must hold a JSON object, not a list"):
        read_config(file)
    file.unlink()
    file.mkdir()
    with pytest.raises(ConfigError, match=r"config\.json: cannot be read: not a regular file"):
        read_config(tmp_path)


def test_of_a_training_run_its_model_is_named(tmp_path: Path) -> None:
    run, checkpoint = tmp_path / "run", tmp_path / "run/checkpoints/step_000002"
    checkpoint.mkdir(parents=True)
    file = write(run, "config.json", {"train": {"steps": 2}, "environment": {"threads": 1}})
    for end in ("it has no finished model yet", f"its model is {run / 'final'}"):
        for path in (run, file):
            with pytest.raises(ConfigError, match=f"^{run} is a training run; {end}$"):
                read_config(path)
        with pytest.raises(ConfigError, match=f"^{checkpoint} is a checkpoint of a training run; {end}$"):
            read_config(checkpoint)
        (run / "final").mkdir(exist_ok=True)
        write(run / "final", "config.json", HF_8X7B)
    assert read_config(run / "final") == preset("mixtral-8x7b")


def test_files_that_by_their_names_hold_no_configuration(tmp_path: Path) -> None:
    for name in ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "consolidated.00.pth"):
        with pytest.raises(ConfigError, match=f"{name}: a file of weights; give its folder, {tmp_path}$"):
            read_config(write(tmp_path, name, "x" * 5_000_000))
    for name in ("README.md", "noname"):
        wanted = r"a model folder, config\.json, params\.json or a \.gguf file is wanted$"
        with pytest.raises(ConfigError, match=f"{name}: no model; {wanted}"):
            read_config(write(tmp_path, name, "# A model"))


@pytest.mark.parametrize("params", [False, True])
def test_the_end_tokens_of_generation_config_count_first(
    params: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = preset("tiny").replace(eos_id=2, init_std=0.02)  # as of params.json
    name, values = ("params.json", to_mistral(config)) if params else ("config.json", to_hf(config, "float32"))
    (tmp_path / name).write_text(json.dumps(values))
    assert read_config(tmp_path).eos_id == 2
    generation = tmp_path / "generation_config.json"
    for given, wanted in ((5, 5), ([5, 2], (5, 2)), ([], None)):
        generation.write_text(json.dumps({"eos_token_id": given}))
        assert read_config(tmp_path) == config.replace(eos_id=wanted)
        assert read_config(tmp_path / name) == config  # that file alone
    assert not [r for r in caplog.records if "eos_token_id" in r.message]
    for text in ("{}", '{"eos_token_id": null}'):
        generation.write_text(text)
        assert read_config(tmp_path) == config
    assert "generation_config.json names no eos_token_id: a text ends at 2; with transformers it wo" in caplog.text
    for wrong in ("2", [2, 2.5], -1, True, {"a": 1}, [[2]], 1 << 32):
        generation.write_text(json.dumps({"eos_token_id": wrong}))
        with pytest.raises(ConfigError, match=r"generation_config\.json: eos_token_id must be a token id, a list of"):
            read_config(tmp_path)
    generation.write_text("[]")
    with pytest.raises(ConfigError, match=r"generation_config\.json: must hold a JSON object"):
        read_config(tmp_path)


@pytest.mark.parametrize("wrong", ["2", [2, None], 2.0, True])
def test_wrong_end_tokens_are_named(wrong: object) -> None:
    with pytest.raises(ConfigError, match="eos_token_id must be a token id, a list of token ids or null, not "):
        from_hf({**HF_8X7B, "eos_token_id": wrong})
