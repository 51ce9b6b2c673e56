"""ModelConfig: every refusal, and the counting against a model of arithmetic simple enough to do by hand."""

import json
from typing import Any

import pytest

from mixtral.config import ModelConfig
from mixtral.errors import ConfigError

SHAPE = {"vocab_size": 7, "dim": 6, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "head_dim": 2, "ffn_dim": 5}
SPARSE = {**SHAPE, "n_experts": 3, "experts_per_token": 2}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dim": 0}, "dim must be a positive integer, not 0"),
        ({"n_layers": True}, "n_layers must be a positive integer, not True"),
        ({"vocab_size": "7"}, "vocab_size must be a positive integer, not '7'"),
        ({"rope_theta": -1.0}, "rope_theta must be a positive number, not -1.0"),
        ({"norm_eps": float("nan")}, "norm_eps must be a positive number, not nan"),
        ({"init_std": True}, "init_std must be a positive number, not True"),
        ({"sliding_window": 0}, "sliding_window must be a positive integer or null, not 0"),
        ({"sliding_window": True}, "sliding_window must be a positive integer or null, not True"),
        ({"tie_embeddings": 1}, "tie_embeddings must be true or false, not 1"),
        ({"bos_id": [1]}, "bos_id must be a token id or null, not [1]"),
        ({"eos_id": -1}, "eos_id must be a token id, a list of token ids or null, not -1"),
        ({"eos_id": [2, "3"]}, "eos_id must be a token id, a list of token ids or null, not [2, '3']"),
        ({"eos_id": [2, True]}, "eos_id must be a token id, a list of token ids or null, not [2, True]"),
        ({"eos_id": [2, 10**30]}, "eos_id must be a token id, a list of token ids or null, not [2, 1"),
        ({"n_heads": 3}, "n_heads 3 is not a multiple of n_kv_heads 2"),
        ({"head_dim": 3}, "head_dim must be even for the rotary embedding, not 3"),
        ({"experts_per_token": 4}, "experts_per_token 4 is more than n_experts 3"),
        ({"n_expert": 3}, "unknown field 'n_expert'; did you mean 'n_experts'?"),
    ],
)
def test_refusals(change: dict, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        ModelConfig.from_dict({**SPARSE, **change})
    assert message in str(error.value)


def test_missing_fields_are_named() -> None:
    with pytest.raises(ConfigError, match="missing dim, vocab_size"):
        ModelConfig.from_dict({k: v for k, v in SHAPE.items() if k not in ("dim", "vocab_size")})


def test_dict_round_trip_and_replace() -> None:
    config = ModelConfig(**SPARSE, sliding_window=4, tie_embeddings=True, eos_id=None)
    assert ModelConfig.from_dict(config.to_dict()) == config
    assert config.replace(n_layers=3) == ModelConfig.from_dict({**config.to_dict(), "n_layers": 3})


def test_counts_by_hand() -> None:
    config = ModelConfig(**SPARSE)
    attention = 6 * 8 + 2 * 6 * 4 + 8 * 6  # queries, keys and values, output
    expert = 3 * 6 * 5
    outside = 7 * 6 + 6 + 7 * 6  # embedding, last norm, output
    assert config.n_params() == 2 * (attention + 3 * expert + 6 * 3 + 2 * 6) + outside
    assert config.n_active_params() == 2 * (attention + 2 * expert + 6 * 3 + 2 * 6) + outside
    assert config.n_active_params(k=3) == config.n_params()
    assert config.replace(tie_embeddings=True).n_params() == config.n_params() - 7 * 6
    dense = ModelConfig(**SHAPE)
    assert dense.n_params() == dense.n_active_params() == 2 * (attention + expert + 2 * 6) + outside
    assert config.weight_bytes(bits=4) == config.n_params() // 2
    assert config.kv_bytes_per_token() == 2 * 2 * (2 * 2) * 2  # key and value, layers, width, bytes
    assert config.kv_bytes(10) == 10 * config.kv_bytes_per_token()
    assert config.replace(sliding_window=4).kv_bytes(10) == 4 * config.kv_bytes_per_token()


def test_flops_by_hand() -> None:
    config = ModelConfig(**SPARSE)
    products = 2 * (config.attention_params + 6 * 3 + 2 * config.expert_params) + 7 * 6
    seen = (1 + 2 + 3 + 4 + 5) / 5
    forward = 2 * (products + 2 * 2 * 8 * seen)  # scores and weighted values, over both layers
    assert config.flops_per_token(5) == round(forward)
    assert config.flops_per_token(5, backward=True) == round(3 * forward)
    assert config.flops_per_token(5, k=1) == round(forward - 2 * 2 * config.expert_params)
    windowed = (1 + 2 + 2 + 2 + 2) / 5
    assert config.replace(sliding_window=2).flops_per_token(5) == round(forward - 2 * 2 * 2 * 8 * (seen - windowed))


def test_counting_refuses_nonsense() -> None:
    config = ModelConfig(**SPARSE)
    with pytest.raises(ConfigError, match=r"k must lie in 1\.\.3 \(n_experts\), not 4"):
        config.n_active_params(k=4)
    with pytest.raises(ConfigError, match=r"k must lie in 1\.\.3"):
        config.flops_per_token(5, k=0)
    with pytest.raises(ConfigError, match="context must be a positive number of tokens, not 0"):
        config.flops_per_token(0)


@pytest.mark.parametrize(
    ("given", "kept", "ids"),
    [(7, 7, (7,)), ([7], 7, (7,)), ([7, 2, 7], (7, 2), (7, 2)), ((2, 3), (2, 3), (2, 3)), ([], None, ()),
     (None, None, ())],
)  # fmt: skip
def test_end_tokens_in_their_simplest_form(given: Any, kept: Any, ids: tuple[int, ...]) -> None:
    config = ModelConfig(**SPARSE, eos_id=given)
    assert (config.eos_id, config.eos_ids) == (kept, ids)
    assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
