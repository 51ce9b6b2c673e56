"""Mistral's own files: single, in shards, and the first 8x7B's with stacked experts."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mixtral.config import ModelConfig
from mixtral.config.formats import read_config, to_mistral
from mixtral.errors import WeightsError
from mixtral.weights import detect_format, load_state, save_mistral
from tests.weights.weight_states import CONFIGS, DENSE, SPARSE, assert_same, random_state


def interleave(rows_N: Tensor, heads: int) -> Tensor:
    """Half-layout rows of each head (i, i + C/2) to neighbours (2i, 2i + 1), row by row."""
    C = rows_N.shape[0] // heads
    order = [head * C + i + half * (C // 2) for head in range(heads) for i in range(C // 2) for half in (0, 1)]
    return rows_N[order]


def native(state: dict[str, Tensor], config: ModelConfig, stacked: bool) -> dict[str, Tensor]:
    """The same model as Mistral writes it, put together by hand."""
    H, G, C = config.n_heads, config.n_kv_heads, config.head_dim
    R = H // G
    theirs = {"tok_embeddings.weight": state["embedding.weight"], "norm.weight": state["norm.weight"]}
    if not config.tie_embeddings:
        theirs["output.weight"] = state["output.weight"]
    for layer in range(config.n_layers):
        b = f"layers.{layer}."
        heads = state[b + "attention.wqkv.weight"].split(C)
        groups = [heads[g * (R + 2) : (g + 1) * (R + 2)] for g in range(G)]
        theirs[b + "attention.wq.weight"] = interleave(torch.cat([h for group in groups for h in group[:R]]), H)
        theirs[b + "attention.wk.weight"] = interleave(torch.cat([group[R] for group in groups]), G)
        theirs[b + "attention.wv.weight"] = torch.cat([group[R + 1] for group in groups])
        for name in ("attention.wo", "attention_norm", "ffn_norm"):
            theirs[f"{b}{name}.weight"] = state[f"{b}{name}.weight"]
        if not config.is_sparse:
            parts = {"w1": state[b + "ffn.w13"][0], "w2": state[b + "ffn.w2"], "w3": state[b + "ffn.w13"][1]}
            theirs |= {f"{b}feed_forward.{n}.weight": w for n, w in parts.items()}
            continue
        w13, w2 = state[b + "ffn.experts.w13"], state[b + "ffn.experts.w2"]
        moe = b + ("block_sparse_moe." if stacked else "feed_forward.")
        theirs[moe + "gate.weight"] = state[b + "ffn.router.weight"]
        if stacked:
            theirs[moe + "w1"] = torch.cat([w13[e, 0] for e in range(config.n_experts)])
            theirs[moe + "w3"] = torch.cat([w13[e, 1] for e in range(config.n_experts)])
            theirs[moe + "w2"] = torch.cat([w2[e].T for e in range(config.n_experts)])
            continue
        for e in range(config.n_experts):
            parts = {"w1": w13[e, 0], "w2": w2[e], "w3": w13[e, 1]}
            theirs |= {f"{moe}experts.{e}.{n}.weight": w for n, w in parts.items()}
    return {name: tensor.contiguous() for name, tensor in theirs.items()}


def write(folder: Path, tensors: dict[str, Tensor], config: ModelConfig, shards: int, suffix: str = "pt") -> None:
    """As `.pt` or `.pth` shards with disjoint keys, or (0 shards) as consolidated.safetensors."""
    folder.mkdir(exist_ok=True)
    (folder / "params.json").write_text(json.dumps(to_mistral(config)))
    if not shards:
        save_file(tensors, folder / "consolidated.safetensors")
    for shard in range(shards):
        part = {name: tensor for i, (name, tensor) in enumerate(tensors.items()) if i % shards == shard}
        torch.save(part, folder / f"consolidated.{shard:02d}.{suffix}")


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize(("shards", "suffix"), [(0, ""), (1, "pth"), (3, "pt")])
@pytest.mark.parametrize("name", CONFIGS)
def test_load(name: str, shards: int, suffix: str, stacked: bool, tmp_path: Path) -> None:
    config = CONFIGS[name]
    state = random_state(config)
    write(tmp_path, native(state, config, stacked), config, shards, suffix)
    assert detect_format(tmp_path) == "mistral"
    assert read_config(tmp_path) == config
    assert_same(load_state(tmp_path, config), state)


@pytest.mark.parametrize("name", CONFIGS)
def test_save(name: str, tmp_path: Path) -> None:
    config = CONFIGS[name]
    state = random_state(config)
    save_mistral(state, config, tmp_path / "new")
    written = load_file(tmp_path / "new" / "consolidated.safetensors")
    expected = native(state, config, stacked=False)
    assert_same(dict(sorted(written.items())), dict(sorted(expected.items())))
    assert read_config(tmp_path / "new") == config
    assert_same(load_state(tmp_path / "new", config), state)


def test_a_swapped_gate_is_seen(tmp_path: Path) -> None:
    """The comparison above is one that a checkpoint with w1 and w3 exchanged fails."""
    state = random_state(SPARSE)
    theirs = native(state, SPARSE, stacked=True)
    w1, w3 = "layers.1.block_sparse_moe.w1", "layers.1.block_sparse_moe.w3"
    theirs[w1], theirs[w3] = theirs[w3], theirs[w1]
    write(tmp_path, theirs, SPARSE, shards=2)
    with pytest.raises(AssertionError, match=r"layers\.1\.ffn\.experts\.w13"):
        assert_same(load_state(tmp_path, SPARSE), state)


def test_a_tensor_in_two_shards(tmp_path: Path) -> None:
    theirs = native(random_state(DENSE), DENSE, stacked=False)
    write(tmp_path, theirs, DENSE, shards=2)
    torch.save(theirs, tmp_path / "consolidated.00.pt")
    message = r"consolidated\.01\.pt: tensors that an earlier shard holds too: .*, .*, .* and \d+ more$"
    with pytest.raises(WeightsError, match=message):
        load_state(tmp_path, DENSE)


def test_a_missing_shard(tmp_path: Path) -> None:
    write(tmp_path, native(random_state(DENSE), DENSE, stacked=False), DENSE, shards=2)
    (tmp_path / "consolidated.01.pt").unlink()
    with pytest.raises(WeightsError, match=r"do not fit the config: \d+ missing: .* and \d+ more$"):
        load_state(tmp_path, DENSE)


class Surprise:
    """What a shard must not be able to make on loading."""

    def __reduce__(self) -> tuple[object, ...]:
        return logging.critical, ("code from a weight file ran",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a readable torch file of plain tensors"),
        (b"PK\x03\x04 and then nothing", "not a readable torch file of plain tensors"),
        ("cut", "not a readable torch file of plain tensors"),
        ([torch.ones(2)], "must hold a dictionary of tensors, not a list"),
        ({"model": {"w": torch.ones(2)}}, "'model' is a dict; names with tensors are wanted"),
        (Surprise(), "not a readable torch file of plain tensors"),
    ],
)
def test_bad_shards(content: object, message: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "consolidated.00.pt"
    if content == "cut":
        torch.save(random_state(DENSE), file)
        file.write_bytes(file.read_bytes()[:-500])
    elif isinstance(content, bytes):
        file.write_bytes(content)
    else:
        torch.save(content, file)
    with pytest.raises(WeightsError) as error:
        load_state(tmp_path, DENSE)
    assert str(error.value).startswith(f"{file}: {message}") and "\n" not in str(error.value)
    assert "code from a weight file ran" not in caplog.text
