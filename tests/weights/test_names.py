"""The table: it covers every element of ours exactly once, and its rotary rows agree with an oracle written here."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from mixtral.config import ModelConfig
from mixtral.presets import PRESETS, preset
from mixtral.weights.names import Ffn, Format, layouts, output_name, parameter_shapes, slots
from tests.weights.weight_states import CONFIGS, DENSE, SPARSE

LAYOUTS: list[tuple[str, Format, Ffn]] = [
    (name, format, ffn)
    for name in CONFIGS for format in ("hf", "mistral", "gguf") for ffn in layouts(CONFIGS[name], format)
]


@pytest.mark.parametrize(("name", "format", "ffn"), LAYOUTS)
def test_every_element_is_covered_once(name: str, format: Format, ffn: Ffn) -> None:
    """So no rule can overlap another, or leave a part of ours unfilled, and every view has its file's size."""
    config = CONFIGS[name]
    seen = {ours: torch.zeros(shape, dtype=torch.int64) for ours, shape in parameter_shapes(config).items()}
    for theirs, slot in slots(config, format, ffn).items():
        if theirs == output_name(format) and config.tie_embeddings:
            continue
        view = slot.view(seen[slot.ours])
        assert view.numel() == math.prod(slot.shape), theirs
        view += 1
    assert all(bool((tensor == 1).all()) for tensor in seen.values())


@pytest.mark.parametrize("name", PRESETS)
def test_shapes_add_up_to_the_count(name: str) -> None:
    config = preset(name)
    assert sum(math.prod(shape) for shape in parameter_shapes(config).values()) == config.n_params()
    tied = config.replace(tie_embeddings=True)
    assert sum(math.prod(shape) for shape in parameter_shapes(tied).values()) == tied.n_params()


def test_published_names() -> None:
    """Names and shapes as they stand in the published files."""
    config = preset("mixtral-8x7b")
    hf = {name: slot.shape for name, slot in slots(config, "hf", "per-expert").items()}
    assert len(hf) == 3 + 32 * (6 + 1 + 8 * 3)
    assert hf["model.layers.31.block_sparse_moe.experts.7.w2.weight"] == (4096, 14336)
    assert hf["model.layers.0.self_attn.k_proj.weight"] == (1024, 4096)
    old = {name: slot.shape for name, slot in slots(config, "mistral", "stacked").items()}
    assert len(old) == 3 + 32 * (6 + 1 + 3)
    assert old["layers.0.block_sparse_moe.w2"] == (8 * 14336, 4096)
    native = {name: slot.shape for name, slot in slots(preset("mistral-7b"), "mistral", "dense").items()}
    assert native["layers.31.feed_forward.w1.weight"] == (14336, 4096)
    assert next(iter(native)) == "tok_embeddings.weight" and list(native)[-1] == "output.weight"
    gguf = {name: slot.shape for name, slot in slots(config, "gguf", "stacked").items()}
    assert len(gguf) == 3 + 32 * (6 + 1 + 3)
    assert gguf["blk.31.ffn_down_exps.weight"] == (8, 4096, 14336) and gguf["blk.0.attn_k.weight"] == (1024, 4096)


def rotate_pairs(x_HC: Tensor, position: int, theta: float) -> Tensor:
    """Mistral's own rotation: neighbouring elements are one complex number."""
    width = x_HC.shape[-1]
    frequencies = 1.0 / theta ** (torch.arange(0, width, 2, dtype=torch.float64) / width)
    turn = torch.polar(torch.ones_like(frequencies), position * frequencies)
    return torch.view_as_real(torch.view_as_complex(x_HC.reshape(-1, width // 2, 2)) * turn).flatten(-2)


def rotate_halves(x_HC: Tensor, position: int, theta: float) -> Tensor:
    """Hugging Face's rotation: an element's partner is half a head away."""
    width = x_HC.shape[-1]
    frequencies = 1.0 / theta ** (torch.arange(0, width, 2, dtype=torch.float64) / width)
    angles = torch.cat([frequencies, frequencies]) * position
    first, second = x_HC.chunk(2, dim=-1)
    return x_HC * angles.cos() + torch.cat([-second, first], dim=-1) * angles.sin()


@pytest.mark.parametrize("names", [("mistral", "layers.0.attention.w"), ("gguf", "blk.0.attn_")])
@pytest.mark.parametrize("config", [SPARSE, DENSE])
def test_native_rotary_rows_against_an_oracle(config: ModelConfig, names: tuple[Format, str]) -> None:
    """Attention scores from native weights with complex rotation equal those from ours with rotated halves."""
    random = torch.Generator().manual_seed(1)
    H, G, C, D = config.n_heads, config.n_kv_heads, config.head_dim, config.dim
    wq, wk = (torch.randn(n * C, D, generator=random, dtype=torch.float64) for n in (H, G))
    x, y = torch.randn(2, D, generator=random, dtype=torch.float64)
    wqkv = torch.zeros(parameter_shapes(config)["layers.0.attention.wqkv.weight"], dtype=torch.float64)
    format, prefix = names
    table = slots(config, format, layouts(config, format)[0])
    for name, theirs in (("q", wq), ("k", wk)):
        view = table[f"{prefix}{name}.weight"].view(wqkv)
        view.copy_(theirs.view(view.shape))
    for positions in ((0, 0), (5, 2), (40, 3)):
        q = rotate_pairs((wq @ x).view(H, C), positions[0], config.rope_theta)
        k = rotate_pairs((wk @ y).view(G, C), positions[1], config.rope_theta)
        expected_H = torch.stack([q[h] @ k[h // (H // G)] for h in range(H)])

        grouped = wqkv.view(G, H // G + 2, C, D)
        ours_q = rotate_halves((grouped[:, :-2].reshape(H * C, D) @ x).view(H, C), positions[0], config.rope_theta)
        ours_k = rotate_halves((grouped[:, -2].reshape(G * C, D) @ y).view(G, C), positions[1], config.rope_theta)
        scores_H = torch.stack([ours_q[h] @ ours_k[h // (H // G)] for h in range(H)])
        torch.testing.assert_close(scores_H, expected_H, rtol=1e-12, atol=1e-10)
