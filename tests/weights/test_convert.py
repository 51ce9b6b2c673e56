"""Conversion in every direction, with the tokenizer's files, and what it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from mixtral.config.formats import read_config
from mixtral.errors import ConfigError, UsageError
from mixtral.tokenizer import load_tokenizer
from mixtral.weights import convert, detect_format, load_state, save_hf, save_mistral
from mixtral.weights.safetensors_file import SafetensorsFile
from tests.tokenizer.conftest import tokenizer_named
from tests.tokenizer.kinds import KINDS
from tests.tokenizer.lines import make_lines
from tests.weights.weight_states import CONFIGS, DENSE, SPARSE, assert_same, random_state

BESIDE = ("tokenizer.model", "tokenizer.model.v3", "tekken.json", "tokenizer.json", "tokenizer_config.json",
          "special_tokens_map.json", "added_tokens.json", "generation_config.json", "chat_template.jinja")  # fmt: skip
GENERATION = '{"eos_token_id": 2, "temperature": 0.5}'


@pytest.mark.parametrize("to", ["hf", "mistral"])
@pytest.mark.parametrize("save", [save_hf, save_mistral])
@pytest.mark.parametrize("name", CONFIGS)
def test_every_direction(name: str, save: object, to: str, tmp_path: Path) -> None:
    config = CONFIGS[name]
    state = random_state(config, torch.bfloat16)
    save(state, config, tmp_path / "src")  # type: ignore[operator]
    convert(tmp_path / "src", tmp_path / "dst", to)
    assert detect_format(tmp_path / "dst") == to
    assert read_config(tmp_path / "dst") == config
    assert_same(load_state(tmp_path / "dst", config), state)


@pytest.mark.parametrize("to", ["hf", "mistral"])
def test_dtype_and_progress(to: str, tmp_path: Path) -> None:
    state = random_state(SPARSE)
    save_mistral(state, SPARSE, tmp_path / "src")
    told: list[tuple[str, int, int]] = []
    convert(tmp_path / "src", tmp_path / "dst", to, torch.bfloat16, progress=lambda *at: told.append(at))
    assert_same(load_state(tmp_path / "dst", SPARSE), {name: t.bfloat16() for name, t in state.items()})
    assert {what for what, _, _ in told} == {"writing"}
    done = [(at, total) for _, at, total in told]
    assert done == sorted(done) and len(done) > SPARSE.n_layers
    assert {total for _, total in done} == {done[-1][0]} == {SPARSE.weight_bytes(16)}


def test_fused_experts(tmp_path: Path) -> None:
    state = random_state(SPARSE)
    save_mistral(state, SPARSE, tmp_path / "src")
    convert(tmp_path / "src", tmp_path / "dst", "hf", fused=True)
    names = SafetensorsFile(tmp_path / "dst/model.safetensors").headers
    assert "model.layers.0.mlp.experts.gate_up_proj" in names and not any("block_sparse_moe" in n for n in names)
    assert_same(load_state(tmp_path / "dst", SPARSE), state)


def test_files_beside_the_weights(tmp_path: Path) -> None:
    save_hf(random_state(DENSE), DENSE, tmp_path / "src")
    for name in (*BESIDE, "README.md", "optimizer.pt"):
        (tmp_path / "src" / name).write_text(name)
    (tmp_path / "src/generation_config.json").write_text(GENERATION)  # which is read too
    (tmp_path / "src/additional_chat_templates").mkdir()
    (tmp_path / "src/additional_chat_templates/rag.jinja").write_text("rag")
    (tmp_path / "src/chat_templates").mkdir()
    convert(tmp_path / "src", tmp_path / "dst", "mistral")
    written = {path.name for path in (tmp_path / "dst").iterdir()}
    assert written == {*BESIDE, "additional_chat_templates", "params.json", "consolidated.safetensors"}
    assert (tmp_path / "dst/additional_chat_templates/rag.jinja").read_text() == "rag"
    assert (tmp_path / "dst/generation_config.json").read_text() == GENERATION
    assert all((tmp_path / "dst" / name).read_text() == name for name in BESIDE if name != "generation_config.json")


@pytest.mark.parametrize(
    ("said", "ends"),
    [
        (None, (2, 7, 9)),
        ({"temperature": 0.5}, (2, 7, 9)),
        ({"eos_token_id": [7, 4]}, (7, 4)),
        ({"eos_token_id": 4}, (4,)),
    ],
)
@pytest.mark.parametrize("route", [("mistral",), ("hf",), ("gguf",), ("mistral", "hf"), ("gguf", "hf", "mistral")])
def test_all_end_tokens_survive(
    said: dict[str, object] | None, ends: tuple[int, ...], route: tuple[str, ...], tmp_path: Path
) -> None:
    config = DENSE.replace(eos_id=[2, 7, 9])
    save_hf(random_state(config), config, tmp_path / "0")
    if said is not None:
        (tmp_path / "0/generation_config.json").write_text(json.dumps(said))
    source = tmp_path / "0"
    for number, to in enumerate(route, start=1):
        target = tmp_path / (f"{number}.gguf" if to == "gguf" else str(number))
        convert(source, target, to)
        assert read_config(target).eos_ids == ends, to
        source = target
    if "gguf" not in route and said:
        assert said.items() <= json.loads((source / "generation_config.json").read_text()).items()


@pytest.mark.parametrize("kind", ["own", "added, added_tokens_decoder"])
def test_a_model_alone_gets_the_tokenizer_json_that_transformers_needs(kind: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    save_mistral(random_state(SPARSE), SPARSE, tmp_path / "src")
    if kind == "own":
        (tmp_path / "src/tokenizer.model.v3").write_bytes(tokenizer_named("own")._files()["own.model.v3"])
    else:
        KINDS[kind].make(tmp_path / "made")
        for name in ("tokenizer.model", "tokenizer_config.json"):
            shutil.copy(tmp_path / "made" / name, tmp_path / "src")
    ours, lines = load_tokenizer(tmp_path / "src"), make_lines(100, seed=2)
    convert(tmp_path / "src", tmp_path / "dst", "hf")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "dst", split_special_tokens=True)
    assert theirs(lines)["input_ids"] == ours.encode_batch(lines) and len(theirs) == ours.vocab_size
    again = load_tokenizer(tmp_path / "dst")
    assert (again.fingerprint, again.version, again.eos_id) == (ours.fingerprint, ours.version, ours.eos_id)


@pytest.mark.parametrize("save", [save_hf, save_mistral])
def test_a_damaged_tokenizer_is_copied_as_it_is(save: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save(random_state(DENSE), DENSE, tmp_path / "src")
    (tmp_path / "src/tokenizer.model").write_text("damaged")
    convert(tmp_path / "src", tmp_path / "dst", "hf")
    assert (tmp_path / "dst/tokenizer.model").read_text() == "damaged"
    assert "its tokenizer is copied without being read" in caplog.text
    assert not (tmp_path / "dst/tokenizer.json").exists()


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"unknown format 'mistrall'; did you mean 'mistral'\?"):
        convert(tmp_path, tmp_path / "dst", "mistrall")
    with pytest.raises(UsageError, match="format 'mistral' has no fused experts; only 'hf' has"):
        convert(tmp_path, tmp_path / "dst", "mistral", fused=True)
    with pytest.raises(ConfigError, match="nowhere: no such file or folder"):
        convert(tmp_path / "nowhere", tmp_path / "dst", "hf")
    save_hf(random_state(SPARSE), SPARSE, tmp_path / "src")
    with pytest.raises(UsageError, match="src: exists already"):
        convert(tmp_path / "src", tmp_path / "src", "mistral")
    (tmp_path / "src" / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(Exception, match="not a safetensors file"):
        convert(tmp_path / "src", tmp_path / "dst", "mistral")
    assert [path.name for path in tmp_path.iterdir()] == ["src"]
