"""Configurations in GGUF metadata."""

from __future__ import annotations

import struct
from typing import Any

import pytest

from mixtral.config import table
from mixtral.config.gguf import from_gguf, to_gguf
from mixtral.errors import ConfigError
from mixtral.gguf.header import TYPES, GgufHeader, TensorInfo
from mixtral.presets import PRESETS, preset

OUTPUT = {"output.weight": TensorInfo(TYPES[0], (4, 4), 0, 64)}
# What llama.cpp's converter says of the published Mixtral 8x7B; floats as they come out of 32 bits.
PUBLISHED = {
    "general.architecture": "llama", "llama.block_count": 32, "llama.context_length": 32768,
    "llama.embedding_length": 4096, "llama.feed_forward_length": 14336, "llama.attention.head_count": 32,
    "llama.attention.head_count_kv": 8, "llama.rope.freq_base": 1000000.0,
    "llama.attention.layer_norm_rms_epsilon": 9.999999747378752e-06, "llama.expert_count": 8,
    "llama.expert_used_count": 2, "llama.vocab_size": 32000, "llama.rope.dimension_count": 128,
    "tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2,
}  # fmt: skip


@pytest.fixture(autouse=True)
def _warnings_afresh() -> None:
    table.warn_once.cache_clear()


def read(metadata: dict[str, Any], tied: bool = False) -> Any:
    return from_gguf([GgufHeader(metadata, {}), GgufHeader({}, {} if tied else OUTPUT)])


def changed(**changes: Any) -> dict[str, Any]:
    """PUBLISHED with keys (dots as __) changed, or left out when None."""
    metadata = PUBLISHED | {key.replace("__", "."): value for key, value in changes.items()}
    return {key: value for key, value in metadata.items() if value is not None}


def test_published() -> None:
    assert read(PUBLISHED) == preset("mixtral-8x7b")
    assert read(PUBLISHED, tied=True) == preset("mixtral-8x7b").replace(tie_embeddings=True)


def test_what_may_be_left_out(caplog: pytest.LogCaptureFixture) -> None:
    tokens = {"tokenizer.ggml.tokens": ["a"] * 32000}
    assert read(changed(llama__vocab_size=None) | tokens) == preset("mixtral-8x7b")
    assert read(changed(llama__attention__head_count_kv=None)).n_kv_heads == 32
    assert read(changed(llama__rope__freq_base=None)).rope_theta == 1e4
    assert "GGUF without llama.rope.freq_base: 10000 assumed, as llama.cpp does" in caplog.text
    assert read(changed(llama__rope__freq_base=1e29)).rope_theta == 1e29  # a number of 64 bits is left as it is
    dense = read(changed(llama__expert_count=0, llama__expert_used_count=None))
    assert dense == preset("mistral-7b-v0.3").replace(vocab_size=32000)


_EOS, _EOT, _EOM = (f"tokenizer.ggml.{name}_token_id" for name in ("eos", "eot", "eom"))


@pytest.mark.parametrize(
    ("ends", "wanted"),
    [
        ({_EOS: 2, _EOT: 7}, (2, 7)),
        ({_EOS: 7, _EOT: 7, _EOM: 9}, (7, 9)),
        ({_EOM: 9}, (2, 9)),
        ({}, (2,)),
    ],
)  # fmt: skip
def test_all_end_tokens(ends: dict[str, int], wanted: tuple[int, ...]) -> None:
    without = {key: value for key, value in PUBLISHED.items() if key != _EOS}
    config = read(without | ends)
    assert config.eos_ids == wanted
    written = to_gguf(config) | {"general.architecture": "llama", "llama.attention.layer_norm_rms_epsilon": 1e-5}
    assert read(written) == config


def test_end_tokens_beyond_three(caplog: pytest.LogCaptureFixture) -> None:
    written = to_gguf(preset("mixtral-8x7b").replace(eos_id=[2, 7, 9, 11, 12]))
    assert [written[key] for key in (_EOS, _EOT, _EOM)] == [2, 7, 9]
    assert "llama.cpp knows 3 end tokens, and will not end at 11, 12" in caplog.text
    first = to_gguf(preset("mixtral-8x7b").replace(eos_id=[2, 7, 9]), text_end=9)  # the tokenizer's
    assert [first[key] for key in (_EOS, _EOT, _EOM)] == [9, 2, 7]
    other = to_gguf(preset("mixtral-8x7b").replace(eos_id=9), text_end=2)
    assert other[_EOS] == 2 and other[_EOT] == 9 and _EOM not in other
    assert _EOS not in to_gguf(preset("mixtral-8x7b").replace(eos_id=None))


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("tied", [False, True])
def test_there_and_back(name: str, tied: bool) -> None:
    config = preset(name).replace(norm_eps=1.1e-6, rope_theta=12345.678, init_std=0.02, eos_id=7, tie_embeddings=tied)
    rounded = {key: struct.unpack("<f", struct.pack("<f", v))[0] if isinstance(v, float) else v
               for key, v in to_gguf(config).items()}  # fmt: skip
    assert read(rounded | {"general.architecture": "llama"}, tied) == config


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        (changed(general__architecture="qwen2moe"), "general.architecture must be 'llama', as for .*, not 'qwen2moe'"),
        ({}, "general.architecture must be 'llama'.* not None"),
        (changed(llama__block_count=None), "llama.block_count is missing"),
        (changed(llama__vocab_size=None), "llama.vocab_size is missing"),
        (changed(llama__expert_used_count=None), "llama.expert_used_count is missing"),
        (changed(llama__block_count="32"), "llama.block_count must be an integer, not '32'"),
        (changed(llama__attention__head_count=[32, 8]), "llama.attention.head_count must be an integer"),
        (changed(llama__attention__layer_norm_rms_epsilon=float("nan")), "rms_epsilon must be a positive number"),
        (changed(tokenizer__ggml__eot_token_id=[7]), "tokenizer.ggml.eot_token_id must be a token id, not .7."),
        (changed(tokenizer__ggml__eos_token_id="2"), "tokenizer.ggml.eos_token_id must be a token id, not '2'"),
        (changed(llama__rope__scaling__type="yarn"), "llama.rope.scaling.type 'yarn' is not implemented; only 'none'"),
        (changed(llama__rope__scaling__factor=4.0), "llama.rope.scaling.factor 4.0 is not implemented"),
        (changed(llama__expert_shared_count=2), "llama.expert_shared_count 2 is not implemented; only 0 is"),
        (changed(llama__rope__dimension_count=64), "llama.rope.dimension_count 64 .*; only 128, the head dim, is"),
        (changed(llama__attention__value_length=64), "llama.attention.value_length 64 is not implemented"),
        (changed(llama__expert_feed_forward_length=5), "expert_feed_forward_length 5 .* only 14336, the ffn dim, is"),
    ],
)  # fmt: skip
def test_refusals(metadata: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read(metadata)


def test_what_is_not_written(caplog: pytest.LogCaptureFixture) -> None:
    for change in ({"router": "sigmoid"}, {"shared_experts": 1}):
        said = r"GGUF holds plain Mixtral models alone, not (router 'sigmoid'|1 shared experts); write"
        with pytest.raises(ConfigError, match=said):
            to_gguf(preset("tiny").replace(**change))
    assert to_gguf(preset("mistral-7b"))["llama.attention.sliding_window"] == 4096
    assert "llama.cpp will not apply the sliding window of 4096 tokens" in caplog.text
