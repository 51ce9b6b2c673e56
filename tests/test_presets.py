"""The published sizes, exactly, and our own two within what their names promise."""

import pytest

from mixtral.errors import ConfigError
from mixtral.presets import PRESETS, preset

# vocabulary, rotary base, context, window, parameters, active parameters, KiB of keys and values per token
PUBLISHED = {
    "mistral-7b": (32000, 1e4, 32768, 4096, 7_241_732_096, 7_241_732_096, 128),
    "mistral-7b-v0.3": (32768, 1e6, 32768, None, 7_248_023_552, 7_248_023_552, 128),
    "mixtral-8x7b": (32000, 1e6, 32768, None, 46_702_792_704, 12_879_925_248, 128),
    "mixtral-8x22b": (32000, 1e6, 65536, None, 140_620_634_112, 39_152_031_744, 224),
    "mixtral-8x22b-v0.3": (32768, 1e6, 65536, None, 140_630_071_296, 39_161_468_928, 224),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published(name: str) -> None:
    vocab, theta, context, window, total, active, kv_kib = PUBLISHED[name]
    config = preset(name)
    assert (config.vocab_size, config.rope_theta) == (vocab, theta)
    assert (config.context, config.sliding_window) == (context, window)
    assert (config.n_params(), config.n_active_params()) == (total, active)
    assert config.kv_bytes_per_token() == kv_kib * 1024
    assert (config.norm_eps, config.tie_embeddings, config.head_dim, config.n_kv_heads) == (1e-5, False, 128, 8)


def test_mixtral_8x7b_shares() -> None:
    config = preset("mixtral-8x7b")
    experts = config.n_layers * config.n_experts * config.expert_params
    assert experts == 45_097_156_608
    assert round(100 * experts / config.n_params(), 1) == 96.6
    assert round(config.weight_bytes() / 2**30, 2) == 86.99
    active = [round(config.n_active_params(k) / 1e9, 2) for k in (1, 2, 3, 8)]
    assert active == [7.24, 12.88, 18.52, 46.70]
    assert 2 * config.expert_params == 352_321_536  # of one layer


def test_our_own() -> None:
    tiny, small = preset("tiny"), preset("small")
    assert tiny.to_dict() | {
        "dim": 128, "n_layers": 3, "n_heads": 2, "n_kv_heads": 1, "head_dim": 64, "ffn_dim": 192, "n_experts": 8,
        "experts_per_token": 2, "vocab_size": 1024, "context": 512, "rope_theta": 1e4,
    } == tiny.to_dict()  # fmt: skip
    assert 100e6 < small.n_params() < 200e6
    assert small.is_sparse


def test_unknown_name() -> None:
    with pytest.raises(ConfigError, match=r"^unknown preset 'mixtral-8x7'; did you mean 'mixtral-8x7b'\?$"):
        preset("mixtral-8x7")
    with pytest.raises(ConfigError, match=r"known: .*tiny"):
        preset("zzz")
    assert list(PRESETS)[:2] == ["tiny", "small"]
